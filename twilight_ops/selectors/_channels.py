"""The shadow prefix as a selector: how it proposes, what that reads, and how it is calibrated from a prompt: which channels lead, and how
many of them are enough for each KV head.

Keys count as they are coded, less `center` [Hkv, D]: what all keys share decides nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import Candidates, Paging
from ..calibration import PREFIX_STEP
from ..layer import PagedKVLayer, stored_bytes
from ..ops.select_tokens import select_tokens
from ..reference._paging import dequantise, quantise

RECENT_QUERIES = 256  # newest queries of the prompt that stand for the ones to come
SCORED_QUERIES = 24  # of those, evenly spaced, decide the prefix; ranking every token for each is what calibration costs
SCORED_SEQUENCES = 4  # of a batch
WHOLE_TOKENS = 8192  # up to which every token of a prompt is ranked
SAMPLED_TOKENS = 4096  # about as many of a longer prompt stand for all, evenly spaced
SINK_TOKENS = 16  # that every query may attend to, so that no sample may miss one: the first ones, all of them
# A shorter prompt has too few tokens for a top-n/8 to mean anything: the whole row stays the prefix, which loses nothing.
MIN_TOKENS = 64


def propose(q: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
    """`Selector.select` with the layer's own prefix."""
    assert layer.shadow is not None
    policy, paging = layer.policy, Paging(page_table, seq_lens)
    lists = select_tokens(q, layer.shadow, paging, policy.budget, sm_scale, policy.always, layer.means, policy.level)
    return Candidates(*lists)


def scan_bytes(layer: PagedKVLayer, tokens: float) -> list[float]:
    """`Selector.scan_bytes`: the prefix and (scale, zero) of the pages that are kept, and the same of every page's mean."""
    assert layer.shadow is not None
    fraction, least = layer.policy.level
    share = 1.0 if fraction == 1.0 or tokens <= least else max(fraction, least / tokens) + 1 / layer.page_size
    return [share * (channels / 2 + 2 * stored_bytes(layer.shadow.k_scale)) for channels in layer.shadow.prefix_channels.tolist()]


def estimate_bytes(layer: PagedKVLayer) -> list[float]:
    """`Selector.estimate_bytes`: the scan has read the prefix and the scale."""
    assert layer.shadow is not None
    return [(layer.head_dim - channels) / 2 for channels in layer.shadow.prefix_channels.tolist()]


def channel_order(q: Tensor, k: Tensor, positions: Tensor | None, center: Tensor) -> Tensor:
    """Channels of each KV head by falling mean |q_d| mean |k_d - center_d| over the newest queries of its group and all keys, [Hkv, D]."""
    batch, tokens, kv_heads, head_dim = k.shape
    recent = slice(max(0, tokens - RECENT_QUERIES), tokens)
    q_size = q[:, recent].abs().float().view(batch, -1, kv_heads, q.shape[2] // kv_heads, head_dim).sum(3)
    k_size = (k - center.to(k.dtype)).abs()
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
    center: Tensor,
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
        keys = (k[b, sampled].float() - center).transpose(0, 1)  # [Hkv, N, D]
        queries = q[b, columns].view(-1, kv_heads, group, head_dim).permute(1, 2, 0, 3).float() * sm_scale  # [Hkv, G, Q, D]
        seen = (columns[:, None] >= sampled) & counts  # [Q, N]
        if live is not None:
            seen = seen & live[sampled] & live[columns, None]
        # The lowest finite number instead of -inf, so that the softmax of a padding query, zeroed below, is no NaN.
        # A sampled token stands for `stride` of them, a sink for itself.
        bias = torch.where(is_sink, -math.log(stride), 0.0).expand(seen.shape)
        bias = bias.masked_fill(~seen, torch.finfo(torch.float32).min).repeat(group, 1)
        weights = _attention(queries, keys, bias).unflatten(1, (group, -1))  # [Hkv, G, Q, N]
        if live is not None:
            weights = weights * live[columns, None]
        keys = keys.gather(2, order.long()[:, None].expand_as(keys))
        queries = queries.gather(3, order.long()[:, None, None].expand_as(queries))
        keys = dequantise(*quantise(keys, 15), torch.float32)
        # A padded sequence is shorter than the chunk, and so is its share of the budget.
        share = None if live is None else -(-live.sum() * budget // tokens)
        sequences.append((queries, keys, bias, weights, seen.any(-1).sum(), share))

    def captured(prefix: Tensor) -> Tensor:
        """True mass of the tokens selected with `prefix` [Hkv] channels, mean over queries: [Hkv, G]."""
        masses, counts = torch.zeros((), device=q.device), torch.zeros((), device=q.device)
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
