"""`python -m twilight_ops demo-tp`: the same generation in one process and sharded over several, compared."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HELP = "tensor parallelism: tokens and kept sets of several processes against one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generates with a random model in one process and, through torchrun, sharded over several; tokens and kept sets must be equal."
    )
    parser.add_argument("--processes", type=int, default=2, help="ranks; must divide the model's KV heads (default 2)")
    parser.add_argument("--model", help="folder of a Llama-family model instead of random weights")
    parser.add_argument("--selector", choices=("full", "quest", "shadow_prefix"), default="shadow_prefix")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--timed-steps", type=int, default=0, help="also decode with the captured step, and time so many of them")


def generate_with(processes: int, model: str, output: Path, selector: str, new_tokens: int, timed_steps: int = 0) -> list[dict]:
    """What each rank wrote, by rank."""
    import torch

    worker = ["-m", "twilight_ops.integration.tensor_parallel", "--model", model, "--output", str(output)]
    worker += ["--selector", selector, "--new-tokens", str(new_tokens), "--timed-steps", str(timed_steps)]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # One thread a rank: ranks share the cores, and sums are then split the same way however many there are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *launcher, *worker], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{processes} processes: exit status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return [torch.load(output / f"rank{rank}.pt") for rank in range(processes)]


def compare(alone: dict, ranks: list[dict]) -> dict[str, bool | int | float | str]:
    """Whether tokens and, KV head by KV head, kept positions agree."""
    import torch

    tokens = all(torch.equal(rank["tokens"], alone["tokens"]) for rank in ranks)
    sharded = [torch.cat(call, dim=1) for call in zip(*(rank["kept"] for rank in ranks), strict=True)]
    kept = len(sharded) == len(alone["kept"]) and all(torch.equal(a, b) for a, b in zip(sharded, alone["kept"], strict=True))
    captured = {}
    if "captured_tokens" in alone:
        captured = {
            "captured step's tokens equal": all(torch.equal(rank["captured_tokens"], alone["tokens"]) for rank in (alone, *ranks)),
            "capture": ranks[0]["capture"],
            "ms a step": round(max(rank["ms_per_step"] for rank in ranks), 3),
            "ms a step alone": round(alone["ms_per_step"], 3),
        }
    return {
        "tokens equal": tokens,
        "kept sets equal": kept,
        **captured,
        "layer steps compared": len(sharded),
        "KV heads": alone["kv_heads"],
        "KV heads a rank": ranks[0]["kv_heads"],
        "kept positions": sum(int((call >= 0).sum()) for call in alone["kept"]),
    }


def run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from .models import find_model, random_tiny
    from .terminal import table

    if args.processes < 2:
        raise ValueError(f"processes: expected >= 2, got {args.processes}")
    if args.new_tokens < 2:
        raise ValueError(f"new-tokens: expected >= 2, got {args.new_tokens}")
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        model = folder
        if args.model is None:
            random_tiny(torch.device("cpu"), torch.float32, "sdpa").save_pretrained(folder)
        else:
            model, _ = find_model(args.model)
        with console.status("one process"):
            (alone,) = generate_with(1, model, Path(folder, "alone"), args.selector, args.new_tokens, args.timed_steps)
        with console.status(f"{args.processes} processes"):
            ranks = generate_with(args.processes, model, Path(folder, "sharded"), args.selector, args.new_tokens, args.timed_steps)
    result = compare(alone, ranks)
    rows = [(name, str(value)) for name, value in result.items()]
    console.print(table(f"{args.processes} processes against one, {args.selector}", ("", ""), rows))
    return 0 if all(value for name, value in result.items() if name.endswith(" equal")) else 1
