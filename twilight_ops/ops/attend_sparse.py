"""twilight::attend_sparse: exact softmax attention on a list of tokens or pages."""

import torch
from torch import Tensor

from ._checks import Checker
from ._library import call, define

SCHEMA = (
    "attend_sparse(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, Tensor? indices, "
    "Tensor? counts, int tokens_per_index, float sm_scale) -> (Tensor out, Tensor lse)"
)


def check_attend_sparse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """Raises RuntimeError on the first malformed argument, else allocates the outputs: the fake."""
    c = Checker("attend_sparse", q)
    c.query(q)
    c.cache(k_cache, v_cache, q.dtype)
    c.geometry()
    c.paging(page_table, seq_lens)
    c.candidates(indices, counts, tokens_per_index, k_cache.shape[2])
    c.scale(sm_scale)
    c.no_gradients()
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
    )


define(SCHEMA, check_attend_sparse)


def attend_sparse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    indices: Tensor | None,
    counts: Tensor | None,
    tokens_per_index: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """`softmax(sm_scale * q . K[I]) V[I]` with the log-sum-exp, so that partial results can be merged.

    Query token t of sequence b stands at position `seq_lens[b] - T + t` and sees no newer token. Listed tokens at or beyond
    seq_lens are ignored. A row that sees nothing gives zeros and lse = -inf.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        k_cache, v_cache: [P, Hkv, S, D] in q's dtype.
        page_table: [B, M] int32, M * S at most 2**29; a live entry outside 0..P-1 reads some valid page.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
        indices, counts: [B, Hkv, C], [B, Hkv] int32 tokens or pages to attend to; both None: every token (dense).
        tokens_per_index: 1 for token lists, page_size for page lists.
        sm_scale: factor on q . k, usually D ** -0.5.

    Returns:
        out [B, T, Hq, D] contiguous, in q's dtype; lse [B, T, Hq] fp32, natural logarithm.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.
    """
    return call(
        torch.ops.twilight.attend_sparse.default, q, k_cache, v_cache, page_table, seq_lens, indices, counts, tokens_per_index, sm_scale
    )
