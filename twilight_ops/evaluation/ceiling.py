"""What no estimate can beat: top-p by exact attention weights over every token, for the ablation only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, share
from ..ops import prune_top_p
from ..selectors import Candidates, Selector
from ..selectors._rank import exact_logits
from ..selectors.base import stored_bytes


@dataclass(frozen=True)
class ExactTopP(Selector):
    """Proposes what `prune_top_p` keeps of the exact weights, so run it without the pruner.

    Args:
        token_budget, budget_fraction: unused; the set is as large as p makes it.
        mass: p.
    """

    token_budget: int = 1
    budget_fraction: float = 1.0
    mass: float = 1.0

    name: ClassVar[str] = "exact_top_p"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, mass=share())

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        logits, live = exact_logits(q, layer, page_table, seq_lens, sm_scale)
        weights = logits.masked_fill(~live[:, None, :, None], -torch.inf).softmax(-1).flatten(2, 3)  # [B, T, Hq, N]
        indices, counts, _ = prune_top_p(weights, seq_lens, None, None, 1, layer.k_cache.shape[1], self.mass)
        return Candidates(indices, counts, 1)

    def scan_bytes(self, layer) -> list[float]:
        _, kv_heads, _, head_dim = layer.k_cache.shape
        return [float(head_dim * stored_bytes(layer.k_cache))] * kv_heads
