"""Time per output token of whole Llama-shaped models: random weights, real shapes, real graphs.

    python bench/bench_llama.py --context 32768 --batch 1 4 max --json bench/results/h200_llama.json
    python bench/bench_llama.py --shape longchat-7b --cell 32768:max:dense,quest+twilight --json bench/results/h200_llama.json
    python bench/bench_llama.py --prefill 32768 --prefill-layers 4 --json bench/results/h200_llama.json
    torchrun --nproc-per-node 2 bench/bench_llama.py --cell 32768:1:dense,quest+twilight --json bench/results/h200_llama.json

What it assumes: bf16; weights drawn on the device; K and V of the context written straight into the caches, which needs no prompt. The
queries' size is measured with a few random tokens, and K scaled by it so that logits have the standard deviation `--spread` (3.7 keeps
about 128 of 32768 tokens a query head at p = 0.85, as in the paper), with workload.py's coherent pages and decay over channels, whose
order the shadow prefix is told. Layers share one draw of random numbers; their memory differs.
Every method decodes the same steps from the same length, one after the other in this process, and ratios are taken within a run. A row is
appended to the file as soon as it is measured; of equal rows the last one counts. --prefill times real prompts of random tokens through
the first layers only: layers are alike, so their ratio is the model's, and no layer is left dense. Under torchrun transformers shards the
model over the processes, each keeps the cache of its own KV heads, and the first one writes its rows; bytes and floors are then a GPU's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from runner import console_of
from timing import candidate_budget, environment
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.distributed import DistributedConfig
from workload import ENERGY_DECAY, PAGE_COHERENCE, SPREAD

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig
from twilight_ops.decode_step import append, decode_step
from twilight_ops.integration import CapturedStep, Decoder, TwilightCache, join_linears
from twilight_ops.integration.hf.generate import cache_argument

SHAPES = {
    "llama31-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=1 << 18,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "longchat-7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=1 << 18,
    ),
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 18,
    ),
}
HF_STATIC, HF_DYNAMIC = "hf_static", "hf_dynamic"
SPARSE = ("quest", "full+twilight", "quest+twilight", "shadow_prefix+twilight")
DECODE_METHODS = (HF_STATIC, "dense", *SPARSE)
PREFILL_METHODS = (HF_DYNAMIC, "dense", *SPARSE)
PAGE_SIZE = 16
FILL_TOKENS = 4096  # tokens of one sequence drawn at a time, which bounds the memory of the random numbers
PROBE_TOKENS = 64  # whose queries are measured
EXTRA_OVER_KV = 0.17  # beside K and V, what the largest batch leaves room for
RESERVE_BYTES = 6 << 30  # left free for workspaces, logits and graph pools when the largest batch is computed
PREFILL_REPEATS = 5
WORLD_SIZE, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))  # as torchrun sets them


def twilight_config(method: str, context: int, head_dim: int, options: argparse.Namespace, calibrated: bool = False) -> TwilightConfig:
    """A method's configuration; budgets are the paper's for Quest and an eighth of the context for the shadow prefix."""
    selectors = {
        "dense": Full(),
        "quest": Quest(token_budget=candidate_budget("quest", context)),
        "full": Full(),
        "shadow_prefix": ShadowPrefix(prefix_channels=None if calibrated else max(8, head_dim // 4)),
    }
    return TwilightConfig(
        selector=selectors[method.removesuffix("+twilight")],
        top_p=options.top_p if method.endswith("+twilight") else 1.0,
        page_size=PAGE_SIZE,
        dense_layers=1 << 20 if method == "dense" else options.dense_layers,
        dense_below=options.dense_below,
    )


@dataclass
class Context:
    """What every method finds cached: K and V of random numbers with the wanted spread of logits.

    Args:
        query_rms: [layers, Hq, D], measured.
        key_std: [layers, Hkv, D].
        channel_order: [Hkv, D] int32, by falling contribution to a logit.
    """

    length: int
    query_rms: Tensor
    key_std: Tensor
    channel_order: Tensor
    seed: int = 0

    @staticmethod
    def of(query_rms: Tensor, kv_heads: int, length: int, spread: float) -> Context:
        """`kv_heads` of this process, as many as `query_rms` has query heads for."""
        layers, heads, dim = query_rms.shape
        rng = torch.Generator(query_rms.device).manual_seed(1)
        ranks = torch.stack([torch.randperm(dim, generator=rng, device=query_rms.device) for _ in range(kv_heads)])  # [Hkv, D]
        part = torch.exp(-ranks / (ENERGY_DECAY * dim))  # a channel's part of a logit's standard deviation
        part = part * spread * dim**0.5 / part.square().sum(-1, keepdim=True).sqrt()
        group_rms = query_rms.view(layers, kv_heads, heads // kv_heads, dim).square().mean(2).sqrt()
        return Context(length, query_rms, part / group_rms, ranks.argsort(-1).int())

    def chunks(self, batch: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(sequence, start, k, v) for every sequence, [1, n, Hkv, D] in fp32, k of unit size; the same for every method."""
        device, (kv_heads, dim) = self.key_std.device, self.key_std.shape[1:]
        rng = torch.Generator(device).manual_seed(self.seed)

        def normal(tokens: int) -> Tensor:
            return torch.randn((1, tokens, kv_heads, dim), generator=rng, device=device)

        for b in range(batch):
            for start in range(0, self.length, FILL_TOKENS):
                tokens = min(FILL_TOKENS, self.length - start)
                pages = normal(-(-tokens // PAGE_SIZE)).repeat_interleave(PAGE_SIZE, dim=1)[:, :tokens]
                yield b, start, pages.mul_(PAGE_COHERENCE**0.5).add_(normal(tokens).mul_((1 - PAGE_COHERENCE) ** 0.5)), normal(tokens)

    def fill_twilight(self, cache: TwilightCache, batch: int) -> None:
        """Writes the context through append_kv, as a prefill would."""
        device = self.key_std.device
        for layer in cache.layers:
            if layer.paged.channel_order is not None:
                layer.paged.channel_order.copy_(self.channel_order)
        cache.sequences.begin(batch, self.length)
        for b, start, k, v in self.chunks(batch):
            lens = torch.tensor([start + k.shape[1]], dtype=torch.int32, device=device)
            v = v.to(cache.layers[0].dtype)
            for layer, key_std in zip(cache.layers, self.key_std, strict=True):
                append((k * key_std).to(layer.dtype), v, layer.paged, cache.live_page_table[b : b + 1], lens)
        cache.sequences.commit()
        cache.sequences.begin_decoding()

    def fill_static(self, cache: StaticCache, batch: int) -> None:
        for b, start, k, v in self.chunks(batch):
            part = slice(start, start + k.shape[1])
            for layer, key_std in zip(cache.layers, self.key_std, strict=True):
                layer.keys[b, :, part] = (k[0] * key_std).transpose(0, 1)
                layer.values[b, :, part] = v[0].transpose(0, 1)
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.length)


@torch.no_grad()
def measured_query_rms(model: PreTrainedModel) -> Tensor:
    """Root mean square of the queries after their position encoding, [layers, Hq, D]."""
    squares: list[Tensor] = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        squares.append(query.float().square().mean((0, 2)))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("query_probe", probe)
    model.set_attn_implementation("query_probe")
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=rng)
    model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    return torch.stack(squares).sqrt()


