"""A selector of one's own: page means instead of page bounds. Run: python examples/custom_selector.py

Everything a selector needs is here; no file of the package is touched. It works in eager, compiled and CUDA-graph decoding, because
its methods are tensor code of fixed shape.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from twilight_ops import Candidates, Selector, TwilightConfig
from twilight_ops.integration import generate


@dataclass(frozen=True)
class PageMeans(Selector):
    """Ranks pages by the dot product of the query with the page's mean key."""

    token_budget: int = 128
    name: ClassVar[str] = "page_means"

    def allocate(self, layer, previous):
        pages, kv_heads, _, head_dim = layer.kv.k_cache.shape
        return {"page_means": torch.zeros(pages, kv_heads, head_dim, dtype=torch.float32, device=layer.kv.k_cache.device)}

    def append(self, k, layer, page_table, seq_lens, positions):
        # append_kv has stored the new keys already: take the mean of every page's live rows again. (A TwilightCache has no holes in
        # its page table; where there are -1 entries, mask them here.)
        size = layer.page_size
        keys = layer.kv.k_cache[page_table.long()].float()  # [B, M, Hkv, S, D]
        slots = torch.arange(page_table.shape[1] * size, device=k.device).view(-1, 1, size, 1)
        live = slots < seq_lens.view(-1, 1, 1, 1, 1)
        means = keys.where(live, 0.0).sum(3) / live.sum(3).clamp(min=1)
        layer.selector_state["page_means"][page_table.long()] = means

    def select(self, q, layer, page_table, seq_lens, sm_scale):
        size, kv_heads = layer.page_size, layer.num_kv_heads
        means = layer.selector_state["page_means"][page_table.long()]  # [B, M, Hkv, D]
        query = q.float().unflatten(2, (kv_heads, -1)).mean(dim=(1, 3))  # [B, Hkv, D]
        scores = torch.einsum("bhd,bmhd->bhm", query, means)
        pages = torch.arange(page_table.shape[1], device=q.device)
        plan, tokens = layer.plan, q.shape[1]
        newest = (seq_lens.view(-1, 1, 1) - max(plan.recent_tokens, tokens)) // size
        # The first and the newest tokens that the configuration keeps come before everything else.
        scores = scores.masked_fill((pages >= newest) | (pages * size < plan.sink_tokens), torch.inf)
        used = ((seq_lens + size - 1) // size).view(-1, 1, 1)
        scores = scores.masked_fill(pages >= used, -torch.inf)

        capacity = layer.limits(page_table, tokens).page_capacity(size)
        best = scores.topk(capacity, dim=-1).indices
        counts = used[..., 0].clamp(max=capacity).expand(-1, kv_heads)
        listed = torch.arange(capacity, device=q.device) < counts[..., None]
        indices = torch.where(listed, best, len(pages)).sort(dim=-1).values
        return Candidates(torch.where(listed, indices, -1).int(), counts.int().contiguous(), size)


def main() -> None:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000
    )
    shape._attn_implementation = "twilight"
    model = LlamaForCausalLM(shape).eval()
    prompt = torch.randint(0, 1000, (1, 600))
    config = TwilightConfig(selector=PageMeans(token_budget=128), top_p=0.9, dense_below=0)
    result = generate(model, prompt, config, max_new_tokens=16, capture="eager")
    print(result.tokens.tolist())
    print(result.budget)


if __name__ == "__main__":
    main()
