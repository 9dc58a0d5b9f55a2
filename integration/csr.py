"""Page tables as other engines write them: `indptr`, `indices` and `last_page_len`, as FlashInfer's wrappers take and give them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from twilight_ops._settings import refuse
from twilight_ops.arguments import Paging


class CSR(NamedTuple):
    """Lists of pages, one a row, end to end.

    Args:
        indptr: [R + 1] int32, where each row's pages begin.
        indices: [N] int32, physical pages.
        last_page_len: [R] int32, tokens in the last page of each row; all others are full.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def paging_of(table: CSR, page_size: int, max_pages: int | None = None) -> Paging:
    """The page table and lengths that operators take, from lists of pages of B sequences.

    Args:
        table: R = B.
        page_size: tokens a page.
        max_pages: columns of the page table, at least the pages of the longest sequence; None looks, which waits for the device.

    Returns:
        page_table [B, max_pages] int32, -1 where a sequence has no page, and seq_lens [B] int32.

    Raises:
        ValueError: another rank or dtype.
    """
    _check(table)
    pages = table.indptr[1:] - table.indptr[:-1]
    if max_pages is None:
        max_pages = int(pages.max()) if len(pages) else 0
    column = torch.arange(max_pages, device=pages.device)
    live = column < pages[:, None]
    place = torch.where(live, table.indptr[:-1, None] + column, 0)
    # One entry more, so that there is something to read where there are no pages.
    indices = torch.cat([table.indices, table.indices.new_full((1,), -1)])
    page_table = torch.where(live, indices[place.long()], -1).int()
    seq_lens = torch.where(pages > 0, (pages - 1) * page_size + table.last_page_len, 0).int()
    return Paging(page_table, seq_lens)


def csr_of_kept(kept_indices: Tensor, kept_counts: Tensor, page_table: Tensor, page_size: int) -> CSR:
    """Kept sets as lists of pages of one token, a row for each sequence and KV head: row b * Hkv + h.

    Page i of one token is token `i % page_size` of physical page `i // page_size`, so K and V of head h, `cache[:, h].flatten(0, 1)`
    [P * S, D], are its pages. How many tokens were kept is known on the device: this waits for it.

    Args:
        kept_indices, kept_counts: [B, Hkv, N] and [B, Hkv] int32, as `Observation` has them.
        page_table: [B, M] int32.
        page_size: tokens a page.
    """
    batch, kv_heads, slots = kept_indices.shape
    live = torch.arange(slots, device=kept_indices.device) < kept_counts[..., None]
    position = kept_indices.clamp(min=0).long()
    physical = page_table.long()[:, None].expand(batch, kv_heads, -1).gather(2, position // page_size)
    slot = physical * page_size + position % page_size
    indptr = torch.zeros(batch * kv_heads + 1, dtype=torch.int32, device=kept_indices.device)
    indptr[1:] = kept_counts.flatten().cumsum(0)
    return CSR(indptr, slot[live].int(), (kept_counts.flatten() > 0).int())


def _check(table: CSR) -> None:
    for name, tensor in table._asdict().items():
        if tensor.dim() != 1 or tensor.dtype != torch.int32:
            refuse("csr", name, "a one-dimensional int32 tensor", f"{tensor.dim()} dimensions of {tensor.dtype}")
    if len(table.indptr) != len(table.last_page_len) + 1:
        refuse("csr", "last_page_len", f"{max(0, len(table.indptr) - 1)} entries, one a row of indptr", len(table.last_page_len))
