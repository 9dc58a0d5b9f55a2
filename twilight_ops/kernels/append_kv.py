"""Triton kernels of twilight::append_kv: K, V and the 4-bit shadow of new tokens, then bounds and means of the pages they touched."""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import KV, PageBounds, PageMeans, Paging, Scales, Shadow
from ._launch import Launch, cdiv, next_power_of_2, page_strides, stored_pages
from ._tiles import INF, factor, from_e4m3, to_e4m3

# A decode step writes one token a sequence; a prompt fills tiles.
WRITE = {1: Launch(1, 1, 1, "one row is 2 * D values"), 16: Launch(16, 4, 1, "16 rows of 2 * D values keep four warps loading")}


@triton.jit
def _written_page(positions, seq_lens, page_table, batch, token, inside, tokens, num_pages, max_pages, PAGE: tl.constexpr):
    """Position, logical page and physical page of new tokens, and whether the row is written at all."""
    if positions is None:
        position = tl.maximum(tl.load(seq_lens + batch), 0) - tokens + token
    else:
        position = tl.load(positions + batch.to(tl.int64) * tokens + token, mask=inside, other=-1)
    logical = tl.where(position < 0, 0, position) // PAGE
    written = inside & (position >= 0) & (logical < max_pages)
    page = tl.load(page_table + batch.to(tl.int64) * max_pages + logical, mask=written, other=-1)
    return position, logical, page.to(tl.int64), written & (page >= 0) & (page < num_pages)


@triton.jit
def _centred(key, k_center, channel, mask):
    """Keys [tokens, channels] less the centre of their channels."""
    wide = key.to(tl.float32)
    if k_center is not None:
        wide -= tl.load(k_center + channel, mask=mask, other=0.0)[None, :]
    return wide


@triton.jit
def _stored(row, descale, shift, head, channel, mask, FP8: tl.constexpr):
    """Rows [tokens, channels] of k or v as the cache holds them."""
    if FP8:
        wide = _centred(row, shift, channel, mask)
        return to_e4m3(tl.div_rn(wide, tl.full(wide.shape, 1.0, tl.float32) * factor(descale, head)))
    else:
        return row


@triton.jit
def _key(at, mask, descale, shift, head, channel, in_dim):
    """Stored keys in fp32; `channel` and `in_dim` are of the last dimension, `mask` of all of them."""
    row = tl.load(at, mask=mask, other=0)
    if at.dtype.element_ty == tl.uint8:
        key = from_e4m3(row, tl.float32) * factor(descale, head)
        if shift is not None:
            key += tl.load(shift + channel, mask=in_dim, other=0.0)
        return key
    else:
        return row.to(tl.float32)


@triton.jit
def _codes(x, zero, scale, LEVELS: tl.constexpr):
    """clamp(round((x - zero) / scale), 0, LEVELS), ties to even; 0 where that is undefined."""
    step = tl.div_rn(x - zero, tl.where(scale > 0.0, scale, 1.0))
    step = tl.where((scale > 0.0) & (step == step), step, 0.0)
    step = tl.minimum(tl.maximum(step, 0.0), LEVELS)
    # Adding 1.5 * 2**23 leaves no fraction bits: fp32 itself rounds, half to even.
    return ((step + 12582912.0) - 12582912.0).to(tl.uint8)


