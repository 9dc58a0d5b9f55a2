"""One layer of a cache: its resolved settings, its tensors, and the protocol of the selector that works on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._settings import normalise, number, of_length, tokens
from .arguments import (
    FP8,
    FP8_MAX,
    KV,
    Always,
    Budget,
    Candidates,
    HotRows,
    PageBounds,
    PageLevel,
    PageMeans,
    Policy,
    Pruning,
    Scales,
    Shadow,
)
from .calibration import restore
from .capacity import COUNTER_COLUMNS, Limits


@dataclass(frozen=True)
class Selector:
    """Base of all selectors: a frozen record of settings; tensors it needs live in the layer's `selector_state`.

    A selector outside this package subclasses this, sets `name`, and implements `select`; it may add the other methods. `append` and
    `select` run inside the compiled decode step, so they take and return tensors of fixed shape and never read a value on the host; they
    may launch a kernel of their own through `torch.library.triton_op` (`examples/custom_selector.py` does). A `__post_init__` of its own
    calls this one, which checks the budgets.

    Args:
        token_budget: candidates in tokens, at least 1.
        budget_fraction: candidates as a share of the live length, 0..1; the larger of the two counts.
    """

    token_budget: int = 1024
    budget_fraction: float = 0.0

    name: ClassVar[str] = ""
    kernel: ClassVar[str] = "given"  # the `selector` argument of decode_attention; "given": `select` is called first
    uses_shadow: ClassVar[bool] = False  # even where nothing is pruned
    proposes_all: ClassVar[bool] = False  # and leaves every token to the estimates, which takes longer to pay

    def __post_init__(self) -> None:
        normalise(self, token_budget=tokens(1), budget_fraction=number(0.0, 1.0))

    def allocate(self, layer: PagedKVLayer, previous: PagedKVLayer | None) -> dict[str, Tensor]:
        """Extra tensors of one layer, kept in `layer.selector_state`; addresses never change afterwards.

        `layer.index` is its place in the model; tensors taken over from `previous.selector_state` are shared between the layers.
        """
        return {}

    def reset(self, layer: PagedKVLayer) -> None:
        """Writes in place what holds before any prompt; called once after `allocate` and with every reset of the cache."""

    def calibrate(self, q: Tensor, k: Tensor, layer: PagedKVLayer, positions: Tensor | None, sm_scale: float) -> None:
        """Called once, with the first prompt and before its append; writes what `select` reads in place.

        q [B, T, Hq, D], k [B, T, Hkv, D]; positions [B, T] int32 are -1 for padding, None stands for no padding. Shapes depend on T only
        and nothing is read on the host, so that it may be traced.
        """

    def append(self, k: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None) -> None:
        """Called after append_kv with the same rows; updates `layer.selector_state` in place."""

    def select(self, q: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        """Proposes candidates for q [B, T, Hq, D].

        The first `layer.plan.sink_tokens` and the newest `max(layer.plan.recent_tokens, T)` tokens belong to them: nothing adds them later.
        """
        raise TypeError(f"{type(self).__name__} does not implement select()")

    def scan_bytes(self, layer: PagedKVLayer, tokens: float) -> list[float]:
        """Bytes a KV head reads for each live token to propose candidates, one entry a head; for reports only, NaN where unknown."""
        return [float("nan")] * layer.num_kv_heads

    def estimate_bytes(self, layer: PagedKVLayer) -> list[float]:
        """Bytes a KV head reads for each candidate to estimate its weight; for reports only."""
        return [layer.head_dim / 2 + 4.0] * layer.num_kv_heads  # a code a channel, (scale, zero)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes an element in a deployed cache: 16 bits for K's dtype, even where a CPU run holds 32."""
    return min(2, tensor.element_size())


