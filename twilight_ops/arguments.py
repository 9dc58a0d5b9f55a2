"""What operators take, in groups: each name stands here once, and `ops/_library.py` derives the flat schemas from them.

Tensors with P in front are of the cache: contiguous in each page and KV head, while pages and heads may lie any multiple of 16 bytes
apart, so that a block of an engine holds all of them in one range of bytes. All others are contiguous unless an operator says otherwise.

Symbols: B sequences, T query tokens, Hq query heads, Hkv KV heads, D head_dim, S page_size, P physical pages, M pages a sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class KV(NamedTuple):
    """Paged K and V, [P, Hkv, S, D] each, in the model's dtype or both in float8_e4m3fn."""

    k_cache: Tensor
    v_cache: Tensor

    @property
    def is_fp8(self) -> bool:
        return self.k_cache.dtype == FP8


class Scales(NamedTuple):
    """What K and V in float8_e4m3fn stand for: `k = k_cache * k_descale + k_shift` and `v = v_cache * v_descale`.

    Attention weights do not change when every key moves by the same vector, and e4m3 keeps sixteenths of a number: it keeps more of what
    the shift leaves.

    Args:
        k_descale, v_descale: [Hkv] fp32, powers of two, so that every backend rounds alike; None stands for 1.
        k_shift: [Hkv, D] fp32, finite; None stands for 0.
    """

    k_descale: Tensor | None = None
    v_descale: Tensor | None = None
    k_shift: Tensor | None = None

    def keys(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., Hkv, N, D] of k_cache as the keys they stand for, in `dtype`."""
        rows = _times(rows.to(dtype), self.k_descale)
        return rows if self.k_shift is None else rows + self.k_shift.to(dtype)[:, None]

    def values(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..., Hkv, N, D] of v_cache as the values they stand for, in `dtype`."""
        return _times(rows.to(dtype), self.v_descale)


def _times(rows: Tensor, descale: Tensor | None) -> Tensor:
    return rows if descale is None else rows * descale.to(rows.dtype)[:, None, None]


class HotRows(NamedTuple):
    """Copies on the device of rows of K and V that lie outside it. Token p has one place, p modulo R, in its KV head.

    Args:
        hot_keys, hot_values: [N, Hkv, R, D] in K's dtype, N at least B.
        hot_tokens: [N, Hkv, R] int32, the token whose row a place holds; -1: none.
        hot_claims: [N, Hkv, R] int32, -1 between calls: which token gets a place, decided anew by each.
    """

    hot_keys: Tensor
    hot_values: Tensor
    hot_tokens: Tensor
    hot_claims: Tensor


class Paging(NamedTuple):
    """Where the tokens of each sequence are.

    Args:
        page_table: [B, M] int32, physical page of each logical page; M * S at most 2**29.
        seq_lens: [B] int32, tokens, this step's included; below 0 counts as 0, beyond M * S as M * S.
    """

    page_table: Tensor
    seq_lens: Tensor


class Shadow(NamedTuple):
    """The 4-bit copy of K, of which `k_center` is taken off: attention weights do not change when every key moves by the same vector,
    and what is left spans a smaller range.

    Args:
        k_quant: [P, Hkv, S * D / 2] uint8, two codes a byte, low nibble first, channels in `channel_order`. The leading
            `prefix_channels[h]` channels of all S tokens come first (token-major), then the other channels (token-major).
        k_scale: [P, Hkv, S, 2] bf16, (scale, zero).
        channel_order: [Hkv, D] int32, a permutation of 0..D-1 a head.
        prefix_channels: [Hkv] int32, multiples of 8 in 0..D.
        k_center: [Hkv, D] fp32, by channel of K, the same for all tokens of a sequence; None stands for zeros.
    """

    k_quant: Tensor
    k_scale: Tensor
    channel_order: Tensor
    prefix_channels: Tensor
    k_center: Tensor | None = None


class PageBounds(NamedTuple):
    """Element-wise bounds of each page's keys.

    Args:
        page_bounds: [P, Hkv, 2, D] (min, max) in K's dtype, or uint8 codes.
        bounds_scale: [P, Hkv, 2] bf16 (scale, zero), exactly with uint8 bounds: bound = code * scale + zero.
    """

    page_bounds: Tensor
    bounds_scale: Tensor | None = None


