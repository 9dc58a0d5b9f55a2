"""twilight::append_kv: one decode step's token, and a prompt chunk."""

from __future__ import annotations

import argparse

import runner
from workload import Workload

from twilight_ops import decode_step


def methods(data: Workload, options: argparse.Namespace) -> list[runner.Method]:
    """The newest token, then the first chunk, each written again into every buffer set."""
    sizes, (page_table, seq_lens) = data.sizes, data.paging
    found = []
    for tokens in (1, min(options.chunk, sizes.length)):
        # Overwriting the last tokens with themselves: same pages, same work, nothing changes.
        k, v = (t[:, sizes.length - tokens :] for t in (data.keys, data.values))
        rows = sizes.batch * sizes.num_kv_heads * tokens
        pages = sizes.batch * sizes.num_kv_heads * (-(-tokens // sizes.page_size))
        key_page = sizes.page_size * sizes.token_bytes // 2  # keys that a page's bounds are taken from
        bounds = 2 * sizes.head_dim + 4
        moved = rows * (2 * sizes.token_bytes + sizes.shadow_token_bytes) + pages * (key_page + bounds)
        sets = [(k, v, layer, page_table, seq_lens) for layer in data.cache.layers]
        found.append(runner.method_of(f"append_kv T={tokens}", decode_step.append, sets, moved))
    return found


if __name__ == "__main__":
    cli = runner.parser(__doc__, lengths=(32768,))
    cli.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt chunk")
    runner.main(cli.parse_args(), methods, "MB: rows read and written, shadow, bounds, and the keys of the touched pages")
