"""A decode step as compiled pieces and as one CUDA graph, whatever model or engine it belongs to."""

from .cuda_graph import CapturedStep
from .regions import compile_regions
from .rewrites import join_linears

__all__ = ["CapturedStep", "compile_regions", "join_linears"]
