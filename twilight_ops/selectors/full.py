"""Every token is a candidate: the pruner alone decides."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Candidates, Selector


@dataclass(frozen=True)
class Full(Selector):
    """No selection; the INT4 estimate reads the whole shadow. The accuracy ceiling of the method."""

    name: ClassVar[str] = "full"
    kernel: ClassVar[str] = "full"

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        return Candidates(None, None, 1)

    def scan_bytes(self, layer) -> list[float]:
        return [0.0] * layer.k_cache.shape[1]
