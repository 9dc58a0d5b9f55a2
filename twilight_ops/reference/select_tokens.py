"""Reference of twilight::select_tokens."""

import torch
from torch import Tensor

from ..arguments import Always, Budget, PageLevel, PageMeans, Paging, Shadow
from ..capacity import Limits
from ._paging import all_tokens, compute_dtype, dequantise, gather_tokens, unpack_means, unpack_shadow
from ._top_k import best_pages, group_scores, row_budget, take_best


def select_tokens(
    q: Tensor,
    shadow: Shadow,
    paging: Paging,
    budget: Budget,
    sm_scale: float,
    always: Always,
    means: PageMeans | None,
    level: PageLevel,
) -> tuple[Tensor, Tensor]:
    (k_quant, k_scale, channel_order, prefix_channels, _), (page_table, seq_lens) = shadow, paging
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = k_scale.shape
    max_pages = page_table.shape[1]
    dtype = compute_dtype(q)
    limits = Limits.of(max_pages * page_size, query_tokens, budget, always)
    seq_lens = seq_lens.long().clamp(0, max_pages * page_size)

    tokens = all_tokens(page_table, kv_heads, page_size)
    keys = dequantise(unpack_shadow(k_quant, prefix_channels, page_size), k_scale, dtype)  # ordered channels
    leading = torch.arange(head_dim, device=q.device) < prefix_channels[:, None]  # [Hkv, D]
    keys = torch.where(leading[None, :, None], keys, 0.0)
    keys = gather_tokens(keys, page_table, tokens)  # [B, Hkv, N, D]
    grouped = q.to(dtype).view(batch, query_tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.gather(-1, channel_order.long()[:, None].expand_as(grouped))
    grouped = torch.where(leading[:, None], grouped, 0.0)
    logits = torch.einsum("bthgd,bhnd->bthgn", grouped, keys) * sm_scale

    live = tokens < seq_lens[:, None, None]
    wanted = row_budget(seq_lens, kv_heads, limits, budget.head_token_budget)
    if level.page_fraction < 1.0:
        assert means is not None  # as checked
        rows = torch.where(leading, dequantise(unpack_means(means.page_means), means.means_scale, dtype), 0.0)
        rows = rows[page_table.long().clamp(0, num_pages - 1)]  # [B, M, Hkv, D]
        page_logits = torch.einsum("bthgd,bmhd->bthgm", grouped, rows) * sm_scale
        share = (-(-seq_lens // page_size).double() * level.page_fraction).ceil().long().clamp(min=-(-level.min_scored_tokens // page_size))
        pages = torch.maximum(share[:, None], -(-wanted // page_size))
        capacity = limits.kept_pages_capacity(page_size, level)
        listed, _ = best_pages(page_logits, seq_lens, page_size, limits, pages, capacity)
        kept = live.new_zeros(batch, kv_heads, max_pages + 1).scatter_(2, listed.long() % (max_pages + 1), True)
        live = live & kept[..., :max_pages].repeat_interleave(page_size, dim=-1)
    scores = group_scores(logits, live)
    newest = seq_lens[:, None, None] - limits.recent_tokens
    forced = (tokens < limits.sink_tokens) | (tokens >= newest)
    return take_best(scores, live, forced, wanted, limits.token_capacity)
