"""Triton kernels of twilight::prune_top_p: an exact threshold a query head, then the union over the group as an ascending list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.prune_top_p import check_prune_top_p
from ._counters import count_row, mean_mass
from ._launch import Launch, next_power_of_2, query_rows
from ._tiles import INF, estimated_weight, in_order, listed_slots, slot_tokens, softmax_row, store_compacted

RESIDENT = Launch(8192, 8, 1, "32 weights a thread stay in registers from sum to marks; two programs share a multiprocessor", 128)
SHORT = Launch(2048, 4, 1, "16 weights a thread")
LOOPED = Launch(4096, 8, 1, "longer rows are read three times: sum, survivors, marks")
# Survivors of the cut are a few hundred to two thousand of 8192; up to LARGE of them are bisected in registers.
SURVIVORS_SMALL, SURVIVORS_LARGE = 1024, 4096
UNION = Launch(2048, 8, 1, "8 slots a thread and a scan; one program a KV head")

# What an int32 position can be; the operator itself knows no page table.
MAX_TOKENS = 2**31 - 1

MASS_UNIT_HALF = tl.constexpr(1048576.0)  # 2**20, twice: masses are in units of 2**-40
HALF_BITS = tl.constexpr(20)
# No weight below 2**-40 has any mass, and none counts as more than 1.
LOWEST_KEY = tl.constexpr((127 - 40) << 23)
HIGHEST_KEY = tl.constexpr((127 << 23) + 1)


@triton.jit
def _slot_weight(
    weights,
    indices,
    row,
    out_row,
    slot,
    slots,
    length,
    capacity,
    softmax,
    QUERY_TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
):
    """Live slots, live slots whose weight is NaN, and the weights clamped to 0..1, 0 elsewhere."""
    inside = slot < slots
    at = weights + out_row.to(tl.int64) * capacity + slot
    if FROM_LOGITS:
        logit = tl.load(at, mask=inside, other=-INF)
        weight = estimated_weight(logit, softmax[0], softmax[1], softmax[2])
    else:
        weight = tl.load(at, mask=inside, other=0.0)
    if FROM_LOGITS and QUERY_TOKENS == 1:
        # The only query token sees all that is live.
        live = logit != -INF
    else:
        token = slot_tokens(indices, row, slot, inside, capacity, UNIT, LISTED)
        live = (token >= 0) & (token < length)
    nan = live & (weight != weight)
    weight = tl.where(live & (weight > 0.0), tl.minimum(weight, 1.0), 0.0)
    return live, nan, weight


@triton.jit
def _mass(weight):
    """trunc(weight * 2**40), from two 20-bit words that are both exact in fp32."""
    scaled = weight * MASS_UNIT_HALF
    high = scaled.to(tl.int32)
    low = ((scaled - high.to(tl.float32)) * MASS_UNIT_HALF).to(tl.int32)
    return (high.to(tl.int64) << HALF_BITS) + low.to(tl.int64)


@triton.jit
def _sum64(masses):
    return tl.sum(tl.sum(masses, 1), 0)


@triton.jit
def _needed(top_p, top_p_per_head, batch, query_head, stride_pb, stride_ph, total):
    """p of a row in fp64, and the integer mass that has to be reached."""
    if top_p_per_head is None:
        p = tl.full([], top_p, tl.float64)
    else:
        p = tl.load(top_p_per_head + batch * stride_pb + query_head * stride_ph).to(tl.float64)
        p = tl.where(p != p, 1.0, tl.minimum(tl.maximum(p, 0.0), 1.0))
    wanted = p * total.to(tl.float64)
    need = wanted.to(tl.int64)
    need += tl.where(need.to(tl.float64) < wanted, 1, 0)
    return p, tl.maximum(need, 1)


@triton.jit
def _single(at_low, at_high, low):
    """Whether one weight at most lies in low..high: two would have at least twice the mass of `low`."""
    one = low.to(tl.float32, bitcast=True).to(tl.float64) * (MASS_UNIT_HALF * MASS_UNIT_HALF)
    return at_low - at_high < 2 * one.to(tl.int64)


@triton.jit
def _bisect_tile(survivors, count, need, TILE: tl.constexpr):
    """The key of the lightest survivor to keep, and the mass kept: all survivors in registers."""
    entry = in_order(TILE // 32)
    weight = tl.load(survivors + entry, mask=entry < count, other=0.0)
    key = weight.to(tl.int32, bitcast=True)
    masses = _mass(weight)
    bottom = tl.full([], LOWEST_KEY, tl.int32)
    ceiling = tl.full([], HIGHEST_KEY, tl.int32)
    at_bottom = _sum64(masses)
    at_ceiling = tl.zeros([], tl.int64)
    # The mass at or above `bottom` reaches what is needed, that at or above `ceiling` does not.
    while (ceiling - bottom > 1) and not _single(at_bottom, at_ceiling, bottom):
        middle = bottom + (ceiling - bottom) // 2
        reached = _sum64(tl.where(key >= middle, masses, 0))
        if reached >= need:
            bottom = middle
            at_bottom = reached
        else:
            ceiling = middle
            at_ceiling = reached
    return tl.min(tl.min(tl.where(key >= bottom, key, HIGHEST_KEY), 1), 0), at_bottom


@triton.jit
def _probe_list(survivors, count, key, BLOCK: tl.constexpr):
    """Mass of the survivors whose float bits are at least `key`, and the least such bits."""
    reached = tl.zeros([], tl.int64)
    least = tl.full([], HIGHEST_KEY, tl.int32)
    for start in range(0, count, BLOCK):
        entry = start + in_order(BLOCK // 32)
        weight = tl.load(survivors + entry, mask=entry < count, other=0.0)
        own = weight.to(tl.int32, bitcast=True)
        reached += _sum64(tl.where(own >= key, _mass(weight), 0))
        least = tl.minimum(least, tl.min(tl.min(tl.where(own >= key, own, HIGHEST_KEY), 1), 0))
    return reached, least


@triton.jit
def _bisect_list(survivors, count, need, BLOCK: tl.constexpr):
    """`_bisect_tile` for any number of survivors, read again for each probe."""
    bottom = tl.full([], LOWEST_KEY, tl.int32)
    ceiling = tl.full([], HIGHEST_KEY, tl.int32)
    at_bottom, lightest = _probe_list(survivors, count, bottom, BLOCK)
    at_ceiling = tl.zeros([], tl.int64)
    while (ceiling - bottom > 1) and not _single(at_bottom, at_ceiling, bottom):
        middle = bottom + (ceiling - bottom) // 2
        reached, least = _probe_list(survivors, count, middle, BLOCK)
        if reached >= need:
            bottom = middle
            at_bottom = reached
            lightest = least
        else:
            ceiling = middle
            at_ceiling = reached
    return lightest, at_bottom


@triton.jit
def _bisect(survivors, count, need, SMALL: tl.constexpr, LARGE: tl.constexpr):
    # Survivors were written by other threads of this program.
    tl.debug_barrier()
    if count <= SMALL:
        lightest, kept = _bisect_tile(survivors, count, need, SMALL)
    elif count <= LARGE:
        lightest, kept = _bisect_tile(survivors, count, need, LARGE)
    else:
        lightest, kept = _bisect_list(survivors, count, need, LARGE)
    return lightest, kept


@triton.jit
def _store_marks(keep, at, live, weight, lightest, keep_all, inside):
    kept = live & (keep_all | (weight.to(tl.int32, bitcast=True) >= lightest))
    tl.store(keep + at, kept.to(tl.uint8), mask=inside)


@triton.jit
def _needed_and_cut(top_p, top_p_per_head, batch, query_head, stride_pb, stride_ph, total, flags, slots):
    """Whether all is kept, the mass needed, and the cut: weights of at most that mass may be left out even all together."""
    p, need = _needed(top_p, top_p_per_head, batch, query_head, stride_pb, stride_ph, total)
    keep_all = (flags >= 2) | (p >= 1.0) | (total == 0)
    return keep_all, need, tl.maximum(total - need, 0) // tl.maximum(slots, 1)


@triton.jit
def _store_mass(mass, out_row, flags, keep_all, kept, total):
    share = (kept.to(tl.float64) / tl.maximum(total, 1).to(tl.float64)).to(tl.float32)
    tl.store(mass + out_row, tl.where(flags > 0, tl.where(keep_all, 1.0, share), 0.0))


@triton.jit
def _threshold_tile(
    weights,
    indices,
    survivors,
    keep,
    mass,
    top_p,
    top_p_per_head,
    row,
    out_row,
    batch,
    query_head,
    slots,
    length,
    capacity,
    softmax,
    stride_pb,
    stride_ph,
    QUERY_TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    TILE: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
):
    """A whole row in registers. The survivors of the cut are listed, and the threshold is found among them."""
    base = out_row.to(tl.int64) * capacity
    entry = in_order(TILE // 32)
    live, nan, weight = _slot_weight(
        weights, indices, row, out_row, entry, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
    )
    total = _sum64(_mass(weight))
    flags = tl.max(tl.max(live.to(tl.int32) + nan.to(tl.int32) * 2, 1), 0)
    keep_all, need, cut = _needed_and_cut(top_p, top_p_per_head, batch, query_head, stride_pb, stride_ph, total, flags, slots)
    lightest = tl.full([], HIGHEST_KEY, tl.int32)
    kept = total
    if not keep_all:
        count = store_compacted(survivors + base, weight, _mass(weight) > cut, 0, capacity)
        lightest, kept = _bisect(survivors + base, count, need, SMALL, LARGE)
    _store_marks(keep, base + entry, live, weight, lightest, keep_all, entry < slots)
    _store_mass(mass, out_row, flags, keep_all, kept, total)


@triton.jit
def _threshold_looped(
    weights,
    indices,
    survivors,
    keep,
    mass,
    top_p,
    top_p_per_head,
    row,
    out_row,
    batch,
    query_head,
    slots,
    length,
    capacity,
    softmax,
    stride_pb,
    stride_ph,
    QUERY_TOKENS: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    FROM_LOGITS: tl.constexpr,
    TILE: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
):
    """A row too long for registers: its weights are computed anew for each of three walks."""
    base = out_row.to(tl.int64) * capacity
    entry = in_order(TILE // 32)
    total = tl.zeros([], tl.int64)
    flags = tl.zeros([], tl.int32)
    for start in range(0, slots, TILE):
        live, nan, weight = _slot_weight(
            weights, indices, row, out_row, start + entry, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
        )
        total += _sum64(_mass(weight))
        flags |= tl.max(tl.max(live.to(tl.int32) + nan.to(tl.int32) * 2, 1), 0)
    keep_all, need, cut = _needed_and_cut(top_p, top_p_per_head, batch, query_head, stride_pb, stride_ph, total, flags, slots)
    lightest = tl.full([], HIGHEST_KEY, tl.int32)
    kept = total
    if not keep_all:
        count = tl.zeros([], tl.int32)
        for start in range(0, slots, TILE):
            _, _, weight = _slot_weight(
                weights, indices, row, out_row, start + entry, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
            )
            count += store_compacted(survivors + base, weight, _mass(weight) > cut, count, capacity)
        lightest, kept = _bisect(survivors + base, count, need, SMALL, LARGE)
    for start in range(0, slots, TILE):
        live, _, weight = _slot_weight(
            weights, indices, row, out_row, start + entry, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
        )
        _store_marks(keep, base + start + entry, live, weight, lightest, keep_all, start + entry < slots)
    _store_mass(mass, out_row, flags, keep_all, kept, total)


@triton.jit
def threshold_kernel(
    weights,  # [B, T, Hq, capacity]: weights, or logits with their partial maxima and sums
    peaks,  # [B * T * Hq, splits] or None
    sums,
    seq_lens,  # [B]
    indices,  # [B, Hkv, capacity / UNIT] or None
    counts,  # [B, Hkv] or None
    top_p_per_head,  # [B or 1, Hq or 1] or None
    survivors,  # [B, T, Hq, capacity] fp32, scratch
    keep,  # [B, T, Hq, capacity] uint8
    mass,  # [B, T, Hq]
    top_p: tl.float64,
    stride_pb,
    stride_ph,
    max_tokens,
    capacity,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    TILE_SMALL: tl.constexpr,
    TILE_LARGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
):
    """Grid (B * T * Hq): one program finds one query head's threshold by bisection on the float bits, and marks what it keeps."""
    out_row = tl.program_id(0)
    query_head = out_row % (KV_HEADS * GROUP)
    batch = out_row // (QUERY_TOKENS * KV_HEADS * GROUP)
    row = batch * KV_HEADS + query_head // GROUP
    length = tl.minimum(tl.maximum(tl.load(seq_lens + batch), 0), max_tokens)
    slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
    if length <= dense_below:
        return
    softmax = (0.0, 0.0, 1.0)
    if peaks is not None:
        softmax = softmax_row(peaks, sums, out_row, (slots + CHUNK - 1) // CHUNK, splits, SPLITS_PAD)
    # fmt: off
    if slots <= TILE_SMALL:
        _threshold_tile(weights, indices, survivors, keep, mass, top_p, top_p_per_head, row, out_row, batch, query_head, slots, length,
                        capacity, softmax, stride_pb, stride_ph, QUERY_TOKENS, UNIT, LISTED, peaks is not None, TILE_SMALL, SMALL, LARGE)
    elif TILE_LARGE > TILE_SMALL and slots <= TILE_LARGE:
        _threshold_tile(weights, indices, survivors, keep, mass, top_p, top_p_per_head, row, out_row, batch, query_head, slots, length,
                        capacity, softmax, stride_pb, stride_ph, QUERY_TOKENS, UNIT, LISTED, peaks is not None, TILE_LARGE, SMALL, LARGE)
    elif BLOCK > 0:
        _threshold_looped(weights, indices, survivors, keep, mass, top_p, top_p_per_head, row, out_row, batch, query_head, slots, length,
                          capacity, softmax, stride_pb, stride_ph, QUERY_TOKENS, UNIT, LISTED, peaks is not None, BLOCK, SMALL, LARGE)
    # fmt: on


@triton.jit
def union_kernel(
    keep,  # [B, T, Hq, capacity] uint8, or None: every live candidate is kept
    seq_lens,  # [B]
    indices,  # [B, Hkv, capacity / UNIT] or None
    counts,  # [B, Hkv] or None
    mass,  # [B, T, Hq] or None: everything
    kept_indices,  # [B, Hkv, kept_capacity] or None
    kept_counts,  # [B, Hkv] or None
    budget_counters,  # [Hkv, COUNTER_COLUMNS] int64 or None
    max_tokens,
    sink_tokens,
    recent_tokens,
    capacity,
    kept_capacity,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    FILL_DENSE: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv): one program walks the candidates of one KV head and lists those that any of its query heads keeps."""
    row = tl.program_id(0)
    batch = row // KV_HEADS
    length = tl.minimum(tl.maximum(tl.load(seq_lens + batch), 0), max_tokens)
    dense = length <= dense_below
    slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
    if dense:
        slots = 0
    kept = tl.zeros([], tl.int32)
    candidates = tl.zeros([], tl.int32)
    for start in range(0, slots, BLOCK):
        slot = start + in_order(BLOCK // 32)
        inside = slot < slots
        token = slot_tokens(indices, row, slot, inside, capacity, UNIT, LISTED)
        live = (token >= 0) & (token < length)
        taken = live
        if keep is not None:
            marked = tl.zeros([32, BLOCK // 32], tl.uint8)
            for r in range(QUERY_TOKENS * GROUP):
                out_row = (batch * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + row % KV_HEADS * GROUP + r % GROUP
                marked |= tl.load(keep + out_row.to(tl.int64) * capacity + slot, mask=inside, other=0)
            taken = live & ((marked > 0) | (token < sink_tokens) | (token >= length - recent_tokens))
        if kept_indices is not None:
            kept += store_compacted(kept_indices + row.to(tl.int64) * kept_capacity, token, taken, kept, kept_capacity)
        else:
            kept += tl.sum(taken.to(tl.int32))
        candidates += tl.sum(live.to(tl.int32))
    if dense:
        kept = length
        candidates = length
    if kept_counts is not None:
        tl.store(kept_counts + row, kept)
    if kept_indices is not None:
        out = kept_indices + row.to(tl.int64) * kept_capacity
        if FILL_DENSE and dense:
            for start in range(0, length, BLOCK):
                token = start + tl.arange(0, BLOCK)
                tl.store(out + token, token, mask=token < length)
        if PAD:
            for start in range(kept, kept_capacity, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                tl.store(out + slot, -1, mask=slot < kept_capacity)
    if budget_counters is not None:
        share = tl.full([], 1.0, tl.float64)
        if mass is not None:
            if not dense:
                share = mean_mass(mass, batch, row % KV_HEADS, KV_HEADS, QUERY_TOKENS, GROUP, ROWS_PAD)
        if length > 0:
            count_row(budget_counters, row % KV_HEADS, length, candidates, kept, share)


def thresholds(
    weights: Tensor,
    stats: tuple[Tensor, Tensor, int] | None,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    unit: int,
    kv_heads: int,
    top_p: float,
    top_p_per_head: Tensor | None,
    mass: Tensor,
    max_tokens: int = MAX_TOKENS,
    dense_below: int = -1,
) -> Tensor:
    """Marks what each query head keeps, [B, T, Hq, slots] uint8, from weights, or from logits and their `stats`; fills `mass`."""
    batch, query_tokens, heads, capacity = weights.shape
    keep = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    peaks, sums, chunk = stats if stats is not None else (None, None, 1)
    splits = 1 if peaks is None else peaks.shape[1]
    strides = (0, 0)
    if top_p_per_head is not None:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(top_p_per_head.shape, top_p_per_head.stride(), strict=True))
    padded = next_power_of_2(max(capacity, 64))
    large = min(padded, RESIDENT.block)
    survivors_large = min(SURVIVORS_LARGE, padded)
    if batch * query_tokens * heads:
        threshold_kernel[(batch * query_tokens * heads,)](
            weights,
            peaks,
            sums,
            seq_lens,
            indices,
            counts,
            top_p_per_head,
            torch.empty_like(weights),
            keep,
            mass,
            top_p,
            *strides,
            max_tokens,
            capacity,
            splits,
            dense_below,
            KV_HEADS=kv_heads,
            QUERY_TOKENS=query_tokens,
            GROUP=heads // kv_heads,
            UNIT=unit,
            LISTED=indices is not None,
            CHUNK=chunk,
            SPLITS_PAD=next_power_of_2(splits),
            TILE_SMALL=min(SHORT.block, large),
            TILE_LARGE=large,
            BLOCK=LOOPED.block if padded > large else 0,
            SMALL=min(SURVIVORS_SMALL, survivors_large),
            LARGE=survivors_large,
            **(RESIDENT if padded > SHORT.block else SHORT).options,
        )
    return keep


def union(
    keep: Tensor | None,
    mass: Tensor | None,
    query_shape: tuple[int, int, int],
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    unit: int,
    kv_heads: int,
    capacity: int,
    max_tokens: int,
    sink_tokens: int,
    recent_tokens: int,
    kept_indices: Tensor | None,
    kept_counts: Tensor | None,
    budget_counters: Tensor | None = None,
    dense_below: int = -1,
    fill_dense: bool = False,
    pad: bool = True,
) -> None:
    """Lists and counts what any query head of a group keeps; `keep` None keeps every live candidate. `query_shape` is (B, T, Hq)."""
    batch, query_tokens, heads = query_shape
    group = heads // kv_heads
    if batch * kv_heads:
        union_kernel[(batch * kv_heads,)](
            keep,
            seq_lens,
            indices,
            counts,
            mass,
            kept_indices,
            kept_counts,
            budget_counters,
            max_tokens,
            min(sink_tokens, MAX_TOKENS),
            min(recent_tokens, MAX_TOKENS),
            capacity,
            0 if kept_indices is None else kept_indices.shape[2],
            dense_below,
            KV_HEADS=kv_heads,
            QUERY_TOKENS=query_tokens,
            GROUP=group,
            UNIT=unit,
            LISTED=indices is not None,
            ROWS_PAD=query_rows(query_tokens, group, 1),
            FILL_DENSE=fill_dense,
            PAD=pad,
            BLOCK=UNION.block,
            **UNION.options,
        )


def prune_top_p(
    weights: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    num_kv_heads: int,
    top_p: float,
    top_p_per_head: Tensor | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    kept_indices, kept_counts, mass = check_prune_top_p(
        weights, seq_lens, indices, counts, tokens_per_index, num_kv_heads, top_p, top_p_per_head, sink_tokens, recent_tokens
    )
    lists = (seq_lens, indices, counts, tokens_per_index, num_kv_heads)
    keep = thresholds(weights, None, *lists, top_p, top_p_per_head, mass)
    union(
        keep,
        mass,
        weights.shape[:3],
        *lists,
        weights.shape[3],
        MAX_TOKENS,
        sink_tokens,
        recent_tokens,
        kept_indices,
        kept_counts,
    )
    return kept_indices, kept_counts, mass
