"""Triton kernels of twilight::select_pages: the bound on each page's logits, or its mean key's logits, then the choice."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Always, Budget, PageBounds, PageLevel, PageMeans, Paging, Shadow
from ..capacity import Limits
from ..ops.select_pages import outputs
from ._launch import Launch, cdiv, chunk_size, next_power_of_2, padded_row, page_strides, query_rows
from ._rank import rank
from ._tiles import (
    INF,
    LOG2E,
    code_scales,
    live_length,
    nibble_order,
    physical_page,
    power_of_two,
    rounded_to_level,
    scale_and_zero,
    softmax_finish,
    softmax_step,
    unpack_bytes,
    unpack_nibbles,
)

# Bytes of bounds or means a page: the pages a tile hold 32 KiB together, two stages of which fit every chip since sm_80.
LAUNCHES = {
    page_bytes: Launch(min(128, 32768 // page_bytes), 4, 2, "H200, B64 L32k, 256 bytes a page: 83 us against 107 with half the pages")
    for page_bytes in (32, 64, 128, 256, 512, 1024, 2048)
}
WAVES = 8


@triton.jit
def page_logits_kernel(
    q,  # [B, T, Hq, D]
    page_rows,  # [P, Hkv, 2, D] bounds, or [P, Hkv, D / 2] means
    rows_scale,  # [P, Hkv] int32: scale and zero, bf16 each; None with bounds in q's dtype
    channel_order,  # [Hkv, D], of means; None: K's own
    prefix_channels,  # [Hkv], of means; None: whole rows
    page_table,  # [B, M]
    seq_lens,  # [B]
    logits,  # [B, T, Hq, stride_logits]
    peaks,  # [B * T * Hq, splits]
    sums,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_rp,
    stride_rh,
    stride_sp,
    stride_sh,
    sm_scale,
    num_pages,
    max_pages,
    stride_logits,
    splits,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    MEANS: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, splits): program (row, split) scores pages split * CHUNK .. for the whole group at once.

    Two products make a logit: of the minima with the negative queries and of the maxima with the positive ones, or of the even and of the
    odd channels of a mean.
    """
    row = tl.program_id(0)
    batch = row // KV_HEADS
    head = row % KV_HEADS
    dtype: tl.constexpr = q.dtype.element_ty if rows_scale is None or q.dtype.element_ty == tl.float32 else tl.float16
    length = live_length(seq_lens, batch, max_pages, PAGE)
    pages = (length + PAGE - 1) // PAGE
    first = tl.program_id(1) * CHUNK
    if (first >= pages) | (length <= dense_below):
        return
    last = tl.minimum(first + CHUNK, pages)

    width: tl.constexpr = HEAD_DIM // 2 if MEANS else HEAD_DIM
    d = tl.arange(0, WIDTH_PAD)
    in_dim = d < width
    if prefix_channels is not None:
        # Whole groups of 8 channels, so that the compiler knows 4-byte alignment.
        in_dim = d < tl.minimum(tl.maximum(tl.load(prefix_channels + head), 0), HEAD_DIM) // 8 * 4
    r = tl.arange(0, ROWS_PAD)
    in_rows = r < QUERY_TOKENS * GROUP
    query_token = r // GROUP
    query_head = head * GROUP + r % GROUP
    q_row = batch.to(tl.int64) * stride_qb + query_token * stride_qt + query_head.to(tl.int64) * stride_qh
    q_mask = in_dim[:, None] & in_rows[None, :]
    if MEANS:
        even = 2 * nibble_order(d, dtype)
        odd = even + 1
        if channel_order is not None:
            even = tl.load(channel_order + head * HEAD_DIM + even, mask=in_dim, other=0)
            odd = tl.load(channel_order + head * HEAD_DIM + odd, mask=in_dim, other=0)
        q_low = tl.load(q + q_row[None, :] + even[:, None], mask=q_mask, other=0.0).to(tl.float32)
        q_high = tl.load(q + q_row[None, :] + odd[:, None], mask=q_mask, other=0.0).to(tl.float32)
    else:
        query = tl.load(q + q_row[None, :] + d[:, None], mask=q_mask, other=0.0)
        # Written so that a NaN stays in both.
        q_low = tl.where(query > 0, 0.0, query).to(tl.float32)
        q_high = tl.where(query < 0, 0.0, query).to(tl.float32)
    down, up = power_of_two(tl.max(tl.maximum(tl.abs(q_low), tl.abs(q_high)), 0))
    if rows_scale is None:
        # Products with model-typed bounds are exact as they are, and scaling could overflow nothing.
        down = tl.full([ROWS_PAD], 1.0, tl.float32)
        up = down
    q_low *= down[None, :]
    q_high *= down[None, :]
    q_sum = tl.sum(q_low + q_high, 0)
    if rows_scale is not None:
        low_factor, high_nibble_factor, product_factor = code_scales(dtype)
        q_low *= low_factor
        q_high *= high_nibble_factor if MEANS else low_factor
    q_low = q_low.to(dtype)
    q_high = q_high.to(dtype)
    up *= sm_scale
    out_row = (batch * QUERY_TOKENS + query_token).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    out = logits + out_row * stride_logits

    reference = tl.zeros([BLOCK, ROWS_PAD], tl.float32)
    peak = tl.full([BLOCK, ROWS_PAD], -INF, tl.float32)
    total = tl.zeros([BLOCK, ROWS_PAD], tl.float32)
    local = tl.arange(0, BLOCK)
    for start in range(first, last, BLOCK):
        page = start + local
        live = page < last
        physical = physical_page(page_table, batch, page, live, num_pages, max_pages)
        row_at = physical * stride_rp + head.to(tl.int64) * stride_rh
        # A page behind the last reads some valid page.
        mask = in_dim[None, :]
        if MEANS:
            low, high = unpack_nibbles(tl.load((page_rows + row_at)[:, None] + d[None, :], mask=mask, other=0), dtype)
        else:
            at = (page_rows + row_at)[:, None] + d[None, :]
            low = tl.load(at, mask=mask, other=0)
            high = tl.load(at + HEAD_DIM, mask=mask, other=0)
            if rows_scale is not None:
                low = unpack_bytes(low, dtype)
                high = unpack_bytes(high, dtype)
        dot = tl.dot(low, q_low, input_precision="ieee")
        dot = tl.dot(high, q_high, dot, input_precision="ieee")
        if rows_scale is not None:
            word = tl.load(rows_scale + physical * stride_sp + head.to(tl.int64) * stride_sh)
            scale, zero = scale_and_zero(tl.broadcast_to(word[:, None], [BLOCK, ROWS_PAD]))
            dot = dot * product_factor * scale + q_sum[None, :] * zero
        logit = rounded_to_level(dot * up[None, :])
        weighed = tl.where(live[:, None] & (logit < INF), logit, -INF)
        reference, peak, total = softmax_step(weighed, reference, peak, total, start == first)
        tl.store(out[None, :] + page[:, None], logit, mask=live[:, None] & in_rows[None, :])

    top, sum_, again = softmax_finish(reference, peak, total)
    if again:
        tl.debug_barrier()
        total = tl.zeros([BLOCK, ROWS_PAD], tl.float32)
        for start in range(first, last, BLOCK):
            page = start + local
            logit = tl.load(out[None, :] + page[:, None], mask=(page < last)[:, None] & in_rows[None, :], other=-INF)
            weighed = tl.where(logit < INF, logit, -INF)
            total += tl.exp2((weighed - tl.where(top == -INF, 0.0, top)[None, :]) * LOG2E)
        sum_ = tl.sum(total, 0)
    at = out_row * splits + tl.program_id(1)
    tl.store(peaks + at, top, mask=in_rows)
    tl.store(sums + at, sum_, mask=in_rows)


