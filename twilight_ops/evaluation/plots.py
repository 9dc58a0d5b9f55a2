"""Plots of a finished run; needs matplotlib, which is no dependency of the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import TwilightConfig
from ..selectors import DEFAULT
from .runner import LANGUAGE

_MARKERS = "Dos^v<>PhX*"


def _language(cells: Sequence[dict], length: int) -> list[dict]:
    return [cell for cell in cells if cell["task"] == LANGUAGE and cell["length"] == length and cell["selector"] != "dense"]


def _series(cells: Sequence[dict]) -> dict[str, list[dict]]:
    """Cells by selector, alone (p = 1) apart from pruned."""
    series: dict[str, list[dict]] = {}
    for cell in cells:
        name = cell["selector"] + ("" if cell["top_p"] < 1.0 else " alone")
        series.setdefault(name, []).append(cell)
    return series


def _styles(cells: Sequence[dict]) -> dict[str, int]:
    """A number for every selector of the run, the same in every panel; the flagship is the first."""
    return {name: i for i, name in enumerate(sorted({cell["selector"] for cell in cells if "selector" in cell}, key=_flagship_first))}


def _flagship_first(name: str) -> tuple[bool, str]:
    return name != DEFAULT.name, name


def _scatter(ax, cells: Sequence[dict], styles: dict[str, int], x: str, y: str, factor: float = 1.0) -> None:
    for name, points in sorted(_series(cells).items()):
        index = styles[points[0]["selector"]]
        alone = name.endswith(" alone")
        ax.plot(
            [point[x] * factor for point in points],
            [point[y] for point in points],
            linestyle="none",
            marker=_MARKERS[index % len(_MARKERS)],
            color=f"C{index}",
            markerfacecolor="none" if alone else f"C{index}",
            label=name,
        )


def pareto(ax, cells: Sequence[dict], length: int) -> None:
    """KL against bytes read by the sparse layers; dense is 100% at KL 0."""
    mine = [cell for cell in _language(cells, length) if cell["kl"] > 0]
    _scatter(ax, mine, _styles(cells), "sparse_layers_bytes_share", "kl", 100.0)
    front, best = [], float("inf")
    for cell in sorted(mine, key=lambda cell: cell["sparse_layers_bytes_share"]):
        # What reads every exact weight is a bound on accuracy, not a way to save bytes.
        if cell["kl"] < best and not cell["selector"].startswith("exact_"):
            best = cell["kl"]
            front.append(cell)
    ax.plot([100 * cell["sparse_layers_bytes_share"] for cell in front], [cell["kl"] for cell in front], color="0.6", linewidth=1, zorder=0)
    ax.axvline(100.0, color="0.3", linestyle=":", label="dense (KL 0)")
    ax.set(xscale="log", yscale="log", xlabel="bytes read by the sparse layers, % of dense", ylabel="KL to dense", title=f"{length} tokens")


def accuracy(ax, cells: Sequence[dict], length: int) -> None:
    _scatter(ax, _language(cells, length), _styles(cells), "kept", "top1")
    ax.set(xscale="log", xlabel="tokens kept a KV head", ylabel="top-1 agreement with dense", title=f"{length} tokens")


def mass(ax, cells: Sequence[dict]) -> None:
    """Mass of each query head's own set against p: what was asked for, what the estimate says, what is true."""
    for index, cell in enumerate(cell for cell in cells if cell["task"] == "mass"):
        top_p = [row["top_p"] for row in cell["mass"]]
        ax.plot(top_p, [row["estimated_mass"] for row in cell["mass"]], "--", color=f"C{index}", label=f"{cell['length']} estimated")
        ax.plot(top_p, [row["true_mass"] for row in cell["mass"]], "o-", color=f"C{index}", label=f"{cell['length']} true")
    ax.axline((0.7, 0.7), slope=1.0, color="0.6", linewidth=1, label="p")
    ax.set(xlabel="p", ylabel="attention mass kept", title="mean over heads and steps")
    ax.legend(fontsize=6)


def heat_map(fig, ax, cell: dict) -> None:
    """Tokens kept by layer and KV head."""
    import matplotlib.colors

    kept = [list(row) for row in zip(*cell["kept_by_head"], strict=True)]
    image = ax.imshow(kept, aspect="auto", norm=matplotlib.colors.LogNorm(vmin=1), cmap="viridis")
    ax.set(xlabel="layer", ylabel="KV head", title=f"{cell['method']} p={cell['top_p']:g}, {cell['length']} tokens: kept a step")
    fig.colorbar(image, ax=ax)


def draw(cells: Sequence[dict], folder: Path, heat_map_of: str | None = None) -> list[Path]:
    """Writes every plot the cells allow; returns their paths.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({cell["length"] for cell in cells if cell["task"] == LANGUAGE})
    paths = []

    def save(fig, name: str) -> None:
        path = folder / f"{name}.png"
        fig.savefig(path, dpi=130)
        plt.close(fig)
        paths.append(path)

    for name, panel in (("pareto", pareto), ("accuracy", accuracy)):
        if lengths:
            fig, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths) + 1.5, 4.5), squeeze=False, layout="constrained")
            for ax, length in zip(axes[0], lengths, strict=True):
                panel(ax, cells, length)
            # One legend for all panels, beside them: within, it would hide points.
            named = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
            fig.legend(named.values(), named.keys(), loc="outside right center", fontsize=7)
            save(fig, name)
    if any(cell["task"] == "mass" for cell in cells):
        fig, ax = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
        mass(ax, cells)
        save(fig, "mass")
    pruned = [cell for cell in cells if cell["task"] == LANGUAGE and cell["top_p"] < 1.0 and "kept_by_head" in cell]
    chosen = [cell for cell in pruned if cell["method"] == (heat_map_of or DEFAULT.name)] or pruned
    if chosen:
        fig, ax = plt.subplots(figsize=(9, 2.5), layout="constrained")
        default = TwilightConfig().top_p
        heat_map(fig, ax, max(chosen, key=lambda cell: (cell["length"], -abs(cell["top_p"] - default))))
        save(fig, "budget_by_head")
    return paths
