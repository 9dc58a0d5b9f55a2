"""Reference of twilight::decode_attention: the stages' references in turn."""

import torch
from torch import Tensor

from .. import capacity
from ..arguments import KV, Candidates, Observation, PageBounds, PageMeans, Paging, Policy, Scales, Shadow
from ..capacity import COUNTER_HEADER, HISTOGRAM_BINS, Limits, histogram_bin_start
from ._paging import all_tokens, candidate_tokens
from ._window import sinks_and_window
from .attend_sparse import attend_sparse
from .estimate_weights import estimate_weights
from .prune_top_p import prune_top_p
from .select_pages import select_pages
from .select_tokens import select_tokens


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
    batch, query_tokens = q.shape[:2]
    _, kv_heads, page_size, _ = kv.k_cache.shape
    max_tokens = paging.page_table.shape[1] * page_size
    limits = Limits.of(max_tokens, query_tokens, policy.budget, policy.always, policy.dense_below)
    paging = Paging(paging.page_table, paging.seq_lens.clamp(0, max_tokens))
    seq_lens, selector = paging.seq_lens, policy.selector

    if selector in ("quest", "page_mean"):
        pages = (bounds, None) if selector == "quest" else (None, means)
        lists = select_pages(q, pages[0], paging, page_size, policy.budget, sm_scale, policy.always, pages[1], shadow)
        candidates = Candidates(*lists, page_size)
    elif selector == "shadow_prefix":
        settings = (policy.budget, sm_scale, policy.always, means, policy.level)
        candidates = Candidates(*select_tokens(q, shadow, paging, *settings))
    elif selector == "streaming":
        candidates = Candidates(*sinks_and_window(seq_lens, kv_heads, limits, policy.budget.head_token_budget))
    elif selector != "given":
        candidates = Candidates()

    every = all_tokens(paging.page_table, kv_heads, page_size)
    dense = (seq_lens <= (max_tokens if selector == "dense" else limits.dense_below))[:, None]  # [B, 1]
    tokens, live = candidate_tokens(candidates, every, seq_lens)
    candidate_count = torch.where(dense, seq_lens[:, None], live.sum(-1))  # I0, [B, Hkv]

    mass = torch.ones(batch, kv_heads, dtype=torch.float64, device=q.device)
    if policy.prunes:
        weights = estimate_weights(q, shadow, paging, candidates, sm_scale, softcap).float()
        indices, counts, row_mass = prune_top_p(weights, seq_lens, candidates, kv_heads, policy.pruning, policy.always)
        candidates = Candidates(indices, counts)
        tokens, live = candidate_tokens(candidates, every, seq_lens)
        row_mass = row_mass.view(batch, query_tokens, kv_heads, -1).double().mean(dim=(1, 3))
        mass = torch.where(dense, 1.0, row_mass)
    attended, lse = attend_sparse(q, kv, paging, candidates, sm_scale, scales, softcap)
    if selector != "dense" and limits.dense_below > 0:
        dense_out, dense_lse = attend_sparse(q, kv, paging, Candidates(), sm_scale, scales, softcap)
        attended = torch.where(dense[:, :, None, None], dense_out, attended)
        lse = torch.where(dense[:, :, None], dense_lse, lse)

    kept_count = torch.where(dense, seq_lens[:, None], live.sum(-1))  # I1, [B, Hkv]
    if observe.kept_indices is not None:
        listed = torch.where(live, tokens, every.shape[-1]).sort(dim=-1).values
        listed = torch.where(listed == every.shape[-1], -1, listed).int()[..., : every.shape[-1]]
        observe.kept_indices.fill_(-1)
        observe.kept_indices[..., : listed.shape[-1]] = listed
        everything = torch.where(every < seq_lens[:, None, None], every, -1).int()
        observe.kept_indices.copy_(torch.where(dense[..., None], everything, observe.kept_indices))
        observe.kept_counts.copy_(kept_count)
    if observe.budget_counters is not None:
        _count(observe.budget_counters, seq_lens, candidate_count, kept_count, mass, dense)
    if out is not None:
        out.copy_(attended)
        attended = attended.new_empty(0)
    return attended, lse


def _count(budget_counters: Tensor, seq_lens: Tensor, candidates: Tensor, kept: Tensor, mass: Tensor, dense: Tensor) -> None:
    """Adds one entry a (sequence, KV head) with live tokens."""
    live = (seq_lens > 0)[:, None].expand_as(kept)
    columns = {
        capacity.COUNTER_ROWS: torch.ones_like(kept),
        capacity.COUNTER_LIVE: seq_lens[:, None].expand_as(kept),
        capacity.COUNTER_CANDIDATES: candidates,
        capacity.COUNTER_KEPT: kept,
        capacity.COUNTER_MASS: (mass * capacity.COUNTER_MASS_UNIT).round().long(),
        capacity.COUNTER_DENSE: dense.expand_as(kept),
    }
    for column, values in columns.items():
        budget_counters[:, column] += (values * live).sum(0)
    first_of_bin = torch.tensor([histogram_bin_start(index) for index in range(HISTOGRAM_BINS)], device=kept.device)
    for start, values in ((COUNTER_HEADER, candidates), (COUNTER_HEADER + HISTOGRAM_BINS, kept)):
        bins = torch.bucketize(values.long(), first_of_bin, right=True) - 1
        budget_counters.scatter_add_(1, (start + bins).t().contiguous(), live.long().t().contiguous())
