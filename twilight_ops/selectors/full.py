"""Every token is a candidate: the pruner alone decides."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..arguments import Candidates
from ..layer import Selector


@dataclass(frozen=True)
class Full(Selector):
    """No selection; the INT4 estimate reads the whole shadow. The accuracy ceiling of the method."""

    name: ClassVar[str] = "full"
    kernel: ClassVar[str] = "full"
    proposes_all: ClassVar[bool] = True

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        return Candidates()

    def scan_bytes(self, layer, tokens) -> list[float]:
        return [0.0] * layer.num_kv_heads
