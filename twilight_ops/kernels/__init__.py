"""CUDA kernels: Triton stages, one file an operator, and the native kernels where they serve; `register` attaches them."""

from collections.abc import Callable

from .. import launch_plan, native_modules
from ..serving import attach
from . import native
from .append_kv import append_kv
from .attend_sparse import attend_sparse
from .decode_attention import decode_attention
from .estimate_weights import estimate_weights
from .prune_top_p import prune_top_p
from .select_pages import select_pages
from .select_tokens import select_tokens

STAGES = {
    "append_kv": append_kv,
    "attend_sparse": attend_sparse,
    "decode_attention": decode_attention,
    "estimate_weights": estimate_weights,
    "prune_top_p": prune_top_p,
    "select_pages": select_pages,
    "select_tokens": select_tokens,
}


def register(allow_native: bool = True) -> Callable[[], tuple[str, str]]:
    """Attaches every operator's kernel; returns what says the backend's name and what serves, for people."""
    is_built = native_modules.is_built(native_modules.CUDA_MODULE)
    for op, staged in STAGES.items():
        if not allow_native or op not in native.KERNELS:
            attach(op, "cuda", staged, lambda: "triton")
        elif not is_built:
            attach(op, "cuda", native.staged_with_warning(staged), lambda: "triton")
        else:
            kernel, calls = native.KERNELS[op]
            attach(op, "cuda", kernel, lambda calls=calls: f"native ({calls}), else triton" if launch_plan.available() else "triton")

    def describe() -> tuple[str, str]:
        if not allow_native:
            return "triton", "Triton stages, because TWILIGHT_CUDA_BACKEND asks for them"
        if reason := launch_plan.unavailable():
            return "triton", f"Triton stages; {native_modules.CUDA_MODULE} {reason}"
        return "native", "fused kernels, Triton stages for what they do not serve"

    return describe
