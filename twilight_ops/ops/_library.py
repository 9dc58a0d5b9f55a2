"""The `twilight` operator library: schemas and fakes live in Python, kernels are attached per backend.

Schemas stay in Python because tags on a schema need libtorch 2.12 from C++, and we support 2.11.
"""

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("twilight", "DEF")

# Inductor must hand over tensors with the strides that eager would have given them: q, k and v arrive as transposed
# views of a projection and every kernel reads strides, so no copy is ever needed.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


def define(schema: str, fake: Callable) -> None:
    """Registers one schema with its fake implementation, which also validates the arguments at trace time."""
    LIBRARY.define(schema, tags=_TAGS)
    name = schema.split("(", 1)[0].strip()
    torch.library.register_fake(f"twilight::{name}", fake, lib=LIBRARY)
