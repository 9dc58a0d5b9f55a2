"""One decode step of one layer. Read this first.

A model calls `decode_step`: two operators a layer. `decode_step_by_stage` computes the same with one operator a stage.
"""

from torch import Tensor

from .arguments import Candidates, Observation, PageLevel, Paging
from .layer import PagedKVLayer
from .ops.append_kv import append_kv
from .ops.attend_sparse import attend_sparse
from .ops.decode_attention import decode_attention
from .ops.decode_attention_hot import decode_attention_hot
from .ops.estimate_weights import estimate_weights
from .ops.prune_top_p import prune_top_p


def append(k: Tensor, v: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None = None) -> None:
    """Writes k, v [B, T, Hkv, D] into the layer's cache, shadow, bounds and means; `seq_lens` counts them already."""
    if layer.hot is not None:
        # Copies of rows that are written again; a sequence gets at most T tokens.
        tokens = layer.hot.hot_tokens[: k.shape[0]]
        tokens.masked_fill_(tokens >= (seq_lens - k.shape[1])[:, None, None], -1)
    append_kv(k, v, layer.kv, Paging(page_table, seq_lens), positions, layer.shadow, layer.bounds, layer.means, layer.scales)
    if layer.plan.selector is not None:
        layer.plan.selector.append(k, layer, page_table, seq_lens, positions)


def attend(
    q: Tensor,
    layer: PagedKVLayer,
    page_table: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    kept_indices: Tensor | None = None,
    kept_counts: Tensor | None = None,
    out: Tensor | None = None,
    dense: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Selects, prunes and attends for q [B, T, Hq, D]; returns out [B, T, Hq, D], written in place if given, and lse [B, T, Hq].

    `dense` attends to everything instead, for once, and leaves the layer's counters alone. `softcap` is that of `decode_attention`.
    """
    selector, policy, candidates = layer.plan.selector, layer.policy, Candidates()
    if dense:
        policy = policy._replace(selector="dense", level=PageLevel())
    elif selector is not None and policy.selector == "given":
        candidates = selector.select(q, layer, page_table, seq_lens, sm_scale)
        if candidates.indices is None:
            policy = policy._replace(selector="full")
    observe = Observation(None if dense else layer.budget_counters, kept_indices, kept_counts)
    paging, others = Paging(page_table, seq_lens), (layer.shadow, layer.bounds, candidates, observe, layer.means, out)
    if layer.hot is not None and not dense:
        return decode_attention_hot(q, layer.kv, paging, policy, sm_scale, layer.hot, *others, softcap)
    return decode_attention(q, layer.kv, paging, policy, sm_scale, *others, layer.scales, softcap)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: PagedKVLayer,
    page_table: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """append -> attend: what a model runs, two graph nodes a layer."""
    append(k, v, layer, page_table, seq_lens)
    out, _ = attend(q, layer, page_table, seq_lens, sm_scale, softcap=softcap)
    return out


def decode_step_by_stage(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: PagedKVLayer,
    page_table: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    softcap: float | None = None,
) -> Tensor:
    """append -> select -> estimate -> prune -> attend: the same step, one operator a stage."""
    append(k, v, layer, page_table, seq_lens)
    selector, policy, paging = layer.plan.selector, layer.policy, Paging(page_table, seq_lens)
    candidates = Candidates() if selector is None else selector.select(q, layer, page_table, seq_lens, sm_scale)
    if policy.prunes:
        assert layer.shadow is not None  # every layer that prunes has one
        weights = estimate_weights(q, layer.shadow, paging, candidates, sm_scale, softcap)
        indices, counts, _ = prune_top_p(weights, seq_lens, candidates, layer.num_kv_heads, policy.pruning, policy.always)
        candidates = Candidates(indices, counts)
    out, _ = attend_sparse(q, layer.kv, paging, candidates, sm_scale, layer.scales, softcap)
    return out
