"""`additional_config={"twilight": {...}}` of vLLM, and what of an engine or a model is refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from twilight_ops import selectors
from twilight_ops._settings import integer, one_of, refuse
from twilight_ops.config import LayerOverride, TwilightConfig
from twilight_ops.layer import Selector
from twilight_ops.ops._checks import MAX_QUERY_TOKENS, PAGE_SIZES

WHERE = "vLLM"
KEY = "twilight"
# What no page can hold is left out: MagicPIG and Tidal keep tensors beside the cache.
SELECTORS: dict[str, type[Selector]] = {
    cls.name: cls
    for cls in (
        selectors.ShadowPrefix,
        selectors.PageMean,
        selectors.Quest,
        selectors.Full,
        selectors.DoubleSparsity,
        selectors.SparQ,
        selectors.Streaming,
    )
}
CALIBRATE = "python -m twilight_ops calibrate --model MODEL --text FILE --out CALIBRATION.safetensors"


@dataclass(frozen=True)
class Settings:
    """What a user decides.

    Args:
        config: as everywhere else, but for the page size: that is vLLM's block size.
        log_every: steps between two log lines of what was kept; 0 logs none.
    """

    config: TwilightConfig
    log_every: int

    def config_of(self, page_size: int) -> TwilightConfig:
        one_of(*PAGE_SIZES)(WHERE, "block_size", page_size)
        return replace(self.config, page_size=page_size)


def parse(additional_config: object) -> Settings:
    """Settings from vLLM's `additional_config`, which may come from JSON.

    `{"twilight": {...}}` takes log_every and the fields of `TwilightConfig` but those of pages and their memory. A selector is a name, or
    a mapping with its "name" and fields; "dense" is exact attention in every layer. Keys of `overrides` may be strings.

    Raises:
        ValueError: an unknown name or a value out of range, by name; a layer without the calibration file that it needs.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        refuse(WHERE, f'additional_config["{KEY}"]', "a mapping from names to values", given)
    values = dict(given)
    if "page_size" in values:
        refuse(WHERE, "page_size", "none, because vLLM's block_size is the page size", values["page_size"])
    if values.get("kv_cache_dtype", "auto") != "auto":
        refuse(WHERE, "kv_cache_dtype", '"auto" (scales of float8 come from prompts, and sequences share pages)', values["kv_cache_dtype"])
    others = ("page_size", "offload", "hot_tokens")  # pages and their memory are vLLM's
    _known("", values, [f.name for f in fields(TwilightConfig) if f.name not in others] + ["log_every"])
    log_every = integer(0)(WHERE, "log_every", values.pop("log_every", 1000))
    selector = _selector("selector", values.pop("selector", selectors.DEFAULT.name))
    if selector == "dense":
        selector, values["dense_layers"] = selectors.Full(), sys.maxsize
    overrides = values.pop("overrides", {})
    if not isinstance(overrides, Mapping):
        refuse(WHERE, "overrides", "a mapping from layer index to what differs there", overrides)
    values["overrides"] = {_layer(layer): _override(layer, value) for layer, value in overrides.items()}
    config = TwilightConfig(selector=selector, **values)
    _check_calibration(config)
    return Settings(config, log_every)


def _check_calibration(config: TwilightConfig) -> None:
    """Sequences share pages, so nothing of a page may depend on whose prompt came first: not even the mean that a shadow lacks."""
    plain = max(config.dense_layers, *(layer + 1 for layer in config.overrides), 0)  # a layer that nothing says more about
    layers = {layer: f"overrides[{layer}]: " for layer in config.overrides} | ({plain: ""} if plain < sys.maxsize else {})
    for layer, where in layers.items():
        plan = config.layer_plan(layer, "cpu", 1)
        selector = plan.selector
        if selector is None or plan.calibration is not None:
            continue
        if plan.prunes or selector.uses_shadow or type(selector).calibrate is not Selector.calibrate:
            refuse(WHERE, f"{where}calibration", f"a file for {selector.name}, written by `{CALIBRATE}`", None)


def _known(where: str, values: Mapping[str, Any], names: list[str]) -> None:
    unknown = next((name for name in values if name not in names), None)
    if unknown is not None:
        refuse(WHERE, f'additional_config["{KEY}"]{where}', f"one of {', '.join(names)}", unknown)


def _layer(key: object) -> int:
    return integer(0)(WHERE, "overrides: layer", int(key) if isinstance(key, str) and key.isdecimal() else key)


def _override(layer: object, value: object) -> LayerOverride:
    if not isinstance(value, Mapping):
        refuse(WHERE, f"overrides[{layer}]", "a mapping", value)
    values = dict(value)
    _known(f'["overrides"][{layer}]', values, [f.name for f in fields(LayerOverride)])
    if values.get("selector") is not None:
        values["selector"] = _selector(f"overrides[{layer}]: selector", values["selector"])
    return LayerOverride(**values)


def _selector(field: str, value: object) -> Any:
    """A selector, or "dense"."""
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = options.pop("name", None)
    if name == "dense" and not options:
        return name
    if not isinstance(name, str) or name not in SELECTORS:
        refuse(WHERE, field, f"dense or a selector whose tensors lie in the pages ({', '.join(SELECTORS)})", value)
    _known(f'["selector"] ({name})', options, [f.name for f in fields(SELECTORS[name])])
    return SELECTORS[name](**options)


def check_engine(vllm_config: Any) -> None:
    """Refuses by name what an engine is asked for and this backend cannot do.

    Raises:
        ValueError: see docs/serving.md, "What is refused".
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            refuse(WHERE, name, "1", getattr(parallel, name))
    if model is not None and model.is_hybrid:
        refuse(WHERE, "model", "attention in every layer that keeps a state", "Mamba or linear attention layers")
    speculative = vllm_config.speculative_config
    drafts = 0 if speculative is None else speculative.num_speculative_tokens or 0
    if drafts >= MAX_QUERY_TOKENS:
        refuse(WHERE, "num_speculative_tokens", f"at most {MAX_QUERY_TOKENS - 1}", drafts)


def check_layer(kv_cache_dtype: str, attn_type: str, **others: object) -> None:
    """Refuses by name what a model's attention layer asks for beyond causal attention over a 16- or 32-bit cache.

    Args:
        others: any further argument of a layer, by name: alibi_slopes, sliding_window, logits_soft_cap, sinks, ...

    Raises:
        ValueError: the first of them that is set.
    """
    if kv_cache_dtype not in ("auto", "float16", "bfloat16"):
        refuse(WHERE, "kv_cache_dtype", "auto, float16 or bfloat16", kv_cache_dtype)
    if str(getattr(attn_type, "value", attn_type)) != "decoder":
        refuse(WHERE, "attn_type", "decoder", str(getattr(attn_type, "value", attn_type)))
    for name, value in others.items():
        plain = isinstance(value, int | float | str)
        if value is not None and not (plain and not value):
            refuse(WHERE, name, "none", value if plain else type(value).__name__)


def check_spec(spec: Any) -> None:
    """Refuses by name a cache of vLLM that is not one of whole causal attention (ValueError)."""
    if type(spec).__name__ != "FullAttentionSpec":
        refuse(WHERE, "kv_cache_spec", "FullAttentionSpec", type(spec).__name__)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name) is not None:
            refuse(WHERE, name, "none", getattr(spec, name))
    if spec.head_size_v != spec.head_size:
        refuse(WHERE, "head_size_v", f"{spec.head_size}, as head_size", spec.head_size_v)
    if getattr(spec, "non_causal", False):
        refuse(WHERE, "non_causal", "False", True)