@triton.jit
def _range_scale(low, high, nan, LEVELS: tl.constexpr):
    """Rounded scale and zero of rows with the given extremes."""
    low = tl.where(nan, float("nan"), low)
    high = tl.where(nan, float("nan"), high)
    return tl.div_rn(high - low, tl.full(low.shape, LEVELS, tl.float32)).to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def write_tokens_kernel(
    k,  # [B, T, Hkv, D]
    v,
    k_cache,  # [P, Hkv, S, D]
    v_cache,
    k_quant,  # [P, Hkv, S * D / 2] or None
    k_scale,  # [P, Hkv, S, 2]
    channel_order,  # [Hkv, D]
    prefix_channels,  # [Hkv]
    k_center,  # [Hkv, D] or None
    k_descale,  # [Hkv] or None
    v_descale,
    k_shift,  # [Hkv, D] or None
    page_table,  # [B, M]
    seq_lens,  # [B]
    positions,  # [B, T] or None
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    k_page,
    k_head,
    v_page,
    v_head,
    codes_page,
    codes_head,
    scale_page,
    scale_head,
    tokens,
    num_pages,
    max_pages,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, tiles of T): program (row, tile) writes BLOCK tokens of one KV head."""
    batch = tl.program_id(0) // KV_HEADS
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position, _, page, written = _written_page(
        positions, seq_lens, page_table, batch, token, token < tokens, tokens, num_pages, max_pages, PAGE
    )
    place = position % PAGE

    d = tl.arange(0, 2 * HALF_PAD)
    mask = written[:, None] & (d < HEAD_DIM)[None, :]
    k_row = k + batch.to(tl.int64) * stride_kb + token.to(tl.int64) * stride_kt + head * stride_kh
    v_row = v + batch.to(tl.int64) * stride_vb + token.to(tl.int64) * stride_vt + head * stride_vh
    key = tl.load(k_row[:, None] + d[None, :], mask=mask, other=0.0)
    fp8: tl.constexpr = k_cache.dtype.element_ty == tl.uint8
    stored = _stored(key, k_descale, k_shift, head, head * HEAD_DIM + d, d < HEAD_DIM, fp8)
    tl.store(k_cache + (page * k_page + head * k_head + place * HEAD_DIM)[:, None] + d[None, :], stored, mask=mask)
    value = tl.load(v_row[:, None] + d[None, :], mask=mask, other=0.0)
    stored = _stored(value, v_descale, None, head, d, d < HEAD_DIM, fp8)
    tl.store(v_cache + (page * v_page + head * v_head + place * HEAD_DIM)[:, None] + d[None, :], stored, mask=mask)

    if k_quant is not None:
        wide = _centred(key, k_center, head * HEAD_DIM + d, d < HEAD_DIM)
        low = tl.min(tl.where(mask, wide, INF), 1)
        high = tl.max(tl.where(mask, wide, -INF), 1)
        nan = tl.max((mask & (wide != wide)).to(tl.int32), 1) > 0
        low = tl.where(written, low, 0.0)
        high = tl.where(written, high, 0.0)
        scale, zero = _range_scale(low, high, nan, 15)
        scale_at = k_scale + page * scale_page + head * scale_head + place * 2
        tl.store(scale_at, scale, mask=written)
        tl.store(scale_at + 1, zero, mask=written)
        byte = tl.arange(0, HALF_PAD)
        in_row = byte < half
        even = tl.load(channel_order + head * HEAD_DIM + 2 * byte, mask=in_row, other=0)
        odd = tl.load(channel_order + head * HEAD_DIM + 2 * byte + 1, mask=in_row, other=0)
        pairs = written[:, None] & in_row[None, :]
        scale = scale.to(tl.float32)[:, None]
        zero = zero.to(tl.float32)[:, None]
        even_key = tl.load(k_row[:, None] + even[None, :], mask=pairs, other=0.0)
        odd_key = tl.load(k_row[:, None] + odd[None, :], mask=pairs, other=0.0)
        even_code = _codes(_centred(even_key, k_center, head * HEAD_DIM + even, in_row), zero, scale, 15)
        odd_code = _codes(_centred(odd_key, k_center, head * HEAD_DIM + odd, in_row), zero, scale, 15)
        prefix = tl.minimum(tl.maximum(tl.load(prefix_channels + head), 0), HEAD_DIM) // 8 * 4
        lead = place[:, None] * prefix + byte[None, :]
        tail = prefix * (PAGE - 1) + place[:, None] * (half - prefix) + byte[None, :]
        offset = (page * codes_page + head * codes_head)[:, None] + tl.where(byte[None, :] < prefix, lead, tail)
        tl.store(k_quant + offset, even_code | (odd_code << 4), mask=pairs)


@triton.jit
def _touched_page(positions, seq_lens, page_table, tokens, num_pages, max_pages, KV_HEADS: tl.constexpr, PAGE: tl.constexpr):
    """One program a token and KV head: the token's page, its live tokens, and whether the page is recomputed here or by the token before.

    Returns its head, its page, its live tokens (below 1 where it has none), and the answer.
    """
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    token = tl.program_id(0) // KV_HEADS % tokens
    batch = tl.program_id(0) // KV_HEADS // tokens
    _, logical, page, written = _written_page(positions, seq_lens, page_table, batch, token, token >= 0, tokens, num_pages, max_pages, PAGE)
    _, other, _, other_written = _written_page(
        positions, seq_lens, page_table, batch, token - 1, token > 0, tokens, num_pages, max_pages, PAGE
    )
    mine = written & ~((token > 0) & other_written & (other == logical))
    return head, page, tl.load(seq_lens + batch) - logical * PAGE, mine


@triton.jit
def _stored_range(rows_scale, low, high, nan, LEVELS: tl.constexpr):
    """Writes scale and zero of a row of the whole page [1], and returns them in fp32."""
    scale, zero = _range_scale(low, high, nan, LEVELS)
    tl.store(rows_scale + tl.arange(0, 1), scale)
    tl.store(rows_scale + 1 + tl.arange(0, 1), zero)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def page_bounds_kernel(
    k_cache,  # [P, Hkv, S, D]
    k_descale,  # [Hkv] or None
    k_shift,  # [Hkv, D] or None
    page_bounds,  # [P, Hkv, 2, D]
    bounds_scale,  # [P, Hkv, 2] or None
    page_table,  # [B, M]
    seq_lens,  # [B]
    positions,  # [B, T] or None
    k_page,
    k_head,
    rows_page,
    rows_head,
    scale_page,
    scale_head,
    tokens,
    num_pages,
    max_pages,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid (B * Hkv * T)."""
    head, page, live_tokens, mine = _touched_page(positions, seq_lens, page_table, tokens, num_pages, max_pages, KV_HEADS, PAGE)
    if mine:
        s = tl.arange(0, PAGE)
        d = tl.arange(0, DIM_PAD)
        in_dim = d < HEAD_DIM
        mask = (s < live_tokens)[:, None] & in_dim[None, :]
        at = (k_cache + page * k_page + head * k_head) + s[:, None] * HEAD_DIM + d[None, :]
        key = _key(at, mask, k_descale, k_shift, head, (head * HEAD_DIM + d)[None, :], in_dim[None, :])
        nan = tl.max((key != key).to(tl.int32), 0) > 0
        low = tl.where(nan, float("nan"), tl.min(tl.where(mask, key, INF), 0))
        high = tl.where(nan, float("nan"), tl.max(tl.where(mask, key, -INF), 0))
        low = tl.where(live_tokens > 0, low, 0.0)
        high = tl.where(live_tokens > 0, high, 0.0)
        at = page_bounds + page * rows_page + head * rows_head + d
        if bounds_scale is None:
            tl.store(at, low.to(page_bounds.dtype.element_ty), mask=in_dim)
            tl.store(at + HEAD_DIM, high.to(page_bounds.dtype.element_ty), mask=in_dim)
        else:
            least = tl.min(tl.where(in_dim, tl.minimum(low, high), INF), 0, keep_dims=True)
            most = tl.max(tl.where(in_dim, tl.maximum(low, high), -INF), 0, keep_dims=True)
            broken = tl.max((nan & in_dim).to(tl.int32), 0, keep_dims=True) > 0
            scale, zero = _stored_range(bounds_scale + page * scale_page + head * scale_head, least, most, broken, 255)
            tl.store(at, _codes(low, zero, scale, 255), mask=in_dim)
            tl.store(at + HEAD_DIM, _codes(high, zero, scale, 255), mask=in_dim)


