"""twilight::append_kv: writes this step's K and V, their 4-bit shadow and the page bounds."""

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, Checker
from ._library import call, define

SCHEMA = (
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_quant, Tensor(d!)? k_scale, "
    "Tensor(e!)? page_bounds, Tensor(f!)? bounds_scale, Tensor? channel_order, Tensor? prefix_channels, "
    "Tensor page_table, Tensor seq_lens, Tensor? positions=None) -> ()"
)


def check_append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_quant: Tensor | None,
    k_scale: Tensor | None,
    page_bounds: Tensor | None,
    bounds_scale: Tensor | None,
    channel_order: Tensor | None,
    prefix_channels: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> None:
    """Raises RuntimeError on the first malformed argument; does nothing else, so it is also the fake."""
    c = Checker("append_kv", k)
    c.tensor("k", k, ("B", "T", "Hkv", "D"), FLOAT_DTYPES, contiguous=False)
    c.tensor("v", v, ("B", "T", "Hkv", "D"), k.dtype, contiguous=False)
    c.require(k.shape[1] >= 1, "k", "at least 1 token", k.shape[1])
    c.cache(k_cache, v_cache, k.dtype)
    c.geometry()
    c.paging(page_table, seq_lens)
    if any(t is not None for t in (k_quant, k_scale, channel_order, prefix_channels)):
        c.shadow(k_quant, k_scale, channel_order, prefix_channels)
    if page_bounds is not None:
        c.bounds(page_bounds, bounds_scale, k.dtype)
    else:
        c.require(bounds_scale is None, "bounds_scale", "None, because page_bounds is None", "a tensor")
    if positions is not None:
        c.tensor("positions", positions, ("B", "T"), torch.int32)
    c.no_gradients()


define(SCHEMA, check_append_kv)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_quant: Tensor | None,
    k_scale: Tensor | None,
    page_bounds: Tensor | None,
    bounds_scale: Tensor | None,
    channel_order: Tensor | None,
    prefix_channels: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
) -> None:
    """Appends T tokens a sequence to the paged cache, its 4-bit K shadow and its page bounds, in place.

    Token t of sequence b goes to position `positions[b, t]`, by default `seq_lens[b] - T + t`; a negative position skips
    the row, so a left-padded prompt needs no positions at all. The shadow of a token is
    `code = clamp(round((k - zero) / scale), 0, 15)` with `zero = bf16(min k)`, `scale = bf16((max k - min k) / 15)` over its D
    channels. Bounds of every page that receives a token are recomputed from the page's live tokens (position < seq_lens).

    Args:
        k, v: [B, T, Hkv, D], fp32 (CPU only), bf16 or fp16; any strides, last dimension contiguous. Any T >= 1.
        k_cache, v_cache: [P, Hkv, S, D], same dtype.
        k_quant: [P, Hkv, S * D / 2] uint8, two codes a byte, low nibble first, channels in `channel_order`. The leading
            `prefix_channels[h]` channels of all S tokens come first (token-major), then the other channels (token-major).
        k_scale: [P, Hkv, S, 2] bf16, (scale, zero). None together with k_quant, channel_order and prefix_channels: no shadow.
        page_bounds: [P, Hkv, 2, D] (min, max) in K's dtype, or uint8 codes, or None where Quest is not used.
        bounds_scale: [P, Hkv, 2] bf16 (scale, zero), exactly with uint8 bounds: bound = code * scale + zero.
        channel_order: [Hkv, D] int32, a permutation of 0..D-1 a head.
        prefix_channels: [Hkv] int32, multiples of 8 in 0..D.
        page_table: [B, M] int32, physical page of each logical page, -1 where none; M * S at most 2**29.
        seq_lens: [B] int32, tokens valid once this call is done; below 0 counts as 0.
        positions: [B, T] int32 or None; -1 skips the row.

    Rows whose position lies beyond M * S, or whose page is not in 0..P-1, are skipped.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward. Nothing was
            written.

    Source: Twilight, arXiv 2502.02770, section 4.2 (INT4 K cache); Quest, arXiv 2406.10774 (page bounds).
    """
    call(
        torch.ops.twilight.append_kv.default,
        k,
        v,
        k_cache,
        v_cache,
        k_quant,
        k_scale,
        page_bounds,
        bounds_scale,
        channel_order,
        prefix_channels,
        page_table,
        seq_lens,
        positions,
    )
