"""Reference of twilight::estimate_weights."""

import math

import torch
from torch import Tensor

from ..arguments import Candidates, Paging, Shadow
from ._paging import all_tokens, candidate_tokens, compute_dtype, dequantise, gather_tokens, soft_capped, unpack_shadow, visible


def estimate_weights(
    q: Tensor, shadow: Shadow, paging: Paging, candidates: Candidates, sm_scale: float, softcap: float | None = None
) -> Tensor:
    (k_quant, k_scale, channel_order, prefix_channels, k_center), (page_table, seq_lens) = shadow, paging
    batch, query_tokens, heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_scale.shape
    dtype = compute_dtype(q)
    seq_lens = seq_lens.long().clamp(0, page_table.shape[1] * page_size)

    every = all_tokens(page_table, kv_heads, page_size)
    tokens, live = candidate_tokens(candidates, every, seq_lens)
    keys = dequantise(unpack_shadow(k_quant, prefix_channels, page_size), k_scale, dtype)  # ordered channels
    keys = gather_tokens(keys, page_table, tokens)  # [B, Hkv, N, D]
    grouped = q.to(dtype).view(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
    ordered = grouped.gather(-1, channel_order.long()[:, None].expand_as(grouped))
    logits = torch.einsum("bthgd,bhnd->bthgn", ordered, keys) * sm_scale
    if softcap is not None and k_center is not None:
        logits = logits + torch.einsum("bthgd,hd->bthg", grouped, k_center.to(dtype))[..., None] * sm_scale
    logits = soft_capped(logits, softcap)

    seen = visible(tokens, live, seq_lens, query_tokens)[:, :, :, None]  # [B, T, Hkv, 1, N]
    logits = logits.masked_fill(~seen, -math.inf)
    if logits.shape[-1] == 0:
        return logits.view(batch, query_tokens, heads, 0)
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -math.inf, 0.0)).exp().masked_fill(~seen, 0.0)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(seen, weights / total.masked_fill(total == 0.0, 1.0), 0.0)
    broken = peak.isnan() | (peak == math.inf)
    weights = torch.where(broken & seen, math.nan, weights)
    return weights.view(batch, query_tokens, heads, -1)
