"""Reference of twilight::prune_top_p."""

import torch
from torch import Tensor

from ..capacity import MAX_TOKENS, Limits
from ._paging import candidate_tokens

MASS_UNIT = 2.0**40


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
    batch, query_tokens, heads, slots = weights.shape
    if slots == 0:
        lists = weights.new_empty((batch, num_kv_heads, 0), dtype=torch.int32)
        return lists, lists.new_zeros((batch, num_kv_heads)), weights.new_zeros(weights.shape[:3])
    limits = Limits.clamped(MAX_TOKENS, query_tokens, sink_tokens=sink_tokens, recent_tokens=recent_tokens)
    seq_lens = seq_lens.long().clamp(min=0)
    every = torch.arange(slots, device=weights.device).expand(batch, num_kv_heads, -1)
    tokens, live = candidate_tokens(indices, counts, tokens_per_index, every, seq_lens)

    if top_p_per_head is None:
        p = torch.full((1, 1), top_p, dtype=torch.float64, device=weights.device)
    else:
        p = top_p_per_head.double().nan_to_num(nan=1.0).clamp(0.0, 1.0)
    p = p.expand(batch, heads)[:, None, :]  # [B, 1, Hq]

    head_live = live.repeat_interleave(heads // num_kv_heads, dim=1)[:, None].expand_as(weights)
    broken = (weights.isnan() & head_live).any(-1)
    w = torch.where(head_live, weights.nan_to_num(nan=0.0).clamp(0.0, 1.0), 0.0)
    order = w.sort(dim=-1, descending=True)
    mass = (order.values * MASS_UNIT).long().cumsum(-1)
    total = mass[..., -1]
    need = (p * total.double()).ceil().long().clamp(min=1)
    last = (mass < need[..., None]).sum(-1, keepdim=True).clamp(max=slots - 1)
    threshold = order.values.gather(-1, last)
    keep_all = broken | (p >= 1.0) | (total == 0)
    keep = head_live & (keep_all[..., None] | (w >= threshold))

    captured = torch.where(keep, (w * MASS_UNIT).long(), 0).sum(-1)
    row_mass = (captured.double() / total.double().clamp(min=1.0)).float()
    row_mass = torch.where(keep_all, 1.0, row_mass).masked_fill(~head_live.any(-1), 0.0)

    union = keep.view(batch, query_tokens, num_kv_heads, -1, slots).any(dim=3).any(dim=1)
    union |= live & ((tokens < limits.sink_tokens) | (tokens >= seq_lens[:, None, None] - limits.recent_tokens))
    beyond = torch.iinfo(torch.int64).max
    kept = torch.where(union, tokens, beyond).sort(dim=-1).values
    return torch.where(kept == beyond, -1, kept).int(), union.sum(-1).int(), row_mass
