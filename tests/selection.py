"""What select_pages and select_tokens have in common, checked once for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from comparisons import assert_best_bins_chosen, listed_set, top_k_borderline
from inputs import DecodeInputs
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """One selector operator and how a test computes its scores."""

    op: str
    scores: Callable[[DecodeInputs, torch.dtype], Tensor]  # [B, Hkv, items], NaN where not live
    by_page: bool
    arguments: dict = field(default_factory=dict)  # of every call

    def unit(self, x: DecodeInputs) -> int:
        return x.page_size if self.by_page else 1

    def items(self, x: DecodeInputs) -> int:
        return x.max_tokens // self.unit(x)

    def forced(self, x: DecodeInputs, sink_tokens: int, recent_tokens: int) -> Tensor:
        """[B, items] pages or tokens that are always taken."""
        unit = self.unit(x)
        start = torch.arange(self.items(x), device=x.q.device) * unit
        newest = x.seq_lens.long()[:, None] - max(recent_tokens, x.q.shape[1])
        return (start < x.seq_lens[:, None]) & ((start < sink_tokens) | (start + unit > newest))

    def check_against_oracle(self, backend, x: DecodeInputs, *, exact: bool = False, **budget) -> Tensor:
        """The oracle's set, but for what rounding may change unless `exact`; returns the set [B, Hkv, items]."""
        got = getattr(backend, self.op)(**x.arguments(self.op, **self.arguments, **budget))
        want = x.oracle(self.op, **self.arguments, **budget)
        assert got[0].dtype == got[1].dtype == torch.int32
        assert got[0].shape == want[0].shape, "capacity"
        assert torch.equal(got[1], want[1]), "counts depend on lengths and budgets only"
        size = self.items(x)
        forced = self.forced(x, budget.get("sink_tokens", 0), budget.get("recent_tokens", 0))
        member, chosen = listed_set(*got, size), listed_set(*want, size)
        borderline: Tensor | int = 0
        if not exact:
            free = self.scores(x, torch.float64).masked_fill(forced[:, None], torch.nan)
            assert_best_bins_chosen(free, chosen & ~forced[:, None])
            borderline = top_k_borderline(free, self.scores(x, torch.float32), chosen & ~forced[:, None])
        assert ((member ^ chosen).sum(-1) <= 2 * borderline).all(), "not the oracle's set"
        room = got[0].shape[-1] >= int(forced.sum(-1).max())
        assert not room or (member | ~forced[:, None]).all(), "sinks and the newest tokens are always taken"
        return member
