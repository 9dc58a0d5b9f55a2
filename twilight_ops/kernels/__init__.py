"""CUDA kernels: Triton stages, one file an operator, and the native kernels where they serve; `register` attaches them."""

import importlib
from collections.abc import Callable

from .. import launch_plan, native_modules
from ..ops import OPS, STAGED_OPS, operator
from ..serving import attach
from . import native


def stage(op: str) -> Callable:
    """The Triton kernel of an operator, with its flat arguments, behind its checks."""
    return operator(op).kernel(getattr(importlib.import_module(f"{__name__}.{op}"), op))


def register(allow_native: bool = True) -> Callable[[], tuple[str, str]]:
    """Attaches every operator's kernel; returns what says the backend's name and what serves, for people."""
    for op in (*OPS, *STAGED_OPS):
        if allow_native and op in native.KERNELS:
            kernel, calls = native.KERNELS[op]
            attach(op, "cuda", kernel, lambda calls=calls: f"native ({calls}), else triton" if launch_plan.available() else "triton")
        else:
            attach(op, "cuda", stage(op), lambda: "triton")

    def describe() -> tuple[str, str]:
        if not allow_native:
            return "triton", "Triton stages, because TWILIGHT_CUDA_BACKEND asks for them"
        if reason := launch_plan.unavailable():
            return "triton", f"Triton stages; {native_modules.CUDA_MODULE} {reason}"
        return "native", "fused kernels, Triton stages for what they do not serve"

    return describe
