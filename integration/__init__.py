"""Twilight in inference engines, one folder an engine; `compile` is shared by all.

The names below serve Hugging Face transformers. The first one that is asked for imports transformers and registers
attn_implementation="twilight"; an engine beside it is imported without either.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hf import (
        CapturedStep,
        Decoder,
        Generation,
        LosslessDecoder,
        Sampling,
        Speculation,
        TwilightCache,
        cache_argument,
        generate,
        join_linears,
        twilight_attention,
    )

__all__ = [
    "CapturedStep",
    "Decoder",
    "Generation",
    "LosslessDecoder",
    "Sampling",
    "Speculation",
    "TwilightCache",
    "cache_argument",
    "generate",
    "join_linears",
    "twilight_attention",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".hf", __name__), name)
