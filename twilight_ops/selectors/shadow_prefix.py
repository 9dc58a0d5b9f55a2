"""Shadow prefix: the leading channels of the 4-bit K shadow score every token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import calibration
from .._settings import integer, normalise, number, optional, path
from ..arguments import Candidates, Paging
from ..layer import Selector, stored_bytes
from ..ops.select_tokens import select_tokens
from ._channels import MIN_TOKENS, channel_order, shortest_prefix


@dataclass(frozen=True)
class ShadowPrefix(Selector):
    """Token-granular selection that needs no metadata beyond the pruner's own shadow.

    Channels are ordered by mean |q_d| |k_d| and each KV head's prefix is the shortest that loses at most `tau` of true attention
    mass at the budget, both calibrated from the first prompt that fills the cache, or loaded from a file.

    Args:
        token_budget: floor of the budget in tokens.
        budget_fraction: candidates as a share of the live length.
        tau: largest share of attention mass that the worst query head of a KV head may lose to its prefix.
        prefix_channels: a fixed prefix for every KV head, a multiple of 8, instead of the calibrated one.
        calibration: path of a file written by `python -m twilight_ops calibrate`; None calibrates from the prompt.
    """

    # An eighth of a short context is too few: SmolLM2, 4k tokens, eight documents: KL .0111 and +1.7% perplexity with a floor of 512,
    # .0067 and +.8% with 768, .0045 and +.6% with 1024, for 11.5, 13.8 and 15.9% of the bytes. From 6k tokens on it changes nothing.
    token_budget: int = 768
    budget_fraction: float = 0.125
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
            tau=number(above=0.0, below=1.0),
            prefix_channels=optional(integer(8, multiple_of=8)),
            calibration=optional(path),
        )

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        integer(8, layer.head_dim, multiple_of=8)(type(self).__name__, "prefix_channels", self.prefix_channels or layer.head_dim)
        return {}

    def reset(self, layer) -> None:
        """The order and prefix of the file, else identity and the fixed prefix or the whole row."""
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        if self.calibration is not None:
            order, prefix = calibration.load(self.calibration, layer.index, kv_heads, head_dim, layer.shard)
        else:
            order, prefix = torch.arange(head_dim).expand(kv_heads, -1), torch.full((kv_heads,), head_dim)
        if self.prefix_channels is not None:
            prefix = torch.full_like(prefix, self.prefix_channels)
        layer.shadow.channel_order.copy_(order)
        layer.shadow.prefix_channels.copy_(prefix)

    def calibrate(self, q: Tensor, k: Tensor, layer, positions: Tensor | None, sm_scale: float) -> None:
        """Orders channels by mean |q_d| |k_d| and finds the shortest prefix, unless it is fixed or a file brings both."""
        if self.calibration is not None or k.shape[1] < MIN_TOKENS:
            return
        order = channel_order(q, k, positions)
        layer.shadow.channel_order.copy_(order)
        if self.prefix_channels is None:
            budget = (self.token_budget, self.budget_fraction, self.tau, sm_scale)
            layer.shadow.prefix_channels.copy_(shortest_prefix(q, k, positions, order, *budget))

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        policy = layer.policy
        return Candidates(*select_tokens(q, layer.shadow, Paging(page_table, seq_lens), policy.budget, sm_scale, policy.always))

    def scan_bytes(self, layer) -> list[float]:
        scale = 2 * stored_bytes(layer.shadow.k_scale)
        return [channels / 2 + scale for channels in layer.shadow.prefix_channels.tolist()]

    def estimate_bytes(self, layer) -> list[float]:
        # The scan has read the prefix and the scale.
        return [(layer.head_dim - channels) / 2 for channels in layer.shadow.prefix_channels.tolist()]
