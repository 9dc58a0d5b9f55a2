"""`python -m bench fit`: fits `bench/heads.py` to a model's recorded heads, and shows generated heads beside recorded ones."""

from __future__ import annotations

import argparse
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from . import rows as results
from .heads import DATA, HEAD_DIM, Heads
from .run import console_of, show

# A layer at either end and every fourth between, 15 because its keys have outliers; those that small shapes take first are ordinary ones.
LAYERS = (12, 4, 19, 8, 23, 15, 0, 27)
SCALES = (1.0, 6.0, 40.0, 256.0, 4000.0)  # mean lengths of the stretches, in tokens
LAGS = (0, 2, 12, 80, 500)  # distances at which the covariance has lost the scale before
RANK = 12
SKIPPED = 32  # tokens at the start, whose statistics are those of sinks
QUERIES, QUERIES_APART = 16, 64  # the newest ones that are compared
PAGE = 16


def plain(rows: Tensor, theta: float) -> Tensor:
    """rows [N, H, D] at positions 0..N-1 without their position encoding."""
    inv_freq = theta ** (-torch.arange(0, rows.shape[-1], 2, dtype=torch.float64) / rows.shape[-1])
    angles = torch.arange(len(rows), dtype=torch.float64)[:, None] * inv_freq
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    a, b = rows.float().chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def fit(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters of one KV head from [N, 1 + G, D] of each text: its keys and its group's queries, plain.

    A scale's covariance is what the covariance at its lag has lost at the next one; of it the leading factors are kept whole and the
    rest by channel.
    """
    heads = texts[0].shape[1]
    rows = torch.cat([text[SKIPPED:].flatten(1) for text in texts])
    mean = rows.mean(0)
    lagged = []
    for lag in LAGS:
        products = [(x := text[SKIPPED:].flatten(1) - mean)[lag:].T @ x[: len(x) - lag] / (len(x) - lag) for text in texts]
        both = sum(products) / len(products)
        lagged.append((both + both.T) / 2)
    lagged.append(torch.zeros_like(lagged[0]))
    factors, noises = [], []
    for near, far in zip(lagged, lagged[1:], strict=False):
        values, vectors = torch.linalg.eigh((near - far).double())
        factor = (vectors[:, -RANK:] * values[-RANK:].clamp(min=0).sqrt()).T.float()  # [R, (1 + G) * D]
        factors.append(factor)
        noises.append(((near - far).diagonal() - factor.square().sum(0)).clamp(min=0).sqrt())
    shape = (heads, HEAD_DIM)
    return {
        "mean": mean.view(shape),
        "factor": torch.stack(factors).unflatten(-1, shape),
        "noise": torch.stack(noises).unflatten(-1, shape),
    }


def eight_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and the step of each row."""
    step = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
    return (values / step).round().to(torch.int8), step


def save(path: Path, heads: Sequence[dict[str, Tensor]], chosen: Sequence[tuple[int, int]], theta: float) -> None:
    factor, factor_step = eight_bits(torch.stack([head["factor"] for head in heads], dim=1))
    noise, noise_step = eight_bits(torch.stack([head["noise"] for head in heads], dim=1))
    arrays = {
        "mean": torch.stack([head["mean"] for head in heads]).half(),
        "first": torch.stack([head["first"] for head in heads], dim=1).half(),
        "factor": factor,
        "factor_step": factor_step,
        "noise": noise,
        "noise_step": noise_step,
        "scales": torch.tensor(SCALES),
        "theta": torch.tensor(theta, dtype=torch.float64),
        "layer": torch.tensor([layer for layer, _ in chosen]),
        "head": torch.tensor([head for _, head in chosen]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(path, **{name: array.numpy() for name, array in arrays.items()})


def measure(q: Tensor, k: Tensor, positions: Tensor, sm_scale: float) -> dict[str, float]:
    """What decides how sparse attention does, of queries q [Q, G, D] at `positions` and keys k [N, D]; means over the queries."""
    q, k = q.float(), k.float()
    tokens = torch.arange(len(k), device=k.device)
    seen = tokens <= positions[:, None, None]
    logits = (torch.einsum("qgd,nd->qgn", q, k) * sm_scale).masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    shares = weights.sort(-1, descending=True).values.cumsum(-1)

    def captured(scores: Tensor, each: int, share: int) -> float:
        """Mass of the best 1 / share of the units of `each` tokens by scores [Q, units]."""
        units = scores.shape[-1]
        best = scores.topk(max(1, units // share), dim=-1).indices
        mass = weights[..., : units * each].unflatten(-1, (units, each)).sum(-1)
        return mass.gather(-1, best[:, None].expand(-1, mass.shape[1], -1)).sum(-1).mean().item()

    pages = len(k) // PAGE
    paged = k[: pages * PAGE].unflatten(0, (pages, PAGE))
    bounds = torch.einsum("qgd,pd->qgp", q.clamp(min=0), paged.amax(1)) + torch.einsum("qgd,pd->qgp", q.clamp(max=0), paged.amin(1))
    begun = torch.arange(pages, device=k.device) * PAGE <= positions[:, None, None]
    by_page = (bounds * sm_scale).masked_fill(~begun, -torch.inf).softmax(-1).sum(1)
    prefix = (q.abs().mean((0, 1)) * k.abs().mean(0)).argsort(descending=True)[: HEAD_DIM // 4]
    leading = torch.einsum("qgd,nd->qgn", q[..., prefix], k[:, prefix]) * sm_scale
    by_token = leading.masked_fill(~seen, -torch.inf).softmax(-1).sum(1)

    def code_error(rows: Tensor) -> float:
        """Standard deviation of a logit's error where a row of 4-bit codes stands for each key."""
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        step = (high - low) / 15
        error = ((rows - low) / step).round() * step + low - rows
        return (torch.einsum("qgd,nd->qgn", q, error) * sm_scale).std(-1).mean().item()

    return {
        "logit_std": torch.where(seen, logits, torch.nan)
        .sub(torch.where(seen, logits, 0.0).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True))
        .square()
        .nanmean(-1)
        .sqrt()
        .mean()
        .item(),
        "kept_p85": ((shares < 0.85).sum(-1) + 1).float().mean().item() / len(k),
        "kept_p95": ((shares < 0.95).sum(-1) + 1).float().mean().item() / len(k),
        "sink": weights[..., 0].mean().item(),
        "newest_64": (weights * (tokens > positions[:, None, None] - 64)).sum(-1).mean().item(),
        "quest_n/4": captured(by_page, PAGE, 4),
        "quest_n/8": captured(by_page, PAGE, 8),
        "prefix_n/8": captured(by_token, 1, 8),
        "best_n/8": captured(weights.sum(1), 1, 8),
        "code_error": code_error(k),
        "code_error_centred": code_error(k - k.mean(0)),
    }


def mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def generated(heads: int, group: int, tokens: int, path: Path, device: str, sm_scale: float, seeds: int) -> list[dict[str, float]]:
    """`measure` of every fitted head, means over as many texts as `seeds`."""
    positions = compared(tokens, device)
    by_seed = []
    for seed in range(seeds):
        rng = torch.Generator(device).manual_seed(seed)
        text = Heads.fitted(heads * group, heads, rng, path).sequence(tokens, rng, seed)
        keys = torch.empty(tokens, heads, HEAD_DIM, device=device)
        text.keys(keys)
        queries = text.queries(positions).unflatten(1, (heads, group))
        by_seed.append([measure(queries[:, h], keys[:, h], positions, sm_scale) for h in range(heads)])
    return [mean_of(found) for found in zip(*by_seed, strict=True)]


def compared(tokens: int, device: str) -> Tensor:
    """Positions of the queries that are compared."""
    apart = min(QUERIES_APART, tokens // (2 * QUERIES))
    return torch.arange(tokens - 1, tokens - 1 - QUERIES * apart, -apart, device=device).flip(0)


def parser() -> argparse.ArgumentParser:
    from twilight_ops.cli.models import add_model_arguments
    from twilight_ops.evaluation.texts import KINDS

    p = argparse.ArgumentParser(prog="python -m bench fit", description=__doc__)
    add_model_arguments(p)
    p.add_argument("--tokens", type=int, default=6000, metavar="N", help="of each text; default: 6000")
    p.add_argument("--text", choices=KINDS, default="mixed", help="default: mixed, code and prose")
    p.add_argument("--held-out", action="store_true", help="texts that no parameters were fitted to")
    p.add_argument("--count", type=int, default=2, metavar="N", help="texts; default: 2")
    p.add_argument("--seeds", type=int, default=4, metavar="N", help="generated texts that are compared; default: 4")
    p.add_argument("--fit", type=Path, metavar="FILE.npz", help=f"fit parameters and write them; default: compare those of {DATA.name}")
    p.add_argument("--json", type=Path, metavar="FILE.jsonl", help="also write the table here")
    return p


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    from twilight_ops.cli.models import device_of, load_model
    from twilight_ops.evaluation import prefill, texts

    console, device = console_of(), device_of(options)
    if options.json is not None:
        results.require_jsonl(options.json)
    model, tokenizer = load_model(options)
    documents = texts.build(options.text, options.count, options.tokens, lambda text: tokenizer(text)["input_ids"], options.held_out)
    config = model.config.get_text_config()
    theta, path = config.rope_parameters["rope_theta"], options.fit or DATA
    stored = None if options.fit else numpy.load(path)
    kv_heads = config.num_key_value_heads
    group = config.num_attention_heads // kv_heads
    if stored is None:
        chosen = [(layer, (i + j) % kv_heads) for j in range(kv_heads) for i, layer in enumerate(LAYERS)]
    else:
        chosen = list(zip(stored["layer"].tolist(), stored["head"].tolist(), strict=True))
    contents: list[list[Tensor]] = [[] for _ in chosen]
    recorded: list[list[dict[str, float]]] = [[] for _ in chosen]
    for document in documents:
        console.print(f"{document.name}: {options.tokens} tokens", highlight=False)
        layers = prefill.record(
            model, document.ids[: options.tokens], queries=options.tokens if options.fit else QUERIES * QUERIES_APART
        ).layers
        positions = compared(options.tokens, str(device))
        for i, (layer, head) in enumerate(chosen):
            q, k = layers[layer].q[0, :, head * group : (head + 1) * group], layers[layer].k[0, :, head]
            newest = q[positions - (options.tokens - len(q))]
            recorded[i].append(measure(newest, k, positions, layers[layer].sm_scale))
            if options.fit:
                contents[i].append(plain(torch.cat([k[:, None], q], dim=1).cpu(), theta))
        sm_scale = layers[0].sm_scale
        del layers
    if options.fit:
        # Texts by falling mass of their first token: it is a sink in some of them only.
        sinks = [statistics.fmean(found[text]["sink"] for found in recorded) for text in range(len(documents))]
        order = sorted(range(len(documents)), key=lambda text: -sinks[text])
        fitted = [fit(content) | {"first": torch.stack([content[text][0, 0] for text in order])} for content in contents]
        save(options.fit, fitted, chosen, theta)
        console.print(f"{options.fit}: {options.fit.stat().st_size:,} bytes")
    made = generated(len(chosen), group, options.tokens, path, str(device), sm_scale, options.seeds)
    shared = results.environment(device.type) | {"command": shlex.join(["python", "-m", "bench", "fit", *arguments])}
    shared |= {"tokens": options.tokens, "texts": [document.name for document in documents]}
    table = []
    for (layer, head), real, ours in zip(chosen, recorded, made, strict=True):
        for name, found in (("recorded", mean_of(real)), ("generated", ours)):
            table.append({"layer": layer, "head": head, "data": name} | {key: round(value, 4) for key, value in found.items()})
    for name, found in (("recorded", [mean_of(real) for real in recorded]), ("generated", made)):
        table.append({"layer": "mean", "data": name} | {key: round(value, 4) for key, value in mean_of(found).items()})
    show(console, f"{options.tokens} tokens", " ".join(table[0]), table)
    if options.json is not None:
        results.write(options.json, [row | shared for row in table], append=options.json.exists())
    return 0
