"""Settings: what is refused, by one form of message, and what the defaults resolve to."""

from __future__ import annotations

import dataclasses
import sys
import warnings

import numpy as np
import pytest
import torch

from twilight_ops import (
    DoubleSparsity,
    Full,
    LayerOverride,
    MagicPig,
    PagedKVCache,
    PageMean,
    Quest,
    Selector,
    ShadowPrefix,
    SparQ,
    Streaming,
    Tidal,
    TwilightConfig,
)
from twilight_ops.config import BREAK_EVEN, RECENT_TOKENS
from twilight_ops.decode_step import append, attend
from twilight_ops.evaluation.methods import parse_method

NAN, INF = float("nan"), float("inf")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64

# Every field of every record of settings: what it takes, and what it refuses.
NOT_A_COUNT = (-1, 1.0, "3", True, NAN, None, [1])
NOT_A_SHARE = (0.0, -0.1, 1.0001, 7, NAN, INF, True, "0.9", [0.9])
OPTIONAL_SHARE = (None, 0.5, 1, np.float32(0.5))
OPTIONAL_COUNT = (None, 0, 7, np.int32(7), sys.maxsize, 10**30)
BUDGETS = {
    "token_budget": ((1, np.int64(5), sys.maxsize, 10**30), (0, *NOT_A_COUNT)),
    "budget_fraction": ((0, 0.5, 1), (-0.1, 1.1, NAN, INF, True, None, "1/4")),
}
FIELDS = {
    TwilightConfig: {
        "selector": ((Quest(), Full()), (Quest, "quest", None, 3)),
        "top_p": ((0.1, 1, np.float64(0.5)), (*NOT_A_SHARE, None)),
        "page_size": ((16, 32, np.int64(64)), (0, 12, 16.0, "16", True, None)),
        "dense_layers": ((0, 2, 1 << 40), NOT_A_COUNT),
        "dense_below": (OPTIONAL_COUNT, [value for value in NOT_A_COUNT if value is not None]),
        "sink_tokens": (OPTIONAL_COUNT, [value for value in NOT_A_COUNT if value is not None]),
        "recent_tokens": (OPTIONAL_COUNT, [value for value in NOT_A_COUNT if value is not None]),
        "overrides": (
            ({}, {0: LayerOverride()}, {np.int64(3): LayerOverride()}),
            (None, [LayerOverride()], {-1: LayerOverride()}, {"0": LayerOverride()}, {True: LayerOverride()}, {0: Quest()}),
        ),
        "calibration": ((None, "a file"), ("", 3, b"a")),
        "kv_cache_dtype": (("auto", "fp8"), ("fp4", "float8_e4m3fn", None, 8, torch.float8_e4m3fn)),
        "offload": ((True, False, np.bool_(True), "a directory"), ("", 1, None, b"a")),
        "hot_tokens": ((0, np.int64(0)), (1, *NOT_A_COUNT)),  # of what is not offloaded there are no copies
    },
    LayerOverride: {
        "selector": ((None, "dense", Quest()), ("quest", Quest, 1, np.array([1, 2]))),
        "top_p": (OPTIONAL_SHARE, NOT_A_SHARE),
        "head_token_budget": (
            (None, (1, 5), [np.int64(3)], np.array([4, 5]), (sys.maxsize, 1)),
            (5, (0, 5), (-1,), (1.0,), (True,), "12", (), {1: 2}),
        ),
        "head_top_p": ((None, (0.5, 1), np.array([0.5])), (0.5, (0.5, 0.0), (7,), (NAN,), (None,), ())),
        "sink_tokens": (OPTIONAL_COUNT, [value for value in NOT_A_COUNT if value is not None]),
        "recent_tokens": (OPTIONAL_COUNT, [value for value in NOT_A_COUNT if value is not None]),
    },
    Full: BUDGETS,
    Quest: {**BUDGETS, "bounds_dtype": (("int8", "model"), ("int4", 8, None))},
    PageMean: BUDGETS,
    ShadowPrefix: {
        **BUDGETS,
        "page_fraction": ((1, 0.5, np.float32(0.25)), (0.0, 1.1, -0.5, NAN, True, None, "1/2")),
        "min_scored_tokens": ((0, 4096, sys.maxsize), (-1, 1.5, True, None, "8k")),
        "tau": ((0.5, np.float32(0.1)), (0.0, 1.0, NAN, True, None)),
        "prefix_channels": ((None, 8, 64, np.int64(24)), (0, -8, 30, 8.0, True, NAN, "8")),
        "calibration": ((None, "a file"), ("", 3, b"a")),
    },
    DoubleSparsity: {
        **BUDGETS,
        "heavy_channels": ((8, 16), (0, 4, *NOT_A_COUNT)),
        "label_dtype": (("int4", "int8", "model"), ("int2", 8, None)),
        "calibration": ((None, "a file"), ("", 3)),
    },
    SparQ: {**BUDGETS, "channels": ((1, 16), (0, *NOT_A_COUNT))},
    Streaming: {**BUDGETS, "sinks": ((0, 4, sys.maxsize), NOT_A_COUNT)},
    Tidal: {
        **BUDGETS,
        "selection_layers": (((0,), [2, 13], np.array([1])), ((), 2, (-1,), (1.5,), "12")),
        "across_heads": ((True, False, np.bool_(True)), (1, None, "True")),
    },
    MagicPig: {
        **BUDGETS,
        "hyperplanes": ((1, 15), (0, 16, *NOT_A_COUNT)),
        "tables": ((2, 150), (0, *NOT_A_COUNT)),
        "min_collisions": ((1, 150), (0, 151, *NOT_A_COUNT)),
        "seed": ((0, 7), NOT_A_COUNT),
    },
}
LARGE = [Full(), Quest(), ShadowPrefix(), SparQ(), Streaming(), MagicPig(), DoubleSparsity()]
SMALL = [Full(), Quest(48), ShadowPrefix(32, 0.0), SparQ(32), Streaming(32), MagicPig(32, 0.0), DoubleSparsity(32)]
CASES = [(cls, field) for cls, fields in FIELDS.items() for field in fields]


