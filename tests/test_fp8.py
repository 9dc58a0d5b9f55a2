"""K and V in float8_e4m3fn: what is stored, what attention makes of it, and that selection does not notice."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from comparisons import assert_attention_close, assert_same_state
from flat import reference
from inputs import SHAPES, Shape, in_fp8, interleaved, make_inputs, random_candidates
from test_append_kv import append, blank, left_aligned
from test_decode_attention import Decoded

from twilight_ops import PagedKVCache, TwilightConfig, decode_step
from twilight_ops.arguments import FP8, Scales
from twilight_ops.layer import descale, exact_first, mean_key

pytestmark = pytest.mark.usefixtures("poisoned_empties")
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)


def empty_fp8(shape: Shape, device, **options):
    x = make_inputs(shape, device=device, **options)
    y = in_fp8(x)
    return blank(replace(y, keys=x.keys, values=x.values))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounds_dtype", ["model", "uint8"])
def test_append_kv_writes_what_the_reference_writes(backend, shape, bounds_dtype):
    x = empty_fp8(shape, backend.device, bounds_dtype=bounds_dtype)
    append(backend, x, positions=left_aligned(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_append_kv_rounds_every_number_to_the_nearest_ties_to_even_and_keeps_nan(backend, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    known = codes[codes.isfinite()].sort().values
    between = (known[1:] + known[:-1]) / 2  # ties
    numbers = torch.cat(
        [codes, between, between * (1 + 2**-7), between * (1 - 2**-7), torch.tensor([449.0, 1e4, -6e4, math.inf, -math.inf])]
    )
    numbers = torch.cat([numbers, torch.zeros(-len(numbers) % 64)]).to(dtype).view(1, -1, 1, 64).expand(-1, -1, 3, -1)
    x = empty_fp8(replace(SMALL, seq_lens=(numbers.shape[1],), dtype=dtype), backend.device)
    x.k_shift.zero_()
    x.k_descale.copy_(torch.tensor([1.0, 0.25, 2.0]))
    x.v_descale.copy_(torch.tensor([4.0, 1.0, 0.5]))
    rows = numbers.to(backend.device)
    append(backend, x, rows, rows)
    for pages, scale in ((x.k_cache, x.k_descale), (x.v_cache, x.v_descale)):
        stored = pages[x.page_table[0, :-1].long()].transpose(1, 2).flatten(0, 1)[: rows.shape[1]].float()
        expected = (rows[0].float() / scale[:, None]).clamp(-448, 448).to(FP8).float()
        torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(stored.isnan(), rows[0].isnan()) and (stored.abs().nan_to_num(0.0) <= 448).all()


def test_the_shadow_is_of_the_keys_before_they_are_rounded(backend):
    x = make_inputs(SMALL, device=backend.device)
    y = blank(replace(in_fp8(x), keys=x.keys, values=x.values))
    backend.append_kv(**y.arguments("append_kv", k=x.keys, v=x.values, positions=left_aligned(x)))
    for name in ("k_quant", "k_scale"):
        wide, narrow = getattr(x, name), getattr(y, name)
        for b, length in enumerate(SMALL.seq_lens):
            for page in x.page_table[b, : length // 16].long():  # whole pages
                assert torch.equal(wide[page], narrow[page]), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_token", [False, True], ids=["dense", "tokens"])
def test_attend_sparse_matches_the_oracle_on_what_is_stored(backend, shape, by_token):
    x = in_fp8(make_inputs(shape, device=backend.device))
    listed = dict(zip(("indices", "counts"), random_candidates(x, 1), strict=True)) if by_token else {}
    got = backend.attend_sparse(**x.arguments("attend_sparse", **listed))
    want = x.oracle("attend_sparse", **listed)
    assert got[0].dtype == x.q.dtype and got[0].is_contiguous() and got[1].dtype == torch.float32
    assert_attention_close(x, got, want, want_in_fp32(x, listed))


def want_in_fp32(x, listed):
    """The reference in fp32, its result rounded to the call's dtype."""
    return reference.attend_sparse(**x.arguments("attend_sparse", **listed))


def test_attention_without_scales_takes_the_numbers_as_they_are(backend):
    x = in_fp8(make_inputs(SMALL, device=backend.device))
    for name in Scales._fields:
        bare = replace(x, **{name: None})
        got = backend.attend_sparse(**bare.arguments("attend_sparse"))
        torch.testing.assert_close(
            got, tuple(t.to(g.dtype) for t, g in zip(bare.oracle("attend_sparse"), got, strict=True)), rtol=1e-4, atol=1e-4
        )


