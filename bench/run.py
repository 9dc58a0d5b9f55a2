"""What all measurements share: operators and methods as they are declared, options, the loop over shapes, tables and rows."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import rows as results
from .timing import Method, Timing, measure, output_of

DEVICES = ("cpu", "cuda")


class DeviceLost(Exception):
    """The CUDA context is unusable after a failed method."""


@dataclass(frozen=True)
class Entry:
    """One method as it is declared.

    Args:
        prepare: (data, options) -> Method, called when its turn comes; allocates and compiles.
        kind: "ours", which `--base` compares, "peer", or "bound" for what only reads.
        missing: why it cannot run here, or None.
        wanted: whether it says something on this data.
    """

    name: str
    prepare: Callable[[Any, argparse.Namespace], Method]
    devices: tuple[str, ...] = DEVICES
    kind: str = "ours"
    missing: Callable[[], str | None] = lambda: None
    wanted: Callable[[Any, argparse.Namespace], bool] = lambda data, options: True


class Op(ABC):
    """Something to measure; `registry.OPS` has one of each. Cells are its shapes, data is what one of them is measured on."""

    name: str
    about: str
    devices: tuple[str, ...] = DEVICES
    columns: str = ""  # of the printed table, as rows call them
    notes = ""
    seconds: dict[str, float] = {"cpu": 2.0, "cuda": 0.15}  # of sampling a method and shape
    time_limits: dict[str, tuple[float, float]] = {}  # seconds for a run and for a method over all shapes, by device
    grad_mode: Callable = torch.inference_mode
    needs_device = True  # to do anything at all
    shape_help = "batch:length:heads such as 64:32k:32/8, or grids by name"
    alone: tuple[str, ...] = ("cuda",)  # devices on which methods are prepared and timed one after the other, which needs less memory

    def add_options(self, group: argparse._ArgumentGroup) -> None:  # noqa: B027 -- most have none
        """Options of its own."""

    @abstractmethod
    def shapes(self, text: str) -> list:
        """The shapes that one value of --shapes means."""

    @abstractmethod
    def default_shapes(self, device: str) -> str: ...

    @abstractmethod
    def entries(self, options: argparse.Namespace) -> list[Entry]: ...

    def start(self, options: argparse.Namespace) -> None:  # noqa: B027 -- most need nothing
        """Before anything else happens: checks options, loads what has to come first."""

    def cells(self, options: argparse.Namespace) -> list:
        return options.shapes

    @abstractmethod
    def open(self, cell: Any, options: argparse.Namespace, sets: int | None = None, memory_share: float = 1.0) -> Any:
        """The data of one cell. Raises MemoryError where the device cannot hold it."""

    @abstractmethod
    def head(self, cell: Any, options: argparse.Namespace) -> dict:
        """What says which measurement a row is, but for its method."""

    def environment(self, options: argparse.Namespace) -> dict:
        """Printed first, and part of every row."""
        return results.environment(options.device)

    def assumptions(self, options: argparse.Namespace) -> str:
        return ""

    @abstractmethod
    def row(self, cell: Any, options: argparse.Namespace, method: Method, timing: Timing, medians: dict[str, float]) -> dict:
        """The columns of a timed method; `medians` has microseconds by method of what was timed on this cell before it."""

    def compared(self, rows: Sequence[dict]) -> list[dict]:
        """Rows as they are printed, with what only all of a shape's together say."""
        return list(rows)

    def release(self, device: str) -> None:
        """Frees what a shape left behind."""
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def tokens_of(text: str) -> int:
    return int(text[:-1]) * 1024 if text[-1:] in ("k", "K") else int(text)