def test_every_field_of_every_record_is_in_the_table():
    for cls, fields in FIELDS.items():
        assert {field.name for field in dataclasses.fields(cls)} == set(fields)
    assert {cls for cls in Selector.__subclasses__() if cls.__module__.startswith("twilight_ops.selectors.")} <= set(FIELDS)


@pytest.mark.parametrize(("cls", "field"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_field_takes_what_it_should_as_plain_python_and_refuses_the_rest_by_name(cls, field):
    taken, refused = FIELDS[cls][field]
    for value in taken:
        stored = getattr(cls(**{field: value}), field)
        for part in stored if isinstance(stored, tuple) else (stored,):
            assert type(part).__module__.startswith(("builtins", "twilight_ops"))
    for value in refused:
        with pytest.raises(ValueError, match=rf"^{cls.__name__}: {field}.*: expected .+, got "):
            cls(**{field: value})


def test_numbers_of_numpy_make_the_same_record():
    ours = TwilightConfig(
        Quest(np.int64(64)), np.float64(0.5), np.int32(32), overrides={np.int64(1): LayerOverride(top_p=np.float64(0.25))}
    )
    assert ours == TwilightConfig(Quest(64), 0.5, 32, overrides={1: LayerOverride(top_p=0.25)})


def cache_of(config: TwilightConfig, layers=2, length=200, **sizes) -> PagedKVCache:
    given = {"num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_batch_size": 1, **sizes}
    return PagedKVCache(config, layers, max_cache_len=length, dtype=torch.float32, device="cpu", **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overrides": {2: LayerOverride()}}, "overrides: expected layers 0 to 1, got 2"),
        ({"overrides": {1: LayerOverride(head_token_budget=(4,))}}, "head_token_budget: expected 2 entries, one a KV head, got 1"),
        ({"overrides": {1: LayerOverride(head_top_p=(0.5, 0.5))}}, "head_top_p: expected 4 entries, one a query head, got 2"),
        ({"selector": ShadowPrefix(prefix_channels=72)}, "prefix_channels: expected a positive multiple of 8, at most 64, got 72"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_when_a_cache_is_made(settings, message):
    with pytest.raises(ValueError, match=message):
        cache_of(TwilightConfig(dense_below=0, **settings))


def test_a_prefix_of_a_foreign_selector_is_checked_too():
    class Foreign(ShadowPrefix):
        """A selector of somebody else's."""

    with pytest.raises(ValueError, match="Foreign: prefix_channels: expected a positive multiple of 8, at most 64, got 72"):
        cache_of(TwilightConfig(Foreign(prefix_channels=72), dense_below=0))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "num_layers: expected >= 1, got 0"),
        ({"length": -5}, "max_cache_len: expected >= 1, got -5"),
        ({"length": 12.0}, "max_cache_len: expected an integer >= 1, got 12.0"),
        ({"max_batch_size": 0}, "max_batch_size: expected >= 1, got 0"),
        ({"num_qo_heads": 5}, "num_qo_heads: expected a positive multiple of 2, got 5"),
        ({"head_dim": 80}, "head_dim: expected 64, 96, 128 or 256, got 80"),
    ],
)
def test_sizes_of_a_paged_cache_are_named(sizes, message):
    with pytest.raises(ValueError, match=f"PagedKVCache: {message}"):
        cache_of(TwilightConfig(dense_below=0), **sizes)


@pytest.mark.parametrize("device", ["meta", "mps", "xpu"])
@pytest.mark.parametrize("dense_below", [None, 0])
def test_a_device_without_kernels_is_refused_by_name(device, dense_below):
    with pytest.raises(ValueError, match=f"device: expected cpu or cuda, got {device}"):
        TwilightConfig(dense_below=dense_below).layer_plan(0, device, 1)


@pytest.mark.parametrize("selector", LARGE, ids=lambda s: s.name)
def test_one_page_of_sinks_and_the_newest_tokens_are_kept_unless_told_otherwise(selector):
    def forced(layer=0, **settings):
        plan = TwilightConfig(selector=selector, **settings).layer_plan(layer, "cpu", 1)
        return plan.sink_tokens, plan.recent_tokens

    assert forced() == (16, RECENT_TOKENS)
    assert forced(page_size=64) == (64, RECENT_TOKENS)
    assert forced(sink_tokens=0, recent_tokens=0) == (0, 0)
    assert forced(sink_tokens=3, recent_tokens=5) == (3, 5)
    overrides = {0: LayerOverride(sink_tokens=0, recent_tokens=0), 1: LayerOverride(recent_tokens=7), 2: LayerOverride(selector="dense")}
    assert [forced(layer, overrides=overrides, recent_tokens=9) for layer in range(4)] == [(0, 0), (16, 7), (0, 0), (16, 9)]


@pytest.mark.parametrize("selector", SMALL, ids=lambda s: s.name)
def test_a_step_with_default_settings_keeps_the_first_page_and_the_newest_tokens(selector):
    length = 300
    cache = cache_of(TwilightConfig(selector=selector, top_p=0.3, dense_below=0), layers=1, length=length)
    cache.seq_lens.fill_(length)
    rng = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, length, KV_HEADS, HEAD_DIM, generator=rng)
    q = 4 * torch.randn(1, 1, HEADS, HEAD_DIM, generator=rng)
    layer = cache.layers[0]
    append(k, v, layer, cache.page_table, cache.seq_lens)
    indices = torch.empty(1, KV_HEADS, cache.max_pages * 16, dtype=torch.int32)
    counts = torch.empty(1, KV_HEADS, dtype=torch.int32)
    attend(q, layer, cache.page_table, cache.seq_lens, HEAD_DIM**-0.5, indices, counts)
    for head in range(KV_HEADS):
        kept = set(indices[0, head, : counts[0, head]].tolist())
        assert set(range(16)) | set(range(length - RECENT_TOKENS, length)) <= kept
        assert len(kept) < length


