"""Exact attention of a prompt chunk to what is cached outside the device, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Of K and V on the device at once; 32 query heads of 128 channels in 16 bits take 256 MiB.
BLOCK_TOKENS = 16384

_ATEN = torch.ops.aten


def attend_streamed(q: Tensor, k: Tensor, v: Tensor, past: Iterable[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """softmax(scale * q . [past, k]) [past, v], causal among the chunk's own tokens.

    Args:
        q, k, v: [1, H, T, D] of the chunk, heads of K and V repeated.
        past: K and V of each block of tokens before it, [1, H, N, D].

    Returns:
        [1, H, T, D] in q's dtype.
    """
    out, lse = _with_lse(q, k, v, True, scale)
    out = out.float()
    for keys, values in past:
        part, part_lse = _with_lse(q, keys, values, False, scale)
        both = torch.logaddexp(lse, part_lse)
        out = out * torch.exp(lse - both)[..., None] + part.float() * torch.exp(part_lse - both)[..., None]
        lse = both
    return out.to(q.dtype)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention, [1, H, T, D], and its log-sum-exp, [1, H, T] fp32."""
    if q.is_cuda:
        return _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
