"""Tables of README and docs, made from result files: `python -m bench tables` writes them again, `--check` says which differ.

A table stands between two comments, the first of which names its maker and its file:

    <!-- table: accuracy bench/results/accuracy_qwen.jsonl -->
    <!-- end of table -->

Settings behind the file leave out rows of others. `support -` is asked of the code instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from twilight_ops import Full, Paging, TwilightConfig, explain
from twilight_ops.evaluation.methods import selector_classes
from twilight_ops.explanation import FUSED
from twilight_ops.layer import allocate_layer
from twilight_ops.ops._checks import HEAD_DIMS

from . import rows
from .rows import EQUAL, ROOT, is_peer

BLOCK = re.compile(r"(<!-- table: (\w+) (\S+)((?: \S+)*) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
FILES = ("README.md", "docs/*.md")

FIELDS = {"budget_fraction": "tokens", "page_fraction": "pages"}
WORDS = {
    "kv_cache_dtype": "K and V in {}",
    "min_scored_tokens": "at least {} tokens scored",
    "recent_tokens": "{} newest tokens",
    "sink_tokens": "{} sinks",
}


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def named(setting: str) -> str:
    """ShadowPrefix, p .95, 1/2 of the pages: of `shadow_prefix:0.95:page_fraction=0.5`."""
    name, *parts = setting.split(":")
    words = [selector_classes()[name].__name__ if name in selector_classes() else name]
    for part in parts:
        if re.fullmatch(r"\d*\.\d+", part):
            words.append(f"p {share(float(part))}")
        elif "=" in part:
            fields = dict(field.split("=") for field in part.split(" ")[0].split(","))
            words += [f"{parts_of(value)} the {FIELDS[field]}" for field, value in sorted(fields.items()) if field in FIELDS]
            told = {field: value for field, value in fields.items() if (field, value) != ("min_scored_tokens", "0")}  # no floor
            words += [WORDS[field].format(value) for field, value in told.items() if field in WORDS]
            words += [" ".join(part.split(" ")[1:])] if " " in part else []
        else:
            words.append(part)
    return ", ".join(words)


def parts_of(value: str) -> str:
    share = Fraction(value).limit_denominator(64)
    return "all" if share == 1 else f"{share} of"


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
                named(row["method"] if row["method"].startswith("dense") else f"{row['method']}:{row['top_p']:.2f}"),
                f"{row['kl']:.4f}",
                f"{row['worst_kl']:.3f}",
                f"{row['top1']:.3f}",
                f"{row['perplexity_change']:+.1%}",
                f"{row['kept']:,.0f} of {row['live']:,.0f}" if "kept" in row else "all",
                f"{row['bytes_share']:.1%}",
                "-" if None in mass else " / ".join(f"{value:.2f}" for value in mass),
            ]
        )
    header = ("method", "KL", "worst token", "equal top-1", "perplexity", "kept a KV head", "bytes", "true mass: mean / 1% / lowest")
    return markdown(header, lines)


def methods(found: Sequence[dict]) -> str:
    """Every selector without the pruner and with it: distance to dense attention, and the tokens that are attended to."""
    lines = []
    for row in found:
        if row.get("task") != "language" or "without" not in row:
            continue
        alone = row["without"]
        lines.append(
            [
                named(f"{row['method']}:{row['top_p']:.2f}"),
                *(f"{side['kl']:.4f} / {side['worst_kl']:.3f} / {side['perplexity_change']:+.1%}" for side in (alone, row)),
                f"{alone['kept']:,.0f} -> {row['kept']:,.0f} of {row['live']:,.0f}",
                f"{row['bytes_share']:.1%}",
            ]
        )
    return markdown(("method", "without: KL / worst / perplexity", "with: KL / worst / perplexity", "budget", "bytes"), lines)


def tasks(found: Sequence[dict]) -> str:
    """Share of right answers by task and length, beside dense attention's, and the samples on which a method is no worse than dense."""
    cells = list(dict.fromkeys((row["task"], row["length"]) for row in found if "score" in row))
    settings = list(dict.fromkeys(row["setting"] for row in found if "score" in row and row["setting"] != "dense"))
    by_setting = {(row["task"], row["length"], row["setting"]): row for row in found if "score" in row}
    lines = []
    for task, length in cells:
        found_ = [by_setting.get((task, length, setting), {}) for setting in ("dense", *settings)]
        told = [f"{row['score']:.0%}" if row else "" for row in found_]
        beside = [f" ({row['no_worse_than_dense']})" if "no_worse_than_dense" in row else "" for row in found_[1:]]
        lines.append([task, f"{length:,}", told[0], *(a + b for a, b in zip(told[1:], beside, strict=True))])
    return markdown(("task", "tokens", "dense", *map(named, settings)), lines)


def shape_of(row: dict) -> str:
    shape = row["shape"]
    kind = "MHA" if shape["Hq"] == shape["Hkv"] else "GQA"
    return f"{kind} {shape['Hq']}/{shape['Hkv']}, batch {shape['B']}, {shape['L'] // 1024}k"


