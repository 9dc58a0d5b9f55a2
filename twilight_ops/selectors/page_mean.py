"""PageMean: pages whose mean key promises the most attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import Candidates, Paging
from ..layer import Selector, stored_bytes
from ..ops.select_pages import select_pages
from ._paged import allocate_means


@dataclass(frozen=True)
class PageMean(Selector):
    """Page-granular selection from the mean of each page's keys, four bits a channel.

    A mean averages a sink away: keep the first page among the candidates (`sink_tokens`), or accuracy is lost.

    Args:
        token_budget, budget_fraction: see `Selector`.
    """

    token_budget: int = 768
    budget_fraction: float = 0.25

    name: ClassVar[str] = "page_mean"
    kernel: ClassVar[str] = "page_mean"

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        layer.means = allocate_means(layer)
        return {}

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        policy, paging = layer.policy, Paging(page_table, seq_lens)
        lists = select_pages(
            q, None, paging, layer.page_size, policy.budget, sm_scale, policy.always, means=layer.means, shadow=layer.shadow
        )
        return Candidates(*lists, layer.page_size)

    def scan_bytes(self, layer, tokens) -> list[float]:
        codes, scale = layer.means
        page_bytes = layer.head_dim / 2 * stored_bytes(codes) + 2 * stored_bytes(scale)
        return [page_bytes / layer.page_size] * layer.num_kv_heads
