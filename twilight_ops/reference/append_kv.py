"""Reference of twilight::append_kv."""

import torch
from torch import Tensor

from ..arguments import FP8, FP8_MAX, KV, PageBounds, PageMeans, Paging, Scales, Shadow
from ._paging import pack_codes, pack_shadow, quantise, unpack_shadow


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
    """Writes row by row of (sequence, token), then recomputes bounds and mean of every touched page."""
    (k_cache, v_cache), (page_table, seq_lens) = kv, paging
    tokens = k.shape[1]
    num_pages, kv_heads, page_size, head_dim = k_cache.shape
    max_pages = page_table.shape[1]
    if positions is None:
        positions = seq_lens.long()[:, None] - tokens + torch.arange(tokens, device=k.device)
    positions = positions.long()
    logical = positions.clamp(min=0) // page_size
    inside = (positions >= 0) & (logical < max_pages)
    physical = page_table.long().gather(1, logical.clamp(max=max_pages - 1))
    inside &= (physical >= 0) & (physical < num_pages)
    slot = positions % page_size

    b, t = inside.nonzero(as_tuple=True)
    page, offset = physical[b, t], slot[b, t]  # one entry a written row
    scales = scales or Scales()
    k_cache[page, :, offset] = _stored(k[b, t], scales.k_descale, scales.k_shift, k_cache.dtype)
    v_cache[page, :, offset] = _stored(v[b, t], scales.v_descale, None, v_cache.dtype)

    if shadow is not None:
        k_quant, k_scale, _, prefix_channels, _ = shadow
        codes, scale = _coded(k[b, t], shadow)
        k_scale[page, :, offset] = scale
        touched, row = page.unique(return_inverse=True)
        block = unpack_shadow(k_quant[touched], prefix_channels, page_size)
        block[row, :, offset] = codes
        k_quant[touched] = pack_shadow(block, prefix_channels)

    if bounds is not None or means is not None:
        pairs = torch.stack([b, logical[b, t]], dim=1).unique(dim=0)
        b, logical_page = pairs[:, 0], pairs[:, 1]
        page = page_table.long()[b, logical_page]
        live = seq_lens[b, None] > logical_page[:, None] * page_size + torch.arange(page_size, device=k.device)
        live = live[:, None, :, None]
        keys = scales.keys(k_cache[page], torch.float32) if kv.is_fp8 else k_cache[page]  # [touched, Hkv, S, D]
    if bounds is not None:
        page_bounds, bounds_scale = bounds
        low = torch.where(live, keys, torch.inf).amin(2)
        high = torch.where(live, keys, -torch.inf).amax(2)
        has_live = live.any(2)
        extremes = torch.stack([torch.where(has_live, low, 0.0), torch.where(has_live, high, 0.0)], dim=2)
        if page_bounds.dtype == torch.uint8:
            codes, scale = quantise(extremes.flatten(2), 255)
            page_bounds[page] = codes.view(-1, kv_heads, 2, head_dim)
            bounds_scale[page] = scale
        else:
            page_bounds[page] = extremes.to(k.dtype)
    if means is not None:
        page_means, means_scale = means
        total = torch.zeros(len(page), kv_heads, head_dim, device=k.device)
        for offset in range(page_size):  # in the order of the slots, so that every backend rounds alike
            total += torch.where(live[:, :, offset], keys[:, :, offset].float(), 0.0)
        codes, means_scale[page] = _coded(total / live.sum(2).clamp(min=1), shadow)
        page_means[page] = pack_codes(codes)


def _stored(x: Tensor, descale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows [N, Hkv, D] as a cache of `dtype` holds them."""
    if dtype != FP8:
        return x
    x = x.float() if shift is None else x.float() - shift
    x = x if descale is None else x / descale[:, None]
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype)


def _coded(x: Tensor, shadow: Shadow | None) -> tuple[Tensor, Tensor]:
    """4-bit codes and scale of keys, or of means of them, [N, Hkv, D], as the shadow has them; without one channels stay in order."""
    if shadow is not None:
        x = x if shadow.k_center is None else x.float() - shadow.k_center
        x = x.gather(-1, shadow.channel_order.long().expand(len(x), -1, -1))
    return quantise(x, 15)
