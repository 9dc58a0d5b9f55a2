"""twilight::decode_attention_hot as Triton stages: kept tokens claim places, attention reads copies and fills claimed places."""

import triton
import triton.language as tl
from torch import Tensor

from .. import capacity
from ..arguments import KV, Candidates, HotRows, Observation, PageBounds, PageMeans, Paging, Policy, Shadow
from ..ops.decode_attention import outputs
from ._launch import cdiv
from ._tiles import listed_slots, live_length, slot_tokens
from .attend_sparse import run_attend
from .decode_attention import decide

BLOCK = 512
HELD = tl.constexpr(capacity.HELD)


@triton.jit
def claim_kernel(
    seq_lens,  # [B]
    indices,  # [B, Hkv, stride]
    counts,  # [B, Hkv]
    hot_tokens,  # [N, Hkv, R]
    hot_claims,
    hot_rows,
    max_pages,
    slots_most,
    dense_below,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * Hkv, blocks of slots): the largest claim gets a place, and what is read there stays."""
    row = tl.program_id(0)
    length = live_length(seq_lens, row // KV_HEADS, max_pages, PAGE)
    slots = listed_slots(counts, row, length, slots_most, UNIT, True)
    start = tl.program_id(1) * BLOCK
    if (length > dense_below) & (start < slots):
        slot = start + tl.arange(0, BLOCK)
        token = slot_tokens(indices, row, slot, slot < slots, slots_most, UNIT, True)
        live = (token >= 0) & (token < length)
        copy = row.to(tl.int64) * hot_rows + tl.where(live, token, 0) % hot_rows
        held = tl.load(hot_tokens + copy, mask=live, other=-1) == token
        tl.atomic_max(hot_claims + copy, tl.where(held, HELD, token), mask=live, sem="relaxed")


@triton.jit
def settle_kernel(hot_tokens, hot_claims, places, BLOCK: tl.constexpr):
    """Grid (blocks of places): what was claimed is there now."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < places
    claim = tl.load(hot_claims + place, mask=inside, other=-1)
    tl.store(hot_tokens + place, claim, mask=(claim >= 0) & (claim < HELD))
    tl.store(hot_claims + place, -1, mask=inside)


def decode_attention_hot(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    hot: HotRows,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    candidates: Candidates,
    observe: Observation,
    means: PageMeans | None,
    out: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    attended, lse = outputs(q, out)
    candidates, dense_below = decide(q, kv, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, softcap)
    batch = q.shape[0]
    _, kv_heads, page_size, _ = kv.k_cache.shape
    indices, counts, unit = candidates
    if indices is not None and indices.numel():
        slots = indices.shape[2] * unit
        claim_kernel[(batch * kv_heads, cdiv(slots, BLOCK))](
            paging.seq_lens,
            indices,
            counts,
            hot.hot_tokens,
            hot.hot_claims,
            hot.hot_tokens.shape[2],
            paging.page_table.shape[1],
            slots,
            dense_below,
            KV_HEADS=kv_heads,
            PAGE=page_size,
            UNIT=unit,
            BLOCK=BLOCK,
            num_warps=4,
        )
    run_attend(q, kv, paging, candidates, sm_scale, attended if out is None else out, lse, dense_below, hot, softcap=softcap)
    places = batch * kv_heads * hot.hot_tokens.shape[2]
    if places:
        settle_kernel[(cdiv(places, BLOCK),)](hot.hot_tokens, hot.hot_claims, places, BLOCK=BLOCK, num_warps=4)
    return attended, lse
