"""A block of vLLM's cache is a page here: what it holds (K, V, the shadow, bounds or means of pages), and which tokens of a batch go where.

A block is one range of bytes: KV head by head, and of each head all tensors of the page, one after another. vLLM counts it as `token_bytes`
for each token and KV head, so its scheduler, prefix cache, sharing, connectors and offloading cover all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from twilight_ops._settings import refuse
from twilight_ops.layer import LayerPlan, PagedKVLayer, allocate_layer
from twilight_ops.ops._checks import PAGE_ALIGNMENT

ALIGNMENT = 128  # bytes: kernels read whole lines


@dataclass
class Head:
    """Where the tensors of a page lie among the bytes of a KV head, in the order in which a layer asks for them."""

    used: int = 0  # bytes
    starts: list[int] = field(default_factory=list)

    def add(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """Takes the bytes of a tensor [P, Hkv, ..]; what has whole lines starts with one."""
        size = math.prod(shape[2:]) * dtype.itemsize
        unit = ALIGNMENT if size >= ALIGNMENT else PAGE_ALIGNMENT
        self.starts.append(-(-self.used // unit) * unit)
        self.used = self.starts[-1] + size
        return torch.empty(shape, dtype=dtype, device="meta")


def token_bytes(plans: Iterable[LayerPlan], num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that a token takes for each KV head in the layer that needs most of them, a multiple of the dtype's size.

    Dense layers take as many: vLLM's blocks are alike in all layers.
    """
    largest = 0
    for plan in plans:
        head = Head()
        # A calibration is read as of any shard: its bytes are the same in all.
        allocate_layer(plan, 1, num_qo_heads, num_kv_heads, head_dim, page_size, dtype, torch.device("meta"), shard=0, new_pages=head.add)
        largest = max(largest, head.used)
    unit = max(ALIGNMENT, page_size * dtype.itemsize)
    return -(-largest // unit) * unit // page_size


def carve_layer(
    plan: LayerPlan, kv_cache: Tensor, num_qo_heads: int, head_dim: int, index: int = 0, shard: int | None = None
) -> PagedKVLayer:
    """A layer whose pages are views of vLLM's blocks.

    Args:
        plan: the layer's settings.
        kv_cache: [P, Hkv, S, C] of K's dtype, contiguous in each head, C * itemsize at least `token_bytes`.
        index: of the layer in the model.
        shard: which part of the model's KV heads these are.

    Raises:
        ValueError: another layout, or a selector whose tensors are not part of the pages.
    """
    num_pages, num_kv_heads, page_size, elements = kv_cache.shape
    if kv_cache.stride()[2:] != (elements, 1):
        refuse("vLLM", "kv_cache", "heads of contiguous bytes", f"strides {list(kv_cache.stride())}")
    raw, room = kv_cache.view(torch.uint8), page_size * elements * kv_cache.itemsize
    head = Head()

    def view(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        inner = head.add(shape, dtype=dtype).stride()[2:]
        if head.used > room:
            refuse("vLLM", "kv_cache", f"at least {head.used} bytes a block and KV head", room)
        outer = (stride // dtype.itemsize for stride in raw.stride()[:2])
        return raw.view(dtype).as_strided(shape, (*outer, *inner), (raw.storage_offset() + head.starts[-1]) // dtype.itemsize)

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
        new_pages=view,
    )
    ours = raw.untyped_storage().data_ptr()
    pages = [tensor for group in (layer.bounds, layer.means) for tensor in group or () if tensor is not None]
    if layer.selector_state or any(tensor.untyped_storage().data_ptr() != ours for tensor in pages):
        refuse("vLLM", "selector", "one that keeps all its tensors in the pages", plan.selector)
    return layer


def split_rows(
    counts: np.ndarray, is_prefilling: Tensor | None, most_tokens: int, total_tokens: int, replays: bool = False
) -> tuple[int, int]:
    """How many of the first rows are decode steps, and the most tokens that one of them has.

    What a row is, the engine says and not its length: the last token of a prompt is a prompt. With drafts, the host knows no exact length
    of a decode row, so that short prompts before one run as decode steps too. So does what is left of a prompt in a batch whose rows are
    alike: vLLM asks for no more before it replays a full graph, which knows decode steps alone.

    Args:
        counts: tokens of each row; 0 is padding.
        is_prefilling: [B] bool on the host, or fewer, False for the others; None: no row is.
        most_tokens: of a decode row.
        total_tokens: in the batch; a graph's padding counts.
        replays: whether the engine has full graphs of decode steps.
    """
    if replays and len(counts) and _uniform(counts):
        is_prefilling = None
    decode = counts <= most_tokens
    short = _leading(decode)
    if is_prefilling is not None:
        prefilling = is_prefilling.numpy()[: len(counts)]
        decode[: len(prefilling)] &= ~prefilling
    decodes = _leading(decode)
    if most_tokens > 1:
        decodes = max(decodes, int(np.flatnonzero((decode & (counts > 0))[:short]).max(initial=-1)) + 1)
    query_tokens = int(counts[:decodes].max(initial=0))
    if query_tokens == 0:
        return 0, 0
    if _uniform(counts[:decodes]):
        decodes = min(decodes, total_tokens // query_tokens)
    return decodes, query_tokens


def _leading(rows: np.ndarray) -> int:
    """How many are True before the first that is not."""
    return len(rows) if rows.all() else int(rows.argmin())


def _uniform(counts: np.ndarray) -> bool:
    """Whether rows of one number of tokens come first, and padding after them."""
    return bool((np.diff(counts) <= 0).all() and np.isin(counts, (0, counts[0])).all())


def ragged_rows(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Decode rows of different numbers of tokens as rows of T, the most of them, each with its own tokens last; None if none differ.

    Args:
        counts: [B] tokens of each row.

    Returns:
        Which token of the batch stands where, [B, T] int64, any where there is none; where there is one, [B, T] bool; and the flat place of
        every token in turn, [N] int64.
    """
    if _uniform(counts):
        return None
    most = int(counts.max())
    column = np.arange(most) - (most - counts)[:, None]
    live = column >= 0
    first = np.cumsum(counts) - counts
    token = np.where(live, first[:, None] + column, 0)
    return token, live, np.flatnonzero(live)


def page_pieces(starts: np.ndarray, lens: np.ndarray, page_size: int) -> tuple[np.ndarray, ...]:
    """Cuts the chunks of some requests at page borders.

    Args:
        starts: [R + 1] first token of each chunk in the batch.
        lens: [R] tokens of each request, its chunk included.

    Returns:
        For N pages: request [N], its page [N], tokens of the batch [N, S] (int64), their places [N, S] (int32, -1 for none), and the tokens
        that the page then holds [N] (int32).
    """
    counts = np.diff(starts)
    context = lens - counts
    first = context // page_size
    pages = np.where(counts > 0, -(-lens // page_size) - first, 0)
    request = np.repeat(np.arange(len(lens)), pages)
    page = np.arange(len(request)) - np.repeat(np.cumsum(pages) - pages, pages) + first[request]
    offset = np.arange(page_size)
    place = page[:, None] * page_size + offset
    inside = (place >= context[request, None]) & (place < lens[request, None])
    token = np.where(inside, starts[request, None] + place - context[request, None], starts[0])
    live = np.minimum(page_size, lens[request] - page * page_size)
    return request, page, token.astype(np.int64), np.where(inside, offset, -1).astype(np.int32), live.astype(np.int32)
