"""Every name of PyTorch that this package imports although PyTorch does not promise to keep it. A new PyTorch is mended here.

Without a name of the first block the package cannot be imported, and the error says which one. Without one of the second, steps are
compiled whole instead of in pieces: `MISSING` is the reason, which `compile_regions` warns with.
"""

# ruff: noqa: F401
import torch

try:
    from torch import _assert_async as assert_async  # a check of lengths that a GPU does not wait for
    from torch._C import _set_grad_enabled as set_grad_enabled  # how a traced step switches gradients
    from torch._dynamo import mark_static_address  # inputs that CUDA graphs need not copy
    from torch._dynamo.backends.registry import lookup_backend  # inductor, as a backend that another one calls
    from torch._dynamo.exc import TorchDynamoException  # a step that cannot be traced is decoded eagerly
    from torch._dynamo.utils import counters  # graph breaks, for `Generation`
    from torch._ops import OpOverload  # operators whose schema says what they write to
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass  # writes; sharded and quantised tensors
except ImportError as error:
    raise ImportError(
        f"twilight_ops.integration: torch: expected a version with the names that {__name__} imports, got {torch.__version__}: {error}"
    ) from error

try:
    from torch._guards import TracingContext, tracing  # guards of a piece are not those of the step
    from torch._subclasses import FakeTensorMode  # shapes, aliases and writes of a step, without running it
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # which a FakeTensorMode wants

    MISSING = None
except ImportError as error:
    FakeTensorMode = ShapeEnv = TracingContext = tracing = None
    MISSING = error


def symmetric_memory():
    """Memory of a GPU that the others of its host read; imported by those alone who have several."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory
