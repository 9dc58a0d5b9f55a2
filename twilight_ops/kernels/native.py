"""The native Hopper kernels behind the operators that have one; calls they do not serve go to the Triton stages."""

import functools
from collections.abc import Callable

import torch

from .. import native_modules
from ..arguments import KV, PageBounds, Paging, Policy
from ..ops._library import LIBRARY
from ..ops.append_kv import OPERATOR as APPEND_KV
from ..ops.decode_attention import OPERATOR as DECODE_ATTENTION
from . import fused
from .append_kv import append_kv as staged_append_kv
from .decode_attention import decode_attention as staged_decode_attention

LIBRARY.define(f"_fused_append_kv{APPEND_KV.schema}")
LIBRARY.define(f"_fused_decode_attention{DECODE_ATTENTION.schema.replace(') -> (', ', int cluster_size=0) -> (')}")


@functools.cache
def warn_if_missing() -> None:
    """Warns where Triton serves a GPU that the native module is for; the first call only."""
    if fused.is_hopper() and (reason := fused.unavailable()):
        native_modules.warner({native_modules.CUDA_MODULE: reason})()


def append_kv(*arguments, **named) -> None:
    warn_if_missing()
    values = APPEND_KV.values(arguments, named)
    groups = APPEND_KV.groups(values)
    APPEND_KV.check(*groups)
    if values[0].dtype == torch.float32 or not fused.available():
        return staged_append_kv(*groups)
    return torch.ops.twilight._fused_append_kv(*values)


def fused_cluster_size(q: torch.Tensor, kv: KV, paging: Paging, policy: Policy, bounds: PageBounds | None) -> int:
    """Blocks a KV head with which the fused kernel serves a checked call of decode_attention, or 0 where it does not."""
    budget, pruning, always = policy.budget, policy.pruning, policy.always
    return fused.fused_supports(
        q,
        kv.k_cache,
        None if bounds is None else bounds.page_bounds,
        paging.page_table,
        policy.selector,
        budget,
        pruning.prunes,
        policy.dense_below,
        always,
    )


def run_fused(values: list, cluster_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The flat arguments of decode_attention on the fused kernel, unchecked."""
    return torch.ops.twilight._fused_decode_attention(*values, cluster_size)


def decode_attention(*arguments, **named) -> tuple[torch.Tensor, torch.Tensor]:
    warn_if_missing()
    values = DECODE_ATTENTION.values(arguments, named)
    groups = DECODE_ATTENTION.groups(values)
    DECODE_ATTENTION.check(*groups)
    q, kv, paging, policy, _, _, bounds, *_ = groups
    cluster_size = fused_cluster_size(q, kv, paging, policy, bounds)
    return run_fused(values, cluster_size) if cluster_size > 0 else staged_decode_attention(*groups)


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
