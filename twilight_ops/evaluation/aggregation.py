"""How the query heads of a group agree on one list: the alternatives to the sum of softmaxed scores, for the ablation only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import normalise, one_of
from ..arguments import Candidates
from ..layer import Selector, stored_bytes
from ..selectors._rank import best_tokens, exact_logits

AGGREGATIONS = ("softmax_sum", "softmax_max", "logit_max", "logit_mean")


@dataclass(frozen=True)
class ExactTopK(Selector):
    """The best tokens by exact scores, the heads of a group aggregated as told: what no approximate selector can beat.

    Args:
        token_budget, budget_fraction: see `Selector`.
        aggregation: one of AGGREGATIONS.
    """

    token_budget: int = 1
    budget_fraction: float = 0.0625
    aggregation: str = "softmax_sum"

    name: ClassVar[str] = "exact_top_k"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, aggregation=one_of(*AGGREGATIONS))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        logits, live = exact_logits(q, layer, page_table, seq_lens, sm_scale)
        masked = logits.masked_fill(~live[:, None, :, None], torch.finfo(logits.dtype).min)
        kind, _, reduction = self.aggregation.partition("_")
        # exp of a mean or maximum of logits ranks like the logits themselves and is never negative.
        scores = masked.softmax(-1) if kind == "softmax" else (masked - masked.amax((3, 4), keepdim=True))
        scores = {"sum": scores.sum, "max": scores.amax, "mean": scores.mean}[reduction](dim=(1, 3))
        scores = scores if kind == "softmax" else scores.exp()
        return best_tokens(scores, live, layer, page_table, seq_lens, q.shape[1])

    def scan_bytes(self, layer, tokens) -> list[float]:
        return [float(layer.head_dim * stored_bytes(layer.kv.k_cache))] * layer.num_kv_heads
