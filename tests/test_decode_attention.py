"""twilight::decode_attention: the stages behind one schema, with its dense fall-back, counters and lists."""

import math
from dataclasses import replace

import pytest
import torch
from comparisons import (
    assert_attention_close,
    assert_same_sets,
    dot_rounding,
    histogram_bin,
    listed_set,
    plain_attention,
    top_p_borderline,
)
from flat import reference
from inputs import BY_BOUNDS, BY_MEANS, SHAPES, Shape, break_key, make_inputs, random_candidates

from twilight_ops import Shadow
from twilight_ops.capacity import COUNTER_COLUMNS, COUNTER_DENSE, COUNTER_HEADER, HISTOGRAM_BINS

pytestmark = pytest.mark.usefixtures("poisoned_empties")
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)
NO_SHADOW = dict.fromkeys(Shadow._fields, None)
NO_BOUNDS = {"page_bounds": None, "bounds_scale": None}
SELECTORS = ("full", "quest", "page_mean", "shadow_prefix", "streaming", "given")


class Decoded:
    """One call with every output that a caller may give: out, lse, the kept set [B, Hkv, M * S] and the counters."""

    def __init__(self, backend, x, **options):
        batch, kv_heads, device = len(x.seq_lens), x.num_kv_heads, x.q.device
        self.indices = torch.full((batch, kv_heads, x.max_tokens), 77, dtype=torch.int32, device=device)
        self.counts = torch.full((batch, kv_heads), 77, dtype=torch.int32, device=device)
        self.counters = torch.zeros(kv_heads, COUNTER_COLUMNS, dtype=torch.int64, device=device)
        self.out = x.q.new_empty(x.q.shape)
        observed = {"budget_counters": self.counters, "kept_indices": self.indices, "kept_counts": self.counts, "out": self.out}
        self.arguments = x.arguments("decode_attention", **observed, **options)
        nothing, self.lse = backend.decode_attention(**self.arguments)
        assert nothing.numel() == 0
        self.kept = listed_set(self.indices, self.counts, x.max_tokens)


def budget_of(options: dict) -> dict:
    names = ("token_budget", "budget_fraction", "sink_tokens", "recent_tokens", "head_token_budget")
    return {name: options[name] for name in names if name in options}


