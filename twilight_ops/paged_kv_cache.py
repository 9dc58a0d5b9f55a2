"""Paged K and V of all layers, with the 4-bit K shadow and whatever else the selectors read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """Layers plus the page table and lengths they share.

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
        self.config = config
        self.max_pages = -(-max_cache_len // config.page_size)
        num_pages = max_batch_size * self.max_pages
        self.page_table = torch.arange(num_pages, dtype=torch.int32, device=device).view(max_batch_size, self.max_pages)
        self.seq_lens = torch.zeros(max_batch_size, dtype=torch.int32, device=device)
        layers: list[PagedKVLayer] = []
        for i in range(num_layers):
            layer = allocate_layer(
                config.layer_plan(i, device.type, max_batch_size * num_kv_heads),
                num_pages,
                num_qo_heads,
                num_kv_heads,
                head_dim,
                config.page_size,
                dtype,
                device,
                layers[-1] if layers else None,
            )
            layers.append(layer)
        self.layers: Sequence[PagedKVLayer] = layers
