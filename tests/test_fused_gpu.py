"""The fused Hopper kernels on a GPU: the reference's sets and values, bit-identical repeats, and what is left to the stages."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_same_state
from flat import reference
from fused_calls import assert_as_reference, extreme_call, far_below_zero, many_rows_call, observed, planned, random_call, request_of
from inputs import SHAPES, Shape, in_fp8, interleaved, make_inputs, on_device
from test_strides import check_append, check_reads

from twilight_ops import backends, launch_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not launch_plan.available(), reason="needs a Hopper GPU and the _C_cuda extension"),
]


def run_with(cluster_size: int):
    """Calls the private operator with decode_attention's arguments."""

    def run(arguments):
        out = arguments["q"].new_empty(arguments["q"].shape)
        nothing, lse = torch.ops.twilight._fused_decode_attention(**arguments, out=out, cluster_size=cluster_size)
        assert nothing.numel() == 0
        return out, lse

    return run


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(12))
def test_small_calls_are_as_the_reference(seed):
    inputs, overrides, cluster_size = random_call(seed, longest=600, device="cuda")
    assert_as_reference(inputs, overrides, run_with(cluster_size))


@pytest.mark.sanitize
@pytest.mark.parametrize("seed", range(24))
def test_calls_with_the_largest_integers_are_as_the_reference(seed):
    inputs, overrides, cluster_size = extreme_call(seed, device="cuda")
    assert_as_reference(inputs, overrides, run_with(cluster_size))


@pytest.mark.parametrize("block", range(2))
def test_calls_on_caches_in_float8_are_as_the_reference(block):
    for seed in range(100 * block, 100 + 100 * block):
        inputs, overrides, cluster_size = random_call(seed, longest=5000, device="cuda", fp8=True)
        assert_as_reference(inputs, overrides, run_with(cluster_size))


@pytest.mark.parametrize("fp8", [False, True], ids=["model", "fp8"])
def test_dense_calls_of_many_rows_are_as_the_reference(fp8):
    for seed in range(100):
        inputs, overrides, cluster_size = many_rows_call(seed, longest=5000, device="cuda", fp8=fp8)
        assert_as_reference(inputs, overrides, run_with(cluster_size))


@pytest.mark.sanitize
@pytest.mark.parametrize("fp8", [False, True], ids=["model", "fp8"])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (128, torch.bfloat16)])
@pytest.mark.parametrize("query_tokens", [1, 2, 3, 5, 8])
def test_logits_far_below_zero_are_as_the_reference(query_tokens, head_dim, dtype, fp8):
    """Of many rows a compiler once left all sums but the first eight's to start at zero."""
    inputs = far_below_zero(make_inputs(Shape((3000, 40), 8, 2, head_dim, 16, query_tokens, dtype), spread=40.0))
    inputs = on_device(in_fp8(inputs) if fp8 else inputs, "cuda")
    assert_as_reference(inputs, {"selector": "dense"}, run_with(2))


