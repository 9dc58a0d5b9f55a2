"""The native Hopper kernels: which calls they serve, and how many blocks share one (sequence, KV head)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native_modules
from ..capacity import page_capacity, token_capacity

SELECTORS = ("dense", "full", "quest", "shadow_prefix")
HEAD_DIMS = (64, 128)
MAX_ROWS = 8  # query tokens times group size: the columns of one tensor-core product
MAX_CACHE_ROWS = 2**32  # page_size rows a page and KV head, numbered in 32 bits; so are the 32-bit words of k_quant
SHARED_LIMIT = 227 * 1024  # bytes a block, on sm_90
CLUSTER_SIZES = (1, 2, 4, 8, 16)

# Bytes of FusedShared by (head_dim, padded rows); csrc/sm90/kernel.cuh asserts the same numbers.
FIXED_BYTES = {(64, 1): 4064, (64, 4): 7152, (64, 8): 11264, (128, 1): 5088, (128, 4): 10480, (128, 8): 17664}


@dataclass(frozen=True)
class ClusterRule:
    """How many blocks share one (sequence, KV head), see `cluster_size`.

    Args:
        least_tokens: no share is made shorter than this to fill the chip.
        share_tokens: no share of the tokens (of Quest: of the candidates) stays longer than this.
    """

    share_tokens: int
    least_tokens: int
    reason: str


MULTIPROCESSORS = 132  # of an H200
# With fewer blocks some multiprocessors idle.
FILL_BLOCKS = 128
# Reading everything takes no more blocks than this, and clusters lie within groups of 14 to 18 multiprocessors, where some then hold two
# blocks and others none. Pairs always fit. 32/8 L 32k, dense, microseconds by cluster size: B 1 four 67, eight 39, sixteen 49; B 2 four 70,
# eight 78; B 4 two 131, four 156; B 8 one 253, two 241, four 254.
DENSE_FILL_BLOCKS = 64
# A cluster of sixteen waits for a whole group of multiprocessors. 32/8 L 32k, microseconds of eight and of sixteen: Quest B 1 33 and 34,
# B 2 37 and 64; with four KV heads dense 37 and 28, Quest 33 and 31, shadow prefix 38 and 35.
LARGEST_FILL = 8
FEW_UNITS = 4

# H200, bf16, D 128, microseconds a layer by cluster size; 32/8 heads are groups of four, 32/32 of one. An eighth above powers of two, so
# that a context and what is generated after it share alike.
CLUSTER_RULES = {
    ("shadow_prefix", False): ClusterRule(
        18432, 2048, "32/32 L 32k, B 16: one block 453, two 360; B 2: one 110, two 70, four 92; B 1: two 66, four 54"
    ),
    ("shadow_prefix", True): ClusterRule(
        9216,
        2048,
        "32/8 L 32k, B 64: two 614, four 565; B 16: two 159, four 176; B 8: two 82, four 113; B 4: two 78, four 67, eight 80; B 2: four "
        "54, eight 45; B 1: eight 39, sixteen 38; L 128k, eight and sixteen, B 16: 787 and 723, B 8: 429 and 379, B 4: 258 and 217, B 1: "
        "86 and 77; L 8k, B 4: two 37, four 34, eight 58; B 2: two 36, four 30, eight 30",
    ),
    ("quest", False): ClusterRule(
        9216, 2048, "32/32 L 32k, B 16: one block 196, two 241; B 2: one 68, two 50, four 74; B 1: two 48, four 44, eight 66"
    ),
    ("quest", True): ClusterRule(
        4608,
        2048,
        "32/8 L 32k, 8192 candidates, B 64: one 503, two 310, four 403; B 16: one 144, two 93, four 132; B 8: two 62, four 82; B 4: two "
        "57, four 46, eight 64; B 2: four 40, eight 37; L 128k with as many, B 64: one 739, two 540, four 597; B 8: two 91, four 117, "
        "eight 132; B 4: two 82, four 63, eight 83; L 8k with 2048, B 64: one 93, two 138; B 8: one 37, two 33, four 52; B 4: two 32, "
        "four 31; B 2: two 31, four 27, eight 28",
    ),
    ("full", False): ClusterRule(18432, 4096, "as quest: its estimates are what full makes of every token"),
    ("full", True): ClusterRule(9216, 4096, "shared memory holds 9k tokens of four rows in half a multiprocessor"),
    ("dense", False): ClusterRule(2**30, 128, "32/32 L 1k, B 16: one 66.9, two 70.5; B 8: one 34.8, two 37.8; B 1: one 11.8, two 9.6"),
    ("dense", True): ClusterRule(
        2**30, 128, "B 64 L 1k: one 70.3, two 75.6; L 32k: one 1878, two 1904; B 1 L 8k: eight 14.8, sixteen 16.7; L 1k: eight 6.4"
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
    """Shared memory of one block: the twin of `lay_out` in csrc/sm90/params.cuh."""
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
        max(-(-own_items // 32), 128) * 2 * 4,  # bitmaps
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
def is_hopper() -> bool:
    """Whether the current CUDA device is what the kernels are compiled for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@functools.cache
