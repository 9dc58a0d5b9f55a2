"""The selectors' ranking: group scores from logits, an exact top-k, and an ascending list.

`rank` is the one entry. A score is not negative, so its float bits order like integers; forced items get the largest key, and the k-th
largest key is found by bisection on the bits: of rows that fit in registers, or of what a bound from a sample leaves over of longer ones.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..capacity import Limits
from ._launch import Launch, cdiv, next_power_of_2, padded_row
from ._tiles import INF, LOG2E, count_tile, in_order, live_length, rank_in_order, softmax_row, store_compacted

RESIDENT = Launch(8192, 8, 1, "32 keys a thread; the logits are read once")
BOUND = Launch(4096, 8, 1, "16 sampled keys a thread")
FILTER = Launch(2048, 8, 1, "8 items a thread and 4 heads in flight")
LIST = Launch(2048, 8, 1, "a probe walks a few thousand keys that stay in L1; four programs a multiprocessor hold 512 rows at once", 64)
SAMPLE_RUN = 8  # neighbours, one sector of 32 bytes of logits; what they tell may be no more than one item would
SAMPLE_MARGIN = 4.0  # standard deviations of the sampled rank

FORCED = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _forced_items(length, sink_tokens, recent_tokens, UNIT: tl.constexpr):
    """Live items, the first item behind the sinks, and the first recent one: it reaches beyond token length - recent."""
    items = (length + UNIT - 1) // UNIT
    return items, tl.minimum((sink_tokens + UNIT - 1) // UNIT, items), tl.maximum(length - recent_tokens, 0) // UNIT


@triton.jit
def _row_limits(
    seq_lens,
    head_budget,
    row,
    max_pages,
    token_budget,
    budget_fraction,
    sink_tokens,
    recent_tokens,
    capacity,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Length, live items, first item behind the sinks, first recent item, and items to take."""
    length = live_length(seq_lens, row // KV_HEADS, max_pages, PAGE)
    items, sinks, recent = _forced_items(length, sink_tokens, recent_tokens, UNIT)
    if head_budget is None:
        product = length.to(tl.float64) * tl.full([], budget_fraction, tl.float64)
        whole = product.to(tl.int64)
        whole += tl.where(whole.to(tl.float64) < product, 1, 0)
        budget = tl.maximum(whole, token_budget)
    else:
        budget = tl.maximum(tl.load(head_budget + row % KV_HEADS), 0).to(tl.int64)
    forced = tl.minimum(sinks + items - recent, items)
    wanted = tl.maximum((budget + UNIT - 1) // UNIT, forced.to(tl.int64))
    take = tl.minimum(tl.minimum(wanted, items.to(tl.int64)), capacity).to(tl.int32)
    return length, items, sinks, recent, take


@triton.jit
def _keys(
    logits,
    peaks,
    sums,
    row,
    item,
    items,
    sinks,
    recent,
    stride_logits,
    used,
    splits,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Sum over the group of softmaxed logits, as ordered integers: -1 for dead items, FORCED for forced ones."""
    live = item < items
    score = tl.zeros(item.shape, tl.float32)
    for r in range(QUERY_TOKENS * GROUP):
        out_row = ((row // KV_HEADS) * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + (row % KV_HEADS) * GROUP + r % GROUP
        _, safe, scale = softmax_row(peaks, sums, out_row, used, splits, SPLITS_PAD)
        logit = tl.load(logits + out_row.to(tl.int64) * stride_logits + item, mask=live, other=0.0)
        broken = (logit != logit) | (logit == INF)
        score += tl.where(broken, INF, tl.exp2((logit - safe) * LOG2E) * scale)
    key = score.to(tl.int32, bitcast=True)
    key = tl.where((item < sinks) | (item >= recent), FORCED, key)
    return tl.where(live, key, -1)


@triton.jit
def _cut_ties(key, cut, before, ties):
    """Keys above the cut, and the first `ties` equal to it, `before` of which lie in earlier tiles."""
    tie = key == cut
    rank, _ = rank_in_order(tie.to(tl.int32))
    return (key > cut) | (tie & (before + rank < ties))


@triton.jit
def _pad_list(indices, row, count, capacity, BLOCK: tl.constexpr):
    for start in range(count, capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(indices + row.to(tl.int64) * capacity + slot, -1, mask=slot < capacity)


@triton.jit
def _rank_tile(
    logits,
    peaks,
    sums,
    indices,
    row,
    items,
    sinks,
    recent,
    take,
    stride_logits,
    capacity,
    used,
    splits,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """A whole row in registers."""
    item = in_order(TILE // 32)
    key = _keys(
        logits, peaks, sums, row, item, items, sinks, recent, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP, SPLITS_PAD
    )
    # At least `take` keys are >= low, fewer are >= high.
    low = 0
    at_low = items
    high = FORCED
    top = count_tile((key == FORCED).to(tl.int32))
    if top >= take:
        low = FORCED
        at_low = top
    while (high - low > 1) & (at_low > take):
        middle = low + (high - low) // 2
        count = count_tile((key >= middle).to(tl.int32))
        if count >= take:
            low = middle
            at_low = count
        else:
            high = middle
    taken = key >= low
    if at_low > take:
        taken = _cut_ties(key, low, 0, take - count_tile((key > low).to(tl.int32)))
    store_compacted(indices + row.to(tl.int64) * capacity, item, taken, 0, capacity)


@triton.jit
def rank_resident_kernel(
    logits,  # [B, T, Hq, stride_logits]
    peaks,  # [B * T * Hq, splits]
    sums,
    seq_lens,  # [B]
    head_budget,  # [Hkv] or None
    indices,  # [B, Hkv, capacity]
    counts,  # [B, Hkv]
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    stride_logits,
    capacity,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SMALL: tl.constexpr,
    LARGE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Grid (B * Hkv): one program ranks one row, in the smaller of two tiles that holds its live items."""
    row = tl.program_id(0)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, row, max_pages, token_budget, budget_fraction, sink_tokens, recent_tokens, capacity, KV_HEADS, PAGE, UNIT
    )
    if length <= dense_below:
        items = 0
        take = 0
    used = (items + CHUNK - 1) // CHUNK
    # fmt: off
    if items <= SMALL:
        _rank_tile(logits, peaks, sums, indices, row, items, sinks, recent, take, stride_logits, capacity, used, splits, KV_HEADS,
                   QUERY_TOKENS, GROUP, SPLITS_PAD, SMALL)
    elif LARGE > SMALL:
        _rank_tile(logits, peaks, sums, indices, row, items, sinks, recent, take, stride_logits, capacity, used, splits, KV_HEADS,
                   QUERY_TOKENS, GROUP, SPLITS_PAD, LARGE)
    # fmt: on
    tl.store(counts + row, take)
    if PAD:
        _pad_list(indices, row, take, capacity, 1024)


@triton.jit
def _head_scores(
    logits, row_stats, row, r, item, items, stride_logits, KV_HEADS: tl.constexpr, QUERY_TOKENS: tl.constexpr, GROUP: tl.constexpr
):
    """One query row's softmax from its stored (reference, scale); loads run to the end of the row's last 16 items."""
    out_row = ((row // KV_HEADS) * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + (row % KV_HEADS) * GROUP + r % GROUP
    safe = tl.load(row_stats + out_row * 2)
    scale = tl.load(row_stats + out_row * 2 + 1)
    logit = tl.load(logits + out_row.to(tl.int64) * stride_logits + item, mask=item < (items + 15) // 16 * 16, other=0.0)
    # NaN and +inf come first.
    return tl.where(logit < INF, tl.exp2((logit - safe) * LOG2E) * scale, INF)


@triton.jit
def _group_keys(
    logits,
    row_stats,
    row,
    item,
    items,
    sinks,
    recent,
    stride_logits,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`_keys` from stored statistics; the loads of a usual group's heads are in flight together."""
    score = tl.zeros(item.shape, tl.float32)
    if QUERY_TOKENS * GROUP <= 8:
        for r in tl.static_range(QUERY_TOKENS * GROUP):
            score += _head_scores(logits, row_stats, row, r, item, items, stride_logits, KV_HEADS, QUERY_TOKENS, GROUP)
    else:
        for r in range(QUERY_TOKENS * GROUP):
            score += _head_scores(logits, row_stats, row, r, item, items, stride_logits, KV_HEADS, QUERY_TOKENS, GROUP)
    key = score.to(tl.int32, bitcast=True)
    key = tl.where((item < sinks) | (item >= recent), FORCED, key)
    return tl.where(item < items, key, -1)


@triton.jit
def rank_bound_kernel(
    logits,  # [B, T, Hq, stride_logits]
    peaks,  # [B * T * Hq, splits]
    sums,
    seq_lens,  # [B]
    head_budget,  # [Hkv] or None
    row_stats,  # [B * T * Hq, 2] fp32
    bounds,  # [B * Hkv] int32
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    stride_logits,
    capacity,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    RUN: tl.constexpr,
    MARGIN: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """Grid (B * Hkv): the softmax statistics of a row's heads, and from a sample a key that the k-th largest is hardly below."""
    row = tl.program_id(0)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, row, max_pages, token_budget, budget_fraction, sink_tokens, recent_tokens, capacity, KV_HEADS, PAGE, UNIT
    )
    if length <= dense_below:
        return
    used = (items + CHUNK - 1) // CHUNK
    for r in range(QUERY_TOKENS * GROUP):
        out_row = ((row // KV_HEADS) * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + (row % KV_HEADS) * GROUP + r % GROUP
        _, safe, scale = softmax_row(peaks, sums, out_row, used, splits, SPLITS_PAD)
        tl.store(row_stats + out_row * 2, safe)
        tl.store(row_stats + out_row * 2 + 1, scale)
    bound = 0
    if items > 2 * SAMPLE:
        tl.debug_barrier()
        # Runs spread evenly over the row, each on a sector of its own.
        runs: tl.constexpr = SAMPLE // RUN
        local = tl.arange(0, SAMPLE)
        run = ((local // RUN).to(tl.int64) * (items // RUN) // runs).to(tl.int32)
        item = run * RUN + local % RUN
        key = _group_keys(logits, row_stats, row, item, items, sinks, recent, stride_logits, KV_HEADS, QUERY_TOKENS, GROUP)
        share = take.to(tl.float32) / items
        wanted = (share + MARGIN * tl.sqrt_rn(share * (1.0 - share) / runs)) * SAMPLE
        wanted = tl.minimum(wanted.to(tl.int32) + RUN, SAMPLE)
        high = FORCED
        # 1% of a score is as good as exact.
        while high - bound > 65536:
            middle = bound + (high - bound) // 2
            if tl.sum((key >= middle).to(tl.int32), 0) >= wanted:
                bound = middle
            else:
                high = middle
    tl.store(bounds + row, bound)


@triton.jit
def rank_filter_kernel(
    logits,
    seq_lens,
    row_stats,
    bounds,
    keys,  # [B * Hkv, stride_logits] int32
    places,  # [B * Hkv, stride_logits] int32
    chunk_counts,  # [B * Hkv, chunks] int32
    max_pages,
    sink_tokens,
    recent_tokens,
    stride_logits,
    chunks,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, chunks): program (row, chunk) lists, from where its chunk begins, keys that reach the bound and their items."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    length = live_length(seq_lens, row // KV_HEADS, max_pages, PAGE)
    items, sinks, recent = _forced_items(length, sink_tokens, recent_tokens, UNIT)
    if (chunk * BLOCK >= items) | (length <= dense_below):
        return
    bound = tl.load(bounds + row)
    item = chunk * BLOCK + in_order(BLOCK // 32)
    key = _group_keys(logits, row_stats, row, item, items, sinks, recent, stride_logits, KV_HEADS, QUERY_TOKENS, GROUP)
    taken = key >= bound
    rank, count = rank_in_order(taken.to(tl.int32))
    at = row.to(tl.int64) * stride_logits + chunk * BLOCK + rank
    tl.store(keys + at, key, mask=taken)
    tl.store(places + at, item, mask=taken)
    tl.store(chunk_counts + row * chunks + chunk, count)


@triton.jit
def _count_list(keys, count, least, BLOCK: tl.constexpr):
    """How many of the first `count` keys are at least `least`."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        # To the end of the last 16, in full vectors.
        key = tl.load(keys + entry, mask=entry < (count + 15) // 16 * 16, other=-1)
        found += ((key >= least) & (entry < count)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def rank_list_kernel(
    logits,
    seq_lens,
    head_budget,
    row_stats,
    bounds,
    keys,
    places,
    chunk_counts,
    list_keys,  # [B * Hkv, room] int32 scratch
    list_places,  # [B * Hkv, room] int32 scratch
    indices,  # [B, Hkv, capacity]
    counts,  # [B, Hkv]
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    stride_logits,
    capacity,
    chunks,
    room,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):
    """Grid (B * Hkv): one program joins what the chunks of a row listed, finds the k-th largest key, and lists the items from it on.

    The bound was a guess. Where fewer than k keys reach it, or more than there is room for, the list is the whole row.
    """
    row = tl.program_id(0)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, row, max_pages, token_budget, budget_fraction, sink_tokens, recent_tokens, capacity, KV_HEADS, PAGE, UNIT
    )
    if length <= dense_below:
        items = 0
        take = 0
    chunk = tl.arange(0, CHUNKS_PAD)
    listed = tl.load(chunk_counts + row * chunks + chunk, mask=chunk * CHUNK_BLOCK < items, other=0)
    count = tl.sum(listed, 0)
    base = row.to(tl.int64) * stride_logits
    joined = (count >= take) & (count <= room)
    if joined:
        begin = tl.cumsum(listed, 0) - listed
        width: tl.constexpr = max(BLOCK // CHUNKS_PAD, 32)
        for start in range(0, tl.max(listed, 0), width):
            entry = start + tl.arange(0, width)[None, :]
            holds = entry < listed[:, None]
            source = base + chunk[:, None] * CHUNK_BLOCK + entry
            target = row.to(tl.int64) * room + begin[:, None] + entry
            tl.store(list_keys + target, tl.load(keys + source, mask=holds, other=0), mask=holds)
            tl.store(list_places + target, tl.load(places + source, mask=holds, other=0), mask=holds)
        keys = list_keys + row.to(tl.int64) * room
        places = list_places + row.to(tl.int64) * room
    else:
        count = items
        for start in range(0, items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            key = _group_keys(logits, row_stats, row, item, items, sinks, recent, stride_logits, KV_HEADS, QUERY_TOKENS, GROUP)
            tl.store(keys + base + item, key, mask=item < items)
            tl.store(places + base + item, item, mask=item < items)
        keys = keys + base
        places = places + base
    tl.debug_barrier()

    # At least `take` keys are >= low, fewer are >= high.
    low = 0
    if joined:
        low = tl.load(bounds + row)
    at_low = count
    high = FORCED
    top = _count_list(keys, count, FORCED, BLOCK)
    if top >= take:
        low = FORCED
        at_low = top
    while (high - low > 1) & (at_low > take):
        middle = low + (high - low) // 2
        reached = _count_list(keys, count, middle, BLOCK)
        if reached >= take:
            low = middle
            at_low = reached
        else:
            high = middle
    ties = take
    if (at_low > take) & (low < FORCED):
        ties = take - _count_list(keys, count, low + 1, BLOCK)
    equal = tl.zeros([], tl.int32)
    done = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        entry = start + in_order(BLOCK // 32)
        key = tl.load(keys + entry, mask=entry < count, other=-1)
        tie = key == low
        tie_rank, tie_count = rank_in_order(tie.to(tl.int32))
        taken = (key > low) | (tie & (equal + tie_rank < ties))
        place = tl.load(places + entry, mask=taken, other=0)
        done += store_compacted(indices + row.to(tl.int64) * capacity, place, taken, done, capacity)
        equal += tie_count
    tl.store(counts + row, take)
    if PAD:
        _pad_list(indices, row, take, capacity, 1024)


def _list_room(num_items: int, capacity: int) -> int:
    """Keys that a bound may leave over before the whole row is ranked instead: a deviation more than the bound's own margin."""
    share = min(capacity / num_items, 1.0)
    deviation = math.sqrt(share * (1.0 - share) * SAMPLE_RUN / BOUND.block)
    return min(padded_row(num_items), padded_row(int(num_items * (share + (SAMPLE_MARGIN + 3.0) * deviation)) + BOUND.block))


def rank(
    logits: Tensor,  # [B, T, Hq, padded_row(num_items)] fp32
    peaks: Tensor,  # [B * T * Hq, splits] fp32
    sums: Tensor,
    chunk: int,  # items a split
    num_items: int,
    seq_lens: Tensor,
    head_budget: Tensor | None,
    indices: Tensor,
    counts: Tensor,
    max_pages: int,
    page_size: int,
    unit: int,
    limits: Limits,
    dense_below: int,
    pad: bool,
) -> None:
    """Writes the best items of every row, ascending, into `indices` and `counts`; `pad` fills the rest with -1."""
    batch, query_tokens, heads, stride = logits.shape
    _, kv_heads, capacity = indices.shape
    rows, splits = batch * kv_heads, peaks.shape[1]
    if rows == 0:
        return
    budget = (max_pages, limits.token_budget, limits.budget_fraction, limits.sink_tokens, limits.recent_tokens, stride)
    shape = {"KV_HEADS": kv_heads, "QUERY_TOKENS": query_tokens, "GROUP": heads // kv_heads, "PAGE": page_size, "UNIT": unit}
    scores = {"CHUNK": chunk, "SPLITS_PAD": next_power_of_2(splits)}
    if num_items <= RESIDENT.block:
        large = max(next_power_of_2(num_items), 64)
        rank_resident_kernel[(rows,)](
            logits,
            peaks,
            sums,
            seq_lens,
            head_budget,
            indices,
            counts,
            *budget,
            capacity,
            splits,
            dense_below,
            **shape,
            **scores,
            SMALL=min(2048, large),
            LARGE=large,
            PAD=pad,
            num_warps=max(4, min(RESIDENT.num_warps, large // 1024)),
            num_stages=RESIDENT.num_stages,
        )
        return
    chunks, room = cdiv(num_items, FILTER.block), _list_room(num_items, capacity)
    row_stats = torch.empty((batch * query_tokens * heads, 2), dtype=torch.float32, device=logits.device)
    bounds = torch.empty(rows, dtype=torch.int32, device=logits.device)
    keys = bounds.new_empty((rows, stride))
    places = torch.empty_like(keys)
    chunk_counts = bounds.new_empty((rows, chunks))
    list_keys = bounds.new_empty((rows, room))
    rank_bound_kernel[(rows,)](
        logits,
        peaks,
        sums,
        seq_lens,
        head_budget,
        row_stats,
        bounds,
        *budget,
        capacity,
        splits,
        dense_below,
        **shape,
        **scores,
        RUN=SAMPLE_RUN,
        MARGIN=SAMPLE_MARGIN,
        SAMPLE=BOUND.block,
        **BOUND.options,
    )
    rank_filter_kernel[(rows, chunks)](
        logits,
        seq_lens,
        row_stats,
        bounds,
        keys,
        places,
        chunk_counts,
        max_pages,
        *budget[3:],
        chunks,
        dense_below,
        **shape,
        BLOCK=FILTER.block,
        **FILTER.options,
    )
    rank_list_kernel[(rows,)](
        logits,
        seq_lens,
        head_budget,
        row_stats,
        bounds,
        keys,
        places,
        chunk_counts,
        list_keys,
        torch.empty_like(list_keys),
        indices,
        counts,
        *budget,
        capacity,
        chunks,
        room,
        dense_below,
        **shape,
        CHUNKS_PAD=next_power_of_2(chunks),
        CHUNK_BLOCK=FILTER.block,
        BLOCK=LIST.block,
        PAD=pad,
        **LIST.options,
    )
