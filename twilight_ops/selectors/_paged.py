"""Rows a selector keeps beside the cache, addressed by the cache's own page table."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import PageMeans


def allocate_means(layer) -> PageMeans:
    """4-bit means of the layer's pages, which `append_kv` keeps from then on."""
    shape = (layer.kv.k_cache.shape[0], layer.num_kv_heads)
    codes = layer.new_pages((*shape, layer.head_dim // 2), dtype=torch.uint8)
    return PageMeans(codes, layer.new_pages((*shape, 2), dtype=torch.bfloat16))


def allocate_rows(layer, width: int, dtype: torch.dtype) -> Tensor:
    """Zeros [P + 1, Hkv, S, width]; the last page takes the rows that `write_rows` must skip, so that every shape stays fixed."""
    pages, kv_heads, page_size, _ = layer.kv.k_cache.shape
    return torch.zeros(pages + 1, kv_heads, page_size, width, dtype=dtype, device=layer.kv.k_cache.device)


def row_positions(seq_lens: Tensor, tokens: int, positions: Tensor | None) -> Tensor:
    """Positions [B, T] int64 that append_kv gives to the newest rows; negative ones are skipped."""
    if positions is not None:
        return positions.long()
    return seq_lens.long()[:, None] - tokens + torch.arange(tokens, device=seq_lens.device)


def physical_pages(page_table: Tensor, num_pages: int) -> Tensor:
    """The page table [B, M] int64 with every entry that is no page replaced by the spare page `num_pages`."""
    table = page_table.long()
    return torch.where((table >= 0) & (table < num_pages), table, num_pages)


def write_rows(rows: Tensor, state: Tensor, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None) -> None:
    """Writes rows [B, T, Hkv, X] into state [P + 1, Hkv, S, X] where append_kv puts the same tokens."""
    spare, page_size = state.shape[0] - 1, state.shape[2]
    position = row_positions(seq_lens, rows.shape[1], positions)  # [B, T]
    page = position.div(page_size, rounding_mode="floor")
    inside = (page >= 0) & (page < page_table.shape[1])
    physical = physical_pages(page_table, spare).gather(1, page.clamp(0, page_table.shape[1] - 1))
    physical = torch.where(inside, physical, spare).flatten()
    slot = position.remainder(page_size).flatten()
    state[physical, :, slot] = rows.flatten(0, 1).to(state.dtype)


def read_rows(state: Tensor, page_table: Tensor) -> Tensor:
    """Every row of every sequence, [B, Hkv, M * S, X]; rows that hold no token read something finite or stale: mask them."""
    rows = state[physical_pages(page_table, state.shape[0] - 1)]  # [B, M, Hkv, S, X]
    return rows.transpose(1, 2).flatten(2, 3)


def read_keys(layer, page_table: Tensor) -> Tensor:
    """K of every position in the cache, [B, Hkv, M * S, D], as the model has it."""
    pages = layer.kv.k_cache[page_table.long().clamp(0, layer.kv.k_cache.shape[0] - 1)]  # [B, M, Hkv, S, D]
    keys = pages.transpose(1, 2).flatten(2, 3)
    return keys if layer.scales is None else layer.scales.keys(keys, layer.dtype)
