"""`python -m twilight_ops eval`: every selector with and without Twilight on a local model."""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from importlib import resources
from pathlib import Path

from .models import add_model_arguments, load_model

HELP = "accuracy of every selector, with and without the pruner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.methods import STANDARD

    parser.description = (
        "Passkey, RULER-style tasks, and teacher-forced prose (KL to dense, top-1 agreement, perplexity, greedy agreement). "
        "Every method runs without the pruner and at every --p. Finished cells are JSON lines in OUT/cells.jsonl; "
        "--resume goes on after an interruption."
    )
    add_model_arguments(parser, default="smollm2")
    parser.add_argument("--out", type=Path, required=True, help="folder for cells.jsonl, results.json, table.md and plots")
    parser.add_argument("--resume", action="store_true", help="go on with the cells that OUT lacks")
    parser.add_argument("--tasks", nargs="+", default=["language", "passkey"], help="language, passkey, needle_single, ... or all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="context lengths in tokens")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.5, 0.9], help="where the needle lies, 0..1")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(STANDARD),
        metavar="NAME[:FIELD=VALUE,...][@P+P...]",
        help="selectors with their settings, e.g. quest:budget_fraction=1/4, and with their own p, e.g. full@0.9+0.95 "
        f"(default: {' '.join(STANDARD)})",
    )
    parser.add_argument("--p", nargs="*", type=_share, default=[0.95], help="top-p values; each method also runs without the pruner")
    parser.add_argument("--documents", nargs="+", type=Path, help="text files for the prose (default: those of the package)")
    parser.add_argument("--tokens", type=int, default=128, help="teacher-forced tokens a document")
    parser.add_argument("--greedy-tokens", type=int, default=32, help="greedy tokens a document, compared with dense; 0 for none")
    parser.add_argument("--limit", type=int, default=2, help="samples of a task at each depth")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--no-equal-tokens", action="store_true", help="skip each selector alone at its pruned budget")
    parser.add_argument("--only-pruned", action="store_true", help="skip each selector alone at its own budget")
    parser.add_argument("--mass-steps", type=int, default=8, help="steps at which estimated and true mass are compared, 0 for none")
    parser.add_argument(
        "--budget-log",
        type=int,
        default=0,
        metavar="STEPS",
        help="write OUT/budget/*.jsonl: budgets of each pruned run, a line every STEPS steps",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")


def _share(text: str) -> float:
    return float(Fraction(text))


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for anything the user can put right."""
    import torch
    from rich.console import Console

    from ..evaluation import report
    from ..evaluation.methods import parse_method
    from ..evaluation.runner import CellStore, Options, Runner, describe
    from ..evaluation.tasks import TASKS, sentences
    from .terminal import table

    methods = []
    for text in args.methods:
        spec, _, own = text.partition("@")
        method, top_ps = parse_method(spec), [_share(p) for p in own.split("+")] if own else args.p
        if any(not 0.0 < p < 1.0 for p in top_ps):
            raise ValueError(f"p: expected values between 0 and 1, got {top_ps}")
        if method.selector is not None:
            methods += ([] if args.only_pruned else [method]) + [method.with_top_p(p) for p in top_ps]
    tasks = ["language", *TASKS] if args.tasks == ["all"] else args.tasks
    options = Options(
        lengths=tuple(args.lengths),
        methods=tuple(dict.fromkeys(methods)),
        tasks=tuple(tasks),
        depths=tuple(args.depths),
        forced_tokens=args.tokens,
        greedy_tokens=args.greedy_tokens,
        limit=args.limit,
        batch_size=args.batch_size,
        mass_steps=args.mass_steps,
        equal_tokens=not args.no_equal_tokens,
        budget_log=args.budget_log,
        seed=args.seed,
    )
    texts = [path.read_text() for path in args.documents] if args.documents else packaged_prose()
    model, tokenizer = load_model(args)
    documents = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    needed = max(args.lengths) + args.tokens + 1
    if "language" in tasks and min(map(len, documents)) < needed:
        raise ValueError(f"documents: expected at least {needed} tokens each, got {min(map(len, documents))}")

    name = "random-tiny" if args.random_tiny else Path(args.model).name
    console = Console()
    store = CellStore(args.out / "cells.jsonl", describe(name, model, options), args.resume)
    prose = [sentence for text in texts for sentence in sentences(text)]
    with _progress(console) as progress:
        runner = Runner(model, tokenizer, documents, prose, store, options, progress)
        cells = runner.run()

    described = json.loads(store.path.read_text().splitlines()[0])["run"]
    (args.out / "results.json").write_text(json.dumps({**described, "cells": cells}, indent=1) + "\n")
    (args.out / "table.md").write_text(report.markdown(described, cells))
    for title, columns, rows in report.tables(cells):
        console.print(table(title, columns, rows))
    try:
        from ..evaluation.plots import draw

        written = [path.name for path in draw(cells, args.out)]
    except ImportError:
        written = []
        console.print("no plots: matplotlib is not installed")
    console.print(f"{args.out}: {', '.join(['cells.jsonl', 'results.json', 'table.md', *written])}", soft_wrap=True)
    return 0


def packaged_prose() -> list[str]:
    """The documents that come with the package."""
    folder = resources.files("twilight_ops.data") / "prose"
    return [path.read_text() for path in sorted(folder.iterdir(), key=lambda path: path.name) if path.name.endswith(".txt")]


def _progress(console):
    """A context whose value is the runner's progress callback."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    @contextmanager
    def bar():
        columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=None)
            yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)

    return bar()
