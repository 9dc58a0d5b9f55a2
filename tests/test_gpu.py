"""What only a GPU can show: the whole grid of shapes against the fp64 oracle, long contexts, CUDA graphs, and no hidden synchronisation.

`pytest -m gpu` runs everything, `pytest -m "gpu and sanitize"` the part that is small enough for compute-sanitizer.
"""

from __future__ import annotations

import itertools

import pytest
import test_append_kv
import test_attend_sparse
import test_decode_attention
import test_estimate_weights
import test_softcap
import torch
from comparisons import assert_same_state, page_mean_scores, page_scores, plain_weights, token_scores
from conftest import OpBackend
from flat import ops, reference
from inputs import BY_BOUNDS, BY_MEANS, Shape, in_fp8, make_inputs, random_candidates
from selection import Ranking

from twilight_ops import backends, kernels

NO_GPU = backends.CUDA.name == "none" or not torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_GPU, reason="no CUDA device, or a PyTorch without CUDA: the GPU suite did not run"),
    pytest.mark.usefixtures("poisoned_empties"),
]

REGISTERED = OpBackend(backends.CUDA.name, "cuda")


class Stages:
    """The Triton stages, also where a fused kernel is registered in their place."""

    device = "cuda"

    def __getattr__(self, op: str):
        return kernels.stage(op)


STAGES = Stages()


def _grid() -> list[Shape]:
    """Every 16-bit (dtype, D), with G 1/3/4/8, S 16/32/64 and T 1..8 taken in turn, and every D in 32 bits."""
    groups, pages, tokens = itertools.cycle((1, 3, 4, 8)), itertools.cycle((16, 32, 64)), itertools.cycle((1, 2, 1, 5, 1, 8))
    shapes = []
    for dtype, dim, _ in itertools.product((torch.bfloat16, torch.float16), (64, 96, 128, 256), range(3)):
        group, page = next(groups), next(pages)
        lengths = (0, 1, page - 1, page, page + 1, 1000)
        shapes.append(Shape(lengths, 2 * group, 2, dim, page, next(tokens), dtype))
    for dim, group in ((64, 2), (96, 1), (128, 4), (256, 1)):
        shapes.append(Shape((0, 1, 15, 16, 17, 1000), 2 * group, 2, dim, 16, 1, torch.float32))
    return shapes


GRID = _grid()
LONG = Shape((32768, 131072, 100), 8, 2, 128, 16, 1, torch.bfloat16)
TINY = Shape((0, 1, 17, 90), 8, 2, 64, 16, 1, torch.bfloat16)
SELECTORS = ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming", "given")


def check_append(x, backend=STAGES):
    """One more step of every sequence, as the reference writes it."""
    want = x.clone()
    rng = torch.Generator("cuda").manual_seed(1)
    size = (len(x.seq_lens), x.q.shape[1], x.num_kv_heads, x.q.shape[3])
    k, v = (torch.randn(size, generator=rng, device="cuda").to(x.q.dtype) for _ in range(2))
    reference.append_kv(**want.arguments("append_kv", k=k, v=v))
    backend.append_kv(**x.arguments("append_kv", k=k, v=v))
    assert_same_state(x, want)


def check_pruner(x, **listed):
    """Bit for bit what the reference keeps of the same weights."""
    weights = STAGES.estimate_weights(**x.arguments("estimate_weights", **listed))
    for options in ({"top_p": 0.85}, {"top_p": 0.999, "sink_tokens": 3, "recent_tokens": 20}):
        arguments = x.arguments("prune_top_p", weights=weights, **listed, **options)
        for got, want in zip(STAGES.prune_top_p(**arguments), reference.prune_top_p(**arguments), strict=True):
            assert torch.equal(got, want)


def check_estimate(x):
    got = STAGES.estimate_weights(**x.arguments("estimate_weights"))
    test_estimate_weights.check(x, got, x.oracle("estimate_weights"), plain_weights(x, torch.float32))


@pytest.mark.parametrize("shape", GRID, ids=str)
def test_every_operator_matches_the_fp64_oracle(shape):
    for bounds_dtype in ("model", "uint8"):
        x = make_inputs(shape, device="cuda", bounds_dtype=bounds_dtype)
        Ranking("select_pages", page_scores, True).check_against_oracle(STAGES, x, token_budget=200)
        check_append(x.clone())
    Ranking("select_tokens", token_scores, False).check_against_oracle(STAGES, x, token_budget=100, budget_fraction=0.15)
    check_estimate(x)
    pages, counts = random_candidates(x, shape.page_size)
    for listed in ({}, {"indices": pages, "counts": counts, "tokens_per_index": shape.page_size}):
        check_pruner(x, **listed)
    test_attend_sparse.check(STAGES, x)
    for selector in ("quest", "page_mean", "shadow_prefix", "streaming"):
        test_decode_attention.check(STAGES, x, **test_decode_attention.options_for(x, selector, dense_below=shape.page_size))


