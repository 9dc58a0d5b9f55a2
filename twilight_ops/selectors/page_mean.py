"""PageMean: pages whose mean key promises the most attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import Candidates, PageMeans, Paging
from ..layer import Selector, stored_bytes
from ..ops.select_pages import select_pages


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
        shape = (layer.kv.k_cache.shape[0], layer.num_kv_heads)
        codes = layer.new_pages((*shape, layer.head_dim // 2), dtype=torch.uint8)
        layer.means = PageMeans(codes, layer.new_pages((*shape, 2), dtype=torch.bfloat16))
        return {}

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        policy, paging = layer.policy, Paging(page_table, seq_lens)
        lists = select_pages(
            q, None, paging, layer.page_size, policy.budget, sm_scale, policy.always, means=layer.means, shadow=layer.shadow
        )
        return Candidates(*lists, layer.page_size)

    def scan_bytes(self, layer) -> list[float]:
        codes, scale = layer.means
        page_bytes = layer.head_dim / 2 * stored_bytes(codes) + 2 * stored_bytes(scale)
        return [page_bytes / layer.page_size] * layer.num_kv_heads
