"""Reference of twilight::select_pages."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, PageBounds, PageMeans, Paging, Shadow
from ..capacity import Limits
from ._paging import compute_dtype, dequantise
from ._top_k import group_scores, row_budget, take_best


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
        codes = torch.stack([means.page_means & 15, means.page_means >> 4], dim=-1).flatten(-2)
        rows = dequantise(codes, means.means_scale, dtype)[pages]  # [B, M, Hkv, D]
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

    pages = torch.arange(max_pages, device=q.device)
    live = (pages * page_size < seq_lens[:, None])[:, None].expand(-1, kv_heads, -1)
    scores = group_scores(logits * sm_scale, live)

    newest = seq_lens[:, None] - limits.recent_tokens
    forced = (pages * page_size < limits.sink_tokens) | ((pages + 1) * page_size > newest)
    wanted = row_budget(seq_lens, kv_heads, limits, budget.head_token_budget)
    return take_best(scores, live, forced[:, None].expand_as(live), -(-wanted // page_size), limits.page_capacity(page_size))