class PageMeans(NamedTuple):
    """4-bit means of each page's keys, less the shadow's centre: mean - k_center = code * scale + zero.

    Args:
        page_means: [P, Hkv, D / 2] uint8, two codes a byte, low nibble first, channels in the shadow's `channel_order`; in K's own order
            where `append_kv` was given no shadow.
        means_scale: [P, Hkv, 2] bf16 (scale, zero).
    """

    page_means: Tensor
    means_scale: Tensor


class Candidates(NamedTuple):
    """An ascending list of tokens or pages a KV head; without `indices` it stands for every token.

    Args:
        indices: [B, Hkv, C] int32, ascending and unique, -1 pads.
        counts: [B, Hkv] int32.
        tokens_per_index: 1 for tokens, page_size for pages.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None
    tokens_per_index: int = 1


class Budget(NamedTuple):
    """How many candidates a selector proposes: `max(token_budget, ceil(budget_fraction * seq_len))` tokens.

    Args:
        token_budget: tokens, >= 1; more than the page table holds means all of it.
        budget_fraction: of the live length, 0..1.
        head_token_budget: [Hkv] int32 tokens, overrides both; clamped to the list's capacity, below 0 counts as 0.
    """

    token_budget: int
    budget_fraction: float = 0.0
    head_token_budget: Tensor | None = None


class Pruning(NamedTuple):
    """The share of estimated attention weight to keep.

    Args:
        top_p: 0 < p <= 1; 1 prunes nothing.
        head_top_p: [B or 1, Hq or 1] fp32 on the device, instead of top_p; not checked without a synchronisation, so values outside
            (0, 1] act as the nearest end and NaN as 1.
    """

    top_p: float = 1.0
    head_top_p: Tensor | None = None

    @property
    def prunes(self) -> bool:
        return self.top_p < 1.0 or self.head_top_p is not None


class Always(NamedTuple):
    """Tokens that are always candidates and always kept: the first `sink_tokens` and the newest `max(recent_tokens, T)`; both >= 0."""

    sink_tokens: int = 0
    recent_tokens: int = 0


class PageLevel(NamedTuple):
    """Whose tokens are scored: of a sequence's pages the best `page_fraction`, and at least those that hold `min_scored_tokens`.

    Args:
        page_fraction: 0 < page_fraction <= 1; 1 is all of them, one level.
        min_scored_tokens: >= 0; sequences no longer than this have one level too.
    """

    page_fraction: float = 1.0
    min_scored_tokens: int = 0

    def applies(self, max_tokens: int) -> bool:
        """Whether a table of so many tokens can hold a sequence of which pages are left out."""
        return self.page_fraction < 1.0 and self.min_scored_tokens < max_tokens


class Policy(NamedTuple):
    """What a decode step decides by.

    Args:
        selector: "dense", "full", "quest", "page_mean", "shadow_prefix", "streaming" or "given".
        budget: of the selector.
        pruning: share of weight to keep.
        always: tokens that no decision leaves out.
        dense_below: tokens; sequences no longer than this attend to everything, decided on the device.
        level: of "shadow_prefix", the pages whose tokens are scored, see `select_tokens`.
    """

    selector: str
    budget: Budget = Budget(1)
    pruning: Pruning = Pruning()
    always: Always = Always()
    dense_below: int = 0
    level: PageLevel = PageLevel()

    @property
    def prunes(self) -> bool:
        return self.selector != "dense" and self.pruning.prunes


class Observation(NamedTuple):
    """What a decode step reports beside its result, written in place where given.

    Args:
        budget_counters: [Hkv, COUNTER_COLUMNS] int64, added to: calls, live tokens, I0, I1, captured mass, calls on the dense path
            (selector "dense", or seq_len <= dense_below) and histograms; `twilight_ops/capacity.py` names the columns.
        kept_indices, kept_counts: [B, Hkv, M * S], [B, Hkv] int32, the kept positions (ascending, -1 pads); for inspection, leave them
            None when speed matters.
    """

    budget_counters: Tensor | None = None
    kept_indices: Tensor | None = None
    kept_counts: Tensor | None = None
