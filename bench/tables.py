"""Tables of README and docs, made from result files: `python -m bench tables` writes them again, `--check` says which differ.

A table stands between two comments, the first of which names its maker and its file:

    <!-- table: accuracy bench/results/accuracy_qwen.jsonl -->
    <!-- end of table -->

`support -` is asked of the code instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence

import torch

from twilight_ops import Paging, TwilightConfig, explain
from twilight_ops.explanation import FUSED
from twilight_ops.layer import allocate_layer
from twilight_ops.ops._checks import HEAD_DIMS

from . import rows
from .rows import EQUAL, ROOT

BLOCK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
FILES = ("README.md", "docs/*.md")

SELECTORS = {
    "full": "Full",
    "shadow_prefix": "ShadowPrefix",
    "quest": "Quest",
    "page_mean": "PageMean",
    "double_sparsity": "DoubleSparsity",
    "streaming": "Streaming",
}
# Methods of a speed table, and what they are called there, in the order of its columns.
METHODS = {
    "twilight_dense": "ours, dense",
    "twilight_shadow_prefix": "ShadowPrefix",
    "twilight_shadow_prefix_eighth": "ShadowPrefix",
    "twilight_page_mean": "PageMean",
    "twilight_quest": "Quest",
    "twilight_full": "Full",
}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def method_of(row: dict) -> str:
    """ShadowPrefix, p .95; Quest n/4, p .95."""
    name, *settings = row["method"].split(":")
    shown = " ".join([SELECTORS.get(name, name), *settings]).replace(",", ", ").replace("_", " ")
    return f"{shown}, p {share(row['top_p'])}"


def share(value: float) -> str:
    return f"{value:.2f}".lstrip("0")


def accuracy(found: Sequence[dict]) -> str:
    """Distance to dense attention, what was kept, and what was read, by method."""
    lines = []
    for row in found:
        if row.get("task") != "language" or row["method"] == "dense":
            continue
        mass = [row.get(f"mass_{name}") for name in ("mean", "p1", "lowest")]
        lines.append(
            [
                method_of(row),
                f"{row['kl']:.4f}",
                f"{row['worst_kl']:.3f}",
                f"{row['top1']:.3f}",
                f"{row['perplexity_change']:+.1%}",
                f"{row['kept']:,.0f} of {row['live']:,.0f}",
                f"{row['bytes_share']:.1%}",
                "-" if None in mass else " / ".join(f"{value:.2f}" for value in mass),
            ]
        )
    header = ("method", "KL", "worst token", "equal top-1", "perplexity", "kept a KV head", "bytes", "true mass: mean / 1% / lowest")
    return markdown(header, lines)


def shape_of(row: dict) -> str:
    shape = row["shape"]
    kind = "MHA" if shape["Hq"] == shape["Hkv"] else "GQA"
    return f"{kind} {shape['Hq']}/{shape['Hkv']}, batch {shape['B']}, {shape['L'] // 1024}k"


def speed(found: Sequence[dict]) -> str:
    """Microseconds a layer call of the best dense attention and of each of our methods, with how many times as fast the latter are.

    A sparse row that is not at equal accuracy has its time, and no ratio.
    """
    timed = [row for row in found if "median_us" in row]
    ours = [name for name in METHODS if any(row["method"] == name for row in timed)]
    cells = list(dict.fromkeys((shape_of(row), row["dtype"]) for row in timed))
    lines = []
    for shape, dtype in cells:
        cell = {row["method"]: row for row in timed if (shape_of(row), row["dtype"]) == (shape, dtype)}
        peers = [row for row in cell.values() if row["method"] not in METHODS and "ratio_to_best_dense" in row and not _is_floor(row)]
        if not peers:
            continue
        best = min(peers, key=lambda row: row["median_us"])
        times = [_time(cell.get(name), best) for name in ours]
        lines.append([shape, dtype, f"{best['median_us']:,.0f} ({best['method']})", *times])
    return markdown(("shape", "dtype", "best dense, us", *(METHODS[name] for name in ours)), lines)


def _is_floor(row: dict) -> bool:
    return row["method"].startswith("speed_of_light") or row["method"].startswith("stages_")


def _time(row: dict | None, best: dict) -> str:
    if row is None:
        return ""
    time = f"{row['median_us']:,.0f}"
    if row.get("takes_dense_path"):
        return f"{time}, dense"
    return time if row.get("accuracy", EQUAL) != EQUAL else f"{time} ({best['median_us'] / row['median_us']:.1f}x)"


def support() -> str:
    """Which kernel serves decode_attention, by head dimension: asked of `twilight_ops.explain`."""
    lines = []
    for head_dim in HEAD_DIMS:
        fused = [rows for rows in range(1, 65) if _serves(head_dim, rows) == FUSED]
        sm90 = f"fused up to {max(fused)} query rows a KV head, then Triton" if fused else "Triton"
        lines.append([str(head_dim), "C++ (avx512, avx2, any)", sm90, "Triton"])
    return markdown(("head dimension", "CPU, fp32 / bf16 / fp16", "sm_90, bf16 / fp16", "sm_80 and newer, bf16 / fp16"), lines)


def _serves(head_dim: int, query_rows: int) -> str:
    plan = TwilightConfig().layer_plan(0, "cuda", 8)
    layer = allocate_layer(plan, 2048, 8 * query_rows, 8, head_dim, 16, torch.bfloat16, torch.device("meta"))
    q = torch.empty(1, 1, 8 * query_rows, head_dim, dtype=torch.bfloat16, device="meta")
    paging = Paging(*(torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 2048), (1,))))
    groups = {"shadow": layer.shadow, "bounds": layer.bounds, "means": layer.means}
    return explain(q, layer.kv, paging, layer.policy, head_dim**-0.5, **groups, device="cuda").kernel


MAKERS: dict[str, Callable[[Sequence[dict]], str]] = {"accuracy": accuracy, "speed": speed}


def rewritten(text: str) -> str:
    """The text with every table as its file has it.

    Raises:
        ValueError: a table of an unknown kind.
    """

    def make(match: re.Match[str]) -> str:
        begin, maker, path, _, end = match.groups()
        if maker != "support" and maker not in MAKERS:
            raise ValueError(f"tables: expected one of support, {', '.join(MAKERS)}, got {maker}")
        table = support() if maker == "support" else MAKERS[maker](rows.read(ROOT / path))
        return f"{begin}\n{table}\n{end}"

    return BLOCK.sub(make, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a table differs")
    check = parser.parse_args(arguments).check
    differing = []
    for path in sorted(path for pattern in FILES for path in ROOT.glob(pattern)):
        text = path.read_text("utf-8")
        if (now := rewritten(text)) != text:
            differing.append(path.relative_to(ROOT))
            if not check:
                path.write_text(now, "utf-8")
    for path in differing:
        print(f"{path}: {'differs from' if check else 'written from'} its result files")
    return int(check and bool(differing))
