"""CUDA kernels: Triton stages, one file an operator, and the native kernels where they serve; `register` attaches them."""

import importlib.util

from torch.library import Library

from . import fused, native
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


def register(library: Library, allow_native: bool = True) -> tuple[str, str]:
    """Attaches every operator's kernel; returns the backend's name and what serves, for people."""
    has_native = allow_native and importlib.util.find_spec(fused.MODULE) is not None
    for name, kernel in (STAGES | (native.KERNELS if has_native else {})).items():
        library.impl(name, kernel, "CUDA")
    if has_native:
        return "native", "fused kernels on sm_90, Triton stages for what they do not serve"
    return "triton", "Triton stages"
