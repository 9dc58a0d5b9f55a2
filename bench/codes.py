"""`python -m bench codes`: which form of a key its 4-bit codes should stand for, by the true mass of what top-p keeps by them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from twilight_ops.cli.models import add_model_arguments, device_of, load_model
from twilight_ops.evaluation import prefill, texts
from twilight_ops.reference._paging import dequantise, quantise

from . import rows as results
from .run import console_of, show

QUERIES, QUERIES_APART = 16, 8  # the newest ones
FEW = 512  # tokens at the start that statistics come from where they do not come from all
TOP_PS = (0.85, 0.95)
SINK_TOKENS, RECENT_TOKENS = 16, 64  # always kept, as by default
FIRST_LAYER = 2


def coded(x: Tensor, levels: int = 15) -> Tensor:
    """Keys [N, D] as their codes say, one scale and zero a row."""
    return dequantise(*quantise(x, levels), torch.float32)


def forms(k: Tensor, seen: int) -> Iterator[tuple[str, Tensor]]:
    """Keys [N, D] as each form's codes say; statistics by channel come from the first `seen`. What all keys share may be missing."""
    center, std = k[:seen].mean(0), k[:seen].std(0).clamp(min=1e-3)
    centred, relative, half = k - center, std / std.median(), k.shape[1] // 2
    pairs = (relative.square().unflatten(0, (2, half)).mean(0).sqrt()).repeat(2)  # of position encoding
    yield "row", coded(k)
    yield "row, 8 bits", coded(k, 255)
    yield "centred", coded(centred)
    for name, smooth in (
        ("std^.25", relative.pow(0.25)),
        ("std^.5", relative.pow(0.5)),
        ("max(1, std^.5)", relative.pow(0.5).clamp(min=1.0)),
        ("pair's std^.5", pairs.pow(0.5)),
    ):
        yield f"centred / {name}", coded(centred / smooth) * smooth
    order = std.argsort()
    for groups in (2, 4):
        parts = torch.empty_like(centred)
        for channels in order.chunk(groups):
            parts[:, channels] = coded(centred[:, channels])
        yield f"centred, {groups} groups by std", parts


def mass_of(logits: Tensor, true: Tensor, forced: Tensor) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(p, true mass of what is kept, how many are kept) for rows of estimated logits [R, N]; `forced` tokens are kept beside."""
    weights, order = logits.softmax(-1).sort(-1, descending=True)
    before = weights.cumsum(-1) - weights
    true, forced = true.gather(-1, order), forced.gather(-1, order)
    for p in TOP_PS:
        keep = (before < p) | forced
        yield p, (true * keep).sum(-1), keep.sum(-1)


def measure(layers: Sequence[prefill.LayerRecord], tokens: int, device: torch.device) -> list[dict]:
    """One row a form, source of its statistics and p, over all heads of all layers but the first."""
    columns = torch.arange(tokens - 1, tokens - 1 - QUERIES * QUERIES_APART, -QUERIES_APART, device=device)
    positions = torch.arange(tokens, device=device)
    unseen = positions > columns[:, None]
    forced = ~unseen & ((positions < SINK_TOKENS) | (positions > columns[:, None] - RECENT_TOKENS))
    found: dict[tuple[str, str, float], list[tuple[Tensor, Tensor]]] = {}
    for layer in layers[FIRST_LAYER:]:
        q, keys = layer.q[0], layer.k[0].float()
        group = q.shape[1] // keys.shape[1]
        for head in range(keys.shape[1]):
            k = keys[:, head]
            rows = q[columns - (tokens - len(q)), head * group : (head + 1) * group].float().transpose(0, 1) * layer.sm_scale
            hidden = unseen.expand(group, -1, -1)
            true = (rows @ k.T).masked_fill(hidden, -torch.inf).softmax(-1)
            for statistics, seen in (("all", tokens - QUERIES * QUERIES_APART), (f"first {FEW}", FEW)):
                for form, known in forms(k, seen):
                    logits = (rows @ known.T).masked_fill(hidden, -torch.inf)
                    for p, mass, kept in mass_of(logits, true, forced.expand(group, -1, -1)):
                        found.setdefault((statistics, form, p), []).append((mass.flatten(), kept.flatten()))
    table = []
    for (statistics, form, p), parts in found.items():
        if form.startswith("row") and statistics != "all":
            continue  # it has none
        mass, kept = torch.cat([mass for mass, _ in parts]), torch.cat([kept for _, kept in parts])
        lowest = mass.sort().values
        spread = {"mass": mass.mean(), "p1": lowest[len(lowest) // 100], "p01": lowest[len(lowest) // 1000], "lowest": lowest[0]}
        row = {"statistics": statistics, "form": form, "top_p": p, **{name: round(value.item(), 6) for name, value in spread.items()}}
        table.append(row | {"kept": round(kept.float().mean().item(), 1), "rows": len(mass)})
    return table


def main(arguments: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m bench codes", description=__doc__)
    add_model_arguments(p)
    p.add_argument("--tokens", type=int, default=6000, metavar="N", help="of each text; default: 6000")
    p.add_argument("--text", choices=texts.KINDS, default="mixed", help="default: mixed, code and prose")
    p.add_argument("--count", type=int, default=3, metavar="N", help="texts; default: 3")
    p.add_argument("--json", type=Path, metavar="FILE.jsonl", help="also write the tables here")
    options = p.parse_args(arguments)
    console, device = console_of(), device_of(options)
    if options.json is not None:
        results.require_jsonl(options.json)
    model, tokenizer = load_model(options)
    documents = texts.build(options.text, options.count, options.tokens, lambda text: tokenizer(text)["input_ids"])
    shared = results.environment(torch.device(device).type) | {"model": Path(options.model).name, "tokens": options.tokens}
    for document in documents:
        layers = prefill.record(model, document.ids[: options.tokens]).layers
        table = measure(layers, options.tokens, torch.device(device))
        show(console, document.name, "statistics form top_p mass p1 p01 lowest kept", table)
        if options.json is not None:
            results.write(options.json, [row | {"text": document.name} | shared for row in table])
    return 0
