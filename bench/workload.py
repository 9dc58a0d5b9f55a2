"""Synthetic layers whose attention is as concentrated as a trained model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from timing import RESERVED_BYTES, Sizes, buffer_sets
from torch import Tensor

from twilight_ops import PagedKVCache, PagedKVLayer, Quest, TwilightConfig, decode_step, ops
from twilight_ops.capacity import COUNTER_CANDIDATES, COUNTER_KEPT, COUNTER_ROWS

# Standard deviation of the logits, natural-log units. At p = 0.85 the lognormal's quantiles leave 128 of 32768 tokens a query head; a
# sample of that size, which lacks the far tail, keeps 209 on average (4.0 leaves about 120).
SPREAD = 3.7
# Share of a key's variance common to its page of 16 tokens: neighbours in text resemble each other, which is what page bounds live on.
PAGE_COHERENCE = 0.5
# What a channel contributes to a logit decays by e over this share of the head, shared evenly between query and key: the leading
# quarter holds 86% of a logit's variance, and the 4-bit shadow's error in a logit is about 0.5.
ENERGY_DECAY = 0.25
# Tokens filled in one append_kv call.
FILL_CHUNK = 4096


# Where a sequence's pages lie: at random in the whole pool, as in a server that has run for long, or as a fresh cache hands them out.
PAGE_ORDERS = {"shuffled": "shuffled pages", "allocated": "pages in the order of allocation"}


def assumptions(spread: float = SPREAD, page_order: str = "shuffled") -> str:
    return (
        f"logits of standard deviation {spread} in every row, {PAGE_COHERENCE:.0%} of a key's variance shared by its page, channel "
        f"contributions decaying over {ENERGY_DECAY:.0%} of the head, channels in that order, independent query heads, "
        f"{PAGE_ORDERS[page_order]}, full length live"
    )


ASSUMPTIONS = assumptions()


@dataclass
class Workload:
    """Buffer sets of one shape: same keys and values in every set, different memory and queries."""

    sizes: Sizes
    queries: list[Tensor]  # [B, T, Hq, D] a set
    cache: PagedKVCache  # one layer a set, with shadow and 8-bit bounds
    keys: Tensor  # [B, L, Hkv, D], a view of [B, Hkv, L, D]
    values: Tensor
    prefix_channels: int
    copies: int  # of K and V, contiguous, for dense peers

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
            replace(
                layer, plan=config.layer_plan(i, device.type, self.sizes.lists), budget_counters=torch.zeros_like(layer.budget_counters)
            )
            for i, layer in enumerate(self.cache.layers)
        ]

    @cached_property
    def contiguous_kv(self) -> list[tuple[Tensor, Tensor]]:
        """`copies` times K and V [B, Hkv, L, D], in separate memory; the first is what keys and values view."""
        original = tuple(t.transpose(1, 2) for t in (self.keys, self.values))
        return [original] + [tuple(t.clone() for t in original) for _ in range(1, self.copies)]

    def dense_copies(self) -> list[tuple[Tensor, Tensor]]:
        """K and V of every set, contiguous: the layout that dense peers like best. Sets take the copies in turn."""
        return [self.contiguous_kv[i % self.copies] for i in range(len(self.queries))]

    def exact(self, index: int) -> tuple[Tensor, Tensor]:
        """Attention of query set `index` over every token, in fp32: out [B, T, Hq, D] and lse [B, T, Hq]."""
        sizes = self.sizes
        tokens, kv_heads = sizes.query_tokens, sizes.num_kv_heads
        newest = torch.arange(sizes.length - tokens, sizes.length, device=self.keys.device)
        hidden = torch.arange(sizes.length, device=self.keys.device) > newest[:, None]  # [T, L]
        out, lse = [], []
        for q, k, v in zip(self.queries[index], self.keys, self.values, strict=True):
            rows = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2).float()  # [Hkv, G * T, D]
            logits = (rows @ k.permute(1, 2, 0).float() * self.sm_scale).unflatten(1, (-1, tokens))  # [Hkv, G, T, L]
            logits.masked_fill_(hidden, -torch.inf)
            lse.append(logits.logsumexp(-1).flatten(0, 1).T)  # [T, Hq]
            weights = logits.softmax(-1).flatten(1, 2)
            out.append((weights @ v.transpose(0, 1).float()).unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.stack(out), torch.stack(lse)


def decode_arguments(q: Tensor, layer: PagedKVLayer, paging: tuple[Tensor, Tensor], sm_scale: float) -> dict[str, object]:
    """`decode_attention`'s arguments by name, as `decode_step.attend` passes them; selectors with a kernel of their own only."""
    plan, tensors = layer.plan, ("k_cache", "v_cache", "k_quant", "k_scale", "page_bounds", "bounds_scale")
    selector = plan.selector
    return {
        "q": q,
        **{name: getattr(layer, name) for name in (*tensors, "channel_order", "prefix_channels")},
        "page_table": paging[0],
        "seq_lens": paging[1],
        "selector": "dense" if selector is None else selector.kernel,
        "token_budget": 1 if selector is None else selector.token_budget,
        "budget_fraction": 0.0 if selector is None else selector.budget_fraction,
        "top_p": plan.top_p,
        "sm_scale": sm_scale,
        "dense_below": plan.dense_below,
        "budget_counters": layer.budget_counters,
    }


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


