"""The first and the newest tokens as a list: what the selector "streaming" proposes."""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Paging
from ..capacity import Limits
from ._launch import Launch, cdiv
from ._rank import _row_limits

LIST = Launch(1024, 4, 1, "one store an element")


@triton.jit
def window_kernel(
    seq_lens,  # [B]
    head_budget,  # [Hkv] or None
    indices,  # [B, Hkv, capacity]
    counts,  # [B, Hkv]
    max_pages,
    token_budget,
    budget_fraction: tl.float64,
    sink_tokens,
    recent_tokens,
    capacity,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, tiles of capacity)."""
    row = tl.program_id(0)
    length, _, sinks, _, take = _row_limits(
        seq_lens, head_budget, None, row, max_pages, token_budget, budget_fraction, 0.0, 0, sink_tokens, recent_tokens, capacity, KV_HEADS,
        PAGE, 1,
    )  # fmt: skip
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.where(slot < sinks, slot, length - take + slot)
    tl.store(indices + row.to(tl.int64) * capacity + slot, token, mask=slot < take)
    if tl.program_id(1) == 0:
        tl.store(counts + row, take)


def sinks_and_window(
    paging: Paging, page_size: int, limits: Limits, head_token_budget: Tensor | None, indices: Tensor, counts: Tensor
) -> None:
    """Fills `indices` and `counts`; the list carries no pads."""
    batch, kv_heads, capacity = indices.shape
    if indices.numel() == 0:
        counts.zero_()
        return
    window_kernel[(batch * kv_heads, cdiv(capacity, LIST.block))](
        paging.seq_lens,
        head_token_budget,
        indices,
        counts,
        paging.page_table.shape[1],
        limits.token_budget,
        limits.budget_fraction,
        limits.sink_tokens,
        limits.recent_tokens,
        capacity,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        BLOCK=LIST.block,
        **LIST.options,
    )
