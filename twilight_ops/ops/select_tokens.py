"""twilight::select_tokens: scores every token with the leading channels of the 4-bit K shadow."""

from torch import Tensor

from ..arguments import Always, Budget, PageLevel, PageMeans, Paging, Shadow
from ..capacity import Limits
from ._checks import Checker
from ._library import Operator, empty_lists


def select_tokens(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    budget: Budget,
    sm_scale: float,
    always: Always = Always(),
    means: PageMeans | None = None,
    level: PageLevel = PageLevel(),
) -> tuple[Tensor, Tensor]:
    """Selects tokens of the largest prefix scores, one ascending list a KV head.

    `score[token] = sum over the group's heads and query tokens of softmax over tokens(sm_scale * sum_{j < r} q_{o(j)} k'_{o(j)})`, where
    k' is the dequantised shadow, o = channel_order[h] and r = prefix_channels[h]: only the page's leading prefix block is read.
    Before the softmax, logits are rounded to 1/128 of an octave, multiples of ln(2) / 128.
    `budget` tokens are taken: the tokens of `always` first, then by bins of scores from the highest down, and of the bin in which the
    budget ends the lowest positions. A score's bin is its fp32 pattern without the last 20 bits: eight bins an octave, each 7 to 12%
    wide; those below 2**-96 share one. A token whose score is NaN or +inf ranks above all others.

    With a `level` whose page_fraction is below 1 pages are scored first, each as one token by the same leading channels of its mean, and
    of n pages max(ceil(page_fraction n), ceil(min_scored_tokens / S), ceil(budget / S)) are taken, chosen as `select_pages` chooses. Only
    their tokens are then scored and taken, and a budget beyond them is all of them.

    Args:
        q: [B, T, Hq, D], T 1..8, any strides, last dimension contiguous.
        shadow: as `append_kv` writes it.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        budget: tokens. It and `always` may be larger than the table and then mean all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        always: the first and newest tokens, which are always among the candidates.
        means: of the shadow's keys, as `append_kv` writes them beside it; None with a page_fraction of 1.
        level: whose tokens are scored.

    Returns:
        indices [B, Hkv, capacity] int32 positions, ascending, unique, -1 pads; counts [B, Hkv] int32.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward.

    Source: this package; heavy channels as in Double Sparsity, arXiv 2408.07092, read from the pruner's own shadow.
    """
    return OPERATOR(q, shadow, paging, budget, sm_scale, always, means, level)


def check(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    level: PageLevel,
) -> None:
    c = Checker("select_tokens", q)
    c.query(q)
    c.shadow(shadow)
    c.geometry()
    c.paging(paging)
    c.budget(budget, always)
    c.scale(sm_scale)
    c.level(level)
    c.means(means, "a tensor, because page_fraction is below 1" if level.page_fraction < 1.0 else None)
    c.no_gradients()


def outputs(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    level: PageLevel,
) -> tuple[Tensor, Tensor]:
    limits = Limits.of(paging.page_table.shape[1] * shadow.k_scale.shape[2], q.shape[1], budget, always)
    return empty_lists(q, q.shape[0], shadow.k_scale.shape[1], limits.token_capacity)


OPERATOR = Operator(select_tokens, "(Tensor indices, Tensor counts)", check, outputs)