@pytest.mark.parametrize("selector", LARGE, ids=lambda s: s.name)
@pytest.mark.parametrize("everything", [sys.maxsize, 10**30])
def test_the_largest_integers_keep_everything(selector, everything):
    length = 150
    selector = dataclasses.replace(selector, token_budget=everything)
    overrides = {1: LayerOverride(head_token_budget=(everything, 1), sink_tokens=everything, recent_tokens=everything)}
    config = TwilightConfig(selector, dense_below=0, sink_tokens=everything, recent_tokens=everything, overrides=overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = cache_of(config, length=length)
    cache.seq_lens.fill_(length)
    rng = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, length, KV_HEADS, HEAD_DIM, generator=rng)
    q = torch.randn(1, 1, HEADS, HEAD_DIM, generator=rng)
    for layer in cache.layers:
        append(k, v, layer, cache.page_table, cache.seq_lens)
        indices = torch.empty(1, KV_HEADS, cache.max_pages * 16, dtype=torch.int32)
        counts = torch.empty(1, KV_HEADS, dtype=torch.int32)
        attend(q, layer, cache.page_table, cache.seq_lens, HEAD_DIM**-0.5, indices, counts)
        assert counts.tolist() == [[length] * KV_HEADS]


def test_a_cache_that_can_never_be_sparse_says_so_and_from_which_length_it_would_be():
    config = TwilightConfig()
    rows = BREAK_EVEN["cuda"].row_tokens // 40_000
    assert BREAK_EVEN["cuda"].row_tokens // rows == 40_000
    message = config.never_sparse(32, 32_768, "cuda", rows)
    assert "32768" in message and "dense_below = 40000" in message and "first sparse length is 40001" in message
    assert config.never_sparse(32, 40_001, "cuda", rows) is None
    assert config.never_sparse(32, 40_000, "cuda", rows) is not None
    assert dataclasses.replace(config, dense_below=0).never_sparse(32, 32_768, "cuda", rows) is None
    assert dataclasses.replace(config, dense_layers=32).never_sparse(32, 512, "cpu", 1) is None  # dense is what it asks for
    kept = dataclasses.replace(config, dense_below=0, recent_tokens=500).never_sparse(32, 512, "cpu", 1)
    assert "first and newest 516 tokens" in kept and "first sparse length is 517" in kept


