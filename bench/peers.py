"""Dense attention that PyTorch offers for a decode step: what sparse attention has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# q [B, T, Hq, D], k and v [B, Hkv, L, D] contiguous, sm_scale -> out [B, T, Hq, D]; T = 1, so nothing is masked.
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """One dense implementation and the devices it is a fair peer on."""

    name: str
    devices: tuple[str, ...]
    attend: Attention


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """The way a model calls it."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=sm_scale, enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """The group's heads as query rows of their KV head, so that K and V are read once a group."""
    batch, tokens, heads, dim = q.shape
    rows = q.view(batch, k.shape[1], -1, dim)  # [B, Hkv, G, D]: a view, because T = 1
    return scaled_dot_product_attention(rows, k, v, scale=sm_scale).view(batch, tokens, heads, dim)


PEERS = (
    Peer("sdpa_gqa", ("cpu", "cuda"), sdpa_gqa),
    Peer("sdpa_folded", ("cpu", "cuda"), sdpa_folded),
)


def peers_on(device: str) -> list[Peer]:
    return [peer for peer in PEERS if device in peer.devices]
