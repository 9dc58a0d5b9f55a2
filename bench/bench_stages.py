"""Each stage of a decode step on a GPU, by CUDA-graph replay: microseconds a layer call and achieved bytes/s.

A stage runs on what the stage before it gave. The streamed read bandwidth and the dense peers are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import workload
from rich.table import Table
from runner import console_of
from timing import Sizes, environment, replay_us
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from workload import Workload, shadow_of

from twilight_ops import kernels, ops
from twilight_ops.kernels._shadow_logits import shadow_logits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def read_bandwidth(device: str) -> float:
    """GB/s of a reduction over 4 GiB: what streaming reads reach here."""
    buffer = torch.randn(2**30, device=device)
    return buffer.nbytes / statistics.median(replay_us([buffer.sum], 10)) / 1e3


def dense_peers(data: Workload) -> dict[str, list[Callable]]:
    copies = data.dense_copies()

    def call(backend, q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=data.sm_scale, enable_gqa=True)

    def calls(backend):
        return [lambda q=q, k=k, v=v: call(backend, q, k, v) for q, (k, v) in zip(data.queries, copies, strict=True)]

    return {"dense: cuDNN SDPA": calls(SDPBackend.CUDNN_ATTENTION), "dense: torch FA2": calls(SDPBackend.FLASH_ATTENTION)}


def stage_calls(data: Workload, selector: str, budget: int, top_p: float) -> tuple[dict[str, tuple[list[Callable], int, int]], dict]:
    """(calls, least bytes read, least bytes written) of every stage of one selector, and what it selected and kept."""
    sizes, scale = data.sizes, data.sm_scale
    group = sizes.num_qo_heads // sizes.num_kv_heads
    names = ("select", "estimate", "estimate: logits", "prune", "attend", "all ops", "decode_attention")
    calls: dict[str, list[Callable]] = {name: [] for name in names}
    candidates = kept = mass = 0.0
    for q, layer in zip(data.queries, data.cache.layers, strict=True):
        shadow = shadow_of(layer)
        unit = sizes.page_size if selector == "quest" else 1

        def select(q=q, layer=layer, shadow=shadow):
            if selector == "quest":
                return ops.select_pages(q, layer.page_bounds, layer.bounds_scale, *data.paging, sizes.page_size, budget, 0.0, scale)
            return ops.select_tokens(q, *shadow, *data.paging, budget, 0.0, scale)

        def estimate(listed, q=q, shadow=shadow, unit=unit):
            return ops.estimate_weights(q, *shadow, *data.paging, *listed, unit, scale)

        def estimate_logits(listed, q=q, shadow=shadow, unit=unit):
            """What decode_attention runs of this stage: logits with their softmax statistics, not normalised."""
            logits = q.new_empty((*q.shape[:3], listed[0].shape[2] * unit), dtype=torch.float32)
            return shadow_logits(q, *shadow, *data.paging, *listed, unit, scale, logits, prefix=False, dense_below=-1)

        def prune(weights, listed, unit=unit):
            return ops.prune_top_p(weights, data.paging[1], *listed, unit, sizes.num_kv_heads, top_p)

        def attend(pruned, q=q, layer=layer):
            return ops.attend_sparse(q, layer.k_cache, layer.v_cache, *data.paging, *pruned, 1, scale)

        listed = select()
        weights = estimate(listed)
        pruned = prune(weights, listed)
        candidates += listed[1].float().mean().item() * unit
        kept += pruned[1].float().mean().item()
        mass += pruned[2].mean().item()
        calls["select"].append(select)
        calls["estimate"].append(lambda f=estimate, x=listed: f(x))
        calls["estimate: logits"].append(lambda f=estimate_logits, x=listed: f(x))
        calls["prune"].append(lambda f=prune, w=weights, x=listed: f(w, x))
        calls["attend"].append(lambda f=attend, x=pruned[:2]: f(x))

        def all_ops(select=select, estimate=estimate, prune=prune, attend=attend):
            listed = select()
            return attend(prune(estimate(listed), listed)[:2])

        def decode(q=q, layer=layer, shadow=shadow):
            return kernels.STAGES["decode_attention"](
                q,
                layer.k_cache,
                layer.v_cache,
                *shadow[:2],
                layer.page_bounds,
                layer.bounds_scale,
                *shadow[2:],
                *data.paging,
                selector,
                budget,
                0.0,
                top_p,
                scale,
            )

        calls["all ops"].append(all_ops)
        calls["decode_attention"].append(decode)
    sets = len(data.queries)
    candidates, kept, mass = candidates / sets, kept / sets, mass / sets
    lists = sizes.lists
    scan = sizes.bounds_bytes() if selector == "quest" else sizes.prefix_bytes(data.prefix_channels)
    # One fp32 a candidate and query head, which the next stage reads; other outputs are small.
    written = dict.fromkeys(("estimate", "estimate: logits"), round(lists * candidates * group * 4))
    least = {
        "select": scan,
        "estimate": round(lists * candidates * sizes.shadow_token_bytes),
        "prune": round(lists * candidates * group * 4),
        "attend": round(lists * kept * sizes.token_bytes),
    }
    least["all ops"] = least["decode_attention"] = sum(least.values())
    least["estimate: logits"] = least["estimate"]
    stages = {name: (calls[name], least[name], written.get(name, 0)) for name in calls}
    return stages, {"candidates": round(candidates, 1), "kept_tokens": round(kept, 1), "captured_mass": round(mass, 5)}


def row(sizes: Sizes, name: str, us: list[float], moved: int, bandwidth: float, **columns) -> dict:
    median = statistics.median(us)
    return {
        "device": "cuda",
        "shape": sizes.describe(),
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "stage": name,
        "median_us": round(median, 2),
        "spread": round((max(us) - min(us)) / median, 4),
        "bytes": moved,
        "gb_per_s": round(moved / median / 1e3, 1),
        "share_of_read_bandwidth": round(moved / median / 1e3 / bandwidth, 4),
    } | columns


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch", nargs="+", type=int, default=[64, 1])
    p.add_argument("--length", nargs="+", type=int, default=[32768], help="live tokens a sequence")
    p.add_argument("--heads", default="32/8", help="query heads/KV heads")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--page-size", type=int, default=16)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--budgets", nargs="+", default=["quest:8192", "shadow_prefix:8192", "shadow_prefix:4096"], help="selector:tokens")
    p.add_argument("--top-p", type=float, default=0.85)
    p.add_argument("--samples", type=int, default=20)
    p.add_argument("--sets", type=int, default=None, help="buffer sets to rotate; default: 2 at batch 16 and more, else 8")
    p.add_argument("--json", type=Path, default=None, metavar="FILE")
    options = p.parse_args()
    heads, kv_heads = map(int, options.heads.split("/"))
    console = console_of(200)
    where = environment("cuda")
    bandwidth = read_bandwidth("cuda")
    console.print(f"{where['machine']}, torch {where['torch']}, {where['backend']}, streamed reads {bandwidth:,.0f} GB/s")
    console.print(f"data: {workload.ASSUMPTIONS}; CUDA-graph replay, buffer sets in turn; spread = (max - min) / median")
    rows: list[dict] = []
    for batch in options.batch:
        for length in options.length:
            sizes = Sizes(batch, 1, heads, kv_heads, options.head_dim, options.page_size, length, DTYPES[options.dtype])
            data = workload.build(sizes, "cuda", options.sets or (2 if batch >= 16 else 8))
            table = Table(title=str(sizes), title_justify="left")
            for title in (
                "selector",
                "stage",
                "median us",
                "spread",
                "MB",
                "GB/s",
                "of reads",
                "with writes",
                "x best dense",
                "I0",
                "I1",
                "mass",
            ):
                table.add_column(title, no_wrap=True)
            shape_rows = [
                row(sizes, name, replay_us(calls, options.samples), sizes.kv_bytes, bandwidth, selector="")
                for name, calls in dense_peers(data).items()
            ]
            torch.cuda.empty_cache()
            best = min(r["median_us"] for r in shape_rows)
            for setting in options.budgets:
                selector, budget = setting.split(":")
                stages, seen = stage_calls(data, selector, int(budget), options.top_p)
                for name, (calls, read, written) in stages.items():
                    us = replay_us(calls, options.samples)
                    shape_rows.append(row(sizes, name, us, read, bandwidth, written_bytes=written, selector=setting, **seen))
                del stages
                torch.cuda.empty_cache()
            for r in shape_rows:
                r["ratio_to_best_dense"] = round(best / r["median_us"], 3)
                r["read_gb_per_s"] = round(bandwidth, 1)
                table.add_row(
                    r["selector"],
                    r["stage"],
                    f"{r['median_us']:,.1f}",
                    f"{r['spread']:.0%}",
                    f"{r['bytes'] / 1e6:,.1f}",
                    f"{r['gb_per_s']:,.0f}",
                    f"{r['share_of_read_bandwidth']:.0%}",
                    f"{(r['bytes'] + r.get('written_bytes', 0)) / r['median_us'] / 1e3 / bandwidth:.0%}",
                    f"{r['ratio_to_best_dense']:.2f}",
                    *(str(r.get(k, "")) for k in ("candidates", "kept_tokens", "captured_mass")),
                )
            console.print(table)
            rows += shape_rows
            del data
            torch.cuda.empty_cache()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("".join(json.dumps(r | where) + "\n" for r in rows))


if __name__ == "__main__":
    main()
