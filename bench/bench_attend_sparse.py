"""twilight::attend_sparse: exact attention on the pruned list, and on everything."""

from __future__ import annotations

import argparse

import runner
from workload import Workload, candidate_lists, shadow_of

from twilight_ops import ops


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    sizes, (_, seq_lens) = data.sizes, data.paging

    def method(name: str, lists: list[tuple], kept: float) -> runner.Method:
        sets = [
            (q, layer.k_cache, layer.v_cache, *data.paging, *listed, data.sm_scale)
            for q, layer, listed in zip(data.queries, data.cache.layers, lists, strict=True)
        ]
        return runner.method_of(name, ops.attend_sparse, sets, sizes.lists * kept * sizes.token_bytes, kept_tokens=kept)

    found = [method("attend_sparse, every token", [(None, None, 1)] * len(data.queries), sizes.length)]
    for name, lists in candidate_lists(data, options.token_budget).items():
        pruned = []
        for q, layer, listed in zip(data.queries, data.cache.layers, lists, strict=True):
            weights = ops.estimate_weights(q, *shadow_of(layer), *data.paging, *listed, data.sm_scale)
            indices, counts, _ = ops.prune_top_p(weights, seq_lens, *listed, sizes.num_kv_heads, options.top_p)
            pruned.append((indices, counts, 1))
        kept = sum(counts.float().mean().item() for _, counts, _ in pruned) / len(pruned)
        found.append(method(f"attend_sparse, pruned {name}", pruned, kept))
    return found


if __name__ == "__main__":
    runner.main(runner.parser(__doc__, lengths=(32768,)).parse_args(), methods, "MB: K and V of the listed tokens")
