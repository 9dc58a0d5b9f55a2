"""Paged K and V of all layers, with the 4-bit K shadow and whatever else the selectors read."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ._settings import integer, one_of
from .config import TwilightConfig
from .host_memory import HostMemory
from .layer import PagedKVLayer, allocate_layer
from .ops._checks import HEAD_DIMS


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
        self._lay_out(config, max_batch_size, max_cache_len, num_layers)
        for _ in range(num_layers):
            self.add_layer(num_qo_heads, num_kv_heads, head_dim, dtype, device)

    @classmethod
    def without_layers(cls, config: TwilightConfig, max_batch_size: int, max_cache_len: int, num_layers: int = 1) -> PagedKVCache:
        """A cache that `add_layer` gives its layers, where heads, dtype and device are known only when a model runs.

        `num_layers`: how many there will be; offloaded K and V are allocated for all of them with the first.
        """
        cache = cls.__new__(cls)
        cache._lay_out(config, max_batch_size, max_cache_len, num_layers)
        return cache

    def _lay_out(self, config: TwilightConfig, max_batch_size: int, max_cache_len: int, num_layers: int) -> None:
        self.config, self.max_batch_size, self.num_layers = config, max_batch_size, num_layers
        self.max_pages = -(-max_cache_len // config.page_size)
        self.layers: list[PagedKVLayer] = []
        self._host: HostMemory | None = None

    def allocate_table(self, device: torch.device) -> None:
        """Page table and lengths, once."""
        if hasattr(self, "page_table"):
            return
        pages = torch.arange(self.max_batch_size * self.max_pages, dtype=torch.int32, device=device)
        self.page_table = pages.view(self.max_batch_size, self.max_pages)
        self.seq_lens = torch.zeros(self.max_batch_size, dtype=torch.int32, device=device)
        self._view_rows(self.max_batch_size)

    def add_layer(
        self, num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device, index: int | None = None
    ) -> PagedKVLayer:
        """Allocates the next layer, for this rank's head counts, calibrated from the selector's file if it has one.

        `index`: its number in the model, where layers between it and the one before are not of this cache.

        Raises:
            ValueError: a device without kernels, or settings or a file that do not fit these sizes; the cache is as it was.
        """
        index = len(self.layers) if index is None else index
        pages = self.max_batch_size * self.max_pages
        plan = self.config.layer_plan(index, device.type, self.max_batch_size * num_kv_heads)
        if self.config.offload:
            stored = plan.stored_dtype(dtype)
            self._reserve(HostMemory.bytes_of((pages, num_kv_heads, self.config.page_size, head_dim), stored), device)
        layer = allocate_layer(
            plan,
            pages,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            self.config.page_size,
            dtype,
            device,
            self.layers[-1] if self.layers else None,
            index=index,
            new_kv=None if self._host is None else self._host.new,
            # A place for every token is as many as can be used.
            hot_rows=(self.max_batch_size, min(self.config.hot_tokens, self.max_cache_len)) if self.config.hot_tokens else None,
        )
        self.allocate_table(device)
        self.layers.append(layer)
        return layer

    def _reserve(self, nbytes: int, device: torch.device) -> None:
        """Host memory for K and V of the next layer, `nbytes` each: of all layers at once, if they are as large as the first."""
        if self._host is None or self._host.taken + 2 * nbytes > self._host.nbytes:
            layers = max(1, self.num_layers - len(self.layers))
            directory = None if self.config.offload is True else str(self.config.offload)
            self._host = HostMemory(2 * nbytes * layers, device, directory)

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
        """Bytes of plain K and V, of everything the layers keep beside them, and of K and V that lie outside the device where any do."""
        sizes = [layer.nbytes() for layer in self.layers]
        total = {name: sum(size[name] for size in sizes) for name in ("kv", "extra")}
        return total | ({"offloaded": total["kv"]} if self.config.offload else {})

    def reset(self) -> None:
        """Forgets every sequence, what was counted, and a calibration that came from a prompt; addresses stay."""
        if hasattr(self, "seq_lens"):
            self.seq_lens.zero_()
        for layer in self.layers:
            layer.reset()

    def reset_budget(self) -> None:
        """Starts the budget counters again."""
        for layer in self.layers:
            layer.budget_counters.zero_()

    def __getstate__(self) -> dict[str, Any]:
        if self.config.offload:
            raise TypeError("PagedKVCache: pickle and copy: expected K and V on the device, got an offloaded cache")
        # A view does not stay one through pickle.
        state = {name: value for name, value in vars(self).items() if not name.startswith("live_")}
        return {**state, "rows": self.batch_size if hasattr(self, "seq_lens") else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        rows = state.pop("rows")
        vars(self).update(state)
        if rows is not None:
            self._view_rows(rows)
