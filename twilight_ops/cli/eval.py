"""`python -m twilight_ops eval`: every selector with and without Twilight on a local model."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .arguments import check_output_folder, number, read_text, whole, write_json, write_jsonl
from .models import SMOLLM2, add_model_arguments, context_of, device_of, load_model

_share = number(above=0.0, below=1.0)

HELP = "accuracy of every selector, with and without the pruner"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..evaluation.methods import STANDARD
    from ..evaluation.texts import KINDS

    parser.description = (
        "Passkey, RULER-style tasks, and teacher-forced prose (KL to dense, top-1 agreement, perplexity, greedy agreement). "
        "Every method runs without the pruner and at every --p. Finished cells are JSON lines in OUT/cells.jsonl; "
        "--resume goes on after an interruption."
    )
    add_model_arguments(parser, default=SMOLLM2)
    parser.add_argument(
        "--smoke", action="store_true", help="two minutes on SmolLM2 that fail when a default has become worse: what CI runs"
    )
    parser.add_argument("--out", type=Path, help="folder for cells.jsonl, table.jsonl, results.json, table.md and plots")
    parser.add_argument("--resume", action="store_true", help="go on with the cells that OUT lacks")
    parser.add_argument("--tasks", nargs="+", default=["language", "passkey"], help="language, passkey, needle_single, ... or all")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096], help="context lengths in tokens")
    parser.add_argument("--depths", nargs="+", type=float, default=[0.1, 0.5, 0.9], help="where the needle lies, 0..1")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(STANDARD),
        metavar="NAME[:BUDGET][:P][:FIELD=VALUE,...][@P+P...]",
        help="selectors with their budgets, settings and their own p, e.g. quest:n/4:.95, quest:8192:.85, shadow_prefix:tau=.05, "
        f"full@0.9+0.95, full:1.0, dense:kv_cache_dtype=fp8 (default: {' '.join(STANDARD)})",
    )
    parser.add_argument("--p", nargs="*", type=_share, default=[0.95], help="top-p values; each method also runs without the pruner")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--documents", nargs="+", type=Path, help="text files to continue (default: the prose of the package)")
    text.add_argument(
        "--text", choices=KINDS, help="continue texts of this machine instead, long enough for 31k tokens: see evaluation/texts.py"
    )
    parser.add_argument("--held-out", action="store_true", help="of --text, other sources than those that defaults were chosen on")
    parser.add_argument("--count", type=whole(1), default=3, help="documents of --text")
    parser.add_argument("--tokens", type=int, default=128, help="teacher-forced tokens a document")
    parser.add_argument("--greedy-tokens", type=int, default=32, help="greedy tokens a document, compared with dense; 0 for none")
    parser.add_argument("--limit", type=int, default=2, help="samples of a task at each depth")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--no-equal-tokens", action="store_true", help="skip each selector alone at its pruned budget")
    parser.add_argument("--only-pruned", action="store_true", help="skip each selector alone at its own budget")
    parser.add_argument("--mass-steps", type=int, help="steps at which estimated and true mass are compared, 0 for none (default: up to 8)")
    parser.add_argument(
        "--budget-log",
        type=int,
        default=0,
        metavar="STEPS",
        help="write OUT/budget/*.jsonl: budgets of each pruned run, a line every STEPS steps",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the tasks")


def _own_top_ps(text: str, listed: str) -> list[float]:
    """p of `method@p+p`."""
    try:
        return [_share(p) for p in listed.split("+")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"methods: {text}: {error}") from None


def how_to_go_on(args: argparse.Namespace) -> str:
    if args.out is None:
        return "nothing was written"
    return f"cells that were finished are in {args.out}, and the same command with --resume goes on after them"


def run(args: argparse.Namespace) -> int:
    """Raises ValueError for anything the user can put right, before the model is loaded where that is possible."""
    if not args.smoke:
        if args.out is None:
            raise ValueError("out: expected --out FOLDER, got none")
        _evaluate(args)
        return 0
    from ..evaluation import smoke
    from ..evaluation.texts import packaged_prose

    for name, value in smoke.SETTINGS.items():
        setattr(args, name, value)
    prose = packaged_prose()
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out or Path(folder) / "smoke"
        wrong = smoke.failures(_evaluate(args, {name: prose[name] for name in smoke.DOCUMENTS}))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def _evaluate(args: argparse.Namespace, given: dict[str, str] | None = None) -> list[dict]:
    """Runs what is asked for, on the given texts where there are some; the rows of the table."""
    import torch

    from ..evaluation import report
    from ..evaluation.methods import has_top_p, parse_method
    from ..evaluation.runner import CellStore, Options, Runner, check_cells, describe
    from ..evaluation.tasks import TASKS, sentences
    from ..evaluation.texts import build, packaged_prose
    from .terminal import Terminal

    methods = []
    for text in args.methods:
        spec, at, own = text.partition("@")
        method = parse_method(spec)
        method.check_files("methods")
        told = has_top_p(spec)
        if at and told:
            raise ValueError(f"methods: {text}: expected p once, got {method.top_p:g} and {own}")
        top_ps = _own_top_ps(text, own) if at else [method.top_p] if told else args.p
        if method.selector is None:
            methods += [method] if method.settings else []
        else:
            methods += ([] if args.only_pruned else [method.with_top_p(1.0)]) + [method.with_top_p(p) for p in top_ps]
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
        mass_steps=min(8, args.tokens) if args.mass_steps is None else args.mass_steps,
        equal_tokens=not args.no_equal_tokens,
        budget_log=args.budget_log,
        seed=args.seed,
    )
    if args.held_out and args.text is None:
        raise ValueError("held-out: expected --text, got none")
    read = given or ({path.name: read_text(path, "documents") for path in args.documents} if args.documents else packaged_prose())
    if len(read) < len(args.documents or ()):
        raise ValueError(f"documents: expected files of different names, got {' '.join(map(str, args.documents))}")
    check_output_folder(args.out, "out")
    device_of(args)
    name = "random-tiny" if args.random_tiny else Path(args.model).name
    store_path = args.out / "cells.jsonl"
    known = {"model": name, "options": options.fingerprint()}
    check_cells(store_path, known if args.text else known | {"documents": list(read)}, args.resume)
    with Terminal() as terminal:
        model, tokenizer = load_model(args)
        needed = max(args.lengths) + args.tokens + 1
        if args.text:
            found = build(args.text, args.count, needed, lambda text: tokenizer(text)["input_ids"], args.held_out)
            documents, names = [document.ids for document in found], [document.name for document in found]
        else:
            documents, names = [torch.tensor(tokenizer(text)["input_ids"]) for text in read.values()], list(read)
        if "language" in tasks and min(map(len, documents)) < needed:
            raise ValueError(f"documents: expected at least {needed} tokens each, got {min(map(len, documents))}")
        if needed - 1 > context_of(model):
            raise ValueError(
                f"lengths: expected at most {context_of(model) - args.tokens} tokens (the model's {context_of(model)} less {args.tokens} "
                f"new ones), got {max(args.lengths)}"
            )

        store = CellStore(store_path, describe(name, model, options, names), args.resume)
        prose = [sentence for text in read.values() for sentence in sentences(text)]
        with terminal.progress("cells") as advance:
            cells = Runner(model, tokenizer, documents, prose, store, options, lambda what, done, total: advance(done, total, what)).run()

        described = json.loads(store.path.read_text("utf-8").splitlines()[0])["run"]
        write_json(args.out / "results.json", {**described, "cells": cells})
        rows = report.rows(described, cells)
        write_jsonl(args.out / "table.jsonl", rows)
        (args.out / "table.md").write_text(report.markdown(described, cells), "utf-8")
        for title, columns, lines in report.tables(cells):
            terminal.table(title, columns, lines)
        try:
            from ..evaluation.plots import draw

            written = [path.name for path in draw(cells, args.out)]
        except ImportError:
            written = []
            terminal.note("no plots: matplotlib is not installed")
        terminal.line(f"{args.out}: {', '.join(['cells.jsonl', 'table.jsonl', 'results.json', 'table.md', *written])}")
    return rows
