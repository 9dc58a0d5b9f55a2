"""twilight::prune_top_p: the smallest set of candidates whose estimated weight reaches p."""

import torch
from torch import Tensor

from ._checks import Checker
from ._library import call, define

SCHEMA = (
    "prune_top_p(Tensor weights, Tensor seq_lens, Tensor? indices, Tensor? counts, int tokens_per_index, int num_kv_heads, "
    "float top_p, Tensor? top_p_per_head=None, int sink_tokens=0, int recent_tokens=0) "
    "-> (Tensor indices, Tensor counts, Tensor mass)"
)


def check_prune_top_p(
    weights: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    num_kv_heads: int,
    top_p: float,
    top_p_per_head: Tensor | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Raises RuntimeError on the first malformed argument, else allocates the outputs: the fake."""
    c = Checker("prune_top_p", weights)
    c.tensor("weights", weights, ("B", "T", "Hq", "N"), torch.float32)
    batch, query_tokens, heads, slots = weights.shape
    c.require(query_tokens >= 1, "weights", "at least 1 query token", query_tokens)
    c.at_least("num_kv_heads", num_kv_heads, 1)
    c.require(heads >= 1 and heads % num_kv_heads == 0, "num_kv_heads", f"a divisor of num_qo_heads = {heads}", num_kv_heads)
    c.sizes["Hkv"] = num_kv_heads
    c.tensor("seq_lens", seq_lens, ("B",), torch.int32)
    c.candidates(indices, counts, tokens_per_index, None)
    if indices is not None:
        c.require(
            indices.shape[2] * tokens_per_index == slots,
            "weights",
            f"C * tokens_per_index = {indices.shape[2] * tokens_per_index} slots a row",
            slots,
        )
    c.top_p(top_p, top_p_per_head)
    c.at_least("sink_tokens", sink_tokens, 0)
    c.at_least("recent_tokens", recent_tokens, 0)
    c.no_gradients()
    return (
        weights.new_empty((batch, num_kv_heads, slots), dtype=torch.int32),
        weights.new_empty((batch, num_kv_heads), dtype=torch.int32),
        weights.new_empty((batch, query_tokens, heads)),
    )


define(SCHEMA, check_prune_top_p)


def prune_top_p(
    weights: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    num_kv_heads: int,
    top_p: float,
    top_p_per_head: Tensor | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps, per query head, the smallest set of tokens with mass >= p, then the union over each KV head's group.

    Mass is counted in integers, `mass(w) = trunc(w * 2**40)`, so that every backend adds up the same number in any order:
    `need = max(1, ceil(p * sum mass))` in float64; the threshold is the largest weight t with `sum of mass(w), w >= t` reaching
    `need`; every token with `w >= t` is kept, ties included. p = 1 keeps every live candidate. So does a row with a NaN weight, or with
    no mass at all. Candidates among the first `sink_tokens` and the newest `max(recent_tokens, T)` positions of a sequence are kept
    whatever their weight: no call loses the newest token.

    Args:
        weights: [B, T, Hq, N] fp32 in 0..1, as `estimate_weights` returns; larger values count as 1, negative as 0.
        seq_lens: [B] int32; slots at or beyond it are not live, below 0 counts as 0.
        indices, counts: the candidates the slots stand for (slot `c * tokens_per_index + s`); both None: slot n is token n.
        tokens_per_index: 1 for token lists, page_size for page lists.
        sink_tokens, recent_tokens: >= 0, tokens.
        num_kv_heads: Hkv; query heads h * G .. h * G + G - 1 share KV head h.
        top_p: 0 < p <= 1, where top_p_per_head is None.
        top_p_per_head: [B or 1, Hq or 1] fp32 on the device; not checked without a synchronisation, so values outside
            (0, 1] act as the nearest end and NaN as 1.

    Returns:
        indices [B, Hkv, N] int32 positions, ascending, unique, -1 pads; counts [B, Hkv] int32;
        mass [B, T, Hq] fp32, the share of the row's mass in the row's own set (1 where all is kept, 0 for an empty row).

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Twilight, arXiv 2502.02770, algorithm 1 (binary search), made exact.
    """
    return call(
        torch.ops.twilight.prune_top_p.default,
        weights,
        seq_lens,
        indices,
        counts,
        tokens_per_index,
        num_kv_heads,
        top_p,
        top_p_per_head,
        sink_tokens,
        recent_tokens,
    )
