"""What a run kept: the device's budget counters as a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .capacity import (
    COUNTER_CANDIDATES,
    COUNTER_HEADER,
    COUNTER_KEPT,
    COUNTER_LIVE,
    COUNTER_MASS,
    COUNTER_ROWS,
    HISTOGRAM_BINS,
    histogram_bin_start,
)
from .paged_kv_cache import PagedKVLayer

MASS_UNIT = 2.0**20


@dataclass(frozen=True)
class Spread:
    """Mean, 5th and 95th percentile in tokens; percentiles are exact below 16 tokens and up to an eighth of an octave low above."""

    mean: float
    p5: float
    p95: float


@dataclass(frozen=True)
class Budget:
    """Token counts of one KV head, or of several together.

    Args:
        calls: (sequence, step) pairs counted.
        live: mean tokens in the cache.
        candidates: I0, what the selector proposed.
        kept: I1, what attention read.
        captured_mass: estimated attention weight kept, mean over the group's query heads.
        pruned: share of the live tokens that attention did not read.
    """

    calls: int
    live: float
    candidates: Spread
    kept: Spread
    captured_mass: float
    pruned: float


@dataclass(frozen=True)
class LayerBudget:
    layer: int
    selector: str
    heads: list[Budget]


@dataclass(frozen=True)
class BudgetReport:
    """Budgets of every layer and KV head, and of all sparse layers together (None where no sparse layer has decoded yet)."""

    layers: list[LayerBudget]
    sparse: Budget | None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        spreads = f"{'I0 mean/p5/p95':>22} {'I1 mean/p5/p95':>22}"
        lines = [f"{'layer':>5} {'KV head':>7} {'selector':<16}{'live':>9} {spreads} {'mass':>7} {'pruned':>7}"]
        for layer in self.layers:
            for index, budget in enumerate(layer.heads):
                lines.append(f"{layer.layer:>5} {index:>7} {layer.selector:<16}{_row(budget)}")
        if self.sparse is not None:
            lines.append(f"{'all':>5} {'':>7} {'sparse layers':<16}{_row(self.sparse)}")
        return "\n".join(lines)


def _row(budget: Budget) -> str:
    spreads = " ".join(f"{f'{s.mean:.1f} / {s.p5:.0f} / {s.p95:.0f}':>22}" for s in (budget.candidates, budget.kept))
    return f"{budget.live:>9.1f} {spreads} {budget.captured_mass:>7.4f} {budget.pruned:>7.2%}"


def budget_report(layers: Sequence[PagedKVLayer]) -> BudgetReport:
    """Reads the counters of all layers, one copy to the host."""
    if not layers:
        return BudgetReport([], None)
    counters = [counter.long() for counter in _to_host([layer.budget_counters for layer in layers])]
    report = []
    for index, (layer, rows) in enumerate(zip(layers, counters, strict=True)):
        name = "dense" if layer.plan.selector is None else layer.plan.selector.name
        report.append(LayerBudget(index, name, [_budget(row) for row in rows]))
    sparse = [rows.sum(0) for layer, rows in zip(layers, counters, strict=True) if layer.plan.selector is not None]
    together = _budget(torch.stack(sparse).sum(0)) if sparse else None
    return BudgetReport(report, together if together is not None and together.calls else None)


def _to_host(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """One transfer where the shapes agree, which they do unless layers differ in KV heads."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(list(tensors)).cpu().unbind(0)
    return [tensor.cpu() for tensor in tensors]


def _budget(row: Tensor) -> Budget:
    calls = int(row[COUNTER_ROWS])
    live = int(row[COUNTER_LIVE])
    kept = int(row[COUNTER_KEPT])
    per_call = max(calls, 1)
    first, second = COUNTER_HEADER, COUNTER_HEADER + HISTOGRAM_BINS
    return Budget(
        calls=calls,
        live=live / per_call,
        candidates=_spread(int(row[COUNTER_CANDIDATES]) / per_call, row[first : first + HISTOGRAM_BINS]),
        kept=_spread(kept / per_call, row[second : second + HISTOGRAM_BINS]),
        captured_mass=int(row[COUNTER_MASS]) / MASS_UNIT / per_call,
        pruned=1.0 - kept / live if live else 0.0,
    )


def _spread(mean: float, histogram: Tensor) -> Spread:
    return Spread(mean, _percentile(histogram, 0.05), _percentile(histogram, 0.95))


def _percentile(histogram: Tensor, q: float) -> float:
    """Smallest count of the bin that holds the q-th share of the entries."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    index = int((histogram.cumsum(0) < q * total).sum())
    return float(histogram_bin_start(min(index, HISTOGRAM_BINS - 1)))
