"""The native Hopper kernels behind the operators that have one; calls they do not serve go to the Triton stages."""

import functools
from collections.abc import Callable, Sequence

import torch

from .. import launch_plan, native_modules
from .._ops import ops
from ..ops._library import LIBRARY, Operator
from ..ops.append_kv import OPERATOR as APPEND_KV
from ..ops.decode_attention import OPERATOR as DECODE_ATTENTION
from .append_kv import append_kv
from .decode_attention import decode_attention

LIBRARY.define(f"_fused_append_kv({APPEND_KV.arguments}) -> {APPEND_KV.returns}")
# With as many blocks a KV head as the plan says, unless cluster_size is given.
LIBRARY.define(f"_fused_decode_attention({DECODE_ATTENTION.arguments}, int cluster_size=0) -> {DECODE_ATTENTION.returns}")


@functools.cache
def warn_if_missing() -> None:
    """Warns where Triton serves a GPU that the native module is for; the first call only."""
    if launch_plan.is_hopper() and (reason := launch_plan.unavailable()):
        native_modules.warner({native_modules.CUDA_MODULE: reason})()


def native_first(operator: Operator, staged: Callable, native: Callable, serves: Callable[[Sequence], bool]) -> Callable:
    """The operator's kernel of flat arguments: `native` for the calls that it `serves`, by their groups, else the Triton stages."""

    @functools.wraps(staged)
    def kernel(*arguments, **named):
        warn_if_missing()
        values = operator.values(arguments, named)
        groups = operator.groups(values)
        operator.check(*groups)
        if launch_plan.available() and serves(groups):
            return native(*values)
        return staged(*groups)

    return kernel


def serves_append(groups: Sequence) -> bool:
    return groups[0].dtype != torch.float32


def serves_decode(groups: Sequence) -> bool:
    q, kv, paging, policy, _, shadow, bounds, *_, softcap = groups
    request = launch_plan.Request.of_call(q, kv, paging, policy, shadow, bounds, softcap, launch_plan.limits_of(q.get_device()))
    return launch_plan.plan_of(request).serves


# Operators with a native kernel, and which of their calls it serves.
KERNELS = {
    "append_kv": (native_first(APPEND_KV, append_kv, ops._fused_append_kv, serves_append), "K and V of 16 bits"),
    "decode_attention": (
        native_first(DECODE_ATTENTION, decode_attention, ops._fused_decode_attention, serves_decode),
        "what twilight_ops.explain says",
    ),
}
