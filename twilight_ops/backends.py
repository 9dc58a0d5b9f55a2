"""Attaches the kernels to the operators and says which ones are in use.

CPU: the native module for this processor if it was built, else the PyTorch references. CUDA: Triton kernels, and the native module
where it serves. `TWILIGHT_CPU_BACKEND=reference` and `TWILIGHT_CUDA_BACKEND=triton` turn the native kernels off. A native module that
is missing or does not load is no error: the first call that runs slower for it warns.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import native_modules
from .native_modules import CPU_CAPABILITIES
from .ops import OPS, STAGED_OPS, operator
from .serving import attach, record_native, serving

__all__ = ["CPU", "CUDA", "OPS", "Backend", "checked_reference", "serving"]


@dataclass(frozen=True)
class Backend:
    """Which kernels serve a device, and why."""

    device: str
    describe: Callable[[], tuple[str, str]]  # asked when it is wanted: it may look at the device, which an import must not

    @property
    def name(self) -> str:
        """ "native", "triton", "reference" or "none"."""
        return self.describe()[0]

    @property
    def detail(self) -> str:
        return self.describe()[1]


def _asked(variable: str, *choices: str) -> str:
    """An environment variable's value; the first choice is the default."""
    value = os.environ.get(variable, choices[0])
    if value not in choices:
        raise ValueError(f"{variable}: expected {' or '.join(choices)}, got {value!r}")
    return value


def _cpu_capabilities() -> tuple[str, ...]:
    """Native modules this processor can run, best first."""
    supported = torch.backends.cpu.get_cpu_capability().lower()
    if supported in CPU_CAPABILITIES:
        return CPU_CAPABILITIES[CPU_CAPABILITIES.index(supported) :]
    return ("default",)


def checked_reference(op: str) -> Callable:
    """The PyTorch reference of an operator behind the operator's own argument checks: the fallback kernel."""
    return operator(op).kernel(getattr(importlib.import_module(f"{__package__}.reference.{op}"), op))


def _load_native_cpu() -> tuple[str, dict[str, str]]:
    """(the capability whose module serves, "" if none does; modules and why each does not serve)."""
    usable = _cpu_capabilities()
    built = [capability for capability in CPU_CAPABILITIES if native_modules.is_built(f"_C_{capability}")]
    reasons = {}
    for capability in built:
        module = f"_C_{capability}"
        if capability not in usable:
            reasons[module] = f"was built for {capability}, this processor runs {usable[0]}"
        elif reason := native_modules.load(module):
            reasons[module] = reason
        else:
            return capability, reasons
    return "", reasons or {f"_C_{usable[0]}": native_modules.why_not_built(f"_C_{usable[0]}")}


def _after(warn: Callable[[], None], kernel: Callable) -> Callable:
    @functools.wraps(kernel)
    def warning_kernel(*args, **kwargs):
        warn()
        return kernel(*args, **kwargs)

    return warning_kernel


def _load_cpu() -> Backend:
    asked_off = _asked("TWILIGHT_CPU_BACKEND", "native", "reference") == "reference"
    capability, reasons = ("", {}) if asked_off else _load_native_cpu()
    unserved = [op for op in OPS if not (capability and record_native(op, "cpu", lambda: "native"))]
    if capability and unserved:
        reasons[f"_C_{capability}"] = f"has no kernel for {', '.join(unserved)}: it was built from other sources"
    warn = native_modules.warner(reasons) if reasons else None
    for op in unserved:
        kernel = checked_reference(op)
        attach(op, "cpu", kernel if warn is None else _after(warn, kernel), lambda: "reference")
    for op in STAGED_OPS:
        attach(op, "cpu", checked_reference(op), lambda: "reference")
    detail = "; ".join(f"{module} {reason}" for module, reason in reasons.items())
    if len(unserved) < len(OPS):
        return Backend("cpu", lambda: ("native", f"{capability}; {detail}" if detail else capability))
    return Backend("cpu", lambda: ("reference", f"plain PyTorch, because {detail or 'TWILIGHT_CPU_BACKEND asks for it'}"))


def _load_cuda() -> Backend:
    allow_native = _asked("TWILIGHT_CUDA_BACKEND", "native", "triton") == "native"
    if torch.version.cuda is None:
        return Backend("cuda", lambda: ("none", "this PyTorch has no CUDA"))
    if importlib.util.find_spec("triton") is None:
        return Backend("cuda", lambda: ("none", "triton is not installed"))
    from . import kernels

    return Backend("cuda", kernels.register(allow_native))


for op in (*OPS, *STAGED_OPS):
    operator(op)  # its schema is there before any kernel is
CPU = _load_cpu()
CUDA = _load_cuda()