@dataclass(frozen=True)
class LayerPlan:
    """One layer's resolved settings."""

    selector: Selector | None  # None: dense
    top_p: float
    dense_below: int
    sink_tokens: int
    recent_tokens: int
    head_token_budget: tuple[int, ...] | None
    head_top_p: tuple[float, ...] | None
    calibration: str | None = None  # a file
    kv_cache_dtype: str = "auto"

    @property
    def prunes(self) -> bool:
        return self.selector is not None and (self.top_p < 1.0 or self.head_top_p is not None)

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of K and V in the cache of a model of `dtype`."""
        return FP8 if self.kv_cache_dtype == "fp8" else dtype

    def policy(self, max_tokens: int, num_qo_heads: int, num_kv_heads: int, device: torch.device) -> Policy:
        """What `decode_attention` takes; `max_tokens`: of all pages.

        Raises:
            ValueError: settings by head of another number of heads.
        """
        head_budget = head_top_p = None
        if self.head_token_budget is not None:
            of_length("LayerOverride", "head_token_budget", self.head_token_budget, num_kv_heads, "KV head")
            # No sequence is longer than all pages.
            budgets = [min(budget, max_tokens) for budget in self.head_token_budget]
            head_budget = torch.tensor(budgets, dtype=torch.int32, device=device)
        if self.head_top_p is not None:
            of_length("LayerOverride", "head_top_p", self.head_top_p, num_qo_heads, "query head")
            head_top_p = torch.tensor([self.head_top_p], dtype=torch.float32, device=device)
        pruning, always = Pruning(self.top_p, head_top_p), Always(self.sink_tokens, self.recent_tokens)
        if self.selector is None:
            return Policy("dense", Budget(1), pruning, always, self.dense_below)
        budget = Budget(self.selector.token_budget, self.selector.budget_fraction, head_budget)
        level = PageLevel(getattr(self.selector, "page_fraction", 1.0), getattr(self.selector, "min_scored_tokens", 0))
        return Policy(self.selector.kernel, budget, pruning, always, self.dense_below, level)


@dataclass
class PagedKVLayer:
    """The tensors of one layer; allocated once, only ever written in place, so a captured graph can hold their addresses."""

    plan: LayerPlan
    policy: Policy
    kv: KV
    budget_counters: Tensor  # [Hkv, COUNTER_COLUMNS] int64
    dtype: torch.dtype  # of K and V as the model has them
    index: int = 0  # of the layer in its model
    shadow: Shadow | None = None
    centred_by_file: bool = False  # else by the first prompt
    bounds: PageBounds | None = None
    means: PageMeans | None = None
    scales: Scales | None = None  # of K and V in float8_e4m3fn
    selector_state: dict[str, Tensor] = field(default_factory=dict)
    # Makes what has one row a page, as new_pages((P, Hkv, ...), dtype=...): an engine that owns the memory hands out parts of it.
    new_pages: Callable[..., Tensor] = torch.zeros
    shard: int | None = None  # which part of the model's KV heads this is; None: by the rank in torch.distributed
    offloaded: bool = False  # K and V lie outside the device
    hot: HotRows | None = None  # copies of some of them on it

    @property
    def num_kv_heads(self) -> int:
        return self.kv.k_cache.shape[1]

    @property
    def page_size(self) -> int:
        return self.kv.k_cache.shape[2]

    @property
    def head_dim(self) -> int:
        return self.kv.k_cache.shape[3]

    def limits(self, page_table: Tensor, query_tokens: int) -> Limits:
        """Token counts of a call, as far as the page table reaches, and the capacity of its lists."""
        return Limits.of(page_table.shape[1] * self.page_size, query_tokens, self.policy.budget, self.policy.always)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layer, once."""
        own = (self.kv, self.shadow or (), self.bounds or (), self.means or (), self.scales or (), self.hot or ())
        groups = (*own, self.policy.budget, self.policy.pruning, self.selector_state.values())
        return [self.budget_counters, *(value for group in groups for value in group if isinstance(value, Tensor))]

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything kept beside them."""
        kv = sum(tensor.nbytes for tensor in self.kv)
        return {"kv": kv, "extra": sum(t.nbytes for t in self.tensors()) - kv}

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch reads no tensor of float8 back from a pickle.
        return {**vars(self), "kv": KV(*(pages.view(torch.uint8) for pages in self.kv))} if self.kv.is_fp8 else dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.scales is not None:
            self.kv = KV(*(pages.view(FP8) for pages in self.kv))

    @torch.no_grad()
    def calibrate(self, q: Tensor, k: Tensor, positions: Tensor | None, sm_scale: float, v: Tensor | None = None) -> None:
        """Calibrates in place from the prompt that first fills the cache, before that prompt is appended: the centre of the shadow, the
        scales of K and V in float8_e4m3fn, and what the selector takes from it; see `Selector.calibrate`."""
        if self.scales is not None or (self.shadow is not None and not self.centred_by_file):
            center = mean_key(k, positions)
            if self.shadow is not None and self.shadow.k_center is not None and not self.centred_by_file:
                self.shadow.k_center.copy_(center)
            if self.scales is not None:
                k_descale = descale(k - center, positions)
                shift = exact_first(k, positions, center, k_descale)
                _write(self.scales, k_descale, None if v is None else descale(v, positions), shift)
        if self.plan.selector is not None:
            self.plan.selector.calibrate(q, k, self, positions, sm_scale)

    def reset(self) -> None:
        """Forgets the budget counters and a calibration that came from a prompt."""
        self.budget_counters.zero_()
        if self.hot is not None:
            self.hot.hot_tokens.fill_(-1)
            self.hot.hot_claims.fill_(-1)
        if self.scales is not None:
            _write(self.scales, torch.ones(()), torch.ones(()), torch.zeros(()))
        if self.shadow is not None:
            self.centred_by_file = restore(self.shadow, self.plan.calibration, self.index, self.shard)
        if self.plan.selector is not None:
            self.plan.selector.reset(self)


def mean_key(k: Tensor, positions: Tensor | None) -> Tensor:
    """Mean of the keys k [B, T, Hkv, D] that are no padding, [Hkv, D] fp32; 0 where it is not finite. Nothing is read on the host."""
    if positions is None:
        center = k.sum((0, 1), dtype=torch.float32) / (k.shape[0] * k.shape[1])
    else:
        live = (positions >= 0)[:, :, None, None]
        center = torch.where(live, k, 0.0).sum((0, 1), dtype=torch.float32) / live.sum().clamp(min=1)
    return torch.where(center.isfinite(), center, 0.0)


def exact_first(k: Tensor, positions: Tensor | None, center: Tensor, k_descale: Tensor) -> Tensor:
    """The shift next to `center` [Hkv, D] from which the first key of the sequences is a number of float8_e4m3fn, [Hkv, D] fp32.

    Most heads give the first token a large share of their weight, by a key far from all others: its rounding would move everything else.
    SmolLM2, 1,000 tokens, dense attention over K and V so stored: a KL of 0.0017, by the centre alone 0.0059. Of first tokens that
    differ between sequences it is their mean. Nothing is read on the host.
    """
    first = k[:, :1] if positions is None else k
    is_first = torch.ones_like(first[:, :, :1, :1], dtype=torch.bool) if positions is None else (positions == 0)[:, :, None, None]
    found = torch.where(is_first, first, 0.0).sum((0, 1), dtype=torch.float32) / is_first.sum().clamp(min=1)
    kept = ((found - center) / k_descale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * k_descale[:, None]
    return torch.where(found.isfinite() & is_first.any(), found - kept, center)


def _write(scales: Scales, *values: Tensor | None) -> None:
    """In place, but for what is None."""
    for tensor, value in zip(scales, values, strict=True):
        if tensor is not None and value is not None:
            tensor.copy_(value)


def descale(x: Tensor, positions: Tensor | None) -> Tensor:
    """The power of two by which rows x [B, T, Hkv, D] are divided for float8_e4m3fn, [Hkv] fp32; 1 where nothing finite decides.

    The largest of the rows that are no padding becomes 16 to 32 of 448: there is room for later ones of 14 times its size, and what is
    smaller than a 2000th of it loses more than its sixteenth. Nothing is read on the host.
    """
    size = x.float().abs()
    size = torch.where(size.isfinite(), size, 0.0)
    if positions is not None:
        size = torch.where((positions >= 0)[:, :, None, None], size, 0.0)
    largest = size.amax((0, 1, 3))
    return torch.where(largest > 0, torch.exp2(largest.clamp(min=2.0**-100).log2().floor() - 4), 1.0)


def allocate_layer(
    plan: LayerPlan,
    num_pages: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    previous: PagedKVLayer | None = None,
    *,
    index: int | None = None,
    shard: int | None = None,
    new_pages: Callable[..., Tensor] | None = None,
    new_kv: Callable[..., Tensor] | None = None,
    hot_rows: tuple[int, int] | None = None,
) -> PagedKVLayer:
    """Zeroed tensors of one layer; the shadow is as the plan's calibration file says, without one an identity until a prompt calibrates it.

    `previous` is the layer below: its index counts on, and a selector may share that layer's state. Without one an engine gives `index`,
    and `shard` and `new_pages` where the heads of this rank and the memory of the pages are its own affair (see `PagedKVLayer`).
    `new_kv` makes K and V where those alone lie elsewhere, outside the device; `hot_rows`: sequences, and rows a KV head that each has
    copies of on it.
    """
    new_pages = new_pages or partial(torch.zeros, device=device)
    if index is None:
        index = 0 if previous is None else previous.index + 1
    rows = (num_pages, num_kv_heads, page_size, head_dim)
    stored = plan.stored_dtype(dtype)
    layer = PagedKVLayer(
        plan=plan,
        policy=plan.policy(num_pages * page_size, num_qo_heads, num_kv_heads, device),
        kv=KV(*((new_kv or new_pages)(rows, dtype=stored) for _ in KV._fields)),
        budget_counters=torch.zeros(num_kv_heads, COUNTER_COLUMNS, dtype=torch.int64, device=device),
        dtype=dtype,
        index=index,
        new_pages=new_pages,
        shard=shard,
        offloaded=new_kv is not None,
    )
    if stored == FP8:
        k_descale, v_descale = torch.ones(2, num_kv_heads, dtype=torch.float32, device=device).unbind()
        layer.scales = Scales(k_descale, v_descale, torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device))
    if plan.selector is None:
        return layer
    if hot_rows is not None:
        sequences, places = hot_rows
        copies = (torch.zeros(sequences, num_kv_heads, places, head_dim, dtype=dtype, device=device) for _ in KV._fields)
        marks = (torch.full((sequences, num_kv_heads, places), -1, dtype=torch.int32, device=device) for _ in range(2))
        layer.hot = HotRows(*copies, *marks)
    if plan.prunes or plan.selector.uses_shadow:
        layer.shadow = Shadow(
            new_pages((num_pages, num_kv_heads, page_size * head_dim // 2), dtype=torch.uint8),
            new_pages((num_pages, num_kv_heads, page_size, 2), dtype=torch.bfloat16),
            torch.zeros(num_kv_heads, head_dim, dtype=torch.int32, device=device),
            torch.zeros(num_kv_heads, dtype=torch.int32, device=device),
            torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device),
        )
    layer.selector_state = plan.selector.allocate(layer, previous)
    layer.reset()
    return layer
