"""Attaches the kernels to the operators and says which ones are in use.

CPU: the native extension for this processor if it was built, else the PyTorch references. CUDA: Triton kernels, and the native
extension where it serves. `TWILIGHT_CPU_BACKEND=reference` and `TWILIGHT_CUDA_BACKEND=triton` turn the native kernels off.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import reference
from .ops._library import LIBRARY

OPS = ("append_kv", "select_pages", "select_tokens", "estimate_weights", "prune_top_p", "attend_sparse", "decode_attention")

# From the most to the least demanding; setup.py builds one extension for each entry it is asked for.
CPU_CAPABILITIES = ("avx512", "avx2", "default")


@dataclass(frozen=True)
class Backend:
    """Which kernels serve a device, and why."""

    device: str
    name: str  # "native", "triton", "reference" or "none"
    detail: str


def _cpu_capabilities() -> tuple[str, ...]:
    """Extensions this processor can run, best first."""
    supported = torch.backends.cpu.get_cpu_capability().lower()
    if supported in CPU_CAPABILITIES:
        return CPU_CAPABILITIES[CPU_CAPABILITIES.index(supported) :]
    return ("default",)


def checked_reference(op: str) -> Callable:
    """The PyTorch reference of an operator behind the operator's own argument checks: the fallback kernel."""
    check = getattr(importlib.import_module(f"{__package__}.ops.{op}"), f"check_{op}")
    run = getattr(reference, op)

    @functools.wraps(run)
    def kernel(*args, **kwargs):
        check(*args, **kwargs)
        return run(*args, **kwargs)

    return kernel


def _load_cpu() -> Backend:
    if os.environ.get("TWILIGHT_CPU_BACKEND", "native") == "reference":
        reason = "asked for by TWILIGHT_CPU_BACKEND"
    else:
        for capability in _cpu_capabilities():
            module = f"{__package__}._C_{capability}"
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
                return Backend("cpu", "native", capability)
        reason = "the native extension was not built"
    for op in OPS:
        LIBRARY.impl(op, checked_reference(op), "CPU")
    return Backend("cpu", "reference", f"plain PyTorch, because {reason}")


def _load_cuda() -> Backend:
    if torch.version.cuda is None:
        return Backend("cuda", "none", "this PyTorch has no CUDA")
    if importlib.util.find_spec("triton") is None:
        return Backend("cuda", "none", "triton is not installed")
    from . import kernels

    allow_native = os.environ.get("TWILIGHT_CUDA_BACKEND", "native") != "triton"
    return Backend("cuda", *kernels.register(LIBRARY, allow_native))


CPU = _load_cpu()
CUDA = _load_cuda()
