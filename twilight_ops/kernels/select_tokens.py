"""Triton kernels of twilight::select_tokens: prefix logits of every token, then the choice."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, Candidates, Paging, Shadow
from ..capacity import Limits
from ..ops.select_tokens import outputs
from ._rank import rank
from ._shadow_logits import shadow_logits


def propose(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    limits: Limits,
    head_token_budget: Tensor | None,
    sm_scale: float,
    indices: Tensor,
    counts: Tensor,
    dense_below: int = -1,
    pad: bool = True,
) -> None:
    """Fills `indices` and `counts`; sequences no longer than `dense_below` are left out."""
    page_size, max_pages = shadow.k_scale.shape[2], paging.page_table.shape[1]
    logits = q.new_empty((*q.shape[:3], max_pages * page_size), dtype=torch.float32)
    stats = shadow_logits(q, shadow, paging, Candidates(), sm_scale, logits, prefix=True, dense_below=dense_below)
    lists = (paging.seq_lens, head_token_budget, indices, counts)
    rank(logits, *stats, max_pages * page_size, *lists, max_pages, page_size, 1, limits, dense_below, pad)


def select_tokens(q: Tensor, shadow: Shadow, paging: Paging, budget: Budget, sm_scale: float, always: Always) -> tuple[Tensor, Tensor]:
    indices, counts = outputs(q, shadow, paging, budget, sm_scale, always)
    limits = Limits.of(paging.page_table.shape[1] * shadow.k_scale.shape[2], q.shape[1], budget, always)
    propose(q, shadow, paging, limits, budget.head_token_budget, sm_scale, indices, counts)
    return indices, counts
