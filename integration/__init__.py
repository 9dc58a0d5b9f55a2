"""Hugging Face transformers: the cache, the registered attention `attn_implementation="twilight"`, and a generation loop."""

from .cache import TwilightCache
from .cuda_graph import CapturedStep
from .generate import Decoder, Generation, Sampling, generate
from .rewrites import join_linears
from .transformers import twilight_attention

__all__ = ["CapturedStep", "Decoder", "Generation", "Sampling", "TwilightCache", "generate", "join_linears", "twilight_attention"]