def window(x, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks and the newest tokens up to the budget, row by row."""
    indices = torch.full((len(x.seq_lens), x.num_kv_heads, x.max_tokens), -1, dtype=torch.int32)
    for b, length in enumerate(x.seq_lens.tolist()):
        for head in range(x.num_kv_heads):
            budget = max(options["token_budget"], math.ceil(options.get("budget_fraction", 0.0) * length))
            if options.get("head_token_budget") is not None:
                budget = int(options["head_token_budget"][head])
            sinks, newest = options.get("sink_tokens", 0), max(options.get("recent_tokens", 0), x.q.shape[1])
            newest = max(newest, budget - sinks)
            tokens = [t for t in range(length) if t < sinks or t >= length - newest]
            indices[b, head, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    return indices.to(x.q.device), (indices >= 0).sum(-1).int().to(x.q.device)


def candidates_of(backend, x, options: dict):
    """(indices, counts, unit) from the selector's own operator."""
    if options["selector"] in ("quest", "page_mean"):
        pages = BY_BOUNDS if options["selector"] == "quest" else BY_MEANS
        return *backend.select_pages(**x.arguments("select_pages", **budget_of(options), **pages)), x.page_size
    if options["selector"] == "shadow_prefix":
        return *backend.select_tokens(**x.arguments("select_tokens", **budget_of(options))), 1
    if options["selector"] == "streaming":
        return *window(x, options), 1
    if options["selector"] == "given":
        return options["indices"], options["counts"], options["tokens_per_index"]
    return None, None, 1


def scatter_slots(x, weights, indices, counts, unit):
    """Weights of a candidate list as [B, T, Hq, M * S], zero outside the list."""
    if indices is None:
        return weights
    offsets = torch.arange(unit, device=x.q.device)
    used = torch.arange(indices.shape[-1], device=x.q.device) < counts[..., None]
    position = (indices.long()[..., None] * unit + offsets).where(used[..., None], x.max_tokens).flatten(-2)
    position = position.clamp(max=x.max_tokens).repeat_interleave(x.group_size, 1)[:, None].expand_as(weights)
    full = weights.new_zeros(*weights.shape[:3], x.max_tokens + 1)
    return full.scatter_(-1, position, weights)[..., :-1]


def check(backend, x, **options) -> Decoded:
    """The kept set is what the stages keep (rounding at the threshold excepted) and out is exact attention on that very set."""
    got = Decoded(backend, x, **options)
    want_dense = (x.seq_lens <= options.get("dense_below", 0))[:, None, None]
    everything = (torch.arange(x.max_tokens, device=x.q.device) < x.seq_lens[:, None])[:, None]
    prunes = options["selector"] != "dense" and (options["top_p"] < 1.0 or options.get("head_top_p") is not None)
    indices, counts, unit = candidates_of(backend, x, options)
    cap = {"softcap": options.get("softcap")}
    if prunes:
        weights = x.oracle("estimate_weights", indices=indices, counts=counts, tokens_per_index=unit, **cap).float()
        pruner = (options["top_p"], options.get("head_top_p"), options.get("sink_tokens", 0), options.get("recent_tokens", 0))
        kept = reference.prune_top_p(weights, x.seq_lens, indices, counts, unit, x.num_kv_heads, *pruner)
        expected = listed_set(kept[0], kept[1], x.max_tokens)
        p = options["top_p"] if options.get("head_top_p") is None else options["head_top_p"]
        spread_out = scatter_slots(x, weights, indices, counts, unit)
        borderline = top_p_borderline(spread_out, p, x.num_kv_heads, 2 * dot_rounding(x)) & ~want_dense
    else:
        expected = everything.expand_as(got.kept)
        if indices is not None:
            expected = expected & listed_set(indices, counts, x.max_tokens // unit).repeat_interleave(unit, -1)
        borderline = None
    expected = torch.where(want_dense, everything, expected)
    slots = torch.arange(x.max_tokens, device=x.q.device).where(expected, x.max_tokens).sort(-1).values
    as_list = torch.where(slots == x.max_tokens, -1, slots).int(), expected.sum(-1).int()
    assert_same_sets((got.indices, got.counts), as_list, x.max_tokens, borderline)

    want = x.oracle("attend_sparse", indices=got.indices, counts=got.counts, **cap)
    assert got.out.dtype == x.q.dtype and got.out.is_contiguous() and got.lse.dtype == torch.float32
    assert_attention_close(x, (got.out, got.lse), want, plain_attention(x, got.kept, **cap))
    return got


def options_for(x, selector: str, **options) -> dict:
    """A budget well below the longest sequence, or a random list for "given"."""
    chosen = {"selector": selector, "token_budget": max(64, int(x.seq_lens.max()) // 4), "budget_fraction": 0.0, "top_p": 0.85}
    if selector == "given":
        indices, counts = random_candidates(x, 1)
        chosen |= {"indices": indices, "counts": counts, "tokens_per_index": 1}
    return chosen | options


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("selector", ["quest", "page_mean", "shadow_prefix", "streaming"])
def test_decode_attention_equals_the_composed_stages(backend, shape, selector):
    x = make_inputs(shape, device=backend.device)
    check(backend, x, **options_for(x, selector))


@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
@pytest.mark.parametrize("selector", ["full", "given"])
def test_decode_attention_equals_the_composed_stages_for_other_selectors(backend, shape, selector):
    x = make_inputs(shape, device=backend.device)
    check(backend, x, **options_for(x, selector))


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attention_without_pruning_attends_to_all_candidates(backend, selector):
    x = make_inputs(SMALL, device=backend.device)
    got = check(backend, x, **options_for(x, selector, top_p=1.0), **(NO_SHADOW if selector not in ("page_mean", "shadow_prefix") else {}))
    assert selector == "full" or (got.counts[0] < 300).all()


@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix", "streaming"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4], SHAPES[10]], ids=str)
def test_decode_attention_with_p_one_and_full_budget_is_dense_attention(backend, selector, shape):
    x = make_inputs(shape, device=backend.device)
    got = check(backend, x, selector=selector, token_budget=x.max_tokens, top_p=1.0)
    assert (got.counts == x.seq_lens[:, None]).all()
    assert_attention_close(x, (got.out, got.lse), x.oracle("attend_sparse"), plain_attention(x))


def test_decode_attention_dense_ignores_p_and_needs_neither_shadow_nor_bounds(backend):
    x = make_inputs(SMALL, device=backend.device)
    got = check(backend, x, selector="dense", token_budget=1, top_p=0.5, **NO_SHADOW, **NO_BOUNDS)
    assert (got.counts == x.seq_lens[:, None]).all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attention_is_dense_up_to_and_including_dense_below(backend, selector):
    x = make_inputs(Shape((199, 200, 201, 0), 4, 2, 64, 16, 2, torch.float32), device=backend.device)
    got = check(backend, x, **options_for(x, selector, token_budget=32, dense_below=200))
    assert got.counts[:2].tolist() == [[199] * 2, [200] * 2] and (got.counts[2] < 201).all() and (got.counts[3] == 0).all()


def test_decode_attention_keeps_sinks_and_recent_tokens(backend):
    x = make_inputs(Shape((300, 40, 5), 4, 2, 64, 16, 1, torch.float32), device=backend.device)
    for selector in ("full", "quest", "page_mean", "shadow_prefix", "streaming"):
        got = check(backend, x, **options_for(x, selector, token_budget=96, top_p=0.3, sink_tokens=4, recent_tokens=9))
        assert got.kept[0, :, :4].all() and got.kept[0, :, 291:300].all() and got.kept[2, :, :5].all()
        assert (got.counts[0] < 60).all()


def test_decode_attention_follows_one_budget_a_head(backend):
    x = make_inputs(SMALL, device=backend.device)
    per_head = torch.tensor([5, 50, 500], dtype=torch.int32, device=backend.device)
    got = check(backend, x, **options_for(x, "shadow_prefix", token_budget=80, top_p=1.0, head_token_budget=per_head))
    assert got.counts[0].tolist() == [5, 50, 80]


@pytest.mark.parametrize("top_p", [0.85, 1.0])
def test_decode_attention_follows_one_p_a_head(backend, top_p):
    x = make_inputs(SMALL, device=backend.device)
    p = torch.tensor([[0.1, 0.1, 1.0, 0.1, 0.9, 0.9]], device=backend.device)
    got = check(backend, x, **options_for(x, "full", top_p=top_p, head_top_p=p))
    assert got.counts[0, 1] == 300 and got.counts[0, 0] < got.counts[0, 2] < 300


@pytest.mark.parametrize("bounds_dtype", ["model", "uint8"])
def test_decode_attention_reads_bounds_of_either_width(backend, bounds_dtype):
    x = make_inputs(Shape((700, 40), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device, bounds_dtype=bounds_dtype)
    check(backend, x, **options_for(x, "quest"))


def test_decode_attention_takes_given_pages_and_buffers_wider_than_the_sequence(backend):
    x = make_inputs(SMALL, device=backend.device)
    indices, counts = random_candidates(x, 16)
    wide = torch.cat([indices, indices.new_full((2, 3, 40), -1)], dim=-1)
    given = {"indices": wide, "counts": counts, "tokens_per_index": 16}
    check(backend, x, selector="given", token_budget=1, top_p=0.9, **given)
    check(backend, x, selector="given", token_budget=1, top_p=1.0, **given)


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attention_lets_no_query_token_see_a_newer_one(backend, selector):
    x = make_inputs(Shape((130, 6, 3), 4, 2, 64, 16, 4, torch.float32), device=backend.device)
    options = options_for(x, selector)
    before = Decoded(backend, x, **options)
    # Another newest token changes the last query row only: the kept set may change, so compare on everything.
    dense = {"selector": "dense", "token_budget": 1, "top_p": 1.0}
    first = Decoded(backend, x, **dense)
    page, slot = int(x.page_table[0, 129 // 16]), 129 % 16
    x.v_cache[page, :, slot] += 1.0
    second = Decoded(backend, x, **dense)
    assert torch.equal(first.out[0, :3], second.out[0, :3]) and not torch.equal(first.out[0, 3], second.out[0, 3])
    assert (before.lse[2, 0] == -math.inf).all() and (before.out[2, 0] == 0).all(), "a query token before the first position sees nothing"


@pytest.mark.parametrize("selector", ["dense", *SELECTORS])
def test_decode_attention_of_a_table_without_pages_keeps_nothing(backend, selector):
    dtype = torch.float16 if backend.device == "cuda" else SMALL.dtype
    x = make_inputs(replace(SMALL, dtype=dtype), device=backend.device, bounds_dtype="uint8")
    options = options_for(x, selector)
    if selector == "given":
        options["indices"] = options["indices"][..., :0].contiguous()
        options["counts"] = torch.zeros_like(options["counts"])
    x = replace(x, page_table=x.page_table[:, :0].contiguous())
    got = Decoded(backend, x, **options)
    assert (got.out == 0).all() and (got.lse == -math.inf).all()
    assert got.indices.shape[-1] == 0 and (got.counts == 0).all() and (got.counters == 0).all()


def test_decode_attention_gives_zeros_and_minus_infinity_for_empty_sequences(backend):
    for selector in ("dense", *SELECTORS):
        x = make_inputs(SMALL, device=backend.device)
        x.seq_lens.copy_(torch.tensor([0, 40]))
        got = check(backend, x, **options_for(x, selector))
        assert (got.out[0] == 0).all() and (got.lse[0] == -math.inf).all() and (got.counts[0] == 0).all()
        assert got.counters[:, 0].tolist() == [1, 1, 1], "an empty sequence is not counted"
        x.seq_lens.fill_(-9)
        got = Decoded(backend, x, **options_for(x, selector))
        assert (got.out == 0).all() and (got.counters == 0).all()


@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_decode_attention_gives_what_dense_attention_gives_for_a_broken_key(backend, selector, value):
    x = make_inputs(SMALL, device=backend.device)
    break_key(x, 0, 77, value)
    got = Decoded(backend, x, **options_for(x, selector))
    dense, _ = x.oracle("attend_sparse")
    assert got.kept[0, :, 77].all(), "the broken key is a candidate and is kept"
    assert torch.equal(got.out[0].isnan(), dense[0].isnan()) and got.out[1].isfinite().all()


@pytest.mark.parametrize("selector", ["dense", *SELECTORS])
def test_decode_attention_gives_nan_only_in_the_rows_whose_query_is_nan(backend, selector):
    x = make_inputs(SMALL, device=backend.device)
    x.q[0, 0, 2, 7] = math.nan
    got = Decoded(backend, x, **options_for(x, selector))
    assert got.out[0, 0, 2].isnan().all() and got.out.isnan().sum() == 64


def expected_counters(x, decoded: Decoded, candidates: torch.Tensor):
    """Counters rebuilt from the kept lists, all columns but the mass."""
    rows = torch.zeros_like(decoded.counters)
    dense_below = decoded.arguments.get("dense_below", 0)
    for b, length in enumerate(x.seq_lens.tolist()):
        for head in range(x.num_kv_heads):
            if length > 0:
                offered, kept = int(candidates[b, head]), int(decoded.counts[b, head])
                rows[head, :4] += torch.tensor([1, length, offered, kept], device=rows.device)
                rows[head, COUNTER_DENSE] += decoded.arguments["selector"] == "dense" or length <= dense_below
                rows[head, COUNTER_HEADER + histogram_bin(offered)] += 1
                rows[head, COUNTER_HEADER + HISTOGRAM_BINS + histogram_bin(kept)] += 1
    return rows


@pytest.mark.parametrize("selector", ["dense", *SELECTORS])
def test_decode_attention_counts_what_it_keeps(backend, selector):
    x = make_inputs(Shape((700, 0, 33, 15), 6, 2, 64, 16, 1, torch.float32), device=backend.device)
    options = options_for(x, selector, dense_below=20)
    got = check(backend, x, **options)
    indices, counts, unit = candidates_of(backend, x, options)
    offered = x.seq_lens[:, None].expand_as(got.counts)
    if indices is not None:
        member = listed_set(indices, counts, x.max_tokens // unit).repeat_interleave(unit, -1)
        live = torch.arange(x.max_tokens, device=x.q.device) < x.seq_lens[:, None, None]
        offered = torch.where(x.seq_lens[:, None] <= 20, offered, (member & live).sum(-1))
    want = expected_counters(x, got, offered)
    mass = got.counters[:, 4].clone()
    got.counters[:, 4] = 0
    assert torch.equal(got.counters, want)

    oracle = torch.zeros_like(got.counters)
    x.oracle("decode_attention", **options, budget_counters=oracle)
    torch.testing.assert_close(mass.double(), oracle[:, 4].double(), rtol=2e-3, atol=1)
    assert (mass <= 3 * 2**20).all() and (mass >= 3 * 0.85 * 2**20 - 3).all(), "three live sequences, each keeping p or more"

    got.counters[:, 4] = mass
    before = got.counters.clone()
    backend.decode_attention(**got.arguments)
    assert torch.equal(got.counters, 2 * before), "counters add up over calls"


def test_decode_attention_needs_no_outputs_of_the_caller(backend):
    x = make_inputs(SMALL, device=backend.device)
    for selector in ("dense", *SELECTORS):
        options = options_for(x, selector)
        bare = backend.decode_attention(**x.arguments("decode_attention", **options))
        watched = Decoded(backend, x, **options)
        assert torch.equal(bare[0], watched.out) and torch.equal(bare[1], watched.lse)


def test_decode_attention_reads_lengths_beyond_the_page_table_as_full(backend):
    x = make_inputs(Shape((320,), 2, 1, 64, 16, 1, torch.float32), device=backend.device, extra_pages=0)
    x.page_table[0, -1] = next(p for p in range(x.k_cache.shape[0]) if p not in x.page_table[0, :-1].tolist())
    for cache in (x.k_cache, x.v_cache, x.k_scale, x.page_bounds, x.means_scale):
        cache.nan_to_num_(0.5)
    for selector in ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming"):
        x.seq_lens.fill_(320)
        want = Decoded(backend, x, **options_for(x, selector))
        x.seq_lens.fill_(2**31 - 1)
        got = Decoded(backend, x, **options_for(x, selector, token_budget=want.arguments["token_budget"]))
        assert torch.equal(got.out, want.out) and torch.equal(got.indices, want.indices)


def test_decode_attention_ends_on_page_tables_that_point_nowhere(backend):
    x = make_inputs(SMALL, device=backend.device)
    for cache in (x.k_cache, x.v_cache, x.k_scale, x.page_bounds, x.means_scale):
        cache.nan_to_num_(0.5)
    x.page_table[0, 2], x.page_table[0, 3], x.page_table[1, 0] = -1, 2**31 - 1, -(2**31)
    for selector in ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming"):
        assert Decoded(backend, x, **options_for(x, selector)).out.isfinite().all()


@pytest.mark.parametrize("selector", SELECTORS)
def test_decode_attention_is_bitwise_the_same_for_any_number_of_threads(backend, threads, selector):
    if backend.name == "reference":
        pytest.skip("PyTorch's own matrix product may split its sums by thread")
    x = make_inputs(Shape((3000, 100), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(Decoded(backend, x, **options_for(x, selector)))
    for other in results[1:]:
        for name in ("out", "lse", "indices", "counts", "counters"):
            assert torch.equal(getattr(other, name), getattr(results[0], name)), name


def test_decode_attention_serves_a_long_context(backend):
    x = make_inputs(Shape((32768,), 4, 1, 128, 16, 1, torch.bfloat16), device=backend.device)
    for selector in ("quest", "page_mean", "shadow_prefix", "streaming"):
        got = check(backend, x, **options_for(x, selector, token_budget=8192))
        assert got.counts.max() < 8192


def test_decode_attention_changes_nothing_but_its_counters_and_lists(backend):
    x = make_inputs(replace(SMALL, dtype=torch.bfloat16), device=backend.device)
    before = x.clone()
    for selector in ("dense", *SELECTORS):
        Decoded(backend, x, **options_for(x, selector))
    for name, tensor in x.tensors().items():
        torch.testing.assert_close(tensor, before.tensors()[name], rtol=0, atol=0, equal_nan=True)
