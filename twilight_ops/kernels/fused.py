"""The native Hopper kernels: which calls they serve, and how many blocks share one (sequence, KV head)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capacity import page_capacity, token_capacity

MODULE = "twilight_ops._C_cuda"
SELECTORS = ("dense", "full", "quest", "shadow_prefix")
HEAD_DIMS = (64, 128)
MAX_ROWS = 8  # query tokens times group size: the columns of one tensor-core product
MAX_CACHE_ROWS = 2**32  # page_size rows a page and KV head, numbered in 32 bits; so are the 32-bit words of k_quant
SHARED_LIMIT = 227 * 1024  # bytes a block, on sm_90
CLUSTER_SIZES = (1, 2, 4, 8, 16)

# Bytes of FusedShared by (head_dim, padded rows); csrc/fused_layout.cuh asserts the same numbers.
FIXED_BYTES = {(64, 1): 3984, (64, 4): 7104, (64, 8): 11280, (128, 1): 5008, (128, 4): 10432, (128, 8): 17680}


@dataclass(frozen=True)
class ClusterRule:
    """How many blocks share one (sequence, KV head).

    Where the (sequence, KV head) pairs alone do not give every multiprocessor a block, as many as do, up to LARGEST_FILL, but no share
    shorter than `least_tokens`. Otherwise so many that no share of the tokens (of Quest: of the candidates) is longer than `share_tokens`,
    or than `short_share_tokens` where several waves of rows have no more than SHORT_TOKENS. More where shared memory asks for it.
    """

    share_tokens: int
    least_tokens: int
    reason: str
    short_share_tokens: int = 2**30


# Below this many blocks some multiprocessors idle; an H200 has 132, and a grid of no more has one for every block.
FILL_BLOCKS = 128
MULTIPROCESSORS = 132
# A cluster of sixteen asks for a whole cluster of the chip and a launch that waits for one. 32/8 B 1, microseconds of eight and of sixteen:
# dense L 32k 38 and 49, L 128k 129 and 174; Quest L 128k 40 and 66.
LARGEST_FILL = 8
# Rows so short that the last wave of blocks is much of the time.
SHORT_TOKENS = 2048

# H200, bf16, D 128, microseconds a layer by cluster size; 32/8 heads are groups of four, 32/32 of one. Shares shorter than 4096 tokens
# are barriers around nothing: 32/8 B 8 L 8k (Quest) one 37, two 33, four 52.
CLUSTER_RULES = {
    ("shadow_prefix", False): ClusterRule(16384, 4096, "32/32 B 16 L 32k: one block 453, two 360"),
    ("shadow_prefix", True): ClusterRule(
        8192, 4096, "32/8 L 32k, B 64: two 614, four 565; B 8: two 82, four 113; B 1: eight 39, sixteen 38"
    ),
    ("quest", False): ClusterRule(8192, 4096, "32/32 B 16 L 32k: one block 196, two 241"),
    ("quest", True): ClusterRule(
        4096,
        4096,
        "32/8 L 32k, 8192 candidates, B 64: one 503, two 310, four 403; B 16: one 144, two 93, four 132; B 8: two 62, four 82; B 1: eight "
        "33, sixteen 34; L 128k with as many, B 8: two 91, four 117, eight 132; B 64 L 8k with 2048: one 93, two 138",
    ),
    ("full", False): ClusterRule(16384, 4096, "as quest: its estimates are what full makes of every token"),
    ("full", True): ClusterRule(8192, 4096, "shared memory holds 9k tokens of four rows in half a multiprocessor"),
    ("dense", False): ClusterRule(2**30, 1024, "as groups of four", 512),
    ("dense", True): ClusterRule(
        2**30, 128, "B 64 L 1k: one 77.8, two 75.2; L 32k: one 1878, two 1904; B 1 L 8k: eight 14.8, sixteen 16.7; L 1k: eight 6.4", 512
    ),
}


def padded_rows(rows: int) -> int:
    """Query rows a kernel was compiled for."""
    return 1 if rows == 1 else 4 if rows <= 4 else 8


def _round_up(items: int, size: int) -> int:
    return -(-items // size) * size


def shared_bytes(
    selector: str,
    prunes: bool,
    head_dim: int,
    rows: int,
    page_size: int,
    max_pages: int,
    capacity: int,
    dense_below: int,
    cluster_size: int,
    evens_out: bool,
) -> int:
    """Shared memory of one block: the twin of `lay_out` in csrc/fused_layout.cuh."""
    rows = padded_rows(rows)
    max_tokens = max_pages * page_size
    by_page, by_token = selector == "quest", selector == "shadow_prefix"

    own_tokens = _round_up(-(-max_tokens // cluster_size), 128)
    own_pages = _round_up(-(-max_pages // cluster_size), 16)
    own_items = own_pages if by_page else own_tokens if by_token else 0
    own_candidates = -(-capacity // cluster_size) if evens_out else min(own_items, capacity)
    own_candidates = own_candidates if by_page or by_token else 0
    slots = own_candidates * page_size if by_page else own_candidates if by_token else own_tokens
    slots = _round_up(slots, 4) if prunes else 0
    candidate_tokens = capacity * page_size if by_page else capacity if by_token else max_tokens
    list_capacity = 4096 if rows > 1 and candidate_tokens > 8192 else 2048
    parts = (
        max(8192 + list_capacity * 4, 8 * rows * head_dim * 4),  # scratch
        own_pages * 4 if by_page else own_tokens // 16 * 4 if by_token else 0,  # pages or tiles
        (own_tokens // page_size if selector == "full" else own_candidates) * 8,  # candidates
        max(-(-own_items // 32), -(-slots // 32), 128) * 2 * 4,  # bitmaps
        max(own_items * (-(-rows // 2) if by_token else rows), slots * rows) * 4,  # scores and estimates
    )
    scratch = _round_up(FIXED_BYTES[head_dim, rows], 128)
    end = scratch
    for part in parts:
        end = _round_up(end, 16) + part
    if dense_below > 0 or not (by_page or by_token or prunes):
        end = max(end, scratch + 3 * 8 * 16 * head_dim * 2)  # streamed pages
    return end


@functools.cache
def available() -> bool:
    """Whether the extension was built and loads here, on a Hopper GPU."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or importlib.util.find_spec(MODULE) is None:
        return False
    importlib.import_module(MODULE)
    return True


