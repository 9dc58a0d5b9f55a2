"""Triton kernels of twilight::select_tokens: prefix logits of every token, or of those of the best pages, then the choice."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, Candidates, PageLevel, PageMeans, Paging, Shadow
from ..capacity import Limits
from ..ops._library import empty_lists
from ..ops.select_tokens import outputs
from . import select_pages
from ._rank import rank
from ._shadow_logits import shadow_logits


def propose(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    limits: Limits,
    head_token_budget: Tensor | None,
    sm_scale: float,
    means: PageMeans | None,
    level: PageLevel,
    indices: Tensor,
    counts: Tensor,
    dense_below: int = -1,
    pad: bool = True,
) -> None:
    """Fills `indices` and `counts`; sequences no longer than `dense_below` are left out."""
    batch, kv_heads, _ = indices.shape
    page_size, max_pages = shadow.k_scale.shape[2], paging.page_table.shape[1]
    pages, slots = Candidates(), max_pages * page_size
    if level.applies(slots):
        lists = empty_lists(q, batch, kv_heads, limits.kept_pages_capacity(page_size, level))
        budget = (limits, head_token_budget, sm_scale)
        select_pages.propose(q, None, means, shadow, paging, page_size, *budget, *lists, dense_below, pad=False, level=level)
        pages, slots = Candidates(*lists, page_size), lists[0].shape[2] * page_size
    logits = q.new_empty((*q.shape[:3], slots), dtype=torch.float32)
    stats = shadow_logits(q, shadow, paging, pages, sm_scale, logits, prefix=True, dense_below=dense_below)
    lists = (paging.seq_lens, head_token_budget, indices, counts)
    rank(logits, *stats, slots, *lists, max_pages, page_size, 1, limits, dense_below, pad, pages=pages)


def select_tokens(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    level: PageLevel,
) -> tuple[Tensor, Tensor]:
    indices, counts = outputs(q, shadow, paging, budget, sm_scale, always, means, level)
    limits = Limits.of(paging.page_table.shape[1] * shadow.k_scale.shape[2], q.shape[1], budget, always)
    propose(q, shadow, paging, limits, budget.head_token_budget, sm_scale, means, level, indices, counts)
    return indices, counts