def test_a_large_shift_costs_no_precision_and_is_part_of_lse(backend):
    """Channels in the hundreds, as models with a bias on K have them: what is stored is what the bias leaves."""
    x = make_inputs(replace(SMALL, dtype=torch.bfloat16), device=backend.device, spread=1.0)
    bias = torch.zeros(3, 64, device=backend.device)
    bias[:, ::16] = 300.0
    y = blank(in_fp8(x))
    y.k_shift.copy_(bias)
    y.k_descale.fill_(2.0**-4)
    y.v_descale.fill_(2.0**-4)
    keys = (x.keys.float() + bias).bfloat16()
    backend.append_kv(**y.arguments("append_kv", k=keys, v=x.values, positions=left_aligned(x)))
    out, lse = backend.attend_sparse(**y.arguments("attend_sparse"))
    exact = replace(x, keys=keys)
    reference.append_kv(**exact.arguments("append_kv", k=keys, v=x.values, positions=left_aligned(x)))
    want, want_lse = exact.oracle("attend_sparse")
    assert (out - want).abs().max() < 0.1 * want.abs().max()
    assert (lse - want_lse).abs().max() < 0.2 and want_lse.abs().max() > 20
    plain = replace(y, k_shift=None)
    backend.append_kv(**plain.arguments("append_kv", k=keys, v=x.values, positions=left_aligned(x)))
    worse, _ = backend.attend_sparse(**plain.arguments("attend_sparse"))
    assert (worse - want).abs().max() > 4 * (out - want).abs().max()


@pytest.mark.parametrize("selector", ["full", "shadow_prefix", "streaming", "given"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=str)
def test_kept_sets_are_those_of_a_cache_that_rounds_nothing(backend, selector, shape):
    x = make_inputs(shape, device=backend.device)
    options = {"selector": selector, "token_budget": 60, "budget_fraction": 0.25, "top_p": 0.8, "sink_tokens": 3, "recent_tokens": 9}
    if selector == "given":
        options |= dict(zip(("indices", "counts"), random_candidates(x, 1), strict=True))
    whole, half = Decoded(backend, x, **options), Decoded(backend, in_fp8(x), **options)
    assert torch.equal(whole.indices, half.indices) and torch.equal(whole.counts, half.counts)
    assert torch.equal(whole.counters, half.counters)


@pytest.mark.parametrize("selector", ["quest", "page_mean", "two levels", "shadow_prefix", "dense"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[9]], ids=str)
def test_decode_attention_attends_to_what_is_stored_of_the_kept_tokens(backend, selector, shape):
    x = in_fp8(make_inputs(shape, device=backend.device, bounds_dtype="uint8"))
    options = {"selector": selector, "token_budget": 60, "budget_fraction": 0.25, "top_p": 0.8, "dense_below": 40}
    if selector == "two levels":
        options |= {"selector": "shadow_prefix", "page_fraction": 0.5}
    got = Decoded(backend, x, **options)
    listed = {"indices": got.indices, "counts": got.counts}
    oracle = x.oracle("attend_sparse", **listed)
    assert_attention_close(x, (got.out, got.lse), oracle, want_in_fp32(x, listed))


@pytest.mark.parametrize("by_head", [True, False], ids=["by head", "by tensor"])
@pytest.mark.parametrize("selector", ["dense", "shadow_prefix"])
def test_caches_whose_pages_and_heads_lie_apart_give_the_same_bits(backend, selector, by_head):
    x = in_fp8(make_inputs(SHAPES[0], device=backend.device, bounds_dtype="uint8"))
    blocks = interleaved(x, by_head)
    options = {"selector": selector, "token_budget": 60, "top_p": 0.8}
    got, want = Decoded(backend, blocks, **options), Decoded(backend, x, **options)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse) and torch.equal(got.indices, want.indices)
    for y in (blocks, x):
        backend.append_kv(**y.arguments("append_kv", k=x.keys.flip(1), v=x.values.flip(1)))
    assert_same_state(blocks, x)


BAD = [
    ("v_cache", lambda x: {"v_cache": x.v_cache.float()}, "v_cache: expected dtype float8_e4m3fn, got float32"),
    ("k_cache", lambda x: {"k_cache": x.k_cache.float()}, "v_cache: expected dtype float32, got float8_e4m3fn"),
    ("bf16", lambda x: {"k_cache": x.k_cache.bfloat16()}, "k_cache: expected dtype float32 or float8_e4m3fn, got bfloat16"),
    ("heads", lambda x: {"k_descale": x.k_descale[:2]}, r"k_descale: expected shape \[Hkv\] with Hkv = 3, got \[2\]"),
    ("channels", lambda x: {"k_shift": x.k_shift[:, :32].contiguous()}, r"k_shift: expected shape \[Hkv, D\] with D = 64, got \[3, 32\]"),
    ("half", lambda x: {"v_descale": x.v_descale.half()}, "v_descale: expected dtype float32, got float16"),
    (
        "scales without codes",
        lambda x: {"k_cache": x.k_cache.float(), "v_cache": x.v_cache.float()},
        "k_descale: expected None, because k_cache is float32, got a tensor",
    ),
]


