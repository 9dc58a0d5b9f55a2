"""twilight::select_pages: the best pages, by element-wise bounds of their keys as Quest has them, or by their means."""

from torch import Tensor

from ..arguments import Always, Budget, PageBounds, PageMeans, Paging, Shadow
from ..capacity import Limits
from ._checks import Checker
from ._library import Operator, empty_lists


def select_pages(
    q: Tensor,
    bounds: PageBounds | None,
    paging: Paging,
    page_size: int,
    budget: Budget,
    sm_scale: float,
    always: Always = Always(),
    means: PageMeans | None = None,
    shadow: Shadow | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects the pages whose bounds or means promise the largest attention weight, one ascending list a KV head.

    `score[page] = sum over the group's heads and query tokens of softmax over pages(sm_scale * x)`, with
    `x = sum_d max(q_d min_d, q_d max_d)` of bounds, `x = sum_d q_d mean_d` of means. `ceil(budget / page_size)` pages are taken, chosen
    as `select_tokens` chooses tokens: pages of the tokens of `always` first, then by bins of scores, of the last bin the lowest pages.
    A page whose score is NaN or +inf ranks above all others.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        bounds: in q's dtype, or 8-bit codes; None with means.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        page_size: S, tokens.
        budget: tokens. It and `always` may be larger than the table and then mean all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        always: the first and newest tokens, which are always among the candidates.
        means: instead of bounds.
        shadow: with means, what `append_kv` was given beside them: its `channel_order` is theirs.

    Returns:
        indices [B, Hkv, capacity] int32 logical pages, ascending, unique, -1 pads; counts [B, Hkv] int32.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: Quest, arXiv 2406.10774; sums of softmaxed bounds over the group instead of per-head lists.
    """
    return OPERATOR(q, bounds, paging, page_size, budget, sm_scale, always, means, shadow)


def check(
    q: Tensor,
    bounds: PageBounds | None,
    paging: Paging,
    page_size: int,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    shadow: Shadow | None,
) -> None:
    c = Checker("select_pages", q)
    c.query(q)
    if means is None:
        c.bounds(bounds, q.dtype, "a tensor")
    else:
        for name, tensor in zip(PageBounds._fields, bounds or (), strict=False):
            c.require(tensor is None, name, "None, because page_means is given", "a tensor")
        c.means(means)
    c.sizes["S"] = page_size
    c.geometry()
    c.paging(paging)
    if shadow is not None:
        c.shadow(shadow)
    c.budget(budget, always)
    c.scale(sm_scale)
    c.no_gradients()


def outputs(
    q: Tensor,
    bounds: PageBounds | None,
    paging: Paging,
    page_size: int,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    shadow: Shadow | None,
) -> tuple[Tensor, Tensor]:
    limits = Limits.of(paging.page_table.shape[1] * page_size, q.shape[1], budget, always)
    pages = means or bounds
    assert pages is not None  # as checked
    return empty_lists(q, q.shape[0], pages[0].shape[1], limits.page_capacity(page_size))


OPERATOR = Operator(select_pages, "(Tensor indices, Tensor counts)", check, outputs)
