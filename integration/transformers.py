"""attn_implementation="twilight": exact attention for prompts, Select-then-Prune attention for decode steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from .. import calibration
from ..decode_step import append, attend
from .cache import PromptChunk, TwilightLayer

# Arguments of transformers' attention functions that would change the result; none of the supported models passes them.
_UNSUPPORTED = {
    "softcap": "logit soft-capping",
    "s_aux": "attention sinks learned by the model",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "block_table": "paged batching by transformers",
}


def twilight_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | tuple[TwilightLayer, Tensor],
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer: prompts exactly, steps of 1 to 8 tokens on a filled cache through `append_kv` and `decode_attention`.

    Args:
        query: [B, Hq, T, D]. key: (cache layer, [B, Hkv, T, D]) as `TwilightCache.update` returns it. value: [B, Hkv, T, D].
        position_ids: [B or 1, T], the tokens' positions in their own sequence; padding is 0 or -1.

    Returns:
        [B, T, Hq, D], and None for the weights.

    Raises:
        RuntimeError: anything this attention would silently get wrong, by name.
    """
    layer, key = _refuse(module, query, key, attention_mask, dropout, kwargs)
    cache = layer.cache
    batch, _, tokens, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    if layer.index == 0:
        cache.begin_step(batch, tokens, position_ids)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    table, lens = cache.live_page_table, cache.live_seq_lens
    prompt = cache.prompt
    if prompt is not None and prompt.fills_empty_cache:
        calibration.from_prompt(layer.paged, q, k, prompt.positions, scale)
    append(k, v, layer.paged, table, lens, cache.step_positions)
    if prompt is None:
        out, _ = attend(q, layer.paged, table, lens, scale)
    elif prompt.rows is None:
        out = _attend_paged(query, layer, table, lens, prompt.positions, scale)
    else:
        out = _attend_rows(query, key, value, layer, table, prompt, scale)
    return out, None


def _refuse(
    module: torch.nn.Module, query: Tensor, key: Tensor | tuple, attention_mask: Tensor | None, dropout: float, kwargs: dict
) -> tuple[TwilightLayer, Tensor]:
    """Raises for anything not supported, before the cache is touched."""

    def fail(what: str) -> None:
        raise RuntimeError(f'attn_implementation="twilight": {what}')

    if not isinstance(key, tuple) or not isinstance(key[0], TwilightLayer):
        fail("past_key_values: expected a TwilightCache, got another cache or none")
    layer, key = key
    if torch.is_grad_enabled() and (module.training or query.requires_grad):
        fail("training is not supported: call model.eval() and wrap the call in torch.no_grad()")
    if dropout:
        fail(f"dropout: expected 0, got {dropout}")
    window = kwargs.get("sliding_window")
    if window is not None and window < layer.cache.max_cache_len:
        fail(f"sliding_window: expected none, or at least max_cache_len = {layer.cache.max_cache_len}, got {window}")
    if attention_mask is not None:
        fail("attention_mask: expected a 2-dimensional padding mask, got a custom mask")
    if kwargs.get("output_attentions"):
        fail("output_attentions: expected False, because weights are never computed as a whole")
    if not getattr(module, "is_causal", True):
        fail("is_causal: expected a causal decoder layer")
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            fail(f"{name}: expected None, because {meaning} is not supported")
    return layer, key


def _attend_rows(
    query: Tensor, key: Tensor, value: Tensor, layer: TwilightLayer, page_table: Tensor, prompt: PromptChunk, scale: float
) -> Tensor:
    """Exact causal attention of a prompt chunk, sequence by sequence, on itself and on what is cached before it."""
    batch, heads, tokens, head_dim = query.shape
    group = heads // key.shape[1]
    if prompt.positions is None and all(row.start == 0 for row in prompt.rows):
        if query.is_cuda:  # the kernels of other devices are faster on repeated heads
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=group > 1)
        else:
            out = scaled_dot_product_attention(query, _repeat(key, group), _repeat(value, group), is_causal=True, scale=scale)
        return out.transpose(1, 2)
    out = query.new_zeros(batch, tokens, heads, head_dim)
    for b, row in enumerate(prompt.rows):
        if row.count == 0:
            continue
        columns = slice(row.column, row.column + row.count)
        q = query[b : b + 1, :, columns]
        if row.start == 0:
            k, v = key[b : b + 1, :, columns], value[b : b + 1, :, columns]
            mask = None
        else:
            k = _paged_rows(layer.paged.k_cache, page_table[b : b + 1], row.end)
            v = _paged_rows(layer.paged.v_cache, page_table[b : b + 1], row.end)
            mask = torch.ones(row.count, row.end, dtype=torch.bool, device=q.device).tril(row.start)
        attended = scaled_dot_product_attention(q, _repeat(k, group), _repeat(v, group), mask, is_causal=mask is None, scale=scale)
        out[b : b + 1, columns] = attended.transpose(1, 2)
    return out


def _attend_paged(query: Tensor, layer: TwilightLayer, page_table: Tensor, seq_lens: Tensor, positions: Tensor, scale: float) -> Tensor:
    """The same in fixed shapes, for a traced prompt: every slot of the cache, masked by position."""
    group = query.shape[1] // layer.paged.k_cache.shape[1]
    k = _paged_rows(layer.paged.k_cache, page_table, layer.cache.max_cache_len)
    v = _paged_rows(layer.paged.v_cache, page_table, layer.cache.max_cache_len)
    slots = torch.arange(k.shape[2], device=query.device)
    v = torch.where((slots < seq_lens[:, None])[:, None, :, None], v, 0.0)
    # A padding column sees slot 0, so that no row is empty; nobody reads its output.
    mask = slots <= positions.clamp(min=0)[..., None]  # [B, T, M * S]
    out = scaled_dot_product_attention(query, _repeat(k, group), _repeat(v, group), mask[:, None], scale=scale)
    return out.transpose(1, 2)


def _paged_rows(pages: Tensor, page_table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of each sequence, [B, Hkv, length, D], from pages [P, Hkv, S, D]."""
    used = -(-length // pages.shape[2])
    rows = pages[page_table[:, :used].long()]  # [B, used, Hkv, S, D]
    return rows.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _repeat(x: Tensor, group: int) -> Tensor:
    """[B, Hkv, N, D] -> [B, Hkv * G, N, D]; the masked kernels of scaled_dot_product_attention know no groups."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


# No mask function is registered: positions alone say what a token sees.
AttentionInterface.register("twilight", twilight_attention)
