"""twilight::append_kv: writes this step's K and V, their 4-bit shadow, and bounds and means of their pages."""

import torch
from torch import Tensor

from ..arguments import KV, PageBounds, PageMeans, Paging, Scales, Shadow
from ._checks import FLOAT_DTYPES, Checker
from ._library import Operator


def append_kv(
    k: Tensor,
    v: Tensor,
    kv: KV,
    paging: Paging,
    positions: Tensor | None = None,
    shadow: Shadow | None = None,
    bounds: PageBounds | None = None,
    means: PageMeans | None = None,
    scales: Scales | None = None,
) -> None:
    """Appends T tokens a sequence to the paged cache, its 4-bit K shadow, its page bounds and its page means, in place.

    Token t of sequence b goes to position `positions[b, t]`, by default `seq_lens[b] - T + t`; a negative position skips
    the row, so a left-padded prompt needs no positions at all. The shadow of a token is
    `code = clamp(round((x - zero) / scale), 0, 15)` with `x = k - k_center`, `zero = bf16(min x)`, `scale = bf16((max x - min x) / 15)`
    over its D channels. Bounds and mean of every page that receives a token are recomputed from the page's live tokens (position <
    seq_lens). A mean is their fp32 sum, in the order of the slots, over their number, coded as a row of the shadow is.

    Args:
        k, v: [B, T, Hkv, D], fp32 (CPU only), bf16 or fp16; any strides, last dimension contiguous. Any T >= 1.
        kv: of k's dtype or float8_e4m3fn.
        paging: `seq_lens` counts what is valid once this call is done; a page of -1 is none.
        positions: [B, T] int32 or None; -1 skips the row.
        shadow: None where nothing is pruned.
        bounds: None where Quest is not used.
        means: None where PageMean is not used.
        scales: of a cache in float8_e4m3fn, which stores `(k - k_shift) / k_descale` and `v / v_descale`, rounded to the nearest of its
            numbers: what is larger than 448 becomes 448, NaN stays NaN. The shadow is of k as given, bounds and means of what is stored.

    Rows whose position lies beyond M * S, or whose page is not in 0..P-1, are skipped.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward. Nothing was
            written.

    Source: Twilight, arXiv 2502.02770, section 4.2 (INT4 K cache); Quest, arXiv 2406.10774 (page bounds).
    """
    OPERATOR(k, v, kv, paging, positions, shadow, bounds, means, scales)


def check(
    k: Tensor,
    v: Tensor,
    kv: KV,
    paging: Paging,
    positions: Tensor | None,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    means: PageMeans | None,
    scales: Scales | None,
) -> None:
    c = Checker("append_kv", k)
    c.tensor("k", k, ("B", "T", "Hkv", "D"), FLOAT_DTYPES, layout="rows")
    c.tensor("v", v, ("B", "T", "Hkv", "D"), k.dtype, layout="rows")
    c.require(k.shape[1] >= 1, "k", "at least 1 token", k.shape[1])
    c.cache(kv, k.dtype)
    c.geometry()
    c.paging(paging)
    if shadow is not None:
        c.shadow(shadow)
    c.bounds(bounds, k.dtype)
    c.means(means)
    c.scales(scales, kv)
    if positions is not None:
        c.tensor("positions", positions, ("B", "T"), torch.int32)
    c.no_gradients()


OPERATOR = Operator(
    append_kv,
    "()",
    check,
    outputs=lambda *_: None,
    mutates=("k_cache", "v_cache", "k_quant", "k_scale", "page_bounds", "bounds_scale", "page_means", "means_scale"),
)