@triton.jit
def page_means_kernel(
    k_cache,  # [P, Hkv, S, D]
    k_descale,  # [Hkv] or None
    k_shift,  # [Hkv, D] or None
    page_means,  # [P, Hkv, D / 2]
    means_scale,  # [P, Hkv, 2]
    channel_order,  # [Hkv, D] or None
    k_center,  # [Hkv, D] or None
    page_table,  # [B, M]
    seq_lens,  # [B]
    positions,  # [B, T] or None
    k_page,
    k_head,
    rows_page,
    rows_head,
    scale_page,
    scale_head,
    tokens,
    num_pages,
    max_pages,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid (B * Hkv * T)."""
    head, page, live_tokens, mine = _touched_page(positions, seq_lens, page_table, tokens, num_pages, max_pages, KV_HEADS, PAGE)
    if mine:
        byte = tl.arange(0, HALF_PAD)
        in_row = byte < HEAD_DIM // 2
        even = 2 * byte
        odd = even + 1
        if channel_order is not None:
            even = tl.load(channel_order + head * HEAD_DIM + even, mask=in_row, other=0)
            odd = tl.load(channel_order + head * HEAD_DIM + odd, mask=in_row, other=0)
        even_mean = tl.zeros([HALF_PAD], tl.float32)
        odd_mean = tl.zeros([HALF_PAD], tl.float32)
        live_tokens = tl.minimum(live_tokens, PAGE)
        # Slot by slot, as every backend adds them.
        for s in range(live_tokens):
            row = k_cache + page * k_page + head * k_head + s * HEAD_DIM
            even_mean += _key(row + even, in_row, k_descale, k_shift, head, head * HEAD_DIM + even, in_row)
            odd_mean += _key(row + odd, in_row, k_descale, k_shift, head, head * HEAD_DIM + odd, in_row)
        number = tl.full([HALF_PAD], 1.0, tl.float32) * tl.maximum(live_tokens, 1).to(tl.float32)
        even_mean = tl.div_rn(even_mean, number)
        odd_mean = tl.div_rn(odd_mean, number)
        if k_center is not None:
            even_mean -= tl.load(k_center + head * HEAD_DIM + even, mask=in_row, other=0.0)
            odd_mean -= tl.load(k_center + head * HEAD_DIM + odd, mask=in_row, other=0.0)
        low = tl.min(tl.where(in_row, tl.minimum(even_mean, odd_mean), INF), 0, keep_dims=True)
        high = tl.max(tl.where(in_row, tl.maximum(even_mean, odd_mean), -INF), 0, keep_dims=True)
        nan = tl.max(((even_mean != even_mean) | (odd_mean != odd_mean)).to(tl.int32), 0, keep_dims=True) > 0
        scale, zero = _stored_range(means_scale + page * scale_page + head * scale_head, low, high, nan, 15)
        codes = _codes(even_mean, zero, scale, 15) | (_codes(odd_mean, zero, scale, 15) << 4)
        tl.store(page_means + page * rows_page + head * rows_head + byte, codes, mask=in_row)


def append_kv(
    k: Tensor,
    v: Tensor,
    kv: KV,
    paging: Paging,
    positions: Tensor | None,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    means: PageMeans | None,
    scales: Scales | None = None,
) -> None:
    batch, tokens = k.shape[:2]
    num_pages, kv_heads, page_size, head_dim = kv.k_cache.shape
    max_pages = paging.page_table.shape[1]
    if batch * max_pages * num_pages == 0:
        return
    launch = WRITE[1 if tokens == 1 else 16]
    pages, scales = stored_pages(kv), scales or Scales()
    keys = (pages[0], scales.k_descale, scales.k_shift)
    write_tokens_kernel[(batch * kv_heads, cdiv(tokens, launch.block))](
        k,
        v,
        *pages,
        *(shadow or (None,) * len(Shadow._fields)),
        *scales,
        *paging,
        positions,
        *k.stride()[:3],
        *v.stride()[:3],
        *page_strides(*kv, *((None, None) if shadow is None else shadow[:2])),
        tokens,
        num_pages,
        max_pages,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF_PAD=next_power_of_2(head_dim // 2),
        PAGE=page_size,
        BLOCK=launch.block,
        **launch.options,
    )
    if bounds is not None:
        page_bounds_kernel[(batch * kv_heads * tokens,)](
            *keys,
            *bounds,
            *paging,
            positions,
            *page_strides(kv.k_cache, *bounds),
            tokens,
            num_pages,
            max_pages,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            DIM_PAD=next_power_of_2(head_dim),
            PAGE=page_size,
            num_warps=2,
        )
    if means is not None:
        page_means_kernel[(batch * kv_heads * tokens,)](
            *keys,
            *means,
            *((None, None) if shadow is None else (shadow.channel_order, shadow.k_center)),
            *paging,
            positions,
            *page_strides(kv.k_cache, *means),
            tokens,
            num_pages,
            max_pages,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HALF_PAD=next_power_of_2(head_dim // 2),
            PAGE=page_size,
            num_warps=1,
        )
