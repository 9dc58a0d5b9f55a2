"""Quest: pages whose element-wise key bounds promise the most attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, one_of
from ..arguments import Candidates, PageBounds, Paging
from ..layer import Selector, stored_bytes
from ..ops.select_pages import select_pages


@dataclass(frozen=True)
class Quest(Selector):
    """Page-granular selection from (min, max) bounds.

    Args:
        token_budget, budget_fraction: see `Selector`; the paper's settings are 8192 tokens or a quarter of the context.
        bounds_dtype: "int8" (codes with a scale and zero a page) or "model" (K's dtype). The codes cost no attention mass: SmolLM2, 4,096
            tokens, .7057 / .8165 / .9106 in 1/16, 1/8, 1/4 of the tokens against .7058 / .8163 / .9106 (docs/accuracy-smollm2.md).

    Source: Quest, arXiv 2406.10774.
    """

    token_budget: int = 8192
    bounds_dtype: str = "int8"

    name: ClassVar[str] = "quest"
    kernel: ClassVar[str] = "quest"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, bounds_dtype=one_of("int8", "model"))

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        k_cache, eight_bit = layer.kv.k_cache, self.bounds_dtype == "int8"
        shape = (k_cache.shape[0], layer.num_kv_heads, 2)
        bounds = layer.new_pages((*shape, layer.head_dim), dtype=torch.uint8 if eight_bit else layer.dtype)
        layer.bounds = PageBounds(bounds, layer.new_pages(shape, dtype=torch.bfloat16) if eight_bit else None)
        return {}

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        policy, paging = layer.policy, Paging(page_table, seq_lens)
        lists = select_pages(q, layer.bounds, paging, layer.page_size, policy.budget, sm_scale, policy.always)
        return Candidates(*lists, layer.page_size)

    def scan_bytes(self, layer, tokens) -> list[float]:
        bounds, scale = layer.bounds
        scale_bytes = 0 if scale is None else stored_bytes(scale)
        return [2 * (layer.head_dim * stored_bytes(bounds) + scale_bytes) / layer.page_size] * layer.num_kv_heads
