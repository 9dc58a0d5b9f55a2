"""Plots of bench_decode_attention.py's rows: speed-up over FlashAttention 2 in the shape of the paper's Figure 7, and the stage breakdowns.

The breakdown of the Triton stages needs bench_stages.py's rows of the same shapes too: give both files. That of the fused kernel needs
bench_fused_phases.py's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from peers import FA2
from timing import read_rows

SPEEDUP, BREAKDOWN, PHASES = "decode_attention_speedup.png", "decode_attention_stages.png", "decode_attention_phases.png"
STAGES = ("select", "estimate", "prune", "attend")
PHASE_ROW = "fused phases"  # what the rows of bench_fused_phases.py call themselves
# What the fused kernel does between two readings of the clock, by what it is for.
PHASES_OF = {
    "query read": ("query read",),
    "candidates scored": ("candidates scored", "scores normalized"),
    "candidates chosen": ("scores counted", "bin found", "boundary marked", "boundary settled", "candidates dealt"),
    "weights estimated": ("weights estimated", "weights normalized"),
    "pruned": ("weights listed", "thresholds found", "survivors listed", "survivors shared out"),
    "attended": ("attended", "written"),
}
# (B, Hq, Hkv, L): one cell of the bench.
Cell = tuple[int, int, int, int]

# Label and colour by method, in the order of the bars; dense peers are grey.
METHODS = {
    "cudnn_sdpa": ("cuDNN SDPA", "0.35"),
    "flashinfer": ("FlashInfer", "0.5"),
    "flashinfer_tensor_cores": ("FlashInfer, tensor cores", "0.62"),
    "flex_attention": ("FlexAttention", "0.75"),
    "twilight_dense": ("ours, dense", "C4"),
    "stages_quest": ("ours, Quest, Triton stages", "C9"),
    "stages_shadow_prefix_eighth": ("ours, shadow prefix, Triton stages", "C1"),
    "twilight_quest": ("ours, Quest", "C0"),
    "twilight_shadow_prefix_eighth": ("ours, shadow prefix", "C3"),
    "speed_of_light_shadow_prefix_eighth": ("only reading the shadow prefix's bytes", "C2"),
}


def cell_of(row: dict) -> Cell:
    return tuple(row["shape"][key] for key in ("B", "Hq", "Hkv", "L"))


def tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def medians(rows: Sequence[dict]) -> dict[Cell, dict[str, float]]:
    """Microseconds by cell and method; rows of methods that failed, and of stages, have none."""
    found: dict[Cell, dict[str, float]] = {}
    for row in rows:
        if "median_us" in row and "method" in row and "stage" not in row:
            found.setdefault(cell_of(row), {})[row["method"]] = row["median_us"]
    return found


def speedups(rows: Sequence[dict]) -> dict[Cell, dict[str, float]]:
    """How many times as fast as FlashAttention 2 in the same run; cells without it are left out."""
    return {cell: {name: us[FA2] / us[name] for name in METHODS if name in us} for cell, us in sorted(medians(rows).items()) if FA2 in us}


def plot_speedup(rows: Sequence[dict]) -> plt.Figure:
    """One panel a head count and length, one group of bars a batch size."""
    cells = speedups(rows)
    if not cells:
        raise ValueError(f"rows: expected cells with {FA2} and others, got none")
    heads = sorted({cell[1:3] for cell in cells}, key=lambda pair: -pair[0] / pair[1])
    lengths = sorted({cell[3] for cell in cells})
    names = [name for name in METHODS if any(name in found for found in cells.values())]
    figure, axes = plt.subplots(
        len(heads), len(lengths), squeeze=False, figsize=(4.2 * len(lengths), 3.2 * len(heads)), layout="constrained"
    )
    for axes_row, (query_heads, kv_heads) in zip(axes, heads, strict=True):
        for ax, length in zip(axes_row, lengths, strict=True):
            here = {cell[0]: found for cell, found in cells.items() if cell[1:] == (query_heads, kv_heads, length)}
            ax.set_visible(bool(here))
            batches = sorted(here)
            width = 0.85 / len(names)
            for i, name in enumerate(names):
                colour = METHODS[name][1]
                places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(batches))]
                heights = [here[batch].get(name, math.nan) for batch in batches]
                bars = ax.bar(places, heights, width, color=colour)
                text = ["" if math.isnan(h) else f"{h:.1f}" for h in heights]
                ax.bar_label(bars, text, fontsize=5, rotation=90, padding=1)
            ax.axhline(1.0, color="0.2", linewidth=0.8, linestyle=":")
            ax.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
            ax.set_title(f"{query_heads}/{kv_heads} heads, {tokens(length)} tokens", fontsize=9)
            ax.margins(y=0.15)
        axes_row[0].set_ylabel("speed-up over FlashAttention 2")
    handles = [Patch(color=colour, label=label) for label, colour in (METHODS[name] for name in names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def budget_of(row: dict) -> int:
    """Candidates in tokens that a row's selector may choose."""
    return max(row["token_budget"], math.ceil(row["budget_fraction"] * row["shape"]["L"]))


