"""Hugging Face transformers: the cache, the registered attention `attn_implementation="twilight"`, and a generation loop."""

from ..compile import CapturedStep, join_linears
from .attention import twilight_attention
from .cache import TwilightCache
from .generate import Decoder, Generation, Sampling, cache_argument
from .speculate import LosslessDecoder, Speculation, generate

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
