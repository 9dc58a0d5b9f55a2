"""The published budget policies as configurations, and that a step obeys them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twilight_ops import LayerOverride, PagedKVCache, Quest, ShadowPrefix, SparQ, TwilightConfig, ada_kv, duo_attention, pyramid_kv
from twilight_ops.decode_step import append, attend

HEADS, KV_HEADS, HEAD_DIM, LENGTH = 6, 3, 64, 200


# Budgets below the default sinks and newest tokens show only without those.
NOTHING_FORCED = {"dense_below": 0, "sink_tokens": 0, "recent_tokens": 0}


def kept_counts(config: TwilightConfig, layers: int) -> list[list[int]]:
    """Tokens that each layer and KV head attends to in one step over LENGTH random tokens."""
    cache = PagedKVCache(config, layers, HEADS, KV_HEADS, HEAD_DIM, 1, LENGTH, torch.float32, "cpu")
    cache.seq_lens.fill_(LENGTH)
    g = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, LENGTH, KV_HEADS, HEAD_DIM, generator=g)
    q = torch.randn(1, 1, HEADS, HEAD_DIM, generator=g)
    counts = []
    for layer in cache.layers:
        kept = torch.empty(1, KV_HEADS, cache.max_pages * 16, dtype=torch.int32), torch.empty(1, KV_HEADS, dtype=torch.int32)
        append(k, v, layer, cache.page_table, cache.seq_lens)
        attend(q, layer, cache.page_table, cache.seq_lens, HEAD_DIM**-0.5, *kept)
        counts.append(kept[1][0].tolist())
    return counts


def test_pyramid_kv_falls_linearly_and_keeps_the_mean():
    config = pyramid_kv(10, 1000, Quest(), beta=20, dense_layers=0)
    budgets = [config.overrides[layer].selector.token_budget for layer in range(10)]
    assert budgets[0] == 1950 and budgets[-1] == 50
    assert sum(budgets) == 10 * 1000
    steps = [a - b for a, b in zip(budgets, budgets[1:], strict=False)]
    assert max(steps) - min(steps) <= 1
    assert all(isinstance(config.overrides[layer].selector, Quest) for layer in range(10))


def test_pyramid_kv_is_obeyed_by_the_step():
    config = pyramid_kv(4, 40, SparQ(), beta=4, top_p=1.0, dense_layers=1, **NOTHING_FORCED)
    assert kept_counts(config, 4) == [[LENGTH] * 3, [50] * 3, [30] * 3, [10] * 3]


def test_ada_kv_shares_a_layer_out_by_need_with_a_floor():
    config = ada_kv([[1, 1, 1], [300, 100, 0]], 60, SparQ(), safeguard=0.2, top_p=1.0, dense_layers=1, **NOTHING_FORCED)
    assert set(config.overrides) == {1}
    assert config.overrides[1].head_token_budget == (120, 48, 12)
    assert sum(config.overrides[1].head_token_budget) == 3 * 60
    assert kept_counts(config, 2) == [[LENGTH] * 3, [120, 48, 12]]


def test_ada_kv_without_need_differences_is_even():
    config = ada_kv([[7, 7, 7]], 33, safeguard=0.0, dense_layers=0)
    assert config.overrides[0].head_token_budget == (33, 33, 33)


def test_duo_attention_streams_the_lowest_heads_and_leaves_the_others_everything():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.6]]
    config = duo_attention(scores, sparsity=0.5, sink_tokens=4, recent_tokens=12, top_p=1.0, dense_layers=0, dense_below=0)
    assert kept_counts(config, 2) == [[LENGTH, 16, 16], [16, LENGTH, LENGTH]]


def test_duo_attention_prunes_retrieval_heads_only_down_to_sinks_and_window():
    config = duo_attention([[1, 0, 1]], sink_tokens=4, recent_tokens=12, top_p=0.5, dense_layers=0, dense_below=0)
    ((first, second, third),) = kept_counts(config, 1)
    assert second == 16
    assert 16 < first < LENGTH and 16 < third < LENGTH


def test_duo_attention_reads_the_published_table(tmp_path):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.9\t0.1\t0.5\n0.2\t0.8\t0.6\n")
    assert duo_attention(str(path)) == duo_attention([[0.9, 0.1, 0.5], [0.2, 0.8, 0.6]])
    assert duo_attention(path, sparsity=1.0, dense_layers=2).overrides == {}
    path.write_text("0.9\tretrieval\n")
    with pytest.raises(ValueError, match="duo_attention: heads: expected rows of numbers in"):
        duo_attention(path)


def test_a_binary_table_decides_by_itself_whatever_the_sparsity():
    config = duo_attention([[1, 0, 0], [1, 1, 1]], sparsity=0.9, dense_layers=0)
    assert [[n == 1 for n in config.overrides[layer].head_token_budget] for layer in range(2)] == [[False, True, True], [False] * 3]


def test_explicit_overrides_win_over_a_preset():
    mine = {1: LayerOverride(selector="dense")}
    for config in (
        pyramid_kv(3, 100, dense_layers=0, overrides=mine),
        ada_kv([[1, 2]] * 3, 100, dense_layers=0, overrides=mine),
        duo_attention([[0, 1]] * 3, dense_layers=0, overrides=mine),
    ):
        assert config.overrides[1] == mine[1] and len(config.overrides) == 3


def test_presets_keep_the_selector_and_other_settings():
    selector = ShadowPrefix(tau=0.05)
    config = pyramid_kv(4, 100, selector, top_p=0.8, page_size=32)
    assert config.selector == selector and config.top_p == 0.8 and config.page_size == 32
    assert config.overrides[3].selector.tau == 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pyramid_kv(0, 10), "pyramid_kv: num_layers: expected >= 1, got 0"),
        (lambda: pyramid_kv(4, 10.5), "pyramid_kv: token_budget: expected an integer >= 1, got 10.5"),
        (lambda: pyramid_kv(4, 10, beta=0.5), "pyramid_kv: beta: expected >= 1, got 0.5"),
        (lambda: pyramid_kv(4, 10, beta=float("nan")), "pyramid_kv: beta: expected >= 1, got nan"),
        (lambda: pyramid_kv(4, 10, Quest), "TwilightConfig: selector: expected a Selector, such as Quest"),
        (lambda: pyramid_kv(2, 10, overrides={5: LayerOverride()}), "TwilightConfig: overrides: expected layers 0 to 1, got 5"),
        (lambda: ada_kv([[1.0]], 10, safeguard=2), r"ada_kv: safeguard: expected 0\.\.1, got 2"),
        (lambda: ada_kv([[1.0]], 0), "ada_kv: token_budget: expected >= 1, got 0"),
        (lambda: ada_kv([[0.0, 0.0]], 10), r"ada_kv: head_need\[0\]: expected a positive sum, got \[0.0, 0.0\]"),
        (lambda: ada_kv([[1.0], [-1.0]], 10), r"ada_kv: head_need\[1\]\[0\]: expected >= 0, got -1.0"),
        (lambda: ada_kv([[float("nan")]], 10), r"ada_kv: head_need\[0\]\[0\]: expected >= 0, got nan"),
        (lambda: ada_kv([3], 10), r"ada_kv: head_need\[0\]: expected a sequence with at least one entry, got 3"),
        (lambda: duo_attention([[1, 0], [1]]), r"duo_attention: heads: expected one row of equal length a layer, got \[1, 2\]"),
        (lambda: duo_attention([]), "duo_attention: heads: expected one row of numbers a layer, got "),
        (lambda: duo_attention([["retrieval"]]), r"duo_attention: heads\[0\]\[0\]: expected a number >= 0, got 'retrieval'"),
        (lambda: duo_attention([[1, 0]], sparsity=1.5), r"duo_attention: sparsity: expected 0\.\.1, got 1.5"),
        (lambda: duo_attention([[1, 0]], recent_tokens=-1), "LayerOverride: recent_tokens: expected >= 0, got -1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_of_arrays_and_tensors_are_those_of_lists():
    table = [[0.5, 0.25], [0.125, 1.0]]
    for other in (np.array(table), torch.tensor(table)):
        assert duo_attention(other) == duo_attention(table)
        assert ada_kv(other, np.int64(100)) == ada_kv(table, 100)
