"""twilight::select_pages: Quest's page selector, from the element-wise bounds of each page's keys."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, PageBounds, Paging
from ..capacity import Limits
from ._checks import Checker
from ._library import Operator


def select_pages(
    q: Tensor, bounds: PageBounds, paging: Paging, page_size: int, budget: Budget, sm_scale: float, always: Always = Always()
) -> tuple[Tensor, Tensor]:
    """Selects the pages whose bounds promise the largest attention weight, one ascending list a KV head.

    `score[page] = sum over the group's heads and query tokens of softmax over pages(sm_scale * sum_d max(q_d min_d, q_d max_d))`.
    `ceil(budget / page_size)` pages are taken, chosen as `select_tokens` chooses tokens: pages of the tokens of `always` first, then
    by bins of scores, of the last bin the lowest pages. A page whose score is NaN or +inf ranks above all others.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        bounds: in q's dtype, or 8-bit codes.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        page_size: S, tokens.
        budget: tokens. It and `always` may be larger than the table and then mean all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        always: the first and newest tokens, which are always among the candidates.

    Returns:
        indices [B, Hkv, capacity] int32 logical pages, ascending, unique, -1 pads; counts [B, Hkv] int32.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Quest, arXiv 2406.10774; sums of softmaxed bounds over the group instead of per-head lists.
    """
    return OPERATOR(q, bounds, paging, page_size, budget, sm_scale, always)


def check(q: Tensor, bounds: PageBounds, paging: Paging, page_size: int, budget: Budget, sm_scale: float, always: Always) -> None:
    c = Checker("select_pages", q)
    c.query(q)
    c.bounds(bounds, q.dtype, "a tensor")
    c.sizes["S"] = page_size
    c.geometry()
    c.paging(paging)
    c.budget(budget, always)
    c.scale(sm_scale)
    c.no_gradients()


def outputs(
    q: Tensor, bounds: PageBounds, paging: Paging, page_size: int, budget: Budget, sm_scale: float, always: Always
) -> tuple[Tensor, Tensor]:
    limits = Limits.of(paging.page_table.shape[1] * page_size, q.shape[1], budget, always)
    lists = (q.shape[0], bounds.page_bounds.shape[1])
    return q.new_empty((*lists, limits.page_capacity(page_size)), dtype=torch.int32), q.new_empty(lists, dtype=torch.int32)


OPERATOR = Operator(select_pages, "(Tensor indices, Tensor counts)", check, outputs)
