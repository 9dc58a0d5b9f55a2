"""Time per output token of whole Llama-shaped models: random weights, real shapes, real graphs.

    python bench/bench_llama.py --shape llama31-8b --context 32768 --batch 1 4 max --json bench/results/h200_llama.json

What it assumes: bf16 on one GPU; weights drawn on the device; K and V of the context written straight into the caches, which needs no
prompt, with K scaled so that the logits have the standard deviation `--spread` (3.7 keeps about 128 of 32768 tokens a query head at
p = 0.85, as in the paper): weights of standard deviation `initializer_range` and unit-RMS hidden states give
|q| = initializer_range * sqrt(hidden * head_dim).
Every method decodes the same number of steps from the same length, one after the other in this process; ratios are taken within a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from timing import environment
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig
from twilight_ops.decode_step import append
from twilight_ops.integration import TwilightCache
from twilight_ops.integration.generate import Decoder

SHAPES = {
    "llama31-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "longchat-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=131072,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
    ),
}
FILL_TOKENS = 4096  # tokens of one sequence drawn at a time, which bounds the memory of the random numbers
RESERVE_BYTES = 6 << 30  # left free for weights' workspaces, logits and graph pools when the largest batch is computed


def methods(context: int, head_dim: int, top_p: float) -> dict[str, TwilightConfig]:
    """Configurations by name; the budget of Quest is the paper's."""
    budget = min(8192, context // 4)
    prefix = head_dim // 4
    return {
        "dense": TwilightConfig(dense_layers=1 << 20),
        "quest": TwilightConfig(selector=Quest(token_budget=budget), top_p=1.0),
        "full+twilight": TwilightConfig(selector=Full(), top_p=top_p),
        "quest+twilight": TwilightConfig(selector=Quest(token_budget=budget), top_p=top_p),
        "shadow_prefix+twilight": TwilightConfig(selector=ShadowPrefix(prefix_channels=prefix), top_p=top_p),
    }


def random_context(config: LlamaConfig, batch: int, context: int, spread: float, device: torch.device) -> Iterator[tuple]:
    """(sequence, start, k, v) chunks [1, n, Hkv, D] for every sequence; the same for every method."""
    head_dim = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    query_norm = config.initializer_range * math.sqrt(config.hidden_size * head_dim)
    k_std = spread * math.sqrt(head_dim) / query_norm
    for b in range(batch):
        for start in range(0, context, FILL_TOKENS):
            shape = (1, min(FILL_TOKENS, context - start), config.num_key_value_heads, head_dim)
            yield b, start, torch.randn(shape, device=device).mul_(k_std).bfloat16(), torch.randn(shape, device=device).bfloat16()


def fill_twilight(cache: TwilightCache, config: LlamaConfig, batch: int, context: int, spread: float, device: torch.device) -> None:
    """Writes the context through append_kv, as a prefill would. Layers share one draw; their addresses differ."""
    positions = torch.arange(context, device=device).expand(batch, -1)
    cache.begin_step(batch, context, positions)
    for b, start, k, v in random_context(config, batch, context, spread, device):
        lens = torch.tensor([start + k.shape[1]], dtype=torch.int32, device=device)
        for layer in cache.layers:
            append(k, v, layer.paged, cache.page_table[b : b + 1], lens)


def fill_static(cache: StaticCache, config: LlamaConfig, batch: int, context: int, spread: float, device: torch.device) -> None:
    for b, start, k, v in random_context(config, batch, context, spread, device):
        part = slice(start, start + k.shape[1])
        for layer in cache.layers:
            layer.keys[b, :, part] = k[0].transpose(0, 1)
            layer.values[b, :, part] = v[0].transpose(0, 1)
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)


