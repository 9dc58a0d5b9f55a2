"""The budget report and its log over steps: figures that must follow from the counters alone."""

import json
import math
import random

import pytest
import torch
from comparisons import histogram_bin

from twilight_ops import Full, LayerOverride, PagedKVCache, Quest, ShadowPrefix, TwilightConfig, decode_step
from twilight_ops.capacity import (
    COUNTER_CANDIDATES,
    COUNTER_DENSE,
    COUNTER_HEADER,
    COUNTER_KEPT,
    COUNTER_LIVE,
    COUNTER_MASS,
    COUNTER_MASS_UNIT,
    COUNTER_ROWS,
    HISTOGRAM_BINS,
    histogram_bin_start,
)
from twilight_ops.report import BudgetLog, budget_report, spread

HEADS, KV_HEADS, DIM, BATCH, PROMPT = 4, 2, 64, 2, 90


def new_cache(device="cpu", selector=None, **settings) -> PagedKVCache:
    """Three layers: dense, and two that prune differently."""
    selector = selector or Quest(token_budget=48)
    overrides = {2: LayerOverride(selector=Full(), top_p=0.5)}
    config = TwilightConfig(selector=selector, top_p=0.9, dense_layers=1, dense_below=0, overrides=overrides, **settings)
    cache = PagedKVCache(config, 3, HEADS, KV_HEADS, DIM, BATCH, 200, torch.float32 if device == "cpu" else torch.float16, device)
    k, v = rows(KV_HEADS, PROMPT, 0, cache), rows(KV_HEADS, PROMPT, 1, cache)
    cache.seq_lens.fill_(PROMPT)
    for layer in cache.layers:
        decode_step.append(k, v, layer, cache.page_table, cache.seq_lens)
    return cache


def rows(heads: int, tokens: int, seed: int, cache: PagedKVCache) -> torch.Tensor:
    like = cache.layers[0].kv.k_cache
    return torch.randn(BATCH, tokens, heads, DIM, generator=torch.Generator().manual_seed(seed)).to(like.device, like.dtype)


def decode(cache: PagedKVCache, step: int) -> None:
    cache.seq_lens.add_(1)
    for layer in cache.layers:
        q, k, v = (
            rows(HEADS, 1, 10 * step + 2, cache) * 3.0,
            rows(KV_HEADS, 1, 10 * step + 3, cache),
            rows(KV_HEADS, 1, 10 * step + 4, cache),
        )
        decode_step.decode_step(q, k, v, layer, cache.page_table, cache.seq_lens, DIM**-0.5)


def binned(counts) -> list[int]:
    histogram = [0] * HISTOGRAM_BINS
    for count in counts:
        histogram[histogram_bin(count)] += 1
    return histogram


@pytest.mark.parametrize("value", [0, 1, 15, 16, 17, 944, 4095, 4096, 100_003, 3_000_000])
def test_equal_counts_have_their_value_as_mean_and_as_every_percentile(value):
    found = spread(7 * value, binned([value] * 7))
    assert (found.mean, found.p5, found.p95) == pytest.approx((value, value, value))


@pytest.mark.parametrize("scale", [3, 15, 100, 5_000, 2_000_000])
@pytest.mark.parametrize("size", [1, 2, 19, 400])
def test_percentiles_lie_in_the_bin_of_the_true_ones_and_in_order(scale, size):
    rng = random.Random(scale + size)
    counts = sorted(rng.randint(0, rng.randint(1, scale)) for _ in range(size))
    found = spread(sum(counts), binned(counts))
    assert found.mean == pytest.approx(sum(counts) / size)
    for share, value in ((0.05, found.p5), (0.95, found.p95)):
        true = counts[math.ceil(share * size) - 1]
        index = histogram_bin(true)
        assert histogram_bin_start(index) <= value < histogram_bin_start(index + 1)
        assert value == true or true >= 16
    assert found.p5 <= found.p95


