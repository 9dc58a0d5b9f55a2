"""What no estimate can beat: top-p by exact attention weights over every token, for the ablation only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, share
from ..arguments import Candidates, Pruning
from ..layer import Selector, stored_bytes
from ..ops.prune_top_p import prune_top_p
from ..selectors._rank import exact_logits


@dataclass(frozen=True)
class ExactTopP(Selector):
    """Proposes what `prune_top_p` keeps of the exact weights, so run it without the pruner. No selector knows of a cap on logits: in a
    model that has one the weights are those without it.

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
        indices, counts, _ = prune_top_p(weights, seq_lens, Candidates(), layer.num_kv_heads, Pruning(self.mass))
        return Candidates(indices, counts)

    def scan_bytes(self, layer, tokens) -> list[float]:
        return [float(layer.head_dim * stored_bytes(layer.kv.k_cache))] * layer.num_kv_heads
