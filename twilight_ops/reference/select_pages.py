"""Reference of twilight::select_pages."""

import torch
from torch import Tensor

from ..capacity import Limits, page_capacity
from ._paging import compute_dtype, dequantise
from ._top_k import group_scores, row_budget, take_best


def select_pages(
    q: Tensor,
    page_bounds: Tensor,
    bounds_scale: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    token_budget: int,
    budget_fraction: float,
    sm_scale: float,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    head_token_budget: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads = page_bounds.shape[:2]
    max_pages = page_table.shape[1]
    dtype = compute_dtype(q)
    limits = Limits.clamped(max_pages * page_size, query_tokens, token_budget, sink_tokens, recent_tokens)
    seq_lens = seq_lens.long().clamp(0, max_pages * page_size)

    bounds = page_bounds.to(dtype)
    if bounds_scale is not None:
        bounds = dequantise(page_bounds.flatten(2), bounds_scale, dtype).view(page_bounds.shape)
    bounds = bounds[page_table.long().clamp(0, num_pages - 1)]  # [B, M, Hkv, 2, D]
    grouped = q.to(dtype).view(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
    low = torch.einsum("bthgd,bmhd->bthgm", grouped.clamp(max=0), bounds[..., 0, :])
    high = torch.einsum("bthgd,bmhd->bthgm", grouped.clamp(min=0), bounds[..., 1, :])

    pages = torch.arange(max_pages, device=q.device)
    live = (pages * page_size < seq_lens[:, None])[:, None].expand(-1, kv_heads, -1)
    scores = group_scores((low + high) * sm_scale, live)

    newest = seq_lens[:, None] - limits.recent_tokens
    forced = (pages * page_size < limits.sink_tokens) | ((pages + 1) * page_size > newest)
    budget = row_budget(seq_lens, kv_heads, limits.token_budget, budget_fraction, head_token_budget)
    capacity = page_capacity(max_pages, page_size, query_tokens, token_budget, budget_fraction, sink_tokens, recent_tokens)
    return take_best(scores, live, forced[:, None].expand_as(live), -(-budget // page_size), capacity)