@functools.lru_cache(maxsize=4096)
def cluster_size(
    units: int,
    selector: str,
    prunes: bool,
    head_dim: int,
    rows: int,
    page_size: int,
    max_pages: int,
    capacity: int,
    dense_below: int,
) -> int:
    """Blocks a (sequence, KV head); 0 where even the largest cluster's shared memory does not hold the selection."""
    max_tokens = max_pages * page_size
    rule = CLUSTER_RULES[selector, rows > 1]

    def fits(size: int) -> bool:
        geometry = (selector, prunes, head_dim, rows, page_size, max_pages, capacity, dense_below, size)
        return any(shared_bytes(*geometry, evens_out) <= SHARED_LIMIT for evens_out in {True, units * size > MULTIPROCESSORS})

    size = 1
    if units < FILL_BLOCKS:
        while size < LARGEST_FILL and units * size < FILL_BLOCKS and max_tokens // size > rule.least_tokens:
            size *= 2
    else:
        short = max_tokens <= SHORT_TOKENS and units > MULTIPROCESSORS
        share_tokens = rule.short_share_tokens if short else rule.share_tokens
        shared_tokens = capacity * page_size if selector == "quest" else max_tokens
        while size < CLUSTER_SIZES[-1] and -(-shared_tokens // size) > share_tokens:
            size *= 2
    return next((c for c in CLUSTER_SIZES if c >= size and fits(c)), 0)


def fused_supports(
    q: Tensor,
    k_cache: Tensor,
    page_bounds: Tensor | None,
    page_table: Tensor,
    selector: str,
    token_budget: int,
    budget_fraction: float,
    top_p: float,
    dense_below: int,
    sink_tokens: int,
    recent_tokens: int,
    top_p_per_head: Tensor | None,
) -> int:
    """The cluster size with which `_fused_decode_attention` serves a checked call, or 0 where it does not."""
    batch, query_tokens, heads, head_dim = q.shape
    num_pages, kv_heads, page_size, _ = k_cache.shape
    rows = query_tokens * heads // kv_heads
    max_pages = page_table.shape[1]
    if (
        not available()
        or selector not in SELECTORS
        or head_dim not in HEAD_DIMS
        or rows > MAX_ROWS
        or q.dtype not in (torch.bfloat16, torch.float16)
        or (selector == "quest" and page_bounds.dtype != torch.uint8)
        or num_pages * kv_heads * page_size * (head_dim // 8) >= MAX_CACHE_ROWS
        or max_pages == 0
    ):
        return 0
    if max_pages * page_size <= dense_below:  # no row is long enough for anything else, as csrc/decode_attention.cu has it
        selector = "dense"
    capacity = page_capacity if selector == "quest" else token_capacity
    items = capacity(max_pages, page_size, query_tokens, token_budget, budget_fraction, sink_tokens, recent_tokens)
    prunes = selector != "dense" and (top_p < 1.0 or top_p_per_head is not None)
    return cluster_size(batch * kv_heads, selector, prunes, head_dim, rows, page_size, max_pages, items, dense_below)