@pytest.mark.parametrize("shape", GRID[::2], ids=str)
def test_capped_stages_match_the_fp64_oracle(shape):
    x = make_inputs(shape, device="cuda", bounds_dtype="uint8")
    for softcap in test_softcap.CAPS:
        test_softcap.check_stages(STAGES, x, softcap)
    test_softcap.check_stages(STAGES, in_fp8(x), 30.0)


@pytest.mark.parametrize("selector", SELECTORS)
def test_capped_calls_keep_the_oracles_set_and_are_those_of_the_stages(selector):
    """Also of the shapes that a fused kernel would serve without a cap."""
    for shape in (TINY, Shape((1000, 300), 8, 2, 128, 16, 1, torch.bfloat16), Shape((500,), 4, 1, 256, 16, 2, torch.bfloat16)):
        x = make_inputs(shape, device="cuda", bounds_dtype="uint8")
        for softcap in (1.0, 50.0):
            test_softcap.check_decode(REGISTERED, x, selector, softcap)
            options = test_decode_attention.options_for(x, selector, softcap=softcap)
            registered, staged = (test_decode_attention.Decoded(backend, x, **options) for backend in (REGISTERED, STAGES))
            for name in ("indices", "counts", "counters", "out", "lse"):
                assert torch.equal(getattr(registered, name), getattr(staged, name)), name


@pytest.fixture(scope="module")
def long_inputs():
    return make_inputs(LONG, device="cuda", bounds_dtype="uint8")


@pytest.mark.parametrize("budget", [{"token_budget": 8192}, {"token_budget": 1, "budget_fraction": 0.125}], ids=["8192", "1/8"])
def test_selectors_match_the_oracle_on_131072_tokens(long_inputs, budget):
    Ranking("select_pages", page_scores, True).check_against_oracle(STAGES, long_inputs, **budget)
    Ranking("select_pages", page_mean_scores, True, BY_MEANS).check_against_oracle(STAGES, long_inputs, **budget)
    Ranking("select_tokens", token_scores, False).check_against_oracle(STAGES, long_inputs, **budget)


def test_estimate_prune_and_attend_match_the_oracle_on_131072_tokens(long_inputs):
    check_estimate(long_inputs)
    check_pruner(long_inputs)
    test_attend_sparse.check(STAGES, long_inputs)


@pytest.mark.parametrize("selector", ["full", "quest", "page_mean", "shadow_prefix", "streaming"])
def test_decode_attention_matches_the_oracle_on_131072_tokens(long_inputs, selector):
    options = {"selector": selector, "token_budget": 8192, "budget_fraction": 0.0, "top_p": 0.85, "dense_below": 128}
    test_decode_attention.check(STAGES, long_inputs, **options)


