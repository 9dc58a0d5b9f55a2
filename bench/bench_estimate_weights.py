"""twilight::estimate_weights: 4-bit estimates of every token, of selected pages and of selected tokens."""

from __future__ import annotations

import argparse

import runner
import torch
from workload import Workload, candidate_lists, shadow_of

from twilight_ops import ops


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    sizes = data.sizes
    found = []
    for name, lists in candidate_lists(data, options.token_budget).items():
        sets = [
            (q, *shadow_of(layer), *data.paging, *listed, data.sm_scale)
            for q, layer, listed in zip(data.queries, data.cache.layers, lists, strict=True)
        ]
        indices, _, unit = lists[0]
        candidates = sizes.length if indices is None else min(sizes.length, indices.shape[2] * unit)
        weights = sizes.batch * sizes.query_tokens * sizes.num_qo_heads * candidates * torch.float32.itemsize
        moved = sizes.lists * candidates * sizes.shadow_token_bytes + weights
        found.append(runner.method_of(f"estimate_weights, {name}", ops.estimate_weights, sets, moved, candidates=candidates))
    return found


if __name__ == "__main__":
    notes = "MB: the candidates' codes, scales and zeros, and the fp32 weights written"
    runner.main(runner.parser(__doc__, lengths=(32768,)).parse_args(), methods, notes)
