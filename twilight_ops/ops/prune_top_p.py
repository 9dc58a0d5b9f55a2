"""twilight::prune_top_p: the candidates of most estimated weight that reach p together."""

import torch
from torch import Tensor

from ..arguments import Always, Candidates, Pruning
from ._checks import Checker
from ._library import Operator, empty_lists


def prune_top_p(
    weights: Tensor, seq_lens: Tensor, candidates: Candidates, num_kv_heads: int, pruning: Pruning, always: Always = Always()
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps, per query head, the smallest number of whole bins of weights with mass >= p, then the union over each KV head's group.

    A weight's bin is its fp32 pattern without the last 18 bits: 32 bins an octave, each 2 to 3% wide. So equal weights stay together,
    and what is kept is the smallest set with mass >= p but for less than a bin. Mass is counted in integers,
    `mass(w) = trunc(w * 2**31)`, so that every backend adds up the same number in any order: `need = max(1, ceil(p * sum mass))` in
    float64, and bins are kept from the highest down until their mass reaches `need`. p = 1 keeps every live candidate. So does a row
    with a NaN weight, or with no mass at all. Candidates among the tokens of `always` are kept whatever their weight: no call loses
    the newest token.

    Args:
        weights: [B, T, Hq, N] fp32 in 0..1, as `estimate_weights` returns; larger values count as 1, negative as 0.
        seq_lens: [B] int32; slots at or beyond it are not live, below 0 counts as 0.
        candidates: what the slots stand for (slot `c * tokens_per_index + s`); by default slot n is token n.
        num_kv_heads: Hkv; query heads h * G .. h * G + G - 1 share KV head h.
        pruning: p.
        always: the first and newest tokens, which are always kept.

    Returns:
        indices [B, Hkv, N] int32 positions, ascending, unique, -1 pads; counts [B, Hkv] int32;
        mass [B, T, Hq] fp32, the share of the row's mass in the row's own set (1 where all is kept, 0 for an empty row).

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Twilight, arXiv 2502.02770, algorithm 1, with a histogram instead of a binary search.
    """
    return OPERATOR(weights, seq_lens, candidates, num_kv_heads, pruning, always)


def check(weights: Tensor, seq_lens: Tensor, candidates: Candidates, num_kv_heads: int, pruning: Pruning, always: Always) -> None:
    c = Checker("prune_top_p", weights)
    c.tensor("weights", weights, ("B", "T", "Hq", "N"), torch.float32)
    _, query_tokens, heads, slots = weights.shape
    c.require(query_tokens >= 1, "weights", "at least 1 query token", query_tokens)
    c.at_least("num_kv_heads", num_kv_heads, 1)
    c.require(heads >= 1 and heads % num_kv_heads == 0, "num_kv_heads", f"a divisor of num_qo_heads = {heads}", num_kv_heads)
    c.sizes["Hkv"] = num_kv_heads
    c.tensor("seq_lens", seq_lens, ("B",), torch.int32)
    c.candidates(candidates, None)
    if candidates.indices is not None:
        listed = candidates.indices.shape[2] * candidates.tokens_per_index
        c.require(listed == slots, "weights", f"C * tokens_per_index = {listed} slots a row", slots)
    c.pruning(pruning)
    c.always(always)
    c.no_gradients()


def outputs(
    weights: Tensor, seq_lens: Tensor, candidates: Candidates, num_kv_heads: int, pruning: Pruning, always: Always
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_lists(weights, weights.shape[0], num_kv_heads, weights.shape[3]), weights.new_empty(weights.shape[:3])


OPERATOR = Operator(prune_top_p, "(Tensor indices, Tensor counts, Tensor mass)", check, outputs)
