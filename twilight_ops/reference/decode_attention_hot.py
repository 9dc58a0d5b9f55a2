"""Reference of twilight::decode_attention_hot: for tests; it copies the cache in every step."""

import torch
from torch import Tensor

from ..arguments import KV, Candidates, HotRows, Observation, PageBounds, PageMeans, Paging, Policy, Shadow
from ..capacity import HELD, Limits
from ._paging import gather_tokens
from .decode_attention import decode_attention


def decode_attention_hot(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    hot: HotRows,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    candidates: Candidates,
    observe: Observation,
    means: PageMeans | None,
    out: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, query_tokens = q.shape[:2]
    _, kv_heads, page_size, _ = kv.k_cache.shape
    max_tokens = paging.page_table.shape[1] * page_size
    *rows, tokens, claims = (tensor[:batch] for tensor in hot)
    if observe.kept_indices is None:
        kept = torch.empty((batch, kv_heads, max_tokens), dtype=torch.int32, device=q.device)
        observe = Observation(observe.budget_counters, kept, kept.new_empty((batch, kv_heads)))
    merged = KV(*(_merged(pages, copies, tokens, paging.page_table) for pages, copies in zip(kv, rows, strict=True)))
    result = decode_attention(q, merged, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, out, None, softcap)

    if policy.selector != "dense" and (policy.prunes or policy.selector != "full"):
        limits = Limits.of(max_tokens, query_tokens, policy.budget, policy.always, policy.dense_below)
        seq_lens = paging.seq_lens.clamp(0, max_tokens)[:, None, None]
        listed = torch.where(seq_lens > limits.dense_below, observe.kept_indices, -1)
        place = listed.clamp(min=0).long() % tokens.shape[2]
        claim = torch.where(tokens.gather(2, place) == listed, HELD, listed)
        claims.scatter_reduce_(2, place, torch.where(listed < 0, -1, claim), "amax")
    claimed = (claims >= 0) & (claims < HELD)
    at = torch.where(claimed, claims, 0)
    for pages, copies in zip(kv, rows, strict=True):
        copies.copy_(torch.where(claimed[..., None], gather_tokens(pages, paging.page_table, at), copies))
    tokens.copy_(torch.where(claimed, claims, tokens))
    claims.fill_(-1)
    return result


def _merged(pages: Tensor, copies: Tensor, tokens: Tensor, page_table: Tensor) -> Tensor:
    """`pages` with the rows that have copies read from those."""
    pages = pages.clone()
    b, h, place = (tokens >= 0).nonzero(as_tuple=True)
    token = tokens[b, h, place].long()
    physical = page_table[b, token // pages.shape[2]].long().clamp(0, pages.shape[0] - 1)
    pages[physical, h, token % pages.shape[2]] = copies[b, h, place]
    return pages
