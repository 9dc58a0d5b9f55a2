"""StreamingLLM: the first tokens and a sliding window, whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, tokens
from ..arguments import Candidates
from ..layer import Selector
from ..reference._top_k import row_budget


@dataclass(frozen=True)
class Streaming(Selector):
    """Attention sinks plus the newest tokens; reads nothing to select.

    Args:
        token_budget, budget_fraction: sinks and window together, in tokens; the paper keeps 4 sinks and a window of 1 to 4 thousand.
        sinks: first tokens of the sequence, within the budget; the configuration's sink_tokens count if they are more.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    token_budget: int = 1024
    sinks: int = 4

    name: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, sinks=tokens(0))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        query_tokens = q.shape[1]
        asked = layer.limits(page_table, query_tokens)
        sinks = max(self.sinks, asked.sink_tokens)
        recent = asked.recent_tokens
        capacity = asked.token_capacity
        lens = seq_lens.long()[:, None]  # [B, 1]
        # The window wins where the budget holds less than the sinks: the newest token is always in.
        budget = row_budget(seq_lens, layer.num_kv_heads, asked, layer.policy.budget.head_token_budget)
        budget = budget.clamp(min=recent + asked.sink_tokens, max=capacity)
        counts = torch.minimum(budget, lens)  # [B, Hkv]
        first = (counts - recent).clamp(min=0, max=sinks)[..., None]  # [B, Hkv, 1]
        slots = torch.arange(capacity, device=q.device)
        window = (lens - counts)[..., None] + slots
        indices = torch.where(slots < first, slots, window)
        indices = torch.where(slots < counts[..., None], indices, -1)
        return Candidates(indices.int(), counts.int())

    def scan_bytes(self, layer) -> list[float]:
        return [0.0] * layer.num_kv_heads
