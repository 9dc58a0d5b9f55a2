"""The selectors of other papers: their lists, their state, and that a compiled step captures them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from comparisons import score_bins
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from twilight_ops import (
    DoubleSparsity,
    Full,
    LayerOverride,
    MagicPig,
    PagedKVCache,
    PageMean,
    Paging,
    Pruning,
    Quest,
    ShadowPrefix,
    SparQ,
    Streaming,
    Tidal,
    TwilightConfig,
    attend_sparse,
    calibration,
    estimate_weights,
    prune_top_p,
)
from twilight_ops.capacity import LOGIT_LEVELS
from twilight_ops.decode_step import append, attend
from twilight_ops.reference import _top_k
from twilight_ops.selectors import Candidates, Selector
from twilight_ops.selectors import _rank as rank

HEADS, KV_HEADS, HEAD_DIM, PAGE = 6, 2, 64, 16
SCALE = HEAD_DIM**-0.5

SELECTORS = [
    DoubleSparsity(token_budget=40, heavy_channels=16),
    DoubleSparsity(token_budget=40, heavy_channels=16, label_dtype="model"),
    DoubleSparsity(token_budget=1, budget_fraction=0.25, heavy_channels=8, label_dtype="int8"),
    Streaming(token_budget=40, sinks=4),
    SparQ(token_budget=40, channels=16),
    Tidal(token_budget=40, selection_layers=(0,)),
    Tidal(token_budget=40, selection_layers=(0,), across_heads=False),
    MagicPig(token_budget=40, budget_fraction=0.0, hyperplanes=4, tables=20),
]


def name(selector: Selector) -> str:
    return type(selector).__name__


def make_cache(selector, lens, max_len=160, layers=1, dtype=torch.float32, shuffled=True, **settings) -> PagedKVCache:
    """A cache whose sequences are `lens` tokens long and whose pages lie in random order."""
    settings = {"dense_layers": 0, "dense_below": 0, "page_size": PAGE, "sink_tokens": 0, "recent_tokens": 0, **settings}
    cache = PagedKVCache(TwilightConfig(selector=selector, **settings), layers, HEADS, KV_HEADS, HEAD_DIM, len(lens), max_len, dtype, "cpu")
    if shuffled:
        order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(3)).int()
        cache.page_table.copy_(order.view_as(cache.page_table))
    cache.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
    return cache


def keys_values(lens, seed=0, dtype=torch.float32):
    """Left-padded rows [B, T, Hkv, D] for a first prompt of the lengths `lens`."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(lens), max(max(lens), 1), KV_HEADS, HEAD_DIM)
    return torch.randn(shape, generator=g).to(dtype), torch.randn(shape, generator=g).to(dtype)


def left_padded(lens):
    """Positions [B, T] of those rows, negative for padding."""
    tokens = max(max(lens), 1)
    return (torch.arange(tokens) - tokens + torch.tensor(lens)[:, None]).clamp(min=-1).int()


def query(batch, tokens=1, seed=1):
    return 3 * torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def filled(selector, lens, **settings):
    cache = make_cache(selector, lens, **settings)
    k, v = keys_values(lens, dtype=cache.layers[0].kv.k_cache.dtype)
    for layer in cache.layers:
        if layer.plan.selector is not None:
            layer.plan.selector.calibrate(query(len(lens), k.shape[1], seed=5), k, layer, left_padded(lens), SCALE)
        append(k, v, layer, cache.page_table, cache.seq_lens)
    return cache, k


def lists(candidates: Candidates) -> list[list[list[int]]]:
    """Listed tokens of each sequence and KV head; checks that pads are -1 and only behind the list."""
    indices, counts, unit = candidates
    assert unit == 1 and indices.dtype == counts.dtype == torch.int32
    slots = torch.arange(indices.shape[2])
    assert ((indices >= 0) == (slots < counts[..., None])).all()
    return [[row[:n].tolist() for row, n in zip(rows, ns, strict=True)] for rows, ns in zip(indices, counts, strict=True)]


