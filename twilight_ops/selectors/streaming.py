"""StreamingLLM: the first tokens and a sliding window, whatever the query."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._settings import normalise, tokens
from ..arguments import Candidates
from ..layer import Selector
from ..reference._window import sinks_and_window


@dataclass(frozen=True)
class Streaming(Selector):
    """Attention sinks plus the newest tokens; reads nothing to select.

    Args:
        token_budget, budget_fraction: sinks and window together, in tokens; the paper keeps 4 sinks and a window of 1 to 4 thousand.
        sinks: first tokens of the sequence, within the budget and always kept; the configuration's sink_tokens count if they are more.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    token_budget: int = 1024
    sinks: int = 4

    name: ClassVar[str] = "streaming"
    kernel: ClassVar[str] = "streaming"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, sinks=tokens(0))

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        always = layer.policy.always
        always = always._replace(sink_tokens=max(self.sinks, always.sink_tokens))
        layer.policy = layer.policy._replace(always=always)
        return {}

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        limits, budget = layer.limits(page_table, q.shape[1]), layer.policy.budget
        return Candidates(*sinks_and_window(seq_lens, layer.num_kv_heads, limits, budget.head_token_budget))

    def scan_bytes(self, layer, tokens) -> list[float]:
        return [0.0] * layer.num_kv_heads
