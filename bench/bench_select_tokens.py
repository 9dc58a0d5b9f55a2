"""twilight::select_tokens: the scan of the shadow's leading channels."""

from __future__ import annotations

import argparse

import runner
from workload import Workload, shadow_of

from twilight_ops import ops


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    rest = (*data.paging, options.token_budget, 0.0, data.sm_scale)
    sets = [(q, *shadow_of(layer), *rest) for q, layer in zip(data.queries, data.cache.layers, strict=True)]
    moved = data.sizes.prefix_bytes(data.prefix_channels)
    return [runner.method_of("select_tokens", ops.select_tokens, sets, moved, prefix_channels=data.prefix_channels)]


if __name__ == "__main__":
    notes = "prefix: a quarter of the channels; MB: their codes with scale and zero"
    runner.main(runner.parser(__doc__, lengths=(32768,)).parse_args(), methods, notes)
