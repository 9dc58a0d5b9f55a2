"""The speed-of-light kernel: the bytes of a decode step at their own addresses, in one launch of clusters, without arithmetic."""

from __future__ import annotations

import ctypes
import functools
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .rows import ROOT

SOURCE = Path(__file__).with_name("speed_of_light.cu")
MAX_STREAMS = 8
VECTOR_BYTES = 16
CLUSTER_SIZES = (1, 2, 4, 8, 16)
# More blocks than this only queue behind each other: an H200 holds 1056 of 256 threads.
MAX_BLOCKS = 4096
# Barriers of a cluster before a phase and after the last: a one-launch kernel cannot rank, prune and merge with fewer than about ten.
BARRIERS = {"candidates": 4, "kept": 4, "after": 2}


class _Stream(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("pitch", ctypes.c_int),
        ("vectors", ctypes.c_int),
        ("barriers_before", ctypes.c_int),
        ("reciprocal", ctypes.c_uint32),
    ]


class _Streams(ctypes.Structure):
    _fields_ = [("stream", _Stream * MAX_STREAMS), ("count", ctypes.c_int), ("barriers_after", ctypes.c_int)]


@dataclass(frozen=True)
class Chunks:
    """Equal chunks of one tensor, whole 16-byte vectors of it.

    Args:
        base: contiguous.
        offsets: [units, pitch] int64, in bytes.
        counts: [units] int32, how many of a unit's offsets count.
        size: bytes a chunk.
        barriers_before: of the cluster, before the first chunk.
    """

    base: Tensor
    offsets: Tensor
    counts: Tensor
    size: int
    barriers_before: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.counts.sum()) * self.size

    @property
    def reciprocal(self) -> int:
        """The multiplier whose upper 32 product bits divide a unit's vector index by the vectors of a chunk."""
        vectors = self.size // VECTOR_BYTES
        return 0 if vectors == 1 else -(-(2**32) // vectors)


def toolchain() -> ModuleType:
    """csrc/toolchain.py, which knows how CUDA sources are compiled."""
    sys.path.append(str(ROOT / "csrc"))
    return importlib.import_module("toolchain")


@functools.cache
def _library() -> ctypes.CDLL:
    target = Path(tempfile.mkdtemp()) / "speed_of_light.so"
    nvcc = toolchain().find_nvcc()
    if problem := toolchain().nvcc_problem(nvcc):
        raise RuntimeError(problem)
    subprocess.run(toolchain().library_command(nvcc, SOURCE, target), check=True)
    library = ctypes.CDLL(str(target))
    if library.streams_bytes() != ctypes.sizeof(_Streams):
        raise RuntimeError(f"speed_of_light: Streams: expected {ctypes.sizeof(_Streams)} bytes, got {library.streams_bytes()}")
    return library


def reader(chunks: list[Chunks], cluster_size: int) -> Callable[[], None]:
    """A launch that reads all chunks with `cluster_size` blocks a unit."""
    units = chunks[0].offsets.shape[0]
    streams = _Streams(count=len(chunks), barriers_after=BARRIERS["after"])
    offsets = [(c.offsets // VECTOR_BYTES).to(torch.int32).contiguous() for c in chunks]  # below 2**31 vectors: 32 GiB a tensor
    for i, (c, at) in enumerate(zip(chunks, offsets, strict=True)):
        pointers = (c.base.data_ptr(), at.data_ptr(), c.counts.data_ptr())
        streams.stream[i] = _Stream(*pointers, at.shape[1], c.size // VECTOR_BYTES, c.barriers_before, c.reciprocal)
    out = torch.zeros(units, dtype=torch.int32, device=chunks[0].base.device)
    library = _library()

    def launch() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = library.launch_read_streams(ctypes.byref(streams), units, cluster_size, ctypes.c_void_p(out.data_ptr()), stream)
        if error != 0:
            raise RuntimeError(f"speed_of_light: launch: expected cudaSuccess, got error {error}")

    launch.keeps = (chunks, offsets)  # the launch holds their addresses only
    return launch


def _down(offsets: Tensor) -> Tensor:
    return offsets // VECTOR_BYTES * VECTOR_BYTES


def decode_chunks(
    arguments: dict, candidates: tuple[Tensor, Tensor] | None = None, kept: tuple[Tensor, Tensor] | None = None
) -> list[Chunks]:
    """Chunks of one decode_attention call, every sequence M * S tokens long: the least a kernel can read.

    A candidate's leading codes, scale and zero count once, with the scan.

    Args:
        arguments: of `decode_attention`, selector "dense", "quest" with 8-bit bounds, or "shadow_prefix".
        candidates: indices [B, Hkv, C] and counts [B, Hkv], int32, pages (quest) or tokens (shadow_prefix); None where dense.
        kept: positions [B, Hkv, N] and counts [B, Hkv], int32; None where dense.
    """
    k_cache, v_cache, page_table = arguments["k_cache"], arguments["v_cache"], arguments["page_table"]
    _, kv_heads, page_size, head_dim = k_cache.shape
    batch, max_pages = page_table.shape
    units = batch * kv_heads
    heads = torch.arange(kv_heads, device=page_table.device)[None, :, None]

    def blocks(pages: Tensor) -> Tensor:
        """Index of (physical page, KV head), [B, Hkv, n]."""
        physical = page_table.long()[:, None].expand(-1, kv_heads, -1).gather(2, pages.long().clamp(min=0))
        return physical * kv_heads + heads

    def chunks(base: Tensor, offsets: Tensor, counts: Tensor, size: int, barriers: int = 0) -> Chunks:
        return Chunks(base, offsets.reshape(units, -1), counts.reshape(units).contiguous(), size, barriers)

    def by_head(base: Tensor, starts: Tensor, counts: Tensor, sizes: Tensor, piece: int, barriers: int = 0) -> Chunks:
        """sizes[h] bytes from each start [B, Hkv, n] of KV head h: one chunk where heads agree, else chunks of `piece` bytes."""
        size = int(sizes.max())
        if size > 0 and bool((sizes == size).all()):
            return chunks(base, starts, counts, size, barriers)
        pieces = -(-sizes // piece)[None, :, None]
        apart = pieces.clamp(min=1)  # a prefix of all channels leaves no tail
        listed = torch.arange(starts.shape[2] * int(apart.max()), device=starts.device).expand(batch, kv_heads, -1)
        offsets = starts.gather(2, (listed // apart).clamp(max=starts.shape[2] - 1)) + listed % apart * piece
        return chunks(base, offsets, (counts.view(batch, kv_heads) * pieces[..., 0]).int(), piece, barriers)

    every = blocks(torch.arange(max_pages, device=page_table.device).expand(batch, kv_heads, -1))
    pages = torch.full((units,), max_pages, dtype=torch.int32, device=page_table.device)
    row = head_dim * k_cache.element_size()
    if arguments["selector"] == "dense":
        page = page_size * row
        return [chunks(cache, every * page, pages, page) for cache in (k_cache, v_cache)]
    page_codes = page_size * head_dim // 2
    listed, counts = candidates
    if arguments["selector"] == "quest":
        block = blocks(listed)
        parts = [
            chunks(arguments["page_bounds"], every * 2 * head_dim, pages, 2 * head_dim),
            chunks(arguments["bounds_scale"], _down(every * 4), pages, VECTOR_BYTES),
            chunks(arguments["k_quant"], block * page_codes, counts, page_codes, BARRIERS["candidates"]),
            chunks(arguments["k_scale"], block * page_size * 4, counts, page_size * 4),
        ]
    else:
        prefix = arguments["prefix_channels"].long()
        tail = (head_dim - prefix) // 2
        within = (page_size * prefix // 2)[:, None] + listed.long() % page_size * tail[:, None]
        at = blocks(listed // page_size) * page_codes + within
        tails = -(-tail // VECTOR_BYTES) * VECTOR_BYTES
        parts = [
            by_head(arguments["k_quant"], every * page_codes, pages, page_size * prefix // 2, page_size * 4),
            chunks(arguments["k_scale"], every * page_size * 4, pages, page_size * 4),
            by_head(arguments["k_quant"], _down(at), counts, tails, VECTOR_BYTES, BARRIERS["candidates"]),
        ]
    positions, kept_counts = kept
    rows = (blocks(positions // page_size) * page_size + positions.long() % page_size) * row
    return parts + [chunks(k_cache, rows, kept_counts, row, BARRIERS["kept"]), chunks(v_cache, rows, kept_counts, row)]
