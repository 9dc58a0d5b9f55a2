"""twilight::prune_top_p: top-p of the estimated weights of selected candidates."""

from __future__ import annotations

import argparse

import runner
import torch
from workload import Workload, candidate_lists, shadow_of

from twilight_ops import ops


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    sizes, (_, seq_lens) = data.sizes, data.paging
    found = []
    for name, lists in candidate_lists(data, options.token_budget).items():
        sets = []
        for q, layer, listed in zip(data.queries, data.cache.layers, lists, strict=True):
            weights = ops.estimate_weights(q, *shadow_of(layer), *data.paging, *listed, data.sm_scale)
            sets.append((weights, seq_lens, *listed, sizes.num_kv_heads, options.top_p))
        _, counts, mass = ops.prune_top_p(*sets[0])
        weights = sets[0][0]
        moved = weights.nbytes + sizes.lists * weights.shape[-1] * torch.int32.itemsize
        columns = {"candidates": weights.shape[-1], "kept_tokens": counts.float().mean().item(), "estimated_mass": mass.mean().item()}
        found.append(runner.method_of(f"prune_top_p, {name}", ops.prune_top_p, sets, moved, **columns))
    return found


if __name__ == "__main__":
    runner.main(
        runner.parser(__doc__, lengths=(32768,)).parse_args(), methods, "MB: the fp32 weights read once and the padded list written"
    )