def unavailable() -> str:
    """Why the fused kernels do not serve here, "" where they do."""
    if not native_modules.is_built(native_modules.CUDA_MODULE):
        return native_modules.why_not_built(native_modules.CUDA_MODULE)
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if not is_hopper():
        return "was built for sm_90, this GPU is sm_{}{}".format(*torch.cuda.get_device_capability())
    return native_modules.load(native_modules.CUDA_MODULE)


def available() -> bool:
    """Whether the module was built and loads here, on a Hopper GPU."""
    return not unavailable()


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
    """Blocks a (sequence, KV head): as many as fill the chip and shared memory asks for, then so many that no share is too long.

    0 where even the largest cluster's shared memory does not hold the selection.
    """
    max_tokens = max_pages * page_size
    rule = CLUSTER_RULES[selector, rows > 1]

    def fits(size: int) -> bool:
        geometry = (selector, prunes, head_dim, rows, page_size, max_pages, capacity, dense_below, size)
        return any(shared_bytes(*geometry, evens_out) <= SHARED_LIMIT for evens_out in {True, units * size > MULTIPROCESSORS})

    def leaves_idle(size: int) -> bool:
        if selector == "dense":
            return units * size < DENSE_FILL_BLOCKS or (size == 1 and 2 * units <= FILL_BLOCKS)
        return units * size < FILL_BLOCKS and (size < LARGEST_FILL or units <= FEW_UNITS)

    size = 1
    while size < CLUSTER_SIZES[-1] and leaves_idle(size) and max_tokens // size > rule.least_tokens:
        size *= 2
    size = next((c for c in CLUSTER_SIZES if c >= size and fits(c)), 0)
    # One wave of pairs that fills the chip, or two, take longer shares rather than more waves.
    whole_waves = size == 2 and any(waves * FILL_BLOCKS <= 2 * units <= waves * MULTIPROCESSORS for waves in (1, 2))
    if size == 0 or whole_waves:
        return size
    shared_tokens = capacity * page_size if selector == "quest" else max_tokens
    while size < CLUSTER_SIZES[-1] and -(-shared_tokens // size) > rule.share_tokens:
        size *= 2
    return size


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
    if max_pages * page_size <= dense_below:  # no row is long enough for anything else, as csrc/sm90/decode_attention.cu has it
        selector = "dense"
    capacity = page_capacity if selector == "quest" else token_capacity
    items = capacity(max_pages, page_size, query_tokens, token_budget, budget_fraction, sink_tokens, recent_tokens)
    prunes = selector != "dense" and (top_p < 1.0 or top_p_per_head is not None)
    return cluster_size(batch * kv_heads, selector, prunes, head_dim, rows, page_size, max_pages, items, dense_below)
