"""Shadow prefix: the leading channels of the 4-bit K shadow score every token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .._settings import integer, normalise, number, optional, path, share, tokens
from ..arguments import Candidates
from ..layer import Selector
from . import _channels
from ._channels import MIN_TOKENS, channel_order, shortest_prefix
from ._paged import allocate_means


@dataclass(frozen=True)
class ShadowPrefix(Selector):
    """Token-granular selection that needs no metadata beyond the pruner's own shadow, and for two levels the means of its pages.

    Channels are ordered by mean |q_d| |k_d|, keys less their centre, and each KV head's prefix is the shortest that loses at most `tau`
    of true attention mass at the budget, both calibrated from the first prompt that fills the cache, or loaded from a file.

    Args:
        token_budget: floor of the budget in tokens.
        budget_fraction: candidates as a share of the live length.
        tau: largest share of attention mass that the worst query head of a KV head may lose to its prefix.
        page_fraction: share of the pages whose tokens are scored, 0 < page_fraction <= 1: those with the best prefix scores of their 4-bit
            means, and at least as many as hold the budget or `min_scored_tokens`. 1 scores every token, and no means are kept.
        min_scored_tokens: floor of the tokens that are scored: up to it, all of them.
        prefix_channels: a fixed prefix for every KV head, a multiple of 8, instead of the calibrated one.
        calibration: path of a file written by `python -m twilight_ops calibrate`; None takes TwilightConfig's, and where it has none
            calibrates from the prompt.
    """

    # An eighth of a short context is too few: SmolLM2, 4k tokens, eight documents: KL .0111 and +1.7% perplexity with a floor of 512,
    # .0067 and +.8% with 768, .0045 and +.6% with 1024, for 11.5, 13.8 and 15.9% of the bytes. From 6k tokens on it changes nothing.
    token_budget: int = 768
    budget_fraction: float = 0.125
    # Pages pay where a context is long. SmolLM2, 7.5k tokens, eight documents: KL .0080 without, .0099 with half of them, .0192 with a
    # quarter. Qwen2.5, 31k tokens, a quarter: .0034 without, .0046 with, for .69 of the bytes.
    page_fraction: float = 0.25
    min_scored_tokens: int = 8192
    tau: float = 0.03
    prefix_channels: int | None = None
    calibration: str | None = None

    name: ClassVar[str] = "shadow_prefix"
    kernel: ClassVar[str] = "shadow_prefix"
    uses_shadow: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(
            self,
            page_fraction=share(),
            min_scored_tokens=tokens(0),
            tau=number(above=0.0, below=1.0),
            prefix_channels=optional(integer(8, multiple_of=8)),
            calibration=optional(path),
        )

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        integer(8, layer.head_dim, multiple_of=8)(type(self).__name__, "prefix_channels", self.prefix_channels or layer.head_dim)
        if self.page_fraction < 1.0:
            layer.means = allocate_means(layer)
        return {}

    def reset(self, layer) -> None:
        """The fixed prefix, where there is one, instead of a file's or the whole row."""
        if self.prefix_channels is not None:
            layer.shadow.prefix_channels.fill_(self.prefix_channels)

    def calibrate(self, q: Tensor, k: Tensor, layer, positions: Tensor | None, sm_scale: float) -> None:
        """Orders channels by mean |q_d| |k_d| and finds the shortest prefix, unless it is fixed or a file brings both."""
        if layer.plan.calibration is not None or k.shape[1] < MIN_TOKENS:
            return
        center = layer.shadow.k_center
        order = channel_order(q, k, positions, center)
        layer.shadow.channel_order.copy_(order)
        if self.prefix_channels is None:
            budget = (self.token_budget, self.budget_fraction, self.tau, sm_scale)
            layer.shadow.prefix_channels.copy_(shortest_prefix(q, k, positions, center, order, *budget))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        return _channels.propose(q, layer, page_table, seq_lens, sm_scale)

    def scan_bytes(self, layer, tokens) -> list[float]:
        return _channels.scan_bytes(layer, tokens)

    def estimate_bytes(self, layer) -> list[float]:
        return _channels.estimate_bytes(layer)
