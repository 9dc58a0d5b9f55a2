"""twilight::decode_attention as Triton stages."""

import torch
from torch import Tensor

from ..capacity import Limits, page_capacity, token_capacity
from ..ops.decode_attention import check_decode_attention
from ._shadow_logits import shadow_logits
from .attend_sparse import run_attend
from .prune_top_p import thresholds, union
from .select_pages import run_select_pages
from .select_tokens import run_select_tokens


def _empty_lists(batch: int, kv_heads: int, capacity: int, like: Tensor) -> tuple[Tensor, Tensor]:
    indices = torch.empty((batch, kv_heads, capacity), dtype=torch.int32, device=like.device)
    return indices, indices.new_empty((batch, kv_heads))


def decode_attention(
    q: Tensor,
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
    selector: str,
    token_budget: int,
    budget_fraction: float,
    top_p: float,
    sm_scale: float,
    dense_below: int = 0,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    head_token_budget: Tensor | None = None,
    top_p_per_head: Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_counts: Tensor | None = None,
    tokens_per_candidate: int = 1,
    budget_counters: Tensor | None = None,
    kept_indices: Tensor | None = None,
    kept_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton stages; weights stay logits with their softmax statistics until the pruner has them, and lists carry no pads."""
    out, lse = check_decode_attention(
        q,
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
        selector,
        token_budget,
        budget_fraction,
        top_p,
        sm_scale,
        dense_below,
        sink_tokens,
        recent_tokens,
        head_token_budget,
        top_p_per_head,
        candidates,
        candidate_counts,
        tokens_per_candidate,
        budget_counters,
        kept_indices,
        kept_counts,
    )
    batch, query_tokens, heads, _ = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    max_pages = page_table.shape[1]
    max_tokens = max_pages * page_size
    shadow = (k_quant, k_scale, channel_order, prefix_channels)
    limits = Limits.clamped(max_tokens, query_tokens, token_budget, sink_tokens, recent_tokens, dense_below)
    dense_below = max_tokens if selector == "dense" else limits.dense_below
    geometry = (max_pages, page_size, query_tokens, token_budget, budget_fraction, sink_tokens, recent_tokens)
    budget = (limits, budget_fraction, head_token_budget)

    indices, counts, unit = candidates, candidate_counts, tokens_per_candidate
    if selector in ("dense", "full"):
        unit = 1
    elif selector == "quest":
        indices, counts = _empty_lists(batch, kv_heads, page_capacity(*geometry), q)
        unit = page_size
        run_select_pages(
            q, page_bounds, bounds_scale, page_table, seq_lens, page_size, budget, sm_scale, indices, counts, dense_below, pad=False
        )
    elif selector == "shadow_prefix":
        indices, counts = _empty_lists(batch, kv_heads, token_capacity(*geometry), q)
        unit = 1
        run_select_tokens(q, shadow, page_table, seq_lens, budget, sm_scale, indices, counts, dense_below, pad=False)

    capacity = max_tokens if indices is None else indices.shape[2] * unit
    keep = mass = None
    kept = (kept_indices, kept_counts)
    prunes = selector != "dense" and (top_p < 1.0 or top_p_per_head is not None)
    if prunes:
        logits = torch.empty((batch, query_tokens, heads, capacity), dtype=torch.float32, device=q.device)
        stats = shadow_logits(
            q, *shadow, page_table, seq_lens, indices, counts, unit, sm_scale, logits, prefix=False, dense_below=dense_below
        )
        mass = logits.new_empty((batch, query_tokens, heads))
        keep = thresholds(logits, stats, seq_lens, indices, counts, unit, kv_heads, top_p, top_p_per_head, mass, max_tokens, dense_below)
        if kept_indices is None:
            kept = _empty_lists(batch, kv_heads, capacity, q)
    if prunes or kept_indices is not None or budget_counters is not None:
        union(
            keep,
            mass,
            q.shape[:3],
            seq_lens,
            indices,
            counts,
            unit,
            kv_heads,
            capacity,
            max_tokens,
            limits,
            *kept,
            budget_counters,
            dense_below,
            fill_dense=kept_indices is not None,
            pad=kept_indices is not None,
        )
    if prunes:
        indices, counts, unit = *kept, 1
    run_attend(q, k_cache, v_cache, page_table, seq_lens, indices, counts, unit, sm_scale, out, lse, dense_below)
    return out, lse
