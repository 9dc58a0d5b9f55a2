"""The native Hopper kernels behind the operators that have one; calls they do not serve go to the Triton stages."""

import functools
import inspect
from collections.abc import Callable

import torch

from .. import launch_plan, native_modules
from ..ops.append_kv import check_append_kv
from ..ops.decode_attention import check_decode_attention
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
_STAGED_ONLY = ("candidates", "candidate_counts", "tokens_per_candidate")


@functools.cache
def warn_if_missing() -> None:
    """Warns where Triton serves a GPU that the native module is for; the first call only."""
    if launch_plan.is_hopper() and (reason := launch_plan.unavailable()):
        native_modules.warner({native_modules.CUDA_MODULE: reason})()


def append_kv(*arguments, **named) -> None:
    warn_if_missing()
    call = bind_append_kv(arguments, named)
    if call["k"].dtype == torch.float32 or not launch_plan.available():
        staged_append_kv(**call)
        return
    check_append_kv(**call)
    torch.ops.twilight._fused_append_kv(*call.values())


def fused_plan(call: dict) -> launch_plan.Plan:
    """Whether and how the fused kernel serves a bound call of decode_attention, on a GPU where it is available."""
    return launch_plan.plan_of(launch_plan.Request.of_call(call, launch_plan.limits_of(call["q"].get_device())))


def run_fused(call: dict, cluster_size: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A bound call of decode_attention on the fused kernel, unchecked; with as many blocks a KV head as its plan says, unless given."""
    arguments = [value for name, value in call.items() if name not in _STAGED_ONLY]
    return torch.ops.twilight._fused_decode_attention(*arguments, cluster_size)


def decode_attention(*arguments, **named) -> tuple[torch.Tensor, torch.Tensor]:
    warn_if_missing()
    call = bind_decode_attention(arguments, named)
    check_decode_attention(**call)
    return run_fused(call) if launch_plan.available() and fused_plan(call).serves else staged_decode_attention(**call)


# Operators with a native kernel, and which of their calls it serves.
KERNELS = {
    "append_kv": (append_kv, "K and V of 16 bits"),
    "decode_attention": (decode_attention, "what twilight_ops.explain says"),
}


def staged_with_warning(kernel: Callable) -> Callable:
    """A Triton kernel that stands in for a native one that was not built."""

    @functools.wraps(kernel)
    def staged(*arguments, **named):
        warn_if_missing()
        return kernel(*arguments, **named)

    return staged
