"""Timing of one operator call: cold caches, median and spread, byte counts, and rows that say where they came from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# Buffers of one rotation together: beyond what a core keeps between two uses of the same buffer.
COLD_BYTES = 1 << 30
# On a GPU it is the bytes a sparse call touches that must not stay: together nine times the 60 MB of an H200's L2.
COLD_TOUCHED_BYTES = 1 << 29
MIN_SETS, MAX_SETS = 4, 64
# Data made for one sequence, the exact attention in fp32 and what the methods allocate for themselves.
RESERVED_BYTES = 8 << 30


def sets_for_cold_cache(bytes_per_set: int, cold_bytes: int = COLD_BYTES, least: int = MIN_SETS) -> int:
    """How many buffer sets to rotate, as many layers of a model would: `cold_bytes` together, 4 to 64 sets."""
    return min(MAX_SETS, max(least, -(-cold_bytes // bytes_per_set)))


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


def sample_cpu(calls: Sequence[Callable], seconds: float) -> list[float]:
    """Wall time of single calls in microseconds, the calls (one a buffer set) taken in turn; at least three calls."""
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        call = calls[len(samples) % len(calls)]
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
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
        events = [torch.cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        events[0].record()
        for event in events[1:]:
            self.graph.replay()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 / len(self.outputs) for a, b in zip(events, events[1:], strict=False)]


def replay_us(calls: Sequence[Callable], samples: int) -> list[float]:
    """Microseconds a call: all calls, one a buffer set, are captured into one graph that is replayed `samples` times."""
    return Replay(calls).sample(samples)


def sample_cuda(calls: Sequence[Callable], seconds: float) -> list[float]:
    """Microseconds a call by graph replay, 5 to 50 replays in about `seconds`."""
    replay = Replay(calls)
    once_us = replay.sample(1)[0] * len(calls)
    return replay.sample(min(50, max(5, round(seconds * 1e6 / once_us))))


# How a device is sampled: calls, seconds -> microseconds a call. A device is available to every bench as soon as it stands here.
SAMPLERS: dict[str, Callable[[Sequence[Callable], float], list[float]]] = {"cpu": sample_cpu, "cuda": sample_cuda}
# Turns in which the methods are timed. A graph is captured anew for each, and a GPU has no slow minutes to share out.
ROUNDS = {"cpu": 3, "cuda": 1}


def measure(methods: dict[str, Sequence[Callable]], device: str, seconds: float) -> dict[str, Timing]:
    """Times every method in turns, so that a slow minute of the machine hits all of them, after one call of some buffer sets."""
    for calls in methods.values():
        for call in calls[:MIN_SETS]:
            call()
    samples: dict[str, list[float]] = {name: [] for name in methods}
    rounds = ROUNDS[device]
    for _ in range(rounds):
        for name, calls in methods.items():
            samples[name] += SAMPLERS[device](calls, seconds / rounds)
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


@dataclass(frozen=True)
class Sizes:
    """One layer's decode call."""

    batch: int
    query_tokens: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    length: int  # live tokens a sequence, this step's included
    dtype: torch.dtype

    @property
    def lists(self) -> int:
        """Candidate lists: one a (sequence, KV head)."""
        return self.batch * self.num_kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of all live tokens: what dense attention reads."""
        return self.lists * self.length * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token of one KV head."""
        return 2 * self.head_dim * self.dtype.itemsize

    @property
    def shadow_token_bytes(self) -> int:
        """4-bit codes, scale and zero of one token of one KV head."""
        return self.head_dim // 2 + 4

    def prefix_bytes(self, prefix_channels: int) -> int:
        """The leading channels' codes of every live token, with scale and zero."""
        return self.lists * self.length * (prefix_channels // 2 + 4)

    def bounds_bytes(self, bytes_per_bound: int = 1) -> int:
        """Page bounds of every live page; 8-bit bounds have a scale and zero of 4 bytes a page."""
        pages = -(-self.length // self.page_size)
        return self.lists * pages * (2 * self.head_dim * bytes_per_bound + (4 if bytes_per_bound == 1 else 0))

    @property
    def paged_bytes(self) -> int:
        """One layer of the paged cache: K and V in whole pages, shadow, 8-bit bounds."""
        pages = -(-self.length // self.page_size)
        return self.lists * pages * self.page_size * (self.token_bytes + self.shadow_token_bytes) + self.bounds_bytes()

    @property
    def touched_bytes(self) -> int:
        """About the least that any method timed here reads a call, attended rows left out."""
        quest = decode_bytes(self, "quest", candidate_budget("quest", self.length), 0, 0, True)
        prefix = decode_bytes(self, "shadow_prefix", candidate_budget("shadow_prefix", self.length), 0, self.head_dim // 4, True)
        return min(self.kv_bytes, quest, prefix)

    def describe(self) -> dict[str, int]:
        return {
            "B": self.batch,
            "T": self.query_tokens,
            "Hq": self.num_qo_heads,
            "Hkv": self.num_kv_heads,
            "D": self.head_dim,
            "S": self.page_size,
            "L": self.length,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"{self.num_qo_heads}/{self.num_kv_heads}"
        return f"B{self.batch} T{self.query_tokens} heads {heads} D{self.head_dim} S{self.page_size} L{self.length} {dtype}"


def candidate_budget(selector: str, length: int) -> int:
    """Tokens that a selector may choose: Quest the paper's 8192, of short contexts a quarter, and the shadow prefix an eighth."""
    return {"quest": min(8192, length // 4), "shadow_prefix": length // 8, "full": 0}[selector]


def decode_bytes(sizes: Sizes, selector: str, candidates: float, kept: float, prefix_channels: int, prunes: bool) -> int:
    """Least bytes a decode call must read: selector metadata, shadow of I0, K and V of I1 (means a KV head)."""
    attended = sizes.lists * kept * sizes.token_bytes
    if selector == "dense":
        return round(attended)
    estimated = sizes.lists * candidates * sizes.shadow_token_bytes if prunes else 0.0
    if selector == "quest":
        return round(sizes.bounds_bytes() + estimated + attended)
    if selector == "shadow_prefix":
        # The prefix scan has read a candidate's leading codes, scale and zero already.
        tail = sizes.lists * candidates * (sizes.head_dim - prefix_channels) // 2 if prunes else 0.0
        return round(sizes.prefix_bytes(prefix_channels) + tail + attended)
    return round(estimated + attended)


def buffer_sets(sizes: Sizes, device: str, available_bytes: int | None = None) -> tuple[int, int]:
    """How many paged layers and how many contiguous copies of K and V to rotate.

    On a GPU the paged layers are at least two while memory lasts; dense peers share copies, each of which flushes the L2 by itself where
    there are fewer copies than layers. (0, 0) where not even one of each fits into `available_bytes`.
    """
    if device == "cpu":
        sets = sets_for_cold_cache(sizes.kv_bytes)
        return sets, sets
    paged = sets_for_cold_cache(sizes.touched_bytes, COLD_TOUCHED_BYTES, 2)
    dense = sets_for_cold_cache(sizes.kv_bytes, COLD_BYTES, 1)
    if available_bytes is not None:
        room = available_bytes - RESERVED_BYTES
        dense = min(dense, max(1, (room - 2 * sizes.paged_bytes) // sizes.kv_bytes))
        paged = min(paged, (room - dense * sizes.kv_bytes) // sizes.paged_bytes)
    return (paged, min(dense, paged)) if paged >= 1 else (0, 0)


def environment(device: str) -> dict[str, object]:
    """Versions, commit and machine: what a row needs to be believed later."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    from twilight_ops import backends

    backend = backends.CPU if device == "cpu" else backends.CUDA
    versions = {} if device == "cpu" else {"triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda}
    return {
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "modified": bool(git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "machine": cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "backend": f"{backend.name} ({backend.detail})",
    }


def cpu_name() -> str:
    """Model and instruction set of the processor."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def row_text(row: dict, where: dict[str, object]) -> str:
    """One JSON object a line, with the environment it was measured in."""
    return json.dumps(row | where) + "\n"


def write_rows(path: Path, rows: list[dict], device: str) -> None:
    where = environment(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row_text(row, where) for row in rows))


def append_rows(path: Path, rows: Iterable[dict], where: dict[str, object]) -> None:
    """Adds rows to a file that a run interrupted later leaves behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(row_text(row, where) for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
