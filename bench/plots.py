"""Draws what result files suffice for: speed-ups over FlashAttention 2, stages, phases of the fused kernel, time per output token."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from . import rows as results
from .rows import EQUAL, is_peer, latest, speed_up

FA2, DENSE, HF_STATIC = "torch_fa2", "twilight_dense", "hf_static"
STAGES = ("select", "estimate", "prune", "attend")
# What the fused kernel does between two readings of the clock, by what it is for.
PHASES_OF = {
    "query read": ("query read",),
    "pages kept": ("pages kept",),
    "candidates scored": ("candidates scored", "scores normalized"),
    "candidates chosen": ("scores counted", "bin found", "candidates dealt"),
    "weights estimated": ("weights estimated", "weights normalized"),
    "pruned": ("weights counted", "thresholds found", "survivors listed", "survivors shared out"),
    "attended": ("attended", "written"),
}
# (B, Hq, Hkv, L) of a layer call.
Cell = tuple[int, int, int, int]
# Label and colour by method, in the order of the bars; dense ones are grey.
LAYER_METHODS = {
    "cudnn_sdpa": ("cuDNN SDPA", "0.35"),
    "fa3": ("FlashAttention 3", "0.42"),
    "flashinfer": ("FlashInfer", "0.5"),
    "flashinfer_tensor_cores": ("FlashInfer, tensor cores", "0.62"),
    "flex_attention": ("FlexAttention", "0.75"),
    DENSE: ("ours, dense", "C4"),
    "stages_quest": ("ours, Quest, Triton stages", "C9"),
    "stages_shadow_prefix_eighth": ("ours, shadow prefix, Triton stages", "C1"),
    "twilight_quest": ("ours, Quest", "C0"),
    "twilight_shadow_prefix_eighth": ("ours, shadow prefix", "C3"),
    "shadow_prefix:0.95": ("ours, shadow prefix, p .95", "C3"),
    "shadow_prefix:0.95:page_fraction=1": ("ours, shadow prefix of every token, p .95", "C1"),
    "page_mean:n/12:0.9": ("ours, page means n/12, p .9", "C5"),
    "page_mean:n/4:0.95": ("ours, page means n/4, p .95", "C9"),
    "quest:n/4:0.95": ("ours, Quest n/4, p .95", "C0"),
    "speed_of_light_shadow_prefix_eighth": ("only reading the shadow prefix's bytes", "C2"),
}
MODEL_METHODS = {
    HF_STATIC: ("transformers, static cache, compiled", "0.7"),
    "dense": ("ours, dense", "0.4"),
    "quest": ("ours, Quest", "C9"),
    "full+twilight": ("ours, Full + Twilight", "C1"),
    "quest+twilight": ("ours, Quest + Twilight", "C0"),
    "shadow_prefix+twilight": ("ours, shadow prefix + Twilight", "C3"),
}


def cell_of(row: dict) -> Cell:
    return tuple(row["shape"][key] for key in ("B", "Hq", "Hkv", "L"))


def tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


@dataclass
class Panel:
    """Groups of bars, one a batch size: height and text by method; a text without a height marks one that failed."""

    title: str
    groups: dict[int, dict[str, tuple[float, str]]]
    lines: dict[int, float]  # a dotted line across a group


def grouped(panels: Sequence[Panel], columns: int, methods: dict[str, tuple[str, str]], ylabel: str, line: str) -> plt.Figure:
    """All panels, with `columns` in a row."""
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(max(7, 4.2 * columns), 3.4 * lines), layout="constrained")
    drawn: dict[str, None] = {}
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, panel in zip(axes.flat, panels, strict=False):
        names = [name for name in methods if any(name in group for group in panel.groups.values())]
        width = 0.85 / len(names)
        drawn |= dict.fromkeys(names)
        for x, (batch, group) in enumerate(sorted(panel.groups.items())):
            for name, (height, text) in group.items():
                place = x + (names.index(name) - (len(names) - 1) / 2) * width
                if not math.isnan(height):
                    ax.bar(place, height, width, color=methods[name][1])
                ax.text(place, 0 if math.isnan(height) else height, text, rotation=90, ha="center", va="bottom", fontsize=6)
            if batch in panel.lines:
                ax.hlines(panel.lines[batch], x - 0.45, x + 0.45, color="0.2", linestyle=":", linewidth=0.8)
        ax.set_xticks(range(len(panel.groups)), [f"batch {batch}" for batch in sorted(panel.groups)])
        ax.set_title(panel.title, fontsize=9)
        ax.margins(y=0.15)
        ax.set_ylabel(ylabel, fontsize=8)
    handles = [Patch(color=methods[name][1], label=methods[name][0]) for name in methods if name in drawn]
    handles.append(plt.Line2D([], [], color="0.2", linestyle=":", linewidth=0.8, label=line))
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if columns < 3 else 5, fontsize=8, frameon=False)
    return figure


def stacked(calls: Sequence[tuple[str, dict[str, float], float | None]], xlabel: str) -> plt.Figure:
    """One stacked bar a call of (label, microseconds by part, microseconds of the whole in one call)."""
    figure, ax = plt.subplots(figsize=(9, 0.75 * len(calls) + 1.2), layout="constrained")
    left = [0.0] * len(calls)
    for i, part in enumerate(dict.fromkeys(part for _, parts, _ in calls for part in parts)):
        widths = [parts.get(part, 0.0) for _, parts, _ in calls]
        bars = ax.barh(range(len(calls)), widths, 0.5, left=left, color=f"C{i}", label=part)
        ax.bar_label(bars, [f"{width:.0f}" if width >= 2 else "" for width in widths], label_type="center", fontsize=7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (total, (_, _, whole)) in enumerate(zip(left, calls, strict=True)):
        ax.text(total, place, f" {total:.0f}", va="center", fontsize=8)
        if whole is not None:
            ax.barh(place + 0.37, whole, 0.2, color="0.4", label="" if ax.get_legend_handles_labels()[1][-1] == "one call" else "one call")
            ax.text(whole, place + 0.37, f" {whole:.0f}", va="center", fontsize=7)
    ax.set_yticks(range(len(calls)), [label for label, _, _ in calls], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.06)
    ax.set_xlabel(xlabel)
    figure.legend(loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return figure


def speedups(rows: Sequence[dict]) -> dict[Cell, dict[str, float]]:
    """How many times as fast as FlashAttention 2 in the same run.

    Cells without it, failed methods, stages and settings that are not at equal accuracy are left out.
    """
    us: dict[Cell, dict[str, float]] = {}
    for row in rows:
        if "median_us" in row and "method" in row and "stage" not in row and row.get("accuracy") != results.NOT_EQUAL:
            # A method that was asked for by its setting goes by it.
            name = row["setting"] if ":" in row["method"] and row["method"].startswith("twilight_") else row["method"]
            us.setdefault(cell_of(row), {})[name] = row["median_us"]
    return {cell: {name: by[FA2] / by[name] for name in LAYER_METHODS if name in by} for cell, by in sorted(us.items()) if FA2 in by}


def draw_speedup(rows: Sequence[dict]) -> plt.Figure:
    """In the shape of the paper's Figure 7: one panel a head count and length."""
    found: dict[tuple, Panel] = {}
    for (batch, heads, kv_heads, length), by_method in speedups(rows).items():
        panel = Panel(f"{heads}/{kv_heads} heads, {tokens(length)} tokens", {}, {})
        panel = found.setdefault((-heads / kv_heads, heads, length), panel)
        panel.groups[batch] = {name: (ratio, f" {ratio:.1f}") for name, ratio in by_method.items()}
        panel.lines[batch] = 1.0
    if not found:
        raise ValueError(f"expected cells of decode_attention with {FA2} and others, got none")
    panels = [panel for _, panel in sorted(found.items())]
    columns = len({key[2] for key in found})
    figure = grouped(panels, columns, LAYER_METHODS, "speed-up over FlashAttention 2", "as fast as FlashAttention 2")
    measured = [row for row in rows if "median_us" in row and row.get("method") == FA2]
    told = {", ".join(str(row[key]) for key in ("machine", "dtype") if key in row) for row in measured}
    figure.suptitle("; ".join(["one layer of attention a decode step", *sorted(told - {""})]), fontsize=9)
    return figure


