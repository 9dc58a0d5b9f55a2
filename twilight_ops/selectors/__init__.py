"""Selectors, one file each; `twilight_ops/layer.py` has their protocol. Adding one touches this list and no other file."""

from ..arguments import Candidates
from ..layer import Selector
from .double_sparsity import DoubleSparsity
from .full import Full
from .magicpig import MagicPig
from .page_mean import PageMean
from .quest import Quest
from .shadow_prefix import ShadowPrefix
from .sparq import SparQ
from .streaming import Streaming
from .tidal import Tidal

DEFAULT = ShadowPrefix  # of TwilightConfig

__all__ = [
    "DEFAULT",
    "Candidates",
    "DoubleSparsity",
    "Full",
    "MagicPig",
    "PageMean",
    "Quest",
    "Selector",
    "ShadowPrefix",
    "SparQ",
    "Streaming",
    "Tidal",
]
