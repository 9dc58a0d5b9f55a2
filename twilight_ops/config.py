"""What a user decides: selector, p, and where to stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ops._checks import PAGE_SIZES
from .selectors import Selector, ShadowPrefix


@dataclass(frozen=True)
class LayerOverride:
    """What one layer does differently; None keeps the configuration's value.

    Args:
        selector: another selector, or "dense" for exact attention over everything.
        top_p: another p for the whole layer; 1 switches the pruner off.
        head_token_budget: candidates in tokens, one a KV head. They are clamped to the selector's own capacity, so give the selector
            a token_budget that reaches the largest.
        head_top_p: p, one a query head.
        sink_tokens, recent_tokens: always kept.
    """

    selector: Selector | str | None = None
    top_p: float | None = None
    head_token_budget: tuple[int, ...] | None = None
    head_top_p: tuple[float, ...] | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None


@dataclass(frozen=True)
class LayerPlan:
    """One layer's resolved settings: what `decode_attention` takes as plain arguments."""

    selector: Selector | None  # None: dense
    top_p: float
    dense_below: int
    sink_tokens: int
    recent_tokens: int
    head_token_budget: tuple[int, ...] | None
    head_top_p: tuple[float, ...] | None

    @property
    def prunes(self) -> bool:
        return self.selector is not None and (self.top_p < 1.0 or self.head_top_p is not None)

    @property
    def uses_shadow(self) -> bool:
        return self.selector is not None and (self.prunes or self.selector.uses_shadow)

    @property
    def uses_page_bounds(self) -> bool:
        return self.selector is not None and self.selector.uses_page_bounds


@dataclass(frozen=True)
class TwilightConfig:
    """Settings of a cache.

    Args:
        selector: proposes the candidates of every layer that is not dense.
        top_p: estimated attention weight to keep, 0 < p <= 1; 1 switches the pruner off and attends to all candidates.
        page_size: tokens a page: 16, 32 or 64.
        dense_layers: the first layers attend to everything. Quest and Twilight publish with 2; on SmolLM2 pruning those too costs 0.0004 of
            KL to dense and saves a third of the bytes (bench/results/accuracy_smollm2.md), so the default is none.
        dense_below: sequences no longer than this, in tokens, attend to everything; None takes the measured break-even of the device, the
            batch size and the KV heads.
        sink_tokens: the first tokens of a sequence that are always kept.
        recent_tokens: the newest tokens of a sequence that are always kept; None takes what the selector asks for.
        overrides: what single layers do differently, by layer index.
    """

    selector: Selector = field(default_factory=ShadowPrefix)
    top_p: float = 0.95
    page_size: int = 16
    dense_layers: int = 0
    dense_below: int | None = None
    sink_tokens: int = 0
    recent_tokens: int | None = None
    overrides: Mapping[int, LayerOverride] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.selector, Selector):
            raise ValueError(f"TwilightConfig: selector: expected a Selector, got {self.selector!r}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"TwilightConfig: top_p: expected 0 < top_p <= 1, got {self.top_p}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"TwilightConfig: page_size: expected one of {PAGE_SIZES}, got {self.page_size}")
        for name in ("dense_layers", "dense_below", "sink_tokens", "recent_tokens"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"TwilightConfig: {name}: expected >= 0, got {value}")

    def layer_plan(self, layer: int, device_type: str, kv_rows: int) -> LayerPlan:
        """Resolves the overrides and device defaults of one layer; `kv_rows`: batch size times KV heads."""
        override = self.overrides.get(layer, LayerOverride())
        selector = override.selector
        if selector is None:
            selector = None if layer < self.dense_layers else self.selector
        elif selector == "dense":
            selector = None
        elif not isinstance(selector, Selector):
            raise ValueError(f'LayerOverride: selector: expected a Selector or "dense", got {selector!r}')

        def pick(name: str) -> Any:
            value = getattr(override, name)
            return getattr(self, name) if value is None else value

        recent_tokens = pick("recent_tokens")
        if recent_tokens is None:
            recent_tokens = 0 if selector is None else selector.recent_tokens
        dense_below = BREAK_EVEN[device_type].tokens(kv_rows) if self.dense_below is None else self.dense_below
        return LayerPlan(
            selector=selector,
            top_p=pick("top_p"),
            dense_below=dense_below,
            sink_tokens=pick("sink_tokens"),
            recent_tokens=recent_tokens,
            head_token_budget=override.head_token_budget,
            head_top_p=override.head_top_p,
        )


@dataclass(frozen=True)
class BreakEven:
    """Live length up to which reading everything is at least as fast as deciding what to read.

    Deciding takes a fixed time, in which the device reads `row_tokens` tokens of one KV head; more heads and sequences share them.
    """

    least: int
    row_tokens: int
    reason: str

    def tokens(self, kv_rows: int) -> int:
        return max(self.least, self.row_tokens // max(1, kv_rows))


BREAK_EVEN: Mapping[str, BreakEven] = {
    "cpu": BreakEven(512, 0, "B 1, 32/8 heads, L 1024: 2 to 3 times as fast as dense (bench/results/cpu_decode_attention.json)"),
    "cuda": BreakEven(
        512,
        320_000,
        "H200, 32/8 heads, us a layer, dense against Quest: B 64 L 1k 75 / 50; B 8 L 4k 37 / 29; B 1 L 16k 23 / 31, L 32k 38 / 33. Between "
        "other kernels deciding takes 13 us longer: a step of Llama-3.1-8B at L 32k takes 5.7 / 6.0 ms at B 1 and 9.5 / 7.6 at B 4",
    ),
}
