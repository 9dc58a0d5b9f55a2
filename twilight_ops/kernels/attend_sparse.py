"""Triton kernels of twilight::attend_sparse: exact attention over listed tokens, evenly shared out, merged by log-sum-exp."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arguments import KV, Candidates, HotRows, Paging, Scales
from ..ops.attend_sparse import outputs
from ._launch import Launch, cdiv, multiprocessors, next_power_of_2, page_strides, query_rows, stored_pages
from ._tiles import INF, LOG2E, factor, from_e4m3, listed_slots, live_length, physical_page, slot_tokens, soft_capped

# Keyed by padded head_dim.
LAUNCHES = {
    64: Launch(64, 4, 2, "16 KiB of K and V a tile"),
    128: Launch(64, 4, 2, "32 KiB of K and V a tile; H200, B64 L32k, 440 kept: 43 us against 52 with three stages and 70 with 8 warps"),
    256: Launch(32, 4, 2, "32 KiB of K and V a tile; 64 rows would need 128 KiB of stages"),
}
# What 168 registers a thread let run at once; a fourth would wait for a whole share (43 us against 52 in the case above).
PROGRAMS_PER_MULTIPROCESSOR = 3
PLAN_BLOCK = 1024


@triton.jit
def plan_kernel(
    seq_lens,  # [B]
    counts,  # [B, Hkv] or None
    plan,  # [B * Hkv] int32: blocks of this row and all rows before it
    rows,
    max_pages,
    capacity,
    dense_below,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Grid (1): running sum of the rows' blocks."""
    before = tl.zeros([], tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < rows
        length = tl.load(seq_lens + row // KV_HEADS, mask=inside, other=0)
        length = tl.minimum(tl.maximum(length, 0), max_pages * PAGE)
        slots = length
        if LISTED:
            listed = tl.maximum(tl.load(counts + row, mask=inside, other=0), 0)
            slots = tl.where(length <= dense_below, length, tl.minimum(listed, capacity // UNIT) * UNIT)
        blocks = (slots + BLOCK - 1) // BLOCK
        tl.store(plan + row, before + tl.cumsum(blocks, 0), mask=inside)
        before += tl.sum(blocks, 0)


@triton.jit
def attend_kernel(
    q,  # [B, T, Hq, D]
    k_cache,  # [P, Hkv, S, D]
    v_cache,
    k_descale,  # [Hkv] or None
    k_shift,  # [Hkv, D] or None: of logits that are capped
    page_table,  # [B, M]
    seq_lens,  # [B]
    indices,  # [B, Hkv, stride] or None
    counts,  # [B, Hkv] or None
    plan,  # [B * Hkv] int32
    partial_out,  # [programs + B * Hkv, T * G, D] fp32, not normalised
    partial_peak,  # [programs + B * Hkv, T * G] fp32
    partial_sum,
    hot_keys,  # [N, Hkv, R, D] or None
    hot_values,
    hot_tokens,  # [N, Hkv, R]
    hot_claims,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_kh,
    stride_vp,
    stride_vh,
    sm_scale,
    softcap,
    rows,
    hot_rows,
    num_pages,
    max_pages,
    capacity,
    dense_below,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PLAN: tl.constexpr,
):
    """Grid (programs): all rows' blocks, laid end to end, are cut into equal shares, so long and short rows cost what they hold.

    A share may end inside a row and span several. Partial result `program + row` is unique, because both only ever grow.
    """
    program = tl.program_id(0)
    blocks = tl.load(plan + rows - 1)
    share = (blocks + tl.num_programs(0) - 1) // tl.num_programs(0)
    position = program * share
    end = tl.minimum(position + share, blocks)

    d = tl.arange(0, DIM_PAD)
    in_dim = d < HEAD_DIM
    r = tl.arange(0, ROWS_PAD)
    in_rows = r < QUERY_TOKENS * GROUP
    query_token = r // GROUP

    while position < end:
        # The row that holds block `position`: as many rows end at or before it.
        row = 0
        row_start = 0
        row_end = blocks
        for start in range(0, rows, PLAN):
            other = start + tl.arange(0, PLAN)
            ends = tl.load(plan + other, mask=other < rows, other=blocks)
            row += tl.sum((ends <= position).to(tl.int32), 0)
            row_start = tl.maximum(row_start, tl.max(tl.where(ends <= position, ends, 0), 0))
            row_end = tl.minimum(row_end, tl.min(tl.where(ends > position, ends, blocks), 0))
        stop = tl.minimum(end, row_end)
        batch = row // KV_HEADS
        head = row % KV_HEADS
        length = live_length(seq_lens, batch, max_pages, PAGE)
        slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
        dense = length <= dense_below
        if dense:
            slots = length

        q_row = batch.to(tl.int64) * stride_qb + query_token * stride_qt + (head * GROUP + r % GROUP).to(tl.int64) * stride_qh
        query = tl.load(q + q_row[:, None] + d[None, :], mask=in_rows[:, None] & in_dim[None, :], other=0.0)
        if k_shift is not None:
            shift = tl.load(k_shift + head * HEAD_DIM + d, mask=in_dim, other=0.0)
            shift = tl.sum(query.to(tl.float32) * shift[None, :], 1) * sm_scale
        horizon = tl.where(in_rows, length - QUERY_TOKENS + query_token, -1)
        peak = tl.full([ROWS_PAD], -INF, tl.float32)
        total = tl.zeros([ROWS_PAD], tl.float32)
        out = tl.zeros([ROWS_PAD, DIM_PAD], tl.float32)
        first = (position - row_start) * BLOCK
        last = tl.minimum((stop - row_start) * BLOCK, slots)
        for start in range(first, last, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = slot < last
            token = tl.where(inside, slot, -1)
            if LISTED:
                if not dense:
                    token = slot_tokens(indices, row, slot, inside, capacity, UNIT, LISTED)
            live = (token >= 0) & (token < length)
            token = tl.where(live, token, 0)
            page = physical_page(page_table, batch, token // PAGE, live, num_pages, max_pages)
            place = token % PAGE * HEAD_DIM
            key_at = page * stride_kp + head.to(tl.int64) * stride_kh + place
            value_at = page * stride_vp + head.to(tl.int64) * stride_vh + place
            mask = live[:, None] & in_dim[None, :]
            key_rows = k_cache + key_at
            value_rows = v_cache + value_at
            if hot_keys is not None:
                # A row comes from its copy, or over the bus and then becomes one if its token has claimed the place.
                copy = row.to(tl.int64) * hot_rows + token % hot_rows
                held = live & (tl.load(hot_tokens + copy, mask=live, other=-1) == token)
                enters = live & (tl.load(hot_claims + copy, mask=live, other=-1) == token)
                key_rows = tl.where(held, hot_keys + copy * HEAD_DIM, key_rows)
                value_rows = tl.where(held, hot_values + copy * HEAD_DIM, value_rows)
            key = tl.load(key_rows[:, None] + d[None, :], mask=mask, other=0)
            value = tl.load(value_rows[:, None] + d[None, :], mask=mask, other=0)
            if hot_keys is not None:
                entry = copy[:, None] * HEAD_DIM + d[None, :]
                tl.store(hot_keys + entry, key, mask=enters[:, None] & in_dim[None, :])
                tl.store(hot_values + entry, value, mask=enters[:, None] & in_dim[None, :])
            if k_cache.dtype.element_ty == tl.uint8:
                key = from_e4m3(key, query.dtype)
                value = from_e4m3(value, query.dtype)
            logit = tl.dot(query, tl.trans(key), input_precision="ieee") * (sm_scale * factor(k_descale, head))
            if k_shift is not None:
                logit += shift[:, None]
            logit = soft_capped(logit, softcap)
            seen = live[None, :] & (token[None, :] <= horizon[:, None])
            logit = tl.where(seen, logit, -INF)
            new_peak = tl.maximum(peak, tl.max(logit, 1))
            safe = tl.where(new_peak == -INF, 0.0, new_peak)
            # inf - inf makes the output NaN, as dense attention does; the sum stays clean, so that lse is +inf.
            weight = tl.exp2((logit - safe[:, None]) * LOG2E)
            fade = tl.where(peak == new_peak, 1.0, tl.exp2((peak - safe) * LOG2E))
            total = total * fade + tl.sum(tl.where(logit == INF, 1.0, weight), 1)
            out *= fade[:, None]
            if QUERY_TOKENS > 1:
                # 0 * NaN would reach query tokens that do not see this step's newer values: such values become NaN where they are seen.
                broken = (live & (token > length - QUERY_TOKENS))[:, None] & ~(tl.abs(value.to(tl.float32)) < INF)
                value = tl.where(broken, 0.0, value)
                reached = tl.dot(seen.to(value.dtype), broken.to(value.dtype), input_precision="ieee")
                out = tl.where(reached > 0.0, float("nan"), out)
            out = tl.dot(weight.to(value.dtype), value, out, input_precision="ieee")
            peak = new_peak

        at = (program + row).to(tl.int64) * (QUERY_TOKENS * GROUP) + r
        tl.store(partial_peak + at, peak, mask=in_rows)
        tl.store(partial_sum + at, total, mask=in_rows)
        tl.store(partial_out + at[:, None] * HEAD_DIM + d[None, :], out, mask=in_rows[:, None] & in_dim[None, :])
        position = stop


@triton.jit
def merge_kernel(
    plan,
    partial_out,
    partial_peak,
    partial_sum,
    out,  # [B, T, Hq, D]
    lse,  # [B, T, Hq]
    q,  # [B, T, Hq, D], read only with k_shift
    v_descale,  # [Hkv] or None
    k_shift,  # [Hkv, D] or None
    stride_qb,
    stride_qt,
    stride_qh,
    sm_scale,
    rows,
    programs,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (B * Hkv, T * G): merges the partial results of one query row."""
    row = tl.program_id(0)
    r = tl.program_id(1)
    blocks = tl.load(plan + rows - 1)
    row_end = tl.load(plan + row)
    row_start = tl.load(plan + row - 1, mask=row > 0, other=0)
    d = tl.arange(0, DIM_PAD)
    in_dim = d < HEAD_DIM
    peak = tl.full([], -INF, tl.float32)
    total = tl.zeros([], tl.float32)
    sum_ = tl.zeros([DIM_PAD], tl.float32)
    if row_end > row_start:
        blocks_each = (blocks + programs - 1) // programs
        last = (row_end - 1) // blocks_each
        for start in range(row_start // blocks_each, last + 1, PARTS):
            part = start + tl.arange(0, PARTS)
            holds = part <= last
            at = (part + row).to(tl.int64) * (QUERY_TOKENS * GROUP) + r
            part_peak = tl.load(partial_peak + at, mask=holds, other=-INF)
            part_sum = tl.load(partial_sum + at, mask=holds, other=0.0)
            part_out = tl.load(partial_out + at[:, None] * HEAD_DIM + d[None, :], mask=holds[:, None] & in_dim[None, :], other=0.0)
            new_peak = tl.maximum(peak, tl.max(part_peak, 0))
            safe = tl.where(new_peak == -INF, 0.0, new_peak)
            fade = tl.where(peak == new_peak, 1.0, tl.exp2((peak - safe) * LOG2E))
            share = tl.where(part_peak == new_peak, 1.0, tl.exp2((part_peak - safe) * LOG2E))
            total = total * fade + tl.sum(part_sum * share, 0)
            sum_ = sum_ * fade + tl.sum(part_out * share[:, None], 0)
            peak = new_peak
    query_head = row % KV_HEADS * GROUP + r % GROUP
    at = ((row // KV_HEADS) * QUERY_TOKENS + r // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + query_head
    result = sum_ / tl.where(total == 0.0, 1.0, total) * factor(v_descale, row % KV_HEADS)
    tl.store(out + at * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=in_dim)
    if k_shift is not None:
        q_row = (row // KV_HEADS).to(tl.int64) * stride_qb + r // GROUP * stride_qt + query_head.to(tl.int64) * stride_qh
        query = tl.load(q + q_row + d, mask=in_dim, other=0.0).to(tl.float32)
        peak += tl.sum(query * tl.load(k_shift + row % KV_HEADS * HEAD_DIM + d, mask=in_dim, other=0.0), 0) * sm_scale
    tl.store(lse + at, tl.where(total == 0.0, -INF, peak + tl.log(total)))


def run_attend(
    q: Tensor,
    kv: KV,
    paging: Paging,
    candidates: Candidates,
    sm_scale: float,
    out: Tensor,
    lse: Tensor,
    dense_below: int = -1,
    hot: HotRows | None = None,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> None:
    """Fills `out` and `lse`; a sequence no longer than `dense_below` attends to everything. Reads copies where `hot` holds any."""
    indices, counts, unit = candidates
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = kv.k_cache.shape
    max_pages = paging.page_table.shape[1]
    rows, group = batch * kv_heads, heads // kv_heads
    if rows == 0:
        return
    scales = scales or Scales()
    # Uncapped logits move by q . k_shift alike, and so does their log-sum-exp.
    shifts = (None, scales.k_shift) if softcap is None else (scales.k_shift, None)
    capacity = max_pages * page_size if indices is None else indices.shape[2] * unit
    dim_pad = next_power_of_2(head_dim)
    launch = LAUNCHES[dim_pad]
    most_blocks = rows * cdiv(max(capacity, min(dense_below, max_pages * page_size)), launch.block)
    programs = max(1, min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q), most_blocks))
    plan = torch.empty(rows, dtype=torch.int32, device=q.device)
    partial_out = torch.empty((programs + rows, query_tokens * group, head_dim), dtype=torch.float32, device=q.device)
    partial_peak = partial_out.new_empty(partial_out.shape[:2])
    partial_sum = torch.empty_like(partial_peak)
    lists = {"UNIT": unit, "LISTED": indices is not None}
    shape = {"KV_HEADS": kv_heads, "QUERY_TOKENS": query_tokens, "GROUP": group, "HEAD_DIM": head_dim, "DIM_PAD": dim_pad}
    plan_kernel[(1,)](
        paging.seq_lens,
        counts,
        plan,
        rows,
        max_pages,
        capacity,
        dense_below,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        **lists,
        BLOCK=launch.block,
        ROWS=min(PLAN_BLOCK, next_power_of_2(rows)),
        num_warps=4,
    )
    attend_kernel[(programs,)](
        q,
        *stored_pages(kv),
        scales.k_descale,
        shifts[0],
        *paging,
        indices,
        counts,
        plan,
        partial_out,
        partial_peak,
        partial_sum,
        *(hot or (None,) * 4),
        *q.stride()[:3],
        *page_strides(*kv),
        sm_scale,
        softcap,
        rows,
        0 if hot is None else hot.hot_tokens.shape[2],
        num_pages,
        max_pages,
        capacity,
        dense_below,
        **shape,
        **lists,
        PAGE=page_size,
        ROWS_PAD=query_rows(query_tokens, group, 16),
        BLOCK=launch.block,
        PLAN=min(PLAN_BLOCK, next_power_of_2(rows)),
        **launch.options,
    )
    merge_kernel[(rows, query_tokens * group)](
        plan,
        partial_out,
        partial_peak,
        partial_sum,
        out,
        lse,
        q,
        scales.v_descale,
        shifts[1],
        *q.stride()[:3],
        sm_scale,
        rows,
        programs,
        **shape,
        PARTS=min(32, next_power_of_2(cdiv(programs, rows) + 1)),
        num_warps=4,
    )


def attend_sparse(
    q: Tensor,
    kv: KV,
    paging: Paging,
    candidates: Candidates,
    sm_scale: float,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = outputs(q)
    run_attend(q, kv, paging, candidates, sm_scale, out, lse, scales=scales, softcap=softcap)
    return out, lse
