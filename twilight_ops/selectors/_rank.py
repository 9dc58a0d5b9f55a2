"""Turns token scores into a candidate list, with the semantics of `select_tokens`; plain PyTorch of fixed shape."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Candidates
from ..reference._top_k import row_budget, take_best
from ._paged import read_keys


def group_query(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, Hq, D] -> fp32 [B, T, Hkv, G, D]."""
    return q.float().unflatten(2, (num_kv_heads, -1))


def real_rows(k: Tensor, positions: Tensor | None) -> Tensor:
    """1 for a prompt's tokens and 0 for its padding, [B or 1, T, 1, 1]."""
    if positions is None:
        return torch.ones(1, k.shape[1], 1, 1, device=k.device)
    return (positions >= 0)[..., None, None].float()


def live_tokens(seq_lens: Tensor, num_kv_heads: int, max_tokens: int) -> Tensor:
    """[B, Hkv, N] bool: positions below the sequence's length."""
    positions = torch.arange(max_tokens, device=seq_lens.device)
    return (positions < seq_lens[:, None])[:, None].expand(-1, num_kv_heads, -1)


def exact_logits(q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """Scaled q . k of every position in the cache, fp32 [B, T, Hkv, G, N], and which of them are live, [B, Hkv, N]."""
    keys = read_keys(layer, page_table).float()  # [B, Hkv, N, D]
    kv_heads = keys.shape[1]
    logits = torch.einsum("bthgd,bhnd->bthgn", group_query(q, kv_heads), keys) * sm_scale
    return logits, live_tokens(seq_lens, kv_heads, keys.shape[2])


def best_tokens(scores: Tensor, eligible: Tensor, layer, page_table: Tensor, seq_lens: Tensor, query_tokens: int) -> Candidates:
    """Eligible tokens within the budget by bins of their scores, as `select_tokens` takes them; the tokens of `always` first.

    scores (>= 0) and eligible [B, Hkv, N]; a token beyond seq_lens is never taken, those of `always` are whether eligible or not.
    """
    asked = layer.limits(page_table, query_tokens)
    _, kv_heads, max_tokens = scores.shape
    positions = torch.arange(max_tokens, device=scores.device)
    live = live_tokens(seq_lens, kv_heads, max_tokens)
    newest = seq_lens[:, None, None] - asked.recent_tokens
    forced = live & ((positions < asked.sink_tokens) | (positions >= newest))
    budget = row_budget(seq_lens, kv_heads, asked, layer.policy.budget.head_token_budget)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Candidates(*take_best(scores, live & (eligible | forced), forced, budget, asked.token_capacity))
