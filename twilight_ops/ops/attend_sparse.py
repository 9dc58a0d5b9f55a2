"""twilight::attend_sparse: exact softmax attention on a list of tokens or pages."""

import torch
from torch import Tensor

from ..arguments import KV, Candidates, Paging, Scales
from ._checks import Checker
from ._library import Operator


def attend_sparse(
    q: Tensor,
    kv: KV,
    paging: Paging,
    candidates: Candidates,
    sm_scale: float,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(cap(sm_scale * q . K[I])) V[I]` with the log-sum-exp, so that partial results can be merged.

    Query token t of sequence b stands at position `seq_lens[b] - T + t` and sees no newer token. Listed tokens at or beyond
    seq_lens are ignored. A row that sees nothing gives zeros and lse = -inf.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        kv: in q's dtype or float8_e4m3fn.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        candidates: tokens or pages to attend to, or every token (dense).
        sm_scale: factor on q . k, usually D ** -0.5.
        scales: of a cache in float8_e4m3fn.
        softcap: `cap(x) = softcap * tanh(x / softcap)`, as Gemma 2 has it, for a number from 1e-30 to 1e30; None: logits stay as they
            are. The log-sum-exp is that of capped logits.

    Returns:
        out [B, T, Hq, D] contiguous, in q's dtype; lse [B, T, Hq] fp32, natural logarithm.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.
    """
    return OPERATOR(q, kv, paging, candidates, sm_scale, scales, softcap)


def check(q: Tensor, kv: KV, paging: Paging, candidates: Candidates, sm_scale: float, scales: Scales | None, softcap: float | None) -> None:
    c = Checker("attend_sparse", q)
    c.query(q)
    c.cache(kv, q.dtype)
    c.geometry()
    c.paging(paging)
    c.candidates(candidates, kv.k_cache.shape[2])
    c.scale(sm_scale)
    c.scales(scales, kv)
    c.softcap(softcap)
    c.no_gradients()


def outputs(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


OPERATOR = Operator(attend_sparse, "(Tensor out, Tensor lse)", check, outputs)
