"""Tables of a finished run, in the shape of the Twilight paper's: method, without and with the pruner, budget after pruning."""

from __future__ import annotations

from collections.abc import Sequence

from .runner import LANGUAGE

LANGUAGE_COLUMNS = (
    "method",
    "without Twilight: KL / worst / top-1 / ppl",
    "p",
    "with Twilight: KL / worst / top-1 / ppl",
    "avg. budget",
    "pruned",
    "bytes",
    "true mass: mean / 1% / lowest",
    "alone at that budget: KL",
)
TASK_COLUMNS = ("method", "without Twilight", "p", "with Twilight", "no worse than dense")


def _of(cells: Sequence[dict], task: str, length: int) -> list[dict]:
    return [cell for cell in cells if cell["task"] == task and cell["length"] == length and "method" in cell]


def _quality(cell: dict | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['kl']:.4f} / {cell['worst_kl']:.3f} / {cell['top1']:.3f} / {cell['perplexity_change']:+.1%}"


def _mass(cell: dict) -> str:
    return f"{cell['mass_mean']:.4f} / {cell['mass_p1']:.3f} / {cell['mass_lowest']:.3f}" if "mass_mean" in cell else "-"


def language_rows(cells: Sequence[dict], length: int) -> list[tuple[str, ...]]:
    """One row a pruned method, beside the same selector alone; selectors that never ran pruned stand alone."""
    mine = _of(cells, LANGUAGE, length)
    equal = {cell["equal_tokens_of"]: cell for cell in mine if "equal_tokens_of" in cell}
    plain = [cell for cell in mine if "equal_tokens_of" not in cell]
    alone = {cell["method"]: cell for cell in plain if cell["top_p"] == 1.0}
    pruned = [cell for cell in plain if cell["top_p"] < 1.0]
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in plain):
        with_pruner = [cell for cell in pruned if cell["method"] == method]
        for cell in with_pruner:
            twin = equal.get(f"{method} p={cell['top_p']:g}")
            rows.append(
                (
                    method,
                    _quality(alone.get(method)),
                    f"{cell['top_p']:g}",
                    _quality(cell),
                    f"{cell['kept']:.0f} of {cell['live']:.0f}",
                    f"{cell['pruned']:.1%}",
                    f"{cell['sparse_layers_bytes_share']:.1%} ({cell['bytes_share']:.1%})",
                    _mass(cell),
                    f"{twin['kl']:.4f}" if twin else "-",
                )
            )
        if not with_pruner:
            cell = alone[method]
            budget = f"{cell['kept']:.0f} of {cell['live']:.0f}" if "kept" in cell else "all"
            shares = f"{cell['sparse_layers_bytes_share']:.1%} ({cell['bytes_share']:.1%})"
            rows.append((method, _quality(cell), "-", "-", budget, f"{cell.get('pruned', 0.0):.1%}", shares, _mass(cell), "-"))
    return rows


def task_rows(cells: Sequence[dict], task: str, length: int) -> list[tuple[str, ...]]:
    """Mean scores, and of the samples on which dense scores at all, those on which the pruned method scores no less."""
    mine = _of(cells, task, length)
    alone = {cell["method"]: cell for cell in mine if cell["top_p"] == 1.0}
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in mine):
        plain = f"{alone[method]['score']:.1%}" if method in alone else "-"
        with_pruner = [cell for cell in mine if cell["method"] == method and cell["top_p"] < 1.0]
        for cell in with_pruner:
            rows.append((method, plain, f"{cell['top_p']:g}", f"{cell['score']:.1%}", _beside_dense(cell, alone.get("dense"))))
        if not with_pruner:
            rows.append((method, plain, "-", "-", "-"))
    return rows


def _beside_dense(cell: dict, dense: dict | None) -> str:
    """`5 of 6`: samples on which dense scores at all, and those of them on which this method scores no less."""
    solved = [pair for pair in zip(_scores(cell), _scores(dense) if dense else (), strict=False) if pair[1] > 0]
    return f"{sum(ours >= theirs for ours, theirs in solved)} of {len(solved)}" if solved or not dense else "dense fails on every sample"


