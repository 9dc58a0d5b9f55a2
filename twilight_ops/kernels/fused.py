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

# Bytes of FusedShared by (head_dim, padded rows); csrc/decode_attention.cuh asserts the same numbers.
FIXED_BYTES = {(64, 1): 4832, (64, 4): 7584, (64, 8): 11296, (128, 1): 5856, (128, 4): 10912, (128, 8): 17696}


@dataclass(frozen=True)
class ClusterRule:
    """How many blocks share one (sequence, KV head).

    Where one block a multiprocessor takes the whole grid, as many as fill the chip, but no share shorter than `least_tokens`. Otherwise
    so many that no share is longer than `share_tokens`.
    """

    share_tokens: int
    least_tokens: int
    reason: str


# Below this many blocks some multiprocessors idle; an H200 has 132, and a grid of no more has one for every block.
FILL_BLOCKS = 128
MULTIPROCESSORS = 132

# H200, bf16, D 128, microseconds a layer by cluster size; 32/8 heads are groups of four, 32/32 of one. Shares shorter than 4096 tokens
# are barriers around nothing: 32/8 B 1 L 8k eight blocks 32, sixteen 39; B 8 L 8k one 51, two 39, four 65.
CLUSTER_RULES = {
    ("shadow_prefix", False): ClusterRule(16384, 4096, "32/32 B 16 L 32k: one block 527, two 401"),
    ("shadow_prefix", True): ClusterRule(
        8192, 4096, "32/8 L 32k, B 64: two 675, four 614; B 8: two 89, four 124; B 1: eight 43, sixteen 45"
    ),
    ("quest", False): ClusterRule(32768, 4096, "32/32 B 16 L 32k: one block 217, two 272"),
    ("quest", True): ClusterRule(
        16384, 4096, "32/8 L 32k, B 64: one 570, two 369, four 446; B 8: two 71, four 92; B 1: eight 38, sixteen 42"
    ),
    ("full", False): ClusterRule(16384, 4096, "as quest: its estimates are what full makes of every token"),
    ("full", True): ClusterRule(8192, 4096, "shared memory holds 9k tokens of four rows in half a multiprocessor"),
    ("dense", False): ClusterRule(2**30, 128, "nothing is kept a token"),
    ("dense", True): ClusterRule(2**30, 128, "L 1k, B 1: two blocks 12, four 9, eight 8; B 8: one 20, two 16, four 23"),
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
    """Shared memory of one block: the twin of `lay_out` in csrc/decode_attention.cu."""
    rows = padded_rows(rows)
    max_tokens = max_pages * page_size
    by_page, by_token = selector == "quest", selector == "shadow_prefix"

    def own(tokens: int) -> int:
        return _round_up(-(-tokens // cluster_size), 128)

    own_pages = _round_up(-(-max_pages // cluster_size), 16)
    own_items = own_pages if by_page else own(max_tokens) if by_token else 0
    own_candidates = -(-capacity // cluster_size) if evens_out else min(own_items, capacity)
    own_candidates = own_candidates if by_page or by_token else 0
    slots = own_candidates * page_size if by_page else own_candidates if by_token else own(max_tokens)
    slots = _round_up(slots, 4) if prunes else 0
    listed_tokens = min(max_tokens, dense_below) if by_page or by_token else max_tokens
    parts = (
        max(8192 + 8192, 8 * rows * head_dim * 4),  # scratch
        (own_pages if by_page else own(max_tokens) // page_size if by_token else 0) * 4,  # pages
        max(own_candidates, own(listed_tokens) // page_size) * 8,  # candidates
        max(-(-own_items // 32), -(-slots // 32), 128) * 2 * 4,  # bitmaps
        max(own_items * (-(-rows // 2) if by_token else rows), slots * rows) * 4,  # scores and estimates
    )
    end = FIXED_BYTES[head_dim, rows]
    for part in parts:
        end = _round_up(end, 16) + part
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
        evens_out = units * size > MULTIPROCESSORS
        needed = shared_bytes(selector, prunes, head_dim, rows, page_size, max_pages, capacity, dense_below, size, evens_out)
        return needed <= SHARED_LIMIT

    size = 1
    while size < CLUSTER_SIZES[-1] and units * size < FILL_BLOCKS and max_tokens // size > rule.least_tokens:
        size *= 2
    if units * size > MULTIPROCESSORS:
        while size < CLUSTER_SIZES[-1] and -(-max_tokens // size) > rule.share_tokens:
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
