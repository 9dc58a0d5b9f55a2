"""Launch configurations, as data, and the arithmetic that turns shapes into static grids."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..arguments import KV


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched, and why."""

    block: int  # slots, tokens or pages a tile
    num_warps: int
    num_stages: int
    reason: str
    max_registers: int | None = None  # a thread; fewer let more programs run at once

    @property
    def options(self) -> dict[str, int | None]:
        """The compiler's options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.max_registers}


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_row(items: int) -> int:
    """Row stride of scratch values: whole 16s, so that a tile may read past the live items in full vectors."""
    return cdiv(items, 16) * 16


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def page_strides(*tensors: Tensor | None) -> list[int]:
    """Of each tensor of the cache the elements from a page to the next, then from a head to the next; zeros of None."""
    return [stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2])]


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(like: Tensor) -> int:
    """Multiprocessors of the tensor's device; tensors of the interpreter run one program at a time."""
    return _multiprocessors(like.device.index or 0) if like.is_cuda else 1


def chunk_size(rows: int, capacity: int, like: Tensor, block: int, waves: int) -> int:
    """Slots a program takes so that `rows` rows of `capacity` slots give about `waves` programs a multiprocessor: block .. 16 blocks.

    It depends on shapes alone, because a captured grid is static; programs beyond the live length exit at once.
    """
    wanted = rows * capacity // (waves * multiprocessors(like))
    return min(max(next_power_of_2(wanted), block), 16 * block)


def query_rows(query_tokens: int, group: int, minimum: int) -> int:
    """Query rows of a group, padded to what a matrix instruction takes."""
    return max(next_power_of_2(query_tokens * group), minimum)


def stored_pages(kv: KV) -> tuple[Tensor, Tensor]:
    """The caches as kernels take them: float8_e4m3fn as bytes, which every GPU and the interpreter know."""
    return (kv.k_cache.view(torch.uint8), kv.v_cache.view(torch.uint8)) if kv.is_fp8 else (kv.k_cache, kv.v_cache)
