"""TidalDecode: a few layers select, all others reuse their list."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import each, flag, integer, normalise
from ..arguments import Candidates
from ..layer import Selector, stored_bytes
from ..reference._top_k import group_scores
from ._paged import allocate_rows, physical_pages, read_rows
from ._rank import best_tokens, exact_logits


@dataclass(frozen=True)
class Tidal(Selector):
    """Position-persistent selection: `selection_layers` attend to everything and rank it, the layers above reuse the best tokens.

    The list travels as one flag a token and KV head in a tensor shared by all layers, so a physical page must belong to one
    sequence.

    Args:
        token_budget, budget_fraction: see `Selector`; the paper keeps 256 to 1024 tokens.
        selection_layers: layer indices; the paper's are the first sparse layer and one in the middle (13 of 32).
        across_heads: rank by the sum over all heads of the layer instead of a group's, one list for all KV heads.

    Source: TidalDecode, arXiv 2410.05076.
    """

    token_budget: int = 512
    selection_layers: tuple[int, ...] = (2, 13)
    across_heads: bool = True

    name: ClassVar[str] = "tidal"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, selection_layers=each(integer(0)), across_heads=flag)

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        if previous is not None and "tidal_selected" in previous.selector_state:
            return {"tidal_selected": previous.selector_state["tidal_selected"]}
        if layer.index not in self.selection_layers:
            raise ValueError(
                f"Tidal: selection_layers: expected the first sparse layer, {layer.index}, among them, got {self.selection_layers}"
            )
        return {"tidal_selected": allocate_rows(layer, 1, torch.bool)}

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        flags = layer.selector_state["tidal_selected"]  # [P + 1, Hkv, S, 1]
        pages, _, page_size, _ = layer.kv.k_cache.shape
        if layer.index not in self.selection_layers:
            selected = read_rows(flags, page_table)[..., 0]  # [B, Hkv, N]
            return best_tokens(selected.float(), selected, layer, page_table, seq_lens, q.shape[1])
        logits, live = exact_logits(q, layer, page_table, seq_lens, sm_scale)
        scores = group_scores(logits, live)
        if self.across_heads:
            scores = scores.sum(1, keepdim=True).expand_as(scores)
        best = best_tokens(scores, live, layer, page_table, seq_lens, q.shape[1])
        # One slot more, where the pads of the list land.
        selected = torch.zeros(*scores.shape[:2], scores.shape[2] + 1, dtype=torch.bool, device=q.device)
        assert best.indices is not None
        slots = torch.where(best.indices >= 0, best.indices.long(), scores.shape[2])
        selected = selected.scatter(2, slots, torch.ones_like(slots, dtype=torch.bool))[..., :-1]
        by_page = selected.unflatten(2, (-1, page_size)).transpose(1, 2)  # [B, M, Hkv, S]
        flags[physical_pages(page_table, pages)] = by_page[..., None]
        return Candidates()

    def scan_bytes(self, layer, tokens) -> list[float]:
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        # A selecting layer that is not pruned ranks with the logits its own attention needs anyway.
        scans = layer.index in self.selection_layers and layer.plan.prunes
        return [float(head_dim * stored_bytes(layer.kv.k_cache) if scans else 0)] * kv_heads