def count_by_hand(layer, rows: list[tuple[int, int, int, bool]]) -> None:
    """Writes the counters of calls (live, candidates, kept, dense path) into every KV head of a layer."""
    live, candidates, kept, dense = zip(*rows, strict=True)
    header = {COUNTER_ROWS: len(rows), COUNTER_LIVE: sum(live), COUNTER_CANDIDATES: sum(candidates), COUNTER_KEPT: sum(kept)}
    header |= {COUNTER_MASS: int(len(rows) * COUNTER_MASS_UNIT), COUNTER_DENSE: sum(dense)}
    for column, value in header.items():
        layer.budget_counters[:, column] = value
    layer.budget_counters[:, COUNTER_HEADER:] = torch.tensor(binned(candidates) + binned(kept))


def test_the_report_says_which_calls_took_the_dense_path_and_ends_with_one_plain_line():
    cache = new_cache()
    for layer in cache.layers:
        layer.budget_counters.zero_()
    dense, half, none = cache.layers
    count_by_hand(dense, [(100, 100, 100, True)] * 4)
    count_by_hand(half, [(100, 100, 100, True), (100, 50, 20, False)] * 2)
    count_by_hand(none, [(100, 50, 20, False)] * 4)
    report = budget_report(cache.layers)
    assert [[head.dense for head in layer.heads] for layer in report.layers] == [[1.0] * KV_HEADS, [0.5] * KV_HEADS, [0.0] * KV_HEADS]
    assert report.sparse.dense == 0.25
    *_, all_layers, last = str(report).splitlines()
    assert all_layers.endswith("25.0%")
    assert last == report.summary and last.startswith("2 of 3 layers are sparse and kept 40 of 100 tokens a KV head (60.0% pruned)")
    assert "25.0% of their calls took the dense path (sequences of up to 0 tokens), and these figures include them" in last
    count_by_hand(half, [(100, 50, 20, False)] * 4)
    assert budget_report(cache.layers).summary.endswith("; no call of theirs took the dense path")
    for layer in (half, none):
        count_by_hand(layer, [(100, 100, 100, True)] * 4)
    assert "every call of theirs took the dense path" in budget_report(cache.layers).summary
    for layer in cache.layers:
        layer.budget_counters.zero_()
    assert budget_report(cache.layers).summary == "2 of 3 layers are sparse; none has decoded yet"
    assert budget_report(cache.layers[:1]).summary == "all layers (1) are dense"
    assert budget_report([]).summary == "no layers"


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_window_of_the_log_is_the_report_of_those_steps_alone(tmp_path):
    logged, counted = new_cache(), new_cache()
    decode(logged, 0)  # before the log: not in it
    decode(counted, 0)
    with BudgetLog(tmp_path / "log.jsonl", logged, every=3) as log:
        for step in range(1, 9):
            decode(logged, step)
            log.advance()
    found = lines(tmp_path / "log.jsonl")
    assert [line["steps"] for line in found] == [[1, 3], [4, 6], [7, 8]] and [line["window"] for line in found] == [0, 1, 2]
    for line in found:
        for layer in counted.layers:
            layer.budget_counters.zero_()
        first, last = line.pop("steps")
        for step in range(first, last + 1):
            decode(counted, step)
        want = budget_report(counted.layers).to_dict()
        assert want["sparse"]["calls"] == (last + 1 - first) * BATCH * 2 * KV_HEADS
        line.pop("window")
        assert flat(line) == pytest.approx(flat(want), rel=1e-5)
        assert [layer["selector"] for layer in line["layers"]] == ["dense", "quest", "full"]


def flat(value) -> list:
    """Numbers of nested dicts and lists in their order of keys."""
    if isinstance(value, dict):
        return [entry for key in sorted(value) for entry in flat(value[key])]
    if isinstance(value, list):
        return [entry for part in value for entry in flat(part)]
    return [value] if isinstance(value, int | float) else []


