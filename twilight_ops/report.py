"""What a run kept: the device's budget counters as a report, and as a log over steps."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import capacity
from ._settings import integer
from .capacity import COUNTER_HEADER, HISTOGRAM_BINS, histogram_bin_start
from .layer import PagedKVLayer


@dataclass(frozen=True)
class Spread:
    """Mean, 5th and 95th percentile in tokens.

    Percentiles come from a histogram: exact below 16 tokens, else within the eighth of an octave that holds the true one.
    """

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
        dense: share of the calls that took the dense path: a dense layer, or a sequence no longer than `dense_below`. They are counted like
            all others, with every live token as a candidate and kept.
    """

    calls: int
    live: float
    candidates: Spread
    kept: Spread
    captured_mass: float
    pruned: float
    dense: float


@dataclass(frozen=True)
class LayerBudget:
    """One layer; `dense_below` is the length up to which its sequences attend to everything."""

    layer: int
    selector: str
    dense_below: int
    heads: list[Budget]


@dataclass(frozen=True)
class BudgetReport:
    """Budgets of every layer and KV head, and of all sparse layers together (None where no sparse layer has decoded yet).

    `others` names the kinds of the model's layers that are not Twilight's. Printed, it is a table that ends with `summary`.
    """

    layers: list[LayerBudget]
    sparse: Budget | None
    others: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def summary(self) -> str:
        """What was kept, and which calls took the dense path, in one line."""
        return self._summary + "".join(f"; {len(layers)} {kind} layers are not Twilight's" for kind, layers in self._kinds().items())

    def _kinds(self) -> dict[str, list[int]]:
        """The layers of `others` by kind."""
        return {kind: [layer for layer, of in self.others.items() if of == kind] for kind in sorted(set(self.others.values()))}

    @property
    def _summary(self) -> str:
        dense = [layer.layer for layer in self.layers if layer.selector == "dense"]
        if not self.layers:
            return "no layers"
        if len(dense) == len(self.layers):
            return f"all layers ({len(dense)}) are dense"
        if self.sparse is None:
            return f"{len(self.layers) - len(dense)} of {len(self.layers)} layers are sparse; none has decoded yet"
        total, lengths = self.sparse, sorted({layer.dense_below for layer in self.layers if layer.selector != "dense"})
        below = f"sequences of up to {lengths[-1]} tokens"
        which = f"{len(self.layers) - len(dense)} of {len(self.layers)} layers are sparse"
        if total.dense == 1.0:
            return f"{which}, but every call of theirs took the dense path ({below}): nothing was pruned"
        share = f"({total.pruned:.1%} pruned), mass {total.captured_mass:.3f}"
        kept = f"{which} and kept {total.kept.mean:.0f} of {total.live:.0f} tokens a KV head {share}"
        if total.dense == 0.0:
            return f"{kept}; no call of theirs took the dense path"
        return f"{kept}; {total.dense:.1%} of their calls took the dense path ({below}), and these figures include them"

    def __str__(self) -> str:
        spreads = f"{'I0 mean/p5/p95':>22} {'I1 mean/p5/p95':>22}"
        lines = [f"{'layer':>5} {'KV head':>7} {'selector':<16}{'live':>9} {spreads} {'mass':>7} {'pruned':>7} {'dense':>6}"]
        for layer in self.layers:
            for index, budget in enumerate(layer.heads):
                lines.append(f"{layer.layer:>5} {index:>7} {layer.selector:<16}{_row(budget)}")
        if self.sparse is not None:
            lines.append(f"{'all':>5} {'':>7} {'sparse layers':<16}{_row(self.sparse)}")
        lines += [f"not Twilight's: {kind}, layers {', '.join(map(str, layers))}" for kind, layers in self._kinds().items()]
        return "\n".join([*lines, self.summary])


def _row(budget: Budget) -> str:
    spreads = " ".join(f"{f'{s.mean:.1f} / {s.p5:.0f} / {s.p95:.0f}':>22}" for s in (budget.candidates, budget.kept))
    return f"{budget.live:>9.1f} {spreads} {budget.captured_mass:>7.4f} {budget.pruned:>7.2%} {budget.dense:>6.1%}"


