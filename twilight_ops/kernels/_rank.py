"""The selectors' ranking: group scores from logits, an exact top-k, and an ascending list.

`rank` is the one entry. A score is not negative, so its float bits order like integers; forced items get the largest key, and the k-th
largest key is found by bisection on the bits (rows that fit in registers) or digit by digit with histograms (longer rows).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, cdiv, next_power_of_2
from ._tiles import INF, LOG2E, count_tile, in_order, live_length, rank_in_order, softmax_row, store_compacted

RESIDENT = Launch(32768, 32, 1, "32 keys a thread is the most that 64 registers hold; the logits are read once")
WIDE = Launch(4096, 8, 1, "longer rows: 4096 keys a program, a 256-bin histogram a digit, four passes from L2")

DIGITS = tl.constexpr(4)
DIGIT_BITS = tl.constexpr(8)
BINS = tl.constexpr(256)
FORCED = tl.constexpr(0x7FFFFFFF)


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
    items = (length + UNIT - 1) // UNIT
    sinks = tl.minimum((sink_tokens + UNIT - 1) // UNIT, items)
    # The first item that reaches beyond token length - recent.
    recent = tl.maximum(length - recent_tokens, 0) // UNIT
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
    MIDDLE: tl.constexpr,
    LARGE: tl.constexpr,
    PAD: tl.constexpr,
):
    """Grid (B * Hkv): one program ranks one row, in the smallest of three tiles that holds its live items."""
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
    elif MIDDLE > SMALL and items <= MIDDLE:
        _rank_tile(logits, peaks, sums, indices, row, items, sinks, recent, take, stride_logits, capacity, used, splits, KV_HEADS,
                   QUERY_TOKENS, GROUP, SPLITS_PAD, MIDDLE)
    elif LARGE > MIDDLE:
        _rank_tile(logits, peaks, sums, indices, row, items, sinks, recent, take, stride_logits, capacity, used, splits, KV_HEADS,
                   QUERY_TOKENS, GROUP, SPLITS_PAD, LARGE)
    # fmt: on
    tl.store(counts + row, take)
    if PAD:
        _pad_list(indices, row, take, capacity, 1024)


@triton.jit
def _digit_cut(histogram, row, digit, remaining):
    """The bin of a digit that holds the remaining-th largest key, and what remains inside it."""
    bin_ = tl.arange(0, BINS)
    count = tl.load(histogram + (row.to(tl.int64) * DIGITS + digit) * BINS + bin_)
    from_here = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys in this bin or above
    cut = tl.max(tl.where(from_here >= remaining, bin_, 0), 0)
    above = tl.sum(tl.where(bin_ > cut, count, 0), 0)
    return cut, remaining - above


@triton.jit
def _key_digit(key, DIGIT: tl.constexpr):
    """31-bit keys split 7, 8, 8, 8."""
    return (key >> ((DIGITS - 1 - DIGIT) * DIGIT_BITS)) & (BINS - 1)


@triton.jit
def rank_digit_kernel(
    logits,
    peaks,
    sums,
    seq_lens,
    head_budget,
    keys,  # [B * Hkv, stride_logits] int32
    histogram,  # [B * Hkv, DIGITS, BINS] int32, zeros at first
    state,  # [B * Hkv, DIGITS + 1, 2] int32: key prefix above a digit, and what remains to take below it
    chunk_counts,  # [B * Hkv, chunks, 2] int32: keys above the cut, keys equal to it
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    stride_logits,
    capacity,
    splits,
    chunks,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, chunks), launched for DIGIT 0 .. DIGITS: the first launch makes keys, the last counts what each chunk will list."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, row, max_pages, token_budget, budget_fraction, sink_tokens, recent_tokens, capacity, KV_HEADS, PAGE, UNIT
    )
    if (chunk * BLOCK >= items) | (length <= dense_below):
        return
    item = chunk * BLOCK + tl.arange(0, BLOCK)
    at = keys + row.to(tl.int64) * stride_logits + item
    if DIGIT == 0:
        used = (items + CHUNK - 1) // CHUNK
        key = _keys(
            logits, peaks, sums, row, item, items, sinks, recent, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP, SPLITS_PAD
        )
        tl.store(at, key, mask=item < items)
        prefix = 0
        remaining = take
    else:
        key = tl.load(at, mask=item < items, other=-1)
        before = state + (row.to(tl.int64) * (DIGITS + 1) + DIGIT - 1) * 2
        cut, remaining = _digit_cut(histogram, row, DIGIT - 1, tl.load(before + 1))
        prefix = (tl.load(before) << DIGIT_BITS) | cut
    if chunk == 0:
        now = state + (row.to(tl.int64) * (DIGITS + 1) + DIGIT) * 2
        tl.store(now, prefix)
        tl.store(now + 1, remaining)
    if DIGIT < DIGITS:
        # A dead key is negative, so its shifted prefix never matches.
        member = (item < items) & ((key >> ((DIGITS - DIGIT) * DIGIT_BITS % 32)) == prefix) if DIGIT > 0 else item < items
        count = tl.histogram(_key_digit(key, DIGIT), BINS, mask=member)
        bin_ = tl.arange(0, BINS)
        tl.atomic_add(histogram + (row.to(tl.int64) * DIGITS + DIGIT) * BINS + bin_, count, mask=count > 0, sem="relaxed")
    else:
        out = chunk_counts + (row.to(tl.int64) * chunks + chunk) * 2
        tl.store(out, tl.sum((key > prefix).to(tl.int32), 0))
        tl.store(out + 1, tl.sum((key == prefix).to(tl.int32), 0))


@triton.jit
def rank_emit_kernel(
    seq_lens,
    head_budget,
    keys,
    state,
    chunk_counts,
    indices,
    counts,
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    stride_logits,
    capacity,
    chunks,
    dense_below,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):
    """Grid (B * Hkv, chunks): program (row, chunk) lists the taken items of one chunk behind those of the chunks before it."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    length, items, _, _, take = _row_limits(
        seq_lens, head_budget, row, max_pages, token_budget, budget_fraction, sink_tokens, recent_tokens, capacity, KV_HEADS, PAGE, UNIT
    )
    if length <= dense_below:
        items = 0
        take = 0
    if chunk == 0:
        tl.store(counts + row, take)
    if PAD:
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        tl.store(indices + row.to(tl.int64) * capacity + slot, -1, mask=(slot >= take) & (slot < capacity))
    if chunk * BLOCK >= items:
        return
    other = tl.arange(0, CHUNKS_PAD)
    at = chunk_counts + (row.to(tl.int64) * chunks + other) * 2
    above = tl.sum(tl.load(at, mask=other < chunk, other=0), 0)
    equal = tl.sum(tl.load(at + 1, mask=other < chunk, other=0), 0)
    now = state + (row.to(tl.int64) * (DIGITS + 1) + DIGITS) * 2
    cut = tl.load(now)
    ties = tl.load(now + 1)
    item = chunk * BLOCK + in_order(BLOCK // 32)
    key = tl.load(keys + row.to(tl.int64) * stride_logits + item, mask=item < items, other=-1)
    taken = _cut_ties(key, cut, equal, ties)
    store_compacted(indices + row.to(tl.int64) * capacity, item, taken, above + tl.minimum(equal, ties), capacity)


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
    token_budget: int,
    budget_fraction: float,
    sink_tokens: int,
    recent_tokens: int,
    dense_below: int,
    pad: bool,
) -> None:
    """Writes the best items of every row, ascending, into `indices` and `counts`; `pad` fills the rest with -1."""
    batch, query_tokens, heads, stride = logits.shape
    _, kv_heads, capacity = indices.shape
    rows, splits = batch * kv_heads, peaks.shape[1]
    if rows == 0:
        return
    recent = max(recent_tokens, query_tokens)
    # No budget reaches further than the list, so both fit 32 bits.
    budget = (max_pages, min(token_budget, 2**30), budget_fraction, min(sink_tokens, 2**30), min(recent, 2**30), stride)
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
            MIDDLE=min(8192, large),
            LARGE=large,
            PAD=pad,
            num_warps=max(4, min(RESIDENT.num_warps, large // 1024)),
            num_stages=RESIDENT.num_stages,
        )
        return
    chunks = cdiv(num_items, WIDE.block)
    keys = torch.empty((rows, stride), dtype=torch.int32, device=logits.device)
    histogram = torch.zeros((rows, DIGITS.value, BINS.value), dtype=torch.int32, device=logits.device)
    state = torch.empty((rows, DIGITS.value + 1, 2), dtype=torch.int32, device=logits.device)
    chunk_counts = torch.empty((rows, chunks, 2), dtype=torch.int32, device=logits.device)
    options = {**WIDE.options, "BLOCK": WIDE.block}
    for digit in range(DIGITS.value + 1):
        rank_digit_kernel[(rows, chunks)](
            logits,
            peaks,
            sums,
            seq_lens,
            head_budget,
            keys,
            histogram,
            state,
            chunk_counts,
            *budget,
            capacity,
            splits,
            chunks,
            dense_below,
            **shape,
            **scores,
            DIGIT=digit,
            **options,
        )
    rank_emit_kernel[(rows, chunks)](
        seq_lens,
        head_budget,
        keys,
        state,
        chunk_counts,
        indices,
        counts,
        *budget,
        capacity,
        chunks,
        dense_below,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        UNIT=unit,
        CHUNKS_PAD=next_power_of_2(chunks),
        PAD=pad,
        **options,
    )
