"""twilight::decode_attention: select, prune and attend behind one schema; what a model calls."""

import torch
from torch import Tensor

from ..arguments import KV, Candidates, Observation, PageBounds, PageMeans, Paging, Policy, Scales, Shadow
from ..capacity import COUNTER_COLUMNS
from ._checks import Checker
from ._library import Operator

SELECTORS = ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming", "given")


def decode_attention(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    shadow: Shadow | None = None,
    bounds: PageBounds | None = None,
    candidates: Candidates = Candidates(),
    observe: Observation = Observation(),
    means: PageMeans | None = None,
    out: Tensor | None = None,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One decode step of Select-then-Prune attention: `select_*`, `estimate_weights`, `prune_top_p` and `attend_sparse` in one call.

    `policy.selector` names the candidates: "dense" attends to everything exactly; "full" estimates every token; "quest" is
    `select_pages` by bounds, "page_mean" by means; "shadow_prefix" is `select_tokens`; "streaming" proposes the first `sink_tokens` and
    the newest tokens up to the budget, and reads nothing for it; "given" takes `candidates` from any other selector. With top_p = 1 and
    no head_top_p the candidates are attended to as they are. The tokens of `policy.always` are always candidates and always kept: no
    call loses the newest token. "given" candidates are taken as they are, and of these tokens those that are listed are kept.

    Args:
        q: [B, T, Hq, D], T 1..8, fp32 (CPU only), bf16 or fp16; any strides, last dimension contiguous.
        kv, shadow, bounds, means: as `append_kv` writes them, with the `scales` that it was given. The shadow may be None where nothing is
            pruned and the selector is not "shadow_prefix", the bounds where it is not "quest", the means where it is not "page_mean" and
            has one level.
        paging: a live entry of the table outside 0..P-1 reads some valid page.
        policy: its counts of tokens may be larger than the table and then mean all of it.
        sm_scale: factor on q . k, usually D ** -0.5.
        candidates: for the selector "given".
        observe: what to report beside the result.
        out: [B, T, Hq, D] in q's dtype, contiguous, apart from all other arguments: takes the result. By default a new tensor does.
        softcap: as of `attend_sparse`, on the logits of estimates and of attention. Selectors rank logits without it, of which it keeps
            the order.

    Returns:
        out, [B, T, Hq, D] contiguous, in q's dtype; lse [B, T, Hq] fp32, natural logarithm. Zeros and -inf where seq_len is 0.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward. Nothing was
            written.

    Source: Twilight, arXiv 2502.02770, algorithm 1.
    """
    attended, lse = OPERATOR(q, kv, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, out, scales, softcap)
    return attended if out is None else out, lse


def check(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    candidates: Candidates,
    observe: Observation,
    means: PageMeans | None,
    out: Tensor | None,
    scales: Scales | None,
    softcap: float | None,
) -> None:
    c = Checker("decode_attention", q)
    c.query(q)
    c.cache(kv, q.dtype)
    c.geometry()
    c.paging(paging)
    selector = policy.selector
    c.one_of("selector", selector, SELECTORS)
    c.budget(policy.budget, policy.always)
    c.pruning(policy.pruning)
    c.at_least("dense_below", policy.dense_below, 0)
    c.level(policy.level)
    fraction = policy.level.page_fraction
    two_levels = fraction < 1.0
    c.require(not two_levels or selector == "shadow_prefix", "page_fraction", '1, unless selector is "shadow_prefix"', fraction)
    c.scale(sm_scale)
    if policy.prunes or selector == "shadow_prefix" or shadow is not None:
        c.shadow(shadow)
    c.bounds(bounds, q.dtype, 'a tensor, because selector is "quest"' if selector == "quest" else None)
    needs_means = 'selector is "page_mean"' if selector == "page_mean" else "page_fraction is below 1" if two_levels else None
    c.means(means, needs_means and f"a tensor, because {needs_means}")
    if selector == "given":
        c.require(candidates.indices is not None, "indices", 'a tensor, because selector is "given"', None)
    else:
        c.require(candidates.indices is None, "indices", 'None, unless selector is "given"', "a tensor")
    c.candidates(candidates, kv.k_cache.shape[2])
    c.observation(observe, kv.k_cache.shape[2] * paging.page_table.shape[1], COUNTER_COLUMNS)
    c.scales(scales, kv)
    c.softcap(softcap)
    if out is not None:
        c.tensor("out", out, ("B", "T", "Hq", "D"), q.dtype)
    c.no_gradients()


def outputs(q: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the operator returns. Where `out` is given, the first result is empty, because an operator may not return what it writes."""
    return q.new_empty(q.shape if out is None else (0,)), q.new_empty(q.shape[:-1], dtype=torch.float32)


OPERATOR = Operator(
    decode_attention,
    "(Tensor attended, Tensor lse)",
    check,
    lambda q, *others: outputs(q, others[-3]),
    mutates=("budget_counters", "kept_indices", "kept_counts", "out"),
)
