"""Timing of one operator call: cold caches, median and spread, byte counts, and rows that say where they came from."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# Buffers of one rotation together: beyond what a core keeps between two uses of the same buffer.
COLD_BYTES = 1 << 30
MIN_SETS, MAX_SETS = 4, 64


def sets_for_cold_cache(bytes_per_set: int) -> int:
    """How many buffer sets to rotate, as many layers of a model would: 1 GiB of K and V together, 4 to 64 sets."""
    return min(MAX_SETS, max(MIN_SETS, -(-COLD_BYTES // bytes_per_set)))


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


# How a device is sampled: calls, seconds -> microseconds a call. A device is available to every bench as soon as it stands here.
SAMPLERS: dict[str, Callable[[Sequence[Callable], float], list[float]]] = {"cpu": sample_cpu}


def measure(methods: dict[str, Sequence[Callable]], device: str, seconds: float, rounds: int = 3) -> dict[str, Timing]:
    """Times every method in `rounds` turns, so that a slow minute of the machine hits all of them, after one call of each buffer set."""
    for calls in methods.values():
        for call in calls[:MIN_SETS]:
            call()
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, calls in methods.items():
            samples[name] += SAMPLERS[device](calls, seconds / rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


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


def environment(device: str) -> dict[str, object]:
    """Versions, commit and machine: what a row needs to be believed later."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    from twilight_ops import backends

    backend = backends.CPU if device == "cpu" else backends.CUDA
    return {
        "commit": git("rev-parse", "--short", "HEAD") or "none",
        "modified": bool(git("status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
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


def write_rows(path: Path, rows: list[dict], device: str) -> None:
    """One JSON object a line, each with the environment it was measured in."""
    where = environment(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
