"""What the commands show: progress, streamed text, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..report import BudgetReport


@contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar; its value is called with (done, total), and the bar is left standing when they are equal."""
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if done == total:
                progress.stop()

        yield advance


class TextStream:
    """Prints the text of one sequence's tokens as they come."""

    def __init__(self, console: Console, tokenizer):
        self.console, self.tokenizer = console, tokenizer
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, tokens) -> None:
        """Takes tokens [1, n]."""
        self.tokens += tokens[0].tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # An unfinished character decodes to a replacement until its last byte is there.
        end = len(text.rstrip("\ufffd"))
        self._write(text[self.printed : end])
        self.printed = max(self.printed, end)

    def finish(self) -> None:
        self._write(self.tokenizer.decode(self.tokens, skip_special_tokens=True)[self.printed :] + "\n")

    def _write(self, text: str) -> None:
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column, overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def budget_rows(report: BudgetReport | None) -> dict[str, str]:
    """What the sparse layers kept, all KV heads together."""
    budget = None if report is None else report.sparse
    if budget is None:
        return dict.fromkeys(("candidates a KV head", "tokens kept a KV head", "captured mass", "pruned"), "all tokens" if report else "-")
    return {
        "candidates a KV head": _spread(budget.candidates),
        "tokens kept a KV head": _spread(budget.kept),
        "captured mass": f"{budget.captured_mass:.4f}",
        "pruned": f"{budget.pruned:.1%}",
    }


def _spread(spread) -> str:
    return f"{spread.mean:.0f} (p5 {spread.p5:.0f}, p95 {spread.p95:.0f})"