def test_the_windows_of_a_log_add_up_to_the_report(tmp_path):
    cache = new_cache(selector=ShadowPrefix(token_budget=32, budget_fraction=0.0))
    with BudgetLog(tmp_path / "log.jsonl", cache, every=4) as log:
        for step in range(10):
            decode(cache, step)
            log.advance()
    found, whole = lines(tmp_path / "log.jsonl"), budget_report(cache.layers)
    for name in ("candidates", "kept"):
        total = sum(line["sparse"][name]["mean"] * line["sparse"]["calls"] for line in found)
        assert total == pytest.approx(getattr(whole.sparse, name).mean * whole.sparse.calls, rel=1e-5)
    assert sum(line["sparse"]["calls"] for line in found) == whole.sparse.calls
    kept = [line["layers"][2]["heads"][0]["kept"] for line in found]
    assert all(window["p5"] <= window["mean"] <= window["p95"] for window in kept)


def test_the_log_writes_whole_windows_while_the_run_goes_on_and_the_rest_at_the_end(tmp_path):
    cache = new_cache()
    log = BudgetLog(tmp_path / "log.jsonl", cache, every=2)
    for step in range(5):
        decode(cache, step)
        log.advance()
    log._file.flush()
    assert len(lines(tmp_path / "log.jsonl")) == 2
    log.close()
    log.close()
    assert [line["steps"] for line in lines(tmp_path / "log.jsonl")] == [[1, 2], [3, 4], [5, 5]]


def test_after_a_reset_a_window_holds_what_was_counted_since(tmp_path):
    cache = new_cache()
    with BudgetLog(tmp_path / "log.jsonl", cache, every=4) as log:
        for step in range(4):
            decode(cache, step)
        log.advance(4)
        for layer in cache.layers:
            layer.budget_counters.zero_()
        decode(cache, 4)
        log.advance()
    found = lines(tmp_path / "log.jsonl")
    assert [line["layers"][1]["heads"][0]["calls"] for line in found] == [4 * BATCH, BATCH]


def test_a_log_over_dense_layers_alone_has_no_sparse_budget(tmp_path):
    config = TwilightConfig(dense_layers=1, dense_below=0)
    cache = PagedKVCache(config, 1, HEADS, KV_HEADS, DIM, BATCH, 200, torch.float32, "cpu")
    with BudgetLog(tmp_path / "log.jsonl", cache, every=1) as log:
        decode(cache, 0)
        log.advance()
    (line,) = lines(tmp_path / "log.jsonl")
    assert line["sparse"] is None
    assert [head["kept"]["mean"] for head in line["layers"][0]["heads"]] == [1.0] * KV_HEADS


def test_a_log_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="BudgetLog: every: expected >= 1, got 0"):
        BudgetLog(tmp_path / "log.jsonl", new_cache(), every=0)
    transformers = pytest.importorskip("transformers")
    from twilight_ops.integration import TwilightCache

    empty = TwilightCache(transformers.LlamaConfig(num_hidden_layers=2), TwilightConfig())
    with pytest.raises(ValueError, match="BudgetLog: cache: expected an allocated cache"):
        BudgetLog(tmp_path / "log.jsonl", empty)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_log_makes_nobody_wait_and_agrees_with_the_report(tmp_path):
    cache = new_cache("cuda")
    for step in range(3):
        decode(cache, step)  # compiles
    for layer in cache.layers:
        layer.budget_counters.zero_()
    with BudgetLog(tmp_path / "log.jsonl", cache, every=5) as log:
        before = torch.cuda.get_sync_debug_mode()
        for step in range(3, 43):
            decode(cache, step)
            torch.cuda.set_sync_debug_mode("error")
            log.advance()
            torch.cuda.set_sync_debug_mode(before)
    found, whole = lines(tmp_path / "log.jsonl"), budget_report(cache.layers)
    assert [line["steps"] for line in found] == [[first, first + 4] for first in range(1, 40, 5)]
    total = sum(line["sparse"]["kept"]["mean"] * line["sparse"]["calls"] for line in found)
    assert total == pytest.approx(whole.sparse.kept.mean * whole.sparse.calls, rel=1e-5)
