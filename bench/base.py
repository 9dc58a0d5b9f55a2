"""`run --base`: our methods of another commit beside those of this checkout, in turns, on one machine and equal data.

Each side is a process of its own with its own `twilight_ops`, told by lines of JSON what to do next. A base that has a bench of this
shape is measured by its own, which knows how its operators are called; an older one by this checkout's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from rich.console import Console

from . import rows as results
from .rows import ROOT
from .run import Op, announce, checked, console_of, parse, reason, show, usable
from .timing import output_of, tensors_of

BUILT = ROOT / "build" / "base"
SOURCES = ("setup.py", "pyproject.toml", "csrc", "integration", "twilight_ops", "bench")  # what an installed folder depends on
COLUMNS = "method base_us new_us new_over_base spread equal_bits error"


def worker() -> int:
    """One side: reads requests, one JSON object a line, and answers each with one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except Exception as error:  # the other process decides what a failure means
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


class Side:
    """What a worker holds: one cell's data, one prepared method."""

    def start(self, op: str, arguments: list[str], talks: bool) -> dict:
        import twilight_ops

        from . import registry

        self.op = registry.find(op)
        self.options = parse(self.op, arguments)
        self.op.start(self.options)
        self.cells = self.op.cells(self.options)
        self.entries = {entry.name: entry for entry in self.op.entries(self.options)}
        self.mode = self.op.grad_mode()
        self.mode.__enter__()  # for as long as this process lives
        where = self.op.environment(self.options)
        console = console_of(stderr=True) if talks else Console(quiet=True)
        announce(console, self.op, self.options, where)
        return {
            "package": str(Path(twilight_ops.__file__).resolve().parent),
            "environment": where,
            "cells": [[str(cell), self.op.head(cell, self.options)] for cell in self.cells],
            "methods": [e.name for e in usable(self.op, self.options, console) if e.kind == "ours"],
        }

    def open(self, cell: int, sets: int | None, memory_share: float) -> dict:
        self.data = self.sample = None
        self.op.release(self.options.device)
        self.data = self.op.open(self.cells[cell], self.options, sets, memory_share)
        return {"sets": self.data.sets, "fingerprint": self.data.fingerprint}

    def prepare(self, method: str) -> dict:
        self.sample = None
        self.op.release(self.options.device)
        found = checked(self.entries[method], self.data, self.options)
        self.sample = found.sampler(self.options.device)
        return {"digest": digest(output_of(found.calls, self.options.device)) if found.calls else None}

    def time(self) -> dict:
        return {"us": self.sample(self.options.seconds)}