def step_times(step: Callable[[], None], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `steps` calls that follow one another without a host wait."""
    if device.type != "cuda":
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


@torch.no_grad()
def time_hf_static(model, batch: int, context: int, args: argparse.Namespace) -> dict:
    """What a user has today: StaticCache, sdpa, torch.compile(mode="reduce-overhead"), greedy."""
    device, config = model.device, model.config
    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=config, max_cache_len=context + args.warmup + args.steps + 8)
    head_dim = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, torch.bfloat16, device)
    fill_static(cache, config, batch, context, args.spread, device)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.full((batch, 1), context, dtype=torch.int64, device=device)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    for _ in range(args.warmup):
        step()
    return {"times": step_times(step, args.steps, device)}


@torch.no_grad()
def time_twilight(model, twilight: TwilightConfig, batch: int, context: int, args: argparse.Namespace) -> dict:
    """Our decoder: compiled step recorded as one CUDA graph, sampling included."""
    device, config = model.device, model.config
    model.set_attn_implementation("twilight")
    head_dim = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    cache = TwilightCache(config, twilight, max_batch_size=batch, max_cache_len=context + args.warmup + args.steps + 8)
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, torch.bfloat16, device)
    fill_twilight(cache, config, batch, context, args.spread, device)
    decoder = Decoder(model, cache, batch, eos_token_ids=())
    decoder.position.fill_(context)
    for _ in range(args.warmup):
        decoder.step()
    cache.reset_budget()
    times = step_times(decoder.step, args.steps, device)
    sizes = cache.nbytes()
    sparse = cache.budget_report().sparse  # None where every layer is dense
    return {"times": times, "extra_over_kv": sizes["extra"] / sizes["kv"], "budget": None if sparse is None else asdict(sparse)}


def largest_batch(config: LlamaConfig, context: int, weights: int, device: torch.device) -> int:
    """Sequences whose K, V and 17% beside them fit what the device has left."""
    head_dim = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    per_sequence = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * context * 1.17
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, int((total - weights - RESERVE_BYTES) / per_sequence))


def measured_read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain reduction over 4 GiB, the median of 9: the floor's denominator."""
    data = torch.empty(1 << 30, dtype=torch.float32, device=device).normal_()
    times = step_times(lambda: data.sum(), 10, device)[1:]
    return data.nbytes / (statistics.median(times) * 1e-3)


@contextmanager
def released() -> Iterator[None]:
    """Drops compiled graphs and their pools between methods, so that each has the whole device."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run_cell(model, shape: str, batch: int, context: int, bandwidth: float, args: argparse.Namespace, progress: Progress) -> list[dict]:
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads if config.head_dim is None else config.head_dim
    embedding = config.vocab_size * config.hidden_size
    weight_bytes = 2 * (sum(p.numel() for p in model.parameters()) - embedding)  # one row of the input embedding is read, not all
    kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * context * batch
    configs = methods(context, head_dim, args.top_p)
    rows = []
    task = progress.add_task(f"{shape} L {context} B {batch}", total=len(args.methods))
    for name in args.methods:
        with released():
            start = time.perf_counter()
            try:
                result = (
                    time_hf_static(model, batch, context, args)
                    if name == "hf_static"
                    else time_twilight(model, configs[name], batch, context, args)
                )
            except torch.cuda.OutOfMemoryError:
                progress.console.print(f"{name}: batch {batch} at {context} tokens does not fit")
                progress.advance(task)
                continue
        times = sorted(result.pop("times"))
        median = statistics.median(times)
        row = {
            "shape": shape,
            "context": context,
            "batch": batch,
            "method": name,
            "ms_per_step": median,
            "p10_ms": times[len(times) // 10],
            "p90_ms": times[-1 - len(times) // 10],
            "tokens_per_s": batch / median * 1e3,
            "floor_ms": (weight_bytes + kv_bytes) / bandwidth * 1e3,
            "weights_floor_ms": weight_bytes / bandwidth * 1e3,
            "setup_s": time.perf_counter() - start,
            **result,
        }
        rows.append(row)
        progress.console.print(f"{name}: {median:.2f} ms")
        progress.advance(task)
    by_method = {row["method"]: row["ms_per_step"] for row in rows}
    for row in rows:
        for peer in ("hf_static", "dense"):
            if peer in by_method:
                row[f"ratio_to_{peer}"] = by_method[peer] / row["ms_per_step"]
        row["attention_share"] = 1.0 - row["weights_floor_ms"] / row["ms_per_step"]
    return rows


def print_table(rows: list[dict], console: Console) -> None:
    table = Table(title="Time per output token (one step of the whole batch)")
    for column in (
        "shape",
        "context",
        "batch",
        "method",
        "ms",
        "p10 - p90",
        "tokens/s",
        "x HF static",
        "x our dense",
        "over floor",
        "kept",
        "memory over KV",
    ):
        table.add_column(column, justify="left" if column in ("shape", "method") else "right")
    for row in rows:
        budget = row.get("budget")
        extra = row.get("extra_over_kv")
        table.add_row(
            row["shape"],
            str(row["context"]),
            str(row["batch"]),
            row["method"],
            f"{row['ms_per_step']:.2f}",
            f"{row['p10_ms']:.2f} - {row['p90_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['ratio_to_hf_static']:.2f}" if "ratio_to_hf_static" in row else "",
            f"{row['ratio_to_dense']:.2f}" if "ratio_to_dense" in row else "",
            f"{row['ms_per_step'] / row['floor_ms']:.2f}",
            "" if budget is None else f"{budget['kept']['mean']:.0f}",
            "" if extra is None else f"{100 * extra:.1f}%",
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama31-8b")
    parser.add_argument("--model", help="path of a local model to use instead of random weights of --shape")
    parser.add_argument("--context", type=int, nargs="+", default=[32768], help="tokens already cached")
    parser.add_argument("--batch", nargs="+", default=["1", "4", "max"], help='sequences; "max": the largest batch whose caches fit')
    names = ["hf_static", *methods(32768, 128, 0.85)]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--top-p", type=float, default=0.85)
    parser.add_argument("--spread", type=float, default=3.7, help="standard deviation of the logits")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path, help="append the rows to this file's list")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        sys.exit("bench_llama.py: needs a CUDA device; for a CPU see bench_decode_attention.py --device cpu")
    device = torch.device("cuda")
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
        shape = Path(args.model).name
    else:
        config = SHAPES[args.shape]
        if args.layers:
            config.num_hidden_layers = args.layers
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shape = args.shape
    model.eval()
    bandwidth = measured_read_bandwidth(device)
    torch.cuda.empty_cache()
    weights = sum(p.nbytes for p in model.parameters())
    console.print(
        f"{shape}: {weights / 1e9:.1f} GB of weights, read bandwidth {bandwidth / 1e12:.2f} TB/s, spread {args.spread}, p {args.top_p}"
    )
    rows: list[dict] = []
    with Progress(console=console) as progress:
        for context in args.context:
            for batch in dict.fromkeys(args.batch):
                size = largest_batch(model.config, context, weights, device) if batch == "max" else int(batch)
                rows += run_cell(model, shape, size, context, bandwidth, args, progress)
                if args.json:
                    _save(args.json, rows, bandwidth)
    print_table(rows, Console())


def _save(path: Path, rows: list[dict], bandwidth: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "read_bandwidth_bytes_per_s": bandwidth, "rows": rows}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
