"""twilight::select_pages: Quest's page selector, from the element-wise bounds of each page's keys."""

import torch
from torch import Tensor

from ..capacity import page_capacity
from ._checks import Checker
from ._library import call, define

SCHEMA = (
    "select_pages(Tensor q, Tensor page_bounds, Tensor? bounds_scale, Tensor page_table, Tensor seq_lens, int page_size, "
    "int token_budget, float budget_fraction, float sm_scale, int sink_tokens=0, int recent_tokens=0, "
    "Tensor? head_token_budget=None) -> (Tensor indices, Tensor counts)"
)


def check_select_pages(
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
    """Raises RuntimeError on the first malformed argument, else allocates the outputs: the fake."""
    c = Checker("select_pages", q)
    c.query(q)
    c.bounds(page_bounds, bounds_scale, q.dtype)
    c.sizes["S"] = page_size
    c.geometry()
    c.paging(page_table, seq_lens)
    c.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget)
    c.scale(sm_scale)
    c.no_gradients()
    capacity = page_capacity(page_table.shape[1], page_size, q.shape[1], token_budget, budget_fraction, sink_tokens, recent_tokens)
    batch, kv_heads = q.shape[0], page_bounds.shape[1]
    return (
        q.new_empty((batch, kv_heads, capacity), dtype=torch.int32),
        q.new_empty((batch, kv_heads), dtype=torch.int32),
    )


define(SCHEMA, check_select_pages)


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
    """Selects the pages whose bounds promise the largest attention weight, one ascending list a KV head.

    `score[page] = sum over the group's heads and query tokens of softmax over pages(sm_scale * sum_d max(q_d min_d, q_d max_d))`.
    The best `ceil(budget / page_size)` pages are taken, ties to the lower page, where
    `budget = head_token_budget[h]` if given, else `max(token_budget, ceil(budget_fraction * seq_len))`.
    Pages of the first `sink_tokens` and of the newest `max(recent_tokens, T)` tokens are always taken, first. A page whose
    score is NaN or +inf ranks above all others.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        page_bounds: [P, Hkv, 2, D] in q's dtype, or uint8 with bounds_scale [P, Hkv, 2] bf16.
        page_table: [B, M] int32, M * S at most 2**29; a live entry outside 0..P-1 reads some valid page.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
        page_size: S, tokens.
        token_budget: tokens, >= 1. budget_fraction: of the live length, 0..1. sink_tokens, recent_tokens: >= 0. Any of the three may be
            larger than the table and then means all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        head_token_budget: [Hkv] int32 tokens, overrides the budget; clamped to the list's capacity, below 0 counts as 0.

    Returns:
        indices [B, Hkv, capacity] int32 logical pages, ascending, unique, -1 pads; counts [B, Hkv] int32.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Quest, arXiv 2406.10774; sums of softmaxed bounds over the group instead of per-head lists.
    """
    return call(
        torch.ops.twilight.select_pages.default,
        q,
        page_bounds,
        bounds_scale,
        page_table,
        seq_lens,
        page_size,
        token_budget,
        budget_fraction,
        sm_scale,
        sink_tokens,
        recent_tokens,
        head_token_budget,
    )
