"""Select-then-Prune sparse attention for decoding: registers `torch.ops.twilight.*`."""

from . import backends, ops
from .config import LayerOverride, TwilightConfig
from .explain import Explanation, explain
from .ops import append_kv, attend_sparse, decode_attention, estimate_weights, prune_top_p, select_pages, select_tokens
from .paged_kv_cache import PagedKVCache, PagedKVLayer
from .presets import ada_kv, duo_attention, pyramid_kv
from .selectors import DoubleSparsity, Full, MagicPig, Quest, Selector, ShadowPrefix, SparQ, Streaming, Tidal

__version__ = "0.1.0"

__all__ = [
    "DoubleSparsity",
    "Explanation",
    "Full",
    "LayerOverride",
    "MagicPig",
    "PagedKVCache",
    "PagedKVLayer",
    "Quest",
    "Selector",
    "ShadowPrefix",
    "SparQ",
    "Streaming",
    "Tidal",
    "TwilightConfig",
    "ada_kv",
    "append_kv",
    "attend_sparse",
    "backends",
    "decode_attention",
    "duo_attention",
    "estimate_weights",
    "explain",
    "ops",
    "prune_top_p",
    "pyramid_kv",
    "select_pages",
    "select_tokens",
]
