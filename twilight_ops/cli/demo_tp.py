"""`python -m twilight_ops demo-tp`: the same generation in one process and sharded over several, compared."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..config import TwilightConfig
from ..selectors import Full, Quest, ShadowPrefix
from .arguments import whole

HELP = "tensor parallelism: tokens and kept sets of several processes against one"
SELECTORS = {"full": Full, "quest": Quest, "shadow_prefix": ShadowPrefix}
PROMPT_TOKENS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generates with a random model in one process and, through torchrun, sharded over several; tokens and kept sets must be equal, "
        "or the exit status is 1."
    )
    parser.add_argument("--processes", type=whole(2), default=2, help="ranks; must divide the model's KV heads (default 2)")
    parser.add_argument("--model", help="folder of a Llama-family model instead of random weights")
    parser.add_argument("--selector", choices=sorted(SELECTORS), default="shadow_prefix")
    parser.add_argument("--new-tokens", type=whole(2), default=16, help="default 16")
    parser.add_argument("--timed-steps", type=whole(0), default=0, help="also decode with the captured step, and time so many of them")


def generate_in_rank(model: str, output: str, selector: str, new_tokens: int, timed_steps: int) -> None:
    """One rank's generation, which torchrun starts; writes `output`/rank<r>.pt.

    That holds the tokens, the kept positions [B, Hkv of this rank, M * S] of every layer and decode step, and, with timed steps, the
    captured step's tokens and time. `examples/tensor_parallel.py` is the same without the bookkeeping.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from ..integration import Decoder, TwilightCache

    kept: list[torch.Tensor] = []

    def recorder(q, layer, page_table, seq_lens, sm_scale):
        batch, kv_heads = q.shape[0], layer.num_kv_heads
        kept.append(torch.empty(batch, kv_heads, page_table.shape[1] * layer.page_size, dtype=torch.int32, device=q.device))
        return kept[-1], torch.empty(batch, kv_heads, dtype=torch.int32, device=q.device)

    sharded = {"distributed_config": DistributedConfig(tp_plan="auto")} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="twilight", **sharded).eval()
    if torch.cuda.is_available() and loaded.device.type != "cuda":
        loaded = loaded.cuda()
    ids = torch.randint(3, loaded.config.vocab_size, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(loaded.device)
    config = TwilightConfig(SELECTORS[selector](token_budget=128, budget_fraction=0.0), top_p=0.9, dense_layers=1, dense_below=0)

    def decoder(capture: str | None, recorder=None) -> Decoder:
        room = PROMPT_TOKENS + new_tokens + timed_steps + 16
        return Decoder(loaded, TwilightCache(loaded.config, config, 1, room, recorder=recorder), eos_token_ids=(), capture=capture)

    tokens = decoder("eager", recorder).generate(ids, max_new_tokens=new_tokens).tokens.cpu()
    result = {"tokens": tokens, "kept": [call.cpu() for call in kept], "kv_heads": kept[0].shape[1]}
    if timed_steps:
        captured = decoder(None)
        result["captured_tokens"] = captured.generate(ids, max_new_tokens=new_tokens).tokens.cpu()
        times = []
        for _ in range(timed_steps):
            start = time.perf_counter()
            with torch.no_grad():
                captured.step()
            if loaded.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        result["ms_per_step"] = statistics.median(times)
        result["capture"] = captured.capture
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.save(result, Path(output, f"rank{os.environ.get('RANK', '0')}.pt"))


def generate_with(processes: int, model: str, output: Path, selector: str, new_tokens: int, timed_steps: int = 0) -> list[dict]:
    """What each rank wrote, by rank."""
    import torch

    worker = ["-m", __name__, model, str(output), selector, str(new_tokens), str(timed_steps)]
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # One thread a rank: ranks share the cores, and sums are then split the same way however many there are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, *launcher, *worker], env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        # The launcher sums up below what the ranks said.
        reason = next((line for line in reversed(lines) if "Error: " in line and "ChildFailedError" not in line), lines[-1])
        raise OSError(f"{processes} processes: exit status {done.returncode}: {reason}")
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
    from transformers import AutoConfig

    from .models import find_model, random_tiny
    from .terminal import Terminal

    with Terminal() as terminal, tempfile.TemporaryDirectory() as folder:
        model = folder
        if args.model is None:
            random_tiny(torch.device("cpu"), torch.float32, "sdpa").save_pretrained(folder)
        else:
            model, extra = find_model(args.model)
            if extra:
                raise ValueError(f"model: expected a folder with config.json, because transformers shards no GGUF file, got {args.model}")
        kv_heads = AutoConfig.from_pretrained(model).get_text_config().num_key_value_heads
        if kv_heads % args.processes:
            raise ValueError(f"processes: expected a divisor of the model's {kv_heads} KV heads, got {args.processes}")
        with terminal.status("one process"):
            (alone,) = generate_with(1, model, Path(folder, "alone"), args.selector, args.new_tokens, args.timed_steps)
        with terminal.status(f"{args.processes} processes"):
            ranks = generate_with(args.processes, model, Path(folder, "sharded"), args.selector, args.new_tokens, args.timed_steps)
        result = compare(alone, ranks)
        rows = [(name, str(value)) for name, value in result.items()]
        terminal.table(f"{args.processes} processes against one, {args.selector}", ("", ""), rows)
    return 0 if all(value for name, value in result.items() if name.endswith(" equal")) else 1


if __name__ == "__main__":
    import torch

    generate_in_rank(*sys.argv[1:4], new_tokens=int(sys.argv[4]), timed_steps=int(sys.argv[5]))
    # Recorded graphs hold collectives, which must go before their group; compiled steps hold the graphs.
    torch.compiler.reset()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
