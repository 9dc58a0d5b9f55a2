"""Reading paged tensors, for the references only: clear, not fast."""

import torch
from torch import Tensor

from ..arguments import Candidates


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 in, fp64 arithmetic (the oracle); anything else is computed in fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def gather_tokens(pages: Tensor, page_table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of `pages` [P, Hkv, S, X] at positions `tokens` [B, Hkv, N] -> [B, Hkv, N, X]; bad positions read some valid row."""
    num_pages, kv_heads, page_size, _ = pages.shape
    max_tokens = page_table.shape[1] * page_size
    tokens = tokens.clamp(0, max(max_tokens - 1, 0)).long()
    batch = torch.arange(tokens.shape[0], device=tokens.device)[:, None, None]
    heads = torch.arange(kv_heads, device=tokens.device)[None, :, None]
    physical = page_table.long()[batch, tokens // page_size].clamp(0, num_pages - 1)
    return pages[physical, heads, tokens % page_size]


def all_tokens(page_table: Tensor, kv_heads: int, page_size: int) -> Tensor:
    """Positions 0 .. M * S - 1 as a candidate list [B, Hkv, M * S]."""
    batch, max_pages = page_table.shape
    return torch.arange(max_pages * page_size, device=page_table.device).expand(batch, kv_heads, -1)


def candidate_tokens(candidates: Candidates, every_token: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, Hkv, N] of the candidate slots and whether each slot is live."""
    indices, counts, tokens_per_index = candidates
    if indices is None or counts is None:
        tokens = every_token
        listed = torch.ones_like(tokens, dtype=torch.bool)
    else:
        slots = torch.arange(indices.shape[2], device=indices.device)
        listed = (slots < counts[..., None]).repeat_interleave(tokens_per_index, dim=-1)
        offsets = torch.arange(tokens_per_index, device=indices.device)
        tokens = (indices.long()[..., None] * tokens_per_index + offsets).flatten(-2)
    live = listed & (tokens >= 0) & (tokens < seq_lens[:, None, None])
    return tokens, live


def visible(tokens: Tensor, live: Tensor, seq_lens: Tensor, query_tokens: int) -> Tensor:
    """[B, T, Hkv, N]: live, and not newer than query token t, which stands at seq_lens - T + t."""
    t = torch.arange(query_tokens, device=tokens.device)
    horizon = seq_lens[:, None] - query_tokens + t  # [B, T]
    return live[:, None] & (tokens[:, None] <= horizon[:, :, None, None])


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def shadow_byte_index(prefix_channels: Tensor, page_size: int, head_dim: int) -> Tensor:
    """[Hkv, S, D]: byte of a page block that holds ordered channel j of token s (low nibble for even j)."""
    r = prefix_channels.long()[:, None, None]
    s = torch.arange(page_size, device=prefix_channels.device)[None, :, None]
    j = torch.arange(head_dim, device=prefix_channels.device)[None, None, :]
    prefix = s * (r // 2) + j // 2
    tail = page_size * r // 2 + s * ((head_dim - r) // 2) + (j - r) // 2
    return torch.where(j < r, prefix, tail)


def unpack_shadow(k_quant: Tensor, prefix_channels: Tensor, page_size: int) -> Tensor:
    """Codes [P, Hkv, S, D] uint8, channels in channel_order."""
    head_dim = k_quant.shape[2] * 2 // page_size
    index = shadow_byte_index(prefix_channels, page_size, head_dim)
    byte = k_quant.gather(2, index.flatten(1).expand(k_quant.shape[0], -1, -1)).view(-1, *index.shape)
    odd = torch.arange(head_dim, device=k_quant.device) % 2 == 1
    return torch.where(odd, byte >> 4, byte & 15)


def unpack_means(page_means: Tensor) -> Tensor:
    """Codes [P, Hkv, D] uint8, channels as they are stored."""
    return torch.stack([page_means & 15, page_means >> 4], dim=-1).flatten(-2)


def pack_codes(codes: Tensor) -> Tensor:
    """Two codes a byte, the even channel in the low nibble."""
    return (codes[..., ::2] | (codes[..., 1::2] << 4)).to(torch.uint8)


def pack_shadow(codes: Tensor, prefix_channels: Tensor) -> Tensor:
    """Inverse of `unpack_shadow`: codes [P, Hkv, S, D] (ordered channels) -> [P, Hkv, S * D / 2] uint8."""
    pages, kv_heads, page_size, head_dim = codes.shape
    index = shadow_byte_index(prefix_channels, page_size, head_dim)[..., ::2]
    byte = pack_codes(codes)
    packed = torch.zeros(pages, kv_heads, page_size * head_dim // 2, dtype=torch.uint8, device=codes.device)
    return packed.scatter_(2, index.flatten(1).expand(pages, -1, -1), byte.flatten(2))


def dequantise(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale + zero, with scale [..., 2] = (scale, zero)."""
    return codes.to(dtype) * scale[..., :1].to(dtype) + scale[..., 1:].to(dtype)


def quantise(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Asymmetric codes over the last dimension, with the rounded scale and zero: (codes uint8, scale [..., 2] bf16)."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = low.bfloat16()
    # A tensor divisor: PyTorch on CUDA multiplies by the reciprocal of a number, which rounds differently.
    scale = ((high - low) / torch.full_like(high, levels)).bfloat16()
    steps = (x - zero.float()) / scale.float()
    codes = torch.where(scale.float() > 0, steps, torch.zeros_like(steps)).nan_to_num(0.0, float(levels), 0.0)
    return codes.round().clamp(0, levels).to(torch.uint8), torch.cat([scale, zero], dim=-1)
