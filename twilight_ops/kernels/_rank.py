"""The selectors' choice of candidates: group scores from logits, the bin in which the budget ends, and an ascending list.

`rank` is the one entry. A score is not negative, so the leading bits of its float are a bin; forced items get the highest one. The cut is
found by bisection where a row fits in registers, else from a histogram.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import capacity
from ..arguments import Candidates, PageLevel
from ..capacity import Limits
from ._launch import Launch, cdiv, next_power_of_2
from ._tiles import INF, LOG2E, count_tile, in_order, live_length, rank_in_order, softmax_row, store_compacted

RESIDENT = Launch(8192, 8, 1, "32 bins a thread; the logits are read once")
COUNT = Launch(2048, 8, 1, "8 items a thread and 8 heads in flight")
LIST = Launch(4096, 8, 1, "16 bins a thread, two bytes each; one program a row walks all of them")

SHIFT = tl.constexpr(capacity.SCORE_BIN_SHIFT)
BINS = tl.constexpr(1 << (31 - capacity.SCORE_BIN_SHIFT))
LOWEST = tl.constexpr(capacity.LOWEST_SCORE_BIN)
FORCED = tl.constexpr((1 << (31 - capacity.SCORE_BIN_SHIFT)) - 1)


@triton.jit
def _forced_items(length, page_counts, row, sink_tokens, recent_tokens, PAGE: tl.constexpr, UNIT: tl.constexpr):
    """Live items, the first item behind the sinks, and the first recent one: it reaches beyond token length - recent.

    Of listed pages, where there is a list of them, all items: sinks and recent ones are always in it.
    """
    items = (length + UNIT - 1) // UNIT
    recent = tl.maximum(length - recent_tokens, 0) // UNIT
    if page_counts is not None:
        left_out = ((length + PAGE - 1) // PAGE - tl.load(page_counts + row)) * PAGE
        items -= left_out
        recent -= left_out
    return items, tl.minimum((sink_tokens + UNIT - 1) // UNIT, items), recent


@triton.jit
def _positions(pages, row, item, items, page_capacity, PAGE: tl.constexpr):
    """Positions of the items of listed pages."""
    position = item
    if pages is not None:
        page = tl.load(pages + row.to(tl.int64) * page_capacity + item // PAGE, mask=item < items, other=0)
        position = page * PAGE + item % PAGE
    return position


@triton.jit
def _ceil_share(count, fraction):
    product = count.to(tl.float64) * tl.full([], fraction, tl.float64)
    whole = product.to(tl.int64)
    return whole + tl.where(whole.to(tl.float64) < product, 1, 0)


@triton.jit
def _row_limits(
    seq_lens,
    head_budget,
    page_counts,
    row,
    max_pages,
    token_budget,
    budget_fraction,
    item_fraction,
    least_items,
    sink_tokens,
    recent_tokens,
    capacity,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Length, live items, first item behind the sinks, first recent item, and items to take."""
    length = live_length(seq_lens, row // KV_HEADS, max_pages, PAGE)
    items, sinks, recent = _forced_items(length, page_counts, row, sink_tokens, recent_tokens, PAGE, UNIT)
    if head_budget is None:
        budget = tl.maximum(_ceil_share(length, budget_fraction), token_budget)
    else:
        budget = tl.maximum(tl.load(head_budget + row % KV_HEADS), 0).to(tl.int64)
    forced = tl.minimum(sinks + items - recent, items)
    least = tl.maximum(tl.maximum(_ceil_share(items, item_fraction), least_items), forced.to(tl.int64))
    wanted = tl.maximum((budget + UNIT - 1) // UNIT, least)
    take = tl.minimum(tl.minimum(wanted, items.to(tl.int64)), capacity).to(tl.int32)
    return length, items, sinks, recent, take


@triton.jit
def _head_score(
    logits, peaks, sums, row, r, item, items, stride_logits, used, splits,
    KV_HEADS: tl.constexpr, QUERY_TOKENS: tl.constexpr, GROUP: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """One query row's softmax; loads run to the end of the row's last 16 items. NaN and +inf come first."""
    out_row = ((row // KV_HEADS) * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + (row % KV_HEADS) * GROUP + r % GROUP
    _, safe, scale = softmax_row(peaks, sums, out_row, used, splits, SPLITS_PAD)
    logit = tl.load(logits + out_row.to(tl.int64) * stride_logits + item, mask=item < (items + 15) // 16 * 16, other=0.0)
    return tl.where(logit < INF, tl.exp2((logit - safe) * LOG2E) * scale, INF)


@triton.jit
def _bins(
    logits, peaks, sums, row, item, items, sinks, recent, stride_logits, used, splits,
    KV_HEADS: tl.constexpr, QUERY_TOKENS: tl.constexpr, GROUP: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Bins of the sums over the group of softmaxed logits: -1 for dead items, FORCED for forced ones."""
    score = tl.zeros(item.shape, tl.float32)
    # The loads of a usual group's heads are in flight together.
    # fmt: off
    if QUERY_TOKENS * GROUP <= 8:
        for r in tl.static_range(QUERY_TOKENS * GROUP):
            score += _head_score(logits, peaks, sums, row, r, item, items, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP,
                                 SPLITS_PAD)
    else:
        for r in range(QUERY_TOKENS * GROUP):
            score += _head_score(logits, peaks, sums, row, r, item, items, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP,
                                 SPLITS_PAD)
    # fmt: on
    bin = tl.maximum(score.to(tl.int32, bitcast=True) >> SHIFT, LOWEST)
    bin = tl.where((item < sinks) | (item >= recent), FORCED, bin)
    return tl.where(item < items, bin, -1)


@triton.jit
def _above_cut(bin, cut, before, wanted):
    """Items above the cut's bin and the first `wanted` in it, `before` of which lie in earlier tiles; how many are in it here."""
    here = bin == cut
    rank, count = rank_in_order(here.to(tl.int32))
    return (bin > cut) | (here & (before + rank < wanted)), count


@triton.jit
def _pad_list(indices, row, count, capacity, BLOCK: tl.constexpr):
    for start in range(count, capacity, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(indices + row.to(tl.int64) * capacity + slot, -1, mask=slot < capacity)


@triton.jit
def _choose_tile(
    logits, peaks, sums, pages, indices, row, items, sinks, recent, take, page_capacity, stride_logits, capacity, used, splits,
    KV_HEADS: tl.constexpr, QUERY_TOKENS: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, SPLITS_PAD: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A whole row in registers."""
    item = in_order(TILE // 32)
    bin = _bins(
        logits, peaks, sums, row, item, items, sinks, recent, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP, SPLITS_PAD
    )
    # At least `take` items lie in `cut` or above it, fewer in `beyond` or above.
    cut = 0
    beyond = BINS
    above = 0
    while beyond - cut > 1:
        middle = (cut + beyond) // 2
        count = count_tile((bin >= middle).to(tl.int32))
        if count >= take:
            cut = middle
        else:
            beyond = middle
            above = count
    taken, _ = _above_cut(bin, cut, 0, take - above)
    position = _positions(pages, row, item, items, page_capacity, PAGE)
    store_compacted(indices + row.to(tl.int64) * capacity, position, taken, 0, capacity)


@triton.jit
def choose_resident_kernel(
    logits,  # [B, T, Hq, stride_logits]
    peaks,  # [B * T * Hq, splits]
    sums,
    seq_lens,  # [B]
    head_budget,  # [Hkv] or None
    pages,  # [B, Hkv, page_capacity], whose tokens are the items; None: all
    page_counts,  # [B, Hkv]
    indices,  # [B, Hkv, capacity]
    counts,  # [B, Hkv]
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    item_fraction: tl.float64,
    least_items,
    sink_tokens,
    recent_tokens,
    page_capacity,
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
    """Grid (B * Hkv): one program chooses of one row, in the smaller of two tiles that holds its live items."""
    row = tl.program_id(0)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, page_counts, row, max_pages, token_budget, budget_fraction, item_fraction, least_items, sink_tokens,
        recent_tokens, capacity, KV_HEADS, PAGE, UNIT,
    )  # fmt: skip
    if length <= dense_below:
        items = 0
        take = 0
    used = (items + CHUNK - 1) // CHUNK
    # fmt: off
    if items <= SMALL:
        _choose_tile(logits, peaks, sums, pages, indices, row, items, sinks, recent, take, page_capacity, stride_logits, capacity, used,
                     splits, KV_HEADS, QUERY_TOKENS, GROUP, PAGE, SPLITS_PAD, SMALL)
    elif LARGE > SMALL:
        _choose_tile(logits, peaks, sums, pages, indices, row, items, sinks, recent, take, page_capacity, stride_logits, capacity, used,
                     splits, KV_HEADS, QUERY_TOKENS, GROUP, PAGE, SPLITS_PAD, LARGE)
    # fmt: on
    tl.store(counts + row, take)
    if PAD:
        _pad_list(indices, row, take, capacity, 1024)


@triton.jit
def count_bins_kernel(
    logits,  # [B, T, Hq, stride_logits]
    peaks,  # [B * T * Hq, splits]
    sums,
    seq_lens,  # [B]
    page_counts,  # [B, Hkv] or None
    bins,  # [B * Hkv, stride_logits] int16
    histogram,  # [B * Hkv, BINS] int32, zeros
    max_pages,
    sink_tokens,
    recent_tokens,
    stride_logits,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, cdiv(items, BLOCK)): program (row, block) writes the bins of its items and adds them to the row's histogram."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    length = live_length(seq_lens, row // KV_HEADS, max_pages, PAGE)
    items, sinks, recent = _forced_items(length, page_counts, row, sink_tokens, recent_tokens, PAGE, UNIT)
    if (first >= items) | (length <= dense_below):
        return
    item = first + tl.arange(0, BLOCK)
    used = (items + CHUNK - 1) // CHUNK
    bin = _bins(
        logits, peaks, sums, row, item, items, sinks, recent, stride_logits, used, splits, KV_HEADS, QUERY_TOKENS, GROUP, SPLITS_PAD
    )
    tl.store(bins + row.to(tl.int64) * stride_logits + item, bin.to(tl.int16), mask=item < items)
    counts = tl.histogram(bin, BINS, mask=item < items)
    tl.atomic_add(histogram + row * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")


@triton.jit
def list_bins_kernel(
    seq_lens,
    head_budget,  # [Hkv] or None
    pages,
    page_counts,
    bins,
    histogram,
    indices,  # [B, Hkv, capacity]
    counts,  # [B, Hkv]
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    item_fraction: tl.float64,
    least_items,
    sink_tokens,
    recent_tokens,
    page_capacity,
    stride_logits,
    capacity,
    dense_below,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):
    """Grid (B * Hkv): one program finds the bin in which the row's budget ends, and lists the items above it and the first in it."""
    row = tl.program_id(0)
    length, items, sinks, recent, take = _row_limits(
        seq_lens, head_budget, page_counts, row, max_pages, token_budget, budget_fraction, item_fraction, least_items, sink_tokens,
        recent_tokens, capacity, KV_HEADS, PAGE, UNIT,
    )  # fmt: skip
    if length <= dense_below:
        items = 0
        take = 0
    every = tl.arange(0, BINS)
    in_bin = tl.load(histogram + row * BINS + every)
    through = items - tl.cumsum(in_bin, 0) + in_bin
    cut = tl.max(tl.where(through >= take, every, 0), 0)
    wanted = take - tl.sum(tl.where(every > cut, in_bin, 0), 0)
    done = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int32)
    for start in range(0, items, BLOCK):
        item = start + in_order(BLOCK // 32)
        bin = tl.load(bins + row.to(tl.int64) * stride_logits + item, mask=item < items, other=-1).to(tl.int32)
        taken, here = _above_cut(bin, cut, before, wanted)
        position = _positions(pages, row, item, items, page_capacity, PAGE)
        done += store_compacted(indices + row.to(tl.int64) * capacity, position, taken, done, capacity)
        before += here
    tl.store(counts + row, take)
    if PAD:
        _pad_list(indices, row, take, capacity, 1024)


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
    level: PageLevel | None = None,
    pages: Candidates = Candidates(),
) -> None:
    """Writes the chosen items of every row, ascending, into `indices` and `counts`; `pad` fills the rest with -1.

    With a `level` items are pages, and at least its pages are chosen. With `pages` the items are the tokens of these.
    """
    batch, query_tokens, heads, stride = logits.shape
    _, kv_heads, capacity = indices.shape
    rows, splits = batch * kv_heads, peaks.shape[1]
    if rows == 0:
        return
    page_capacity = 0 if pages.indices is None else pages.indices.shape[2]
    listed = (pages.indices, pages.counts)
    least = (0.0, 0) if level is None else (level.page_fraction, -(-level.min_scored_tokens // page_size))
    forced = (limits.sink_tokens, limits.recent_tokens)
    budget = (max_pages, limits.token_budget, limits.budget_fraction, *least, *forced, page_capacity, stride)
    shape = {"KV_HEADS": kv_heads, "QUERY_TOKENS": query_tokens, "GROUP": heads // kv_heads, "PAGE": page_size, "UNIT": unit}
    scores = {"CHUNK": chunk, "SPLITS_PAD": next_power_of_2(splits)}
    if num_items <= RESIDENT.block:
        large = max(next_power_of_2(num_items), 64)
        choose_resident_kernel[(rows,)](
            logits,
            peaks,
            sums,
            seq_lens,
            head_budget,
            *listed,
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
    bins = torch.empty((rows, stride), dtype=torch.int16, device=logits.device)
    histogram = torch.zeros((rows, BINS.value), dtype=torch.int32, device=logits.device)
    count_bins_kernel[(rows, cdiv(num_items, COUNT.block))](
        logits,
        peaks,
        sums,
        seq_lens,
        pages.counts,
        bins,
        histogram,
        max_pages,
        *forced,
        stride,
        splits,
        dense_below,
        **shape,
        **scores,
        BLOCK=COUNT.block,
        **COUNT.options,
    )
    list_bins_kernel[(rows,)](
        seq_lens,
        head_budget,
        *listed,
        bins,
        histogram,
        indices,
        counts,
        *budget,
        capacity,
        dense_below,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        UNIT=unit,
        BLOCK=LIST.block,
        PAD=pad,
        **LIST.options,
    )