@pytest.mark.parametrize(
    ("selector", "lengths"),
    [
        (ShadowPrefix(page_fraction=1.0), (40_000, 5_000, 1_600)),
        (Full(), (131_072, 16_384, 5_242)),
        (Quest(), (40_000, 5_000, 1_600)),
    ],
)
def test_what_proposes_every_token_pays_later(selector, lengths):
    plans = [TwilightConfig(selector).layer_plan(0, "cuda", batch * 8) for batch in (1, 8, 25)]
    assert tuple(plan.dense_below for plan in plans) == lengths


def test_a_paged_cache_warns_once_that_it_can_never_be_sparse():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            cache_of(TwilightConfig(), length=160)
        cache_of(TwilightConfig(), length=1024)
    assert [str(w.message).split(":")[0] for w in caught] == ["PagedKVCache"]


def test_the_fast_configuration_takes_other_settings_and_reads_less():
    fast = TwilightConfig.fast(dense_layers=1)
    assert (fast.dense_layers, fast.top_p) == (1, TwilightConfig().top_p)
    assert fast.selector == parse_method("shadow_prefix:.95:budget_fraction=1/32,page_fraction=.125,min_scored_tokens=4096").selector
    assert fast.selector.budget_fraction < TwilightConfig().selector.budget_fraction
    assert TwilightConfig.fast(top_p=0.8, selector=Full()).selector == Full()
    with pytest.raises(TypeError, match="unheard_of"):
        TwilightConfig.fast(unheard_of=1)
