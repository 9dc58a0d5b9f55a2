"""Bytes of the cache that one decode step reads, counted from what a run proposed and kept."""

from __future__ import annotations

from dataclasses import dataclass

from ..layer import PagedKVLayer, stored_bytes
from ..report import Budget, BudgetReport


@dataclass(frozen=True)
class BytesRead:
    """Means a sequence and step; `dense` is plain K and V of the same layers.

    `sparse_layers` leaves out the layers that are dense by configuration, whose cost no selector changes.
    """

    total: float
    dense: float
    sparse_layers: float
    sparse_layers_dense: float

    @property
    def share(self) -> float:
        return self.total / self.dense

    @property
    def sparse_share(self) -> float:
        return self.sparse_layers / self.sparse_layers_dense if self.sparse_layers_dense else 1.0


def head_bytes(layer: PagedKVLayer, head: int, budget: Budget) -> float:
    """One KV head: the selector's scan of every live token, the INT4 estimate of the candidates, K and V of what is kept."""
    head_dim = layer.head_dim
    row = 2 * head_dim * stored_bytes(layer.kv.k_cache)  # K and V of one token
    plan = layer.plan
    if plan.selector is None:
        return budget.live * row
    read = budget.live * plan.selector.scan_bytes(layer, budget.live)[head] + budget.kept.mean * row
    if plan.prunes:
        read += budget.candidates.mean * plan.selector.estimate_bytes(layer)[head]
    return read


def bytes_read(layers: list[PagedKVLayer], report: BudgetReport) -> BytesRead:
    total = dense = sparse = sparse_dense = 0.0
    for layer, budgets in zip(layers, report.layers, strict=True):
        for head, budget in enumerate(budgets.heads):
            mine = head_bytes(layer, head, budget)
            plain = budget.live * 2 * layer.head_dim * stored_bytes(layer.kv.k_cache)
            total, dense = total + mine, dense + plain
            if layer.plan.selector is not None:
                sparse, sparse_dense = sparse + mine, sparse_dense + plain
    return BytesRead(total, dense, sparse, sparse_dense)
