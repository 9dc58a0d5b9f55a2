"""The speed-of-light kernel beside the fused one: same bytes, same addresses, same clusters, no arithmetic."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("speed_of_light.cu")
MAX_STREAMS = 8
VECTOR_BYTES = 16
# The fused kernel's cluster barriers before each phase and after the last; it has ten in all.
BARRIERS = {"candidates": 4, "kept": 4, "after": 2}


class _Stream(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("vectors", ctypes.c_int),
        ("barriers_before", ctypes.c_int),
    ]


class _Streams(ctypes.Structure):
    _fields_ = [("stream", _Stream * MAX_STREAMS), ("count", ctypes.c_int), ("barriers_after", ctypes.c_int)]


@dataclass(frozen=True)
class Chunks:
    """Equal chunks of one tensor: offsets [units, count] and size in bytes, whole 16-byte vectors."""

    base: Tensor
    offsets: Tensor
    size: int
    barriers_before: int = 0

    @property
    def nbytes(self) -> int:
        return self.offsets.numel() * self.size


@functools.cache
def _library() -> ctypes.CDLL:
    target = Path(tempfile.mkdtemp()) / "speed_of_light.so"
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-shared", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def reader(chunks: list[Chunks], cluster_size: int) -> tuple[Callable[[], None], int]:
    """A launch that reads all chunks, and the bytes it reads."""
    units = chunks[0].offsets.shape[0]
    streams = _Streams(count=len(chunks), barriers_after=BARRIERS["after"])
    offsets = [(c.offsets // VECTOR_BYTES).to(torch.int32).contiguous() for c in chunks]  # below 2**31 vectors: 32 GiB a tensor
    for i, (c, at) in enumerate(zip(chunks, offsets, strict=True)):
        streams.stream[i] = _Stream(c.base.data_ptr(), at.data_ptr(), at.shape[1], c.size // VECTOR_BYTES, c.barriers_before)
    out = torch.zeros(units, dtype=torch.int32, device=chunks[0].base.device)
    library = _library()

    def launch() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch_read_streams(ctypes.byref(streams), units, cluster_size, ctypes.c_void_p(out.data_ptr()), stream)
        if error != 0:
            raise RuntimeError(f"speed_of_light: launch: expected cudaSuccess, got error {error}")

    launch.keeps = offsets
    return launch, sum(c.nbytes for c in chunks)


def _down(offsets: Tensor) -> Tensor:
    return offsets // VECTOR_BYTES * VECTOR_BYTES


def decode_chunks(arguments: dict, candidates: Tensor, kept: Tensor) -> list[Chunks]:
    """Chunks of one decode_attention call at full length.

    Args:
        arguments: of `decode_attention`, selector "quest" with 8-bit bounds or "shadow_prefix" with one prefix for all KV heads, every
            sequence M * S tokens long.
        candidates: [B, Hkv, C] int32 pages (quest) or tokens (shadow_prefix), none padded.
        kept: [B, Hkv, N] int32 positions; pads are clamped to position 0.
    """
    k_cache, page_table = arguments["k_cache"], arguments["page_table"]
    _, kv_heads, page_size, head_dim = k_cache.shape
    batch, max_pages = page_table.shape
    heads = torch.arange(kv_heads, device=page_table.device)[None, :, None]

    def blocks(pages: Tensor) -> Tensor:
        """Index of (physical page, KV head), [B, Hkv, n]."""
        physical = page_table.long()[:, None].expand(-1, kv_heads, -1).gather(2, pages.long())
        return physical * kv_heads + heads

    def chunks(base: Tensor, offsets: Tensor, size: int, barriers: int = 0) -> Chunks:
        return Chunks(base, offsets.reshape(batch * kv_heads, -1), size, barriers)

    every = blocks(torch.arange(max_pages, device=page_table.device).expand(batch, kv_heads, -1))
    page_codes = page_size * head_dim // 2
    if arguments["selector"] == "quest":
        listed = blocks(candidates)
        parts = [
            chunks(arguments["page_bounds"], every * 2 * head_dim, 2 * head_dim),
            chunks(arguments["bounds_scale"], _down(every * 4), VECTOR_BYTES),
            chunks(arguments["k_quant"], listed * page_codes, page_codes, BARRIERS["candidates"]),
            chunks(arguments["k_scale"], listed * page_size * 4, page_size * 4),
        ]
    else:
        prefix = int(arguments["prefix_channels"][0])
        page, slot = blocks(candidates // page_size), candidates.long() % page_size
        tail = (head_dim - prefix) // 2
        tail_at = page * page_codes + page_size * prefix // 2 + slot * tail
        parts = [
            chunks(arguments["k_quant"], every * page_codes, page_size * prefix // 2),
            chunks(arguments["k_scale"], every * page_size * 4, page_size * 4),
            chunks(arguments["k_quant"], _down(tail_at), -(-tail // VECTOR_BYTES) * VECTOR_BYTES, BARRIERS["candidates"]),
            chunks(arguments["k_scale"], _down((page * page_size + slot) * 4), VECTOR_BYTES),
        ]
    kept = kept.clamp(min=0)
    rows = (blocks(kept // page_size) * page_size + kept.long() % page_size) * head_dim * k_cache.element_size()
    size = head_dim * k_cache.element_size()
    return parts + [chunks(k_cache, rows, size, BARRIERS["kept"]), chunks(arguments["v_cache"], rows, size)]
