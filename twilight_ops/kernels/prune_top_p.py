"""Triton kernels of twilight::prune_top_p: the bins that a query head keeps, then the union over the group as an ascending list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Always, Budget, Candidates, Observation, Pruning
from ..capacity import MAX_TOKENS, WEIGHT_BIN_SHIFT, WEIGHT_UNIT, Limits
from ..ops.prune_top_p import outputs
from ._counters import count_row, mean_mass
from ._launch import Launch, next_power_of_2, query_rows
from ._tiles import INF, estimated_weight, in_order, listed_slots, slot_tokens, softmax_row, store_compacted, weight_row

RESIDENT = Launch(4096, 8, 1, "H200, B64: 43 us for 4096 slots; 8192 in 128 registers took 124, and a looped row 72 for every 8192", 64)
SHORT = Launch(2048, 4, 1, "16 weights a thread")
LOOPED = Launch(4096, 8, 1, "longer rows are read twice, for their sum and for the survivors; the second time from L2")
BISECT = Launch(1024, 4, 1, "8 weights a thread; the cut leaves a few hundred to two thousand of 8192, and a probe finds them in L1")
UNION = Launch(2048, 8, 1, "8 slots a thread and a scan; one program a KV head")

UNIT_MASS = tl.constexpr(1.0 / WEIGHT_UNIT)
HIGH_UNIT = tl.constexpr(2.0**20)
LOW_UNIT = tl.constexpr(WEIGHT_UNIT / 2.0**20)
LOW_BITS = tl.constexpr((WEIGHT_UNIT >> 20).bit_length() - 1)
SHIFT = tl.constexpr(WEIGHT_BIN_SHIFT)
# No weight counts as more than 1.
BEYOND = tl.constexpr((127 << (23 - WEIGHT_BIN_SHIFT)) + 1)


@triton.jit
def _by_thread(COUNT: tl.constexpr, THREADS: tl.constexpr):
    """0 .. COUNT - 1 as a tile [THREADS, COUNT / THREADS] whose rows each lie in one thread: sums and scans of them move nothing."""
    rows: tl.constexpr = THREADS if THREADS < COUNT else COUNT
    entry = tl.arange(0, rows)[:, None] + tl.arange(0, COUNT // rows)[None, :] * rows
    # Hidden from the compiler, because vector loads would bring a layout of their own.
    return tl.max_contiguous(entry, [1, 1])


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
    """Weights clamped to 0..1, -1 where a slot is not live, and where a live slot's weight is NaN."""
    inside = slot < slots
    at = weights + out_row.to(tl.int64) * capacity + slot
    if FROM_LOGITS:
        logit = tl.load(at, mask=inside, other=-INF)
        weight = estimated_weight(logit, softmax[1], softmax[2])
    else:
        weight = tl.load(at, mask=inside, other=0.0)
    if FROM_LOGITS and QUERY_TOKENS == 1:
        # The only query token sees all that is live.
        live = logit != -INF
    else:
        token = slot_tokens(indices, row, slot, inside, capacity, UNIT, LISTED)
        live = (token >= 0) & (token < length)
    nan = live & (weight != weight)
    weight = tl.where(weight > 0.0, tl.minimum(weight, 1.0), 0.0)
    return tl.where(live, weight, -1.0), nan


@triton.jit
def _row_flags(weight, nan, top, QUERY_TOKENS: tl.constexpr, FROM_LOGITS: tl.constexpr):
    """Bit 0: something is live. Bit 1: a live weight is NaN."""
    if FROM_LOGITS and QUERY_TOKENS == 1:
        flags = (top != -INF).to(tl.int32) + (top == INF).to(tl.int32) * 2
    else:
        bits = (weight >= 0.0).to(tl.int32) | nan.to(tl.int32) * 2
        flags = tl.max(tl.max(bits & 1, 1), 0) | tl.max(tl.max(bits & 2, 1), 0)
    return flags


@triton.jit
def _mass_words(weight):
    """The high 20 and the low bits of trunc(weight * WEIGHT_UNIT), both exact in fp32."""
    scaled = tl.maximum(weight, 0.0) * HIGH_UNIT
    high = scaled.to(tl.int32)
    low = ((scaled - high.to(tl.float32)) * LOW_UNIT).to(tl.int32)
    return high, low


@triton.jit
def _thread_mass(high, low):
    """Each row's sum of a `_by_thread` tile of masses: a thread's own words stay far below 2**31."""
    return (tl.sum(high, 1).to(tl.int64) << LOW_BITS) + tl.sum(low, 1).to(tl.int64)