def _scores(cell: dict) -> list[float]:
    """Of every sample, in one order for all methods."""
    return [score for scores in cell["scores_by_depth"].values() for score in scores]


# What a row of the table has of its cell, and of the same selector alone.
_QUALITY = ("kl", "worst_kl", "top1", "perplexity", "perplexity_change", "score")
_MEASURED = ("live", "candidates", "kept", "pruned", "bytes_share", "mass_mean", "mass_p1", "mass_lowest", "mass_rows", "seconds")


def rows(run: dict, cells: Sequence[dict]) -> list[dict]:
    """One row a method and p, beside the same selector without the pruner, with what the run was: what `table.jsonl` holds."""
    shared = {
        name: run[name]
        for name in ("model", "parameters", "dtype", "device", "machine", "backend", "commit", "command", "versions", "documents")
    }
    shared["tokens_a_document"] = run["options"]["forced_tokens"]
    found = []
    measured = [cell for cell in cells if "method" in cell and "equal_tokens_of" not in cell]
    alone = {(cell["task"], cell["length"], cell["method"]): cell for cell in measured if cell["top_p"] == 1.0}
    for cell in measured:
        told = {name: cell[name] for name in ("task", "length", "method", "setting", "top_p")}
        told |= {name: cell[name] for name in (*_QUALITY, *_MEASURED) if name in cell}
        if "sparse_layers_bytes_share" in cell:
            told["bytes_share"] = cell["sparse_layers_bytes_share"]
        without = alone.get((cell["task"], cell["length"], cell["method"]))
        if cell["top_p"] < 1.0 and without is not None:
            told["without"] = {name: without[name] for name in (*_QUALITY, "kept") if name in without}
        if "score" in cell:
            dense = alone.get((cell["task"], cell["length"], "dense"))
            told |= {"scores_by_depth": cell["scores_by_depth"], "prompt_tokens": cell["prompt_tokens"]}
            told |= {"dense_score": dense["score"], "no_worse_than_dense": _beside_dense(cell, dense)} if dense else {}
        found.append(told | shared)
    return found


def tables(cells: Sequence[dict]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """(title, columns, rows) of every task and length that ran."""
    found = dict.fromkeys((cell["task"], cell["length"]) for cell in cells if "method" in cell)
    result = []
    for task, length in sorted(found, key=lambda pair: (pair[0] != LANGUAGE, pair)):
        if task == LANGUAGE:
            result.append((f"{length} tokens, teacher-forced", LANGUAGE_COLUMNS, language_rows(cells, length)))
        else:
            result.append((f"{task}, {length} tokens", TASK_COLUMNS, task_rows(cells, task, length)))
    return result


def markdown(run: dict, cells: Sequence[dict]) -> str:
    """All tables as one Markdown page."""
    lines = [
        f"{run['model']}, {run['dtype']}, {run['device']} ({run['backend']}), " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()),
        "",
        "KL to dense, share of equal top-1 tokens, change of perplexity. Budget: mean tokens a KV head after pruning.",
        "Bytes: share of dense K and V that the sparse layers read, in brackets with the dense layers.",
    ]
    for title, columns, rows in tables(cells):
        lines += ["", f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    for cell in cells:
        if cell["task"] == "mass":
            lines += ["", f"### {cell['length']} tokens, mass of each query head's own set", ""]
            lines += [
                "| p | estimated mass | lowest estimated - p | true mass | lowest true mass | kept a query head |",
                "|" + " --- |" * 6,
            ]
            lines += [
                f"| {row['top_p']:g} | {row['estimated_mass']:.4f} | {row['lowest_estimated_minus_p']:+.1e} | {row['true_mass']:.4f} | "
                f"{row['lowest_true_mass']:.3f} | {row['kept_a_query_head']:.0f} |"
                for row in cell["mass"]
            ]
    return "\n".join(lines) + "\n"
