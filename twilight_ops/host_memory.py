"""Memory for K and V outside the device: pinned host memory that kernels read over the bus; on a CPU a mapped file without a name."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ._settings import refuse

MAPPED_FOR_ALL = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped
ALIGNMENT = mmap.ALLOCATIONGRANULARITY  # bytes; of every tensor


def size(nbytes: float) -> str:
    """For people: 122.1 GiB."""
    power = 3 if nbytes >= 2**30 else 2 if nbytes >= 2**20 else 1
    return f"{nbytes / 1024**power:.1f} {'KMG'[power - 1]}iB"


def _first_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text().split()[0])
    except (OSError, ValueError, IndexError):  # there is none, or it says "max"
        return None


def _entry(path: str, name: str) -> int:
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if line[0] == name), 0)


def available_memory() -> int:
    """Bytes that this process may still take without swapping: of the machine, or of its control group where that has less."""
    free = [_entry("/proc/meminfo", "MemAvailable:") * 1024]
    for folder, limit, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _first_number(f"{folder}/{limit}"), _first_number(f"{folder}/{used}")
        if most is not None and now is not None:
            free.append(most - now + _entry(f"{folder}/memory.stat", cached))
    return max(0, min(free))


class HostMemory:
    """One piece of memory, all of it there before the first tensor is cut from it, and gone with the last tensor.

    For a GPU it is pinned, and its tensors are CUDA tensors whose bytes lie in host memory: every kernel reads them over the bus, and a
    graph may hold their addresses. For a CPU it is a file without a name: a process that is killed leaves nothing behind.

    Args:
        nbytes: of all tensors together, see `HostMemory.bytes_of`.
        device: of the kernels.
        directory: of the file; None takes the one for temporary files. Only on a CPU.

    Raises:
        ValueError: the memory, or the file system, has less room. Nothing is allocated then.
    """

    def __init__(self, nbytes: int, device: torch.device, directory: str | None = None):
        self.device, self.nbytes, self.taken = device, nbytes, 0
        if device.type != "cuda":
            self._mapping = _mapped_file(nbytes, directory or tempfile.gettempdir())
            return
        if directory is not None:
            refuse("TwilightConfig", "offload", "True on cuda, where K and V lie in pinned host memory", directory)
        if (free := available_memory()) < nbytes:
            raise ValueError(
                f"TwilightConfig: offload: expected K and V that fit the {size(free)} of host memory that are free, got {size(nbytes)}"
            )
        self._mapping = _touched(nbytes)
        with torch.cuda.device(device):
            self._pinned = _Pinned(torch.frombuffer(self._mapping, dtype=torch.uint8))

    @staticmethod
    def bytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
        """What one tensor takes."""
        return -(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor, zeros, on `device`."""
        return self.new_pair(shape, dtype)[0]

    def new_pair(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The next tensor as kernels and as the host see it; on a CPU twice the same."""
        start = self.taken
        self.taken += self.bytes_of(shape, dtype)
        # A storage of its own: what is written in place in a compiled graph shares none.
        host = torch.frombuffer(self._mapping, dtype=dtype, count=prod(shape), offset=start).view(*shape)
        if self.device.type != "cuda":
            return host, host
        seen = torch.as_tensor(_Alias(self._pinned, host.flatten().view(torch.uint8)), device=self.device)
        if seen.data_ptr() != host.data_ptr():
            raise ValueError("TwilightConfig: offload: expected a GPU that reads host memory at its own address, got one that copies it")
        return seen.view(dtype).view(*shape), host


def _mapped_file(nbytes: int, directory: str) -> mmap.mmap:
    """A new file without a name. Every block is reserved first: writing to a mapping of a full disk would kill the process."""
    try:
        status = os.statvfs(directory)
        if (free := status.f_bavail * status.f_frsize) < nbytes:
            raise ValueError(
                f"TwilightConfig: offload: expected a directory with {size(nbytes)} free for K and V, got {directory!r} with {size(free)}"
            )
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise ValueError(
            f"TwilightConfig: offload: expected a directory that takes a file of {size(nbytes)}, got {directory!r}: {error.strerror}"
        ) from error


def _touched(nbytes: int) -> mmap.mmap:
    """Zeros in large pages, every one of them touched by all threads at once: pinning then finds them there."""
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(f"TwilightConfig: offload: expected {size(nbytes)} of host memory, got none: {error.strerror}") from error
    with suppress(OSError):  # of a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(mapping, dtype=torch.uint8).fill_(0)
    return mapping


class _Pinned:
    """Host memory that CUDA knows for as long as something holds this."""

    def __init__(self, host: Tensor):
        self.host, self.registered = host, False
        status = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, MAPPED_FOR_ALL))
        if status != 0:
            raise ValueError(f"TwilightConfig: offload: expected {size(host.nbytes)} that can be pinned, got CUDA error {status}")
        self.registered = True

    def __del__(self) -> None:
        if self.registered and not sys.is_finalizing():
            torch.cuda.synchronize()  # a kernel under way may still read it
            torch.cuda.cudart().cudaHostUnregister(self.host.data_ptr())


class _Alias:
    """Bytes of pinned memory as CUDA libraries exchange arrays; a tensor made of it holds it, and with it the memory."""

    def __init__(self, pinned: _Pinned, host: Tensor):
        self.pinned = pinned
        self.__cuda_array_interface__ = {"shape": (host.nbytes,), "typestr": "|u1", "data": (host.data_ptr(), False), "version": 2}
