"""What a user decides: selector, p, and where to stay dense."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from ._settings import MOST_TOKENS, Check, each, integer, normalise, one_of, optional, path, refuse, share, tokens
from .layer import LayerPlan, Selector
from .ops._checks import PAGE_SIZES
from .selectors import DEFAULT, Full

# The newest tokens of a sequence that every layer keeps unless told otherwise, and beside them one page of its first ones. A selector ranks
# the newest ones badly, an estimate may lose them altogether, and attention needs few tokens more (bench/results/accuracy_defaults.jsonl).
RECENT_TOKENS = 64


def _selector(where: str, field: str, value: object) -> Selector:
    if not isinstance(value, Selector):
        refuse(where, field, "a Selector, such as Quest()", value)
    return value


def _selector_or_dense(where: str, field: str, value: object) -> Selector | str:
    if not isinstance(value, Selector) and not (isinstance(value, str) and value == "dense"):
        refuse(where, field, 'a Selector, such as Quest(), or "dense"', value)
    return value


def _offload(where: str, field: str, value: object) -> bool | str:
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        return str(os.fspath(value))
    if type(value).__name__ not in ("bool", "bool_"):
        refuse(where, field, "True, False or a directory", value)
    return bool(value)


def _overrides(where: str, field: str, value: object) -> dict[int, LayerOverride]:
    if not isinstance(value, Mapping):
        refuse(where, field, "a mapping from layer index to LayerOverride", value)
    layer_index: Check = integer(0)
    checked = {}
    for layer, override in value.items():
        layer = layer_index(where, f"{field}: layer", layer)
        if not isinstance(override, LayerOverride):
            refuse(where, f"{field}[{layer}]", "a LayerOverride", override)
        checked[layer] = override
    return checked


@dataclass(frozen=True)
class LayerOverride:
    """What one layer does differently; None keeps the configuration's value.

    Args:
        selector: another selector, or "dense" for exact attention over everything.
        top_p: another p for the whole layer, 0 < p <= 1; 1 switches the pruner off.
        head_token_budget: candidates in tokens, >= 1, one a KV head. They are clamped to the selector's own capacity, so give the selector
            a token_budget that reaches the largest.
        head_top_p: p, 0 < p <= 1, one a query head.
        sink_tokens, recent_tokens: always kept, >= 0.

    Raises:
        ValueError: a field of another type or out of range. How many heads and layers there are is checked when a cache is made.
    """

    selector: Selector | str | None = None
    top_p: float | None = None
    head_token_budget: tuple[int, ...] | None = None
    head_top_p: tuple[float, ...] | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None

    def __post_init__(self) -> None:
        normalise(
            self,
            selector=optional(_selector_or_dense),
            top_p=optional(share()),
            head_token_budget=optional(each(tokens(1))),
            head_top_p=optional(each(share())),
            sink_tokens=optional(tokens(0)),
            recent_tokens=optional(tokens(0)),
        )


@dataclass(frozen=True)
class TwilightConfig:
    """Settings of a cache.

    Args:
        selector: proposes the candidates of every layer that is not dense.
        top_p: estimated attention weight to keep, 0 < p <= 1; 1 switches the pruner off and attends to all candidates.
        page_size: tokens a page: 16, 32 or 64.
        dense_layers: the first layers attend to everything. Quest and Twilight publish with 2; on SmolLM2 pruning those too costs 0.0004 of
            KL to dense and saves a third of the bytes (docs/accuracy-smollm2.md), so the default is none.
        dense_below: sequences no longer than this, in tokens, attend to everything; None takes the measured break-even of the device, the
            batch size and the KV heads.
        sink_tokens: the first tokens of a sequence, always candidates and always kept; None takes one page, 0 is none.
        recent_tokens: the newest tokens of a sequence, always candidates and always kept; None takes RECENT_TOKENS. A step keeps its own
            tokens whatever this says.
        overrides: what single layers do differently, by layer index.
        calibration: path of a file of `python -m twilight_ops calibrate` for every layer that has a shadow; a selector's own comes first.
            None takes centre and channels from the prompts that first fill the cache, of all sequences together.
        kv_cache_dtype: "auto" stores K and V in the model's dtype, "fp8" in float8_e4m3fn, which takes half the memory of 16 bits; the
            scales come from the prompts that first fill the cache. Selection and p read what they read without it.
        offload: whether K and V lie outside the GPU, in pinned host memory of which a step reads what it keeps. On a CPU they lie in a file
            without a name, which goes with the process, in the directory for temporary files or in the one given instead of True.
        hot_tokens: of an offloaded cache, rows of K and V of which the device has copies, a KV head of each sequence and layer; a step
            fetches only those that it keeps and does not find there. 0: it fetches all that it keeps.

    Counts of tokens may be as large as you like: `sys.maxsize` is everything.

    Raises:
        ValueError: a field of another type or out of range. How many heads and layers there are is checked when a cache is made.
    """

    selector: Selector = field(default_factory=DEFAULT)
    top_p: float = 0.95
    page_size: int = 16
    dense_layers: int = 0
    dense_below: int | None = None
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    overrides: Mapping[int, LayerOverride] = field(default_factory=dict)
    calibration: str | None = None
    kv_cache_dtype: str = "auto"
    offload: bool | str = False
    hot_tokens: int = 0

    def __post_init__(self) -> None:
        normalise(
            self,
            selector=_selector,
            top_p=share(),
            page_size=one_of(*PAGE_SIZES),
            dense_layers=integer(0),
            dense_below=optional(tokens(0)),
            sink_tokens=optional(tokens(0)),
            recent_tokens=optional(tokens(0)),
            overrides=_overrides,
            calibration=optional(path),
            kv_cache_dtype=one_of("auto", "fp8"),
            offload=_offload,
            hot_tokens=integer(0),
        )
        if self.hot_tokens and not self.offload:
            refuse("TwilightConfig", "hot_tokens", "0 without offload", self.hot_tokens)
        if self.hot_tokens and self.kv_cache_dtype == "fp8":
            refuse("TwilightConfig", "hot_tokens", '0 with kv_cache_dtype "fp8", of which no copies are kept', self.hot_tokens)

    @classmethod
    def fast(cls, **settings: Any) -> TwilightConfig:
        """1/32 of the tokens, at least 768, are candidates, of the best eighth of the pages and at least 4,096 tokens.

        At 31,000 tokens that is 40% of the default's bytes.

        `settings` are of TwilightConfig, and come first. docs/accuracy-qwen.md and docs/performance-h200.md say what it costs and gains.

        Example:
            >>> TwilightConfig.fast(dense_below=0).selector.budget_fraction
            0.03125
        """
        return cls(**{"selector": DEFAULT(budget_fraction=1 / 32, page_fraction=1 / 8, min_scored_tokens=4096)} | settings)

    def check_layers(self, num_layers: int) -> None:
        """Refuses overrides of layers that a model of `num_layers` does not have (ValueError)."""
        beyond = [layer for layer in self.overrides if layer >= num_layers]
        if beyond:
            refuse("TwilightConfig", "overrides", f"layers 0 to {num_layers - 1}", min(beyond))

    def layer_plan(self, layer: int, device_type: str, kv_rows: int) -> LayerPlan:
        """Resolves the overrides and device defaults of one layer; `kv_rows`: batch size times KV heads.

        Raises:
            ValueError: the device has no kernels.
        """
        override = self.overrides.get(layer, LayerOverride())
        if device_type not in BREAK_EVEN:
            raise ValueError(f"TwilightCache: device: expected {' or '.join(BREAK_EVEN)}, got {device_type}")
        break_even = OFFLOADED if self.offload else BREAK_EVEN[device_type]
        selector = self._selector_of(layer)

        def pick(name: str, default: int) -> int:
            return next((value for value in (getattr(override, name), getattr(self, name)) if value is not None), default)

        return LayerPlan(
            selector=selector,
            top_p=self.top_p if override.top_p is None else override.top_p,
            dense_below=break_even.tokens(kv_rows, selector) if self.dense_below is None else self.dense_below,
            sink_tokens=0 if selector is None else pick("sink_tokens", self.page_size),
            recent_tokens=0 if selector is None else pick("recent_tokens", RECENT_TOKENS),
            head_token_budget=override.head_token_budget,
            head_top_p=override.head_top_p,
            calibration=getattr(selector, "calibration", None) or self.calibration,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def never_sparse(self, num_layers: int, max_cache_len: int, device_type: str, kv_rows: int) -> str | None:
        """Why no call on such a cache can read less than everything, in one sentence for a warning; None where one can.

        A configuration whose layers are all dense or leave nothing out, or whose `dense_below` is everything, asks for nothing
        else and gets None too.
        `kv_rows`: batch size times KV heads.
        """
        plans = [self.layer_plan(layer, device_type, kv_rows) for layer in range(num_layers)]
        sparse = [plan for plan in plans if plan.prunes or not isinstance(plan.selector, (Full, NoneType))]
        if not sparse or self.dense_below == MOST_TOKENS:
            return None
        dense_below = sparse[0].dense_below
        kept = min(plan.sink_tokens + plan.recent_tokens for plan in sparse)
        if max_cache_len > max(dense_below, kept):
            return None
        if dense_below >= kept:
            source = f"the break-even of {device_type} at {kv_rows} sequences x KV heads" if self.dense_below is None else "as asked for"
            reason = f"sequences of up to dense_below = {dense_below} tokens ({source}) attend to everything"
            remedy = "a longer max_cache_len or TwilightConfig(dense_below=0)"
        else:
            reason = f"the first and newest {kept} tokens are always kept"
            remedy = "a longer max_cache_len, or fewer sink_tokens and recent_tokens"
        first = max(dense_below, kept) + 1
        return (
            f"this cache of {max_cache_len} tokens will never be sparse: {reason}, so the first sparse length is {first}. "
            f"Sparse decoding takes {remedy}"
        )

    def _selector_of(self, layer: int) -> Selector | None:
        """None: dense."""
        chosen = self.overrides[layer].selector if layer in self.overrides else None
        if chosen is None:
            return None if layer < self.dense_layers else self.selector
        return None if isinstance(chosen, str) else chosen


@dataclass(frozen=True)
class BreakEven:
    """Live length up to which reading everything is at least as fast as deciding what to read.

    Deciding takes a time in which the device reads `row_tokens` tokens of one KV head, or `proposed_row_tokens` where a selector
    proposes all of them; more heads and sequences share them.
    """

    least: int
    row_tokens: int
    proposed_row_tokens: int
    reason: str

    def tokens(self, kv_rows: int, selector: Selector | None) -> int:
        all_of_them = selector is not None and selector.proposes_all
        return max(self.least, (self.proposed_row_tokens if all_of_them else self.row_tokens) // max(1, kv_rows))


BREAK_EVEN: Mapping[str, BreakEven] = {
    "cpu": BreakEven(512, 0, 0, "B 1, 32/8 heads, L 1024: 2 to 3 times as fast as dense (bench/results/cpu_decode_attention.jsonl)"),
    "cuda": BreakEven(
        512,
        320_000,
        1 << 20,
        "H200, 32/8 heads, a real model's data, p .95, us a layer, dense / shadow prefix / page means: B 1 L 32k 37 / 40 / 37, "
        "L 64k 67 / 54 / 53; B 4 L 8k 37 / 36 / 31; B 8 L 8k 66 / 43 / 38; B 25 L 4k 103 / 58 / 39; B 64 L 2k 122 / 91 / 59 "
        "(bench/results/h200_qwen_data.jsonl, h200_break_even.jsonl); Full: B 1 L 128k 152, B 8 902 (h200_clusters.log), where dense "
        "takes 124 and 924. Between other kernels 13 us longer",
    ),
}
OFFLOADED = BreakEven(512, 0, 0, "a token of K and V comes over a bus of some 50 GB/s, or from a file: deciding costs little beside it")
