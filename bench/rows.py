"""Result files: `.jsonl` with one row a line, `.json` with one document, and what every row says about where it was measured."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from twilight_ops import TwilightConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
WORLD_SIZE, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))  # as torchrun sets them


def write(path: Path, rows: Sequence[dict], append: bool = True) -> None:
    """Adds rows to a `.jsonl` file, or puts them in place of what it held; a run that is interrupted later leaves them behind.

    Raises:
        ValueError: the name says that the file holds something else.
    """
    require_jsonl(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict]:
    """The rows of a `.jsonl` file."""
    require_jsonl(path)
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def require_jsonl(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise ValueError(f"rows: path: expected a name that ends in .jsonl, got {str(path)!r}")


def latest(rows: Sequence[dict], kind: str) -> list[dict]:
    """A model's rows of one kind without those measured again later, in order of their first appearance."""
    keys = ("shape", "layers", "context", "batch", "method", "dense_layers", "dense_below", "joined", "top_p", "gpus")
    return list({str([row.get(key) for key in keys]): row for row in rows if row.get("kind") == kind}.values())


def speed_up(row: dict, rows: Sequence[dict], peer: str) -> float | None:
    """How many times as fast as `peer` in the same cell."""
    cell = ("shape", "layers", "context", "batch", "gpus")
    found = [other for other in rows if other["method"] == peer and all(other[key] == row[key] for key in cell) and "ms" in other]
    return found[-1]["ms"] / row["ms"] if found and "ms" in row else None


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


# Beyond either, what a setting does is no speed-up of the same computation.
MAX_KL, MAX_PERPLEXITY_CHANGE = 0.015, 0.01
ACCURACY = tuple(RESULTS / f"accuracy_qwen{name}.jsonl" for name in ("", "_frontier", "_fast", "_fast_held_out"))
ACCURACY_LENGTH = 31_000
EQUAL, NOT_EQUAL, NOT_MEASURED = "equal", "not at equal accuracy", "not measured"


def is_peer(row: dict) -> bool:
    """Whether a row of a layer call is another library's dense attention."""
    return not row["method"].startswith(("twilight_", "speed_of_light_", "stages_"))


def setting_of(config: TwilightConfig) -> str:
    """How `python -m twilight_ops eval` spells the method of a configuration, whose page size and dense_below it does not name."""
    from twilight_ops.evaluation.methods import Method

    given = {"dense_layers": config.dense_layers or None, "sink_tokens": config.sink_tokens, "recent_tokens": config.recent_tokens}
    given |= {} if config.kv_cache_dtype == "auto" else {"kv_cache_dtype": config.kv_cache_dtype}
    return Method(config.selector, config.top_p, tuple((name, value) for name, value in given.items() if value is not None)).setting


def accuracy_of(setting: str, *paths: Path) -> dict[str, object]:
    """Columns of a row: what `python -m twilight_ops eval` found of its setting on a real model at 31k tokens.

    That is the largest KL of its runs, and the change of perplexity over all their tokens, of which a few hundred say little; those of
    one document in two runs count twice.
    `accuracy` is "equal" up to a KL of MAX_KL to dense and MAX_PERPLEXITY_CHANGE, "not at equal accuracy" beyond, and "not measured"
    where no file of results, by default ACCURACY, has such a row.
    """
    found = [
        row
        for path in paths or ACCURACY
        for row in (read(path) if path.exists() else ())
        if row.get("task") == "language" and row["length"] >= ACCURACY_LENGTH and row["setting"] == setting
    ]
    if not found:
        return {"setting": setting, "accuracy": NOT_MEASURED}
    kl = max(row["kl"] for row in found)
    counts = [len(row["documents"]) * row["tokens_a_document"] for row in found]
    logs = [math.log1p(row["perplexity_change"]) * count for row, count in zip(found, counts, strict=True)]
    change = math.expm1(sum(logs) / sum(counts))
    equal = kl <= MAX_KL and abs(change) <= MAX_PERPLEXITY_CHANGE
    told = {"setting": setting, "accuracy": EQUAL if equal else NOT_EQUAL}
    return told | {"kl_31k": round(kl, 5), "perplexity_change_31k": round(change, 5)}