def growing_inputs(shape: Shape, **pages: int):
    """Inputs whose tokens were appended; every page the sequences will grow into is theirs alone."""
    x = make_inputs(shape, device="cuda", bounds_dtype="uint8", **pages)
    x.page_table.copy_(torch.arange(x.page_table.numel(), device="cuda").view_as(x.page_table))
    REGISTERED.append_kv(**x.arguments("append_kv", k=x.keys, v=x.values, positions=test_append_kv.left_aligned(x)))
    return x


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_captured_step_replays_as_eager_while_lengths_grow(selector):
    """One graph of append and attend serves every length, past dense_below and across pages, bit for bit."""
    shape = Shape((60, 5, 0), 8, 2, 64, 16, 1, torch.bfloat16)
    x = growing_inputs(shape, extra_pages=4, spare_pages=30)  # what lies behind the last token stays NaN until it is written
    size = (3, 1, 2, 64)
    k, v = torch.randn(size, device="cuda").bfloat16(), torch.randn(size, device="cuda").bfloat16()
    options = test_decode_attention.options_for(x, selector, token_budget=32, dense_below=62)
    start = x.seq_lens.clone()

    def step(cache):
        REGISTERED.append_kv(**cache.arguments("append_kv", k=k, v=v))
        return REGISTERED.decode_attention(**cache.arguments("decode_attention", **options))

    step(x)  # compiles, and writes its token
    caches = [x, x.clone()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step(x)
    for tokens in range(1, 40):
        for cache in caches:
            cache.seq_lens.copy_(start + tokens)
        torch.manual_seed(tokens)
        k.normal_(), v.normal_(), x.q.normal_(std=3.0)
        caches[1].q.copy_(x.q)
        graph.replay()
        want_out, want_lse = step(caches[1])
        assert out.isfinite().all() and torch.equal(out, want_out) and torch.equal(lse, want_lse)
    assert_same_state(*caches)


@pytest.mark.parametrize("selector", SELECTORS)
def test_steps_in_a_row_in_one_graph_are_as_with_a_wait_behind_every_call(selector):
    """Long appends and what attends to them at once; the fused kernels are launched before those ahead have ended."""
    steps, tokens = 6, 256
    shape = Shape((3000, 700, 90), 32, 8, 128, 16, 1, torch.bfloat16)
    x = growing_inputs(shape, extra_pages=steps * tokens // 16, spare_pages=700)
    # With bounds or means a long append is two kernels, without them one.
    bounds = {} if selector in ("quest", "page_mean") else BY_BOUNDS | BY_MEANS
    k, v = torch.randn(2, steps, 3, tokens, 8, 128, device="cuda").bfloat16()
    q = 3 * torch.randn(steps, *x.q.shape, device="cuda").bfloat16()
    options = test_decode_attention.options_for(x, selector, token_budget=256, dense_below=1000)

    def run(cache, wait):
        results = []
        for i in range(steps):
            cache.q.copy_(q[i])
            cache.seq_lens.add_(tokens)
            wait()
            REGISTERED.append_kv(**cache.arguments("append_kv", k=k[i], v=v[i], **bounds))
            wait()
            results.extend(REGISTERED.decode_attention(**cache.arguments("decode_attention", **options)))
            wait()
        return results

    waiting = x.clone()
    want = run(waiting, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x, lambda: None)
    graph.replay()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert_same_state(x, waiting)


def test_no_operator_waits_for_the_device():
    x = make_inputs(TINY, device="cuda", bounds_dtype="uint8")
    calls = [x.arguments("decode_attention", **test_decode_attention.options_for(x, selector)) for selector in SELECTORS]
    weights = REGISTERED.estimate_weights(**x.arguments("estimate_weights"))
    others = {
        "append_kv": x.arguments("append_kv", k=x.keys[:, :1], v=x.values[:, :1]),
        "select_pages": x.arguments("select_pages"),
        "select_tokens": x.arguments("select_tokens"),
        "estimate_weights": x.arguments("estimate_weights"),
        "prune_top_p": x.arguments("prune_top_p", weights=weights),
        "attend_sparse": x.arguments("attend_sparse"),
    }
    assert {*others, "decode_attention"} == set(backends.OPS)

    def run():
        for arguments in calls:
            REGISTERED.decode_attention(**arguments)
        for op, arguments in others.items():
            getattr(REGISTERED, op)(**arguments)

    run()  # compiles
    torch.cuda.synchronize()
    # Filling memory with NaN is no part of the operators.
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_long_unused_capacity_costs_little():
    """Cost follows the live length: a cache 64 times longer than what lives in it may not double the time.

    The two are timed in turn and their fastest replays compared, so that what else runs on the GPU slows both or neither.
    """
    graphs, calls = [], []
    for extra in (0, 8192 - 128):
        x = make_inputs(Shape((2000,) * 8, 8, 2, 128, 16, 1, torch.bfloat16), device="cuda", bounds_dtype="uint8", extra_pages=extra)
        calls.append(x.arguments("decode_attention", **test_decode_attention.options_for(x, "quest")))
        STAGES.decode_attention(**calls[-1])
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            STAGES.decode_attention(**calls[-1])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times = [[], []]
    for _ in range(50):
        for graph, samples in zip(graphs, times, strict=True):
            events[0].record()
            graph.replay()
            events[1].record()
            torch.cuda.synchronize()
            samples.append(events[0].elapsed_time(events[1]))
    short, long = map(min, times)
    assert long < 2 * short, (short, long)


@pytest.mark.sanitize
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("backend", [STAGES, REGISTERED], ids=["stages", "registered"])
def test_small_decode_steps_touch_only_their_own_memory(selector, backend):
    """With every inspection output, so that all branches store; compute-sanitizer is the judge, the oracle the witness."""
    for shape in (TINY, Shape((33, 64, 100), 6, 2, 96, 32, 2, torch.float16), Shape((65, 3), 4, 1, 128, 64, 1, torch.bfloat16)):
        x = make_inputs(shape, device="cuda", bounds_dtype="uint8")
        test_decode_attention.check(backend, x, **test_decode_attention.options_for(x, selector, dense_below=17, sink_tokens=2))
        check_append(x.clone(), backend)


@pytest.mark.sanitize
def test_small_stages_touch_only_their_own_memory():
    x = make_inputs(Shape((33, 64, 100), 6, 2, 96, 32, 2, torch.float16), device="cuda")
    check_estimate(x)
    pages, counts = random_candidates(x, 32)
    check_pruner(x, indices=pages, counts=counts, tokens_per_index=32)
    # More items than one program ranks, and rows longer than its registers.
    y = make_inputs(Shape((40000, 7), 2, 1, 64, 16, 1, torch.bfloat16), device="cuda")
    ops.select_tokens(**y.arguments("select_tokens", token_budget=100))
    check_pruner(y)