def local(weight: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def forget_peak(device: torch.device) -> None:
    """What filling a cache took is no part of decoding."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def step_times(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
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
def decode_hf_static(model: PreTrainedModel, batch: int, context: Context, options: argparse.Namespace) -> tuple[list[float], dict]:
    """What a user has today: StaticCache, sdpa, torch.compile(mode="reduce-overhead"), greedy."""
    device, config = model.device, model.config
    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=config, max_cache_len=context.length + options.warmup + options.steps + 8)
    cache.early_initialization(batch, context.key_std.shape[1], config.head_dim, model.dtype, device)
    context.fill_static(cache, batch)
    forget_peak(device)
    forward, held = model.forward, {cache_argument(model): cache}
    if not options.eager:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.full((batch, 1), context.length, dtype=torch.int64, device=device)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=token, position_ids=position, use_cache=True, **held).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    for _ in range(options.warmup):
        step()
    return step_times(step, options.steps, device), {}


@torch.no_grad()
def decode_twilight(
    model: PreTrainedModel, method: str, batch: int, context: Context, options: argparse.Namespace
) -> tuple[list[float], dict]:
    """Our decoder: the compiled step recorded as one CUDA graph, sampling included."""
    device, config = model.device, model.config
    model.set_attn_implementation("twilight")
    cache = TwilightCache(
        config,
        twilight_config(method, context.length, config.head_dim, options),
        max_batch_size=batch,
        max_cache_len=context.length + options.warmup + options.steps + 8,
    )
    cache.early_initialization(batch, context.key_std.shape[1], config.head_dim, model.dtype, device)
    context.fill_twilight(cache, batch)
    forget_peak(device)
    decoder = Decoder(model, cache, batch, eos_token_ids=(), capture="eager" if options.eager else None)
    decoder.position.fill_(context.length)
    for _ in range(options.warmup):
        decoder.step()
    cache.reset_budget()
    times = step_times(decoder.step, options.steps, device)
    sizes = cache.nbytes()
    budget = cache.budget_report().sparse  # None where every layer is dense
    columns = {
        "graphs": decoder.graphs,
        "extra_over_kv": sizes["extra"] / sizes["kv"],
        "attention_ms": attention_ms(cache, context, batch, options.steps),
    }
    if budget is not None:
        columns |= {
            "live": budget.live,
            "candidates": budget.candidates.mean,
            "kept": budget.kept.mean,
            "captured_mass": budget.captured_mass,
        }
    return times, columns


def attention_ms(cache: TwilightCache, context: Context, batch: int, steps: int) -> float:
    """Median time of append_kv and decode_attention of all layers and nothing else, recorded as one graph, with queries of equal size."""
    device, dtype = context.query_rms.device, cache.layers[0].dtype
    kv_heads, head_dim = context.key_std.shape[1:]
    rng = torch.Generator(device).manual_seed(2)
    unit = torch.randn((batch, 1, *context.query_rms.shape[1:]), generator=rng, device=device)
    queries = [(unit * rms).to(dtype) for rms in context.query_rms]
    k = torch.randn((batch, 1, kv_heads, head_dim), generator=rng, device=device)
    keys = [(k * key_std).to(dtype) for key_std in context.key_std]
    v = k.to(dtype)

    def layers() -> None:
        for layer, q, key in zip(cache.layers, queries, keys, strict=True):
            decode_step(q, key, v, layer.paged, cache.live_page_table, cache.live_seq_lens, head_dim**-0.5)

    step = CapturedStep(layers, device) if device.type == "cuda" else layers
    for _ in range(5):
        step()
    return statistics.median(step_times(step, steps, device))


def cached_bytes(config: LlamaConfig, tokens: int) -> int:
    """K and V of `tokens` tokens, 16 bits each."""
    return 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


def largest_batch(config: LlamaConfig, context: int, weights: int, device: torch.device) -> int:
    """Sequences whose K, V and 17% beside them fit what the device has left."""
    total = torch.cuda.get_device_properties(device).total_memory
    return max(1, int((total - weights - RESERVE_BYTES) / (cached_bytes(config, context) * (1 + EXTRA_OVER_KV))))


def measured_read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain reduction over 4 GiB (64 MiB on a CPU), the median of 9: the floor's denominator."""
    data = torch.empty(1 << (30 if device.type == "cuda" else 24), dtype=torch.float32, device=device).normal_()
    times = step_times(data.sum, 10, device)[1:]
    return data.nbytes / (statistics.median(times) * 1e-3)


@contextmanager
def released() -> Iterator[None]:
    """Drops compiled graphs and their pools between methods, so that each has the whole device."""
    try:
        yield
    finally:
        torch.compiler.reset()
        if torch.cuda.is_available():
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Run:
    """One model, its measured floor, and the rows so far."""

    def __init__(self, model: PreTrainedModel, shape: str, options: argparse.Namespace, console: Console):
        self.model, self.shape, self.options, self.console = model, shape, options, console
        self.device = model.device
        self.rows: list[dict] = []
        self.gpus = WORLD_SIZE
        self.bandwidth = measured_read_bandwidth(self.device)
        self.weight_bytes = sum(local(p).nbytes for p in model.parameters())
        self.query_rms = measured_query_rms(model)
        self.environment = environment(self.device.type)
        with released():
            pass

    def measure(self, row: dict, call: Callable[[], dict]) -> None:
        """Adds row | call() to the rows and the file, or the reason why there is nothing to add."""
        start = time.perf_counter()
        if self.gpus > 1:
            torch.distributed.barrier()
        with released():
            try:
                result = call()
            except Exception as error:  # whatever stops one method must not cost the others
                first = (str(error).strip().splitlines() or [""])[0]
                result = {"error": f"{type(error).__name__}: {first[:300]}"}
        row = {"shape": self.shape, "layers": self.model.config.num_hidden_layers, "gpus": self.gpus} | row | result
        row |= {"setup_s": round(time.perf_counter() - start, 1), "read_bandwidth": self.bandwidth} | self.environment
        self.rows.append(row)
        if RANK:
            return
        if self.options.json is not None:
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            with self.options.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        outcome = row["error"] if "error" in row else f"{row['ms']:.2f} ms"
        self.console.print(
            f"{row['kind']} L {row['context']} B {row['batch']} {row['method']}: {outcome} ({row['setup_s']:.0f} s)", soft_wrap=True
        )

    def decode(self, method: str, batch: int, length: int) -> None:
        config, options = self.model.config, self.options
        context = Context.of(self.query_rms, config.num_key_value_heads // self.gpus, length, options.spread)
        kv_bytes = cached_bytes(config, length) * batch // self.gpus
        embedding = local(self.model.get_input_embeddings().weight).nbytes
        read = self.weight_bytes - (0 if config.tie_word_embeddings else embedding)  # of these only a row a sequence is read

        def call() -> dict:
            if method == HF_STATIC:
                times, columns = decode_hf_static(self.model, batch, context, options)
            else:
                times, columns = decode_twilight(self.model, method, batch, context, options)
            if self.device.type == "cuda" and self.gpus == 1:  # shards of the random layers share one layer's memory
                peak = torch.cuda.max_memory_allocated()
                columns["peak_over_kv"] = (peak - self.weight_bytes - kv_bytes) / kv_bytes
            if "attention_ms" in columns:
                columns["attention_share"] = columns["attention_ms"] / statistics.median(times)
            times.sort()
            return {
                "ms": statistics.median(times),
                "p10_ms": times[len(times) // 10],
                "p90_ms": times[-1 - len(times) // 10],
                "tokens_per_s": batch / statistics.median(times) * 1e3,
                "floor_ms": (read + kv_bytes) / self.bandwidth * 1e3,
                "weights_floor_ms": read / self.bandwidth * 1e3,
            } | columns

        settings = {"kind": "decode", "context": length, "batch": batch, "method": method, "top_p": options.top_p, "spread": options.spread}
        settings |= {"dense_layers": options.dense_layers, "dense_below": options.dense_below, "joined": options.join_linears}
        self.measure(settings, call)

    def prefill(self, method: str, length: int) -> None:
        """One prompt of random tokens through the first layers."""
        model, options = self.model, self.options
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(self.device)

        @torch.no_grad()
        def call() -> dict:
            with first_layers(model, options.prefill_layers):
                columns = {}
                if method == HF_DYNAMIC:
                    model.set_attn_implementation("sdpa")

                    def forward() -> None:
                        held = {cache_argument(model): DynamicCache(config=model.config)}
                        model(input_ids=ids, use_cache=True, logits_to_keep=1, **held)
                else:
                    model.set_attn_implementation("twilight")
                    all_sparse = argparse.Namespace(**{**vars(options), "dense_layers": 0})
                    config = twilight_config(method, length, model.config.head_dim, all_sparse, calibrated=True)
                    cache = TwilightCache(model.config, config, max_cache_len=length, device=self.device, dtype=model.dtype)
                    sizes = cache.nbytes()
                    columns["extra_over_kv"] = sizes["extra"] / sizes["kv"]

                    def forward() -> None:
                        cache.reset()
                        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})

                forward()
                times = sorted(step_times(forward, PREFILL_REPEATS, self.device))
                return {"ms": statistics.median(times), "p10_ms": times[0], "p90_ms": times[-1]} | columns

        row = {"kind": "prefill", "context": length, "batch": 1, "method": method, "layers": options.prefill_layers, "dense_layers": 0}
        self.measure(row, call)


@contextmanager
def first_layers(model: PreTrainedModel, count: int) -> Iterator[None]:
    """The model without its later layers."""
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    total = model.config.num_hidden_layers
    decoder.layers, model.config.num_hidden_layers = layers[:count], min(count, total)
    try:
        yield
    finally:
        decoder.layers, model.config.num_hidden_layers = layers, total


def latest(rows: Sequence[dict], kind: str) -> list[dict]:
    """Rows of one kind without those measured again later, in order of their first appearance."""
    keys = ("shape", "layers", "context", "batch", "method", "dense_layers", "dense_below", "joined", "top_p", "gpus")
    found = {tuple(row.get(key) for key in keys): row for row in rows if row["kind"] == kind}
    return list(found.values())


def speed_up(row: dict, rows: Sequence[dict], peer: str) -> float | None:
    """How many times as fast as `peer` in the same cell."""
    cell = ("shape", "layers", "context", "batch", "gpus")
    found = [other for other in rows if other["method"] == peer and all(other[key] == row[key] for key in cell) and "ms" in other]
    return found[-1]["ms"] / row["ms"] if found and "ms" in row else None


def form(pattern: str, value: float | None) -> str:
    return "" if value is None else pattern.format(value)


def decode_table(rows: Sequence[dict]) -> Table:
    table = Table(title="Time per output token: one step of the whole batch", title_justify="left")
    columns = (
        "shape",
        "GPUs",
        "context",
        "batch",
        "method",
        "ms",
        "p10-p90",
        "tok/s",
        "x HF",
        "x dense",
        "x floor",
        "attention",
        "I0",
        "I1",
        "mass",
    )
    for column in (*columns, "extra/KV", "peak/KV"):
        table.add_column(column, justify="left" if column in ("shape", "method") else "right", no_wrap=True)
    for row in rows:
        head = [row["shape"], str(row["gpus"]), str(row["context"]), str(row["batch"]), row["method"]]
        if "error" in row:
            table.add_row(*head, row["error"].split(":")[0])
            continue
        table.add_row(
            *head,
            f"{row['ms']:.2f}",
            f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            form("{:.2f}", speed_up(row, rows, HF_STATIC)),
            form("{:.2f}", speed_up(row, rows, "dense")),
            f"{row['ms'] / row['floor_ms']:.2f}",
            form("{:.0%}", row.get("attention_share")),
            form("{:.0f}", row.get("candidates")),
            form("{:.0f}", row.get("kept")),
            form("{:.3f}", row.get("captured_mass")),
            form("{:.1%}", row.get("extra_over_kv")),
            form("{:.1%}", row.get("peak_over_kv")),
        )
    return table


def prefill_table(rows: Sequence[dict]) -> Table:
    table = Table(title="Prefill of one prompt, its first layers, none of them dense", title_justify="left")
    for column in ("shape", "context", "layers", "method", "ms", "best-worst", "slower than HF", "slower than dense", "extra/KV"):
        table.add_column(column, justify="left" if column in ("shape", "method") else "right", no_wrap=True)
    for row in rows:
        head = [row["shape"], str(row["context"]), str(row["layers"]), row["method"]]
        if "error" in row:
            table.add_row(*head, row["error"].split(":")[0])
            continue
        slower = [speed_up(row, rows, peer) for peer in (HF_DYNAMIC, "dense")]
        table.add_row(
            *head,
            f"{row['ms']:.2f}",
            f"{row['p10_ms']:.2f}-{row['p90_ms']:.2f}",
            *(form("{:+.1%}", None if ratio is None else 1 / ratio - 1) for ratio in slower),
            form("{:.1%}", row.get("extra_over_kv")),
        )
    return table


def cell_of(text: str) -> tuple[int, str, tuple[str, ...]]:
    """CONTEXT:BATCH[:METHOD,METHOD...]"""
    length, batch, *methods = text.split(":", 2)
    names = tuple(methods[0].split(",")) if methods else DECODE_METHODS
    unknown = sorted(set(names) - set(DECODE_METHODS))
    if unknown or not (batch == "max" or batch.isdecimal()) or not length.isdecimal():
        raise argparse.ArgumentTypeError(f"expected CONTEXT:BATCH[:METHODS] of {', '.join(DECODE_METHODS)}, got {text!r}")
    return int(length), batch, names


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama31-8b")
    parser.add_argument("--model", help="path of a local model to use instead of random weights of --shape")
    parser.add_argument("--context", type=int, nargs="+", default=[], help="tokens already cached, with --batch and --methods")
    parser.add_argument("--batch", nargs="+", default=["1", "4", "max"], help='sequences; "max": the largest batch whose caches fit')
    parser.add_argument("--methods", nargs="+", choices=DECODE_METHODS, default=DECODE_METHODS)
    parser.add_argument("--cell", type=cell_of, nargs="+", default=[], metavar="CONTEXT:BATCH[:METHOD,...]", help="single cells instead")
    parser.add_argument("--prefill", type=int, nargs="+", default=[], metavar="CONTEXT", help="prompts to time")
    parser.add_argument("--prefill-layers", type=int, default=4)
    parser.add_argument("--prefill-methods", nargs="+", choices=PREFILL_METHODS, default=PREFILL_METHODS)
    parser.add_argument("--top-p", type=float, default=0.85)
    parser.add_argument("--spread", type=float, default=SPREAD, help="standard deviation of the logits")
    parser.add_argument("--dense-layers", type=int, default=2, help="first layers that attend to everything")
    parser.add_argument(
        "--dense-below", type=int, help="tokens up to which sparse methods attend to everything too; default: as shipped, the break-even"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--join-linears", action="store_true", help="query, key and value in one product, gate and up in one")
    parser.add_argument("--eager", action="store_true", help="compile and record nothing: for tests, not for figures")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object a line")
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace) -> tuple[PreTrainedModel, str]:
    device = torch.device(options.device)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
        if getattr(model.config, "head_dim", None) is None:
            model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
        return model.eval(), Path(options.model).name
    config = copy.deepcopy(SHAPES[options.shape])
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    torch.manual_seed(0)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        plan = DistributedConfig(tp_plan="auto")
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=random_state(config, device), dtype=torch.bfloat16, distributed_config=plan
        )
    else:
        with device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval(), options.shape


def random_state(config: LlamaConfig, device: torch.device) -> dict[str, Tensor]:
    """Weights by name to shard, the same in every process; layers share theirs, so that the unsharded model takes the room of one layer."""
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    made: dict[str, Tensor] = {}
    for name, meta in shapes.items():
        weight = torch.ones(meta.shape, dtype=torch.bfloat16, device=device)
        made.setdefault(re.sub(r"\.\d+\.", ".", name), weight if meta.dim() == 1 else weight.normal_(std=config.initializer_range))
    return {name: made[re.sub(r"\.\d+\.", ".", name)] for name in shapes}


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    options = parse_arguments(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_llama.py: --device: expected cpu, because this machine has no usable GPU, got cuda")
    if WORLD_SIZE > 1 and (options.model or options.prefill):
        sys.exit("bench_llama.py: torchrun: expected decode cells of a random model, got --model or --prefill")
    console = Console(stderr=True, quiet=RANK > 0)
    model, shape = make_model(options)
    if options.join_linears:
        console.print(f"{join_linears(model)} groups of linear layers joined")
    run = Run(model, shape, options, console)
    size = run.weight_bytes / 1e9
    console.print(f"{shape}: {size:.1f} GB of weights, read bandwidth {run.bandwidth / 1e12:.2f} TB/s, {run.environment['backend']}")
    cells = options.cell or [(length, batch, tuple(options.methods)) for length in options.context for batch in options.batch]
    total = sum(len(methods) for *_, methods in cells) + len(options.prefill) * len(options.prefill_methods)
    with Progress(console=console) as progress:
        task = progress.add_task(shape, total=total)
        for length in options.prefill:
            for method in options.prefill_methods:
                run.prefill(method, length)
                progress.advance(task)
        for length, batch, methods in cells:
            sequences = largest_batch(model.config, length, run.weight_bytes, run.device) if batch == "max" else int(batch)
            for method in methods:
                run.decode(method, sequences, length)
                progress.advance(task)
    tables = console_of(200, soft_wrap=False, quiet=RANK > 0)
    for kind, table in (("decode", decode_table), ("prefill", prefill_table)):
        rows = latest(run.rows, kind)
        if rows:
            tables.print(table(rows))
    return run.rows


if __name__ == "__main__":
    main()
    if WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
