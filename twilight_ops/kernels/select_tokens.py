"""Triton kernels of twilight::select_tokens: prefix logits of every token, then the ranking."""

import torch
from torch import Tensor

from ..capacity import Limits
from ..ops.select_tokens import check_select_tokens
from ._rank import rank
from ._shadow_logits import shadow_logits


def run_select_tokens(
    q: Tensor,
    shadow: tuple[Tensor, Tensor, Tensor, Tensor],
    page_table: Tensor,
    seq_lens: Tensor,
    budget: tuple[Limits, float, Tensor | None],
    sm_scale: float,
    indices: Tensor,
    counts: Tensor,
    dense_below: int = -1,
    pad: bool = True,
) -> None:
    """Fills `indices` and `counts`; `budget` is (limits, budget_fraction, head_token_budget)."""
    limits, budget_fraction, head_token_budget = budget
    page_size, max_pages = shadow[1].shape[2], page_table.shape[1]
    logits = q.new_empty((*q.shape[:3], max_pages * page_size), dtype=torch.float32)
    peaks, sums, chunk = shadow_logits(
        q, *shadow, page_table, seq_lens, None, None, 1, sm_scale, logits, prefix=True, dense_below=dense_below
    )
    rank(
        logits,
        peaks,
        sums,
        chunk,
        max_pages * page_size,
        seq_lens,
        head_token_budget,
        indices,
        counts,
        max_pages,
        page_size,
        1,
        limits,
        budget_fraction,
        dense_below,
        pad,
    )


def select_tokens(
    q: Tensor,
    k_quant: Tensor,
    k_scale: Tensor,
    channel_order: Tensor,
    prefix_channels: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    token_budget: int,
    budget_fraction: float,
    sm_scale: float,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    head_token_budget: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shadow = (k_quant, k_scale, channel_order, prefix_channels)
    indices, counts = check_select_tokens(
        q, *shadow, page_table, seq_lens, token_budget, budget_fraction, sm_scale, sink_tokens, recent_tokens, head_token_budget
    )
    limits = Limits.clamped(page_table.shape[1] * k_scale.shape[2], q.shape[1], token_budget, sink_tokens, recent_tokens)
    budget = (limits, budget_fraction, head_token_budget)
    run_select_tokens(q, shadow, page_table, seq_lens, budget, sm_scale, indices, counts)
    return indices, counts
