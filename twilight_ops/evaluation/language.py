"""Teacher-forced prose: KL to dense, top-1 agreement, perplexity, and greedy agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..integration import TwilightCache
from ..report import BudgetLog
from .bytes_read import bytes_read
from .decoding import greedy, teacher_forced
from .methods import DENSE, Method
from .prefill import Prefill, cache_of, record


@dataclass
class Passage:
    """Documents cut to one context length, prefilled; the tokens that follow; and what dense attention says about them."""

    prefills: list[Prefill]
    forced: Tensor  # [B, T] fed
    targets: Tensor  # [B, T], the token after each
    dense_logits: Tensor  # [T, B, V] fp32
    dense_tokens: Tensor | None  # [B, greedy_tokens]


def prepare(model, documents: Sequence[Tensor], length: int, tokens: int, greedy_tokens: int) -> Passage:
    """Prefills documents[i][:length] and decodes the next `tokens` with dense attention, one step at a time like every method."""
    short = [len(document) for document in documents if len(document) < length + tokens + 1]
    if short or not documents:
        raise ValueError(f"documents: expected at least {length + tokens + 1} tokens each, got {min(short, default=0)}")
    prefills = [record(model, document[:length]) for document in documents]
    rows = torch.stack([document[length : length + tokens + 1] for document in documents]).to(model.device)
    forced, targets = rows[:, :-1], rows[:, 1:]
    cache = cache_of(model, DENSE.config(), prefills, tokens)
    logits = torch.stack([step.clone() for step in teacher_forced(model, cache, forced)])
    chosen = None
    if greedy_tokens:
        cache = cache_of(model, DENSE.config(), prefills, greedy_tokens)
        chosen = greedy(model, cache, _first_logits(prefills), greedy_tokens)
    return Passage(prefills, forced, targets, logits, chosen)


def evaluate(model, passage: Passage, method: Method, log: Path | None = None, log_steps: int = 16) -> dict:
    """One method on one passage: distances to dense over all forced tokens, the budget, and the bytes read.

    `log` is a file for the budgets of every `log_steps` steps, see `BudgetLog`.
    """
    cache = cache_of(model, method.config(), passage.prefills, passage.forced.shape[1])
    cache.reset_budget()
    kl = agree = nll = dense_nll = torch.zeros(len(passage.forced), dtype=torch.float64, device=passage.forced.device)
    worst = torch.zeros_like(kl)
    with nullcontext() if log is None else BudgetLog(log, cache, log_steps) as budgets:
        for t, logits in enumerate(teacher_forced(model, cache, passage.forced)):
            ours, dense = logits.double().log_softmax(-1), passage.dense_logits[t].double().log_softmax(-1)
            distance = (dense.exp() * (dense - ours)).sum(-1)  # [B]
            kl, worst = kl + distance, torch.maximum(worst, distance)
            agree = agree + (ours.argmax(-1) == dense.argmax(-1))
            target = passage.targets[:, t, None]
            nll, dense_nll = nll - ours.gather(1, target)[:, 0], dense_nll - dense.gather(1, target)[:, 0]
            if budgets is not None:
                budgets.advance()
    steps = passage.forced.shape[1]
    means = {"kl": kl / steps, "top1": agree / steps, "nll": nll / steps, "dense_nll": dense_nll / steps}
    by_document = {name: [round(value, 6) for value in values.tolist()] for name, values in means.items()}
    return {
        "tokens": passage.forced.numel(),
        "worst_kl": float(worst.max()),
        **{name: float(values.mean()) for name, values in means.items()},
        "by_document": by_document,
        **budget(cache),
    }


def together(results: Sequence[dict]) -> dict:
    """Results of one method on several passages of equal size as one; perplexities come from the mean log likelihood."""
    merged = {name: _mean([result[name] for result in results]) for name in results[0] if name != "by_document"}
    parts = [result["by_document"] for result in results]
    merged["by_document"] = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    merged["tokens"] = sum(result["tokens"] for result in results)
    merged["worst_kl"] = max(result["worst_kl"] for result in results)
    merged["perplexity"] = math.exp(merged["nll"])
    merged["perplexity_change"] = math.exp(merged["nll"] - merged["dense_nll"]) - 1.0
    return merged


def _mean(values: Sequence):
    """Entry by entry for lists; None where nothing was measured."""
    if isinstance(values[0], list):
        return [_mean(parts) for parts in zip(*values, strict=True)]
    return None if values[0] is None else sum(values) / len(values)


def agreement(model, passage: Passage, method: Method) -> dict:
    """Greedy decoding beside dense: share of equal tokens, and of the tokens before the first difference."""
    tokens = passage.dense_tokens.shape[1]
    cache = cache_of(model, method.config(), passage.prefills, tokens)
    equal = greedy(model, cache, _first_logits(passage.prefills), tokens) == passage.dense_tokens
    return {"greedy_equal": equal.float().mean().item(), "greedy_prefix": equal.cumprod(1).float().mean().item()}


def _first_logits(prefills: Sequence[Prefill]) -> Tensor:
    return torch.stack([prefill.last_logits for prefill in prefills])


def budget(cache: TwilightCache) -> dict:
    """What the sparse layers of a run proposed, kept and read."""
    report = cache.budget_report()
    layers = cache.paged.layers
    read = bytes_read(layers, report)
    result = {"bytes_share": read.share, "sparse_layers_bytes_share": read.sparse_share}
    if report.sparse is None:
        return result
    prefixes = [layer.shadow.prefix_channels.float().mean().item() for layer in layers if layer.shadow is not None]
    return result | {
        "live": report.sparse.live,
        "candidates": report.sparse.candidates.mean,
        "kept": report.sparse.kept.mean,
        "kept_p5": report.sparse.kept.p5,
        "kept_p95": report.sparse.kept.p95,
        "captured_mass": report.sparse.captured_mass,
        "pruned": report.sparse.pruned,
        "prefix_channels": sum(prefixes) / len(prefixes) if prefixes else None,
        "kept_by_head": [[head.kept.mean for head in layer.heads] for layer in report.layers],
    }
