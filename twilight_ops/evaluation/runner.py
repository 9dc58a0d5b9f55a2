"""Runs the grid of (task, length, method) cells; every finished cell is one JSON line, and a run that was cut short goes on after it."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._settings import each, integer, normalise, number, share
from ..config import RECENT_TOKENS
from . import language
from .decoding import greedy
from .mass import captured, masses, spread_of
from .methods import DENSE, Method
from .prefill import Prefill, cache_of, record
from .tasks import TASKS, Sample, fit, score

LANGUAGE = "language"


@dataclass(frozen=True)
class Options:
    """What to evaluate.

    Args:
        lengths: context lengths in tokens.
        methods: with p; dense is always run first.
        tasks: "language" and names of `tasks.TASKS`.
        depths: of the needle, 0 (start) to 1 (end).
        forced_tokens: teacher-forced decode steps after each document.
        greedy_tokens: greedy decode steps compared with dense, 0 for none.
        limit: samples of a task at each depth, each other than those of other depths.
        batch_size: sequences decoded together; a shadow prefix is calibrated on all of a batch.
        mass_steps: decode steps of each document at which the true mass of a method's sets is taken; 0 for none.
        mass_top_ps: values of p they are compared at.
        equal_tokens: also run each selector alone with as many tokens as its pruned run kept.
        budget_log: steps a window of the budget logs that pruned methods write on prose, 0 for none.
        seed: of tasks.
    """

    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    tasks: tuple[str, ...] = (LANGUAGE,)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    forced_tokens: int = 128
    greedy_tokens: int = 32
    limit: int = 2
    batch_size: int = 1
    mass_steps: int = 8
    mass_top_ps: tuple[float, ...] = (0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
    equal_tokens: bool = True
    budget_log: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "methods", "tasks", "depths"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected at least one, got none")
        for task in self.tasks:
            if task != LANGUAGE and task not in TASKS:
                raise ValueError(f"tasks: expected some of {', '.join([LANGUAGE, *TASKS])}, got {task!r}")
        normalise(
            self,
            lengths=each(integer(1)),
            depths=each(number(0.0, 1.0)),
            forced_tokens=integer(1),
            greedy_tokens=integer(0),
            limit=integer(1),
            batch_size=integer(1),
            mass_steps=integer(0, self.forced_tokens),
            mass_top_ps=each(share()),
            budget_log=integer(0),
            seed=integer(0),
        )

    def fingerprint(self) -> dict:
        """What must agree for cells of two runs to be comparable; methods, lengths and tasks may differ."""
        skipped = ("methods", "lengths", "tasks", "equal_tokens", "budget_log")
        return {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(self))).items() if name not in skipped}


# What must agree for cells of two runs to stand in one file.
COMPARED = ("model", "parameters", "dtype", "options", "documents", "kept_by_default")


def check_cells(path: Path, run: dict, resume: bool) -> None:
    """Refuses a file of cells that a run described by `run`, whole or in part, may not go on with; touches nothing.

    Raises:
        ValueError: the file belongs to another run, or exists while `resume` is false.
    """
    if not path.exists() or not path.stat().st_size:
        return
    if not resume:
        raise ValueError(f"out: expected a new file (or --resume), got {path}, which exists")
    with path.open(encoding="utf-8") as file:
        try:
            found = json.loads(file.readline())["run"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"resume: expected cells of an earlier run in {path}, got something else") from None
    for name in COMPARED:
        if name in run and found.get(name) != run[name]:
            raise ValueError(f"resume: expected the {name} of {path}, {found.get(name)}, got {run[name]}")


class CellStore:
    """JSON lines: first what the run is, then one finished cell a line.

    Raises:
        ValueError: see `check_cells`.
    """

    def __init__(self, path: Path, run: dict, resume: bool):
        self.path = path
        self.cells: dict[str, dict] = {}
        check_cells(path, run, resume)
        if path.exists() and path.stat().st_size:
            self._read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"run": run})

    def _read(self) -> None:
        lines = self.path.read_text("utf-8").splitlines(keepends=True)
        complete = [line for line in lines[1:] if line.endswith("\n")]
        if len(complete) < len(lines) - 1:
            # The line that was being written when the run was cut short.
            self.path.write_text("".join([lines[0], *complete]), "utf-8")
        for line in complete:
            cell = json.loads(line)
            self.cells[cell["key"]] = cell

    def _write(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def add(self, cell: dict) -> dict:
        self.cells[cell["key"]] = cell
        self._write(cell)
        return cell

    def __contains__(self, key: str) -> bool:
        return key in self.cells


def machine() -> str:
    """The processor's name, or its kind where the system does not tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the checkout that the package lies in, "+" where it was modified, "none" where there is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return "none" if head is None else head + ("+" if git("status", "--porcelain", "-uno") else "")


