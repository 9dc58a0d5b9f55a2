"""twilight::decode_attention: select, prune and attend behind one schema; what a model calls."""

import torch
from torch import Tensor

from ..capacity import COUNTER_COLUMNS
from ._checks import Checker
from ._library import call, define

SELECTORS = ("dense", "full", "quest", "shadow_prefix", "given")

SCHEMA = (
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_quant, Tensor? k_scale, Tensor? page_bounds, "
    "Tensor? bounds_scale, Tensor? channel_order, Tensor? prefix_channels, Tensor page_table, Tensor seq_lens, "
    "str selector, int token_budget, float budget_fraction, float top_p, float sm_scale, int dense_below=0, "
    "int sink_tokens=0, int recent_tokens=0, Tensor? head_token_budget=None, Tensor? top_p_per_head=None, "
    "Tensor? candidates=None, Tensor? candidate_counts=None, int tokens_per_candidate=1, "
    "Tensor(a!)? budget_counters=None, Tensor(b!)? kept_indices=None, Tensor(c!)? kept_counts=None) "
    "-> (Tensor out, Tensor lse)"
)


def check_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_quant: Tensor | None,
    k_scale: Tensor | None,
    page_bounds: Tensor | None,
    bounds_scale: Tensor | None,
    channel_order: Tensor | None,
    prefix_channels: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    selector: str,
    token_budget: int,
    budget_fraction: float,
    top_p: float,
    sm_scale: float,
    dense_below: int = 0,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    head_token_budget: Tensor | None = None,
    top_p_per_head: Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_counts: Tensor | None = None,
    tokens_per_candidate: int = 1,
    budget_counters: Tensor | None = None,
    kept_indices: Tensor | None = None,
    kept_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Raises RuntimeError on the first malformed argument, else allocates the outputs: the fake."""
    c = Checker("decode_attention", q)
    c.query(q)
    c.cache(k_cache, v_cache, q.dtype)
    c.geometry()
    c.paging(page_table, seq_lens)
    c.one_of("selector", selector, SELECTORS)
    c.budget(token_budget, budget_fraction, sink_tokens, recent_tokens, head_token_budget)
    c.top_p(top_p, top_p_per_head)
    c.scale(sm_scale)
    c.at_least("dense_below", dense_below, 0)
    prunes = selector != "dense" and (top_p < 1.0 or top_p_per_head is not None)
    if prunes or selector == "shadow_prefix" or any(t is not None for t in (k_quant, k_scale, channel_order, prefix_channels)):
        c.shadow(k_quant, k_scale, channel_order, prefix_channels)
    if selector == "quest":
        c.require(page_bounds is not None, "page_bounds", 'a tensor, because selector is "quest"', None)
    if page_bounds is not None:
        c.bounds(page_bounds, bounds_scale, q.dtype)
    else:
        c.require(bounds_scale is None, "bounds_scale", "None, because page_bounds is None", "a tensor")
    if selector == "given":
        c.require(candidates is not None, "candidates", 'a tensor, because selector is "given"', None)
    else:
        c.require(candidates is None, "candidates", 'None, unless selector is "given"', "a tensor")
    c.require(
        (candidates is None) == (candidate_counts is None),
        "candidate_counts",
        "given exactly when candidates is given",
        "one without the other",
    )
    c.one_of("tokens_per_candidate", tokens_per_candidate, (1, k_cache.shape[2]))
    if candidates is not None:
        c.tensor("candidates", candidates, ("B", "Hkv", "C"), torch.int32)
        c.tensor("candidate_counts", candidate_counts, ("B", "Hkv"), torch.int32)
    if budget_counters is not None:
        c.tensor("budget_counters", budget_counters, ("Hkv", COUNTER_COLUMNS), torch.int64)
    c.require(
        (kept_indices is None) == (kept_counts is None), "kept_counts", "given exactly when kept_indices is given", "one without the other"
    )
    if kept_indices is not None:
        c.tensor("kept_indices", kept_indices, ("B", "Hkv", k_cache.shape[2] * page_table.shape[1]), torch.int32)
        c.tensor("kept_counts", kept_counts, ("B", "Hkv"), torch.int32)
    c.no_gradients()
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
    )


define(SCHEMA, check_decode_attention)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_quant: Tensor | None,
    k_scale: Tensor | None,
    page_bounds: Tensor | None,
    bounds_scale: Tensor | None,
    channel_order: Tensor | None,
    prefix_channels: Tensor | None,
    page_table: Tensor,
    seq_lens: Tensor,
    selector: str,
    token_budget: int,
    budget_fraction: float,
    top_p: float,
    sm_scale: float,
    dense_below: int = 0,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    head_token_budget: Tensor | None = None,
    top_p_per_head: Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_counts: Tensor | None = None,
    tokens_per_candidate: int = 1,
    budget_counters: Tensor | None = None,
    kept_indices: Tensor | None = None,
    kept_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One decode step of Select-then-Prune attention: `select_*`, `estimate_weights`, `prune_top_p` and `attend_sparse` in one call.

    `selector` names the candidates: "dense" attends to everything exactly; "full" estimates every token; "quest" is
    `select_pages`; "shadow_prefix" is `select_tokens`; "given" takes `candidates` from any other selector. With top_p = 1 and
    no top_p_per_head the candidates are attended to as they are. Sequences with `seq_len <= dense_below` take exact dense attention,
    decided on the device. The first `sink_tokens` and the newest `max(recent_tokens, T)` tokens are always candidates and always kept:
    no call loses the newest token. "given" candidates are taken as they are, and of these tokens those that are listed are kept.

    Args:
        q: [B, T, Hq, D], T 1..8, fp32 (CPU only), bf16 or fp16; any strides, last dimension contiguous.
        k_cache, v_cache, k_quant, k_scale, page_bounds, bounds_scale, channel_order, prefix_channels: as `append_kv` writes them. The
            four shadow tensors may be None where nothing is pruned and the selector is not "shadow_prefix".
        page_table: [B, M] int32, M * S at most 2**29; a live entry outside 0..P-1 reads some valid page.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
        token_budget (tokens), budget_fraction (of the live length), head_token_budget [Hkv] int32: see `select_pages`.
        top_p, top_p_per_head: see `prune_top_p`.
        sm_scale: factor on q . k, usually D ** -0.5.
        dense_below: tokens. It, sink_tokens, recent_tokens and token_budget may be larger than the table and then mean all of it.
        candidates, candidate_counts: [B, Hkv, C], [B, Hkv] int32, ascending and unique, in units of tokens_per_candidate (1 or S).
        budget_counters: [Hkv, COUNTER_COLUMNS] int64, added to: calls, live tokens, I0, I1, captured mass, calls on the dense path
            (selector "dense", or seq_len <= dense_below) and histograms; `twilight_ops/capacity.py` names the columns.
        kept_indices, kept_counts: [B, Hkv, M * S], [B, Hkv] int32, written with the kept positions (ascending, -1 pads); for
            inspection, leave them None when speed matters.

    Returns:
        out [B, T, Hq, D] contiguous, in q's dtype; lse [B, T, Hq] fp32, natural logarithm. Zeros and -inf where seq_len is 0.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them: there is no backward. Nothing was
            written.

    Source: Twilight, arXiv 2502.02770, algorithm 1.
    """
    return call(
        torch.ops.twilight.decode_attention.default,
        q,
        k_cache,
        v_cache,
        k_quant,
        k_scale,
        page_bounds,
        bounds_scale,
        channel_order,
        prefix_channels,
        page_table,
        seq_lens,
        selector,
        token_budget,
        budget_fraction,
        top_p,
        sm_scale,
        dense_below,
        sink_tokens,
        recent_tokens,
        head_token_budget,
        top_p_per_head,
        candidates,
        candidate_counts,
        tokens_per_candidate,
        budget_counters,
        kept_indices,
        kept_counts,
    )
