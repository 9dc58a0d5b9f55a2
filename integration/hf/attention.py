"""attn_implementation="twilight": exact attention for prompts, Select-then-Prune attention for decode steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function, sdpa_mask

from ...decode_step import append, attend
from ...layer import PagedKVLayer
from .cache import AttentionLayer, LayerKeys, TwilightLayer, WindowLayer
from .sequences import Forward
from .streaming import BLOCK_TOKENS, attend_streamed
from .windows import Ring, Scores, attend_masked, attend_pairs, attend_run, sees

# Arguments of transformers' attention functions that would change the result.
_UNSUPPORTED = {
    "position_bias": "a bias by position",
    "alibi": "a bias by position",
    "head_mask": "a mask by head",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "block_table": "paged batching by transformers",
}


def fail(what: str) -> NoReturn:
    raise RuntimeError(f'attn_implementation="twilight": {what}')


def twilight_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: LayerKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of one layer: prompts exactly, decode steps through `append_kv` and `decode_attention`.

    Args:
        query: [B, Hq, T, D]. key: what `TwilightCache.update` returned for [B, Hkv, T, D]. value: [B, Hkv, T, D].
        attention_mask: as `twilight_mask` gives it; None: causal, no padding.
        position_ids: [B or 1, T]; where there is no mask, -1 is padding, and so are zeros before the first token and after the last.

    Returns:
        [B, T, Hq, D], and None for the weights.

    Raises:
        RuntimeError: anything this attention would silently get wrong, by name; the cache is as it was before the forward.
    """
    if not isinstance(key, LayerKeys) and not _is_causal(module, kwargs):
        # The encoder of a model with images or sound has no cache and is none of our business.
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    layer, key, live, pairs = _refuse(module, query, key, attention_mask, dropout, kwargs)
    dtype = query.dtype
    query, key, value = (_to_cache_dtype(tensor, layer.dtype) for tensor in (query, key, value))
    batch, _, tokens, head_dim = query.shape
    scores = Scores(head_dim**-0.5 if scaling is None else scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
    sequences = layer.sequences
    caller = getattr(module, "layer_idx", None)
    stored = sequences.shares(layer.index, caller)
    forward = sequences.enter_layer(caller if stored else layer.index, batch, tokens, live, position_ids)
    attend_layer = _attend_window if isinstance(layer, WindowLayer) else _attend_paged
    out = attend_layer(layer, query, key, value, forward, scores, stored, pairs)
    sequences.leave_layer()
    return out.to(dtype), None


def _attend_window(
    layer: WindowLayer, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scores: Scores, stored: bool, pairs: Tensor | None
) -> Tensor:
    """Stores K and V in the layer's ring, unless they are `stored`, and attends to what its window, or `pairs`, shows, [B, T, Hq, D]."""
    ring = layer.ring
    if not forward.exact:
        return ring.step(query, key, value, forward, scores, stored).transpose(1, 2)
    if stored:  # what the prompt saw before it is overwritten
        ring = Ring(layer.window, *forward.past[layer.index])
    elif layer.sequences.sharing:
        forward.past[layer.index] = ring.keys.clone(), ring.values.clone()
    out = ring.prompt(query, key, value, forward, scores) if pairs is None else attend_pairs(query, key, value, pairs, scores)
    if not stored:
        ring.write(key, value, forward.positions(), forward.seq_lens)
    return out.transpose(1, 2)


def _attend_paged(
    layer: TwilightLayer, query: Tensor, key: Tensor, value: Tensor, forward: Forward, scores: Scores, stored: bool, pairs: Tensor | None
) -> Tensor:
    """Stores K and V in the layer's pages, unless they are `stored`; attends to all of them in a prompt, to those that are kept in a decode
    step, [B, T, Hq, D]."""
    sequences, paged = layer.sequences, layer.paged
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if forward.calibrates and not stored:
        paged.calibrate(q, k, forward.slots, scores.scale, v)
    if not stored:
        append(k, v, paged, forward.page_table, forward.seq_lens, forward.slots)
    if pairs is not None:
        return attend_pairs(query, key, value, pairs, scores).transpose(1, 2)
    if forward.exact:
        return _attend_exactly(query, key, value, paged, forward, scores)
    step = (forward.padding_first(q), paged, forward.page_table, forward.seq_lens, scores.scale)
    cap = {} if scores.softcap is None else {"softcap": scores.softcap}
    kept = None if sequences.recorder is None else sequences.recorder(*step, **cap)
    out, lse = attend(*step, *(kept or ()), dense=forward.dense, **cap)
    if scores.sinks is not None:
        # The sink is one more term of the denominator; selection and p speak of the tokens' share alone.
        out = out * torch.sigmoid(lse - scores.sinks.float())[..., None].to(out.dtype)
    return forward.in_columns(out)


def _refuse(
    module: torch.nn.Module, query: Tensor, key: LayerKeys, attention_mask: Tensor | None, dropout: float, kwargs: dict
) -> tuple[AttentionLayer, Tensor, Tensor | None, Tensor | None]:
    """Raises for anything not supported, before the cache is touched; returns the layer, K, and the masks of the new columns: [B, T], and
    [B, 1, T, T] of pairs where tokens see later ones."""

    if not isinstance(key, LayerKeys):
        fail("cache (past_key_values): expected a TwilightCache, got another cache or none")
    layer, key = key.layer, key.k
    layers, cached = getattr(getattr(module, "config", None), "num_hidden_layers", None), layer.sequences.num_layers
    if layers not in (None, cached):
        fail(f"cache (past_key_values): expected one made for a model of {layers} layers, got one for {cached}")
    if torch.is_grad_enabled() and (module.training or query.requires_grad):
        fail("training is not supported: call model.eval() and wrap the call in torch.no_grad()")
    if dropout:
        fail(f"dropout: expected 0, got {dropout}")
    own = layer.window.width if isinstance(layer, WindowLayer) else None
    width = kwargs.get("sliding_window")
    if width is not None and width != own and (own is not None or width < layer.sequences.paged.max_cache_len):
        least = layer.sequences.paged.max_cache_len
        fail(f"sliding_window: expected {own or f'none, or at least max_cache_len = {least}'} in layer {layer.index}, got {width}")
    if kwargs.get("output_attentions"):
        fail("output_attentions: expected False, because weights are never computed as a whole")
    if not _is_causal(module, kwargs):
        fail("is_causal: expected a causal decoder layer")
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            fail(f"{name}: expected None, because {meaning} is not supported")
    live = pairs = None
    if attention_mask is not None and attention_mask.dtype == torch.int8:
        live, pairs = _read_pairs(attention_mask, layer)
    elif own is not None or attention_mask is not None:
        live = _read_mask(attention_mask, query, own, layer.sequences.paged.max_cache_len)
    return layer, key, live, pairs


def _read_pairs(mask: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor | None]:
    """From a mask [B, T, 1, N] of `twilight_mask`: which of the new columns are tokens, [B, T], and, where some see later ones, which each
    sees, [B, 1, T, T]."""
    tokens, columns = mask.shape[1], torch.arange(mask.shape[3], device=mask.device)
    shown, live = (mask.transpose(1, 2) & 1).bool(), (mask[:, 0, 0] & 2).bool()
    window = layer.window if isinstance(layer, WindowLayer) else None
    before = sees(window, columns[-tokens:, None], columns) & live[:, None, None] & live[:, None, -tokens:, None]
    plain = torch.equal(shown & live[:, None, -tokens:, None], before)
    if not plain and (layer.sequences.filled or tokens < len(columns) or not bool((shown | ~before).all())):
        fail(
            "attention_mask: expected tokens that see all before them, in their window, and later ones in a cache's first prompt alone, "
            "got another mask, as of blocks or packed sequences"
        )
    return live[:, -tokens:], None if plain else shown


def _read_mask(mask: Tensor | None, query: Tensor, window: int | None, max_cache_len: int) -> Tensor | None:
    """Which of the new columns are tokens, [B, T], from a mask of `twilight_mask`; None: all. `window`: of the layer."""
    batch, _, tokens, _ = query.shape
    kind = "causal mask" if window is None else f"mask of a window of {window} tokens"
    if mask is not None and mask.dtype == torch.uint8 and mask.shape[2] > 0:
        if mask.shape[2] != window and (window is not None or mask.shape[2] < max_cache_len):
            fail(f"attention_mask: expected a {kind}, got a window of {mask.shape[2]} tokens")
        return mask[:, 0, 0].bool() if mask.shape[3] else None
    if window is not None or mask.dtype == torch.uint8:
        what = "a causal one without" if mask is None or mask.dtype == torch.bool else "one in which tokens see others,"
        fail(f"attention_mask: expected a {kind}, got {what} a window, blocks or packed sequences")
    if mask.dtype != torch.bool or mask.shape != (batch, 1, 1, tokens):
        fail(f"attention_mask: expected a 2-dimensional padding mask, got a custom mask of shape {list(mask.shape)}")
    return mask[:, 0, 0]


def _is_causal(module: torch.nn.Module, kwargs: dict) -> bool:
    return getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False


def _to_cache_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast leaves Q and K in fp32, because the position encoding is; rounding anything else is said once."""
    if tensor.dtype == dtype:
        return tensor
    device = tensor.device.type
    loses = torch.promote_types(tensor.dtype, dtype) != dtype and not torch.is_autocast_enabled(device)
    if loses and not torch.compiler.is_compiling():
        warnings.warn(f"TwilightCache: Q, K and V of {tensor.dtype} are rounded to the cache's {dtype}", stacklevel=3)
    return tensor.to(dtype)


def twilight_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """What transformers makes of a padding mask for attn_implementation="twilight": which of the new columns are tokens.

    Args:
        q_length, kv_length: T, and the room of the cache. q_offset: columns before this forward.
        attention_mask: [B, W] bool over all columns so far, the new ones last.
        mask_function, local_size, allow_is_causal_skip, use_vmap: how transformers says that a mask is more than causal.

    Returns:
        [B, 1, 1, T] bool, so that transformers takes it for a finished mask; None where there is no mask. Of a window of W tokens the same
        as uint8 [B, 1, W, T], or [B, 1, W, 0] where there is no mask, so that a layer can tell whether it is its own. A mask that is more
        than that, as of images whose tokens see each other, is int8 [B, T, 1, N] over the N columns so far, with bit 0 where a column sees
        another and bit 1 where that is a token; in a trace an empty uint8 tensor [B, 1, 0, 0]. The layer that uses it refuses what it
        cannot do: models make masks that none of their layers reads.

    Raises:
        RuntimeError: no new tokens, or a mask that does not cover them.
    """

    if q_length == 0:
        fail("input_ids: expected tokens beyond those that are cached, got none: call cache.reset() before another prompt")
    if mask_function is bidirectional_mask_function:  # of an encoder, or of a decoder that is refused because of it
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "device": device}
        return sdpa_mask(
            **sizes, **{**kwargs, "allow_is_bidirectional_skip": False}, mask_function=mask_function, attention_mask=attention_mask
        )
    windowed = local_size is not None and not use_vmap and (allow_is_causal_skip or q_length == 1)
    if mask_function is not causal_mask_function and not windowed:
        if torch.compiler.is_compiling():
            return torch.empty((batch_size, 1, 0, 0), dtype=torch.uint8, device=device)
        return _pairs(batch_size, q_length, int(q_offset), mask_function, attention_mask, use_vmap, device)
    live = _live(attention_mask, q_length, q_offset)
    if not windowed:
        return live
    if live is None:
        return torch.empty((batch_size, 1, local_size, 0), dtype=torch.uint8, device=device)
    return live.to(torch.uint8).expand(-1, -1, local_size, -1)


def _pairs(
    batch: int, tokens: int, seen: int, mask_function, attention_mask: Tensor | None, use_vmap: bool, device: torch.device | str
) -> Tensor:
    """Which of the columns so far each new one sees, and which are tokens: int8 [B, T, 1, N], see `twilight_mask`."""
    columns = seen + tokens
    if attention_mask is None:
        live = torch.ones(batch, columns, dtype=torch.bool, device=device)
    elif attention_mask.shape[1] == columns:
        live = attention_mask.bool()
    else:
        fail(f"attention_mask: expected a column for each of the {seen} cached and {tokens} new tokens, got {attention_mask.shape[1]}")
    sizes = {"batch_size": batch, "q_length": tokens, "kv_length": columns, "q_offset": seen, "device": device}
    how = {"mask_function": mask_function, "attention_mask": attention_mask, "allow_is_causal_skip": False, "use_vmap": use_vmap}
    return (sdpa_mask(**sizes, **how).to(torch.int8) + 2 * live[:, None, None].to(torch.int8)).transpose(1, 2)


def _live(attention_mask: Tensor | None, tokens: int, seen: int | Tensor) -> Tensor | None:
    """Which of the new columns are tokens, [B, 1, 1, T] bool; None where there is no mask."""
    if attention_mask is None:
        return None
    compiling = torch.compiler.is_compiling()
    if tokens > 1 and not compiling:
        _check_width(attention_mask, tokens, seen)
    # The width of a mask that the model made from the cache's length is unknown in a trace; a slice would have an unknown width too.
    live = attention_mask.narrow(1, attention_mask.shape[1] - tokens, tokens).bool()
    # A decode step rarely has padding, and without it fewer operators; a GPU is not asked, because that waits for it.
    if tokens == 1 and not compiling and not live.is_cuda and bool(live.all()):
        return None
    # A copy of its own, with strides that do not grow with the mask: a compiled step guards on them.
    return live[:, None, None] if compiling else live.clone(memory_format=torch.contiguous_format)[:, None, None]


def _check_width(attention_mask: Tensor, tokens: int, seen: int | Tensor) -> None:
    """A mask has a column for every token that is cached and for every new one."""
    seen, width = int(seen), attention_mask.shape[1]
    if width == seen + tokens:
        return
    message = f"attention_mask: expected a column for each of the {seen} cached and {tokens} new tokens, got {width}"
    if width <= tokens:
        fail(message)
    warnings.warn(f'attn_implementation="twilight": {message}: should the cache have been reset?', stacklevel=2)


def _attend_exactly(query: Tensor, key: Tensor, value: Tensor, paged: PagedKVLayer, forward: Forward, scores: Scores) -> Tensor:
    """Exact causal attention of a prompt chunk, sequence by sequence, on itself and on what is cached before it."""
    if forward.rows is None:
        return _attend_traced(query, paged, forward, scores, (key, value))
    scale = scores.scale
    batch, heads, tokens, head_dim = query.shape
    group = heads // key.shape[1]
    if forward.slots is None and all(row.start == 0 for row in forward.rows):
        if not scores.plain:
            out = attend_run(query, key, value, 0, scores)
        elif query.is_cuda:  # the kernels of other devices are faster on repeated heads
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=group > 1)
        else:
            out = scaled_dot_product_attention(query, _repeat(key, group), _repeat(value, group), is_causal=True, scale=scale)
        return out.transpose(1, 2)
    out = query.new_zeros(batch, tokens, heads, head_dim)
    for b, row in enumerate(forward.rows):
        if row.count == 0:
            continue
        q = query[b : b + 1, :, row.columns]
        if paged.offloaded and scores.plain and row.start > 0 and row.end > BLOCK_TOKENS:
            own = (_repeat(x[b : b + 1, :, row.columns], group) for x in (key, value))
            past = _past_blocks(paged, forward.page_table[b : b + 1], row.start, group)
            out[b : b + 1, row.columns] = attend_streamed(q, *own, past, scale).transpose(1, 2)
            continue
        if row.start == 0:
            k, v = key[b : b + 1, :, row.columns], value[b : b + 1, :, row.columns]
        else:
            k, v = cached_rows(paged, forward.page_table[b : b + 1], row.end)
            if paged.scales is not None:  # of itself a chunk sees what no cache has rounded
                k[:, :, row.start :], v[:, :, row.start :] = key[b : b + 1, :, row.columns], value[b : b + 1, :, row.columns]
        if not scores.plain:
            out[b : b + 1, row.columns] = attend_run(q, k, v, row.start, scores).transpose(1, 2)
            continue
        mask = None if row.start == 0 else torch.ones(row.count, row.end, dtype=torch.bool, device=q.device).tril(row.start)
        attended = scaled_dot_product_attention(q, _repeat(k, group), _repeat(v, group), mask, is_causal=mask is None, scale=scale)
        out[b : b + 1, row.columns] = attended.transpose(1, 2)
    return out


def _past_blocks(paged: PagedKVLayer, page_table: Tensor, tokens: int, group: int) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V of the first `tokens` of one sequence in blocks [1, Hq, N, D]; page_table [1, M]."""
    for begin in range(0, tokens, BLOCK_TOKENS):
        table, length = page_table[:, begin // paged.page_size :], min(BLOCK_TOKENS, tokens - begin)
        keys, values = (_repeat(rows, group) for rows in cached_rows(paged, table, length))
        yield keys, values


def _attend_traced(query: Tensor, paged: PagedKVLayer, forward: Forward, scores: Scores, prompt: tuple[Tensor, Tensor]) -> Tensor:
    """The same in fixed shapes, for a traced `prompt` (K and V): every slot of the cache, masked by position."""
    group = query.shape[1] // paged.num_kv_heads
    max_cache_len = forward.page_table.shape[1] * paged.page_size
    k, v = cached_rows(paged, forward.page_table, max_cache_len)
    if paged.scales is not None:
        k, v = (_placed(rows, new, forward.positions()) for rows, new in zip((k, v), prompt, strict=True))
    slots = torch.arange(max_cache_len, device=query.device)
    v = torch.where((slots < forward.seq_lens[:, None])[:, None, :, None], v, 0.0)
    # A padding column sees slot 0, so that no row is empty; nobody reads its output.
    mask = slots <= forward.positions().clamp(min=0)[..., None]  # [B, T, M * S]
    if not scores.plain:
        return attend_masked(query, k, v, mask[:, None], scores).transpose(1, 2)
    out = scaled_dot_product_attention(query, _repeat(k, group), _repeat(v, group), mask[:, None], scale=scores.scale)
    return out.transpose(1, 2)


def cached_rows(paged: PagedKVLayer, page_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """K and V of the first `length` tokens of each sequence, [B, Hkv, length, D] each."""
    k, v = (_paged_rows(pages, page_table, length) for pages in paged.kv)
    return (k, v) if paged.scales is None else (paged.scales.keys(k, paged.dtype), paged.scales.values(v, paged.dtype))


def _placed(rows: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """Rows [B, Hkv, L, D] with the new ones [B, Hkv, T, D] at slots [B, T]; -1 is nowhere."""
    spare = rows.shape[2]
    at = torch.where(slots < 0, spare, slots).long()[:, None, :, None].expand(new.shape)
    return torch.nn.functional.pad(rows, (0, 0, 0, 1)).scatter(2, at, new)[:, :, :spare]


def _paged_rows(pages: Tensor, page_table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of each sequence, [B, Hkv, length, D], from pages [P, Hkv, S, D]."""
    used = -(-length // pages.shape[2])
    rows = pages[page_table[:, :used].long()]  # [B, used, Hkv, S, D]
    return rows.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _repeat(x: Tensor, group: int) -> Tensor:
    """[B, Hkv, N, D] -> [B, Hkv * G, N, D]; the masked kernels of scaled_dot_product_attention know no groups."""
    return x if group == 1 else x.repeat_interleave(group, dim=1)


AttentionInterface.register("twilight", twilight_attention)
AttentionMaskInterface.register("twilight", twilight_mask)
