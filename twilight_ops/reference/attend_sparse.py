"""Reference of twilight::attend_sparse."""

import math

import torch
from torch import Tensor

from ..arguments import KV, Candidates, Paging, Scales
from ._paging import all_tokens, candidate_tokens, compute_dtype, gather_tokens, soft_capped, visible


def attend_sparse(
    q: Tensor,
    kv: KV,
    paging: Paging,
    candidates: Candidates,
    sm_scale: float,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    (k_cache, v_cache), (page_table, seq_lens) = kv, paging
    batch, query_tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    dtype = compute_dtype(q)
    seq_lens = seq_lens.long().clamp(0, page_table.shape[1] * page_size)

    every = all_tokens(page_table, kv_heads, page_size)
    tokens, live = candidate_tokens(candidates, every, seq_lens)
    scales = scales or Scales()
    keys = scales.keys(gather_tokens(k_cache, page_table, tokens), dtype)  # [B, Hkv, N, D]
    values = scales.values(gather_tokens(v_cache, page_table, tokens), dtype)
    grouped = q.to(dtype).view(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
    logits = soft_capped(torch.einsum("bthgd,bhnd->bthgn", grouped, keys) * sm_scale, softcap)

    seen = visible(tokens, live, seq_lens, query_tokens)[:, :, :, None]  # [B, T, Hkv, 1, N]
    logits = logits.masked_fill(~seen, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp().masked_fill(~seen, 0.0)
    # A value that a query token does not see must not reach it, not even as 0 * NaN.
    rows = [
        torch.einsum("bhgn,bhnd->bhgd", weights[:, t], values.masked_fill(~seen[:, t, :, 0, :, None], 0.0)) for t in range(query_tokens)
    ]
    out = torch.stack(rows, dim=1)
    return out.reshape(q.shape).to(q.dtype).contiguous(), lse.reshape(batch, query_tokens, heads).float().contiguous()