@pytest.mark.parametrize("cluster_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("query_tokens", [3, 6, 8])
def test_rows_of_several_tokens_are_those_of_one_token_at_a_time(query_tokens, cluster_size):
    """A check of drafts against dense steps of one token: the same rows up to the order in which tokens are added."""
    shape = Shape((9001, 517), 8, 2, 128, 16, query_tokens, torch.bfloat16)
    inputs = on_device(make_inputs(shape), "cuda")
    together, lse = run_with(cluster_size)(inputs.arguments("decode_attention", selector="dense"))
    for i in range(query_tokens):
        arguments = inputs.arguments("decode_attention", selector="dense")
        arguments |= {"q": inputs.q[:, i : i + 1], "seq_lens": inputs.seq_lens - (query_tokens - 1 - i)}
        alone, alone_lse = run_with(cluster_size)(arguments)
        torch.testing.assert_close(together[:, i : i + 1], alone, rtol=2**-7, atol=2**-9)
        torch.testing.assert_close(lse[:, i : i + 1], alone_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_ragged_calls_are_as_the_reference(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        inputs, overrides, cluster_size = random_call(seed, longest=5000, device="cuda")
        assert_as_reference(inputs, overrides, run_with(cluster_size))


@pytest.mark.parametrize("by_head", [True, False], ids=["by head", "by tensor"])
def test_blocks_of_all_tensors_give_the_bits_of_contiguous_ones(by_head):
    for seed in range(40):
        inputs, overrides, cluster_size = random_call(seed, longest=2000, device="cuda")
        results = []
        for x in (inputs, interleaved(inputs, by_head)):
            lists = observed(x)
            out, lse = run_with(cluster_size)(x.arguments("decode_attention", **overrides, **lists))
            results.append((out.view(torch.int16), lse.view(torch.int32), *lists.values()))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want), seed
    operators = SimpleNamespace(device="cuda", **{op: getattr(torch.ops.twilight, op).default for op in backends.OPS})
    for shape in (shape for shape in SHAPES if shape.dtype != torch.float32):
        for bounds_dtype in ("model", "uint8"):
            check_reads(operators, shape, bounds_dtype, by_head)
            check_append(operators, shape, bounds_dtype, by_head)


def fits(selector: str, tokens: int, cluster_size: int) -> bool:
    """Whether the calls below do."""
    return planned(selector, 3, tokens, 8, 2, cluster_size=cluster_size, token_budget=2048).serves


@pytest.mark.parametrize("stored", ["model", "fp8"])
@pytest.mark.parametrize("cluster_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix", "streaming"])
def test_every_cluster_size_gives_the_reference_set_twice_alike(selector, cluster_size, stored):
    longest = next(n for n in (20000, 9000) if fits(selector, n, cluster_size))
    shape = Shape((longest, 31, 4097), 8, 2, 128, 16, 1, torch.bfloat16)
    inputs = make_inputs(shape, bounds_dtype="uint8")
    inputs = on_device(in_fp8(inputs) if stored == "fp8" else inputs, "cuda")
    overrides = {"selector": selector, "token_budget": 2048, "top_p": 0.9}
    assert_as_reference(inputs, overrides, run_with(cluster_size))
    repeats = []
    for _ in range(2):
        lists = observed(inputs)
        out, lse = run_with(cluster_size)(inputs.arguments("decode_attention", **overrides, **lists))
        repeats.append((out.view(torch.int16), lse, lists["kept_indices"], lists["budget_counters"]))
    for one, other in zip(*repeats, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize("bounds_dtype", ["uint8", "model"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", ["model", "fp8"])
def test_append_kv_writes_what_the_reference_writes(stored, dtype, head_dim, bounds_dtype, tokens):
    inputs = make_inputs(Shape((300, 129, 71), 4, 2, head_dim, 16, 1, dtype), bounds_dtype=bounds_dtype)
    inputs = on_device(in_fp8(inputs) if stored == "fp8" else inputs, "cuda")
    k = torch.randn(3, tokens, 2, head_dim, device="cuda").to(dtype)
    got, want = inputs.clone(), inputs.clone()
    arguments = got.arguments("append_kv", k=k, v=k.neg())
    torch.ops.twilight._fused_append_kv(**arguments)
    reference.append_kv(**want.arguments("append_kv", k=k, v=k.neg()))
    assert_same_state(got, want)


@pytest.mark.parametrize(
    "selector, heads, head_dim, query_tokens, served",
    [
        ("full", 8, 128, 1, True),
        ("full", 16, 128, 1, False),
        ("full", 8, 96, 1, False),
        ("full", 4, 64, 2, True),
        ("full", 4, 64, 4, False),
        ("dense", 4, 64, 8, True),
        ("dense", 33, 64, 1, False),
    ],
)
def test_calls_beyond_the_kernel_are_left_to_the_stages(selector, heads, head_dim, query_tokens, served):
    inputs = on_device(make_inputs(Shape((100,), heads, 1, head_dim, 16, query_tokens, torch.bfloat16)), "cuda")
    arguments = inputs.arguments("decode_attention", selector=selector)
    plan = launch_plan.plan_of(request_of(arguments)._replace(device=launch_plan.limits_of(0)))
    assert plan.serves == served
    if not served:
        with pytest.raises(RuntimeError, match=re.escape(plan.reason)):
            run_with(0)(arguments)


def test_limits_are_the_devices():
    found = torch.cuda.get_device_properties(0)
    limits = launch_plan.limits_of(0)
    assert limits.multiprocessors == found.multi_processor_count
    assert 0 < limits.shared_per_block < found.shared_memory_per_multiprocessor