@pytest.mark.parametrize("change, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
@pytest.mark.parametrize("op", ["append_kv", "attend_sparse", "decode_attention"])
def test_malformed_caches_are_refused_by_name(backend, op, change, message):
    x = in_fp8(make_inputs(SMALL, device=backend.device))
    rows = {"k": x.keys[:, :1], "v": x.values[:, :1]} if op == "append_kv" else {}
    with pytest.raises(RuntimeError, match=f"twilight::{op}: {message}"):
        getattr(backend, op)(**x.arguments(op, **rows, **change(x)))


def test_descale_leaves_room_for_outliers_and_never_depends_on_padding():
    x = torch.randn(2, 50, 3, 64) * torch.tensor([1e-3, 1.0, 900.0])[:, None]
    positions = torch.arange(50).expand(2, -1).clone()
    positions[1, :20] = -1
    x[1, :20] = 1e9
    found = descale(x, positions)
    assert torch.equal(found.log2(), found.log2().round())
    largest = torch.where((positions >= 0)[..., None, None], x, 0.0).abs().amax((0, 1, 3)) / found
    assert (largest >= 16).all() and (largest < 32).all()
    assert torch.equal(descale(torch.zeros(1, 2, 3, 4), None), torch.ones(3))
    x[0, 0, 0, 0], x[0, 0, 1, 0] = math.nan, math.inf
    assert torch.equal(descale(x, positions), found)


@pytest.mark.parametrize("padded", [False, True])
def test_the_first_key_of_the_sequences_is_stored_exactly_and_the_shift_stays_near_the_mean(padded):
    k = torch.randn(2, 50, 3, 64) + 20 * torch.randn(3, 64)
    positions = torch.arange(50).expand(2, -1) - torch.tensor([[0], [7]]) if padded else None
    k[0, 0] = k[1, 7 if padded else 0] = 60 * torch.randn(3, 64)
    center = mean_key(k, positions)
    scale = descale(k - center, positions)
    shift = exact_first(k, positions, center, scale)
    stored = (k[0, 0] - shift) / scale[:, None]
    torch.testing.assert_close(stored.to(FP8).float(), stored, rtol=1e-5, atol=0.01)
    assert ((shift - center).abs() <= (k[0, 0] - center).abs() / 16 + scale[:, None] * 2**-10 + 1e-4).all()
    assert torch.equal(exact_first(k, torch.full((2, 50), -1), center, scale), center), "no token is the first"


def filled(kv_cache_dtype: str, k, v, q, **settings) -> PagedKVCache:
    """A cache of one layer that holds a prompt which calibrated it."""
    config = TwilightConfig(dense_below=0, kv_cache_dtype=kv_cache_dtype, **settings)
    cache = PagedKVCache(config, 1, 4, 2, 64, 1, 400, torch.bfloat16, "cpu")
    cache.seq_lens.fill_(k.shape[1])
    cache.layers[0].calibrate(q, k, None, 0.125, v)
    decode_step.append(k, v, cache.layers[0], cache.page_table, cache.seq_lens)
    return cache


def prompt(tokens=300):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, tokens, heads, 64, generator=generator) for heads in (4, 2, 2))
    k[..., 5] += 250.0
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def test_a_paged_cache_in_fp8_takes_half_the_memory_and_keeps_the_same_sets():
    q, k, v = prompt()
    plain, half = (filled(kind, k, v, q) for kind in ("auto", "fp8"))
    assert half.nbytes()["kv"] * 2 == plain.nbytes()["kv"]
    assert half.nbytes()["extra"] - plain.nbytes()["extra"] == 4 * (2 + 2 + 2 * 64)
    results = []
    for cache in (plain, half):
        lists = torch.full((1, 2, 400), -1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
        out, lse = decode_step.attend(q[:, -1:], cache.layers[0], cache.page_table, cache.seq_lens, 0.125, *lists)
        results.append((out.float(), lse, *lists))
    (out, lse, *lists), (out8, lse8, *lists8) = results
    assert all(torch.equal(one, other) for one, other in zip(lists, lists8, strict=True))
    assert (out - out8).abs().max() < 0.05 * out.abs().max() and (lse - lse8).abs().max() < 0.05


def test_copies_keep_the_scales_and_a_reset_forgets_them():
    q, k, v = prompt()
    cache = filled("fp8", k, v, q)
    layer = cache.layers[0]
    scales = [tensor.clone() for tensor in layer.scales]
    assert (scales[2][:, 5] - 250).abs().max() < 1 and scales[0].max() < 1
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin = other.layers[0]
        want, got = (decode_step.attend(q[:, -1:], one.layers[0], one.page_table, one.seq_lens, 0.125)[0] for one in (cache, other))
        assert torch.equal(want, got) and twin.kv.k_cache.data_ptr() != layer.kv.k_cache.data_ptr()
    assert len({id(tensor) for tensor in layer.tensors()}) == len(layer.tensors())
    cache.reset()
    assert torch.equal(torch.cat([layer.scales.k_descale, layer.scales.v_descale]), torch.ones(4)) and not layer.scales.k_shift.any()
