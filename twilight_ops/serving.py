"""Which kernel serves each operator on each device: registering a kernel and saying so is one act."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._ops import add_op_namespace_prefix
from .ops._library import LIBRARY

_SERVED: dict[tuple[str, str], Callable[[], str]] = {}


def attach(op: str, device: str, kernel: Callable, serves: Callable[[], str]) -> None:
    """Registers a kernel; `serves` is asked later what runs: it may look at the device, which an import must not."""
    LIBRARY.impl(op, kernel, device.upper())
    _SERVED[op, device] = serves


def record_native(op: str, device: str, serves: Callable[[], str]) -> bool:
    """Records the kernel that a loaded native module registered; false where it registered none."""
    found = torch._C._dispatch_has_kernel_for_dispatch_key(add_op_namespace_prefix(op), device.upper())
    if found:
        _SERVED[op, device] = serves
    return found


def serving(op: str, device: str) -> str:
    """What serves calls of an operator on "cpu" or "cuda" in this process, "none" where nothing does."""
    serves = _SERVED.get((op, device))
    return "none" if serves is None else serves()
