"""twilight::select_tokens: scores every token with the leading channels of the 4-bit K shadow."""

import torch
from torch import Tensor

from ..capacity import token_capacity
from ._checks import Checker
from ._library import call, define

SCHEMA = (
    "select_tokens(Tensor q, Tensor k_quant, Tensor k_scale, Tensor channel_order, Tensor prefix_channels, "
    "Tensor page_table, Tensor seq_lens, int token_budget, float budget_fraction, float sm_scale, "
    "int sink_tokens=0, int recent_tokens=0, Tensor? head_token_budget=None) -> (Tensor indices, Tensor counts)"
)


def check_select_tokens(
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
    """Raises RuntimeError on the first malformed argument, else allocates the outputs: the fake."""
    c = Checker("select_tokens", q)
    c.query(q)
    c.shadow(k_quant, k_scale, channel_order, prefix_channels)
    c.geometry()
    c.paging(page_table, seq_lens)
    c.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget)
    c.scale(sm_scale)
    c.no_gradients()
    capacity = token_capacity(page_table.shape[1], k_scale.shape[2], q.shape[1], token_budget, budget_fraction, sink_tokens, recent_tokens)
    batch, kv_heads = q.shape[0], k_scale.shape[1]
    return (
        q.new_empty((batch, kv_heads, capacity), dtype=torch.int32),
        q.new_empty((batch, kv_heads), dtype=torch.int32),
    )


define(SCHEMA, check_select_tokens)


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
    """Selects the tokens whose prefix score is largest, one ascending list a KV head.

    `score[token] = sum over the group's heads and query tokens of softmax over tokens(sm_scale * sum_{j < r} q_{o(j)} k'_{o(j)})`, where
    k' is the dequantised shadow, o = channel_order[h] and r = prefix_channels[h]: only the page's leading prefix block is read.
    The best `budget` tokens are taken, ties to the lower position, where
    `budget = head_token_budget[h]` if given, else `max(token_budget, ceil(budget_fraction * seq_len))`.
    The first `sink_tokens` and the newest `max(recent_tokens, T)` tokens are always taken, first. A token whose score is
    NaN or +inf ranks above all others.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        k_quant, k_scale, channel_order, prefix_channels: the shadow, as `append_kv` writes it.
        page_table: [B, M] int32, M * S at most 2**29; a live entry outside 0..P-1 reads some valid page.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
        token_budget: tokens, >= 1. budget_fraction: of the live length, 0..1. sink_tokens, recent_tokens: >= 0. Any of the three may be
            larger than the table and then means all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        head_token_budget: [Hkv] int32 tokens, overrides the budget; clamped to the list's capacity, below 0 counts as 0.

    Returns:
        indices [B, Hkv, capacity] int32 positions, ascending, unique, -1 pads; counts [B, Hkv] int32.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: this package; heavy channels as in Double Sparsity, arXiv 2408.07092, read from the pruner's own shadow.
    """
    return call(
        torch.ops.twilight.select_tokens.default,
        q,
        k_quant,
        k_scale,
        channel_order,
        prefix_channels,
        page_table,
        seq_lens,
        token_budget,
        budget_fraction,
        sm_scale,
        sink_tokens,
        recent_tokens,
        head_token_budget,
    )
