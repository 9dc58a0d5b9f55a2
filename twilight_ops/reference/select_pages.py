"""Reference of twilight::select_pages."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, PageBounds, PageMeans, Paging, Shadow
from ..capacity import Limits
from ._paging import compute_dtype, dequantise, unpack_means
from ._top_k import best_pages, row_budget


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
    page_table, seq_lens = paging
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads = (means or bounds)[0].shape[:2]
    max_pages = page_table.shape[1]
    dtype = compute_dtype(q)
    limits = Limits.of(max_pages * page_size, query_tokens, budget, always)
    seq_lens = seq_lens.long().clamp(0, max_pages * page_size)

    pages = page_table.long().clamp(0, num_pages - 1)
    grouped = q.to(dtype).view(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
    if means is not None:
        rows = dequantise(unpack_means(means.page_means), means.means_scale, dtype)[pages]  # [B, M, Hkv, D]
        if shadow is not None:
            grouped = grouped.gather(-1, shadow.channel_order.long()[:, None].expand_as(grouped))
        logits = torch.einsum("bthgd,bmhd->bthgm", grouped, rows)
    else:
        page_bounds, bounds_scale = bounds
        extremes = page_bounds.to(dtype)
        if bounds_scale is not None:
            extremes = dequantise(page_bounds.flatten(2), bounds_scale, dtype).view(page_bounds.shape)
        extremes = extremes[pages]  # [B, M, Hkv, 2, D]
        logits = torch.einsum("bthgd,bmhd->bthgm", grouped.clamp(max=0), extremes[..., 0, :])
        logits = logits + torch.einsum("bthgd,bmhd->bthgm", grouped.clamp(min=0), extremes[..., 1, :])

    wanted = -(-row_budget(seq_lens, kv_heads, limits, budget.head_token_budget) // page_size)
    return best_pages(logits * sm_scale, seq_lens, page_size, limits, wanted, limits.page_capacity(page_size))