def speed(found: Sequence[dict]) -> str:
    """Microseconds a layer call of the best dense attention and of each of our methods, with how many times as fast the latter are.

    A sparse row that is not at equal accuracy has its time, and no ratio.
    """
    timed = [row for row in found if "median_us" in row]
    ours = list(dict.fromkeys(_column(row) for row in timed if row["method"].startswith("twilight_")))
    cells = list(dict.fromkeys(shape_of(row) for row in timed))
    lines = []
    for shape in cells:
        cell = [row for row in timed if shape_of(row) == shape]
        best = min((row for row in cell if is_peer(row)), key=lambda row: row["median_us"])
        by_column = {_column(row): row for row in cell if row["method"].startswith("twilight_")}
        times = [_time(by_column.get(name), best) for name in ours]
        lines.append([shape, f"{best['median_us']:,.0f} ({best['method']})", *times])
    return markdown(("shape", "best dense, us", *("ours, dense" if name == "twilight_dense" else named(name) for name in ours)), lines)


def _column(row: dict) -> str:
    return row.get("setting") or row["method"]


def _time(row: dict | None, best: dict) -> str:
    if row is None:
        return ""
    time = f"{row['median_us']:,.0f}"
    counts = row["method"] == "twilight_dense" or row.get("accuracy", EQUAL) == EQUAL
    return f"{time} ({best['median_us'] / row['median_us']:.2f}x)" if counts else time


def serving(found: Sequence[dict]) -> str:
    """Decode steps of vLLM with its own attention and with ours."""
    own = {row["batch"]: row for row in found if row["method"] == "vllm"}
    lines = [
        [
            f"{row['batch']} x {row['length'] // 1024}k",
            *(f"{r['tokens_per_s']:,.0f} tokens/s, {r['ms_per_step']:.1f} ms" for r in (own[row["batch"]], row)),
            f"{row['tokens_per_s'] / own[row['batch']]['tokens_per_s']:.2f}x",
        ]
        for row in found
        if row["method"] == "twilight"
    ]
    attention = next(iter(own.values()))["attention"].split(",")[0]
    return markdown(("batch", f"vLLM, {attention}", "vLLM, twilight", "ratio"), lines)


def support() -> str:
    """Which kernel serves decode_attention, by head dimension: asked of `twilight_ops.explain`."""
    dense = TwilightConfig(Full(), dense_layers=1)
    lines = []
    for head_dim in HEAD_DIMS:
        rows, dense_rows = (_fused_rows(head_dim, config) for config in (TwilightConfig(dense_below=0), dense))
        sm90 = f"fused up to {rows} query rows a KV head, dense ones up to {dense_rows}, then Triton" if rows else "Triton"
        lines.append([str(head_dim), "C++ (avx512, avx2, any)", sm90, "Triton"])
    return markdown(("head dimension", "CPU, fp32 / bf16 / fp16", "sm_90, bf16 / fp16", "sm_80 and newer, bf16 / fp16"), lines)


def _fused_rows(head_dim: int, config: TwilightConfig) -> int:
    """Most query rows a KV head that the fused kernel serves, 0 for none."""
    return max((rows for rows in range(1, 65) if _serves(head_dim, rows, config) == FUSED), default=0)


def _serves(head_dim: int, query_rows: int, config: TwilightConfig) -> str:
    plan = config.layer_plan(0, "cuda", 8)
    layer = allocate_layer(plan, 2048, 8 * query_rows, 8, head_dim, 16, torch.bfloat16, torch.device("meta"))
    q = torch.empty(1, 1, 8 * query_rows, head_dim, dtype=torch.bfloat16, device="meta")
    paging = Paging(*(torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1, 2048), (1,))))
    groups = {"shadow": layer.shadow, "bounds": layer.bounds, "means": layer.means}
    return explain(q, layer.kv, paging, layer.policy, head_dim**-0.5, **groups, device="cuda").kernel


MAKERS: dict[str, Callable[[Sequence[dict]], str]] = {
    "accuracy": accuracy,
    "methods": methods,
    "tasks": tasks,
    "serving": serving,
    "speed": speed,
}


def rewritten(text: str) -> str:
    """The text with every table as its file has it.

    Raises:
        ValueError: a table of an unknown kind.
    """

    def make(match: re.Match[str]) -> str:
        begin, maker, path, settings, _, end = match.groups()
        if maker == "support":
            return f"{begin}\n{support()}\n{end}"
        if maker not in MAKERS:
            raise ValueError(f"tables: expected one of support, {', '.join(MAKERS)}, got {maker}")
        wanted = settings.split()
        found = [row for row in rows.read(ROOT / path) if not wanted or row.get("setting") is None or row["setting"] in wanted]
        return f"{begin}\n{MAKERS[maker](found)}\n{end}"

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
