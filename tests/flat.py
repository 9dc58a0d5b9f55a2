"""Operators and their implementations with the flat arguments of their schemas: what a dictionary of names can be given to."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from twilight_ops.ops import OPS, STAGED_OPS, operator


class _Flat:
    """`namespace.<op>(**flat)`, for the functions `<package>.<op>.<op>` that take groups."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, op: str) -> Callable:
        if op not in (*OPS, *STAGED_OPS):
            raise AttributeError(op)
        return operator(op).flat(getattr(importlib.import_module(f"{self._package}.{op}"), op))


ops = _Flat("twilight_ops.ops")
reference = _Flat("twilight_ops.reference")
