"""Reference of twilight::prune_top_p."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, Candidates, Pruning
from ..capacity import MAX_TOKENS, WEIGHT_BIN_SHIFT, WEIGHT_UNIT, Limits
from ._paging import candidate_tokens

_BINS = (0x3F800000 >> WEIGHT_BIN_SHIFT) + 1  # the last is that of 1.0


def prune_top_p(
    weights: Tensor, seq_lens: Tensor, candidates: Candidates, num_kv_heads: int, pruning: Pruning, always: Always
) -> tuple[Tensor, Tensor, Tensor]:
    batch, query_tokens, heads, slots = weights.shape
    if slots == 0:
        lists = weights.new_empty((batch, num_kv_heads, 0), dtype=torch.int32)
        return lists, lists.new_zeros((batch, num_kv_heads)), weights.new_zeros(weights.shape[:3])
    limits = Limits.of(MAX_TOKENS, query_tokens, Budget(1), always)
    seq_lens = seq_lens.long().clamp(min=0)
    every = torch.arange(slots, device=weights.device).expand(batch, num_kv_heads, -1)
    tokens, live = candidate_tokens(candidates, every, seq_lens)

    if pruning.head_top_p is None:
        p = torch.full((1, 1), pruning.top_p, dtype=torch.float64, device=weights.device)
    else:
        p = pruning.head_top_p.double().nan_to_num(nan=1.0).clamp(0.0, 1.0)
    p = p.expand(batch, heads)[:, None, :]  # [B, 1, Hq]

    head_live = live.repeat_interleave(heads // num_kv_heads, dim=1)[:, None].expand_as(weights)
    broken = (weights.isnan() & head_live).any(-1)
    w = torch.where(head_live & (weights > 0.0), weights.clamp(max=1.0), 0.0)
    bins = (w.view(torch.int32) >> WEIGHT_BIN_SHIFT).long()
    mass = torch.zeros((*bins.shape[:-1], _BINS), dtype=torch.int64, device=w.device).scatter_add_(-1, bins, (w * WEIGHT_UNIT).long())
    reached = mass.flip(-1).cumsum(-1).flip(-1)  # of a bin and all above it
    total = reached[..., 0]
    need = (p * total.double()).ceil().long().clamp(min=1)
    cut = (reached >= need[..., None]).sum(-1, keepdim=True).clamp(min=1) - 1  # the highest bin that reaches it
    keep_all = broken | (p >= 1.0) | (total == 0)
    keep = head_live & (keep_all[..., None] | (bins >= cut))

    row_mass = (reached.gather(-1, cut)[..., 0].double() / total.double().clamp(min=1.0)).float()
    row_mass = torch.where(keep_all, 1.0, row_mass).masked_fill(~head_live.any(-1), 0.0)

    union = keep.view(batch, query_tokens, num_kv_heads, -1, slots).any(dim=3).any(dim=1)
    union |= live & ((tokens < limits.sink_tokens) | (tokens >= seq_lens[:, None, None] - limits.recent_tokens))
    beyond = torch.iinfo(torch.int64).max
    kept = torch.where(union, tokens, beyond).sort(dim=-1).values
    return torch.where(kept == beyond, -1, kept).int(), union.sum(-1).int(), row_mass