def draw_equal_accuracy(rows: Sequence[dict]) -> plt.Figure:
    """Speed-up over the best dense attention of the same run, of dense kernels and of settings that are at equal accuracy alone."""
    drawn: dict[Cell, dict[str, dict]] = {}
    for row in rows:
        if "median_us" in row and "stage" not in row and (is_peer(row) or row["method"] == DENSE or row.get("accuracy") == EQUAL):
            drawn.setdefault(cell_of(row), {})[row.get("setting") or row["method"]] = row
    drawn = {
        cell: by
        for cell, by in drawn.items()
        if any(map(is_peer, by.values())) and any(row.get("accuracy") == EQUAL for row in by.values())
    }
    if not drawn:
        raise ValueError("expected cells of decode_attention with a dense peer and settings at equal accuracy, got none")
    names = [name for name in LAYER_METHODS if any(name in by and not is_peer(by[name]) for by in drawn.values())]
    figure, ax = plt.subplots(figsize=(9, 3.8), layout="constrained")
    width = 0.85 / len(names)
    for x, by in enumerate(drawn.values()):
        best = min(row["median_us"] for row in by.values() if is_peer(row))
        for place, name in enumerate(names):
            if name in by:
                ratio = best / by[name]["median_us"]
                bar = ax.bar(x + (place - (len(names) - 1) / 2) * width, ratio, width, color=LAYER_METHODS[name][1])
                ax.bar_label(bar, [f"{ratio:.1f}"], fontsize=7)
    ax.axhline(1.0, color="0.2", linestyle=":", linewidth=0.8)
    labels = [f"batch {batch}\n{tokens(length)}\n{heads}/{kv_heads} heads" for batch, heads, kv_heads, length in drawn]
    ax.set_xticks(range(len(drawn)), labels, fontsize=8)
    ax.set_ylabel("times the best dense attention", fontsize=8)
    handles = [Patch(color=LAYER_METHODS[name][1], label=LAYER_METHODS[name][0]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    told = {", ".join(str(row[key]) for key in ("machine", "dtype") if key in row) for by in drawn.values() for row in by.values()}
    figure.suptitle(
        "; ".join(
            ["one layer of attention a decode step", *sorted(told), f"keys and queries as a real model's, KL at most {results.MAX_KL}"]
        ),
        fontsize=9,
    )
    return figure


def stages(rows: Sequence[dict]) -> list[tuple[str, dict[str, float], float | None]]:
    """(label, microseconds by stage, microseconds of decode_attention) of every shape and selector whose four stages were timed."""
    parts: dict[tuple, dict[str, float]] = {}
    whole: dict[tuple, float] = {}
    for row in rows:
        if row.get("stage") in STAGES and "median_us" in row and row["selector"] != "full":
            selector, budget = row["selector"].split(":")
            parts.setdefault((cell_of(row), selector, int(budget)), {})[row["stage"]] = row["median_us"]
        elif row.get("method", "").startswith("twilight_") and not row.get("takes_dense_path", True) and "token_budget" in row:
            selector = "quest" if "quest" in row["method"] else "shadow_prefix" if "shadow_prefix" in row["method"] else "full"
            budget = max(row["token_budget"], math.ceil(row["budget_fraction"] * row["shape"]["L"]))
            whole[cell_of(row), selector, budget] = row["median_us"]
    found = []
    for key, by_stage in sorted(parts.items()):
        if set(by_stage) == set(STAGES):
            (batch, heads, kv_heads, length), selector, budget = key
            label = f"{selector.replace('_', ' ')}, {budget} of {tokens(length)}\n{heads}/{kv_heads}, batch {batch}"
            found.append((label, {stage: by_stage[stage] for stage in STAGES}, whole.get(key)))
    return found


def draw_stages(rows: Sequence[dict]) -> plt.Figure:
    """The stages, each sum above the one call that a model makes."""
    calls = stages(rows)
    if not calls:
        raise ValueError("expected select, estimate, prune and attend of one shape (`--op stages`), got none")
    return stacked(calls, "microseconds a layer")


def phases(rows: Sequence[dict]) -> list[tuple[str, dict[str, float], None]]:
    """(label, microseconds by purpose) of one block of every call of the fused kernel whose phases were timed."""
    found = []
    for row in (row for row in rows if "phase_us" in row):
        if unknown := set(row["phase_us"]) - {name for names in PHASES_OF.values() for name in names}:
            raise ValueError(f"phase_us: expected phases of PHASES_OF, got {', '.join(sorted(unknown))}")
        batch, heads, kv_heads, length = cell_of(row)
        blocks = f"{row['cluster_size']} block" + ("s" if row["cluster_size"] > 1 else "")
        name = row.get("setting", row.get("selector")).replace("_", " ")
        label = f"{name}\n{heads}/{kv_heads}, batch {batch}, {tokens(length)}, {blocks}"
        found.append((label, {what: sum(row["phase_us"].get(name, 0.0) for name in names) for what, names in PHASES_OF.items()}, None))
    return found


def draw_phases(rows: Sequence[dict]) -> plt.Figure:
    """Where the time of one block goes, waiting for the others included."""
    calls = phases(rows)
    if not calls:
        raise ValueError("expected phases of the fused kernel (`--op phases`), got none")
    return stacked(calls, "microseconds of one block")


def draw_llama(rows: Sequence[dict]) -> plt.Figure:
    """In the shape of the paper's Figure 8: one panel a shape and context; texts say how many times as fast as our dense step."""
    found: dict[tuple, Panel] = {}
    decoded = latest(rows, "decode")
    for row in (row for row in decoded if row["method"] in MODEL_METHODS):
        key = (row["shape"], row["gpus"], row["context"])
        title = f"{row['shape']}, {tokens(row['context'])} tokens" + (f", {row['gpus']} GPUs" if row["gpus"] > 1 else "")
        panel = found.setdefault(key, Panel(title, {}, {}))
        ratio = speed_up(row, decoded, "dense")
        text = " failed" if "ms" not in row else "" if ratio is None else f" {ratio:.1f}x"
        panel.groups.setdefault(row["batch"], {})[row["method"]] = (row.get("ms", math.nan), text)
        if "floor_ms" in row:
            panel.lines[row["batch"]] = row["floor_ms"]
    if not found:
        raise ValueError("expected decode steps (`--op llama`), got none")
    panels = [panel for _, panel in sorted(found.items())]
    return grouped(panels, len(panels), MODEL_METHODS, "ms per output token", "reading weights, K and V once")


PLOTS: dict[str, Callable[[Sequence[dict]], plt.Figure]] = {
    "decode_attention_equal_accuracy.png": draw_equal_accuracy,
    "decode_attention_speedup.png": draw_speedup,
    "decode_attention_stages.png": draw_stages,
    "decode_attention_phases.png": draw_phases,
    "llama.png": draw_llama,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes each plot that the rows suffice for; exit status 1 where there was none."""
    p = argparse.ArgumentParser(prog="python -m bench plot", description=__doc__)
    p.add_argument("rows", nargs="+", type=Path, metavar="ROWS.jsonl")
    p.add_argument("-o", "--output", type=Path, default=Path("."), help="folder for the images")
    p.add_argument("--prefix", default="", help="of their names, such as h200_")
    options = p.parse_args(arguments)
    rows = [row for path in options.rows for row in results.read(path) if row.get("device") != "cpu"]
    options.output.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, draw in PLOTS.items():
        path = options.output / f"{options.prefix}{name}"
        try:
            figure = draw(rows)
        except ValueError as error:
            print(f"{path.name}: not drawn, {error}")
            continue
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written += 1
        print(f"wrote {path}")
    return 0 if written else 1
