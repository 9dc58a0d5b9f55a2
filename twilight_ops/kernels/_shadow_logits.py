"""Logits of the 4-bit K shadow: under `select_tokens` (leading channels of every token) and `estimate_weights` (whole rows of a list)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Candidates, Paging, Shadow
from ._launch import Launch, cdiv, chunk_size, next_power_of_2, page_strides, query_rows
from ._tiles import (
    DEAD,
    INF,
    LOG2E,
    LOWEST,
    code_scales,
    listed_slots,
    live_length,
    nibble_order,
    power_of_two,
    rounded_to_level,
    row_word,
    scale_and_zero,
    slot_tokens,
    soft_capped,
    softmax_finish,
    softmax_step,
    unpack_nibbles,
)


@triton.jit
def _tokens_at(
    indices,
    page_table,
    row,
    batch,
    slot,
    last,
    length,
    num_pages,
    max_pages,
    capacity,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Positions that slots stand for, -1 where nothing is live, and their physical pages."""
    token = slot_tokens(indices, row, slot, slot < last, capacity, UNIT, LISTED)
    token = tl.where(token < length, token, -1)
    page = tl.load(page_table + batch.to(tl.int64) * max_pages + token // PAGE, mask=token >= 0, other=0)
    return token, tl.minimum(tl.maximum(page, 0), num_pages - 1)


@triton.jit
def _pages_of_chunk(
    indices,
    page_table,
    row,
    batch,
    first,
    last,
    length,
    num_pages,
    max_pages,
    capacity,
    PAGE: tl.constexpr,
    LISTED: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Logical pages that begin at slot `first`, -1 where nothing is live, and their physical pages."""
    entry = first // PAGE + tl.arange(0, ENTRIES)
    logical = entry
    if LISTED:
        logical = tl.load(indices + row.to(tl.int64) * (capacity // PAGE) + entry, mask=entry * PAGE < last, other=-1)
    logical = tl.where((entry * PAGE < last) & (logical < (length + PAGE - 1) // PAGE), logical, -1)
    page = tl.load(page_table + batch.to(tl.int64) * max_pages + logical, mask=logical >= 0, other=0)
    return logical, tl.minimum(tl.maximum(page, 0), num_pages - 1)


@triton.jit
def _range_logits(
    q,  # [B, T, Hq, D]
    k_quant,  # [P, S * D / 2] of the head
    k_scale,  # [P, S] of the head, int32: scale and zero, bf16 each
    channel_order,  # [Hkv, D]
    k_center,  # [Hkv, D] or None: of logits that are capped
    page_table,  # [B, M]
    indices,  # [B, Hkv, capacity / UNIT]
    logits,  # [B, T, Hq, capacity]
    peaks,  # [B * T * Hq, splits]
    sums,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_sp,
    sm_scale,
    softcap,
    num_pages,
    max_pages,
    capacity,
    splits,
    length,
    first,
    last,
    prefix_bytes,
    ALIGN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BYTES: tl.constexpr,
    PREFIX: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slots first..last of one (sequence, KV head), of whose rows the leading BYTES bytes are read.

    A matrix instruction has 8 columns. Where the group fills 4 of them, a row of the product holds two neighbouring slots, and the queries
    stand on the diagonal of a 2 x 2 matrix of blocks: as many multiplications, half of everything that follows them.
    """
    row = tl.program_id(0)
    batch = row // KV_HEADS
    head = row % KV_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
    PAIR: tl.constexpr = 2 if ROWS_PAD == 4 else 1
    COLUMNS: tl.constexpr = PAIR * ROWS_PAD
    PAIRS: tl.constexpr = BLOCK // PAIR

    # Says to the compiler how wide the loads of a row may be.
    prefix_bytes = prefix_bytes // ALIGN * ALIGN
    byte = tl.arange(0, PAIR * BYTES) % BYTES
    second = tl.arange(0, PAIR * BYTES) // BYTES == 1
    limit = half
    if PREFIX:
        limit = prefix_bytes
    in_row = byte < limit

    column = tl.arange(0, COLUMNS)
    r = column % ROWS_PAD
    in_rows = r < QUERY_TOKENS * GROUP
    query_token = r // GROUP
    query_head = head * GROUP + r % GROUP
    q_row = batch.to(tl.int64) * stride_qb + query_token * stride_qt + query_head.to(tl.int64) * stride_qh
    coded = nibble_order(byte, dtype)
    even = tl.load(channel_order + head * HEAD_DIM + 2 * coded, mask=in_row, other=0)
    odd = tl.load(channel_order + head * HEAD_DIM + 2 * coded + 1, mask=in_row, other=0)
    q_mask = (in_row[:, None] & in_rows[None, :]) & (second[:, None] == (column >= ROWS_PAD)[None, :])
    q_even = tl.load(q + q_row[None, :] + even[:, None], mask=q_mask, other=0.0).to(tl.float32)
    q_odd = tl.load(q + q_row[None, :] + odd[:, None], mask=q_mask, other=0.0).to(tl.float32)
    if k_center is not None:
        even_center = tl.load(k_center + head * HEAD_DIM + even, mask=in_row, other=0.0)
        odd_center = tl.load(k_center + head * HEAD_DIM + odd, mask=in_row, other=0.0)
        center = tl.sum(q_even * even_center[:, None] + q_odd * odd_center[:, None], 0) * sm_scale
    down, up = power_of_two(tl.max(tl.maximum(tl.abs(q_even), tl.abs(q_odd)), 0))
    q_even *= down[None, :]
    q_odd *= down[None, :]
    q_sum = tl.sum(q_even + q_odd, 0)
    even_factor, odd_factor, product_factor = code_scales(dtype)
    q_even = (q_even * even_factor).to(dtype)
    q_odd = (q_odd * odd_factor).to(dtype)
    up *= sm_scale
    out_row = (batch * QUERY_TOKENS + query_token).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    out = logits + out_row * capacity

    # Chunks and tiles begin on a page, so a slot's place in its page is the same in every tile, unless the list names single tokens.
    by_page: tl.constexpr = (not LISTED) or UNIT == PAGE
    local = tl.arange(0, PAIRS) * PAIR
    tail_bytes = half - prefix_bytes
    reference = tl.zeros([PAIRS, COLUMNS], tl.float32)
    peak = tl.full([PAIRS, COLUMNS], -INF, tl.float32)
    total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    lookup = (num_pages, max_pages, capacity)
    # Where a tile's pages are is known before its loads are issued: a chunk's pages are fetched at once, single tokens one tile ahead.
    if by_page:
        logicals, pages = _pages_of_chunk(indices, page_table, row, batch, first, last, length, *lookup, PAGE, LISTED, CHUNK // PAGE)
    else:
        token, page = _tokens_at(indices, page_table, row, batch, first + local, last, length, *lookup, PAGE, UNIT, LISTED)
        if PAIR == 2:
            token_2, page_2 = _tokens_at(indices, page_table, row, batch, first + local + 1, last, length, *lookup, PAGE, UNIT, LISTED)
    for start in range(first, last, BLOCK):
        slot = start + local
        if by_page:
            place = local % PAGE
            entry = (start - first) // PAGE + local // PAGE
            page = tl.gather(pages, entry, 0)
            token = slot
            if LISTED:
                logical = tl.gather(logicals, entry, 0)
                token = tl.where(logical >= 0, logical * PAGE + place, -1)
            token = tl.where((token < length) & (slot < last), token, -1)
        else:
            place = tl.maximum(token, 0) % PAGE
        physical = page.to(tl.int64)
        live = token >= 0
        # A dead slot reads some valid row, which `word` disowns.
        word = row_word(k_scale + (physical * stride_sp + place), live)
        offset = place[:, None] * prefix_bytes + byte[None, :]
        tail = prefix_bytes * (PAGE - 1) + place[:, None] * tail_bytes + byte[None, :]
        base = (physical * stride_kp)[:, None]
        if PAIR == 2:
            if by_page:
                word_2 = row_word(k_scale + (physical * stride_sp + place + 1), live & (token + 1 < length) & (slot + 1 < last))
                offset += tl.where(second, prefix_bytes, 0)[None, :]
                tail += tl.where(second, tail_bytes, 0)[None, :]
            else:
                place_2 = tl.maximum(token_2, 0) % PAGE
                physical_2 = page_2.to(tl.int64)
                word_2 = row_word(k_scale + (physical_2 * stride_sp + place_2), token_2 >= 0)
                offset = tl.where(second[None, :], place_2[:, None], place[:, None]) * prefix_bytes + byte[None, :]
                tail = prefix_bytes * (PAGE - 1) + tl.where(second[None, :], place_2[:, None], place[:, None]) * tail_bytes + byte[None, :]
                base = tl.where(second[None, :], (physical_2 * stride_kp)[:, None], base)
        if not PREFIX:
            offset = tl.where(byte[None, :] < prefix_bytes, offset, tail)
        packed = tl.load(k_quant + base + offset, mask=in_row[None, :], other=0)

        if not by_page:
            next_slot = slot + BLOCK
            next_token, page = _tokens_at(indices, page_table, row, batch, next_slot, last, length, *lookup, PAGE, UNIT, LISTED)
            if PAIR == 2:
                next_token_2, page_2 = _tokens_at(indices, page_table, row, batch, next_slot + 1, last, length, *lookup, PAGE, UNIT, LISTED)

        low, high = unpack_nibbles(packed, dtype)
        dot = tl.dot(low, q_even, input_precision="ieee")
        dot = tl.dot(high, q_odd, dot, input_precision="ieee")
        word = tl.broadcast_to(word[:, None], [PAIRS, COLUMNS])
        if PAIR == 2:
            word = tl.where((column >= ROWS_PAD)[None, :], word_2[:, None], word)
        scale, zero = scale_and_zero(word)
        logit = (dot * product_factor * scale + q_sum[None, :] * zero) * up[None, :]
        if k_center is not None:
            logit += center[None, :]
        logit = soft_capped(logit, softcap)

        seen = word != DEAD
        if PREFIX:
            logit = rounded_to_level(logit)
            # NaN and +inf stay out of the sum; the ranking puts them first.
            weighed = tl.where(seen & (logit < INF), logit, -INF)
        else:
            if QUERY_TOKENS > 1:
                place_in_row = token[:, None]
                if PAIR == 2:
                    if by_page:
                        place_in_row += (column >= ROWS_PAD).to(tl.int32)[None, :]
                    else:
                        place_in_row = tl.where((column >= ROWS_PAD)[None, :], token_2[:, None], place_in_row)
                seen = seen & (place_in_row <= (length - QUERY_TOKENS + query_token)[None, :])
            logit = tl.where(seen, tl.maximum(logit, LOWEST, propagate_nan=tl.PropagateNan.ALL), -INF)
            weighed = logit
        reference, peak, total = softmax_step(weighed, reference, peak, total, start == first)
        slots = slot[:, None] + (column // ROWS_PAD)[None, :]
        tl.store(out[None, :] + slots, logit, mask=(slots < last) & in_rows[None, :])
        if not by_page:
            token = next_token
            if PAIR == 2:
                token_2 = next_token_2

    top, sum_, again = softmax_finish(reference, peak, total)
    if again:
        tl.debug_barrier()
        total = tl.zeros([PAIRS, COLUMNS], tl.float32)
        for start in range(first, last, BLOCK):
            slots = (start + local)[:, None] + (column // ROWS_PAD)[None, :]
            logit = tl.load(out[None, :] + slots, mask=(slots < last) & in_rows[None, :], other=-INF)
            weighed = logit
            if PREFIX:
                weighed = tl.where(logit < INF, logit, -INF)
            total += tl.exp2((weighed - tl.where(top == -INF, 0.0, top)[None, :]) * LOG2E)
        sum_ = tl.sum(total, 0)
    if PAIR == 2:
        halves = tl.reshape(top, [PAIR, ROWS_PAD])
        top = tl.max(halves, 0)
        fade = tl.exp2((halves - tl.where(top == -INF, 0.0, top)[None, :]) * LOG2E)
        sum_ = tl.sum(tl.where(halves == -INF, 0.0, tl.reshape(sum_, [PAIR, ROWS_PAD]) * fade), 0)
    # A NaN logit makes the whole row NaN, as +inf does.
    if not PREFIX:
        top = tl.where(sum_ == sum_, top, INF)
    r = tl.arange(0, ROWS_PAD)
    out_row = (batch * QUERY_TOKENS + r // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
    at = out_row * splits + tl.program_id(1)
    tl.store(peaks + at, top, mask=r < QUERY_TOKENS * GROUP)
    tl.store(sums + at, sum_, mask=r < QUERY_TOKENS * GROUP)


@triton.jit
def shadow_logits_kernel(
    q,
    k_quant,  # [P, Hkv, S * D / 2]
    k_scale,  # [P, Hkv, S] int32
    channel_order,
    k_center,
    prefix_channels,  # [Hkv]
    page_table,
    seq_lens,  # [B]
    indices,
    counts,  # [B, Hkv]
    logits,
    peaks,
    sums,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_sp,
    stride_sh,
    sm_scale,
    softcap,
    num_pages,
    max_pages,
    capacity,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BYTES_PAD: tl.constexpr,
    PREFIX: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, splits): program (row, split) scores slots split * CHUNK .. of its row for the whole group at once."""
    row = tl.program_id(0)
    head = (row % KV_HEADS).to(tl.int64)
    k_quant += head * stride_kh
    k_scale += head * stride_sh
    batch = row // KV_HEADS
    length = live_length(seq_lens, batch, max_pages, PAGE)
    slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
    first = tl.program_id(1) * CHUNK
    if (first >= slots) | (length <= dense_below):
        return
    last = tl.minimum(first + CHUNK, slots)
    # Whole groups of 8 channels, so that the compiler knows 4-byte alignment.
    prefix_bytes = tl.minimum(tl.maximum(tl.load(prefix_channels + head), 0), HEAD_DIM) // 8 * 4
    # fmt: off
    if PREFIX and prefix_bytes <= 16 and prefix_bytes % 16 == 0:
        _range_logits(
            q, k_quant, k_scale, channel_order, k_center, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh,
            stride_kp, stride_sp, sm_scale, softcap, num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 16,
            KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE, ROWS_PAD, 16, PREFIX, UNIT, LISTED, CHUNK, BLOCK,
        )
    elif PREFIX and BYTES_PAD > 32 and prefix_bytes <= 32:
        _range_logits(
            q, k_quant, k_scale, channel_order, k_center, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh,
            stride_kp, stride_sp, sm_scale, softcap, num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 4, KV_HEADS,
            QUERY_TOKENS, GROUP, HEAD_DIM, PAGE, ROWS_PAD, 32, PREFIX, UNIT, LISTED, CHUNK, BLOCK,
        )
    elif not PREFIX and prefix_bytes % 16 == 0:
        _range_logits(
            q, k_quant, k_scale, channel_order, k_center, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh,
            stride_kp, stride_sp, sm_scale, softcap, num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 16,
            KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE, ROWS_PAD, BYTES_PAD, PREFIX, UNIT, LISTED, CHUNK, BLOCK,
        )
    else:
        _range_logits(
            q, k_quant, k_scale, channel_order, k_center, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh,
            stride_kp, stride_sp, sm_scale, softcap, num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 4, KV_HEADS,
            QUERY_TOKENS, GROUP, HEAD_DIM, PAGE, ROWS_PAD, BYTES_PAD, PREFIX, UNIT, LISTED, CHUNK, BLOCK,
        )
    # fmt: on


# Tokens are the rows of the matrix product and the query rows its 8 columns: half the instructions of the transposed product, and codes go
# from shared memory to the operand registers as bytes.
LAUNCH = Launch(64, 1, 3, "H200, B64 L32k, 8192 candidates: 147 us; two warps take 172, because one alone needs no barriers")
PREFIX_LAUNCH = Launch(
    128, 2, 3, "H200, B64 L32k, 16 bytes a token: 282 us with 168 registers, 235 with 128; 96 is the least that spills nothing there", 96
)
WAVES = 8


def shadow_logits(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    candidates: Candidates,
    sm_scale: float,
    logits: Tensor,
    prefix: bool,
    dense_below: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Fills `logits` [B, T, Hq, slots]; returns partial maxima and sums [B * T * Hq, splits], and the slots of a split."""
    batch, query_tokens, heads, head_dim = q.shape
    k_quant, k_scale, channel_order, prefix_channels, k_center = shadow
    num_pages, kv_heads, page_size, _ = k_scale.shape
    capacity, max_pages = logits.shape[3], paging.page_table.shape[1]
    rows = batch * kv_heads
    launch = PREFIX_LAUNCH if prefix else LAUNCH
    chunk = chunk_size(rows, capacity, q, launch.block, WAVES)
    splits = max(cdiv(capacity, chunk), 1)
    peaks = logits.new_empty((batch * query_tokens * heads, splits))
    sums = torch.empty_like(peaks)
    if rows * capacity:
        scale_words = k_scale.view(torch.int32)
        shadow_logits_kernel[(rows, splits)](
            q,
            k_quant,
            scale_words,
            channel_order,
            None if softcap is None else k_center,
            prefix_channels,
            *paging,
            candidates.indices,
            candidates.counts,
            logits,
            peaks,
            sums,
            *q.stride()[:3],
            *page_strides(k_quant, scale_words),
            sm_scale,
            softcap,
            num_pages,
            max_pages,
            capacity,
            splits,
            dense_below,
            KV_HEADS=kv_heads,
            QUERY_TOKENS=query_tokens,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            PAGE=page_size,
            ROWS_PAD=query_rows(query_tokens, heads // kv_heads, 4),
            BYTES_PAD=next_power_of_2(head_dim // 2),
            PREFIX=prefix,
            UNIT=candidates.tokens_per_index,
            LISTED=candidates.indices is not None,
            CHUNK=chunk,
            BLOCK=launch.block,
            **launch.options,
        )
    return peaks, sums, chunk
