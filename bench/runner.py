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
from timing import SAMPLERS, Sizes, Timing, environment, measure, write_rows
from workload import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What the options mean where they are not given, by device; the GPU's kernels take 16 bits only.
DEVICE_DEFAULTS = {"cpu": {"dtype": ["bf16", "fp32"], "seconds": 2.0}, "cuda": {"dtype": ["bf16"], "seconds": 0.15}}


@dataclass
class Method:
    """One thing to time on a workload: `calls` has one entry a buffer set."""

    name: str
    calls: Sequence[Callable]
    # Called after timing: bytes moved a call, and further columns.
    report: Callable[[], tuple[int, dict]] = lambda: (0, {})
    dense_peer: bool = False
    settings: dict = field(default_factory=dict)
    # What is wrong with an output, or None; nothing is timed while results are wrong.
    check: Callable[[object], str | None] = lambda output: None


def parser(description: str, lengths: Sequence[int]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--device", choices=sorted(SAMPLERS), default="cpu")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=None, help="default: bf16, and fp32 on a CPU")
    p.add_argument("--length", nargs="+", type=int, default=list(lengths), help="live tokens a sequence")
    p.add_argument("--batch", nargs="+", type=int, default=[1])
    p.add_argument("--heads", default="32/8", help="query heads/KV heads")
    p.add_argument("--head-dim", type=int, default=128)
    p.add_argument("--page-size", type=int, default=16)
    p.add_argument("--query-tokens", type=int, default=1)
    p.add_argument("--token-budget", type=int, default=8192, help="candidates in tokens")
    p.add_argument("--top-p", type=float, default=0.85)
    p.add_argument("--page-order", choices=workload.PAGE_ORDERS, default="shuffled", help="where a sequence's pages lie in the pool")
    p.add_argument("--spread", type=float, default=workload.SPREAD, help="standard deviation of the logits, natural-log units")
    p.add_argument("--seconds", type=float, default=None, help="sampling time a method and shape; default: 2, or 0.15 on a GPU")
    p.add_argument(
        "--sets",
        type=int,
        default=None,
        help="buffer sets to rotate; default: 1 GiB of K and V, or 512 MiB of what a sparse call reads on a GPU",
    )
    p.add_argument("--threads", type=int, default=None, help="CPU threads; default: PyTorch's choice")
    p.add_argument("--json", type=Path, default=None, metavar="FILE", help="write one JSON row a line")
    return p


def console_of(width: int, soft_wrap: bool = True, quiet: bool = False) -> Console:
    """A console as wide as the terminal, or, where there is none, so many columns: tables stay whole in a log."""
    return Console(width=None if sys.stdout.isatty() else width, soft_wrap=soft_wrap, quiet=quiet)


def resolve(options: argparse.Namespace) -> None:
    """Fills in what depends on the device."""
    for name, value in DEVICE_DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def sizes_of(options: argparse.Namespace, batch: int, length: int, heads: str, dtype: str) -> Sizes:
    num_qo_heads, num_kv_heads = map(int, heads.split("/"))
    return Sizes(batch, options.query_tokens, num_qo_heads, num_kv_heads, options.head_dim, options.page_size, length, DTYPES[dtype])


def shapes(options: argparse.Namespace) -> list[Sizes]:
    return [
        sizes_of(options, batch, length, options.heads, dtype)
        for batch in options.batch
        for length in options.length
        for dtype in options.dtype
    ]


def row_head(sizes: Sizes, device: str, name: str) -> dict:
    """What says which measurement a row is."""
    return {"device": device, "shape": sizes.describe(), "dtype": str(sizes.dtype).removeprefix("torch."), "method": name}


def row_of(sizes: Sizes, device: str, method: Method, timing: Timing, best_dense_us: float | None) -> dict:
    moved, columns = method.report()
    row = row_head(sizes, device, method.name) | {
        "median_us": round(timing.median_us, 2),
        "spread": round(timing.spread, 4),
        "p10_us": round(timing.p10_us, 2),
        "p90_us": round(timing.p90_us, 2),
        "runs": timing.runs,
        "bytes": moved,
        "gb_per_s": round(moved / timing.median_us / 1e3, 3),
    }
    if best_dense_us is not None:
        row["ratio_to_best_dense"] = round(best_dense_us / timing.median_us, 3)
    return row | columns | method.settings


def rows_of(sizes: Sizes, methods: Sequence[Method], options: argparse.Namespace) -> list[dict]:
    """Times all methods of one shape."""
    timings = measure({m.name: m.calls for m in methods}, options.device, options.seconds)
    best_dense = min((timings[m.name].median_us for m in methods if m.dense_peer), default=None)
    return [row_of(sizes, options.device, method, timings[method.name], best_dense) for method in methods]


_COLUMNS = (
    ("method", "method", "{}"),
    ("median_us", "median us", "{:,.1f}"),
    ("spread", "spread", "{:.0%}"),
    ("bytes", "MB", "{:,.2f}"),
    ("gb_per_s", "GB/s", "{:.1f}"),
    ("ratio_to_best_dense", "x best dense", "{:.2f}"),
    ("ratio_to_fa2", "x FA2", "{:.2f}"),
    ("share_of_speed_of_light", "of light", "{:.0%}"),
    ("candidates", "I0", "{:,.0f}"),
    ("kept_tokens", "I1", "{:,.0f}"),
    ("captured_mass", "mass", "{:.4f}"),
    ("served_by", "served by", "{}"),
    ("error", "left out", "{}"),
)


def show(console: Console, sizes: Sizes, rows: Sequence[dict]) -> None:
    table = Table(title=str(sizes), title_justify="left")
    columns = [c for c in _COLUMNS if any(c[0] in row for row in rows)]
    for key, title, _ in columns:
        text = key in ("method", "served_by", "error")
        table.add_column(title, justify="left" if text else "right", no_wrap=key != "error")
    for row in rows:
        values = {**row, "bytes": row["bytes"] / 1e6 if "bytes" in row else None}
        table.add_row(*(form.format(values[key]) if values.get(key) is not None else "" for key, _, form in columns))
    console.print(table)


def method_of(name: str, call: Callable, sets: Iterable[tuple], moved: int, **columns: object) -> Method:
    """`call(*set)` for each buffer set, with a byte count known beforehand."""
    return Method(name, [partial(call, *buffers) for buffers in sets], lambda: (round(moved), columns))


def announce(options: argparse.Namespace, notes: str) -> tuple[Console, dict[str, object]]:
    """Prints where and on what data the figures are taken; returns the console and the environment."""
    console = console_of(160)
    where = environment(options.device)
    console.print(f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {where['backend']}, commit {where['commit']}")
    console.print(f"data: {workload.assumptions(options.spread, options.page_order)}")
    if notes:
        console.print(notes)
    return console, where


def describe_sets(data: Workload) -> str:
    total = len(data.queries) * data.sizes.kv_bytes / 2**20
    shared = f", {data.copies} contiguous copies for dense peers" if data.copies != len(data.queries) else ""
    return f"{len(data.queries)} buffer sets in turn, {total:,.0f} MiB of K and V{shared}; spread = (p90 - p10) / median"


def main(options: argparse.Namespace, methods: Callable[[Workload, argparse.Namespace], Sequence[Method]], notes: str = "") -> None:
    """Builds each shape's workload, times `methods` on it, prints one table a shape, writes the rows."""
    resolve(options)
    console, _ = announce(options, notes)
    rows: list[dict] = []
    for sizes in shapes(options):
        data = workload.build(sizes, options.device, options.sets, spread=options.spread, page_order=options.page_order)
        console.print(describe_sets(data))
        with torch.inference_mode():
            measured = rows_of(sizes, methods(data, options), options)
        show(console, sizes, measured)
        rows += measured
    if options.json is not None:
        write_rows(options.json, rows, options.device)
        console.print(f"wrote {len(rows)} rows to {options.json}")
