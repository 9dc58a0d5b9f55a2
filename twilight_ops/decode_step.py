"""One decode step of one layer. Read this first.

A model calls `decode_step`: two operators a layer. `decode_step_by_stage` computes the same with one operator a stage.
"""

from torch import Tensor

from . import ops
from .paged_kv_cache import PagedKVLayer
from .selectors import Candidates


def append(k: Tensor, v: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None = None) -> None:
    """Writes k, v [B, T, Hkv, D] into the layer's cache, shadow and bounds; `seq_lens` counts them already."""
    ops.append_kv(
        k,
        v,
        layer.k_cache,
        layer.v_cache,
        layer.k_quant,
        layer.k_scale,
        layer.page_bounds,
        layer.bounds_scale,
        layer.channel_order,
        layer.prefix_channels,
        page_table,
        seq_lens,
        positions,
    )
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
) -> tuple[Tensor, Tensor]:
    """Selects, prunes and attends for q [B, T, Hq, D]; returns out [B, T, Hq, D] and lse [B, T, Hq]."""
    plan = layer.plan
    selector = plan.selector
    kernel = "dense" if selector is None else selector.kernel
    candidates = Candidates(None, None, 1)
    if kernel == "given":
        candidates = selector.select(q, layer, page_table, seq_lens, sm_scale)
        if candidates.indices is None:
            kernel = "full"
    return ops.decode_attention(
        q,
        layer.k_cache,
        layer.v_cache,
        layer.k_quant,
        layer.k_scale,
        layer.page_bounds,
        layer.bounds_scale,
        layer.channel_order,
        layer.prefix_channels,
        page_table,
        seq_lens,
        kernel,
        1 if selector is None else selector.token_budget,
        0.0 if selector is None else selector.budget_fraction,
        plan.top_p,
        sm_scale,
        plan.dense_below,
        plan.sink_tokens,
        plan.recent_tokens,
        layer.head_token_budget,
        layer.top_p_per_head,
        candidates.indices,
        candidates.counts,
        candidates.tokens_per_index,
        layer.budget_counters,
        kept_indices,
        kept_counts,
    )


def decode_step(q: Tensor, k: Tensor, v: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Tensor:
    """append -> attend: what a model runs, two graph nodes a layer."""
    append(k, v, layer, page_table, seq_lens)
    out, _ = attend(q, layer, page_table, seq_lens, sm_scale)
    return out


def decode_step_by_stage(
    q: Tensor, k: Tensor, v: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float
) -> Tensor:
    """append -> select -> estimate -> prune -> attend: the same step, one operator a stage."""
    plan = layer.plan
    append(k, v, layer, page_table, seq_lens)
    indices, counts, unit = (
        Candidates(None, None, 1) if plan.selector is None else plan.selector.select(q, layer, page_table, seq_lens, sm_scale)
    )
    if plan.prunes:
        weights = ops.estimate_weights(
            q,
            layer.k_quant,
            layer.k_scale,
            layer.channel_order,
            layer.prefix_channels,
            page_table,
            seq_lens,
            indices,
            counts,
            unit,
            sm_scale,
        )
        kv_heads = layer.k_cache.shape[1]
        indices, counts, _ = ops.prune_top_p(
            weights,
            seq_lens,
            indices,
            counts,
            unit,
            kv_heads,
            plan.top_p,
            layer.top_p_per_head,
            plan.sink_tokens,
            plan.recent_tokens,
        )
        unit = 1
    out, _ = ops.attend_sparse(q, layer.k_cache, layer.v_cache, page_table, seq_lens, indices, counts, unit, sm_scale)
    return out
