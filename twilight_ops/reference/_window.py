"""The first and the newest tokens: what the selector "streaming" proposes, and the only one that reads nothing for it."""

import torch
from torch import Tensor

from ..capacity import Limits
from ._top_k import row_budget


def sinks_and_window(seq_lens: Tensor, kv_heads: int, limits: Limits, head_token_budget: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first `sink_tokens` and the newest tokens up to the budget: ascending indices [B, Hkv, token_capacity], -1 pads, and counts."""
    capacity = limits.token_capacity
    lens = seq_lens.long().clamp(0, limits.max_tokens)[:, None]  # [B, 1]
    budget = row_budget(lens[:, 0], kv_heads, limits, head_token_budget)
    budget = budget.clamp(min=limits.sink_tokens + limits.recent_tokens).clamp(max=capacity)
    counts = torch.minimum(budget, lens)  # [B, Hkv]
    slots = torch.arange(capacity, device=seq_lens.device)
    indices = torch.where(slots < limits.sink_tokens, slots, (lens - counts)[..., None] + slots)
    return torch.where(slots < counts[..., None], indices, -1).int(), counts.int()
