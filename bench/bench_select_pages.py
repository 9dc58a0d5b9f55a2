"""twilight::select_pages: Quest's scan of 8-bit page bounds."""

from __future__ import annotations

import argparse

import runner
from workload import Workload

from twilight_ops import ops


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    sizes = data.sizes
    rest = (*data.paging, sizes.page_size, options.token_budget, 0.0, data.sm_scale)
    sets = [(q, layer.page_bounds, layer.bounds_scale, *rest) for q, layer in zip(data.queries, data.cache.layers, strict=True)]
    return [runner.method_of("select_pages", ops.select_pages, sets, sizes.bounds_bytes())]


if __name__ == "__main__":
    runner.main(runner.parser(__doc__, lengths=(32768,)).parse_args(), methods, "MB: the bounds of all live pages")