def budget_report(layers: Sequence[PagedKVLayer], others: dict[int, str] | None = None) -> BudgetReport:
    """Reads the counters of all layers, one copy to the host; `others` see `BudgetReport`."""
    report = _report(layers, _flat_counters(layers).cpu()) if layers else BudgetReport([], None)
    return replace(report, others=others or {})


class HasLayers(Protocol):
    """A `PagedKVCache`, or a cache of an engine whose layers are `paged` ones."""

    @property
    def layers(self) -> Sequence[Any]: ...


class BudgetWindows:
    """Reports over windows of steps, handed to `write(window, (first, last), report)`; steps are counted from 1.

    The counters only ever grow on the device; a window is the difference of two snapshots of them. A snapshot is one copy queued behind the
    steps before it (into pinned memory on a GPU), so neither the step nor the host waits, and a captured step stays as it is. Windows are
    written as copies arrive, the last ones by `close`.

    Args:
        layers: what they counted before the first step is left out.
        every: steps a window, >= 1.
        write: takes a window's number, its first and last step, and its report.
    """

    def __init__(self, layers: Sequence[PagedKVLayer], every: int, write: Callable[[int, tuple[int, int], BudgetReport], None]):
        self.every = integer(1)(type(self).__name__, "every", every)
        self.steps = 0  # so far
        self._layers = layers
        self._write = write
        self._windows = 0
        self._logged = 0  # steps up to the last snapshot
        self._queued: deque[tuple[Tensor, torch.cuda.Event | None, tuple[int, int]]] = deque()
        self._spare: list[Tensor] = []  # host buffers to use again
        self._before: Tensor | None = None
        self._snapshot((0, 0))

    def advance(self, steps: int = 1) -> None:
        """Call after `steps` more steps were queued; ends a window once it has `every` steps or more."""
        self.steps += steps
        if self.steps - self._logged >= self.every:
            self._end_window()

    def close(self) -> None:
        """Ends a window that has begun, and waits for the copies still under way."""
        if self.steps > self._logged:
            self._end_window()
        self._drain(wait=True)

    def _end_window(self) -> None:
        self._snapshot((self._logged + 1, self.steps))
        self._logged = self.steps
        self._drain(wait=False)

    def _snapshot(self, steps: tuple[int, int]) -> None:
        counters = _flat_counters(self._layers)
        if counters.device.type != "cuda":
            self._queued.append((counters, None, steps))
            return
        host = self._spare.pop() if self._spare else torch.empty(counters.shape, dtype=counters.dtype, pin_memory=True)
        host.copy_(counters, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(counters.device))
        self._queued.append((host, event, steps))

    def _drain(self, wait: bool) -> None:
        """Writes the windows whose copies have arrived; all of them if `wait`."""
        while self._queued:
            host, event, steps = self._queued[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            self._queued.popleft()
            if self._before is not None:
                self._report(self._before, host, steps)
                if event is not None:
                    self._spare.append(self._before)
            self._before = host

    def _report(self, before: Tensor, counters: Tensor, steps: tuple[int, int]) -> None:
        # Counters that fell were reset in between: what they hold was counted since.
        grown = counters - before
        self._write(self._windows, steps, _report(self._layers, counters if (grown < 0).any() else grown))
        self._windows += 1


class BudgetLog(BudgetWindows):
    """Budgets over the steps of a run: a file with one JSON line a window of steps (see `BudgetWindows`).

    A line is `{"window", "steps": [first, last], "sparse": Budget or null, "layers": [{"layer", "selector", "dense_below",
    "heads": [Budget]}]}`, steps counted from 1; a Budget has calls, live, candidates and kept (mean, p5, p95), captured_mass, pruned and
    dense, as in `budget_report`.

        with BudgetLog("budget.jsonl", cache, every=16) as log:
            for _ in range(steps):
                step()
                log.advance()

    Args:
        path: of the file, replaced if it exists.
        cache: a `TwilightCache` or `PagedKVCache`; what it counted before the first step of the log is left out.
        every: steps a window, >= 1.
    """

    def __init__(self, path: str | Path, cache: HasLayers, every: int = 16):
        integer(1)("BudgetLog", "every", every)
        layers = getattr(cache, "paged", cache).layers
        if not layers:
            raise ValueError("BudgetLog: cache: expected an allocated cache (prefill first, or give it device and dtype), got an empty one")
        self._file = Path(path).open("w", encoding="utf-8")
        super().__init__(layers, every, self._write_line)

    def __enter__(self) -> BudgetLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends a window that has begun, waits for the copies still under way, and closes the file."""
        if not self._file.closed:
            super().close()
            self._file.close()

    def _write_line(self, window: int, steps: tuple[int, int], report: BudgetReport) -> None:
        self._file.write(json.dumps(_rounded({"window": window, "steps": list(steps), **report.to_dict()})) + "\n")


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, so that a line is not mostly digits."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _flat_counters(layers: Iterable[PagedKVLayer]) -> Tensor:
    """The counters of all layers in one new tensor; layers may differ in KV heads."""
    return torch.cat([layer.budget_counters.flatten() for layer in layers])


def _report(layers: Sequence[PagedKVLayer], flat: Tensor) -> BudgetReport:
    """What `_flat_counters` of these layers says, once on the host."""
    sizes = [layer.budget_counters.numel() for layer in layers]
    counters = [rows.view(layer.budget_counters.shape) for layer, rows in zip(layers, flat.split(sizes), strict=True)]
    report = []
    for layer, rows in zip(layers, counters, strict=True):
        name = "dense" if layer.plan.selector is None else layer.plan.selector.name
        report.append(LayerBudget(layer.index, name, layer.plan.dense_below, [_budget(row) for row in rows]))
    sparse = [rows.sum(0) for layer, rows in zip(layers, counters, strict=True) if layer.plan.selector is not None]
    together = _budget(torch.stack(sparse).sum(0)) if sparse else None
    return BudgetReport(report, together if together is not None and together.calls else None)


def _budget(row: Tensor) -> Budget:
    calls = int(row[capacity.COUNTER_ROWS])
    live = int(row[capacity.COUNTER_LIVE])
    kept = int(row[capacity.COUNTER_KEPT])
    per_call = max(calls, 1)
    first, second = COUNTER_HEADER, COUNTER_HEADER + HISTOGRAM_BINS
    return Budget(
        calls=calls,
        live=live / per_call,
        candidates=spread(int(row[capacity.COUNTER_CANDIDATES]), row[first : first + HISTOGRAM_BINS].tolist()),
        kept=spread(kept, row[second : second + HISTOGRAM_BINS].tolist()),
        captured_mass=int(row[capacity.COUNTER_MASS]) / capacity.COUNTER_MASS_UNIT / per_call,
        pruned=1.0 - kept / live if live else 0.0,
        dense=int(row[capacity.COUNTER_DENSE]) / per_call,
    )


def spread(total: int, histogram: Sequence[int]) -> Spread:
    """Mean and percentiles of counts whose sum is `total`, from how many of them lie in each bin.

    Where in a bin its counts lie is not recorded, but their sum is: all are placed at one fraction of their bin's width, the one that gives
    the recorded mean. So counts that are all equal have that value as every percentile, no percentile leaves its bin, and bins of one value
    are exact.
    """
    calls = sum(histogram)
    if calls == 0:
        return Spread(0.0, 0.0, 0.0)
    widths = [histogram_bin_start(index + 1) - 1 - histogram_bin_start(index) for index in range(HISTOGRAM_BINS)]
    above = total - sum(count * histogram_bin_start(index) for index, count in enumerate(histogram))
    room = sum(count * width for count, width in zip(histogram, widths, strict=True))
    fraction = min(1.0, max(0.0, above / room)) if room else 0.0

    def percentile(share: float) -> float:
        """The smallest value that `share` of the counts does not exceed."""
        index = next(i for i, seen in enumerate(accumulate(histogram)) if histogram[i] and seen >= share * calls)
        return histogram_bin_start(index) + fraction * widths[index]

    return Spread(total / calls, percentile(0.05), percentile(0.95))
