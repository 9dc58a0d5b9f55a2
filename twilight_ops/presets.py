"""Published budget policies, expressed as configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ._settings import MOST_TOKENS, each, integer, number, refuse
from .config import LayerOverride, TwilightConfig
from .selectors import DEFAULT, Selector

_score = number(0.0)


def _configuration(selector: Selector | None, top_p: float, settings: dict[str, Any], num_layers: int) -> TwilightConfig:
    """With the caller's selector, or the default one for None; for a model of `num_layers`."""
    config = TwilightConfig(selector=DEFAULT() if selector is None else selector, top_p=top_p, **settings)
    config.check_layers(num_layers)
    return config


def _overridden(config: TwilightConfig, num_layers: int, override: Callable[[int], LayerOverride]) -> TwilightConfig:
    """With an override of every layer that is not dense and has none of the caller's."""
    overrides = {layer: override(layer) for layer in range(config.dense_layers, num_layers)}
    return dataclasses.replace(config, overrides={**overrides, **config.overrides})


def _table(where: str, field: str, rows: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Non-negative finite numbers, one row a layer and one entry a KV head."""
    rows = rows.tolist() if hasattr(rows, "tolist") else rows
    if isinstance(rows, str | bytes) or not isinstance(rows, Sequence) or not rows:
        refuse(where, field, "one row of numbers a layer", rows)
    return [each(_score)(where, f"{field}[{layer}]", row) for layer, row in enumerate(rows)]


def _with_budget(selector: Selector, tokens: int) -> Selector:
    return dataclasses.replace(selector, token_budget=tokens, budget_fraction=0.0)


def pyramid_kv(
    num_layers: int, token_budget: int, selector: Selector | None = None, beta: float = 20.0, top_p: float = 0.95, **settings: Any
) -> TwilightConfig:
    """Budgets that fall linearly from the lowest layer to the highest, as attention narrows.

    The highest layer gets `token_budget / beta`, the lowest `2 * token_budget` less that, so that the mean is `token_budget`.

    Args:
        num_layers: of the model; the arithmetic runs over all of them, dense ones included.
        token_budget: mean candidates a layer, tokens.
        selector: whose budget is set; the default one if None.
        beta: steepness, >= 1; 1 is flat.
        top_p, settings: of TwilightConfig.

    Source: PyramidKV, arXiv 2406.02069.
    """
    num_layers = integer(1)("pyramid_kv", "num_layers", num_layers)
    token_budget = integer(1)("pyramid_kv", "token_budget", token_budget)
    beta = number(1.0)("pyramid_kv", "beta", beta)
    config = _configuration(selector, top_p, settings, num_layers)
    last = token_budget / beta
    first = 2 * token_budget - last
    step = (first - last) / max(num_layers - 1, 1)
    return _overridden(
        config, num_layers, lambda layer: LayerOverride(selector=_with_budget(config.selector, max(1, round(first - step * layer))))
    )


def ada_kv(
    head_need: Sequence[Sequence[float]],
    token_budget: int,
    selector: Selector | None = None,
    safeguard: float = 0.2,
    top_p: float = 0.95,
    **settings: Any,
) -> TwilightConfig:
    """One layer's budget shared out over its KV heads by need, a part of it evenly.

    `budget[h] = Hkv * token_budget * ((1 - safeguard) * need[h] / sum(need) + safeguard / Hkv)`

    Args:
        head_need: what each KV head of each layer needs, any unit: for example the mean kept tokens of a `budget_report()`.
        token_budget: mean candidates a KV head, tokens.
        selector: whose budget is set; the default one if None.
        safeguard: share handed out evenly, 0..1; the paper's is 0.2.
        top_p, settings: of TwilightConfig.

    Source: Ada-KV, arXiv 2407.11550.
    """
    table = _table("ada_kv", "head_need", head_need)
    token_budget = integer(1)("ada_kv", "token_budget", token_budget)
    safeguard = number(0.0, 1.0)("ada_kv", "safeguard", safeguard)
    config = _configuration(selector, top_p, settings, len(table))
    for layer, need in enumerate(table):
        if sum(need) == 0.0:
            refuse("ada_kv", f"head_need[{layer}]", "a positive sum", list(need))

    def override(layer: int) -> LayerOverride:
        need = table[layer]
        total, heads = token_budget * len(need), len(need)
        budgets = tuple(max(1, round(total * ((1 - safeguard) * n / sum(need) + safeguard / heads))) for n in need)
        # The list must have room for the neediest head.
        return LayerOverride(selector=_with_budget(config.selector, max(budgets)), head_token_budget=budgets)

    return _overridden(config, len(table), override)


def duo_attention(
    heads: str | Path | Sequence[Sequence[float]],
    sparsity: float = 0.5,
    sink_tokens: int = 64,
    recent_tokens: int = 256,
    selector: Selector | None = None,
    top_p: float = 0.95,
    **settings: Any,
) -> TwilightConfig:
    """Streaming heads keep sinks and a window, retrieval heads see everything (and are pruned by top-p).

    Args:
        heads: score of each KV head of each layer, 0 (streaming) to 1 (retrieval): a table `[layers][Hkv]`, or the path of the
            tab-separated `full_attention_heads.tsv` that DuoAttention publishes for a model.
        sparsity: share of heads that stream, those with the lowest scores; unused where every score is 0 or 1.
        sink_tokens, recent_tokens: what a streaming head keeps.
        selector: of the retrieval heads, with its budget lifted; the default one if None.
        top_p, settings: of TwilightConfig.

    Source: DuoAttention, arXiv 2410.10819.
    """
    scores = _table("duo_attention", "heads", _read_heads(heads) if isinstance(heads, str | Path) else heads)
    lengths = sorted({len(row) for row in scores})
    if len(lengths) > 1:
        refuse("duo_attention", "heads", "one row of equal length a layer", lengths)
    sparsity = number(0.0, 1.0)("duo_attention", "sparsity", sparsity)
    # A table of zeros and ones says it all by itself; else the lowest scores stream, earlier layers first among equals.
    ranked = sorted((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    binary = all(score in (0.0, 1.0) for score, _, _ in ranked)
    count = sum(score == 0.0 for score, _, _ in ranked) if binary else round(sparsity * len(ranked))
    streaming = {(layer, head) for _, layer, head in ranked[:count]}

    config = _configuration(selector, top_p, settings, len(scores))
    retrieval = _with_budget(config.selector, MOST_TOKENS)
    common = LayerOverride(selector=retrieval, sink_tokens=sink_tokens, recent_tokens=recent_tokens)

    def override(layer: int) -> LayerOverride:
        # A streaming head's budget of one token leaves it the sinks and the window, which are always candidates and always kept.
        budgets = tuple(1 if (layer, head) in streaming else MOST_TOKENS for head in range(lengths[0]))
        return dataclasses.replace(common, head_token_budget=budgets)

    return _overridden(config, len(scores), override)


def _read_heads(path: str | Path) -> list[list[float]]:
    """Rows of tab- or space-separated numbers, one line a layer."""
    try:
        rows = [[float(cell) for cell in line.split()] for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"duo_attention: heads: expected rows of numbers in {path}, got {error}") from None
    return rows
