"""Attention of all layers of a decode step with K and V on the GPU, in pinned host memory, and fetched whole.

`resident` has K and V on the device. `zero_copy` reads what it keeps over the bus; `hot` as well, but for rows of which the device has
copies, --hot-tokens a KV head. `fetch_dense` copies K and V of each layer to the device and attends to everything: offloading without
sparsity. On a CPU the pool is a file, and the reference serves `hot`. A step appends a token and attends, in every layer, recorded as
one graph; nothing else of a model runs.

Keys, and the queries of successive tokens, have the statistics of recorded heads (bench/heads.py). All layers hold one draw of
them, in memory of their own. The time is that of --layers layers. Kept sets of layer 0 have to be those of the first method that ran.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from twilight_ops import PagedKVCache, TwilightConfig
from twilight_ops.decode_step import append, attend
from twilight_ops.evaluation.methods import parse_method
from twilight_ops.host_memory import HostMemory
from twilight_ops.integration import CapturedStep

from . import heads
from .registry import Shape, shape_of
from .run import Entry, Op
from .timing import Method, Timing, step_us

FILL_TOKENS = 4096
CALIBRATED_TOKENS = 512
WATCHED_STEPS = 4  # whose kept sets are compared
SPARE_STEPS = 16  # warm-ups, and those that are watched


@dataclass
class Text:
    """Keys, values and queries of one sequence, on the device."""

    length: int
    keys: Tensor  # [1, length + room, Hkv, D]
    values: Tensor
    queries: Tensor  # [room, Hq, D], of the tokens from `length` on
    recent: Tensor  # [CALIBRATED_TOKENS, Hq, D], of the tokens before
    kept: list[Tensor] = field(default_factory=list)  # of the first method

    @staticmethod
    def of(length: int, room: int, num_qo_heads: int, num_kv_heads: int, device: str) -> Text:
        rng = torch.Generator(device).manual_seed(0)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        text = heads.Heads.fitted(num_qo_heads, num_kv_heads, rng).sequence(length + room, rng)
        keys = torch.empty(1, length + room, num_kv_heads, heads.HEAD_DIM, dtype=dtype, device=device)
        text.keys(keys[0])
        values = torch.empty_like(keys).normal_(generator=rng)
        positions = torch.arange(length - CALIBRATED_TOKENS, length + room, device=device)
        queries = text.queries(positions).to(dtype)
        return Text(length, keys, values, queries[CALIBRATED_TOKENS:], queries[:CALIBRATED_TOKENS])

    def describe(self) -> str:
        return f"{self.length:,} tokens, {self.keys.nbytes / 2**29:.2f} GiB of K and V a layer"


def config_of(name: str, options: argparse.Namespace) -> TwilightConfig:
    method = parse_method(options.setting)
    offload = {"offload": name != "resident", "hot_tokens": options.hot_tokens if name == "hot" else 0}
    return TwilightConfig(selector=method.selector, top_p=method.top_p, **{"dense_below": 512, **dict(method.settings), **offload})


def filled(text: Text, options: argparse.Namespace, config: TwilightConfig) -> tuple[PagedKVCache, dict[str, float]]:
    """The cache, and how long it took to allocate and to fill."""
    started = time.perf_counter()
    _, room, kv_heads, dim = text.keys.shape
    cache = PagedKVCache(config, options.layers, text.queries.shape[1], kv_heads, dim, 1, room, text.keys.dtype, text.keys.device)
    allocated = time.perf_counter()
    first = cache.layers[0]
    k = text.keys[:, text.length - CALIBRATED_TOKENS : text.length]
    for layer in cache.layers:
        layer.calibrate(text.recent[None], k, None, dim**-0.5)
    for start in range(0, text.length, FILL_TOKENS):
        part = slice(start, min(text.length, start + FILL_TOKENS))
        cache.seq_lens.fill_(part.stop)
        for layer in cache.layers:
            append(text.keys[:, part], text.values[:, part], layer, cache.page_table, cache.seq_lens)
    if first.kv.k_cache.is_cuda:
        torch.cuda.synchronize()
    return cache, {"allocate_s": allocated - started, "fill_s": time.perf_counter() - allocated}


def recorded(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    return CapturedStep(step, device) if device.type == "cuda" else step


def sparse_method(name: str, text: Text, options: argparse.Namespace) -> Method:
    device, dim = text.keys.device, text.keys.shape[-1]
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    cache, columns = filled(text, options, config_of(name, options))
    at = torch.zeros(1, dtype=torch.int64, device=device)
    paging = (cache.page_table, cache.seq_lens)

    def rows() -> tuple[Tensor, Tensor, Tensor]:
        place = text.length + at
        q = text.queries.index_select(0, at)[None]
        cache.seq_lens.add_(1)
        at.add_(1)
        return q, text.keys.index_select(1, place), text.values.index_select(1, place)

    def layers() -> None:
        q, k, v = rows()
        for layer in cache.layers:
            append(k, v, layer, *paging)
            attend(q, layer, *paging, dim**-0.5)

    watched, hits, overlap, fetched = cache.layers[0], [], [], 0.0
    kept_before = None
    for step in range(WATCHED_STEPS):
        q, k, v = rows()
        for layer in cache.layers[1:]:
            append(k, v, layer, *paging)
            attend(q, layer, *paging, dim**-0.5)
        append(k, v, watched, *paging)
        held = None if watched.hot is None else watched.hot.hot_tokens.clone()
        kept = torch.empty(1, watched.num_kv_heads, cache.max_cache_len, dtype=torch.int32, device=device)
        attend(q, watched, *paging, dim**-0.5, kept, kept.new_empty(kept.shape[:2]))
        live = kept >= 0
        if name == "resident" or len(text.kept) <= step:
            text.kept[step:] = [kept.cpu()]
        elif not torch.equal(text.kept[step], kept.cpu()):
            raise ValueError(f"{name}: expected the kept set of the method before at step {step}, got another")
        if kept_before is not None:
            marks = torch.zeros(kept.shape[1], cache.max_cache_len, dtype=torch.bool, device=device)
            old = torch.where(kept_before >= 0, kept_before, kept_before[..., :1])[0].long()
            marks.scatter_(1, old, True)
            overlap.append((marks.gather(1, kept[0].clamp(min=0).long()) & live[0]).sum().item() / live.sum().item())
        if held is not None and step > 0:
            place = kept.clamp(min=0).long() % held.shape[2]
            hits.append(((held.gather(2, place) == kept) & live).sum().item() / live.sum().item())
        kept_before, fetched = kept, live.sum().item()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = recorded(layers, device)
    for _ in range(SPARE_STEPS - WATCHED_STEPS - 2):
        run()

    def report() -> dict:
        sizes = cache.nbytes()
        row = columns | {"kept": fetched / watched.num_kv_heads, "host_gib": sizes.get("offloaded", 0) / 2**30}
        row["overlap"] = sum(overlap) / len(overlap)
        if device.type == "cuda":
            row["gpu_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        if hits:
            row["hit_rate"] = hits[-1]
        if "offloaded" in sizes:
            token = 2 * dim * watched.kv.k_cache.element_size()
            row["bus_mib"] = fetched * token * len(cache.layers) * (1.0 - row.get("hit_rate", 0.0)) / 2**20
        return row

    return Method(name, [], report, sampled=lambda seconds: step_us(run, options.steps, device.type))


def fetch_method(name: str, text: Text, options: argparse.Namespace) -> Method:
    device = text.keys.device
    shape = tuple(text.keys[0, : text.length].transpose(0, 1).shape)  # [Hkv, L, D]
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    started = time.perf_counter()
    memory = HostMemory(2 * options.layers * HostMemory.bytes_of(shape, text.keys.dtype), device)
    pools = [[memory.new_pair(shape, text.keys.dtype)[1] for _ in range(2)] for _ in range(options.layers)]
    allocated = time.perf_counter()
    for pool in pools:
        for target, source in zip(pool, (text.keys, text.values), strict=True):
            target.copy_(source[0, : text.length].transpose(0, 1))
    columns = {"allocate_s": allocated - started, "fill_s": time.perf_counter() - allocated}
    buffers = [torch.empty(1, *shape, dtype=text.keys.dtype, device=device) for _ in range(2)]
    q = text.queries[:1].transpose(0, 1)[None]  # [1, Hq, 1, D]

    def layers() -> None:
        for pool in pools:
            for buffer, source in zip(buffers, pool, strict=True):
                buffer[0].copy_(source, non_blocking=True)
            scaled_dot_product_attention(q, *buffers, enable_gqa=True)

    layers()

    def report() -> dict:
        moved = memory.nbytes
        row = columns | {"host_gib": moved / 2**30, "bus_mib": moved / 2**20, "kept": text.length}
        return row | ({"gpu_gib": (torch.cuda.memory_allocated() - before) / 2**30} if device.type == "cuda" else {})

    return Method(name, [], report, sampled=lambda seconds: step_us(layers, 3, device.type))


class OffloadOp(Op):
    name = "offload"
    about = __doc__ or ""
    columns = "method ms p10_ms p90_ms x_fetch kept overlap hit_rate bus_mib bus_gb_per_s gpu_gib host_gib allocate_s fill_s error"
    devices = ("cuda", "cpu")
    alone = ("cpu", "cuda")

    def add_options(self, p: argparse._ArgumentGroup) -> None:
        p.add_argument("--layers", type=int, default=32, metavar="N", help="that are allocated and timed; default: 32")
        p.add_argument("--setting", default="shadow_prefix:0.95", help="as eval's methods; default: shadow_prefix:0.95")
        p.add_argument("--hot-tokens", type=int, default=8192, metavar="N", help="copies a KV head; default: 8192")
        p.add_argument("--steps", type=int, default=16, metavar="N", help="timed; default: 16")

    def shapes(self, text: str) -> list[Shape]:
        return [shape_of(text)]

    def default_shapes(self, device: str) -> str:
        return {"cpu": "1:4k:8/2", "cuda": "1:128k:32/8"}[device]

    def entries(self, options: argparse.Namespace) -> list[Entry]:
        sparse = [Entry(name, partial(self.prepare, sparse_method, name)) for name in ("resident", "zero_copy", "hot")]
        return [Entry("fetch_dense", partial(self.prepare, fetch_method, "fetch_dense"), kind="peer"), *sparse]

    def prepare(self, method: Callable[..., Method], name: str, text: Text, options: argparse.Namespace) -> Method:
        self.release(options.device)  # pinned memory of the method before goes first
        return method(name, text, options)

    def start(self, options: argparse.Namespace) -> None:
        if options.base is not None:
            options.error("--base: expected none, because every method fills its caches once, got one")
        if any(batch != 1 or length < CALIBRATED_TOKENS for batch, length, _ in options.shapes):
            options.error(f"--shapes: expected batch 1 and at least {CALIBRATED_TOKENS} tokens")

    def open(self, cell: Shape, options: argparse.Namespace, sets: int | None = None, memory_share: float = 1.0) -> Text:
        return Text.of(cell[1], options.steps + SPARE_STEPS, *map(int, cell[2].split("/")), options.device)

    def head(self, cell: Shape, options: argparse.Namespace) -> dict:
        batch, context, head_counts = cell
        settings = {"layers": options.layers, "setting": options.setting, "hot_tokens": options.hot_tokens}
        return {"device": options.device, "kind": "offload", "batch": batch, "context": context, "heads": head_counts, **settings}

    def assumptions(self, options: argparse.Namespace) -> str:
        return f"{heads.describe()}; one draw for all {options.layers} layers; a time is that of {options.layers} layers' attention"

    def row(self, cell: Shape, options: argparse.Namespace, method: Method, timing: Timing, medians: dict[str, float]) -> dict:
        row = {"ms": timing.median_us / 1e3, "p10_ms": timing.p10_us / 1e3, "p90_ms": timing.p90_us / 1e3} | method.report()
        if "bus_mib" in row:
            row["bus_gb_per_s"] = row["bus_mib"] * 2**20 / timing.median_us / 1e3
        if "fetch_dense" in medians and method.name != "fetch_dense":
            row["x_fetch"] = medians["fetch_dense"] / timing.median_us
        return row


OFFLOAD = OffloadOp()
