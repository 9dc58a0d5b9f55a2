"""The compiled modules: whether they were built, whether they load here, and what it costs where one does not serve.

Needs the standard library only, because setup.py says the same things when it builds.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

# From the most to the least demanding; setup.py builds one module for each that it is asked for.
CPU_CAPABILITIES = ("avx512", "avx2", "default")
CPU_MODULES = tuple(f"_C_{capability}" for capability in CPU_CAPABILITIES)
CUDA_MODULE = "_C_cuda"

# Written beside this file by a build: {module: why it was not built}; EVERY stands for all of them.
RECORD = "native_build.json"
EVERY = "every module"

# A token of a small model on two cores; layer calls of bench/results/h200_decode_attention.jsonl.
COSTS = {
    "cpu": "CPU calls run on plain PyTorch: about 16 times a token was measured",
    "cuda": "calls on sm_90 GPUs run on Triton stages: 1.2 to 2.4 times a layer call was measured",
}
MEND = "with torch, a C++ compiler and, for a GPU, nvcc installed, in the source folder: " + (
    "TWILIGHT_NATIVE=required pip install --no-build-isolation --no-deps --force-reinstall ."
)


def costs(module: str) -> str:
    """What is lost without a module, or without any."""
    if module == EVERY:
        return "; ".join(COSTS.values())
    return COSTS["cuda" if module == CUDA_MODULE else "cpu"]


def notice(reasons: dict[str, str]) -> str:
    """One line for people: what is missing and why, what it costs and how to mend it."""
    missing = "; ".join(f"{module}: {reason}" for module, reason in reasons.items())
    lost = "; ".join(dict.fromkeys(costs(module) for module in reasons))
    return f"twilight_ops: native kernels are missing ({missing}). {lost}. To build them, {MEND}"


@functools.cache
def _record() -> dict[str, str]:
    path = Path(__file__).with_name(RECORD)
    return json.loads(path.read_text()) if path.exists() else {}


def full_name(module: str) -> str:
    """A module's name for imports. A build for the Hugging Face Hub is one module, named as its namespace, and loaded already."""
    ours = sys.modules.get(f"{__package__}._ops")
    hub = f"{__package__}.{ours.ops.name}" if ours else ""
    stands_for = CUDA_MODULE if "_cuda_" in hub else CPU_MODULES[-1]
    return hub if module == stands_for and hub in sys.modules else f"{__package__}.{module}"


def is_built(module: str) -> bool:
    """Whether a module lies beside this file, or was loaded in its place."""
    name = full_name(module)
    return name in sys.modules or PathFinder.find_spec(name, [str(Path(__file__).parent)]) is not None


def why_not_built(module: str) -> str:
    reason = _record().get(module) or _record().get(EVERY)
    return f"was not built ({reason})" if reason else "was not built"


def library() -> str:
    """The file of the native CPU kernels in use, for processes without this package (`examples/export.py`).

    Raises:
        RuntimeError: there are none.
    """
    for name in CPU_MODULES:
        module = sys.modules.get(full_name(name))
        if module is not None and module.__file__ is not None:
            return module.__file__
    raise RuntimeError(f"native library: expected one of {', '.join(CPU_MODULES)} to be loaded, got none")


@functools.cache
def load(module: str) -> str:
    """Loads a module, which registers its kernels; returns why it could not be loaded, "" where it was."""
    if not is_built(module):
        return why_not_built(module)
    try:
        importlib.import_module(full_name(module))
    except (ImportError, OSError) as error:  # another ABI, a missing library: the other kernels serve
        return f"does not load: {' '.join(str(error).split())}"
    return ""


def warner(reasons: dict[str, str]) -> Callable[[], None]:
    """A function whose first call warns that modules are missing; later calls do nothing."""

    @functools.cache
    def warn() -> None:
        warnings.warn(notice(reasons), stacklevel=3)

    return warn