def breakdown(rows: Sequence[dict]) -> list[tuple[str, dict[str, float], float | None]]:
    """(label, microseconds by stage, microseconds of decode_attention) of every shape and selector whose four stages were timed."""
    stages: dict[tuple, dict[str, float]] = {}
    whole: dict[tuple, float] = {}
    for row in rows:
        if row.get("stage") in STAGES and "median_us" in row:
            selector, budget = row["selector"].split(":")
            stages.setdefault((cell_of(row), selector, int(budget)), {})[row["stage"]] = row["median_us"]
        elif row.get("method", "").startswith("twilight_") and not row.get("takes_dense_path", True) and "token_budget" in row:
            selector = "quest" if "quest" in row["method"] else "shadow_prefix" if "shadow_prefix" in row["method"] else "full"
            whole[cell_of(row), selector, budget_of(row)] = row["median_us"]
    found = []
    for key, parts in sorted(stages.items()):
        if set(parts) == set(STAGES):
            (batch, query_heads, kv_heads, length), selector, budget = key
            label = f"{selector.replace('_', ' ')}, {budget} of {tokens(length)}\n{query_heads}/{kv_heads}, batch {batch}"
            found.append((label, parts, whole.get(key)))
    return found


def plot_breakdown(rows: Sequence[dict]) -> plt.Figure:
    """Stacked bars of the Triton stages, each beside the call that a model makes."""
    groups = breakdown(rows)
    if not groups:
        raise ValueError("rows: expected the four stages of at least one shape (bench_stages.py writes them), got none")
    # Shapes differ by orders of magnitude, so each has a panel of its own.
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, figsize=(3 * columns, 3.4 * lines), layout="constrained")
    for ax in axes.flat[len(groups) :]:
        ax.set_visible(False)
    for ax, (label, parts, whole) in zip(axes.flat, groups, strict=False):
        bottom = 0.0
        for i, stage in enumerate(STAGES):
            bars = ax.bar(0, parts[stage], 0.7, bottom=bottom, color=f"C{i}", label=stage)
            ax.bar_label(bars, [f"{parts[stage]:.0f}"], label_type="center", fontsize=7)
            bottom += parts[stage]
        ax.text(0, bottom, f"{bottom:.0f}", ha="center", va="bottom", fontsize=8)
        if whole is not None:
            bars = ax.bar(1, whole, 0.7, color="0.4", label="decode_attention")
            ax.bar_label(bars, [f"{whole:.0f}"], fontsize=8)
        ax.set_xticks(range(1 if whole is None else 2), ["stages", "one call"][: 1 if whole is None else 2])
        ax.set_xlim(-0.6, 1.6)
        ax.set_title(label, fontsize=8)
        ax.margins(y=0.12)
        ax.set_ylabel("microseconds a layer")
    handles = {name: handle for ax in axes.flat for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def phases(rows: Sequence[dict]) -> list[tuple[str, dict[str, float]]]:
    """(label, microseconds by purpose) of one block of every call of the fused kernel whose phases were timed."""
    found = []
    for row in rows:
        if row.get("stage") != PHASE_ROW:
            continue
        if unknown := set(row["phase_us"]) - {name for names in PHASES_OF.values() for name in names}:
            raise ValueError(f"phase_us: expected phases of PHASES_OF, got {', '.join(sorted(unknown))}")
        batch, query_heads, kv_heads, length = cell_of(row)
        blocks = f"{row['cluster_size']} block" + ("s" if row["cluster_size"] > 1 else "")
        label = f"{row['selector'].replace('_', ' ')}\n{query_heads}/{kv_heads}, batch {batch}, {tokens(length)}, {blocks}"
        found.append((label, {what: sum(row["phase_us"].get(name, 0.0) for name in names) for what, names in PHASES_OF.items()}))
    return found


def plot_phases(rows: Sequence[dict]) -> plt.Figure:
    """One stacked bar a call: where the time of one of its blocks goes, waiting for the others included."""
    calls = phases(rows)
    if not calls:
        raise ValueError("rows: expected phases of the fused kernel, got none")
    figure, ax = plt.subplots(figsize=(9, 0.75 * len(calls) + 1.2), layout="constrained")
    left = [0.0] * len(calls)
    for i, what in enumerate(PHASES_OF):
        widths = [parts[what] for _, parts in calls]
        bars = ax.barh(range(len(calls)), widths, 0.7, left=left, color=f"C{i}", label=what)
        ax.bar_label(bars, [f"{width:.0f}" if width >= 2 else "" for width in widths], label_type="center", fontsize=7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        ax.text(total, place, f" {total:.0f}", va="center", fontsize=8)
    ax.set_yticks(range(len(calls)), [label for label, _ in calls], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.06)
    ax.set_xlabel("microseconds of one block")
    figure.legend(loc="outside lower center", ncols=len(PHASES_OF), fontsize=8, frameon=False)
    return figure


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("rows", nargs="+", type=Path, help="JSON-lines files of bench_decode_attention.py, bench_stages.py and of phases")
    p.add_argument("-o", "--output", type=Path, default=Path("."), help="folder for the images")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes each plot that the rows suffice for; exit status 1 where one had too few. Phases are drawn where there are some."""
    options = parser().parse_args(arguments)
    rows = [row for path in options.rows for row in read_rows(path) if row["device"] == "cuda"]
    options.output.mkdir(parents=True, exist_ok=True)
    plots = [(SPEEDUP, plot_speedup), (BREAKDOWN, plot_breakdown)]
    if any(row.get("stage") == PHASE_ROW for row in rows):
        plots.append((PHASES, plot_phases))
    status = 0
    for name, plot in plots:
        try:
            figure = plot(rows)
        except ValueError as error:
            print(f"{name}: not written, {error}")
            status = 1
            continue
        figure.savefig(options.output / name, dpi=150)
        plt.close(figure)
        print(f"wrote {options.output / name}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
