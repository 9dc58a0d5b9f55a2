"""Paged K and V of all layers, with the 4-bit K shadow and whatever else the selectors read."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import calibration
from ._settings import integer, of_length, one_of
from .capacity import COUNTER_COLUMNS
from .config import LayerPlan, TwilightConfig
from .ops._checks import HEAD_DIMS


@dataclass
class PagedKVLayer:
    """The tensors of one layer; allocated once, only ever written in place, so a captured graph can hold their addresses."""

    plan: LayerPlan
    k_cache: Tensor  # [P, Hkv, S, D]
    v_cache: Tensor  # [P, Hkv, S, D]
    budget_counters: Tensor  # [Hkv, COUNTER_COLUMNS] int64
    index: int = 0  # of the layer in its model
    k_quant: Tensor | None = None  # [P, Hkv, S * D / 2] uint8
    k_scale: Tensor | None = None  # [P, Hkv, S, 2] bf16
    channel_order: Tensor | None = None  # [Hkv, D] int32
    prefix_channels: Tensor | None = None  # [Hkv] int32
    page_bounds: Tensor | None = None  # [P, Hkv, 2, D]
    bounds_scale: Tensor | None = None  # [P, Hkv, 2] bf16
    head_token_budget: Tensor | None = None  # [Hkv] int32
    top_p_per_head: Tensor | None = None  # [1, Hq] fp32
    selector_state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[2]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layer, once."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        return own + list(self.selector_state.values())

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything kept beside them."""
        kv = self.k_cache.nbytes + self.v_cache.nbytes
        return {"kv": kv, "extra": sum(t.nbytes for t in self.tensors()) - kv}


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
) -> PagedKVLayer:
    """Zeroed tensors of one layer, with an identity channel order and the whole row as prefix until something calibrates them.

    `previous` is the layer below: its index counts on, and a selector may share that layer's state.
    """

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    layer = PagedKVLayer(
        plan=plan,
        k_cache=zeros(num_pages, num_kv_heads, page_size, head_dim, dtype=dtype),
        v_cache=zeros(num_pages, num_kv_heads, page_size, head_dim, dtype=dtype),
        index=0 if previous is None else previous.index + 1,
        budget_counters=zeros(num_kv_heads, COUNTER_COLUMNS, dtype=torch.int64),
    )
    if plan.uses_shadow:
        layer.k_quant = zeros(num_pages, num_kv_heads, page_size * head_dim // 2, dtype=torch.uint8)
        layer.k_scale = zeros(num_pages, num_kv_heads, page_size, 2, dtype=torch.bfloat16)
        order = torch.arange(head_dim, dtype=torch.int32, device=device)
        layer.channel_order = order.expand(num_kv_heads, -1).contiguous()
        prefix = getattr(plan.selector, "prefix_channels", None)
        if prefix is None:
            prefix = head_dim
        integer(8, head_dim, multiple_of=8)(type(plan.selector).__name__, "prefix_channels", prefix)
        layer.prefix_channels = torch.full((num_kv_heads,), prefix, dtype=torch.int32, device=device)
    if plan.uses_page_bounds:
        eight_bit = getattr(plan.selector, "bounds_dtype", "model") == "int8"
        layer.page_bounds = zeros(num_pages, num_kv_heads, 2, head_dim, dtype=torch.uint8 if eight_bit else dtype)
        if eight_bit:
            layer.bounds_scale = zeros(num_pages, num_kv_heads, 2, dtype=torch.bfloat16)
    if plan.head_token_budget is not None:
        of_length("LayerOverride", "head_token_budget", plan.head_token_budget, num_kv_heads, "KV head")
        # No sequence is longer than all pages.
        budgets = [min(budget, num_pages * page_size) for budget in plan.head_token_budget]
        layer.head_token_budget = torch.tensor(budgets, dtype=torch.int32, device=device)
    if plan.head_top_p is not None:
        of_length("LayerOverride", "head_top_p", plan.head_top_p, num_qo_heads, "query head")
        layer.top_p_per_head = torch.tensor([plan.head_top_p], dtype=torch.float32, device=device)
    if plan.selector is not None:
        layer.selector_state = plan.selector.allocate(layer, previous)
    return layer


class PagedKVCache:
    """Layers plus the page table and lengths they share; whatever serves a model has one of these.

    Pages are laid out for the largest batch at once: sequence b owns physical pages `b * M .. b * M + M - 1`. Serving systems with a
    page allocator of their own keep `PagedKVLayer`s and pass their own page table.

    Args:
        config: selector, p and page size.
        num_layers, num_qo_heads, num_kv_heads, head_dim: the model's; with tensor parallelism, this rank's head counts.
        max_batch_size: sequences.
        max_cache_len: tokens a sequence; rounded up to whole pages.
        dtype, device: of K and V.

    Raises:
        ValueError: a size out of range, or settings that do not fit the model.
    """

    # Allocated with the first layer, and never moved.
    page_table: Tensor  # [max_batch_size, M] int32
    seq_lens: Tensor  # [max_batch_size] int32
    live_page_table: Tensor  # [B, M], a view: the sequences in use
    live_seq_lens: Tensor  # [B], a view

    def __init__(
        self,
        config: TwilightConfig,
        num_layers: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_batch_size: int,
        max_cache_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        device = torch.device(device)
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "num_qo_heads": num_qo_heads,
            "max_batch_size": max_batch_size,
            "max_cache_len": max_cache_len,
        }
        for name, size in sizes.items():
            integer(1)("PagedKVCache", name, size)
        integer(num_kv_heads, multiple_of=num_kv_heads)("PagedKVCache", "num_qo_heads", num_qo_heads)
        one_of(*HEAD_DIMS)("PagedKVCache", "head_dim", head_dim)
        config.check_layers(num_layers)
        never_sparse = config.never_sparse(num_layers, max_cache_len, device.type, max_batch_size * num_kv_heads)
        if never_sparse is not None:
            warnings.warn(f"PagedKVCache: {never_sparse}", stacklevel=2)
        self._lay_out(config, max_batch_size, max_cache_len)
        for _ in range(num_layers):
            self.add_layer(num_qo_heads, num_kv_heads, head_dim, dtype, device)

    @classmethod
    def without_layers(cls, config: TwilightConfig, max_batch_size: int, max_cache_len: int) -> PagedKVCache:
        """A cache that `add_layer` gives its layers, where heads, dtype and device are known only when a model runs."""
        cache = cls.__new__(cls)
        cache._lay_out(config, max_batch_size, max_cache_len)
        return cache

    def _lay_out(self, config: TwilightConfig, max_batch_size: int, max_cache_len: int) -> None:
        self.config, self.max_batch_size = config, max_batch_size
        self.max_pages = -(-max_cache_len // config.page_size)
        self.layers: list[PagedKVLayer] = []

    def add_layer(self, num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> PagedKVLayer:
        """Allocates the next layer, for this rank's head counts, calibrated from the selector's file if it has one.

        Raises:
            ValueError: a device without kernels, or settings or a file that do not fit these sizes; the cache is as it was.
        """
        num_pages = self.max_batch_size * self.max_pages
        layer = allocate_layer(
            self.config.layer_plan(len(self.layers), device.type, self.max_batch_size * num_kv_heads),
            num_pages,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            self.config.page_size,
            dtype,
            device,
            self.layers[-1] if self.layers else None,
        )
        calibration.initialise(layer)
        if not self.layers:
            self.page_table = torch.arange(num_pages, dtype=torch.int32, device=device).view(self.max_batch_size, self.max_pages)
            self.seq_lens = torch.zeros(self.max_batch_size, dtype=torch.int32, device=device)
            self._view_rows(self.max_batch_size)
        self.layers.append(layer)
        return layer

    @property
    def max_cache_len(self) -> int:
        """Tokens a sequence."""
        return self.max_pages * self.config.page_size

    @property
    def batch_size(self) -> int:
        """Sequences in use."""
        return self.live_seq_lens.shape[0]

    def use_rows(self, batch: int) -> bool:
        """Points the live views at the first `batch` sequences; whether they are other tensors now."""
        if batch == self.batch_size:
            return False
        self._view_rows(batch)
        return True

    def _view_rows(self, batch: int) -> None:
        # Made once for all steps, and never under inference mode: a graph holds them.
        with torch.inference_mode(False):
            self.live_page_table, self.live_seq_lens = self.page_table[:batch], self.seq_lens[:batch]

    def nbytes(self) -> dict[str, int]:
        """Bytes of plain K and V, and of everything the layers keep beside them."""
        sizes = [layer.nbytes() for layer in self.layers]
        return {name: sum(size[name] for size in sizes) for name in ("kv", "extra")}

    def reset(self) -> None:
        """Forgets every sequence, what was counted, and a calibration that came from a prompt; addresses stay."""
        if self.layers:
            self.seq_lens.zero_()
        self.reset_budget()
        for layer in self.layers:
            calibration.initialise(layer)

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        for layer in self.layers:
            layer.budget_counters.zero_()

    def __getstate__(self) -> dict[str, Any]:
        # A view does not stay one through pickle.
        state = {name: value for name, value in vars(self).items() if not name.startswith("live_")}
        return {**state, "rows": self.batch_size if self.layers else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("rows")
        vars(self).update(state)
        if rows is not None:
            self._view_rows(rows)
