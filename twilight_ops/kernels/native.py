"""The native Hopper kernels behind the operators that have one; calls they do not serve go to the Triton stages."""

import functools
import inspect
from collections.abc import Callable

import torch

from .. import native_modules
from ..ops.append_kv import check_append_kv
from ..ops.decode_attention import check_decode_attention
from . import fused
from .append_kv import append_kv as staged_append_kv
from .decode_attention import decode_attention as staged_decode_attention


def _binder(kernel: Callable) -> Callable[[tuple, dict], dict]:
    """Names a call's arguments and fills in the defaults, which PyTorch leaves out."""
    parameters = inspect.signature(kernel).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    def bind(arguments: tuple, named: dict) -> dict:
        given = dict(zip(parameters, arguments, strict=False)) | named
        return {name: given[name] if name in given else defaults[name] for name in parameters}

    return bind


bind_append_kv = _binder(staged_append_kv)
bind_decode_attention = _binder(staged_decode_attention)
_SUPPORT_ARGUMENTS = tuple(inspect.signature(fused.fused_supports).parameters)
_STAGED_ONLY = ("candidates", "candidate_counts", "tokens_per_candidate")


@functools.cache
def warn_if_missing() -> None:
    """Warns where Triton serves a GPU that the native module is for; the first call only."""
    if fused.is_hopper() and (reason := fused.unavailable()):
        native_modules.warner({native_modules.CUDA_MODULE: reason})()


def append_kv(*arguments, **named) -> None:
    warn_if_missing()
    call = bind_append_kv(arguments, named)
    if call["k"].dtype == torch.float32 or not fused.available():
        staged_append_kv(**call)
        return
    check_append_kv(**call)
    torch.ops.twilight._fused_append_kv(*call.values())


def fused_cluster_size(call: dict) -> int:
    """Blocks a KV head with which the fused kernel serves a bound call of decode_attention, or 0 where it does not."""
    return fused.fused_supports(**{name: call[name] for name in _SUPPORT_ARGUMENTS})


def run_fused(call: dict, cluster_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A bound call of decode_attention on the fused kernel, unchecked."""
    arguments = [value for name, value in call.items() if name not in _STAGED_ONLY]
    return torch.ops.twilight._fused_decode_attention(*arguments, cluster_size)


def decode_attention(*arguments, **named) -> tuple[torch.Tensor, torch.Tensor]:
    warn_if_missing()
    call = bind_decode_attention(arguments, named)
    check_decode_attention(**call)
    cluster_size = fused_cluster_size(call)
    return run_fused(call, cluster_size) if cluster_size > 0 else staged_decode_attention(**call)


_DECODE_CALLS = f"16 bits, head_dim {' or '.join(map(str, fused.HEAD_DIMS))}, at most {fused.MAX_ROWS} query rows a KV head"
# Operators with a native kernel, and which of their calls it serves.
KERNELS = {
    "append_kv": (append_kv, "K and V of 16 bits"),
    "decode_attention": (decode_attention, f"{_DECODE_CALLS}, {', '.join(fused.SELECTORS)}"),
}


def staged_with_warning(kernel: Callable) -> Callable:
    """A Triton kernel that stands in for a native one that was not built."""

    @functools.wraps(kernel)
    def staged(*arguments, **named):
        warn_if_missing()
        return kernel(*arguments, **named)

    return staged
