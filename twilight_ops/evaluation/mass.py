"""Attention mass: what the sets of a method truly hold, and how well the 4-bit estimate knows what it keeps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..arguments import Candidates, Paging, Pruning
from ..config import TwilightConfig
from ..integration import cache_argument
from ..ops.estimate_weights import estimate_weights
from ..ops.prune_top_p import prune_top_p
from ..reference._paging import soft_capped
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

    def look(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float, softcap: float | None = None) -> None:
        """Prunes this layer's estimate at every p, and weighs what is kept with the exact attention weights: a cache's recorder."""
        if layer.plan.selector is None:
            return
        heads = q.shape[2]
        weights = estimate_weights(q, layer.shadow, Paging(page_table, seq_lens), Candidates(), sm_scale, softcap)
        true = exact_weights(q, layer, page_table, seq_lens, sm_scale, softcap)  # [B, Hq, N]
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


def exact_weights(q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float, softcap: float | None = None) -> Tensor:
    """Attention weights of one query token over the cache in fp64, [B, Hq, M * S]."""
    rows = layer.kv.k_cache[page_table.long()].transpose(1, 2).flatten(2, 3)  # [B, Hkv, N, D]
    keys = rows.double() if layer.scales is None else layer.scales.keys(rows, torch.float64)
    grouped = q[:, 0].double().unflatten(1, (keys.shape[1], -1))
    logits = torch.einsum("bhgd,bhnd->bhgn", grouped, keys).flatten(1, 2) * sm_scale
    logits = soft_capped(logits, softcap)
    live = torch.arange(keys.shape[2], device=q.device) < seq_lens[:, None, None]
    return logits.masked_fill(~live, -torch.inf).softmax(-1)


class Captured:
    """True attention mass of every query head in the set that its KV head kept, in every sparse layer: a cache's recorder."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._pending: tuple | None = None

    def look(
        self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float, softcap: float | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Gives the step the buffers for its kept set, which is weighed when the next layer comes."""
        self._weigh()
        if layer.plan.selector is None:
            return None
        batch, kv_heads = q.shape[0], layer.num_kv_heads
        kept = torch.empty(batch, kv_heads, page_table.shape[1] * layer.page_size, dtype=torch.int32, device=q.device)
        counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=q.device)
        self._pending = (q, layer, page_table, seq_lens.clone(), sm_scale, softcap, kept, counts)  # lengths grow in place
        return kept, counts

    def _weigh(self) -> None:
        if self._pending is None:
            return
        *call, kept, counts = self._pending
        self._pending = None
        weights = exact_weights(*call).unflatten(1, (kept.shape[1], -1))  # [B, Hkv, G, N]
        listed = torch.arange(kept.shape[2], device=kept.device) < counts[..., None]
        index = kept.clamp(min=0).long()[:, :, None].expand_as(weights)
        self._values.append((weights.gather(3, index) * listed[:, :, None]).sum(-1).flatten())

    def values(self) -> Tensor:
        """One fp64 number a (sparse layer, sequence, query head, step)."""
        self._weigh()
        return torch.cat(self._values) if self._values else torch.zeros(0, dtype=torch.float64)


def captured(model, prefills: Sequence[Prefill], forced: Tensor, config: TwilightConfig) -> Tensor:
    """Teacher-forces tokens [B, T] with a method; the true mass of its sets, see `Captured.values`."""
    probe = Captured()
    _forced(model, prefills, forced, config, probe.look)
    return probe.values().cpu()


def spread_of(values: Tensor) -> dict[str, float | int]:
    """Mean, first percentile and lowest of captured masses; nothing where no layer is sparse."""
    if not len(values):
        return {}
    return {
        "mass_mean": values.mean().item(),
        "mass_p1": values.kthvalue(max(1, len(values) // 100)).values.item(),
        "mass_lowest": values.min().item(),
        "mass_rows": len(values),
    }


@torch.no_grad()
def _forced(model, prefills: Sequence[Prefill], forced: Tensor, config: TwilightConfig, look) -> None:
    """Decode steps over the prompts that feed tokens [B, T], with a recorder."""
    cache = cache_of(model, config, prefills, forced.shape[1], look)
    position = cache.live_seq_lens.long()[:, None].clone()
    named = cache_argument(model, cache)
    with attention(model, "twilight"):
        for t in range(forced.shape[1]):
            model(input_ids=forced[:, t : t + 1], position_ids=position + t, use_cache=True, **named)


def masses(model, prefills: Sequence[Prefill], forced: Tensor, top_ps: Sequence[float]) -> list[dict]:
    """Teacher-forces tokens [B, T] with exact attention and prunes beside it at every p, in every layer."""
    # The shadow is kept, but every step is short enough to be dense: what is measured does not change what is computed.
    config = TwilightConfig(selector=Full(), top_p=0.95, dense_below=sys.maxsize)
    probe = MassProbe(top_ps)
    _forced(model, prefills, forced, config, probe.look)
    return probe.result()
