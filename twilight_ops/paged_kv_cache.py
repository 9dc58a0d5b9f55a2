"""Paged K and V of all layers, with the 4-bit K shadow and whatever else the selectors read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ._settings import integer, one_of
from .config import TwilightConfig
from .layer import PagedKVLayer, allocate_layer
from .ops._checks import HEAD_DIMS


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
