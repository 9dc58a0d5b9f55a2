"""The `twilight` operator library: schemas and fakes live in Python, kernels are attached per backend.

Schemas stay in Python because tags on a schema need libtorch 2.12 from C++, and we support 2.11.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._checks import NO_BACKWARD

LIBRARY = torch.library.Library("twilight", "DEF")

# Inductor must hand over tensors with the strides that eager would have given them: q, k and v arrive as transposed
# views of a projection and every kernel reads strides, so no copy is ever needed.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def define(schema: str, fake: Callable[..., Any]) -> None:
    """Registers one schema with its fake implementation, which also validates the arguments at trace time."""
    LIBRARY.define(schema, tags=_TAGS)
    name = schema.split("(", 1)[0].strip()
    torch.library.register_fake(f"twilight::{name}", fake, lib=LIBRARY)


def _first_requiring_grad(tensors: list[Tensor]) -> int:
    """Index of the first tensor that asks for a gradient, or -1."""
    return next((i for i, tensor in enumerate(tensors) if tensor.requires_grad), -1)


# The stable ABI cannot ask a tensor: the C++ kernels call this, and only while gradients are enabled.
LIBRARY.define("_first_requiring_grad(Tensor[] tensors) -> int")
LIBRARY.impl("_first_requiring_grad", _first_requiring_grad, "CompositeExplicitAutograd")


def call(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """`op(*arguments)`; under `torch.func` only a wrapper knows that a gradient is asked for, and no kernel sees it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for argument, value in zip(op._schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                name = op._schema.name
                raise RuntimeError(f"{name}: {argument.name}: expected {NO_BACKWARD[0]}, got {NO_BACKWARD[1]}")
    return op(*arguments)
