"""The choice of candidates shared by the selectors' references."""

import math

import torch
from torch import Tensor

from ..capacity import LOGIT_LEVELS, LOWEST_SCORE_BIN, SCORE_BIN_SHIFT, Limits

_LEVELS = LOGIT_LEVELS * math.log2(math.e)
_FORCED = 0x7FFFFFFF >> SCORE_BIN_SHIFT  # above every score, infinity too


def group_scores(logits: Tensor, live: Tensor) -> Tensor:
    """Sum over query tokens and group heads of the softmax over live items, of logits rounded to 1 / LOGIT_LEVELS of an octave.

    logits [B, T, Hkv, G, N], live [B, Hkv, N] -> scores [B, Hkv, N]. NaN and +inf logits stay out of the softmax's maximum and sum
    and make the item's own score +inf.
    """
    logits = (logits * _LEVELS).round() / _LEVELS
    live = live[:, None, :, None]
    broken = live & (logits.isnan() | (logits == math.inf))
    logits = logits.masked_fill(~live | broken, -math.inf)
    if logits.shape[-1] == 0:
        return logits.sum(dim=(1, 3))
    peak = logits.amax(-1, keepdim=True)
    weights = (logits - peak.masked_fill(peak == -math.inf, 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0.0, 1.0)
    return weights.masked_fill(broken, math.inf).sum(dim=(1, 3))


def row_budget(seq_lens: Tensor, kv_heads: int, limits: Limits, head_token_budget: Tensor | None) -> Tensor:
    """Token budget of each row, [B, Hkv] int64."""
    if head_token_budget is not None:
        return head_token_budget.long().clamp(min=0).expand(seq_lens.shape[0], -1)
    fraction = (seq_lens.double() * limits.budget_fraction).ceil().long()
    return fraction.clamp(min=limits.token_budget)[:, None].expand(-1, kv_heads)


def best_pages(logits: Tensor, seq_lens: Tensor, page_size: int, limits: Limits, wanted: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """`wanted` [B, Hkv] pages a row by their logits [B, T, Hkv, G, M]; those of sinks and of the newest tokens first."""
    first = torch.arange(logits.shape[-1], device=logits.device) * page_size
    live = (first < seq_lens[:, None])[:, None].expand(-1, logits.shape[2], -1)
    forced = (first < limits.sink_tokens) | (first + page_size > seq_lens[:, None] - limits.recent_tokens)
    return take_best(group_scores(logits, live), live, forced[:, None].expand_as(live), wanted, capacity)


def take_best(scores: Tensor, live: Tensor, forced: Tensor, budget: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """`budget` live items a row, forced ones first, then by bins of their scores: ascending indices, -1 pads, and counts.

    Bins are taken from the highest down, and of the bin in which the budget ends its lowest items.
    scores, live, forced [B, Hkv, N]; budget [B, Hkv] items.
    """
    forced = forced & live
    bins = (scores.float().view(torch.int32) >> SCORE_BIN_SHIFT).clamp(min=LOWEST_SCORE_BIN)
    bins = torch.where(live, torch.where(forced, _FORCED, bins), -1)
    rank = bins.sort(dim=-1, descending=True, stable=True).indices
    counts = torch.minimum(torch.maximum(budget, forced.sum(-1)), live.sum(-1)).clamp(max=capacity)
    rank = rank[..., :capacity]
    slots = torch.arange(rank.shape[-1], device=rank.device)
    beyond = scores.shape[-1]
    picked = torch.where(slots < counts[..., None], rank, beyond).sort(dim=-1).values
    return torch.where(picked == beyond, -1, picked).int(), counts.int()
