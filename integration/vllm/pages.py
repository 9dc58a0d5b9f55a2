"""What a block of vLLM's cache holds for us, and where: K, V, the shadow and the page bounds of its tokens, one page of ours a block.

vLLM counts a block as `token_bytes` for each token and KV head, so its scheduler, prefix cache and sharing cover all of them. In a layer's
buffer each tensor is one contiguous region with a row a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from twilight_ops._settings import refuse
from twilight_ops.layer import LayerPlan, PagedKVLayer, allocate_layer

ALIGNMENT = 128  # bytes: kernels read whole lines


def token_bytes(plans: Iterable[LayerPlan], num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that a token takes for each KV head in the layer that needs most of them, a multiple of the dtype's size.

    Dense layers take as many: vLLM's blocks are alike in all layers.
    """
    largest = 0
    for plan in plans:
        page_bytes = 0

        def count(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
            nonlocal page_bytes
            page_bytes += math.prod(shape) * dtype.itemsize
            return torch.empty(shape, dtype=dtype, device="meta")

        # A calibration is read as of any shard: its bytes are the same in all.
        allocate_layer(plan, 1, num_qo_heads, num_kv_heads, head_dim, page_size, dtype, torch.device("meta"), shard=0, new_pages=count)
        largest = max(largest, page_bytes)
    unit = num_kv_heads * page_size * dtype.itemsize
    return -(-largest // unit) * dtype.itemsize


def carve_layer(
    plan: LayerPlan, kv_cache: Tensor, num_qo_heads: int, head_dim: int, index: int = 0, shard: int | None = None
) -> PagedKVLayer:
    """A layer whose pages are regions of vLLM's buffer.

    Args:
        plan: the layer's settings.
        kv_cache: [P, Hkv, S, C] of K's dtype, contiguous, C * itemsize at least `token_bytes`.
        index: of the layer in the model.
        shard: which part of the model's KV heads these are.

    Raises:
        ValueError: another layout, or a selector whose tensors are not part of the pages.
    """
    num_pages, num_kv_heads, page_size, _ = kv_cache.shape
    if not kv_cache.is_contiguous():
        refuse("vLLM", "kv_cache", "one contiguous buffer a layer", f"strides {list(kv_cache.stride())}")
    raw = kv_cache.view(-1).view(torch.uint8)
    used = 0

    def region(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        nonlocal used
        start = -(-used // ALIGNMENT) * ALIGNMENT
        used = start + math.prod(shape) * dtype.itemsize
        if used > raw.numel():
            refuse("vLLM", "kv_cache", f"at least {used} bytes for {num_pages} blocks", raw.numel())
        return raw[start:used].view(dtype).view(shape)

    layer = allocate_layer(
        plan,
        num_pages,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        kv_cache.dtype,
        kv_cache.device,
        index=index,
        shard=shard,
        new_pages=region,
    )
    ours = raw.untyped_storage().data_ptr()
    bounds = [tensor for tensor in layer.bounds or () if tensor is not None]
    if layer.selector_state or any(tensor.untyped_storage().data_ptr() != ours for tensor in bounds):
        refuse("vLLM", "selector", "one that keeps all its tensors in the pages", plan.selector)
    return layer
