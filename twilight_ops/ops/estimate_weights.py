"""twilight::estimate_weights: attention weights of the candidates, estimated from the 4-bit K shadow."""

import torch
from torch import Tensor

from ..arguments import Candidates, Paging, Shadow
from ._checks import Checker
from ._library import Operator


def estimate_weights(
    q: Tensor, shadow: Shadow, paging: Paging, candidates: Candidates, sm_scale: float, softcap: float | None = None
) -> Tensor:
    """Softmax over the candidates of `sm_scale * q . dequant(k_quant)`, per query head.

    With a `softcap` it is that of `softcap * tanh(x / softcap)`, of x = `sm_scale * q . (dequant(k_quant) + k_center)`. Without one the
    centre changes no weight and is not read.

    Slot `c * tokens_per_index + s` of a row stands for token `indices[b, h, c] * tokens_per_index + s`. A slot beyond the list, beyond
    seq_lens, or (T > 1) newer than query token t, whose own position is `seq_lens[b] - T + t`, gets weight 0.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        shadow: as `append_kv` writes it.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        candidates: of a selector, or every token.
        sm_scale: factor on q . k, usually D ** -0.5.
        softcap: as of `attend_sparse`.

    Returns:
        weights [B, T, Hq, C * tokens_per_index] fp32 (or M * S slots where indices is None), each row summing to 1, or all 0
        where nothing is live, or NaN throughout its live slots where a logit is NaN or +inf.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Twilight, arXiv 2502.02770, section 4.2.
    """
    return OPERATOR(q, shadow, paging, candidates, sm_scale, softcap)


def check(q: Tensor, shadow: Shadow, paging: Paging, candidates: Candidates, sm_scale: float, softcap: float | None) -> None:
    c = Checker("estimate_weights", q)
    c.query(q)
    c.shadow(shadow)
    c.geometry()
    c.paging(paging)
    c.candidates(candidates, shadow.k_scale.shape[2])
    c.scale(sm_scale)
    c.softcap(softcap)
    c.no_gradients()


def outputs(q: Tensor, shadow: Shadow, paging: Paging, candidates: Candidates, *_: object) -> Tensor:
    every = paging.page_table.shape[1] * shadow.k_scale.shape[2]
    slots = every if candidates.indices is None else candidates.indices.shape[2] * candidates.tokens_per_index
    return q.new_empty((*q.shape[:3], slots), dtype=torch.float32)


OPERATOR = Operator(estimate_weights, "Tensor", check, outputs)
