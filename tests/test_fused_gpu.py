"""The fused Hopper kernels on a GPU: the reference's sets and values, bit-identical repeats, and what is left to the stages."""

from __future__ import annotations

import pytest
import torch
from flat import reference
from fused_calls import assert_as_reference, extreme_call, observed, random_call
from inputs import Shape, make_inputs, on_device

from twilight_ops.kernels import fused, native

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not fused.available(), reason="needs a Hopper GPU and the _C_cuda extension"),
]


def run_with(cluster_size: int):
    """Calls the private operator with decode_attention's arguments."""
    return lambda arguments: native.run_fused(native.DECODE_ATTENTION.values((), dict(arguments)), cluster_size)


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


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_ragged_calls_are_as_the_reference(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        inputs, overrides, cluster_size = random_call(seed, longest=5000, device="cuda")
        assert_as_reference(inputs, overrides, run_with(cluster_size))


def shared_bytes(selector: str, tokens: int, cluster_size: int) -> int:
    """Of a block of the calls below, however it shares candidates."""
    geometry = (128, 4, 16, -(-tokens // 16), 2048 // 16 if selector == "quest" else 2048, 0, cluster_size)
    return max(fused.shared_bytes(selector, selector != "dense", *geometry, evens_out) for evens_out in (False, True))


@pytest.mark.parametrize("cluster_size", fused.CLUSTER_SIZES)
@pytest.mark.parametrize("selector", fused.SELECTORS)
def test_every_cluster_size_gives_the_reference_set_twice_alike(selector, cluster_size):
    longest = next(n for n in (20000, 9000) if shared_bytes(selector, n, cluster_size) <= fused.SHARED_LIMIT)
    shape = Shape((longest, 31, 4097), 8, 2, 128, 16, 1, torch.bfloat16)
    inputs = on_device(make_inputs(shape, bounds_dtype="uint8"), "cuda")
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
def test_append_kv_writes_what_the_reference_writes(dtype, head_dim, bounds_dtype, tokens):
    inputs = on_device(make_inputs(Shape((300, 129, 71), 4, 2, head_dim, 16, 1, dtype), bounds_dtype=bounds_dtype), "cuda")
    k = torch.randn(3, tokens, 2, head_dim, device="cuda").to(dtype)
    got, want = inputs.clone(), inputs.clone()
    arguments = got.arguments("append_kv", k=k, v=k.neg())
    torch.ops.twilight._fused_append_kv(**arguments)
    reference.append_kv(**want.arguments("append_kv", k=k, v=k.neg()))
    for name, tensor in want.tensors().items():
        torch.testing.assert_close(getattr(got, name), tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "heads, head_dim, query_tokens, served",
    [(8, 128, 1, True), (16, 128, 1, False), (8, 96, 1, False), (4, 64, 2, True), (4, 64, 4, False)],
)
def test_calls_beyond_the_kernel_are_left_to_the_stages(heads, head_dim, query_tokens, served):
    inputs = on_device(make_inputs(Shape((100,), heads, 1, head_dim, 16, query_tokens, torch.bfloat16)), "cuda")
    size = fused.fused_supports(inputs.q, inputs.k_cache, None, inputs.page_table, "full", 64, 0.0, 0.9, 0, 0, 0, None)
    assert (size > 0) == served
