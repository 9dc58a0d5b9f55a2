"""twilight::estimate_weights: attention weights of the candidates, estimated from the 4-bit K shadow."""

import torch
from torch import Tensor

from ._checks import Checker
from ._library import call, define

SCHEMA = (
    "estimate_weights(Tensor q, Tensor k_quant, Tensor k_scale, Tensor channel_order, Tensor prefix_channels, "
    "Tensor page_table, Tensor seq_lens, Tensor? indices, Tensor? counts, int tokens_per_index, float sm_scale) -> Tensor"
)


def check_estimate_weights(
    q: Tensor,
    k_quant: Tensor,
    k_scale: Tensor,
    channel_order: Tensor,
    prefix_channels: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    sm_scale: float,
) -> Tensor:
    """Raises RuntimeError on the first malformed argument, else allocates the output: the fake."""
    c = Checker("estimate_weights", q)
    c.query(q)
    c.shadow(k_quant, k_scale, channel_order, prefix_channels)
    c.geometry()
    c.paging(page_table, seq_lens)
    page_size = k_scale.shape[2]
    c.candidates(indices, counts, tokens_per_index, page_size)
    c.scale(sm_scale)
    c.no_gradients()
    slots = page_table.shape[1] * page_size if indices is None else indices.shape[2] * tokens_per_index
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], slots), dtype=torch.float32)


define(SCHEMA, check_estimate_weights)


def estimate_weights(
    q: Tensor,
    k_quant: Tensor,
    k_scale: Tensor,
    channel_order: Tensor,
    prefix_channels: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    sm_scale: float,
) -> Tensor:
    """Softmax over the candidates of `sm_scale * q . dequant(k_quant)`, per query head.

    Slot `c * tokens_per_index + s` of a row stands for token `indices[b, h, c] * tokens_per_index + s`. A slot beyond the list, beyond
    seq_lens, or (T > 1) newer than query token t, whose own position is `seq_lens[b] - T + t`, gets weight 0.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        k_quant, k_scale, channel_order, prefix_channels: the shadow, as `append_kv` writes it.
        page_table: [B, M] int32, M * S at most 2**29; a live entry outside 0..P-1 reads some valid page.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
        indices, counts: [B, Hkv, C], [B, Hkv] int32 candidates of a selector; both None: every token.
        tokens_per_index: 1 for token lists, page_size for page lists.
        sm_scale: factor on q . k, usually D ** -0.5.

    Returns:
        weights [B, T, Hq, C * tokens_per_index] fp32 (or M * S slots where indices is None), each row summing to 1, or all 0
        where nothing is live, or NaN throughout its live slots where a logit is NaN or +inf.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Twilight, arXiv 2502.02770, section 4.2.
    """
    return call(
        torch.ops.twilight.estimate_weights.default,
        q,
        k_quant,
        k_scale,
        channel_order,
        prefix_channels,
        page_table,
        seq_lens,
        indices,
        counts,
        tokens_per_index,
        sm_scale,
    )
