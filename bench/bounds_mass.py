"""What 8-bit page bounds cost Quest: the true attention mass in the pages it selects, against bounds in K's own type.

A real model reads prose with exact attention; at every step and layer both bounds select pages for the same query.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from twilight_ops import Quest, TwilightConfig, ops
from twilight_ops.cli.models import add_model_arguments, load_model
from twilight_ops.evaluation.mass import exact_weights
from twilight_ops.evaluation.prefill import cache_of, record
from twilight_ops.integration.hf.generate import cache_argument

PROSE = Path(__file__).resolve().parents[1] / "twilight_ops" / "data" / "prose"
SHARES = (16, 8, 4)  # budgets: a page at least, and 1/16, 1/8, 1/4 of the context


def page_bounds(layer, page_table: Tensor, seq_lens: Tensor) -> Tensor:
    """(min, max) of the live keys of every page of one sequence, [P, Hkv, 2, D] in K's type."""
    keys = layer.k_cache  # [P, Hkv, S, D]
    bounds = torch.stack([keys.amin(2), keys.amax(2)], 2)
    last, slots = divmod(int(seq_lens[0]) - 1, keys.shape[2])
    newest = keys[page_table[0, last], :, : slots + 1]
    bounds[page_table[0, last]] = torch.stack([newest.amin(1), newest.amax(1)], 1)
    return bounds


class BoundsProbe:
    """Sums of captured mass by (share, kind of bounds), one row a query head, sparse layer and step."""

    def __init__(self) -> None:
        self.mass: Counter[tuple[int, str]] = Counter()
        self.rows = 0

    def look(self, q: Tensor, layer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> None:
        """A cache's recorder."""
        if layer.plan.selector is None:
            return
        page_size, kv_heads = layer.k_cache.shape[2], layer.k_cache.shape[1]
        true = exact_weights(q, layer, page_table, seq_lens, sm_scale).unflatten(1, (kv_heads, -1))  # [1, Hkv, G, N]
        kinds = {"8-bit": (layer.page_bounds, layer.bounds_scale), "K's type": (page_bounds(layer, page_table, seq_lens), None)}
        paging = (page_table, seq_lens, page_size)
        for share in SHARES:
            budget = max(page_size, int(seq_lens[0]) // share)
            for kind, bounds in kinds.items():
                pages, _ = ops.select_pages(q, *bounds, *paging, budget, 0.0, sm_scale)
                columns = true.shape[-1] // page_size
                chosen = torch.zeros(*pages.shape[:2], columns + 1).scatter_(2, pages.long().where(pages >= 0, columns), 1.0)[..., :-1]
                self.mass[share, kind] += float((true * chosen.repeat_interleave(page_size, 2)[:, :, None]).sum())
        self.rows += true.shape[1] * true.shape[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_model_arguments(parser, default="smollm2")
    parser.add_argument("--documents", nargs="+", type=Path, default=sorted(PROSE.glob("*.txt"))[:3])
    parser.add_argument("--length", type=int, default=4096, help="tokens of context")
    parser.add_argument("--steps", type=int, default=12, help="teacher-forced tokens a document")
    options = parser.parse_args()
    model, tokenizer, *_ = load_model(options)
    probe = BoundsProbe()
    for document in options.documents:
        ids = torch.tensor(tokenizer(document.read_text())["input_ids"])
        # The bounds are kept, but every step is short enough to be dense: what is measured does not change what is computed.
        config = TwilightConfig(selector=Quest(), top_p=1.0, dense_layers=2, dense_below=1 << 30)
        cache = cache_of(model, config, [record(model, ids[: options.length])], options.steps, probe.look)
        position = cache.live_seq_lens.long()[:, None].clone()
        with torch.no_grad():
            for t in range(options.steps):
                token = ids[None, options.length + t, None]
                model(input_ids=token, position_ids=position + t, use_cache=True, **{cache_argument(model): cache})
    print(f"{len(options.documents)} documents, {options.length} tokens, {options.steps} steps, layers from the third: mean true mass")
    for share in SHARES:
        print(f"1/{share}: " + ", ".join(f"{kind} {probe.mass[share, kind] / probe.rows:.4f}" for kind in ("8-bit", "K's type")))


if __name__ == "__main__":
    main()
