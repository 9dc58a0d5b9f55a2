"""Quest: pages whose element-wise key bounds promise the most attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._settings import normalise, one_of
from ..ops import select_pages
from .base import Candidates, Selector, stored_bytes


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
    uses_page_bounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, bounds_dtype=one_of("int8", "model"))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        plan = layer.plan
        indices, counts = select_pages(
            q,
            layer.page_bounds,
            layer.bounds_scale,
            page_table,
            seq_lens,
            layer.page_size,
            self.token_budget,
            self.budget_fraction,
            sm_scale,
            plan.sink_tokens,
            plan.recent_tokens,
            layer.head_token_budget,
        )
        return Candidates(indices, counts, layer.page_size)

    def scan_bytes(self, layer) -> list[float]:
        kv_heads, head_dim = layer.page_bounds.shape[1], layer.page_bounds.shape[3]
        scale = 0 if layer.bounds_scale is None else stored_bytes(layer.bounds_scale)
        return [2 * (head_dim * stored_bytes(layer.page_bounds) + scale) / layer.page_size] * kv_heads
