"""The namespace of the operators, which this file alone names for Python, as csrc/namespace.h does for C++.

A build for the Hugging Face Hub has a module of its own in this one's place, whose namespace no other build has.
"""

import torch

ops = torch.ops.twilight


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's name in the dispatcher."""
    return f"{ops.name}::{op_name}"