def build(
    sizes: Sizes, device: str, sets: int | None = None, seed: int = 0, spread: float = SPREAD, page_order: str = "shuffled"
) -> Workload:
    """Allocates and fills the buffer sets; `sets` None rotates enough of them for cold caches, or what the device's memory holds.

    Raises:
        MemoryError: the device cannot hold one set and one contiguous copy.
    """
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else None
    paged, copies = buffer_sets(sizes, device, free)
    if paged == 0:
        need = (sizes.paged_bytes + sizes.kv_bytes + RESERVED_BYTES) / 2**30
        raise MemoryError(
            f"{sizes}: a paged cache, a contiguous K and V and room to work in need {need:.0f} GiB, {free / 2**30:.0f} GiB are free"
        )
    sets = paged if sets is None else sets
    rng = torch.Generator(device).manual_seed(seed)
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
        return (q * spread / (q * logit_std).square().mean(-1, keepdim=True).sqrt()).to(sizes.dtype)

    keys, values = torch.empty((2, batch, kv_heads, length, dim), dtype=sizes.dtype, device=device).transpose(2, 3)
    for key, value in zip(keys, values, strict=True):  # one sequence at a time: fp32 of a whole batch may not fit
        pages = normal(-(-length // sizes.page_size), kv_heads, dim).repeat_interleave(sizes.page_size, dim=0)[:length]
        key.copy_(pages.mul_(PAGE_COHERENCE**0.5).add_(normal(length, kv_heads, dim).mul_((1 - PAGE_COHERENCE) ** 0.5)).mul_(key_std))
        value.copy_(normal(length, kv_heads, dim))
        del pages
    queries = [query() for _ in range(sets)]

    config = TwilightConfig(selector=Quest(), page_size=sizes.page_size, dense_layers=0)
    cache = PagedKVCache(config, sets, sizes.num_qo_heads, kv_heads, dim, batch, length, sizes.dtype, device)
    if page_order == "shuffled":
        cache.page_table.copy_(torch.randperm(cache.page_table.numel(), generator=rng, device=device).view_as(cache.page_table))
    prefix = max(8, dim // 4 // 8 * 8)
    first = cache.layers[0]
    first.channel_order.copy_(profile.argsort(dim=-1, descending=True))
    first.prefix_channels.fill_(prefix)
    for start in range(0, length, FILL_CHUNK):
        stop = min(length, start + FILL_CHUNK)
        cache.seq_lens.fill_(stop)
        decode_step.append(keys[:, start:stop], values[:, start:stop], first, cache.page_table, cache.seq_lens)
    for layer in cache.layers[1:]:
        for target, source in zip(layer.tensors(), first.tensors(), strict=True):
            target.copy_(source)
    return Workload(sizes, queries, cache, keys, values, prefix, min(copies, sets))
