"""twilight::decode_attention as Triton stages."""

import torch
from torch import Tensor

from ..arguments import KV, Candidates, Observation, PageBounds, PageMeans, Paging, Policy, Scales, Shadow
from ..capacity import Limits
from ..ops._library import empty_lists
from ..ops.decode_attention import outputs
from . import select_pages, select_tokens
from ._shadow_logits import shadow_logits
from ._window import sinks_and_window
from .attend_sparse import run_attend
from .prune_top_p import thresholds, union


def decide(
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
    softcap: float | None,
) -> tuple[Candidates, int]:
    """What to attend to, and the length up to which a sequence attends to everything; weights stay logits with their softmax statistics
    until the pruner has them, and lists carry no pads."""
    batch, query_tokens, heads, _ = q.shape
    _, kv_heads, page_size, _ = kv.k_cache.shape
    max_tokens = paging.page_table.shape[1] * page_size
    limits = Limits.of(max_tokens, query_tokens, policy.budget, policy.always, policy.dense_below)
    dense_below = max_tokens if policy.selector == "dense" else limits.dense_below

    if policy.selector in ("quest", "page_mean"):
        means = means if policy.selector == "page_mean" else None
        lists = empty_lists(q, batch, kv_heads, limits.page_capacity(page_size))
        budget = (limits, policy.budget.head_token_budget, sm_scale)
        select_pages.propose(q, bounds, means, shadow, paging, page_size, *budget, *lists, dense_below, pad=False)
        candidates = Candidates(*lists, page_size)
    elif policy.selector == "shadow_prefix":
        lists = empty_lists(q, batch, kv_heads, limits.token_capacity)
        budget, levels = (limits, policy.budget.head_token_budget, sm_scale), (means, policy.level)
        select_tokens.propose(q, shadow, paging, *budget, *levels, *lists, dense_below, pad=False)
        candidates = Candidates(*lists)
    elif policy.selector == "streaming":
        lists = empty_lists(q, batch, kv_heads, limits.token_capacity)
        sinks_and_window(paging, page_size, limits, policy.budget.head_token_budget, *lists)
        candidates = Candidates(*lists)
    elif policy.selector != "given":
        candidates = Candidates()

    capacity = max_tokens if candidates.indices is None else candidates.indices.shape[2] * candidates.tokens_per_index
    keep = mass = None
    asked = observe.kept_indices is not None
    if policy.prunes:
        logits = torch.empty((batch, query_tokens, heads, capacity), dtype=torch.float32, device=q.device)
        stats = shadow_logits(q, shadow, paging, candidates, sm_scale, logits, prefix=False, dense_below=dense_below, softcap=softcap)
        mass = logits.new_empty((batch, query_tokens, heads))
        keep = thresholds(logits, stats, paging.seq_lens, candidates, kv_heads, policy.pruning, mass, max_tokens, dense_below)
        if not asked:
            observe = Observation(observe.budget_counters, *empty_lists(q, batch, kv_heads, capacity))
    if policy.prunes or asked or observe.budget_counters is not None:
        shape = (q.shape[:3], paging.seq_lens, candidates, kv_heads, capacity, max_tokens, limits)
        union(keep, mass, *shape, observe, dense_below, fill_dense=asked, pad=asked)
    if policy.prunes:
        candidates = Candidates(observe.kept_indices, observe.kept_counts)
    return candidates, dense_below


def decode_attention(
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
    out: Tensor | None = None,
    scales: Scales | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    attended, lse = outputs(q, out)
    candidates, dense_below = decide(q, kv, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, softcap)
    into = attended if out is None else out
    run_attend(q, kv, paging, candidates, sm_scale, into, lse, dense_below, scales=scales, softcap=softcap)
    return attended, lse
