"""Plot of bench_llama.py's rows in the shape of the paper's Figure 8: time per output token by batch size, one panel a shape and context.

    python bench/plot_llama.py bench/results/h200_llama.json -o bench/results/h200_llama.png

Above each bar stands how many times as fast it is as our own dense step in the same cell.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_llama import HF_STATIC, latest, speed_up
from timing import read_rows

# Label and colour by method, in the order of the bars; dense ones are grey.
METHODS = {
    HF_STATIC: ("transformers, static cache, compiled", "0.7"),
    "dense": ("ours, dense", "0.4"),
    "quest": ("ours, Quest", "C9"),
    "full+twilight": ("ours, Full + Twilight", "C1"),
    "quest+twilight": ("ours, Quest + Twilight", "C0"),
    "shadow_prefix+twilight": ("ours, shadow prefix + Twilight", "C3"),
}
# (shape, GPUs, context)
Panel = tuple[str, int, int]


def panels(rows: Sequence[dict]) -> dict[Panel, dict[int, dict[str, dict]]]:
    """Decode rows by panel, batch and method, each the latest of its kind; those that failed stay, to be marked as such."""
    found: dict[Panel, dict[int, dict[str, dict]]] = {}
    for row in latest(rows, "decode"):
        if row["method"] in METHODS:
            cell = found.setdefault((row["shape"], row["gpus"], row["context"]), {})
            cell.setdefault(row["batch"], {})[row["method"]] = row
    return {panel: dict(sorted(cells.items())) for panel, cells in sorted(found.items())}


def label(panel: Panel) -> str:
    shape, gpus, context = panel
    tokens = f"{context // 1024}k" if context % 1024 == 0 else str(context)
    return f"{shape}, {tokens} tokens" + (f", {gpus} GPUs" if gpus > 1 else "")


def draw(rows: Sequence[dict]) -> plt.Figure:
    """One panel a shape and context, one group of bars a batch size."""
    found = panels(rows)
    if not found:
        raise ValueError(f"rows: expected decode rows of {', '.join(METHODS)}, got none")
    figure, axes = plt.subplots(1, len(found), squeeze=False, figsize=(max(7.0, 5.5 * len(found)), 4.2), layout="constrained")
    for ax, (panel, cells) in zip(axes[0], found.items(), strict=True):
        names = [name for name in METHODS if any(name in cell for cell in cells.values())]
        width = 0.85 / len(names)
        for x, cell in enumerate(cells.values()):
            for i, name in enumerate(names):
                place = x + (i - (len(names) - 1) / 2) * width
                row = cell.get(name)
                if row is None:
                    continue
                if "ms" not in row:
                    ax.text(place, 0, "failed", rotation=90, ha="center", va="bottom", fontsize=7, color=METHODS[name][1])
                    continue
                ax.bar(place, row["ms"], width, color=METHODS[name][1])
                ratio = speed_up(row, list(cell.values()), "dense")
                ax.text(place, row["ms"], "" if ratio is None else f"{ratio:.1f}x", ha="center", va="bottom", fontsize=7)
            floors = [row["floor_ms"] for row in cell.values() if "floor_ms" in row]
            if floors:
                ax.hlines(floors[0], x - 0.45, x + 0.45, color="black", linestyle=":", linewidth=1)
        ax.set_xticks(range(len(cells)), [f"batch {batch}" for batch in cells])
        ax.set(ylabel="ms per output token", title=label(panel))
    used = [name for name in METHODS if any(name in cell for cells in found.values() for cell in cells.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=METHODS[name][1], label=METHODS[name][0]) for name in used]
    floor = plt.Line2D([], [], color="black", linestyle=":", linewidth=1, label="reading weights, K and V once")
    figure.legend(handles=[*handles, floor], loc="outside lower center", ncols=4, fontsize=7)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+", help="files of bench_llama.py --json")
    parser.add_argument("-o", "--output", type=Path, default=Path("llama.png"))
    options = parser.parse_args(arguments)
    draw([row for path in options.rows for row in read_rows(path)]).savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
