"""Selectors, one file each. `base.Selector` is the protocol; adding one touches no other file."""

from .base import Candidates, Selector
from .double_sparsity import DoubleSparsity
from .full import Full
from .magicpig import MagicPig
from .quest import Quest
from .shadow_prefix import ShadowPrefix
from .sparq import SparQ
from .streaming import Streaming
from .tidal import Tidal

__all__ = ["Candidates", "DoubleSparsity", "Full", "MagicPig", "Quest", "Selector", "ShadowPrefix", "SparQ", "Streaming", "Tidal"]
