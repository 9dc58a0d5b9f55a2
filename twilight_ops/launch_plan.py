"""How the fused Hopper kernel is launched, and which calls it serves: csrc/plan.h seen from Python.

Every native module exports the same plan, so that a machine without a GPU can ask what one would do.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import native_modules
from .arguments import KV, PageBounds, Paging, Policy, Shadow


class DeviceLimits(NamedTuple):
    """What the plan asks of a GPU."""

    multiprocessors: int
    shared_per_block: int  # bytes that one block may take


H200 = DeviceLimits(132, 227 * 1024)  # and H100 SXM


class Request(NamedTuple):
    """A call of decode_attention and the GPU's limits: PlanRequest of csrc/plan.h, field by field."""

    selector: str
    prunes: bool
    softcap: float  # 0: none
    dtype_bits: int
    bounds_bits: int
    head_dim: int
    query_tokens: int
    group_size: int
    kv_heads: int
    batch: int
    page_size: int
    max_pages: int
    num_pages: int
    page_words: int  # from a page to the next, of 16 bytes in K and V or of 4 in the shadow, the most of them
    token_budget: int
    sink_tokens: int
    recent_tokens: int
    dense_below: int
    budget_fraction: float
    page_fraction: float
    min_scored_tokens: int
    device: DeviceLimits
    cluster_size: int = 0

    @classmethod
    def of_call(
        cls,
        q: Tensor,
        kv: KV,
        paging: Paging,
        policy: Policy,
        shadow: Shadow | None,
        bounds: PageBounds | None,
        softcap: float | None,
        device: DeviceLimits,
    ) -> Request:
        """Of a checked call of decode_attention."""
        words = [tensor.stride(0) * tensor.itemsize // 16 for tensor in kv]
        words += [] if shadow is None else [tensor.stride(0) * tensor.itemsize // 4 for tensor in shadow[:2]]
        batch, query_tokens, heads, head_dim = q.shape
        num_pages, kv_heads, page_size, _ = kv.k_cache.shape
        return cls(
            policy.selector,
            policy.pruning.prunes,
            softcap or 0.0,
            8 * q.dtype.itemsize,
            0 if bounds is None else 8 * bounds.page_bounds.dtype.itemsize,
            head_dim,
            query_tokens,
            heads // kv_heads,
            kv_heads,
            batch,
            page_size,
            paging.page_table.shape[1],
            num_pages,
            max(words),
            policy.budget.token_budget,
            *policy.always,
            policy.dense_below,
            policy.budget.budget_fraction,
            *policy.level,
            device,
        )


class Plan(NamedTuple):
    """How the fused kernel serves a call, or why it does not."""

    reason: str  # "" where it serves the call; all other fields count only then
    selector: str  # that runs: "dense" where no sequence can be longer than dense_below
    capacity: int  # candidates of a (sequence, KV head) at most: pages of "quest" and "page_mean", else tokens
    cluster_size: int  # blocks a (sequence, KV head)
    grid: int  # blocks
    shared_bytes: int  # of shared memory a block

    @property
    def serves(self) -> bool:
        return not self.reason


_C_TYPES: dict[type, Any] = {
    str: ctypes.c_int,
    bool: ctypes.c_int,
    int: ctypes.c_int64,
    float: ctypes.c_double,
    DeviceLimits: ctypes.c_int * 2,
}


class _Request(ctypes.Structure):
    _fields_ = [(name, _C_TYPES[kind]) for name, kind in get_type_hints(Request).items()]


class _Plan(ctypes.Structure):
    """Plan of csrc/plan.h."""

    _fields_ = [
        ("reason", ctypes.c_char * 160),
        *[(name, ctypes.c_int) for name in ("selector", "prunes", "capacity", "cluster_size", "grid", "shared_bytes")],
        ("offsets", ctypes.c_int * 5),
    ]


class PlanLibrary:
    """The plan in one compiled library.

    Attributes:
        selectors: names by the number that csrc/plan.h gives them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.twilight_selector_name.restype = ctypes.c_char_p
        names = map(library.twilight_selector_name, itertools.count())
        self.selectors = tuple(name.decode() for name in itertools.takewhile(lambda name: name is not None, names))
        self._plan = library.twilight_plan_fused_decode
        self._plan.argtypes = [ctypes.POINTER(_Request), ctypes.c_size_t, ctypes.POINTER(_Plan), ctypes.c_size_t]
        self._plan.restype = ctypes.c_bool

    def structure(self, request: Request) -> ctypes.Structure:
        """The request as C++ reads it."""
        return _Request(self.selectors.index(request.selector), *request[1:])

    def plan(self, request: Request) -> Plan:
        found = _Plan()
        if not self._plan(self.structure(request), ctypes.sizeof(_Request), found, ctypes.sizeof(_Plan)):
            raise RuntimeError(
                f"{self._library._name}: expected the structs of launch_plan.py, got others: it was built from other sources"
            )
        numbers = (found.capacity, found.cluster_size, found.grid, found.shared_bytes)
        return Plan(found.reason.decode(), self.selectors[found.selector], *numbers)

    def limits(self, device: int) -> DeviceLimits:
        """Of a CUDA device, as the operator reads them; only `_C_cuda` can."""
        found = (ctypes.c_int * 2)()
        read = self._library.twilight_device_limits
        read.restype = ctypes.c_bool
        if not read(device, found):
            raise RuntimeError(f"cuda:{device}: expected a device whose limits can be read, got none")
        return DeviceLimits(*found)


@functools.cache
def is_hopper() -> bool:
    """Whether the current CUDA device is what the fused kernels are compiled for."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@functools.cache
def unavailable() -> str:
    """Why the fused kernels do not serve here, "" where they do."""
    if not native_modules.is_built(native_modules.CUDA_MODULE):
        return native_modules.why_not_built(native_modules.CUDA_MODULE)
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    if not is_hopper():
        return "was built for sm_90, this GPU is sm_{}{}".format(*torch.cuda.get_device_capability())
    return native_modules.load(native_modules.CUDA_MODULE)


def available() -> bool:
    """Whether the CUDA module was built and loads here, on a Hopper GPU."""
    return not unavailable()


@functools.cache
def library() -> PlanLibrary:
    """The plan of the CUDA module where it serves, else of the CPU module that is in use.

    Raises:
        RuntimeError: no native module is loaded.
    """
    wanted = (native_modules.CUDA_MODULE,) if available() else native_modules.CPU_MODULES
    modules = (sys.modules.get(native_modules.full_name(name)) for name in wanted)
    paths = [module.__file__ for module in modules if module is not None]
    if not paths:
        raise RuntimeError(f"launch plan: expected a native module, got none ({', '.join(wanted)})")
    return PlanLibrary(ctypes.CDLL(paths[0]))


@functools.cache
def limits_of(device: int) -> DeviceLimits:
    """Of a CUDA device on which the fused kernels serve."""
    return library().limits(device)


@functools.lru_cache(maxsize=4096)
def plan_of(request: Request) -> Plan:
    """Whether and how the fused kernel serves a call."""
    return library().plan(request)
