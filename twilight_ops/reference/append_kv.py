"""Reference of twilight::append_kv."""

import torch
from torch import Tensor

from ..arguments import KV, PageBounds, Paging, Shadow
from ._paging import pack_shadow, quantise, unpack_shadow


def append_kv(
    k: Tensor, v: Tensor, kv: KV, paging: Paging, positions: Tensor | None, shadow: Shadow | None, bounds: PageBounds | None
) -> None:
    """Writes row by row of (sequence, token), then recomputes the bounds of every touched page."""
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
    k_cache[page, :, offset] = k[b, t]
    v_cache[page, :, offset] = v[b, t]

    if shadow is not None:
        k_quant, k_scale, channel_order, prefix_channels, k_center = shadow
        centred = k[b, t] if k_center is None else k[b, t].float() - k_center
        ordered = centred.gather(-1, channel_order.long().expand(len(b), -1, -1))
        codes, scale = quantise(ordered, 15)
        k_scale[page, :, offset] = scale
        touched, row = page.unique(return_inverse=True)
        block = unpack_shadow(k_quant[touched], prefix_channels, page_size)
        block[row, :, offset] = codes
        k_quant[touched] = pack_shadow(block, prefix_channels)

    if bounds is not None:
        page_bounds, bounds_scale = bounds
        pairs = torch.stack([b, logical[b, t]], dim=1).unique(dim=0)
        b, logical_page = pairs[:, 0], pairs[:, 1]
        page = page_table.long()[b, logical_page]
        live = seq_lens[b, None] > logical_page[:, None] * page_size + torch.arange(page_size, device=k.device)
        live = live[:, None, :, None]
        keys = k_cache[page]  # [touched, Hkv, S, D]
        low = torch.where(live, keys, torch.inf).amin(2)
        high = torch.where(live, keys, -torch.inf).amax(2)
        has_live = live.any(2)
        extremes = torch.stack([torch.where(has_live, low, 0.0), torch.where(has_live, high, 0.0)], dim=2).to(k.dtype)
        if page_bounds.dtype == torch.uint8:
            codes, scale = quantise(extremes.flatten(2), 255)
            page_bounds[page] = codes.view(-1, kv_heads, 2, head_dim)
            bounds_scale[page] = scale
        else:
            page_bounds[page] = extremes
