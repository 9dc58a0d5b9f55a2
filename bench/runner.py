"""Command line, loop over shapes, table and JSON rows: everything the benches share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import workload
from rich.console import Console
from rich.table import Table
from timing import SAMPLERS, Sizes, environment, measure, write_rows
from workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Method:
    """One thing to time on a workload: `calls` has one entry a buffer set."""

    name: str
    calls: Sequence[Callable]
    # Called after timing: bytes moved a call, and further columns.
    report: Callable[[], tuple[int, dict]] = lambda: (0, {})
    dense_peer: bool = False
    settings: dict = field(default_factory=dict)


def parser(description: str, lengths: Sequence[int]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", choices=sorted(SAMPLERS), default="cpu")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    p.add_argument("--length", nargs="+", type=int, default=list(lengths), help="live tokens a sequence")
    p.add_argument("--batch", nargs="+", type=int, default=[1])
    p.add_argument("--heads", default="32/8", help="query heads/KV heads")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--page-size", type=int, default=16)
    p.add_argument("--query-tokens", type=int, default=1)
    p.add_argument("--token-budget", type=int, default=8192, help="candidates in tokens")
    p.add_argument("--top-p", type=float, default=0.85)
    p.add_argument("--seconds", type=float, default=2.0, help="sampling time a method and shape")
    p.add_argument("--sets", type=int, default=None, help="buffer sets to rotate; default: 1 GiB of K and V, 4 to 64 sets")
    p.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's choice")
    p.add_argument("--json", type=Path, default=None, metavar="FILE", help="write one JSON row a line")
    return p


def shapes(options: argparse.Namespace) -> list[Sizes]:
    heads, kv_heads = map(int, options.heads.split("/"))
    return [
        Sizes(batch, options.query_tokens, heads, kv_heads, options.head_dim, options.page_size, length, DTYPES[dtype])
        for batch in options.batch
        for length in options.length
        for dtype in options.dtype
    ]


def rows_of(sizes: Sizes, methods: Sequence[Method], options: argparse.Namespace) -> list[dict]:
    """Times all methods of one shape."""
    timings = measure({m.name: m.calls for m in methods}, options.device, options.seconds)
    best_dense = min((timings[m.name].median_us for m in methods if m.dense_peer), default=None)
    rows = []
    for method in methods:
        timing = timings[method.name]
        moved, columns = method.report()
        row = {
            "device": options.device,
            "shape": sizes.describe(),
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "method": method.name,
            "median_us": round(timing.median_us, 2),
            "spread": round(timing.spread, 4),
            "p10_us": round(timing.p10_us, 2),
            "p90_us": round(timing.p90_us, 2),
            "runs": timing.runs,
            "bytes": moved,
            "gb_per_s": round(moved / timing.median_us / 1e3, 3),
        }
        if best_dense is not None:
            row["ratio_to_best_dense"] = round(best_dense / timing.median_us, 3)
        rows.append(row | columns | method.settings)
    return rows


_COLUMNS = (
    ("method", "method", "{}"),
    ("median_us", "median us", "{:,.1f}"),
    ("spread", "spread", "{:.0%}"),
    ("bytes", "MB", "{:,.2f}"),
    ("gb_per_s", "GB/s", "{:.1f}"),
    ("ratio_to_best_dense", "x best dense", "{:.2f}"),
    ("candidates", "I0", "{:,.0f}"),
    ("kept_tokens", "I1", "{:,.0f}"),
    ("captured_mass", "mass", "{:.4f}"),
)


def show(console: Console, sizes: Sizes, rows: Sequence[dict]) -> None:
    table = Table(title=str(sizes), title_justify="left")
    columns = [c for c in _COLUMNS if any(c[0] in row for row in rows)]
    for key, title, _ in columns:
        table.add_column(title, justify="left" if key == "method" else "right", no_wrap=True)
    for row in rows:
        values = {**row, "bytes": row["bytes"] / 1e6}
        table.add_row(*(form.format(values[key]) if values.get(key) is not None else "" for key, _, form in columns))
    console.print(table)


def method_of(name: str, call: Callable, sets: Iterable[tuple], moved: int, **columns: object) -> Method:
    """`call(*set)` for each buffer set, with a byte count known beforehand."""
    return Method(name, [partial(call, *buffers) for buffers in sets], lambda: (round(moved), columns))


def main(options: argparse.Namespace, methods: Callable[[Workload, argparse.Namespace], Sequence[Method]], notes: str = "") -> None:
    """Builds each shape's workload, times `methods` on it, prints one table a shape, writes the rows."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    where = environment(options.device)
    console.print(f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {where['backend']}, commit {where['commit']}")
    console.print(f"data: {workload.ASSUMPTIONS}")
    if notes:
        console.print(notes)
    rows: list[dict] = []
    for sizes in shapes(options):
        data = workload.build(sizes, options.device, options.sets)
        total = len(data.queries) * sizes.kv_bytes / 2**20
        console.print(f"{len(data.queries)} buffer sets in turn, {total:,.0f} MiB of K and V; spread = (p90 - p10) / median")
        with torch.inference_mode():
            measured = rows_of(sizes, methods(data, options), options)
        show(console, sizes, measured)
        rows += measured
    if options.json is not None:
        write_rows(options.json, rows, options.device)
        console.print(f"wrote {len(rows)} rows to {options.json}")