def propose(
    q: Tensor,
    bounds: PageBounds | None,
    means: PageMeans | None,
    shadow: Shadow | None,
    paging: Paging,
    page_size: int,
    limits: Limits,
    head_token_budget: Tensor | None,
    sm_scale: float,
    indices: Tensor,
    counts: Tensor,
    dense_below: int = -1,
    pad: bool = True,
    level: PageLevel | None = None,
) -> None:
    """Fills `indices` and `counts`, by means where they are given; sequences no longer than `dense_below` are left out.

    With a `level` the leading channels of the means decide, and at least its pages are taken.
    """
    batch, query_tokens, heads, head_dim = q.shape
    page_rows, rows_scale = means or bounds
    num_pages, kv_heads = page_rows.shape[:2]
    max_pages = paging.page_table.shape[1]
    rows = batch * kv_heads
    width = next_power_of_2(head_dim if means is None else head_dim // 2)
    halves = 2 if means is None or q.dtype == torch.float32 else 1
    unpacked = 4 if q.dtype == torch.float32 else page_rows.itemsize  # bytes: tensor cores take codes as they are only for halves
    launch = LAUNCHES[halves * width * unpacked]
    chunk = chunk_size(rows, max_pages, q, launch.block, WAVES)
    splits = max(cdiv(max_pages, chunk), 1)
    stride = padded_row(max_pages)
    logits = q.new_empty((batch, query_tokens, heads, stride), dtype=torch.float32)
    peaks = logits.new_empty((batch * query_tokens * heads, splits))
    sums = torch.empty_like(peaks)
    if rows * max_pages:
        scale_words = None if rows_scale is None else rows_scale.view(torch.int32)
        page_logits_kernel[(rows, splits)](
            q,
            page_rows,
            scale_words,
            None if shadow is None else shadow.channel_order,
            shadow.prefix_channels if level is not None else None,
            *paging,
            logits,
            peaks,
            sums,
            *q.stride()[:3],
            *page_strides(page_rows, scale_words),
            sm_scale,
            num_pages,
            max_pages,
            stride,
            splits,
            dense_below,
            KV_HEADS=kv_heads,
            QUERY_TOKENS=query_tokens,
            GROUP=heads // kv_heads,
            HEAD_DIM=head_dim,
            WIDTH_PAD=width,
            MEANS=means is not None,
            PAGE=page_size,
            ROWS_PAD=query_rows(query_tokens, heads // kv_heads, 8),
            CHUNK=chunk,
            BLOCK=launch.block,
            **launch.options,
        )
    lists = (paging.seq_lens, head_token_budget, indices, counts)
    rank(logits, peaks, sums, chunk, max_pages, *lists, max_pages, page_size, page_size, limits, dense_below, pad, level)


def select_pages(
    q: Tensor,
    bounds: PageBounds | None,
    paging: Paging,
    page_size: int,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    shadow: Shadow | None,
) -> tuple[Tensor, Tensor]:
    indices, counts = outputs(q, bounds, paging, page_size, budget, sm_scale, always, means, shadow)
    limits = Limits.of(paging.page_table.shape[1] * page_size, q.shape[1], budget, always)
    propose(q, bounds, means, shadow, paging, page_size, limits, budget.head_token_budget, sm_scale, indices, counts)
    return indices, counts
