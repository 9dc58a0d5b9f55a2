"""What the commands show: results on stdout; progress, notes and warnings on stderr.

rich draws where it is installed and the stream is a terminal; everything else is plain text.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ..report import Budget, BudgetReport

Advance = Callable[..., None]  # (done, total, what=None)


def _rich_console(stream):
    """A rich console on a terminal; None where there is no terminal or no rich: plain text then."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)


class Terminal:
    """Prints for one command; as a context it shows Python's warnings as one line each.

    Plain text never wraps, so what a file or another program gets does not depend on the width of a terminal.
    """

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            # A character that the terminal cannot show must not end a generation.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._out, self._err = _rich_console(sys.stdout), _rich_console(sys.stderr)

    def __enter__(self) -> Terminal:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.showwarning = lambda message, category, *_: self.note(f"warning: {' '.join(str(message).split())}")
        return self

    def __exit__(self, *exception) -> None:
        self._warnings.__exit__(*exception)

    def write(self, text: str) -> None:
        """Part of a result, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def heading(self, text: str) -> None:
        if self._out is not None:
            self._out.rule(text)
        else:
            self.line(f"\n{text}")

    def note(self, text: str) -> None:
        """A line that is no result."""
        print(text, file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        cells = [[" ".join(str(cell).splitlines()) for cell in row] for row in rows]
        if self._out is None:
            self.write(plain_table(title, columns, cells))
            return
        from rich.table import Table

        drawn = Table(title=title, title_justify="left")
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in cells:
            drawn.add_row(*row)
        self._out.print(drawn, markup=False)

    @contextmanager
    def progress(self, description: str) -> Iterator[Advance]:
        """Its value is called with (done, total), and with what is running where that changes; at the total the bar stays as it is."""
        if self._err is None:
            yield _plain_progress(description)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._err) as progress:
            task = progress.add_task(description, total=None)

            def advance(done: int, total: int, what: str | None = None) -> None:
                progress.update(task, completed=done, total=total, description=what or description)
                if done == total:
                    progress.stop()

            yield advance

    def status(self, what: str):
        """A context in which one thing runs whose progress is not known."""
        if self._err is not None:
            return self._err.status(what)
        self.note(what)
        return nullcontext()


def _plain_progress(description: str) -> Advance:
    """One line that counts on a terminal; elsewhere a line at the end, and one for each new thing that runs."""
    counts_up = sys.stderr.isatty()
    before: list[object] = [None, None]  # what was running, whether all was done

    def advance(done: int, total: int, what: str | None = None) -> None:
        now = [what, done == total]
        text = f"{what or description} {done}/{total}"
        if counts_up:
            print(f"\r{text}\033[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif now != before and (what is not None or done == total):
            print(text, file=sys.stderr, flush=True)
        before[:] = now

    return advance


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, two spaces apart; no header where all columns are unnamed."""
    lines = [columns, *rows] if any(columns) else list(rows)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = "".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines)
    return f"\n{title}\n{text}" if title else f"\n{text}"


class TextStream:
    """Prints the text of one sequence's tokens as they come."""

    def __init__(self, terminal: Terminal, tokenizer):
        self.terminal, self.tokenizer = terminal, tokenizer
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, tokens) -> None:
        """Takes tokens [1, n]."""
        self.tokens += tokens[0].tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # An unfinished character decodes to a replacement until its last byte is there.
        end = len(text.rstrip("\ufffd"))
        self.terminal.write(text[self.printed : end])
        self.printed = max(self.printed, end)

    def finish(self) -> None:
        self.terminal.line(self.tokenizer.decode(self.tokens, skip_special_tokens=True)[self.printed :])


def milliseconds(value: float, steps: int) -> str:
    """Milliseconds a token, or why there is no such figure: NaN where no step came after the warm-up."""
    return f"{value:.2f} ms" if value == value else f"- (none of {steps} steps came after the warm-up: generate more tokens)"


def budget_rows(report: BudgetReport | None) -> dict[str, str]:
    """What the sparse layers kept, all KV heads together."""
    shown: dict[str, Callable[[Budget], str]] = {
        "candidates a KV head": lambda budget: _spread(budget.candidates),
        "tokens kept a KV head": lambda budget: _spread(budget.kept),
        "captured mass": lambda budget: f"{budget.captured_mass:.4f}",
        "pruned": lambda budget: f"{budget.pruned:.1%}",
        "calls on the dense path": lambda budget: f"{budget.dense:.1%}",
    }
    if report is None or report.sparse is None:
        return dict.fromkeys(shown, "all tokens" if report else "-")
    return {name: show(report.sparse) for name, show in shown.items()}


def _spread(spread) -> str:
    return f"{spread.mean:.0f} (p5 {spread.p5:.0f}, p95 {spread.p95:.0f})"
