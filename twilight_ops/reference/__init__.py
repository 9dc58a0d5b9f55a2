"""Plain PyTorch implementation of every operator: the oracle of the tests, and the kernels where nothing is compiled."""

from .append_kv import append_kv
from .attend_sparse import attend_sparse
from .decode_attention import decode_attention
from .estimate_weights import estimate_weights
from .prune_top_p import prune_top_p
from .select_pages import select_pages
from .select_tokens import select_tokens

__all__ = [
    "append_kv",
    "attend_sparse",
    "decode_attention",
    "estimate_weights",
    "prune_top_p",
    "select_pages",
    "select_tokens",
]
