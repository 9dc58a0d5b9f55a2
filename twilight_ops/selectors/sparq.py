"""SparQ: scores every token with the channels in which the query is largest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import integer, normalise
from ..arguments import Candidates
from ..layer import Selector, stored_bytes
from ..reference._top_k import group_scores
from ._paged import read_keys
from ._rank import best_tokens, group_query, live_tokens


@dataclass(frozen=True)
class SparQ(Selector):
    """Token-granular selection from `channels` components of K, chosen anew at each step by |q|.

    The heads of a group share a list of channels, those with the largest sum of |q|. Scores are softmaxed at the temperature
    `1 / (sm_scale * sqrt(|q_r|_1 / |q|_1))` that makes up for the channels left out. The mean-V correction of the paper belongs
    to the attention, not to the selection, and is left out.

    Args:
        token_budget, budget_fraction: see `Selector`; the paper keeps 128 tokens.
        channels: r; the paper's is 32 of 128.

    Source: SparQ, arXiv 2312.04985.
    """

    token_budget: int = 128
    channels: int = 32

    name: ClassVar[str] = "sparq"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, channels=integer(1))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        query = group_query(q, kv_heads)  # [B, T, Hkv, G, D]
        weight = query.abs().nan_to_num(nan=0.0, posinf=torch.finfo(query.dtype).max)
        strength = weight.sum(dim=(1, 3))  # [B, Hkv, D]
        chosen = strength.topk(min(self.channels, head_dim), dim=-1).indices  # [B, Hkv, r]
        keys = read_keys(layer, page_table)  # [B, Hkv, N, D]
        keys = keys.gather(-1, chosen[:, :, None].expand(-1, -1, keys.shape[2], -1)).float()
        where = chosen[:, None, :, None].expand(*query.shape[:-1], -1)
        covered = weight.gather(-1, where).sum(-1) / weight.sum(-1).clamp(min=torch.finfo(query.dtype).tiny)
        logits = torch.einsum("bthgr,bhnr->bthgn", query.gather(-1, where), keys) * sm_scale
        logits = logits / covered.clamp(min=1e-6).sqrt()[..., None]
        live = live_tokens(seq_lens, kv_heads, keys.shape[2])
        return best_tokens(group_scores(logits, live), live, layer, page_table, seq_lens, q.shape[1])

    def scan_bytes(self, layer, tokens) -> list[float]:
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        return [float(min(self.channels, head_dim) * stored_bytes(layer.kv.k_cache))] * kv_heads
