"""Exact prefill once, decode many times: records a prompt's K, V and newest queries, and fills a cache of any method with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ..config import TwilightConfig
from ..decode_step import append
from ..integration import TwilightCache, cache_argument
from ..integration.hf.windows import Scores, attend_run
from ..selectors._channels import RECENT_QUERIES


@dataclass
class LayerRecord:
    """One layer's view of one prompt, with position encoding."""

    q: Tensor  # [1, <= RECENT_QUERIES unless more were asked for, Hq, D], the newest
    k: Tensor  # [1, N, Hkv, D]
    v: Tensor  # [1, N, Hkv, D]
    sm_scale: float


@dataclass
class Prefill:
    """One prompt after exact attention."""

    ids: Tensor  # [N]
    layers: list[LayerRecord]  # none of a model that has more than attention to everything: its prompts are run again for every cache
    last_logits: Tensor  # [V] fp32, of the last prompt token

    @property
    def tokens(self) -> int:
        return self.ids.shape[0]


class _Recording(list[LayerRecord]):
    queries = RECENT_QUERIES  # that are kept of each layer


_RECORDING = _Recording()


def _record_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Exact causal attention over one whole prompt, noting what it saw; q [1, Hq, N, D], k and v [1, Hkv, N, D]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    newest = query[:, :, -_RECORDING.queries :].transpose(1, 2).contiguous()
    _RECORDING.append(LayerRecord(newest, key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous(), scale))
    scores = Scores(scale, kwargs.get("softcap"), kwargs.get("s_aux"))
    if scores.plain:
        k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = scaled_dot_product_attention(query, k, v, is_causal=True, scale=scale)
    else:
        out = attend_run(query, key, value, 0, scores)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("twilight_record", _record_attention)


@contextmanager
def attention(model, name: str):
    """Switches the model's attention implementation for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def record(model, ids: Tensor, queries: int = RECENT_QUERIES) -> Prefill:
    """Runs one prompt ids [N] through the model with exact attention; keeps the newest `queries` queries of every layer."""
    cache = TwilightCache(model.config, None, 1, len(ids), warn_never_sparse=False)
    if not cache.is_plain:
        return Prefill(ids, [], _run(model, cache, [ids])[0])
    _RECORDING.clear()
    _RECORDING.queries = queries
    with attention(model, "twilight_record"):
        out = model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    layers = list(_RECORDING)
    _RECORDING.clear()
    return Prefill(ids, layers, out.logits[0, -1].float())


@torch.inference_mode()
def cache_of(
    model, config: TwilightConfig, prefills: Sequence[Prefill], new_tokens: int, recorder: Callable | None = None
) -> TwilightCache:
    """A cache of the method `config` that holds the recorded prompts, calibrated on them, with room for `new_tokens` more each."""
    longest = max(prefill.tokens for prefill in prefills)
    kind = {"device": first.k.device, "dtype": first.k.dtype} if (first := next(iter(prefills[0].layers), None)) else {}
    cache = TwilightCache(model.config, config, len(prefills), longest + new_tokens, **kind, recorder=recorder)
    if first is None or not cache.is_plain:  # with room for new tokens a window may leave out some
        _run(model, cache, [prefill.ids for prefill in prefills])
        return cache
    lengths = torch.tensor([prefill.tokens for prefill in prefills], device=first.k.device)
    live = torch.arange(longest, device=first.k.device) >= (longest - lengths)[:, None]
    forward = cache.sequences.begin(len(prefills), longest, live)
    for index, layer in enumerate(cache.layers):
        records = [prefill.layers[index] for prefill in prefills]
        k = torch.cat([_left_pad(record.k, longest) for record in records])
        v = torch.cat([_left_pad(record.v, longest) for record in records])
        # Older queries are zeros: calibration takes none but the newest.
        q = torch.cat([_left_pad(record.q, longest) for record in records])
        layer.paged.calibrate(q, k, forward.slots, records[0].sm_scale, v)
        append(k, v, layer.paged, forward.page_table, forward.seq_lens, forward.slots)
    cache.sequences.commit()
    return cache


def _run(model, cache: TwilightCache, prompts: Sequence[Tensor]) -> Tensor:
    """Runs prompts [N] through the model into an empty cache; the logits [B, V] fp32 after each."""
    longest = max(len(ids) for ids in prompts)
    pad = [(longest - len(ids), 0) for ids in prompts]
    ids = torch.stack([torch.nn.functional.pad(ids, sides) for ids, sides in zip(prompts, pad, strict=True)]).to(model.device)
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(ids), sides) for ids, sides in zip(prompts, pad, strict=True)])
    positions = (mask.cumsum(1) - 1).clamp(min=0).to(model.device)
    padding = {} if bool(mask.all()) else {"attention_mask": mask.to(model.device), "position_ids": positions}
    with attention(model, "twilight"):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **padding, **cache_argument(model, cache))
    cache.sequences.begin_decoding()
    return out.logits[:, -1].float()


def _left_pad(rows: Tensor, length: int) -> Tensor:
    """[1, N, H, D] -> [1, length, H, D], zeros in front."""
    return torch.nn.functional.pad(rows, (0, 0, 0, 0, length - rows.shape[1], 0))
