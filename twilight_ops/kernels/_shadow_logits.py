"""Logits of the 4-bit K shadow: under `select_tokens` (leading channels of every token) and `estimate_weights` (whole rows of a list)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, cdiv, chunk_size, next_power_of_2, query_rows
from ._tiles import (
    DEAD,
    INF,
    LOG2E,
    LOWEST,
    listed_slots,
    live_length,
    physical_page,
    power_of_two,
    row_word,
    scale_and_zero,
    slot_tokens,
    softmax_finish,
    softmax_step,
    unpack_nibbles,
)


@triton.jit
def _range_logits(
    q,  # [B, T, Hq, D]
    k_quant,  # [P, Hkv, S * D / 2]
    k_scale,  # [P, Hkv, S] int32: scale and zero, bf16 each
    channel_order,  # [Hkv, D]
    page_table,  # [B, M]
    indices,  # [B, Hkv, capacity / UNIT]
    logits,  # [B, T, Hq, capacity]
    peaks,  # [B * T * Hq, splits]
    sums,  # [B * T * Hq, splits]
    stride_qb,
    stride_qt,
    stride_qh,
    sm_scale,
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
    BLOCK: tl.constexpr,
):
    """Slots first..last of one (sequence, KV head), of whose rows the leading BYTES bytes are read."""
    row = tl.program_id(0)
    batch = row // KV_HEADS
    head = row % KV_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16

    # Says to the compiler how wide the loads of a row may be.
    prefix_bytes = prefix_bytes // ALIGN * ALIGN
    byte = tl.arange(0, BYTES)
    limit = half
    if PREFIX:
        limit = prefix_bytes
    in_row = byte < limit
    r = tl.arange(0, ROWS_PAD)
    in_rows = r < QUERY_TOKENS * GROUP
    query_token = r // GROUP
    query_head = head * GROUP + r % GROUP
    q_row = batch.to(tl.int64) * stride_qb + query_token * stride_qt + query_head * stride_qh
    even = tl.load(channel_order + head * HEAD_DIM + 2 * byte, mask=in_row, other=0)
    odd = tl.load(channel_order + head * HEAD_DIM + 2 * byte + 1, mask=in_row, other=0)
    q_mask = in_row[:, None] & in_rows[None, :]
    q_even = tl.load(q + q_row[None, :] + even[:, None], mask=q_mask, other=0.0).to(tl.float32)
    q_odd = tl.load(q + q_row[None, :] + odd[:, None], mask=q_mask, other=0.0).to(tl.float32)
    down, up = power_of_two(tl.max(tl.maximum(tl.abs(q_even), tl.abs(q_odd)), 0))
    q_even *= down[None, :]
    q_odd *= down[None, :]
    q_sum = tl.sum(q_even + q_odd, 0)
    q_even = q_even.to(dtype)
    q_odd = q_odd.to(dtype)
    up *= sm_scale
    out_row = (batch * QUERY_TOKENS + query_token).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    out = logits + out_row * capacity

    # Chunks and tiles begin on a page, so a slot's place in its page is the same in every tile, unless the list names single tokens.
    by_page: tl.constexpr = (not LISTED) or UNIT == PAGE
    local = tl.arange(0, BLOCK)
    tail_bytes = half - prefix_bytes
    reference = tl.zeros([ROWS_PAD], tl.float32)
    peak = tl.full([BLOCK, ROWS_PAD], -INF, tl.float32)
    total = tl.zeros([BLOCK, ROWS_PAD], tl.float32)
    for start in range(first, last, BLOCK):
        slot = start + local
        inside = slot < last
        if by_page:
            place = local % PAGE
            logical = start // PAGE + local // PAGE
            if LISTED:
                logical = tl.load(indices + row.to(tl.int64) * (capacity // PAGE) + logical, mask=inside, other=-1)
            token = logical * PAGE + place
            live = inside & (logical >= 0) & (token < length)
        else:
            token = slot_tokens(indices, row, slot, inside, capacity, UNIT, LISTED)
            live = (token >= 0) & (token < length)
            place = token % PAGE
            logical = token // PAGE
        block = physical_page(page_table, batch, logical, live, num_pages, max_pages) * KV_HEADS + head
        offset = place[:, None] * prefix_bytes + byte[None, :]
        if not PREFIX:
            tail = prefix_bytes * (PAGE - 1) + place[:, None] * tail_bytes + byte[None, :]
            offset = tl.where(byte[None, :] < prefix_bytes, offset, tail)
        # A dead slot reads some valid row, which `word` disowns.
        packed = tl.load((k_quant + block * (PAGE * half))[:, None] + offset, mask=in_row[None, :], other=0)
        word = tl.broadcast_to(row_word(k_scale + (block * PAGE + place), live)[:, None], [BLOCK, ROWS_PAD])
        scale, zero = scale_and_zero(word)
        low, high = unpack_nibbles(packed, dtype)
        dot = tl.dot(low, q_even, input_precision="ieee")
        dot = tl.dot(high, q_odd, dot, input_precision="ieee")
        logit = (dot * scale + q_sum[None, :] * zero) * up[None, :]

        seen = word != DEAD
        if PREFIX:
            # NaN and +inf stay out of the sum; the ranking puts them first.
            weighed = tl.where(seen & (logit < INF), logit, -INF)
        else:
            if QUERY_TOKENS > 1:
                seen = seen & (token[:, None] <= (length - QUERY_TOKENS + query_token)[None, :])
            logit = tl.where(seen, tl.maximum(logit, LOWEST, propagate_nan=tl.PropagateNan.ALL), -INF)
            weighed = logit
        reference, peak, total = softmax_step(weighed, reference, peak, total, start == first)
        tl.store(out[None, :] + slot[:, None], logit, mask=inside[:, None] & in_rows[None, :])

    top, sum_, again = softmax_finish(reference, peak, total)
    if again:
        tl.debug_barrier()
        total = tl.zeros([BLOCK, ROWS_PAD], tl.float32)
        for start in range(first, last, BLOCK):
            slot = start + local
            logit = tl.load(out[None, :] + slot[:, None], mask=(slot < last)[:, None] & in_rows[None, :], other=-INF)
            weighed = logit
            if PREFIX:
                weighed = tl.where(logit < INF, logit, -INF)
            total += tl.exp2((weighed - tl.where(top == -INF, 0.0, top)[None, :]) * LOG2E)
        sum_ = tl.sum(total, 0)
    # A NaN logit makes the whole row NaN, as +inf does.
    if not PREFIX:
        top = tl.where(sum_ == sum_, top, INF)
    at = out_row * splits + tl.program_id(1)
    tl.store(peaks + at, top, mask=in_rows)
    tl.store(sums + at, sum_, mask=in_rows)


@triton.jit
def shadow_logits_kernel(
    q,
    k_quant,
    k_scale,
    channel_order,
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
    sm_scale,
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
    batch = row // KV_HEADS
    length = live_length(seq_lens, batch, max_pages, PAGE)
    slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
    first = tl.program_id(1) * CHUNK
    if (first >= slots) | (length <= dense_below):
        return
    last = tl.minimum(first + CHUNK, slots)
    # Whole groups of 8 channels, so that the compiler knows 4-byte alignment.
    prefix_bytes = tl.minimum(tl.maximum(tl.load(prefix_channels + row % KV_HEADS), 0), HEAD_DIM) // 8 * 4
    # fmt: off
    if PREFIX and prefix_bytes <= 16 and prefix_bytes % 16 == 0:
        _range_logits(
            q, k_quant, k_scale, channel_order, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh, sm_scale,
            num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 16, KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE,
            ROWS_PAD, 16, PREFIX, UNIT, LISTED, BLOCK,
        )
    elif PREFIX and BYTES_PAD > 32 and prefix_bytes <= 32:
        _range_logits(
            q, k_quant, k_scale, channel_order, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh, sm_scale,
            num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 4, KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE,
            ROWS_PAD, 32, PREFIX, UNIT, LISTED, BLOCK,
        )
    elif not PREFIX and prefix_bytes % 16 == 0:
        _range_logits(
            q, k_quant, k_scale, channel_order, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh, sm_scale,
            num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 16, KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE,
            ROWS_PAD, BYTES_PAD, PREFIX, UNIT, LISTED, BLOCK,
        )
    else:
        _range_logits(
            q, k_quant, k_scale, channel_order, page_table, indices, logits, peaks, sums, stride_qb, stride_qt, stride_qh, sm_scale,
            num_pages, max_pages, capacity, splits, length, first, last, prefix_bytes, 4, KV_HEADS, QUERY_TOKENS, GROUP, HEAD_DIM, PAGE,
            ROWS_PAD, BYTES_PAD, PREFIX, UNIT, LISTED, BLOCK,
        )
    # fmt: on


# Tokens are the rows of the matrix product and the query rows its 8 columns: half the instructions of the transposed product, and codes go
# from shared memory to the operand registers as bytes.
LAUNCH = Launch(64, 2, 4, "H200, B64 L32k, 8192 candidates: 162 us against 189 with (128, 4, 3) and 306 with 8 warps")
WAVES = 8


def shadow_logits(
    q: Tensor,
    k_quant: Tensor,
    k_scale: Tensor,
    channel_order: Tensor,
    prefix_channels: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    unit: int,
    sm_scale: float,
    logits: Tensor,
    prefix: bool,
    dense_below: int,
) -> tuple[Tensor, Tensor, int]:
    """Fills `logits` [B, T, Hq, slots]; returns partial maxima and sums [B * T * Hq, splits], and the slots of a split."""
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = k_scale.shape
    capacity, max_pages = logits.shape[3], page_table.shape[1]
    rows = batch * kv_heads
    chunk = chunk_size(rows, capacity, q, LAUNCH.block, WAVES)
    splits = max(cdiv(capacity, chunk), 1)
    peaks = logits.new_empty((batch * query_tokens * heads, splits))
    sums = torch.empty_like(peaks)
    if rows * capacity:
        shadow_logits_kernel[(rows, splits)](
            q,
            k_quant,
            k_scale.view(torch.int32),
            channel_order,
            prefix_channels,
            page_table,
            seq_lens,
            indices,
            counts,
            logits,
            peaks,
            sums,
            *q.stride()[:3],
            sm_scale,
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
            ROWS_PAD=query_rows(query_tokens, heads // kv_heads, 8),
            BYTES_PAD=next_power_of_2(head_dim // 2),
            PREFIX=prefix,
            UNIT=unit,
            LISTED=indices is not None,
            CHUNK=chunk,
            BLOCK=LAUNCH.block,
            **LAUNCH.options,
        )
    return peaks, sums, chunk