@triton.jit
def _mass_sum(high, low):
    return tl.sum(_thread_mass(high, low), 0)


@triton.jit
def _needed(top_p, head_top_p, batch, query_head, stride_pb, stride_ph, total):
    """p of a row in fp64, and the integer mass that has to be reached."""
    if head_top_p is None:
        p = tl.full([], top_p, tl.float64)
    else:
        p = tl.load(head_top_p + batch * stride_pb + query_head * stride_ph).to(tl.float64)
        p = tl.where(p != p, 1.0, tl.minimum(tl.maximum(p, 0.0), 1.0))
    wanted = p * total.to(tl.float64)
    need = wanted.to(tl.int64)
    need += tl.where(need.to(tl.float64) < wanted, 1, 0)
    return p, tl.maximum(need, 1)


@triton.jit
def _needed_and_lowest(top_p, head_top_p, batch, query_head, stride_pb, stride_ph, total, flags, slots):
    """Whether all is kept, the mass needed, and the lowest bin of a survivor: all lighter ones may be left out even together."""
    p, need = _needed(top_p, head_top_p, batch, query_head, stride_pb, stride_ph, total)
    keep_all = (flags >= 2) | (p >= 1.0) | (total == 0)
    # Weights of at most this mass are left out, but not those in the bin of one.
    spare = tl.maximum((total - need) // tl.maximum(slots, 1), 1)
    lowest = (spare.to(tl.float32) * UNIT_MASS).to(tl.int32, bitcast=True) >> SHIFT
    return keep_all, need, tl.where(keep_all, BEYOND, lowest)


@triton.jit
def _list_survivors(survivors, places, slot, weight, lowest, base):
    """Appends weights of at least bin `lowest`, with their slots, in any order; returns how many there are now."""
    taken = weight.to(tl.int32, bitcast=True) >> SHIFT >= lowest
    flag = taken.to(tl.int32)
    own = tl.sum(flag, 1)
    at = (base + tl.cumsum(own, 0) - own)[:, None] + tl.cumsum(flag, 1) - flag
    tl.store(survivors + at, weight, mask=taken)
    tl.store(places + at, slot, mask=taken)
    return base + tl.sum(own, 0)


@triton.jit
def _store_marks(keep, weight, slot, slots, keep_all):
    """Marks everything live, or nothing."""
    tl.store(keep + slot, (keep_all & (weight >= 0.0)).to(tl.uint8), mask=slot < slots)


@triton.jit
def _survivors_tile(
    weights,
    indices,
    survivors,
    places,
    keep,
    top_p,
    head_top_p,
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
    THREADS: tl.constexpr,
):
    """A whole row in registers."""
    base = out_row.to(tl.int64) * capacity
    slot = _by_thread(TILE, THREADS)
    weight, nan = _slot_weight(
        weights, indices, row, out_row, slot, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
    )
    high, low = _mass_words(weight)
    total = _mass_sum(high, low)
    flags = _row_flags(weight, nan, softmax[0], QUERY_TOKENS, FROM_LOGITS)
    keep_all, need, lowest = _needed_and_lowest(top_p, head_top_p, batch, query_head, stride_pb, stride_ph, total, flags, slots)
    _store_marks(keep + base, weight, slot, slots, keep_all)
    return total, flags, keep_all, need, lowest, _list_survivors(survivors + base, places + base, slot, weight, lowest, 0)


@triton.jit
def _survivors_looped(
    weights,
    indices,
    survivors,
    places,
    keep,
    top_p,
    head_top_p,
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
    THREADS: tl.constexpr,
):
    """A row too long for registers: its weights are computed anew for the second walk."""
    base = out_row.to(tl.int64) * capacity
    masses = tl.zeros([THREADS], tl.int64)
    flags = tl.zeros([], tl.int32)
    for start in range(0, slots, TILE):
        slot = start + _by_thread(TILE, THREADS)
        weight, nan = _slot_weight(
            weights, indices, row, out_row, slot, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
        )
        high, low = _mass_words(weight)
        masses += _thread_mass(high, low)
        flags |= _row_flags(weight, nan, softmax[0], QUERY_TOKENS, FROM_LOGITS)
    total = tl.sum(masses, 0)
    keep_all, need, lowest = _needed_and_lowest(top_p, head_top_p, batch, query_head, stride_pb, stride_ph, total, flags, slots)
    count = tl.zeros([], tl.int32)
    for start in range(0, slots, TILE):
        slot = start + _by_thread(TILE, THREADS)
        weight, _ = _slot_weight(
            weights, indices, row, out_row, slot, slots, length, capacity, softmax, QUERY_TOKENS, UNIT, LISTED, FROM_LOGITS
        )
        _store_marks(keep + base, weight, slot, slots, keep_all)
        count = _list_survivors(survivors + base, places + base, slot, weight, lowest, count)
    return total, flags, keep_all, need, lowest, count


@triton.jit
def survivors_kernel(
    weights,  # [B, T, Hq, capacity]: weights, or logits with their partial maxima and sums
    peaks,  # [B * T * Hq, splits] or None
    sums,
    seq_lens,  # [B]
    indices,  # [B, Hkv, capacity / UNIT] or None
    counts,  # [B, Hkv] or None
    head_top_p,  # [B or 1, Hq or 1] or None
    survivors,  # [B, T, Hq, capacity] fp32
    places,  # [B, T, Hq, capacity] int32
    masses,  # [B * T * Hq, 2] int64: needed, total
    cuts,  # [B * T * Hq, 2] int32: survivors, lowest bin of one
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
    THREADS: tl.constexpr,
):
    """Grid (B * T * Hq): one program sums one query head's mass and lists the weights that it may keep.

    What weighs so little that all of its like together could be left out is left out at once. Rows that keep everything are done here.
    """
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
        softmax = weight_row(softmax_row(peaks, sums, out_row, (slots + CHUNK - 1) // CHUNK, splits, SPLITS_PAD))
    arguments = (
        weights,
        indices,
        survivors,
        places,
        keep,
        top_p,
        head_top_p,
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
    )
    if slots <= TILE_SMALL:
        total, flags, keep_all, need, lowest, count = _survivors_tile(
            *arguments, QUERY_TOKENS, UNIT, LISTED, peaks is not None, TILE_SMALL, THREADS
        )
    elif BLOCK == 0 or slots <= TILE_LARGE:
        total, flags, keep_all, need, lowest, count = _survivors_tile(
            *arguments, QUERY_TOKENS, UNIT, LISTED, peaks is not None, TILE_LARGE, THREADS
        )
    else:
        total, flags, keep_all, need, lowest, count = _survivors_looped(
            *arguments, QUERY_TOKENS, UNIT, LISTED, peaks is not None, BLOCK, THREADS
        )
    tl.store(masses + out_row * 2, need)
    tl.store(masses + out_row * 2 + 1, total)
    tl.store(cuts + out_row * 2, count)
    tl.store(cuts + out_row * 2 + 1, lowest)
    if keep_all:
        tl.store(mass + out_row, tl.where(flags > 0, 1.0, 0.0))


@triton.jit
def _probe(survivors, count, bin, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """Mass of the survivors of at least this bin."""
    reached = tl.zeros([], tl.int64)
    for start in range(0, count, BLOCK):
        entry = start + _by_thread(BLOCK, THREADS)
        weight = tl.load(survivors + entry, mask=entry < count, other=0.0)
        high, low = _mass_words(tl.where(weight.to(tl.int32, bitcast=True) >> SHIFT >= bin, weight, 0.0))
        reached += _mass_sum(high, low)
    return reached


@triton.jit
def threshold_kernel(
    seq_lens,  # [B]
    survivors,  # [B, T, Hq, capacity] fp32
    places,  # [B, T, Hq, capacity] int32
    masses,  # [B * T * Hq, 2] int64
    cuts,  # [B * T * Hq, 2] int32
    keep,  # [B, T, Hq, capacity] uint8
    mass,  # [B, T, Hq]
    rows_a_sequence,  # T * Hq
    max_tokens,
    capacity,
    dense_below,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Grid (B * T * Hq): one program finds the lowest bin that one query head keeps, by bisection, and marks what it keeps."""
    out_row = tl.program_id(0)
    length = tl.minimum(tl.maximum(tl.load(seq_lens + out_row // rows_a_sequence), 0), max_tokens)
    if length <= dense_below:
        return
    count = tl.load(cuts + out_row * 2)
    # A row without survivors keeps everything, and is done.
    if count == 0:
        return
    cut = tl.load(cuts + out_row * 2 + 1)
    need = tl.load(masses + out_row * 2)
    survivors += out_row.to(tl.int64) * capacity
    places += out_row.to(tl.int64) * capacity
    keep += out_row.to(tl.int64) * capacity
    beyond = tl.full([], BEYOND, tl.int32)
    at_cut = _probe(survivors, count, cut, BLOCK, THREADS)
    # The mass from bin `cut` on reaches what is needed, that from `beyond` on does not.
    while beyond - cut > 1:
        middle = (cut + beyond) // 2
        reached = _probe(survivors, count, middle, BLOCK, THREADS)
        if reached >= need:
            cut = middle
            at_cut = reached
        else:
            beyond = middle
    for start in range(0, count, BLOCK):
        entry = start + _by_thread(BLOCK, THREADS)
        weight = tl.load(survivors + entry, mask=entry < count, other=0.0)
        kept = (weight.to(tl.int32, bitcast=True) >> SHIFT >= cut) & (entry < count)
        tl.store(keep + tl.load(places + entry, mask=kept, other=0), 1, mask=kept)
    total = tl.load(masses + out_row * 2 + 1)
    tl.store(mass + out_row, (at_cut.to(tl.float64) / total.to(tl.float64)).to(tl.float32))


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
            count_row(budget_counters, row % KV_HEADS, length, candidates, kept, share, dense)


def thresholds(
    weights: Tensor,
    stats: tuple[Tensor, Tensor, int] | None,
    seq_lens: Tensor,
    candidates: Candidates,
    kv_heads: int,
    pruning: Pruning,
    mass: Tensor,
    max_tokens: int = MAX_TOKENS,
    dense_below: int = -1,
) -> Tensor:
    """Marks what each query head keeps, [B, T, Hq, slots] uint8, from weights, or from logits and their `stats`; fills `mass`."""
    indices, counts, unit = candidates
    top_p, head_top_p = pruning
    batch, query_tokens, heads, capacity = weights.shape
    keep = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    peaks, sums, chunk = stats if stats is not None else (None, None, 1)
    splits = 1 if peaks is None else peaks.shape[1]
    strides = (0, 0)
    if head_top_p is not None:
        strides = tuple(0 if size == 1 else stride for size, stride in zip(head_top_p.shape, head_top_p.stride(), strict=True))
    rows = batch * query_tokens * heads
    # Tiles of one entry a thread crash Triton 3.6 while it removes layout conversions.
    padded = next_power_of_2(max(capacity, 512))
    large = min(padded, RESIDENT.block)
    launch = RESIDENT if padded > SHORT.block else SHORT
    survivors = torch.empty_like(weights)
    places = torch.empty_like(weights, dtype=torch.int32)
    masses = torch.empty((rows, 2), dtype=torch.int64, device=weights.device)
    cuts = places.new_empty((rows, 2))
    if rows * capacity == 0:
        mass.zero_()
        return keep
    survivors_kernel[(rows,)](
        weights,
        peaks,
        sums,
        seq_lens,
        indices,
        counts,
        head_top_p,
        survivors,
        places,
        masses,
        cuts,
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
        THREADS=32 * launch.num_warps,
        **launch.options,
    )
    threshold_kernel[(rows,)](
        seq_lens,
        survivors,
        places,
        masses,
        cuts,
        keep,
        mass,
        query_tokens * heads,
        max_tokens,
        capacity,
        dense_below,
        BLOCK=BISECT.block,
        THREADS=32 * BISECT.num_warps,
        **BISECT.options,
    )
    return keep


def union(
    keep: Tensor | None,
    mass: Tensor | None,
    query_shape: tuple[int, int, int],
    seq_lens: Tensor,
    candidates: Candidates,
    kv_heads: int,
    capacity: int,
    max_tokens: int,
    limits: Limits,
    observe: Observation,
    dense_below: int = -1,
    fill_dense: bool = False,
    pad: bool = True,
) -> None:
    """Lists and counts what any query head of a group keeps; `keep` None keeps every live candidate. `query_shape` is (B, T, Hq)."""
    indices, counts, unit = candidates
    budget_counters, kept_indices, kept_counts = observe
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
            limits.sink_tokens,
            limits.recent_tokens,
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
    weights: Tensor, seq_lens: Tensor, candidates: Candidates, num_kv_heads: int, pruning: Pruning, always: Always
) -> tuple[Tensor, Tensor, Tensor]:
    kept_indices, kept_counts, mass = outputs(weights, seq_lens, candidates, num_kv_heads, pruning, always)
    keep = thresholds(weights, None, seq_lens, candidates, num_kv_heads, pruning, mass)
    limits = Limits.of(MAX_TOKENS, weights.shape[1], Budget(1), always)
    shape = (seq_lens, candidates, num_kv_heads, weights.shape[3], MAX_TOKENS, limits)
    union(keep, mass, weights.shape[:3], *shape, Observation(None, kept_indices, kept_counts))
    return kept_indices, kept_counts, mass
