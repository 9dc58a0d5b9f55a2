"""Synthetic layers whose attention is as concentrated as a trained model's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from timing import Sizes, sets_for_cold_cache
from torch import Tensor

from twilight_ops import PagedKVCache, PagedKVLayer, Quest, TwilightConfig, decode_step, ops
from twilight_ops.capacity import COUNTER_CANDIDATES, COUNTER_KEPT, COUNTER_ROWS

# Standard deviation of the logits, natural-log units: at p = 0.85 it leaves about 128 of 32768 tokens a query head.
SPREAD = 3.7
# Share of a key's variance common to its page of 16 tokens: neighbours in text resemble each other, which is what page bounds live on.
PAGE_COHERENCE = 0.5
# What a channel contributes to a logit decays by e over this share of the head, shared evenly between query and key: the leading
# quarter holds 86% of a logit's variance, and the 4-bit shadow's error in a logit is about 0.5.
ENERGY_DECAY = 0.25
# Tokens filled in one append_kv call.
FILL_CHUNK = 4096

ASSUMPTIONS = (
    f"logits of standard deviation {SPREAD} in every row, {PAGE_COHERENCE:.0%} of a key's variance shared by its page, channel "
    f"contributions decaying over {ENERGY_DECAY:.0%} of the head, channels in that order, independent query heads, "
    "shuffled pages, full length live"
)


@dataclass
class Workload:
    """Buffer sets of one shape: same keys and values in every set, different memory and queries."""

    sizes: Sizes
    queries: list[Tensor]  # [B, T, Hq, D] a set
    cache: PagedKVCache  # one layer a set, with shadow and 8-bit bounds
    keys: Tensor  # [B, L, Hkv, D]
    values: Tensor
    prefix_channels: int

    @property
    def sm_scale(self) -> float:
        return self.sizes.head_dim**-0.5

    @property
    def paging(self) -> tuple[Tensor, Tensor]:
        return self.cache.page_table, self.cache.seq_lens

    def layers(self, config: TwilightConfig) -> list[PagedKVLayer]:
        """The same memory under another configuration, with counters of its own."""
        device = self.keys.device
        return [
            replace(layer, plan=config.layer_plan(i, device.type), budget_counters=torch.zeros_like(layer.budget_counters))
            for i, layer in enumerate(self.cache.layers)
        ]

    def dense_copies(self) -> list[tuple[Tensor, Tensor]]:
        """K and V [B, Hkv, L, D], contiguous, in separate memory a set: the layout that dense peers like best."""
        return [tuple(t.transpose(1, 2).contiguous() for t in (self.keys, self.values)) for _ in self.queries]


def shadow_of(layer: PagedKVLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four tensors of the 4-bit shadow, in the operators' order."""
    return layer.k_quant, layer.k_scale, layer.channel_order, layer.prefix_channels


def candidate_lists(data: Workload, token_budget: int) -> dict[str, list[tuple[Tensor | None, Tensor | None, int]]]:
    """(indices, counts, tokens_per_index) of every buffer set, from each kind of selector."""
    lists: dict[str, list] = {"every token": [], "pages": [], "tokens": []}
    page_size = data.sizes.page_size
    for q, layer in zip(data.queries, data.cache.layers, strict=True):
        budget = (token_budget, 0.0, data.sm_scale)
        lists["every token"].append((None, None, 1))
        pages = ops.select_pages(q, layer.page_bounds, layer.bounds_scale, *data.paging, page_size, *budget)
        lists["pages"].append((*pages, page_size))
        lists["tokens"].append((*ops.select_tokens(q, *shadow_of(layer), *data.paging, *budget), 1))
    return lists


def budget_means(layers: list[PagedKVLayer]) -> tuple[float, float]:
    """Mean I0 and I1 a KV head over all calls counted so far."""
    total = sum(layer.budget_counters.sum(0) for layer in layers)
    rows = max(1, int(total[COUNTER_ROWS]))
    return int(total[COUNTER_CANDIDATES]) / rows, int(total[COUNTER_KEPT]) / rows


def build(sizes: Sizes, device: str, sets: int | None = None, seed: int = 0) -> Workload:
    """Allocates and fills the buffer sets; `sets` None rotates enough of them for cold caches."""
    rng = torch.Generator(device).manual_seed(seed)
    sets = sets_for_cold_cache(sizes.kv_bytes) if sets is None else sets
    batch, length, kv_heads, dim = sizes.batch, sizes.length, sizes.num_kv_heads, sizes.head_dim

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, device=device)

    profile = torch.exp(-torch.arange(dim, device=device) / (2 * ENERGY_DECAY * dim))
    profile = profile[torch.stack([torch.randperm(dim, generator=rng, device=device) for _ in range(kv_heads)])]  # [Hkv, D]
    key_std = profile / profile.square().mean(-1, keepdim=True).sqrt()
    group = sizes.num_qo_heads // kv_heads
    query_std, logit_std = (t.repeat_interleave(group, dim=0) for t in (profile, key_std))

    def query() -> Tensor:
        """Scaled so that this very query's logits have the wanted spread."""
        q = normal(batch, sizes.query_tokens, sizes.num_qo_heads, dim) * query_std
        return (q * SPREAD / (q * logit_std).square().mean(-1, keepdim=True).sqrt()).to(sizes.dtype)

    pages = normal(batch, -(-length // sizes.page_size), kv_heads, dim).repeat_interleave(sizes.page_size, dim=1)[:, :length]
    keys = pages.mul_(PAGE_COHERENCE**0.5).add_(normal(batch, length, kv_heads, dim).mul_((1 - PAGE_COHERENCE) ** 0.5)).mul_(key_std)
    keys, values = keys.to(sizes.dtype), normal(batch, length, kv_heads, dim).to(sizes.dtype)
    queries = [query() for _ in range(sets)]

    config = TwilightConfig(selector=Quest(), page_size=sizes.page_size, dense_layers=0)
    cache = PagedKVCache(config, sets, sizes.num_qo_heads, kv_heads, dim, batch, length, sizes.dtype, device)
    shuffled = torch.randperm(cache.page_table.numel(), generator=rng, device=device)
    cache.page_table.copy_(shuffled.view_as(cache.page_table))
    prefix = max(8, dim // 4 // 8 * 8)
    for layer in cache.layers:
        layer.channel_order.copy_(profile.argsort(dim=-1, descending=True))
        layer.prefix_channels.fill_(prefix)
        for start in range(0, length, FILL_CHUNK):
            stop = min(length, start + FILL_CHUNK)
            cache.seq_lens.fill_(stop)
            decode_step.append(keys[:, start:stop], values[:, start:stop], layer, cache.page_table, cache.seq_lens)
    return Workload(sizes, queries, cache, keys, values, prefix)
