"""Operators, one file each: signature and docstring, checks, outputs. `twilight_ops.<op>` is the function."""

import importlib

from ._library import Operator

OPS = ("append_kv", "select_pages", "select_tokens", "estimate_weights", "prune_top_p", "attend_sparse", "decode_attention")
# Without a C++ kernel: the reference serves a CPU, Triton a GPU.
STAGED_OPS = ("decode_attention_hot",)


def operator(op: str) -> Operator:
    """An operator by name."""
    return importlib.import_module(f"{__name__}.{op}").OPERATOR
