"""Select-then-Prune sparse attention for decoding: registers `torch.ops.twilight.*`."""

from . import backends
from .arguments import (
    KV,
    Always,
    Budget,
    Candidates,
    HotRows,
    Observation,
    PageBounds,
    PageLevel,
    PageMeans,
    Paging,
    Policy,
    Pruning,
    Scales,
    Shadow,
)
from .config import LayerOverride, TwilightConfig
from .explanation import Explanation, explain
from .layer import PagedKVLayer, Selector
from .ops.append_kv import append_kv
from .ops.attend_sparse import attend_sparse
from .ops.decode_attention import decode_attention
from .ops.decode_attention_hot import decode_attention_hot
from .ops.estimate_weights import estimate_weights
from .ops.prune_top_p import prune_top_p
from .ops.select_pages import select_pages
from .ops.select_tokens import select_tokens
from .paged_kv_cache import PagedKVCache
from .presets import ada_kv, duo_attention, pyramid_kv
from .report import BudgetLog, BudgetReport, budget_report
from .selectors import DoubleSparsity, Full, MagicPig, PageMean, Quest, ShadowPrefix, SparQ, Streaming, Tidal

__version__ = "0.2.0"

__all__ = [
    "Always",
    "Budget",
    "BudgetLog",
    "BudgetReport",
    "Candidates",
    "DoubleSparsity",
    "Explanation",
    "Full",
    "HotRows",
    "KV",
    "LayerOverride",
    "MagicPig",
    "Observation",
    "PageBounds",
    "PageLevel",
    "PageMean",
    "PageMeans",
    "PagedKVCache",
    "PagedKVLayer",
    "Paging",
    "Policy",
    "Pruning",
    "Quest",
    "Scales",
    "Selector",
    "Shadow",
    "ShadowPrefix",
    "SparQ",
    "Streaming",
    "Tidal",
    "TwilightConfig",
    "ada_kv",
    "append_kv",
    "attend_sparse",
    "backends",
    "budget_report",
    "decode_attention",
    "decode_attention_hot",
    "duo_attention",
    "estimate_weights",
    "explain",
    "prune_top_p",
    "pyramid_kv",
    "select_pages",
    "select_tokens",
]
