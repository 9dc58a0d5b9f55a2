"""Triton kernels of twilight::estimate_weights: logits of the 4-bit shadow, then a normalising pass in place."""

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import Candidates, Paging, Shadow
from ..ops.estimate_weights import outputs
from ._launch import Launch, cdiv, next_power_of_2
from ._shadow_logits import shadow_logits
from ._tiles import estimated_weight, listed_slots, live_length, softmax_row, weight_row

NORMALISE = Launch(4096, 8, 1, "16 values a thread hide the latency of one read and one write")


@triton.jit
def normalise_kernel(
    weights,  # [B, T, Hq, capacity]: logits in, weights out
    peaks,  # [B * T * Hq, splits]
    sums,
    seq_lens,  # [B]
    counts,  # [B, Hkv] or None
    max_pages,
    capacity,
    splits,
    KV_HEADS: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    UNIT: tl.constexpr,
    LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B * T * Hq, chunks): turns one chunk of a row's logits into weights; slots behind the list become 0 unread."""
    out_row = tl.program_id(0)
    batch = out_row // (QUERY_TOKENS * KV_HEADS * GROUP)
    row = batch * KV_HEADS + out_row % (KV_HEADS * GROUP) // GROUP
    length = live_length(seq_lens, batch, max_pages, PAGE)
    slots = listed_slots(counts, row, length, capacity, UNIT, LISTED)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = weights + out_row.to(tl.int64) * capacity + slot
    weight = tl.zeros([BLOCK], tl.float32)
    if tl.program_id(1) * BLOCK < slots:
        _, safe, scale = weight_row(softmax_row(peaks, sums, out_row, (slots + CHUNK - 1) // CHUNK, splits, SPLITS_PAD))
        logit = tl.load(at, mask=slot < slots, other=-float("inf"))
        weight = estimated_weight(logit, safe, scale)
    tl.store(at, weight, mask=slot < capacity)


def estimate_weights(
    q: Tensor, shadow: Shadow, paging: Paging, candidates: Candidates, sm_scale: float, softcap: float | None = None
) -> Tensor:
    weights = outputs(q, shadow, paging, candidates)
    peaks, sums, chunk = shadow_logits(q, shadow, paging, candidates, sm_scale, weights, prefix=False, dense_below=-1, softcap=softcap)
    batch, query_tokens, heads, capacity = weights.shape
    kv_heads, page_size = shadow.k_scale.shape[1:3]
    if weights.numel():
        normalise_kernel[(batch * query_tokens * heads, cdiv(capacity, NORMALISE.block))](
            weights,
            peaks,
            sums,
            paging.seq_lens,
            candidates.counts,
            paging.page_table.shape[1],
            capacity,
            peaks.shape[1],
            KV_HEADS=kv_heads,
            QUERY_TOKENS=query_tokens,
            GROUP=heads // kv_heads,
            PAGE=page_size,
            UNIT=candidates.tokens_per_index,
            LISTED=candidates.indices is not None,
            CHUNK=chunk,
            SPLITS_PAD=next_power_of_2(peaks.shape[1]),
            BLOCK=NORMALISE.block,
            **NORMALISE.options,
        )
    return weights