def digest(output: object) -> str:
    found = hashlib.sha256()
    for tensor in tensors_of(output):
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class Worker:
    """The other end of `worker`: imports `bench` from `folder`, and `twilight_ops` from `site` or as this process does."""

    def __init__(self, folder: Path, site: Path | None):
        paths = filter(None, (site, os.environ.get("PYTHONPATH")))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, "-m", "bench", "worker"]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(self, do: str, **arguments: object) -> dict:
        """Raises RuntimeError where the request failed."""
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with status {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def end(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def sources(base: str, target: Path) -> str:
    """Copies what is built of a folder or a commit; returns its name."""
    if Path(base).is_dir():
        ignore = shutil.ignore_patterns(".*", "build", "results", "__pycache__", "*.so")
        shutil.copytree(base, target, ignore=ignore, dirs_exist_ok=True)
        return str(base)
    found = [git("rev-parse", "--show-toplevel"), git("rev-parse", "--short", f"{base}^{{commit}}")]
    if any(done.returncode for done in found):
        raise ValueError(f"--base: expected a commit, a checkout or a folder with an installed package, got {base!r}")
    top, commit = (done.stdout.decode().strip() for done in found)
    subprocess.run(["tar", "-x"], cwd=target, input=git("archive", commit, folder=top).stdout, check=True)
    return commit


def git(*arguments: str, folder: str | Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True)


def installed(base: str, workspace: Path) -> tuple[str, Path]:
    """(name, folder with the installed package and a bench for it); built by README's command, once for equal sources."""
    if (Path(base) / "twilight_ops").is_dir() and not (Path(base) / "setup.py").exists():
        return str(base), Path(base).resolve()
    source = workspace / "source"
    source.mkdir()
    name = sources(base, source)
    asked = {name: value for name, value in sorted(os.environ.items()) if name.startswith("TWILIGHT_")}
    built = hashlib.sha256(f"{sys.version} {torch.__version__} {asked}".encode())
    for path in sorted(path for name in SOURCES for path in (source / name, *(source / name).rglob("*")) if path.is_file()):
        built.update(str(path.relative_to(source)).encode() + path.read_bytes())
    site = BUILT / built.hexdigest()[:16]
    if not site.exists():
        build = workspace / "site"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(build), "."]
        bin_folder = str(Path(sys.executable).parent)
        environment = {"TWILIGHT_NATIVE": "required"} | os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(command, cwd=source, env=environment, check=True)
        if (source / "bench" / "__main__.py").exists():
            shutil.copytree(source / "bench", build / "bench", ignore=shutil.ignore_patterns("results"))
        BUILT.mkdir(parents=True, exist_ok=True)
        shutil.move(build, site)
    return name, site


def compare(workers: dict[str, Worker], method: str, rounds: int) -> dict:
    """Columns of one method: medians, their ratio by turns, and whether both write the same bits."""
    digests = [workers[side].ask("prepare", method=method)["digest"] for side in workers]
    us: dict[str, list[float]] = {"base": [], "new": []}
    by_turn = []
    for _ in range(rounds):
        turn: dict[str, list[float]] = {"base": [], "new": []}
        for side in ("base", "new", "new", "base"):
            turn[side] += workers[side].ask("time")["us"]
        by_turn.append(statistics.median(turn["new"]) / statistics.median(turn["base"]))
        for side, samples in turn.items():
            us[side] += samples
    ratio = statistics.median(by_turn)
    return {
        "base_us": round(statistics.median(us["base"]), 2),
        "new_us": round(statistics.median(us["new"]), 2),
        "new_over_base": round(ratio, 4),
        "spread": round((max(by_turn) - min(by_turn)) / ratio, 4),
        "by_turn": [round(value, 4) for value in by_turn],
        "equal_bits": None if digests[0] is None else digests[0] == digests[1],
    }


def main(op: Op, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Prints base, new and new/base of every shape and method. Exit status 1 where something could not be compared."""
    console = console_of()
    with ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            with console.status(f"building {options.base}"):
                name, site = installed(options.base, workspace)
        except ValueError as error:
            options.error(str(error))
        own = (site / "bench" / "__main__.py").exists()
        if not own:
            shutil.copytree(ROOT / "bench", workspace / "bench", ignore=shutil.ignore_patterns("results"))
        workers = {"base": Worker(site if own else workspace, site), "new": Worker(ROOT, None)}
        told = {}
        for side, worker in workers.items():
            stack.callback(worker.end)
            try:
                told[side] = worker.ask("start", op=op.name, arguments=list(arguments), talks=side == "new")
            except RuntimeError as error:
                options.error(f"--base: {side}: {error}")
        if Path(told["base"]["package"]) != (expected := (site / "twilight_ops").resolve()):
            options.error(f"--base: expected to measure {expected}, got {told['base']['package']}")
        console.print(f"base: {name}, measured by {'its own bench' if own else 'the bench of this checkout'}; new: this checkout")
        failed = False
        if options.json is not None:
            results.write(options.json, [], append=options.append)
        for index, (title, head) in enumerate(told["new"]["cells"]):
            rows: list[dict] = []
            try:
                first = workers["base"].ask("open", cell=index, sets=None, memory_share=0.5)
                second = workers["new"].ask("open", cell=index, sets=first["sets"], memory_share=1.0)
                if first != second:
                    raise RuntimeError(f"the two sides have different data: {first}, {second}")
            except RuntimeError as error:
                console.print(f"{title}: left out, {error}")
                failed = True
                continue
            for method in told["new"]["methods"]:
                try:
                    row = compare(workers, method, options.rounds)
                except RuntimeError as error:
                    row, failed = {"error": str(error)}, True
                rows.append(head | {"method": method, "base": name} | row)
            show(console, title, COLUMNS, rows)
            if options.json is not None:
                results.write(options.json, [row | told["new"]["environment"] for row in rows])
    return 1 if failed else 0
