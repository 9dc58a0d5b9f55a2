"""Calibration of the shadow prefix: which channels lead, and how many of them are enough for each KV head."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .reference._paging import dequantise, quantise

if TYPE_CHECKING:
    from .paged_kv_cache import PagedKVLayer

RECENT_QUERIES = 256  # newest queries of the prompt that stand for the ones to come
SCORED_QUERIES = 24  # of those, evenly spaced, decide the prefix; ranking every token for each is what calibration costs
SCORED_SEQUENCES = 4  # of a batch
WHOLE_TOKENS = 8192  # up to which every token of a prompt is ranked
SAMPLED_TOKENS = 4096  # about as many of a longer prompt stand for all, evenly spaced
SINK_TOKENS = 16  # that every query may attend to, so that no sample may miss one: the first ones, all of them
PREFIX_STEP = 8  # channels; the shadow's layout wants multiples
# A shorter prompt has too few tokens for a top-n/8 to mean anything: the whole row stays the prefix, which loses nothing.
MIN_TOKENS = 64
FORMAT = "twilight-shadow-prefix-1"


def initialise(layer: PagedKVLayer) -> None:
    """Writes the order and prefix that hold before any prompt: from the selector's file, else identity and its fixed prefix or D."""
    if layer.channel_order is None:
        return
    selector = layer.plan.selector
    kv_heads, head_dim = layer.channel_order.shape
    if selector.kernel == "shadow_prefix" and selector.calibration is not None:
        order, prefix = load(selector.calibration, layer.index, kv_heads, head_dim)
        if selector.prefix_channels is not None:
            prefix = torch.full_like(prefix, selector.prefix_channels)
    else:
        order = torch.arange(head_dim).expand(kv_heads, -1)
        fixed = getattr(selector, "prefix_channels", None) or head_dim
        prefix = torch.full((kv_heads,), fixed)
    layer.channel_order.copy_(order)
    layer.prefix_channels.copy_(prefix.clamp(max=head_dim))


@torch.no_grad()
def from_prompt(layer: PagedKVLayer, q: Tensor, k: Tensor, positions: Tensor | None, sm_scale: float) -> None:
    """Calibrates one layer in place from the prompt that first fills its cache, before that prompt is appended.

    Shapes depend on T only and nothing is read on the host, so it may be traced. For a shadow prefix, channels are ordered by mean
    |q_d| |k_d| and the prefix is `shortest_prefix`, unless the selector fixes it or brings a file. Other selectors have a `calibrate`
    of their own.

    Args:
        q: [B, T, Hq, D], k: [B, T, Hkv, D], with their position encoding.
        positions: [B, T] int32, -1 for padding; None: no padding.
        sm_scale: factor on q . k.
    """
    selector = layer.plan.selector
    if selector is None:
        return
    selector.calibrate(q, k, layer, positions, sm_scale)
    if selector.kernel != "shadow_prefix" or selector.calibration is not None or k.shape[1] < MIN_TOKENS:
        return
    layer.channel_order.copy_(channel_order(q, k, positions))
    if selector.prefix_channels is None:
        prefix = shortest_prefix(
            q, k, positions, layer.channel_order, selector.token_budget, selector.budget_fraction, selector.tau, sm_scale
        )
        layer.prefix_channels.copy_(prefix)


