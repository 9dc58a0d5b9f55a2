"""How well the INT4 estimate knows what it keeps: estimated and true attention mass of every query head's own set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arguments import Candidates, Paging, Pruning
from ..config import TwilightConfig
from ..integration.hf.generate import cache_argument
from ..ops.estimate_weights import estimate_weights
from ..ops.prune_top_p import prune_top_p
from ..selectors import Full
from .prefill import Prefill, attention, cache_of


@dataclass
class MassProbe:
    """Sums over the decode steps of a run, one entry a p."""

    top_ps: Sequence[float]
    rows: int = 0
    estimated: dict[float, float] = field(default_factory=dict)
    lowest_estimated_excess: dict[float, float] = field(default_factory=dict)
    true: dict[float, float] = field(default_factory=dict)
    lowest_true: dict[float, float] = field(default_factory=dict)
    kept: dict[float, float] = field(default_factory=dict)

    def look(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> None:
        """Prunes this layer's estimate at every p, and weighs what is kept with the exact attention weights: a cache's recorder."""
        if layer.plan.selector is None:
            return
        heads = q.shape[2]
        weights = estimate_weights(q, layer.shadow, Paging(page_table, seq_lens), Candidates(), sm_scale)
        true = exact_weights(q, layer, page_table, seq_lens, sm_scale)  # [B, Hq, N]
        self.rows += true.shape[0] * heads
        for p in self.top_ps:
            # One group a query head, so that each head's own set comes back and not the union.
            indices, counts, mass = prune_top_p(weights, seq_lens, Candidates(), heads, Pruning(p))
            captured = true.gather(2, indices.clamp(min=0).long()).masked_fill(indices < 0, 0.0).sum(-1)
            _add(self.estimated, p, mass.double().sum())
            _add(self.true, p, captured.sum())
            _add(self.kept, p, counts.double().sum())
            self.lowest_estimated_excess[p] = min(self.lowest_estimated_excess.get(p, 1.0), float(mass.min()) - p)
            self.lowest_true[p] = min(self.lowest_true.get(p, 1.0), float(captured.min()))

    def result(self) -> list[dict]:
        return [
            {
                "top_p": p,
                "rows": self.rows,
                "estimated_mass": self.estimated[p] / self.rows,
                "lowest_estimated_minus_p": self.lowest_estimated_excess[p],
                "true_mass": self.true[p] / self.rows,
                "lowest_true_mass": self.lowest_true[p],
                "kept_a_query_head": self.kept[p] / self.rows,
            }
            for p in self.top_ps
        ]


def _add(sums: dict[float, float], p: float, value: Tensor) -> None:
    sums[p] = sums.get(p, 0.0) + float(value)


def exact_weights(q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Tensor:
    """Attention weights of one query token over the cache in fp64, [B, Hq, M * S]."""
    keys = layer.kv.k_cache[page_table.long()].transpose(1, 2).flatten(2, 3).double()  # [B, Hkv, N, D]
    grouped = q[:, 0].double().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bhgd,bhnd->bhgn", grouped, keys).flatten(1, 2) * sm_scale
    live = torch.arange(keys.shape[2], device=q.device) < seq_lens[:, None, None]
    return logits.masked_fill(~live, -torch.inf).softmax(-1)


@torch.no_grad()
def masses(model, prefills: Sequence[Prefill], forced: Tensor, top_ps: Sequence[float]) -> list[dict]:
    """Teacher-forces tokens [B, T] with exact attention and prunes beside it at every p, in every layer."""
    # The shadow is kept, but every step is short enough to be dense: what is measured does not change what is computed.
    config = TwilightConfig(selector=Full(), top_p=0.95, dense_below=sys.maxsize)
    probe = MassProbe(top_ps)
    cache = cache_of(model, config, prefills, forced.shape[1], probe.look)
    position = cache.live_seq_lens.long()[:, None].clone()
    named = {cache_argument(model): cache}
    with attention(model, "twilight"):
        for t in range(forced.shape[1]):
            model(input_ids=forced[:, t : t + 1], position_ids=position + t, use_cache=True, **named)
    return probe.result()
