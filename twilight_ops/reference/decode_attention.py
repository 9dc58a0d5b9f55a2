"""Reference of twilight::decode_attention: the stages' references in turn."""

import torch
from torch import Tensor

from ..capacity import (
    COUNTER_CANDIDATES,
    COUNTER_DENSE,
    COUNTER_HEADER,
    COUNTER_KEPT,
    COUNTER_LIVE,
    COUNTER_MASS,
    COUNTER_ROWS,
    HISTOGRAM_BINS,
    Limits,
)
from ._paging import all_tokens, candidate_tokens
from .attend_sparse import attend_sparse
from .estimate_weights import estimate_weights
from .prune_top_p import prune_top_p
from .select_pages import select_pages
from .select_tokens import select_tokens


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
    batch, query_tokens, heads, _ = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    max_tokens = page_table.shape[1] * page_size
    limits = Limits.clamped(max_tokens, query_tokens, token_budget, sink_tokens, recent_tokens, dense_below)
    seq_lens = seq_lens.clamp(0, max_tokens)

    indices, counts, unit = candidates, candidate_counts, tokens_per_candidate
    if selector in ("dense", "full"):
        indices, counts, unit = None, None, 1
    budget = (limits.token_budget, budget_fraction, sm_scale, limits.sink_tokens, limits.recent_tokens, head_token_budget)
    shadow = (k_quant, k_scale, channel_order, prefix_channels)
    if selector == "quest":
        indices, counts = select_pages(q, page_bounds, bounds_scale, page_table, seq_lens, page_size, *budget)
        unit = page_size
    elif selector == "shadow_prefix":
        indices, counts = select_tokens(q, *shadow, page_table, seq_lens, *budget)
        unit = 1

    every = all_tokens(page_table, kv_heads, page_size)
    dense = (seq_lens <= (max_tokens if selector == "dense" else limits.dense_below))[:, None]  # [B, 1]
    tokens, live = candidate_tokens(indices, counts, unit, every, seq_lens)
    candidate_count = torch.where(dense, seq_lens[:, None], live.sum(-1))  # I0, [B, Hkv]

    prunes = selector != "dense" and (top_p < 1.0 or top_p_per_head is not None)
    if prunes:
        weights = estimate_weights(q, *shadow, page_table, seq_lens, indices, counts, unit, sm_scale).float()
        indices, counts, mass = prune_top_p(
            weights, seq_lens, indices, counts, unit, kv_heads, top_p, top_p_per_head, limits.sink_tokens, limits.recent_tokens
        )
        unit = 1
        tokens, live = candidate_tokens(indices, counts, unit, every, seq_lens)
        mass = mass.view(batch, query_tokens, kv_heads, -1).double().mean(dim=(1, 3))
        mass = torch.where(dense, 1.0, mass)
    else:
        mass = torch.ones(batch, kv_heads, dtype=torch.float64, device=q.device)
    out, lse = attend_sparse(q, k_cache, v_cache, page_table, seq_lens, indices, counts, unit, sm_scale)
    if selector != "dense" and limits.dense_below > 0:
        dense_out, dense_lse = attend_sparse(q, k_cache, v_cache, page_table, seq_lens, None, None, 1, sm_scale)
        out = torch.where(dense[:, :, None, None], dense_out, out)
        lse = torch.where(dense[:, :, None], dense_lse, lse)

    kept_count = torch.where(dense, seq_lens[:, None], live.sum(-1))  # I1, [B, Hkv]
    if kept_indices is not None:
        kept_indices.fill_(-1)
        listed = torch.where(live, tokens, every.shape[-1]).sort(dim=-1).values
        listed = torch.where(listed == every.shape[-1], -1, listed).int()[..., : every.shape[-1]]
        kept_indices[..., : listed.shape[-1]] = listed
        everything = torch.where(every < seq_lens[:, None, None], every, -1).int()
        kept_indices.copy_(torch.where(dense[..., None], everything, kept_indices))
        kept_counts.copy_(kept_count)
    if budget_counters is not None:
        _count(budget_counters, seq_lens, candidate_count, kept_count, mass, dense)
    return out, lse


def _count(budget_counters: Tensor, seq_lens: Tensor, candidates: Tensor, kept: Tensor, mass: Tensor, dense: Tensor) -> None:
    """Adds one entry a (sequence, KV head) with live tokens."""
    live = (seq_lens > 0)[:, None].expand_as(kept)
    columns = {
        COUNTER_ROWS: torch.ones_like(kept),
        COUNTER_LIVE: seq_lens[:, None].expand_as(kept),
        COUNTER_CANDIDATES: candidates,
        COUNTER_KEPT: kept,
        COUNTER_MASS: (mass * 2**20).round().long(),
        COUNTER_DENSE: dense.expand_as(kept),
    }
    for column, values in columns.items():
        budget_counters[:, column] += (values * live).sum(0)
    for start, values in ((COUNTER_HEADER, candidates), (COUNTER_HEADER + HISTOGRAM_BINS, kept)):
        bins = _histogram_bin(values.long())
        budget_counters.scatter_add_(1, (start + bins).t().contiguous(), live.long().t().contiguous())


def _histogram_bin(tokens: Tensor) -> Tensor:
    """Itself below 16, then eight bins an octave."""
    octave = tokens.clamp(min=16).double().frexp().exponent.long() - 1  # exact, unlike log2 on a GPU
    wide = 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7)
    return torch.where(tokens < 16, tokens, wide).clamp(max=HISTOGRAM_BINS - 1)