def reused(cache, q):
    """The list as a layer without a selection of its own sees it: only Tidal tells the two apart."""
    first = cache.layers[0]
    found = first.plan.selector.select(q, first, cache.page_table, cache.seq_lens, SCALE)
    if found.indices is not None:
        return found
    assert name(first.plan.selector) == "Tidal"
    return first.plan.selector.select(q, cache.layers[1], cache.page_table, cache.seq_lens, SCALE)


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_list_is_ascending_unique_live_within_budget_and_holds_what_is_forced(selector, tokens):
    lens = [0, 1, 15, 16, 17, 150]
    cache, _ = filled(selector, lens, layers=2, sink_tokens=2, recent_tokens=5)
    found = lists(reused(cache, query(len(lens), tokens)))
    for length, rows in zip(lens, found, strict=True):
        budget = max(selector.token_budget, -(-length * selector.budget_fraction // 1))
        forced = {t for t in range(length) if t < 2 or t >= length - max(5, tokens)}
        for row in rows:
            assert row == sorted(set(row))
            assert all(0 <= t < length for t in row)
            assert len(row) <= max(budget, len(forced))
            assert forced <= set(row)


@pytest.mark.parametrize("selector", [s for s in SELECTORS if name(s) != "MagicPig"], ids=name)
def test_a_sequence_within_the_budget_is_selected_whole(selector):
    selector = dataclasses.replace(selector, token_budget=100)
    cache, _ = filled(selector, [7, 100, 120], layers=2)
    found = lists(reused(cache, query(3)))
    for rows, length in zip(found, [7, 100, 120], strict=True):
        assert [len(row) for row in rows] == [min(length, 100)] * KV_HEADS
    assert found[1] == [list(range(100))] * KV_HEADS


@pytest.mark.parametrize("setting", ["sink_tokens", "recent_tokens"])
@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_a_plan_that_keeps_more_than_any_table_holds_keeps_everything(selector, setting):
    lens = [0, 1, 17, 150]
    cache, _ = filled(selector, lens, layers=2, **{setting: 2**63 - 1})
    for length, rows in zip(lens, lists(reused(cache, query(len(lens), 3))), strict=True):
        assert rows == [list(range(length))] * KV_HEADS


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_budgets_per_kv_head_are_kept(selector):
    override = {layer: LayerOverride(head_token_budget=(9, 33)) for layer in range(2)}
    cache, _ = filled(selector, [150, 150], layers=2, overrides=override)
    counts = reused(cache, query(2)).counts
    if name(selector) == "MagicPig":
        assert (counts <= torch.tensor([9, 33])).all() and (counts > 0).all()
    else:
        assert counts.tolist() == [[9, 33]] * 2


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_state_does_not_depend_on_how_the_prompt_was_cut(selector):
    lens = [150, 90]
    whole, k = filled(selector, lens, layers=2)
    parts = make_cache(selector, lens, layers=2)
    k, v = keys_values(lens)
    for layer in parts.layers:
        layer.plan.selector.calibrate(query(2, 150, seed=5), k, layer, left_padded(lens), SCALE)
    for start, end in ((0, 37), (37, 149), (149, 150)):
        positions = torch.arange(start, end) - 150 + torch.tensor(lens)[:, None]
        seen = (positions[:, -1] + 1).clamp(min=0).int()
        for layer in parts.layers:
            rows = positions.clamp(min=-1).int().contiguous()
            append(k[:, start:end], v[:, start:end], layer, parts.page_table, seen, rows)
    q = query(2)
    assert lists(reused(whole, q)) == lists(reused(parts, q))


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_rewritten_positions_leave_nothing_behind(selector):
    cache, _ = filled(selector, [100], layers=2)
    fresh, _ = filled(selector, [100], layers=2)
    junk = 50 * torch.ones(1, 20, KV_HEADS, HEAD_DIM)
    again, _ = keys_values([120], seed=9)
    for grown in (cache, fresh):
        grown.seq_lens.fill_(120)
    for layer in cache.layers:
        append(junk, junk, layer, cache.page_table, cache.seq_lens)
    for grown in (cache, fresh):
        for layer in grown.layers:
            append(again[:, 100:], again[:, 100:], layer, grown.page_table, grown.seq_lens)
    q = query(1)
    assert lists(reused(cache, q)) == lists(reused(fresh, q))


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_broken_queries_and_keys_still_give_a_valid_list(selector):
    cache, _ = filled(selector, [150, 40], layers=2)
    k = torch.full((2, 1, KV_HEADS, HEAD_DIM), torch.nan)
    cache.seq_lens.add_(1)
    for layer in cache.layers:
        append(k, k, layer, cache.page_table, cache.seq_lens)
    q = query(2)
    q[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for rows, length in zip(lists(reused(cache, q)), [151, 41], strict=True):
        for row in rows:
            assert row == sorted(set(row)) and row[-1] == length - 1


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_the_step_attends_to_exactly_the_list_after_pruning(selector, top_p):
    cache, _ = filled(selector, [150, 90, 0], layers=2, top_p=top_p)
    layer, q = cache.layers[1], query(3)
    if name(selector) == "Tidal":
        attend(q, cache.layers[0], cache.page_table, cache.seq_lens, SCALE)
    out, _ = attend(q, layer, cache.page_table, cache.seq_lens, SCALE)
    candidates, paging = (
        layer.plan.selector.select(q, layer, cache.page_table, cache.seq_lens, SCALE),
        Paging(cache.page_table, cache.seq_lens),
    )
    if top_p < 1.0:
        weights = estimate_weights(q, layer.shadow, paging, candidates, SCALE)
        indices, counts, _ = prune_top_p(weights, cache.seq_lens, candidates, KV_HEADS, Pruning(top_p), layer.policy.always)
        candidates = Candidates(indices, counts)
    expected, _ = attend_sparse(q, layer.kv, paging, candidates, SCALE)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_ranking_equals_the_reference():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        lens = torch.tensor([0, 1, 63, 160], dtype=torch.int32)
        live = rank.live_tokens(lens, KV_HEADS, 160)
        scores = torch.randint(0, 6, (4, KV_HEADS, 160), generator=g).float()
        scores[0, 0, 0], scores[3, 1, 80] = torch.inf, torch.inf
        selector = SparQ(token_budget=int(torch.randint(1, 70, (), generator=g)), budget_fraction=0.3)
        cache = make_cache(selector, lens.tolist(), sink_tokens=3, recent_tokens=2)
        found = rank.best_tokens(scores, live, cache.layers[0], cache.page_table, lens, 1)
        positions = torch.arange(160)
        forced = ((positions < 3) | (positions >= lens[:, None, None] - 2)).expand_as(live)
        limits = cache.layers[0].limits(cache.page_table, 1)
        budget = _top_k.row_budget(lens.long(), KV_HEADS, limits, None)
        indices, counts = _top_k.take_best(scores, live, forced, budget, limits.token_capacity)
        torch.testing.assert_close(found.counts, counts)
        torch.testing.assert_close(found.indices, indices)


def exact_scores(q, k):
    """Sum over the group of the softmax of rounded logits, [B, Hkv, N]; q [B, 1, Hq, D], k [B, N, Hkv, D]."""
    level = math.log(2) / LOGIT_LEVELS
    logits = torch.einsum("bhgd,bnhd->bhgn", q[:, 0].unflatten(1, (KV_HEADS, -1)), k) * SCALE
    logits = (logits / level).round() * level
    return logits.softmax(-1).sum(2)


def best(scores, budget, forced=()):
    """Ascending indices of the best bins' items, of the last the lowest, forced ones first."""
    bins = score_bins(scores)
    bins[list(forced)] = torch.inf
    return sorted(bins.argsort(descending=True, stable=True)[:budget].tolist())


def test_with_all_channels_the_score_selectors_find_the_best_tokens():
    q = query(1)
    for selector in (
        SparQ(token_budget=20, channels=64),
        DoubleSparsity(token_budget=20, heavy_channels=64, label_dtype="model"),
        Tidal(token_budget=20, selection_layers=(0,), across_heads=False),
    ):
        cache, k = filled(selector, [150], layers=2)
        expected = [best(row, 20, [149]) for row in exact_scores(q, k)[0]]
        assert lists(reused(cache, q)) == [expected], name(selector)


def test_tidal_across_heads_gives_every_head_the_same_tokens():
    q = query(1)
    cache, k = filled(Tidal(token_budget=20, selection_layers=(0,)), [150], layers=2)
    assert lists(reused(cache, q)) == [[best(exact_scores(q, k)[0].sum(0), 20, [149])] * KV_HEADS]


def test_tidal_reselects_where_told_and_refuses_an_uncovered_first_layer():
    cache, _ = filled(Tidal(token_budget=20, selection_layers=(1, 3)), [150], layers=5, dense_layers=1)
    select = [layer.plan.selector.select for layer in cache.layers[1:]]
    q, other = query(1), query(1, seed=8)
    arguments = cache.page_table, cache.seq_lens, SCALE
    assert select[0](q, cache.layers[1], *arguments).indices is None
    first = lists(select[1](other, cache.layers[2], *arguments))
    assert select[2](other, cache.layers[3], *arguments).indices is None
    second = lists(select[3](q, cache.layers[4], *arguments))
    assert first != second
    with pytest.raises(ValueError, match=r"Tidal: selection_layers: expected the first sparse layer, 0, among them, got \(2, 13\)"):
        make_cache(Tidal(), [10], layers=3)


def test_streaming_keeps_sinks_and_the_window():
    cache, _ = filled(Streaming(token_budget=12, sinks=4), [150, 12, 5])
    found = lists(cache.layers[0].plan.selector.select(query(3), cache.layers[0], cache.page_table, cache.seq_lens, SCALE))
    assert found == [[[0, 1, 2, 3, *range(142, 150)]] * 2, [list(range(12))] * 2, [list(range(5))] * 2]


def test_sparq_reads_the_channels_in_which_the_query_is_largest():
    q = torch.zeros(1, 1, HEADS, HEAD_DIM)
    q[..., 7], q[..., 30] = 4.0, -2.0
    cache, k = filled(SparQ(token_budget=10, channels=2), [150])
    found = lists(cache.layers[0].plan.selector.select(q, cache.layers[0], cache.page_table, cache.seq_lens, SCALE))
    assert found == [[best(row, 10, [149]) for row in exact_scores(q, k)[0]]]


def test_double_sparsity_calibrates_on_real_rows_only():
    cache = make_cache(DoubleSparsity(heavy_channels=4, label_dtype="model"), [10])
    k = torch.rand(1, 30, KV_HEADS, HEAD_DIM)
    k[:, 20:, 0, [3, 9, 33, 60]] += 5
    k[:, 20:, 1, [1, 2, 4, 8]] -= 5
    k[:, :20, :, 50] = 1000.0  # padding
    q = torch.rand(1, 30, HEADS, HEAD_DIM)
    layer = cache.layers[0]
    layer.plan.selector.calibrate(q, k, layer, torch.arange(30)[None].int() - 20, SCALE)
    assert [sorted(row) for row in layer.selector_state["heavy_channels"].tolist()] == [[3, 9, 33, 60], [1, 2, 4, 8]]


def test_double_sparsity_reads_its_channels_from_a_calibration_file(tmp_path):
    order = torch.stack([torch.randperm(HEAD_DIM, generator=torch.Generator().manual_seed(h)) for h in range(KV_HEADS)]).int()
    path = str(tmp_path / "calibration.safetensors")
    tensors = {"layers.1.channel_order": order, "layers.1.prefix_channels": torch.full((KV_HEADS,), 8, dtype=torch.int32)}
    save_file(tensors, path, metadata={"format": calibration.FORMAT})
    with pytest.raises(ValueError, match=r"calibration: .*: expected an entry for layer 0, got none"):
        make_cache(DoubleSparsity(calibration=path), [10])
    for label_dtype in ("model", "int4"):
        cache = make_cache(DoubleSparsity(heavy_channels=8, label_dtype=label_dtype, calibration=path), [10], layers=2, dense_layers=1)
        layer = cache.layers[1]
        layer.plan.selector.calibrate(query(1, 10), keys_values([10])[0], layer, None, SCALE)
        labels = layer.selector_state["heavy_channels"] if label_dtype == "model" else layer.shadow.channel_order[:, :8]
        assert labels.equal(order[:, :8])


def test_double_sparsity_labels_in_four_bits_are_the_heavy_channels_of_the_shadow():
    """The order of the paper's strength, a prefix of as many channels, and the scores that a cache of these codes would have."""
    selector = DoubleSparsity(token_budget=20, heavy_channels=16)
    cache, k = filled(selector, [150])
    shadow, q = cache.layers[0].shadow, query(1)
    strength = query(1, 150, seed=5).abs().unflatten(2, (KV_HEADS, -1)).sum(3).sum((0, 1)) * k.abs().sum((0, 1))
    assert shadow.channel_order.equal(strength.argsort(dim=-1, descending=True).int()) and shadow.prefix_channels.tolist() == [16] * 2
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    zero, scale = low.bfloat16().float(), ((high - low) / 15).bfloat16().float()
    labels = ((k - zero) / scale).round().clamp(0, 15) * scale + zero
    labels = labels * torch.zeros(KV_HEADS, HEAD_DIM).scatter(1, shadow.channel_order[:, :16].long(), 1.0)
    found = lists(selector.select(q, cache.layers[0], cache.page_table, cache.seq_lens, SCALE))
    assert found == [[best(row, 20, [149]) for row in exact_scores(q, labels)[0]]]


def test_magicpig_lists_exactly_the_tokens_with_enough_collisions():
    selector = MagicPig(token_budget=150, budget_fraction=0.0, hyperplanes=6, tables=10)
    cache, k = filled(selector, [150])
    layer, q = cache.layers[0], query(1)
    planes = layer.selector_state["planes"].double().view(HEAD_DIM, 10, 6)
    centre = k[0].mean(0)
    torch.testing.assert_close(layer.selector_state["centre"], centre)
    key_bits = torch.einsum("nhd,dlk->nhlk", (k[0] - centre).double(), planes) > 0
    query_bits = torch.einsum("hgd,dlk->hglk", q[0, 0].unflatten(0, (KV_HEADS, -1)).double(), planes) > 0
    found = lists(selector.select(q, layer, cache.page_table, cache.seq_lens, SCALE))
    for head in range(KV_HEADS):
        hits = (key_bits[:, head, None] == query_bits[head]).all(-1).sum(-1)  # [N, G]
        expected = set((hits >= 2).any(-1).nonzero()[:, 0].tolist()) | {149}
        assert set(found[0][head]) == expected
        assert 1 < len(expected) < 150


def test_magicpig_finds_the_key_that_points_along_the_query():
    cache, k = filled(MagicPig(token_budget=8, budget_fraction=0.0), [149])
    q = query(1)
    k = q[:, :, ::3].clone() * 2  # the first head of each group
    cache.seq_lens.add_(1)
    layer = cache.layers[0]
    append(k, k, layer, cache.page_table, cache.seq_lens)
    more, _ = keys_values([5], seed=4)
    cache.seq_lens.add_(5)
    append(more, more, layer, cache.page_table, cache.seq_lens)
    found = lists(layer.plan.selector.select(q, layer, cache.page_table, cache.seq_lens, SCALE))
    assert all(149 in row for row in found[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Streaming(sinks=-1), "Streaming: sinks: expected >= 0, got -1"),
        (lambda: SparQ(channels=0), "SparQ: channels: expected >= 1, got 0"),
        (lambda: DoubleSparsity(heavy_channels=4), "DoubleSparsity: heavy_channels: expected a positive multiple of 8, got 4"),
        (lambda: DoubleSparsity(heavy_channels=0, label_dtype="int8"), "DoubleSparsity: heavy_channels: expected >= 1, got 0"),
        (lambda: DoubleSparsity(label_dtype="int2"), 'DoubleSparsity: label_dtype: expected "int4", "int8" or "model", got \'int2\''),
        (lambda: MagicPig(hyperplanes=16), "MagicPig: hyperplanes: expected 1..15, got 16"),
        (lambda: MagicPig(min_collisions=151), "MagicPig: min_collisions: expected 1..tables = 150, got 151"),
        (lambda: Tidal(token_budget=0), "Tidal: token_budget: expected >= 1, got 0"),
        (lambda: SparQ(budget_fraction=1.5), r"SparQ: budget_fraction: expected 0\.\.1, got 1.5"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("selector", [*SELECTORS, Full(), PageMean(), Quest(), ShadowPrefix()], ids=name)
def test_every_selector_says_what_it_reads(selector):
    cache, _ = filled(selector, [20], layers=2)
    per_head = selector.scan_bytes(cache.layers[1], 20)
    assert len(per_head) == KV_HEADS
    # In fp32, so that a whole key is 256 bytes; labels, bounds and prefixes must be cheaper. MagicPIG's codes need not be.
    assert all(0 <= b < HEAD_DIM * 4 for b in per_head)


# Inductor compiles what is most unlike the others: state shared by two layers, and hash codes; the rest is traced only.
CAPTURED = {"aot_eager": [SELECTORS[0], *SELECTORS[2:5], SELECTORS[6], PageMean(40, 0.0)], "inductor": [SELECTORS[6], SELECTORS[7]]}


@pytest.mark.parametrize("backend", CAPTURED)
def test_a_compiled_step_captures_every_selector_once_and_updates_its_state_in_place(backend):
    selectors = CAPTURED[backend]
    lens = [30, 20]
    layers = {"Tidal": 2}
    caches = [filled(selector, lens, layers=layers.get(name(selector), 1))[0] for selector in selectors]
    twins = [filled(selector, lens, layers=layers.get(name(selector), 1))[0] for selector in selectors]
    addresses = [[t.data_ptr() for layer in cache.layers for t in layer.selector_state.values()] for cache in caches]

    def step(caches, q, k):
        outs = []
        for cache in caches:
            cache.seq_lens.add_(1)
            for layer in cache.layers:
                append(k, k, layer, cache.page_table, cache.seq_lens)
                outs.append(attend(q, layer, cache.page_table, cache.seq_lens, SCALE)[0])
        return outs

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(20):
        q, k = query(2, seed=20 + i), keys_values([1, 1], seed=40 + i)[0]
        for got, expected in zip(compiled(caches, q, k), step(twins, q, k), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert addresses == [[t.data_ptr() for layer in cache.layers for t in layer.selector_state.values()] for cache in caches]
