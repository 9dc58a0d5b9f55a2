"""StreamingLLM: the first tokens and a sliding window, whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, tokens
from ._rank import limits, list_capacity, row_budget
from .base import Candidates, Selector


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
        asked = limits(self, layer, page_table, query_tokens)
        sinks = max(self.sinks, asked.sink_tokens)
        recent = asked.recent_tokens
        capacity = list_capacity(self, layer, page_table, query_tokens)
        lens = seq_lens.long()[:, None]  # [B, 1]
        # The window wins where the budget holds less than the sinks: the newest token is always in.
        budget = row_budget(self, layer, seq_lens).clamp(min=recent + asked.sink_tokens, max=capacity)
        counts = torch.minimum(budget, lens)  # [B, Hkv]
        first = (counts - recent).clamp(min=0, max=sinks)[..., None]  # [B, Hkv, 1]
        slots = torch.arange(capacity, device=q.device)
        window = (lens - counts)[..., None] + slots
        indices = torch.where(slots < first, slots, window)
        indices = torch.where(slots < counts[..., None], indices, -1)
        return Candidates(indices.int(), counts.int(), 1)

    def scan_bytes(self, layer) -> list[float]:
        return [0.0] * layer.k_cache.shape[1]