def channel_order(q: Tensor, k: Tensor, positions: Tensor | None) -> Tensor:
    """Channels of each KV head by falling mean |q_d| mean |k_d| over the newest queries of its group and all keys, [Hkv, D]."""
    batch, tokens, kv_heads, head_dim = k.shape
    recent = slice(max(0, tokens - RECENT_QUERIES), tokens)
    q_size = q[:, recent].abs().float().view(batch, -1, kv_heads, q.shape[2] // kv_heads, head_dim).sum(3)
    k_size = k.abs()
    if positions is not None:
        live = (positions >= 0)[:, :, None, None]
        q_size, k_size = q_size * live[:, recent], torch.where(live, k_size, 0.0)
    return (q_size.sum((0, 1)) * k_size.sum((0, 1), dtype=torch.float32)).argsort(dim=-1, descending=True, stable=True)


def calibration_budget(tokens: int, token_budget: int, budget_fraction: float) -> int:
    """Candidates that a prefix is judged with.

    The selector's own budget, except that its floor is held down to an eighth of the prompt: a budget that covers a short prompt whole
    would call any prefix perfect.
    """
    return max(1, math.ceil(budget_fraction * tokens), min(token_budget, tokens // 8))


def shortest_prefix(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    order: Tensor,
    token_budget: int,
    budget_fraction: float,
    tau: float,
    sm_scale: float,
) -> Tensor:
    """Smallest multiple of 8 channels a KV head whose worst query head loses at most tau of true attention mass, [Hkv].

    The mass is that of the tokens selected with the prefix, averaged over queries, against the selection with all channels. Found by
    bisection: the mass is taken to grow with the prefix. Of a long prompt a sample is ranked.
    """
    batch, tokens, kv_heads, head_dim = k.shape
    group = q.shape[2] // kv_heads
    stride = 1 if tokens <= WHOLE_TOKENS else -(-tokens // SAMPLED_TOKENS)
    budget = -(-calibration_budget(tokens, token_budget, budget_fraction) // stride)
    first = max(0, tokens - RECENT_QUERIES)
    queries_apart = -(-(tokens - first) // SCORED_QUERIES)
    columns = torch.arange(tokens - 1, first - 1, -queries_apart, device=q.device)  # [Q], newest first
    sequences = []
    for b in range(min(batch, SCORED_SEQUENCES)):
        live = None if positions is None else positions[b] >= 0
        sampled, is_sink, counts = _scored_tokens(tokens, stride, live, q.device)
        keys = k[b, sampled].transpose(0, 1).float()  # [Hkv, N, D]
        queries = q[b, columns].view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3).float() * sm_scale  # [Hkv, G, Q, D]
        seen = (columns[:, None] >= sampled) & counts  # [Q, N]
        if live is not None:
            seen = seen & live[sampled] & live[columns, None]
        # The lowest finite number instead of -inf, so that the softmax of a padding query, zeroed below, is no NaN.
        # A sampled token stands for `stride` of them, a sink for itself.
        bias = torch.where(is_sink, -math.log(stride), 0.0).expand(seen.shape)
        bias = bias.masked_fill(~seen, torch.finfo(torch.float32).min).repeat(group, 1)
        weights = _attention(queries, keys, bias).unflatten(1, (group, -1))  # [Hkv, G, Q, N]
        if positions is not None:
            weights = weights * live[columns, None]
        keys = keys.gather(2, order.long()[:, None].expand_as(keys))
        queries = queries.gather(3, order.long()[:, None, None].expand_as(queries))
        keys = dequantise(*quantise(keys, 15), torch.float32)
        # A padded sequence is shorter than the chunk, and so is its share of the budget.
        share = None if positions is None else -(-live.sum() * budget // tokens)
        sequences.append((queries, keys, bias, weights, seen.any(-1).sum(), share))

    def captured(prefix: Tensor) -> Tensor:
        """True mass of the tokens selected with `prefix` [Hkv] channels, mean over queries: [Hkv, G]."""
        masses, counts = 0.0, 0.0
        leading = torch.arange(head_dim, device=q.device) < prefix[:, None]
        for queries, keys, bias, weights, live_queries, share in sequences:
            scores = _attention(queries * leading[:, None, None], keys, bias).unflatten(1, (group, -1)).sum(1)  # [Hkv, Q, N]
            chosen = scores.topk(budget, dim=-1, sorted=share is not None).indices
            mass = weights.gather(3, chosen[:, None].expand(-1, group, -1, -1))
            if share is not None:
                mass = mass * (torch.arange(budget, device=q.device) < share)
            masses = masses + mass.sum((2, 3))
            counts = counts + live_queries
        return masses / counts.clamp(min=1)

    steps = head_dim // PREFIX_STEP
    high = torch.full((kv_heads,), steps, device=q.device)  # always enough
    low = torch.zeros_like(high)  # never enough
    target = captured(high * PREFIX_STEP) - tau
    for _ in range((steps - 1).bit_length()):
        middle = (low + high) // 2
        enough = (captured(middle.clamp(min=1) * PREFIX_STEP) >= target).all(1)
        done = high - low <= 1
        high = torch.where(enough & ~done, middle, high)
        low = torch.where(enough | done, low, middle)
    return high * PREFIX_STEP


def _scored_tokens(tokens: int, stride: int, live: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns [N] that stand for a prompt, which of them are its first ones, and which count (a token found twice counts as the latter).

    live: [T], False for padding; None: no padding.
    """
    spaced = torch.arange(tokens - 1, -1, -stride, device=device).flip(0)
    if stride == 1:
        every = torch.ones(tokens, dtype=torch.bool, device=device)
        return spaced, ~every, every
    start = 0 if live is None else live.int().argmax()
    sinks = (start + torch.arange(SINK_TOKENS, device=device)).clamp(max=tokens - 1)
    is_sink = torch.arange(SINK_TOKENS + len(spaced), device=device) < SINK_TOKENS
    columns = torch.cat([sinks, spaced])
    return columns, is_sink, is_sink | (columns < start) | (columns >= start + SINK_TOKENS)


def _attention(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Softmax of queries [Hkv, G, Q, D] times keys [Hkv, N, D] plus bias [G * Q, N], [Hkv, G * Q, N]."""
    return torch.baddbmm(bias, queries.flatten(1, 2), keys.transpose(1, 2)).softmax(-1)


def save(layers: Sequence[PagedKVLayer], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the calibration of every layer that has one to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {}
    for index, layer in enumerate(layers):
        if layer.channel_order is not None:
            tensors[f"layers.{index}.channel_order"] = layer.channel_order.cpu().clone()
            tensors[f"layers.{index}.prefix_channels"] = layer.prefix_channels.cpu().clone()
    save_file(tensors, path, metadata={"format": FORMAT, **metadata})
    _read.cache_clear()


@functools.lru_cache(maxsize=4)
def _read(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"calibration: {path}: expected a file written by `python -m twilight_ops calibrate`, got no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found == FORMAT:
                return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        found = f"an unreadable file ({error})"
    raise ValueError(f"calibration: {path}: expected format {FORMAT}, got {found}")


def load(path: str, index: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """One layer's (channel_order [Hkv, D], prefix_channels [Hkv]); with tensor parallelism this rank's heads of them."""
    tensors = _read(str(path))
    order, prefix = (tensors.get(f"layers.{index}.{name}") for name in ("channel_order", "prefix_channels"))
    if order is None or prefix is None:
        raise ValueError(f"calibration: {path}: expected an entry for layer {index}, got none")
    heads = order.shape[0]
    if order.shape[1] != head_dim or heads % kv_heads:
        raise ValueError(f"calibration: {path}: expected {kv_heads} KV heads of {head_dim} channels, got {list(order.shape)}")
    if heads != kv_heads:
        part = torch.distributed.get_rank() % (heads // kv_heads) * kv_heads
        order, prefix = order[part : part + kv_heads], prefix[part : part + kv_heads]
    valid = (order.sort(-1).values == torch.arange(head_dim)).all() and (
        (prefix % PREFIX_STEP == 0) & (prefix > 0) & (prefix <= head_dim)
    ).all()
    if not valid:
        raise ValueError(f"calibration: {path}: expected permutations and prefixes that are multiples of {PREFIX_STEP}, got others")
    return order, prefix