def jsonl(text: str) -> Path:
    try:
        results.require_jsonl(Path(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a name that ends in .jsonl, got {text!r}") from None
    return Path(text)


def parser(op: Op) -> argparse.ArgumentParser:
    command = f"python -m bench run --op {op.name}"
    p = argparse.ArgumentParser(
        prog=command, usage=f"{command} [options]", description=op.about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--op", help=argparse.SUPPRESS)
    what = p.add_argument_group("what to measure (python -m bench list)")
    what.add_argument("--device", choices=op.devices, default=op.devices[0], help=f"default: {op.devices[0]}")
    what.add_argument("--shapes", nargs="+", type=op.shapes, metavar="SHAPE", help=op.shape_help)
    what.add_argument("--methods", nargs="+", default=["*"], metavar="NAME", help="by name or pattern such as 'twilight_*'")
    op.add_options(p.add_argument_group("on what data"))
    how = p.add_argument_group("how")
    how.add_argument(
        "--seconds", type=float, metavar="S", help="sampling time a method and shape; default: 2, or 0.15 on a GPU, of --base an eighth"
    )
    how.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    how.add_argument("--time-limit", type=float, metavar="S", help="for the whole run; shapes beyond it are left out aloud")
    how.add_argument("--method-time-limit", type=float, metavar="S", help="for one method over all shapes, compilation included")
    rows = p.add_argument_group("results")
    rows.add_argument("--json", type=jsonl, metavar="FILE.jsonl", help="write one row a line, as they are measured")
    rows.add_argument("--append", action="store_true", help="keep the rows that --json has")
    rows.add_argument("--resume", action="store_true", help="keep the rows that --json has and measure what is missing")
    base = p.add_argument_group("comparison")
    base.add_argument("--base", metavar="REV", help="another commit, checkout or installed folder to compare our methods with, in turns")
    base.add_argument("--rounds", type=int, default=6, metavar="N", help="turns, each in the order base, new, new, base; default: 6")
    return p


def parse(op: Op, arguments: Sequence[str]) -> argparse.Namespace:
    cli = parser(op)
    options = cli.parse_args(arguments)
    if (options.resume or options.append) and options.json is None:
        cli.error("--resume and --append: expected --json FILE.jsonl")
    if options.base is not None and options.resume:
        cli.error("--resume: expected no --base, a comparison is one run")
    if options.rounds < 1:
        cli.error(f"--rounds: expected at least 1, got {options.rounds}")
    if options.device == "cuda" and op.needs_device and not torch.cuda.is_available():
        cli.error("--device: expected cpu, because this machine has no usable GPU, got cuda")
    options.shapes = [cell for found in options.shapes or [op.shapes(op.default_shapes(options.device))] for cell in found]
    if options.seconds is None:
        options.seconds = op.seconds[options.device] / (1 if options.base is None else 8)  # a comparison takes many samples
    limits = op.time_limits.get(options.device, (float("inf"), float("inf")))
    options.time_limit = limits[0] if options.time_limit is None else options.time_limit
    options.method_time_limit = limits[1] if options.method_time_limit is None else options.method_time_limit
    options.error = cli.error
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def usable(op: Op, options: argparse.Namespace, console: Console) -> list[Entry]:
    """Declared methods of this device that were asked for; says which of them cannot run here."""
    found = []
    for entry in op.entries(options):
        if options.device in entry.devices and any(fnmatch(entry.name, pattern) for pattern in options.methods):
            if (why := entry.missing()) is None:
                found.append(entry)
            else:
                console.print(f"{entry.name}: left out, {why}")
    if not found:
        options.error(f"--methods: expected some of this operator's on {options.device}, got {' '.join(options.methods)}")
    return found


def console_of(**options: bool) -> Console:
    """A console as wide as the terminal, or, where there is none, 200 columns: tables stay whole in a log."""
    return Console(width=None if sys.stdout.isatty() else 200, quiet=results.RANK > 0, **options)


def show(console: Console, title: str, columns: str, rows: Sequence[dict]) -> None:
    """A table of those columns that some row has, named as in the file."""
    table = Table(title=title, title_justify="left")
    used = [name for name in columns.split() if any(row.get(name) is not None for row in rows)]
    for name in used:
        text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name.replace("_", " "), justify="left" if text else "right", no_wrap=name not in ("error", "phases"))
    for row in rows:
        table.add_row(*(shown(row.get(name)) for name in used))
    console.print(table)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if type(value) is int else str(value)


def reason(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300]


@dataclass
class Run:
    """State of the whole run."""

    op: Op
    options: argparse.Namespace
    console: Console
    where: dict[str, object]
    earlier: list[dict]  # rows of the run that this one continues
    spent: Counter = field(default_factory=Counter)  # seconds by method
    started: float = field(default_factory=time.monotonic)
    failed: bool = False
    head: dict = field(default_factory=dict)  # of the present shape, with its rows and microseconds by method
    rows: list[dict] = field(default_factory=list)
    medians: dict[str, float] = field(default_factory=dict)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.options.time_limit

    def write(self, method: str, columns: dict) -> None:
        row = self.head | {"method": method} | columns | self.where
        self.rows.append(row)
        if self.options.json is not None and results.RANK == 0:
            results.write(self.options.json, [row])

    def attempt(self, names: Sequence[str], work: Callable[[], Any]) -> Any:
        """`work()`, or None and rows that say why not; its wall time counts for the methods it is about."""
        start = time.monotonic()
        try:
            return work()
        except Exception as error:  # a peer may fail in any way of its own; the row and the exit status say so
            why = reason(error)
        finally:
            for name in names:
                self.spent[name] += (time.monotonic() - start) / len(names)
        self.failed = True
        for name in names:
            self.write(name, {"error": why})
        self.console.print(f"[red]{', '.join(names)}: {why}", highlight=False)
        if self.options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(why) from lost
        return None

    def within_time(self, entry: Entry) -> bool:
        if self.spent[entry.name] <= self.options.method_time_limit:
            return True
        self.console.print(f"{entry.name}: left out, it has used {self.spent[entry.name]:.0f} s of this run")
        return False

    def measure_group(self, cell: Any, data: Any, group: Sequence[Entry]) -> None:
        """Times methods in turns and writes their rows; nothing of them is left when it returns."""
        prepared = [self.attempt([entry.name], partial(checked, entry, data, self.options)) for entry in group]
        methods = [method for method in prepared if method is not None]
        timings = self.attempt([m.name for m in methods], partial(measure, methods, self.options.device, self.options.seconds)) or {}
        self.medians |= {name: timing.median_us for name, timing in timings.items()}
        for method in (method for method in methods if method.name in timings):
            columns = self.attempt([method.name], partial(self.op.row, cell, self.options, method, timings[method.name], self.medians))
            if columns is not None:
                self.write(method.name, columns)

    def measure_cell(self, cell: Any, entries: Sequence[Entry]) -> None:
        self.head, self.rows = self.op.head(cell, self.options), []
        done = [row for row in self.earlier if all(row.get(key) == value for key, value in self.head.items())]
        self.medians = {row["method"]: row["median_us"] for row in done if "median_us" in row}
        start = time.monotonic()
        data = self.op.open(cell, self.options)
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        self.console.print(f"{data.describe()}; built in {time.monotonic() - start:.1f} s", highlight=False)
        wanted = [e for e in entries if e.name not in {row["method"] for row in done} and e.wanted(data, self.options)]
        for group in [[e] for e in wanted] if self.options.device in self.op.alone else [wanted]:
            group = [entry for entry in group if not self.out_of_time and self.within_time(entry)]
            if group:
                self.measure_group(cell, data, group)


def checked(entry: Entry, data: Any, options: argparse.Namespace) -> Method:
    """The method, ready to be timed. Raises ValueError where its result is wrong."""
    method = entry.prepare(data, options)
    if method.calls:
        wrong = method.check(output_of(method.calls, options.device))
        if wrong is not None:
            raise ValueError(wrong)
    return method


def announce(console: Console, op: Op, options: argparse.Namespace, where: dict) -> None:
    """Prints where and on what data the figures are taken."""
    console.print(f"{where['machine']}, {where['threads']} threads, torch {where['torch']}, {where['backend']}, commit {where['commit']}")
    for text in (op.assumptions(options), op.notes):
        if text:
            console.print(text)


def main(op: Op, options: argparse.Namespace) -> int:
    """Measures every shape and method. Exit status: 0, 1 where a method failed, 3 where the device was lost and --resume is to continue."""
    op.start(options)
    console, where = console_of(), op.environment(options)
    announce(console, op, options, where)
    entries = usable(op, options, console)
    earlier: list[dict] = []
    if options.json is not None and options.json.exists():
        if options.resume:
            earlier = results.read(options.json)
        elif not options.append and results.RANK == 0:
            options.json.unlink()
    run = Run(op, options, console, where, earlier)
    with op.grad_mode(), console.status(op.name) as status:
        for cell in op.cells(options):
            status.update(f"{op.name}: {cell}")
            if run.out_of_time:
                console.print(f"left out: {cell}: the time limit of {options.time_limit:.0f} s has passed")
                continue
            try:
                run.measure_cell(cell, entries)
                if run.rows:
                    show(console, str(cell), op.columns, op.compared(run.rows))
            except MemoryError as error:
                console.print(f"left out: {error}")
            except DeviceLost as error:
                console.print(f"[red]the device is lost after {error}; repeat with --resume to go on without that method")
                return 3
            op.release(options.device)
    took = time.monotonic() - run.started
    console.print(f"{took:.0f} s; by method: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.spent.most_common()))
    if results.WORLD_SIZE > 1:
        torch.distributed.destroy_process_group()
    return 1 if run.failed else 0
