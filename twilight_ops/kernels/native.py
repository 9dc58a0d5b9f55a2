"""The native Hopper kernels behind the operators that have one; calls they do not serve go to the Triton stages."""

import functools
from collections.abc import Callable

import torch

from .. import launch_plan, native_modules
from ..ops._library import LIBRARY
from ..ops.append_kv import OPERATOR as APPEND_KV
from ..ops.decode_attention import OPERATOR as DECODE_ATTENTION
from .append_kv import append_kv as staged_append_kv
from .decode_attention import decode_attention as staged_decode_attention

LIBRARY.define(f"_fused_append_kv({APPEND_KV.arguments}) -> {APPEND_KV.returns}")
# With as many blocks a KV head as the plan says, unless cluster_size is given.
LIBRARY.define(f"_fused_decode_attention({DECODE_ATTENTION.arguments}, int cluster_size=0) -> {DECODE_ATTENTION.returns}")


@functools.cache
def warn_if_missing() -> None:
    """Warns where Triton serves a GPU that the native module is for; the first call only."""
    if launch_plan.is_hopper() and (reason := launch_plan.unavailable()):
        native_modules.warner({native_modules.CUDA_MODULE: reason})()


def append_kv(*arguments, **named) -> None:
    warn_if_missing()
    values = APPEND_KV.values(arguments, named)
    groups = APPEND_KV.groups(values)
    APPEND_KV.check(*groups)
    if values[0].dtype == torch.float32 or not launch_plan.available():
        return staged_append_kv(*groups)
    return torch.ops.twilight._fused_append_kv(*values)


def decode_attention(*arguments, **named) -> tuple[torch.Tensor, torch.Tensor]:
    warn_if_missing()
    values = DECODE_ATTENTION.values(arguments, named)
    groups = DECODE_ATTENTION.groups(values)
    DECODE_ATTENTION.check(*groups)
    if launch_plan.available():
        q, kv, paging, policy, _, _, bounds, *_ = groups
        request = launch_plan.Request.of_call(q, kv, paging, policy, bounds, launch_plan.limits_of(q.get_device()))
        if launch_plan.plan_of(request).serves:
            return torch.ops.twilight._fused_decode_attention(*values)
    return staged_decode_attention(*groups)


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
