"""MagicPIG: tokens whose SimHash codes collide with the query's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .._settings import integer, normalise, refuse
from ..arguments import Candidates
from ..layer import Selector, stored_bytes
from ._paged import allocate_rows, read_rows, write_rows
from ._rank import best_tokens, group_query, real_rows

_ROWS_AT_ONCE = 512  # tokens hashed together: bounds the projections' memory in a prefill


@dataclass(frozen=True)
class MagicPig(Selector):
    """Locality-sensitive hashing: a token is a candidate if at least `min_collisions` of `tables` codes equal the query's.

    A code holds the signs of `hyperplanes` random projections of the key, centred on the first prompt's mean key, because raw keys
    crowd into a cone. The heads of a group share one list: any head's hit counts, ranked by the group's collisions. The paper
    samples and reweights; here the hits are candidates and the attention on them is exact.

    Args:
        token_budget, budget_fraction: most candidates that the list can hold; collisions decide how many there are.
        hyperplanes, tables: K and L; the paper's are 10 and 150.
        min_collisions: the paper's is 2.
        seed: of the hyperplanes.

    Source: MagicPIG, arXiv 2410.16179.
    """

    token_budget: int = 1024
    budget_fraction: float = 0.25
    hyperplanes: int = 10
    tables: int = 150
    min_collisions: int = 2
    seed: int = 0

    name: ClassVar[str] = "magicpig"

    def __post_init__(self) -> None:
        super().__post_init__()
        normalise(self, hyperplanes=integer(1, 15), tables=integer(1), min_collisions=integer(1), seed=integer(0))
        if self.min_collisions > self.tables:
            refuse("MagicPig", "min_collisions", f"1..tables = {self.tables}", self.min_collisions)

    def allocate(self, layer, previous) -> dict[str, Tensor]:
        kv_heads, head_dim = layer.num_kv_heads, layer.head_dim
        device = layer.kv.k_cache.device
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index)
        planes = torch.randn(head_dim, self.tables * self.hyperplanes, generator=generator)
        return {
            "planes": planes.to(device),
            "centre": torch.zeros(kv_heads, head_dim, device=device),
            "codes": allocate_rows(layer, self.tables, torch.int16),
        }

    def calibrate(self, q: Tensor, k: Tensor, layer, positions: Tensor | None, sm_scale: float) -> None:
        real = real_rows(k, positions)
        count = real.expand(k.shape[0], -1, -1, -1).sum().clamp(min=1)
        layer.selector_state["centre"].copy_((k.float() * real).sum(dim=(0, 1)) / count)

    def _codes(self, x: Tensor, planes: Tensor) -> Tensor:
        """[..., D] -> [..., L] int16."""
        bits = (x @ planes > 0).unflatten(-1, (self.tables, self.hyperplanes))
        weights = 2 ** torch.arange(self.hyperplanes, device=x.device)
        return (bits * weights).sum(-1).to(torch.int16)

    def append(self, k: Tensor, layer, page_table: Tensor, seq_lens: Tensor, positions: Tensor | None) -> None:
        state = layer.selector_state
        parts = [self._codes(part.float() - state["centre"], state["planes"]) for part in k.split(_ROWS_AT_ONCE, dim=1)]
        write_rows(torch.cat(parts, dim=1), state["codes"], page_table, seq_lens, positions)

    def select(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> Candidates:
        state = layer.selector_state
        query = self._codes(group_query(q, layer.num_kv_heads), state["planes"])  # [B, T, Hkv, G, L]
        codes = read_rows(state["codes"], page_table)  # [B, Hkv, N, L]
        collisions = (query[..., None, :] == codes[:, None, :, None]).sum(-1)  # [B, T, Hkv, G, N]
        hit = (collisions >= self.min_collisions).any(dim=3).any(dim=1)
        scores = collisions.sum(dim=(1, 3)).float()
        return best_tokens(scores, hit, layer, page_table, seq_lens, q.shape[1])

    def scan_bytes(self, layer, tokens) -> list[float]:
        # As implemented, a scan of all codes; real hash tables read only the buckets hit.
        return [float(self.tables * stored_bytes(layer.selector_state["codes"]))] * layer.num_kv_heads
