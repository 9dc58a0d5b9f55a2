"""Timing of calls: buffer sets in turn, so that caches are cold, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

WARM_UPS = 4  # calls of different buffer sets before anything is timed
# Turns in which methods of one group are timed. A GPU has no slow minutes to share out.
ROUNDS = {"cpu": 3, "cuda": 1}


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median_us: float
    p10_us: float
    p90_us: float
    runs: int

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90_us - self.p10_us) / self.median_us

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        ordered = sorted(samples_us)

        def quantile(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return Timing(statistics.median(ordered), quantile(0.1), quantile(0.9), len(ordered))


@dataclass
class Method:
    """One thing to time.

    Args:
        calls: one a buffer set.
        report: called after timing; columns of the row, with `bytes` where it is known how many a call moves.
        settings: columns that are known beforehand.
        check: what is wrong with an output, or None. Nothing is timed while results are wrong.
        sampled: seconds -> microseconds a call, in place of timing `calls`.
    """

    name: str
    calls: Sequence[Callable]
    report: Callable[[], dict] = dict
    settings: dict = field(default_factory=dict)
    check: Callable[[object], str | None] = lambda output: None
    sampled: Callable[[float], list[float]] | None = None

    def sampler(self, device: str) -> Callable[[float], list[float]]:
        """Warms up, records a CUDA graph where there is one to record, and returns what takes samples."""
        if self.sampled is not None:
            return self.sampled
        for call in self.calls[:WARM_UPS]:
            call()
        if device == "cpu":
            return lambda seconds: sample_cpu(self.calls, seconds)
        replay = Replay(self.calls)
        once_us = replay.sample(1)[0] * len(self.calls)
        return lambda seconds: replay.sample(min(50, max(5, round(seconds * 1e6 / once_us))))


def wall_us(call: Callable) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def sample_cpu(calls: Sequence[Callable], seconds: float) -> list[float]:
    """Wall time of single calls in microseconds, the calls (one a buffer set) taken in turn; at least three calls."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        samples.append(wall_us(calls[len(samples) % len(calls)]))
    return samples


class Replay:
    """Calls, one a buffer set, captured into one CUDA graph; `outputs` holds what each call of a replay wrote."""

    WARM_UPS = 2

    def __init__(self, calls: Sequence[Callable]):
        for call in calls[: self.WARM_UPS]:
            call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call() for call in calls]

    def __call__(self) -> None:
        self.graph.replay()

    def sample(self, samples: int) -> list[float]:
        """Microseconds a call, by events around each of `samples` replays that are queued without a gap."""
        for _ in range(self.WARM_UPS):
            self.graph.replay()
        return [us / len(self.outputs) for us in step_us(self.graph.replay, samples, "cuda")]


def step_us(step: Callable[[], object], steps: int, device: str) -> list[float]:
    """Microseconds of each of `steps` calls that follow one another without a host wait."""
    if device == "cpu":
        return [wall_us(step) for _ in range(steps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in zip(events, events[1:], strict=False)]


def measure(methods: Sequence[Method], device: str, seconds: float) -> dict[str, Timing]:
    """Times every method of a group in turns, so that a slow minute of the machine hits all of them."""
    samplers = {method.name: method.sampler(device) for method in methods}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    rounds = ROUNDS[device] if len(methods) > 1 else 1
    for _ in range(rounds):
        for name, sample in samplers.items():
            samples[name] += sample(seconds / rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def tensors_of(output: object) -> list[torch.Tensor]:
    """The tensors among what a call returned."""
    items = output if isinstance(output, (tuple, list)) else [output]
    return [item for item in items if isinstance(item, torch.Tensor)]


def output_of(calls: Sequence[Callable], device: str) -> object:
    """What the first call writes when it runs the way it is timed: on a GPU by replay, over outputs that were NaN before."""
    if device == "cpu":
        return calls[0]()
    replay = Replay(calls[:1])
    for tensor in tensors_of(replay.outputs[0]):
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    replay()
    torch.cuda.synchronize()
    return tuple(tensor.clone() for tensor in tensors_of(replay.outputs[0]))


def read_bandwidth(device: str) -> float:
    """Bytes a second of a reduction over 4 GiB, on a CPU 64 MiB, the median of 9: what streamed reads reach here."""
    buffer = torch.empty(1 << (30 if device == "cuda" else 24), dtype=torch.float32, device=device).normal_()
    return buffer.nbytes / (statistics.median(step_us(buffer.sum, 10, device)[1:]) * 1e-6)
