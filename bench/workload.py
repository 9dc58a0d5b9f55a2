"""Synthetic layers whose attention is a trained model's in its statistics, and calls of the operators on them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from twilight_ops import (
    Always,
    DoubleSparsity,
    Explanation,
    PagedKVCache,
    PagedKVLayer,
    Paging,
    Quest,
    ShadowPrefix,
    Streaming,
    TwilightConfig,
    decode_step,
    explain,
)
from twilight_ops.arguments import Scales
from twilight_ops.capacity import COUNTER_CANDIDATES, COUNTER_KEPT, COUNTER_ROWS
from twilight_ops.ops import operator as twilight_operator
from twilight_ops.selectors._paged import allocate_means

from . import heads

# Keys and queries: "qwen" are those of recorded heads (heads.py), "gaussian" independent normal numbers, described by what follows.
DATA = ("qwen", "gaussian")
# Newest tokens from which a shadow prefix is calibrated on the former.
CALIBRATED_TOKENS, CALIBRATED_QUERIES = 4096, 256
# Standard deviation of the logits, natural-log units. At p = 0.85 the lognormal's quantiles leave 128 of 32768 tokens a query head; a
# sample of that size, which lacks the far tail, keeps 209 on average (4.0 leaves about 120).
SPREAD = 3.7
# Share of a key's variance common to its page of 16 tokens: neighbours in text resemble each other, which is what page bounds live on.
PAGE_COHERENCE = 0.5
# What a channel contributes to a logit decays by e over this share of the head, shared evenly between query and key: the leading
# quarter holds 86% of a logit's variance, and the 4-bit shadow's error in a logit is about 0.5.
ENERGY_DECAY = 0.25
# Tokens filled in one append_kv call.
FILL_CHUNK = 4096
# Where a sequence's pages lie: at random in the whole pool, as in a server that has run for long, or as a fresh cache hands them out.
PAGE_ORDERS = {"shuffled": "shuffled pages", "allocated": "pages in the order of allocation"}
SELECT_OPS = {"quest": "select_pages", "shadow_prefix": "select_tokens"}
EVERYTHING = {"indices": None, "counts": None, "tokens_per_index": 1}  # a list of every token
# Buffers of one rotation together: beyond what a core keeps between two uses of the same buffer.
COLD_BYTES = 1 << 30
# On a GPU it is the bytes a sparse call touches that must not stay: together nine times the 60 MB of an H200's L2.
COLD_TOUCHED_BYTES = 1 << 29
MIN_SETS, MAX_SETS = 4, 64
# Data made for one sequence, the exact attention in fp32 and what the methods allocate for themselves.
RESERVED_BYTES = 8 << 30


def data_of(name: str | None, head_dim: int) -> str:
    """The data asked for; unless told, recorded heads where there are some of that size."""
    return name or ("qwen" if head_dim == heads.HEAD_DIM else "gaussian")


def assumptions(data: str, spread: float = SPREAD, page_order: str = "shuffled") -> str:
    rest = f"{PAGE_ORDERS[page_order]}, full length live"
    if data == "qwen":
        return f"{heads.describe()}, taken in turn; prefixes calibrated on the newest {CALIBRATED_TOKENS} tokens, {rest}"
    return (
        f"logits of standard deviation {spread} in every row, {PAGE_COHERENCE:.0%} of a key's variance shared by its page, channel "
        f"contributions decaying over {ENERGY_DECAY:.0%} of the head, channels in that order and a quarter of them the prefix, independent "
        f"query heads, {rest}"
    )


def sets_for_cold_cache(bytes_per_set: int, cold_bytes: int = COLD_BYTES, least: int = MIN_SETS) -> int:
    """How many buffer sets to rotate, as many layers of a model would: `cold_bytes` together, 4 to 64 sets."""
    return min(MAX_SETS, max(least, -(-cold_bytes // bytes_per_set)))


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
    kv_cache_dtype: str = "auto"  # of the paged cache

    @property
    def lists(self) -> int:
        """Candidate lists: one a (sequence, KV head)."""
        return self.batch * self.num_kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of all live tokens in `dtype`: what dense peers read."""
        return self.lists * self.length * 2 * self.head_dim * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of K and V of all live tokens in the paged cache: what our dense attention reads."""
        return self.lists * self.length * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token of one KV head in the paged cache."""
        return 2 * self.head_dim * (1 if self.kv_cache_dtype == "fp8" else self.dtype.itemsize)

    @property
    def shadow_token_bytes(self) -> int:
        """4-bit codes, scale and zero of one token of one KV head."""
        return self.head_dim // 2 + 4

    def prefix_bytes(self, prefix_channels: float) -> int:
        """The leading channels' codes of every live token, with scale and zero; a mean over KV heads."""
        return round(self.lists * self.length * (prefix_channels / 2 + 4))

    def bounds_bytes(self) -> int:
        """8-bit bounds of every live page, with scale and zero."""
        return self.lists * -(-self.length // self.page_size) * (2 * self.head_dim + 4)

    @property
    def paged_bytes(self) -> int:
        """One layer of the paged cache: K and V in whole pages, shadow, 8-bit bounds, 4-bit means."""
        pages = -(-self.length // self.page_size)
        means = self.lists * pages * (self.head_dim // 2 + 4)
        return self.lists * pages * self.page_size * (self.token_bytes + self.shadow_token_bytes) + self.bounds_bytes() + means

    @property
    def touched_bytes(self) -> int:
        """About the least that any method timed here reads a call, attended rows left out."""
        quest, prefix = (self.lists * candidate_budget(name, self.length) for name in ("quest", "shadow_prefix"))
        by_page = self.bounds_bytes() + quest * self.shadow_token_bytes
        by_token = self.prefix_bytes(self.head_dim // 4) + prefix * (self.head_dim - self.head_dim // 4) // 2
        return min(self.stored_bytes, by_page, by_token)

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
        dtype += "" if self.kv_cache_dtype == "auto" else f", K and V {self.kv_cache_dtype}"
        return f"B{self.batch} T{self.query_tokens} heads {heads} D{self.head_dim} S{self.page_size} L{self.length} {dtype}"


def candidate_budget(selector: str, length: int) -> int:
    """Tokens that a selector may choose: Quest the paper's 8192, of short contexts a quarter, as page means; the shadow prefix an eighth,
    in one level or two; 1 is none."""
    quarter, eighth = length // 4, length // 8
    return {"quest": min(8192, quarter), "page_mean": quarter, "shadow_prefix": eighth, "two_levels": eighth, "full": 1}[selector]


def decode_bytes(sizes: Sizes, layer: PagedKVLayer, candidates: float, kept: float) -> int:
    """Least bytes a decode call must read: what the selector scans, its estimates of I0, K and V of I1 (means a KV head)."""
    selector, read = layer.plan.selector, kept * sizes.token_bytes
    if selector is not None:
        read += sizes.length * statistics.mean(selector.scan_bytes(layer, sizes.length))
        read += candidates * statistics.mean(selector.estimate_bytes(layer)) if layer.plan.prunes else 0.0
    return round(sizes.lists * read)


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


@dataclass
class Workload:
    """Buffer sets of one shape: same keys and values in every set, different memory and queries."""

    sizes: Sizes
    queries: list[Tensor]  # [B, T, Hq, D] a set
    cache: PagedKVCache  # one layer a set, with shadow, 8-bit bounds and means
    keys: Tensor  # [B, L, Hkv, D], a view of [B, Hkv, L, D]
    values: Tensor
    data: str  # one of DATA
    copies: int  # of K and V, contiguous, for dense peers
    pipelines: dict = field(default_factory=dict)  # what `pipeline` keeps

    @property
    def sm_scale(self) -> float:
        return self.sizes.head_dim**-0.5

    @property
    def paging(self) -> Paging:
        return Paging(self.cache.page_table, self.cache.seq_lens)

    @property
    def sets(self) -> int:
        return len(self.queries)

    @property
    def prefix_channels(self) -> float:
        """Mean over the KV heads."""
        return self.cache.layers[0].shadow.prefix_channels.float().mean().item()

    @property
    def fixed_prefix(self) -> int | None:
        """The `ShadowPrefix.prefix_channels` that this data was given; None: calibrated."""
        return None if self.data == "qwen" else int(self.prefix_channels)

    @property
    def fingerprint(self) -> list[float]:
        """Equal for equal data."""
        return [t[0].double().sum().item() for t in (self.queries[0], self.keys, self.values)]

    def describe(self) -> str:
        total = len(self.queries) * self.sizes.kv_bytes / 2**20
        shared = f", {self.copies} contiguous copies for dense peers" if self.copies != len(self.queries) else ""
        return f"{len(self.queries)} buffer sets in turn, {total:,.0f} MiB of K and V{shared}"

    def layers(self, config: TwilightConfig) -> list[PagedKVLayer]:
        """The same memory under another configuration, with counters of its own."""
        device = self.keys.device
        found = []
        for i, layer in enumerate(self.cache.layers):
            plan = config.layer_plan(i, device.type, self.sizes.lists)
            policy = plan.policy(self.cache.max_cache_len, self.sizes.num_qo_heads, self.sizes.num_kv_heads, device)
            layer = replace(layer, plan=plan, policy=policy, budget_counters=torch.zeros_like(layer.budget_counters))
            if isinstance(config.selector, Streaming):
                config.selector.allocate(layer, ())  # its sinks
            found.append(self._with_heavy_channels(layer, found) if isinstance(config.selector, DoubleSparsity) else layer)
        return found

    def _with_heavy_channels(self, layer: PagedKVLayer, before: list[PagedKVLayer]) -> PagedKVLayer:
        """The layer with codes of its own, of which as many channels lead as Double Sparsity has heavy ones."""
        source = before[0].shadow if before else layer.shadow
        codes = {name: getattr(source, name).clone() for name in ("k_quant", "k_scale", "prefix_channels")}
        layer = replace(layer, shadow=layer.shadow._replace(**codes))
        if not before:
            layer.plan.selector.reset(layer)
            _fill(layer, self.cache, self.keys, self.values)  # K, V and means become what they were
        return layer

    @cached_property
    def contiguous_kv(self) -> list[tuple[Tensor, Tensor]]:
        """`copies` times K and V [B, Hkv, L, D], in separate memory; the first is what keys and values view."""
        original = tuple(t.transpose(1, 2) for t in (self.keys, self.values))
        return [original] + [tuple(t.clone() for t in original) for _ in range(1, self.copies)]

    def dense_copies(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of every set, contiguous: the layout that dense peers like best. Sets take the copies in turn."""
        return [self.contiguous_kv[i % self.copies] for i in range(len(self.queries))]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        """`exact` of the first query set."""
        return self.exact(0)

    @cached_property
    def expected_of_peers(self) -> tuple[Tensor, Tensor]:
        """The same of the K and V that dense peers read."""
        return self.expected if self.cache.layers[0].scales is None else self.exact(0, stored=False)

    def stored(self, sequence: int) -> tuple[Tensor, Tensor]:
        """What the cache holds of one sequence's K and V [L, Hkv, D]; a key in 8 bits and its shift are no bf16."""
        layer = self.cache.layers[0]
        if layer.scales is None:
            return self.keys[sequence], self.values[sequence]
        return _read(layer, self.cache.page_table[sequence], self.sizes.length, torch.float32)

    def exact(self, index: int, stored: bool = True) -> tuple[Tensor, Tensor]:
        """Attention of query set `index` over every token that the cache has stored, in fp32: out [B, T, Hq, D] and lse [B, T, Hq]."""
        sizes = self.sizes
        tokens, kv_heads = sizes.query_tokens, sizes.num_kv_heads
        newest = torch.arange(sizes.length - tokens, sizes.length, device=self.keys.device)
        hidden = torch.arange(sizes.length, device=self.keys.device) > newest[:, None]  # [T, L]
        out, lse = [], []
        for b, q in enumerate(self.queries[index]):
            k, v = self.stored(b) if stored else (self.keys[b], self.values[b])
            rows = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2).float()  # [Hkv, G * T, D]
            logits = (rows @ k.permute(1, 2, 0).float() * self.sm_scale).unflatten(1, (-1, tokens))  # [Hkv, G, T, L]
            logits.masked_fill_(hidden, -torch.inf)
            lse.append(logits.logsumexp(-1).flatten(0, 1).T)  # [T, Hq]
            weights = logits.softmax(-1).flatten(1, 2)
            out.append((weights @ v.transpose(0, 1).float()).unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.stack(out), torch.stack(lse)


def call_arguments(op: str, data: Workload, index: int, layer: PagedKVLayer | None = None, **given: object) -> dict[str, object]:
    """Arguments by name of `torch.ops.twilight.<op>` on buffer set `index`: what its schema asks for, of the layer, its plan and `given`.

    No sinks and no newest tokens but the step's own are asked for, unless they are given.
    """
    layer = data.cache.layers[index] if layer is None else layer
    policy = layer.policy
    # select_pages is timed with bounds, append_kv without means.
    pages = (layer.bounds, layer.means) if op in ("decode_attention", "select_tokens") else (layer.bounds,)
    groups = (layer.kv, layer.shadow, *pages, data.paging, policy.budget, policy.pruning, Always(), layer.scales or Scales())
    known = {name: value for group in groups for name, value in group._asdict().items()} | {
        "q": data.queries[index],
        "page_size": data.sizes.page_size,
        "num_kv_heads": data.sizes.num_kv_heads,
        "sm_scale": data.sm_scale,
        "selector": policy.selector,
        "dense_below": policy.dense_below,
        "page_fraction": policy.level.page_fraction,
        "min_scored_tokens": policy.level.min_scored_tokens,
        "budget_counters": layer.budget_counters,
    }
    known |= given
    return {a.name: known[a.name] for a in operator(op)._schema.arguments if a.name in known}


def operator(op: str) -> Callable:
    return getattr(torch.ops.twilight, op).default


def call(op: str, data: Workload, index: int, **given: object) -> Callable:
    return partial(operator(op), **call_arguments(op, data, index, **given))


def explained(arguments: dict[str, object]) -> Explanation:
    """Which kernel serves a call of `decode_attention`."""
    decode_attention = twilight_operator("decode_attention")
    return explain(*decode_attention.groups(decode_attention.values((), dict(arguments))))


@dataclass
class Pipeline:
    """What each stage of one selector gives to the next, by buffer set."""

    listed: list[dict[str, object]]  # indices, counts, tokens_per_index as arguments
    weights: list[Tensor]
    pruned: list[dict[str, object]]
    candidates: float  # mean tokens a KV head
    kept: float
    mass: float  # estimated


def select_call(data: Workload, selector: str, budget: int, index: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return call(SELECT_OPS[selector], data, index, token_budget=budget, budget_fraction=0.0)


def pipeline(data: Workload, selector: str, budget: int, top_p: float) -> Pipeline:
    """Runs the stages of `selector` ("full" has none to select with) on every buffer set; the latest one is kept."""
    key = (selector, budget, top_p)
    if data.pipelines.get("key") != key:
        data.pipelines.clear()
        listed, weights, pruned, masses = [], [], [], []
        unit = data.sizes.page_size if selector == "quest" else 1
        for i in range(len(data.queries)):
            indices, counts = (None, None) if selector == "full" else select_call(data, selector, budget, i)()
            listed.append({"indices": indices, "counts": counts, "tokens_per_index": unit})
            weights.append(call("estimate_weights", data, i, **listed[i])())
            indices, counts, mass = call("prune_top_p", data, i, weights=weights[i], top_p=top_p, **listed[i])()
            pruned.append({"indices": indices, "counts": counts, "tokens_per_index": 1})
            masses.append(mass.mean().item())
        sets = len(data.queries)
        live = data.sizes.length
        found = sum(live if x["counts"] is None else min(live, x["counts"].float().mean().item() * unit) for x in listed)
        kept = sum(x["counts"].float().mean().item() for x in pruned)
        data.pipelines |= {"key": key, "found": Pipeline(listed, weights, pruned, found / sets, kept / sets, sum(masses) / sets)}
    return data.pipelines["found"]


def budget_means(layers: list[PagedKVLayer]) -> tuple[float, float]:
    """Mean I0 and I1 a KV head over all calls counted so far."""
    total = sum(layer.budget_counters.sum(0) for layer in layers)
    rows = max(1, int(total[COUNTER_ROWS]))
    return int(total[COUNTER_CANDIDATES]) / rows, int(total[COUNTER_KEPT]) / rows


def build(
    sizes: Sizes,
    device: str,
    sets: int | None = None,
    seed: int = 0,
    spread: float = SPREAD,
    page_order: str = "shuffled",
    memory_share: float = 1.0,
    data: str | None = None,
) -> Workload:
    """Allocates and fills the buffer sets.

    `sets` None rotates enough of them for cold caches, or what `memory_share` of the device's free memory holds; `data` is one of DATA,
    None for `data_of`; `spread` is of Gaussian data.

    Raises:
        MemoryError: the device cannot hold one set and one contiguous copy.
    """
    free = round(torch.cuda.mem_get_info()[0] * memory_share) if device == "cuda" else None
    paged, copies = buffer_sets(sizes, device, free)
    if paged == 0:
        need = (sizes.paged_bytes + sizes.kv_bytes + RESERVED_BYTES) / 2**30
        raise MemoryError(
            f"{sizes}: a paged cache, a contiguous K and V and room to work in need {need:.0f} GiB, {free / 2**30:.0f} GiB are free"
        )
    sets = paged if sets is None else sets
    rng = torch.Generator(device).manual_seed(seed)
    batch, length, kv_heads, dim = sizes.batch, sizes.length, sizes.num_kv_heads, sizes.head_dim
    data = data_of(data, dim)
    keys, values = torch.empty((2, batch, kv_heads, length, dim), dtype=sizes.dtype, device=device).transpose(2, 3)
    queries, calibrate = _fitted(sizes, sets, rng, keys) if data == "qwen" else _gaussian(sizes, sets, spread, rng, keys)
    for value in values:
        value.copy_(torch.randn(value.shape, generator=rng, device=device))

    config = TwilightConfig(selector=Quest(), page_size=sizes.page_size, dense_below=0, kv_cache_dtype=sizes.kv_cache_dtype)
    cache = PagedKVCache(config, sets, sizes.num_qo_heads, kv_heads, dim, batch, length, sizes.dtype, device)
    if page_order == "shuffled":
        cache.page_table.copy_(torch.randperm(cache.page_table.numel(), generator=rng, device=device).view_as(cache.page_table))
    for layer in cache.layers:
        layer.means = allocate_means(layer)
    first = cache.layers[0]
    calibrate(first)
    _fill(first, cache, keys, values)
    if first.scales is not None:  # peers and checks are given what is stored
        for b, table in enumerate(cache.page_table):
            for rows, stored in zip((keys[b], values[b]), _read(first, table, length, sizes.dtype), strict=True):
                rows.copy_(stored)
    for layer in cache.layers[1:]:
        for target, source in zip(layer.tensors(), first.tensors(), strict=True):
            target.copy_(source)
    return Workload(sizes, queries, cache, keys, values, data, min(copies, sets))


def _fill(layer: PagedKVLayer, cache: PagedKVCache, keys: Tensor, values: Tensor) -> None:
    """Appends K and V [B, L, Hkv, D] to an empty layer."""
    for start in range(0, keys.shape[1], FILL_CHUNK):
        stop = min(keys.shape[1], start + FILL_CHUNK)
        cache.seq_lens.fill_(stop)
        decode_step.append(keys[:, start:stop], values[:, start:stop], layer, cache.page_table, cache.seq_lens)


def _read(layer: PagedKVLayer, table: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V [L, Hkv, D] of one sequence as a cache in 8 bits holds them."""
    read = zip(layer.kv, (layer.scales.keys, layer.scales.values), strict=True)
    keys, values = (widen(rows[table.long()], dtype).transpose(1, 2).flatten(0, 1)[:length] for rows, widen in read)
    return keys, values


Made = tuple[list[Tensor], Callable[[PagedKVLayer], None]]  # queries of every set, and what calibrates a layer before its keys come


def _fitted(sizes: Sizes, sets: int, rng: torch.Generator, keys: Tensor) -> Made:
    """Fills keys [B, L, Hkv, D] with those of recorded heads. Sets differ in the words of their queries and in noise, not in their text."""
    length, device = sizes.length, keys.device
    made = heads.Heads.fitted(sizes.num_qo_heads, sizes.num_kv_heads, rng)
    newest = torch.arange(length - sizes.query_tokens, length, device=device)
    by_sequence, recent = [], None
    for index, key in enumerate(keys):  # one sequence at a time: fp32 of a whole batch may not fit
        text = made.sequence(length, rng, index)
        text.keys(key)
        by_sequence.append([text.queries(newest, own_words=i == 0).to(sizes.dtype) for i in range(sets)])
        if recent is None:
            recent = text.queries(torch.arange(max(0, length - CALIBRATED_QUERIES), length, device=device)).to(sizes.dtype)

    def calibrate(layer: PagedKVLayer) -> None:
        """As a prompt of the newest tokens would."""
        k = keys[:1, -CALIBRATED_TOKENS:]
        q = torch.nn.functional.pad(recent, (0, 0, 0, 0, k.shape[1] - len(recent), 0))[None]
        layer.calibrate(q, k, None, sizes.head_dim**-0.5)  # the centre
        ShadowPrefix().calibrate(q, k, layer, None, sizes.head_dim**-0.5)

    return [torch.stack(found) for found in zip(*by_sequence, strict=True)], calibrate


def _gaussian(sizes: Sizes, sets: int, spread: float, rng: torch.Generator, keys: Tensor) -> Made:
    """Fills keys [B, L, Hkv, D] with normal numbers of a common profile over channels."""
    kv_heads, length, dim, device = sizes.num_kv_heads, sizes.length, sizes.head_dim, keys.device

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=device)

    profile = torch.exp(-torch.arange(dim, device=device) / (2 * ENERGY_DECAY * dim))
    profile = profile[torch.stack([torch.randperm(dim, generator=rng, device=device) for _ in range(kv_heads)])]  # [Hkv, D]
    key_std = profile / profile.square().mean(-1, keepdim=True).sqrt()
    group = sizes.num_qo_heads // kv_heads
    query_std, logit_std = (t.repeat_interleave(group, dim=0) for t in (profile, key_std))

    def query() -> Tensor:
        """Scaled so that this very query's logits have the wanted spread."""
        q = normal(sizes.batch, sizes.query_tokens, sizes.num_qo_heads, dim) * query_std
        return (q * spread / (q * logit_std).square().mean(-1, keepdim=True).sqrt()).to(sizes.dtype)

    for key in keys:
        pages = normal(-(-length // sizes.page_size), kv_heads, dim).repeat_interleave(sizes.page_size, dim=0)[:length]
        key.copy_(pages.mul_(PAGE_COHERENCE**0.5).add_(normal(length, kv_heads, dim).mul_((1 - PAGE_COHERENCE) ** 0.5)).mul_(key_std))

    def calibrate(layer: PagedKVLayer) -> None:
        layer.shadow.channel_order.copy_(profile.argsort(dim=-1, descending=True))
        layer.shadow.prefix_channels.fill_(max(8, dim // 4 // 8 * 8))

    return [query() for _ in range(sets)], calibrate
