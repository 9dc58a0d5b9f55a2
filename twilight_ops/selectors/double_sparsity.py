"""Double Sparsity: scores every token with a small cache of its heavy channels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import calibration
from .._settings import integer, normalise, one_of, optional, path
from ..arguments import Candidates
from ..layer import Selector, stored_bytes
from ..reference._top_k import group_scores
from . import _channels
from ._paged import allocate_rows, read_rows, write_rows
from ._rank import best_tokens, group_query, live_tokens, real_rows


@dataclass(frozen=True)
class DoubleSparsity(Selector):
    """Token-granular selection from labels: each key's `heavy_channels` components with the largest mean |q_d| times mean |k_d|.

    Args:
        token_budget, budget_fraction: see `Selector`; Twilight's settings are 8192 tokens or a quarter of the context.
        heavy_channels: r a KV head; the paper's is D / 8 to D / 4.
        label_dtype: "int4", as the paper's label cache: the leading channels of the layer's own 4-bit shadow, which the kernels scan; its
            scale is of the whole key. "model" (K's dtype) and "int8" (one scale a token and head) are a cache of their own, scored in plain
            PyTorch for comparison.
        calibration: path of a file written by `python -m twilight_ops calibrate`, as the paper does offline; None takes
            TwilightConfig's, and where it has none the channels of the first prompt.

    Source: Double Sparsity, arXiv 2408.07092.
    """

    token_budget: int = 8192
    heavy_channels: int = 16
    label_dtype: str = "int4"
    calibration: str | None = None

    name: ClassVar[str] = "double_sparsity"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, label_dtype=one_of("int4", "int8", "model"), calibration=optional(path))
        normalise(self, heavy_channels=integer(8, multiple_of=8) if self.uses_shadow else integer(1))

    @property
    def uses_shadow(self) -> bool:  # type: ignore[override]
        return self.label_dtype == "int4"

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return "shadow_prefix" if self.uses_shadow else "given"

    def reset(self, layer) -> None:
        if self.uses_shadow:
            layer.shadow.prefix_channels.fill_(min(self.heavy_channels, layer.head_dim))

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        if self.uses_shadow:
            return {}
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        heavy, int8 = min(self.heavy_channels, head_dim), self.label_dtype == "int8"
        # Until the first prompt calibrates them; a file decides them for good.
        order = torch.arange(head_dim).expand(kv_heads, -1)
        if layer.plan.calibration is not None:
            order = calibration.load(layer.plan.calibration, layer.index, kv_heads, head_dim).channel_order
        state = {
            "heavy_channels": order[:, :heavy].int().contiguous().to(layer.kv.k_cache.device),  # [Hkv, r]
            "labels": allocate_rows(layer, heavy, torch.int8 if int8 else layer.dtype),
        }
        if int8:
            state["label_scale"] = allocate_rows(layer, 1, torch.bfloat16)
        return state

    def calibrate(self, q: Tensor, k: Tensor, layer, positions: Tensor | None, sm_scale: float) -> None:
        if layer.plan.calibration is not None:
            return
        real = real_rows(k, positions)
        query = group_query(q, k.shape[2]).abs().sum(3) * real
        key = (k.float() - layer.shadow.k_center if self.uses_shadow else k.float()).abs() * real
        strength = query.sum(dim=(0, 1)) * key.sum(dim=(0, 1))  # [Hkv, D]
        order = strength.argsort(dim=-1, descending=True)
        if self.uses_shadow:
            layer.shadow.channel_order.copy_(order)
        else:
            heavy = layer.selector_state["heavy_channels"]
            heavy.copy_(order[:, : heavy.shape[1]])

    def append(self, k: Tensor, layer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None) -> None:
        if self.uses_shadow:
            return
        state = layer.selector_state
        channels = state["heavy_channels"].long().expand(*k.shape[:2], -1, -1)
        labels = k.gather(-1, channels)  # [B, T, Hkv, r]
        if "label_scale" in state:
            labels = labels.float()
            scale = (labels.abs().amax(-1, keepdim=True) / 127).bfloat16()
            write_rows(scale, state["label_scale"], page_table, seq_lens, positions)
            # Codes are computed with the rounded scale; a row of zeros has none.
            labels = (labels / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().nan_to_num(nan=127.0).clamp(-127, 127)
        write_rows(labels, state["labels"], page_table, seq_lens, positions)

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        if self.uses_shadow:
            return _channels.propose(q, layer, page_table, seq_lens, sm_scale)
        state = layer.selector_state
        query = group_query(q, layer.num_kv_heads)  # [B, T, Hkv, G, D]
        channels = state["heavy_channels"].long()[:, None].expand(*query.shape[:-1], -1)
        labels = read_rows(state["labels"], page_table).float()  # [B, Hkv, N, r]
        logits = torch.einsum("bthgr,bhnr->bthgn", query.gather(-1, channels), labels) * sm_scale
        if "label_scale" in state:
            logits = logits * read_rows(state["label_scale"], page_table)[..., 0][:, None, :, None]
        live = live_tokens(seq_lens, labels.shape[1], labels.shape[2])
        return best_tokens(group_scores(logits, live), live, layer, page_table, seq_lens, q.shape[1])

    def scan_bytes(self, layer, tokens) -> list[float]:
        if self.uses_shadow:
            return _channels.scan_bytes(layer, tokens)
        state = layer.selector_state
        names = [name for name in ("labels", "label_scale") if name in state]
        return [float(sum(state[name].shape[3] * stored_bytes(state[name]) for name in names))] * layer.num_kv_heads

    def estimate_bytes(self, layer) -> list[float]:
        return _channels.estimate_bytes(layer) if self.uses_shadow else super().estimate_bytes(layer)
