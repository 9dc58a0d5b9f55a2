"""The protocol of a selector: anything that proposes candidates for the pruner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from torch import Tensor

from .._settings import normalise, number, tokens

if TYPE_CHECKING:
    from ..paged_kv_cache import PagedKVLayer


class Candidates(NamedTuple):
    """An ascending list a KV head; `indices` and `counts` None stands for every token."""

    indices: Tensor | None  # [B, Hkv, C] int32, -1 pads
    counts: Tensor | None  # [B, Hkv] int32
    tokens_per_index: int  # 1 for tokens, page_size for pages


def stored_bytes(tensor: Tensor) -> int:
    """Bytes an element in a deployed cache: 16 bits for K's dtype, even where a CPU run holds 32."""
    return min(2, tensor.element_size())


@dataclass(frozen=True)
class Selector:
    """Base of all selectors: a frozen record of settings; tensors it needs live in the layer's `selector_state`.

    A selector outside this package subclasses this, sets `name`, and implements `select`; it may add `allocate`, `calibrate` and
    `append`. `append` and `select` run inside the compiled decode step, so they take and return tensors of fixed shape and never read
    a value on the host. A `__post_init__` of its own calls this one, which checks the budgets.

    Args:
        token_budget: candidates in tokens, at least 1.
        budget_fraction: candidates as a share of the live length, 0..1; the larger of the two counts.
    """

    token_budget: int = 1024
    budget_fraction: float = 0.0

    name: ClassVar[str] = ""
    kernel: ClassVar[str] = "given"  # the `selector` argument of decode_attention; "given": `select` is called first
    uses_page_bounds: ClassVar[bool] = False
    uses_shadow: ClassVar[bool] = False  # even where nothing is pruned

    def __post_init__(self) -> None:
        normalise(self, token_budget=tokens(1), budget_fraction=number(0.0, 1.0))

    def allocate(self, layer: PagedKVLayer, previous: PagedKVLayer | None) -> dict[str, Tensor]:
        """Extra tensors of one layer, kept in `layer.selector_state`; addresses never change afterwards.

        `layer.index` is its place in the model; tensors taken over from `previous.selector_state` are shared between the layers.
        """
        return {}

    def calibrate(self, q: Tensor, k: Tensor, layer: PagedKVLayer, positions: Tensor | None, sm_scale: float) -> None:
        """Called once, with the first prompt and before its append; writes `layer.selector_state` in place.

        q [B, T, Hq, D], k [B, T, Hkv, D]; positions [B, T] int32 are -1 for padding, None stands for no padding.
        """

    def append(self, k: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None) -> None:
        """Called after append_kv with the same rows; updates `layer.selector_state` in place."""

    def select(self, q: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        """Proposes candidates for q [B, T, Hq, D].

        The first `layer.plan.sink_tokens` and the newest `max(layer.plan.recent_tokens, T)` tokens belong to them: nothing adds them later.
        """
        raise TypeError(f"{type(self).__name__} does not implement select()")

    def scan_bytes(self, layer: PagedKVLayer) -> list[float]:
        """Bytes a KV head reads for each live token to propose candidates, one entry a head; for reports only, NaN where unknown."""
        return [float("nan")] * layer.k_cache.shape[1]
