"""A selector of one's own in plain PyTorch: every few pages. Run: python examples/selector.py

`select` may compute anything of fixed shape; the pruner and exact attention follow. `examples/custom_selector.py` keeps tensors of its
own and launches a Triton kernel; `docs/selectors.md` says what the methods are for.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight_ops import Candidates, Selector, TwilightConfig
from twilight_ops.cli.models import random_tiny
from twilight_ops.integration import generate


@dataclass(frozen=True)
class Strided(Selector):
    """Every `stride`-th page, and those of the tokens that the configuration always keeps."""

    stride: int = 4
    name: ClassVar[str] = "strided"

    def select(self, q, layer, page_table, seq_lens, sm_scale):
        size, limits = layer.page_size, layer.limits(page_table, q.shape[1])
        pages, lens = torch.arange(page_table.shape[1], device=q.device), seq_lens[:, None]
        first, last = pages * size, (pages + 1) * size
        always = (first < limits.sink_tokens) | (last > lens - limits.recent_tokens)
        kept = (first < lens) & (always | (pages % self.stride == 0))  # [B, M]
        listed = torch.where(kept, pages, len(pages)).sort(-1).values  # ascending, those that are not kept last
        indices = torch.where(listed < len(pages), listed, -1).int()
        per_head = (each[:, None].expand(-1, layer.num_kv_heads, *each.shape[1:]).contiguous() for each in (indices, kept.sum(-1).int()))
        return Candidates(*per_head, tokens_per_index=size)


if __name__ == "__main__":
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    prompt = torch.randint(0, 256, (1, 600), device=device, generator=torch.Generator(device).manual_seed(0))
    config = TwilightConfig(Strided(stride=4), top_p=0.9, dense_below=0)
    result = generate(random_tiny(device, dtype), prompt, config, max_new_tokens=16, capture="eager", eos_token_ids=())
    print(result.tokens.tolist())
    print(result.budget)