def describe(model_name: str, model, options: Options, documents: Sequence[str]) -> dict:
    """What a result file says about its run; documents by their names."""
    import transformers

    from .. import __version__, backends

    device = model.device.type
    return {
        "model": model_name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if device == "cuda" else platform.machine(),
        "backend": (backends.CUDA if device == "cuda" else backends.CPU).name,
        "machine": machine(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "twilight_ops", *sys.argv[1:]]),
        "versions": {
            "twilight_ops": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "options": options.fingerprint(),
        "documents": list(documents),
        # A method's label leaves out what is at its default, so the defaults are part of what was run.
        "kept_by_default": {"sink_pages": 1, "recent_tokens": RECENT_TOKENS},
    }


Progress = Callable[[str, int, int], None]  # (what is running, cells done, cells in all)


class Runner:
    """Evaluates a model; call `run` once.

    Args:
        model: a transformers causal language model in eval mode, attn_implementation="twilight".
        tokenizer: of the model; may be None if only "language" runs.
        documents: token ids [N] of each prose document, for the language cells.
        prose: sentences for the haystacks of the tasks.
        store: where finished cells go.
        progress: told what is running.
    """

    def __init__(
        self, model, tokenizer, documents: Sequence[Tensor], prose: Sequence[str], store: CellStore, options: Options, progress: Progress
    ):
        self.model, self.tokenizer, self.documents, self.prose = model, tokenizer, documents, prose
        self.store, self.options, self.progress = store, options, progress
        per_task = len(options.methods) + 1  # and dense
        per_language = per_task + (options.mass_steps > 0) + sum(self._runs_alone(method) for method in options.methods)
        self.total = sum(per_language if task == LANGUAGE else per_task for task in options.tasks) * len(options.lengths)
        self.done = 0
        named = [task for task in options.tasks if task != LANGUAGE]
        self._prompts = {(name, length): self._samples(name, length) for name in named for length in options.lengths}

    def run(self) -> list[dict]:
        for length in self.options.lengths:
            for task in self.options.tasks:
                cells = self._language(length) if task == LANGUAGE else self._task(task, length)
                for _ in cells:
                    self.done += 1
        self.progress("done", self.total, self.total)
        return list(self.store.cells.values())

    def _runs_alone(self, method: Method) -> bool:
        """Whether the method's selector also runs without the pruner, at as many tokens as the pruner kept."""
        return self.options.equal_tokens and method.top_p < 1.0 and method.name != "full"

    def _cell(self, key: str, fields: dict, work: Callable[[], dict]) -> dict:
        """A stored cell, or a new one."""
        self.progress(key, self.done, self.total)
        if key in self.store:
            return self.store.cells[key]
        start = time.perf_counter()
        result = work()
        return self.store.add({"key": key, **fields, **result, "seconds": round(time.perf_counter() - start, 3)})

    def _language(self, length: int) -> Iterator[dict]:
        options = self.options
        passages: list[language.Passage] = []

        def prepared() -> list[language.Passage]:
            # Only where some cell is missing: prefilling is most of the work on a CPU.
            if not passages:
                for start in range(0, len(self.documents), options.batch_size):
                    self.progress(f"prefill {length}", self.done, self.total)
                    batch = self.documents[start : start + options.batch_size]
                    passages.append(language.prepare(self.model, batch, length, options.forced_tokens, options.greedy_tokens))
            return passages

        def measure(method: Method) -> dict:
            results = []
            for index, passage in enumerate(prepared()):
                result = language.evaluate(self.model, passage, method, self._budget_log(length, method, index), options.budget_log)
                results.append(result | (language.agreement(self.model, passage, method) if options.greedy_tokens else {}))
            return language.together(results) | mass_of(method)

        def mass_of(method: Method) -> dict:
            if not options.mass_steps or method.selector is None:
                return {}
            parts = [captured(self.model, p.prefills, p.forced[:, : options.mass_steps], method.config()) for p in prepared()]
            return spread_of(torch.cat(parts))

        if options.mass_steps:

            def compare() -> dict:
                parts = [
                    masses(self.model, passage.prefills, passage.forced[:, : options.mass_steps], options.mass_top_ps)
                    for passage in prepared()
                ]
                return {"mass": [_merge_mass(rows) for rows in zip(*parts, strict=True)]}

            yield self._cell(f"mass/{length}", {"task": "mass", "length": length}, compare)
        for method in (DENSE, *options.methods):
            cell = self._cell(f"{LANGUAGE}/{length}/{method.key}", _fields(LANGUAGE, length, method), lambda method=method: measure(method))
            yield cell
            if self._runs_alone(method):
                alone = method.with_tokens(round(cell["kept"]))
                fields = _fields(LANGUAGE, length, alone) | {"equal_tokens_of": method.key}
                yield self._cell(f"{LANGUAGE}/{length}/equal/{method.key}", fields, lambda alone=alone: measure(alone))

    def _budget_log(self, length: int, method: Method, passage: int) -> Path | None:
        """OUT/budget/<length>_<method>_<batch of documents>.jsonl, for pruned methods of a run that asked for it."""
        if not self.options.budget_log or method.top_p == 1.0:
            return None
        folder = self.store.path.parent / "budget"
        folder.mkdir(exist_ok=True)
        return folder / f"{length}_{re.sub(r'[^A-Za-z0-9.=]+', '_', method.key)}_{passage}.jsonl"

    def _samples(self, name: str, length: int) -> list[tuple[float, list[int], Sample]]:
        """(depth, prompt, sample) of one cell; building them all first finds out what does not fit before anything runs."""
        options = self.options
        return [
            (depth, *fit(self.tokenizer, TASKS[name], length, depth, options.seed * 1000 + index, self.prose))
            for index, depth in enumerate(depth for depth in options.depths for _ in range(options.limit))
        ]

    def _task(self, name: str, length: int) -> Iterator[dict]:
        options, task = self.options, TASKS[name]
        samples = self._prompts[name, length]
        prefills: list[Prefill] = []

        def prepared() -> list[Prefill]:
            if not prefills:
                for index, (_, ids, _) in enumerate(samples):
                    self.progress(f"prefill {name} {length} ({index + 1}/{len(samples)})", self.done, self.total)
                    prefills.append(record(self.model, torch.tensor(ids)))
            return prefills

        def measure(method: Method) -> dict:
            texts: list[str] = []
            for start in range(0, len(prepared()), options.batch_size):
                batch = prefills[start : start + options.batch_size]
                cache = cache_of(self.model, method.config(), batch, task.new_tokens)
                tokens = greedy(self.model, cache, torch.stack([prefill.last_logits for prefill in batch]), task.new_tokens)
                texts += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            scores = [score(text, sample.answers) for text, (_, _, sample) in zip(texts, samples, strict=True)]
            by_depth = {f"{depth:g}": [s for s, (d, _, _) in zip(scores, samples, strict=True) if d == depth] for depth in options.depths}
            told = {"score": sum(scores) / len(scores), "scores_by_depth": by_depth, "texts": texts}
            return told | {"prompt_tokens": [len(ids) for _, ids, _ in samples]}

        for method in (DENSE, *options.methods):
            key = f"{name}/{length}/{method.key}"
            yield self._cell(key, _fields(name, length, method), lambda method=method: measure(method))


def _fields(task: str, length: int, method: Method) -> dict:
    return {
        "task": task,
        "length": length,
        "method": method.label,
        "selector": method.name,
        "top_p": method.top_p,
        "setting": method.setting,
    }


def _merge_mass(rows: Sequence[dict]) -> dict:
    """One p over several passages of equal size."""
    return {
        name: sum(row[name] for row in rows)
        if name == "rows"
        else min(row[name] for row in rows)
        if name.startswith("lowest")
        else (sum(row[name] for row in rows) / len(rows))
        for name in rows[0]
    }
