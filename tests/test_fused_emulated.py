"""The fused Hopper kernel, compiled for the CPU and run thread by thread under tests/emulator: every barrier and shuffle checked."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comparisons import assert_same_state
from flat import reference
from fused_calls import (
    FP8_DTYPES,
    assert_as_reference,
    extreme_call,
    far_below_zero,
    many_rows_call,
    needs_plan,
    observed,
    random_call,
    request_of,
)
from inputs import CACHE_TENSORS, Shape, in_fp8, interleaved, make_inputs, strided
from test_strides import check_append

from twilight_ops import launch_plan
from twilight_ops.arguments import FP8, Scales

SOURCE = Path(__file__).parent / "emulator" / "fused_decode.cpp"
COMPILER = shutil.which("g++")
TENSORS = (
    "k_cache v_cache k_quant k_scale page_bounds bounds_scale channel_order prefix_channels page_table seq_lens head_token_budget "
    "head_top_p"
).split()
OPTIONAL = ("budget_counters", "kept_indices", "kept_counts", "page_means", "means_scale")

APPENDED = (
    "k_cache v_cache k_quant k_scale page_bounds bounds_scale channel_order prefix_channels k_center page_table seq_lens positions "
    "page_means means_scale k_descale v_descale k_shift"
).split()


class Region(ctypes.Structure):
    """The struct of csrc/region.h."""

    _fields_ = [("data", ctypes.c_void_p), ("page_stride", ctypes.c_uint32), ("head_stride", ctypes.c_uint32)]


def kinds(names) -> list[tuple[str, type]]:
    return [(name, Region if name in CACHE_TENSORS else ctypes.c_void_p) for name in names]


def point(structure: ctypes.Structure, names, tensors: dict) -> None:
    """Sets these fields; of no tensor to null."""
    for name in names:
        tensor = tensors.get(name)
        if tensor is not None and name in CACHE_TENSORS:
            strides = (stride * tensor.itemsize for stride in tensor.stride()[:2])
            setattr(structure, name, Region(tensor.data_ptr(), *strides))
        elif tensor is not None:
            setattr(structure, name, tensor.data_ptr())


class FusedTensors(ctypes.Structure):
    """The struct of csrc/sm90/params.cuh."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        *[(f"q_stride_{name}", ctypes.c_int64) for name in ("batch", "token", "head")],
        *kinds(TENSORS),
        ("top_p_stride_batch", ctypes.c_int),
        ("top_p_stride_head", ctypes.c_int),
        *kinds((*OPTIONAL, "out", "lse", *Scales._fields)),
        ("top_p", ctypes.c_double),
        ("sm_scale", ctypes.c_float),
        ("in_host_memory", ctypes.c_int),
    ]


class AppendParams(ctypes.Structure):
    """The struct of csrc/sm90/append_kv.cuh."""

    _fields_ = [
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_strides", ctypes.c_int64 * 3),
        ("v_strides", ctypes.c_int64 * 3),
        *kinds(APPENDED),
        *[(name, ctypes.c_int) for name in ("tokens", "kv_heads", "page_size", "max_pages", "num_pages")],
    ]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no g++ to compile the kernel for the CPU")
    library = tmp_path_factory.mktemp("emulator") / "fused_decode.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-I", str(SOURCE.parent), str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    assert loaded.fused_tensors_bytes() == ctypes.sizeof(FusedTensors)
    assert loaded.append_params_bytes() == ctypes.sizeof(AppendParams)
    return loaded


def emulate(emulator, a: dict, cluster_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """decode_attention's arguments in, (out, lse) out."""
    q = a["q"]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    lse = torch.full(q.shape[:-1], float("nan"))
    p = FusedTensors(q=q.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(), top_p=a["top_p"], sm_scale=a["sm_scale"])
    p.q_stride_batch, p.q_stride_token, p.q_stride_head = q.stride()[:3]
    point(p, (*TENSORS, *OPTIONAL, *Scales._fields), a)
    p.in_host_memory = seed % 2  # another way to load the same
    per_head = a.get("head_top_p")
    if per_head is not None:
        p.top_p_stride_batch, p.top_p_stride_head = (0 if n == 1 else s for n, s in zip(per_head.shape, per_head.stride(), strict=True))
    request = request_of(a)._replace(cluster_size=cluster_size)
    structure = launch_plan.PlanLibrary(emulator).structure(request)
    shared = emulator.emulate_fused_decode(
        ctypes.byref(p), ctypes.byref(structure), q.dtype == torch.float16, a["k_cache"].dtype == FP8, seed
    )
    assert shared > 0, "the plan refuses the call"
    return out, lse


def emulate_append(emulator, a: dict, seed: int) -> None:
    """append_kv's arguments in; writes the cache tensors."""
    k, v = a["k"], a["v"]
    p = AppendParams(k=k.data_ptr(), v=v.data_ptr(), tokens=k.shape[1], kv_heads=k.shape[2])
    p.k_strides[:], p.v_strides[:] = k.stride()[:3], v.stride()[:3]
    point(p, APPENDED, a)
    p.page_size, p.max_pages, p.num_pages = a["k_cache"].shape[2], a["page_table"].shape[1], a["k_cache"].shape[0]
    emulator.emulate_fused_append(ctypes.byref(p), k.shape[0], k.shape[3], k.dtype == torch.float16, a["k_cache"].dtype == FP8, seed)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 150])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float16), (96, torch.bfloat16), (128, torch.bfloat16), (256, torch.float16)])
@pytest.mark.parametrize("bounds_dtype", ["uint8", "model"])
@pytest.mark.parametrize("stored", ["model", "fp8"])
def test_fused_append_writes_what_the_reference_writes(emulator, stored, bounds_dtype, head_dim, dtype, tokens, with_positions):
    inputs = make_inputs(Shape((300, 129, 71), 4, 2, head_dim, 16, 1, dtype), bounds_dtype=bounds_dtype)
    inputs = in_fp8(inputs) if stored == "fp8" else inputs
    values = torch.randn(3, tokens, 2, 2, head_dim, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    k, v = strided(values[:, :, 0]), strided(values[:, :, 1])
    k[1, 0, 1, 3] = math.nan
    if tokens > 1:
        k[0, 1, 0, 7] = math.inf
    positions = None
    if with_positions:
        positions = (
            (torch.arange(tokens) * 2 - 1).expand(3, -1).clamp(max=400).int().contiguous()
        )  # every other slot; -1 and too far: skipped
        positions = positions.masked_fill(positions >= 299, -1)
    got, want = inputs.clone(), inputs.clone()
    emulate_append(emulator, got.arguments("append_kv", k=k, v=v, positions=positions), seed=tokens)
    reference.append_kv(**want.arguments("append_kv", k=k, v=v, positions=positions))
    assert_same_state(got, want)


@pytest.mark.parametrize("by_head", [True, False], ids=["by head", "by tensor"])
@pytest.mark.parametrize("bounds_dtype", ["uint8", "model"])
def test_fused_append_writes_blocks_of_all_tensors(emulator, bounds_dtype, by_head):
    backend = SimpleNamespace(device="cpu", append_kv=lambda **arguments: emulate_append(emulator, arguments, seed=1))
    check_append(backend, Shape((40, 17), 4, 2, 64, 16, 2, torch.float16), bounds_dtype, by_head)


def check(emulator, inputs, overrides: dict, cluster_size: int, seed: int) -> None:
    assert_as_reference(inputs, overrides, lambda a: emulate(emulator, a, cluster_size, seed))


@pytest.mark.parametrize("seed", range(24))
def test_fused_kernel_keeps_the_reference_sets_and_values(emulator, seed):
    inputs, overrides, cluster_size = random_call(seed)
    check(emulator, inputs, overrides, cluster_size, seed)


@pytest.mark.parametrize("seed", range(24))
def test_fused_kernel_on_float8_keeps_the_reference_sets_and_values(emulator, seed):
    inputs, overrides, cluster_size = random_call(seed, fp8=True)
    check(emulator, inputs, overrides, cluster_size, seed)


@pytest.mark.parametrize("fp8", [False, True], ids=["model", "fp8"])
@pytest.mark.parametrize("seed", range(16))
def test_dense_calls_of_many_rows_give_the_reference_values(emulator, seed, fp8):
    inputs, overrides, cluster_size = many_rows_call(seed, fp8=fp8)
    check(emulator, inputs, overrides, cluster_size, seed)


@pytest.mark.parametrize("query_tokens", [1, 3, 5, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_far_below_zero_give_the_reference_values(emulator, head_dim, query_tokens):
    inputs = far_below_zero(make_inputs(Shape((300, 40), 4, 1, head_dim, 16, query_tokens, torch.bfloat16), spread=40.0))
    check(emulator, inputs, {"selector": "dense"}, 2, seed=1)


@pytest.mark.parametrize("head_dim, dtype", FP8_DTYPES.items())
@pytest.mark.parametrize("cluster_size", [1, 4])
@pytest.mark.parametrize("group", [1, 3, 8, 32])
def test_dense_rows_of_float8_are_streamed_as_the_reference_reads_them(emulator, group, cluster_size, head_dim, dtype):
    """More tiles than a warp holds at a time, and rows that end inside one."""
    inputs = in_fp8(make_inputs(Shape((1900, 37), group * 2, 2, head_dim, 32, 1, dtype), bounds_dtype="uint8"))
    check(emulator, inputs, {"selector": "dense"}, cluster_size, seed=group)


@pytest.mark.parametrize("seed", range(16))
def test_the_largest_integers_give_the_reference_sets_and_values(emulator, seed):
    inputs, overrides, cluster_size = extreme_call(seed)
    check(emulator, inputs, overrides, cluster_size, seed)


PRUNED = {"token_budget": 300, "top_p": 0.999}
TWO_LEVELS = {"selector": "shadow_prefix", "page_fraction": 0.5}


@pytest.mark.parametrize("selector", ["full", "shadow_prefix", "two levels", "quest", "page_mean"])
@pytest.mark.parametrize("group", [1, 4])
def test_of_equal_scores_the_lowest_positions_are_taken_and_equal_weights_stay_together(emulator, selector, group):
    inputs = make_inputs(Shape((1500,), group, 1, 64, 16, 1, torch.bfloat16), spread=0.0, bounds_dtype="uint8")
    check(emulator, inputs, {**PRUNED, **(TWO_LEVELS if selector == "two levels" else {"selector": selector})}, 2, seed=1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group, kv_heads", [(1, 1), (3, 2), (8, 1)])
@pytest.mark.parametrize("cluster_size", [1, 4])
def test_page_means_give_the_reference_sets_and_values(emulator, head_dim, group, kv_heads, cluster_size):
    """One, four and eight padded rows, shares of a few pages and of several steps of a warp."""
    shape = Shape((1031, 5), group * kv_heads, kv_heads, head_dim, 16, 1, torch.bfloat16)
    options = {"selector": "page_mean", "token_budget": 200, "top_p": 0.95, "sink_tokens": 16, "recent_tokens": 20}
    check(emulator, make_inputs(shape, seed=group, bounds_dtype="uint8"), options, cluster_size, seed=head_dim)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group, kv_heads, page_size", [(1, 3, 16), (3, 2, 64), (8, 1, 32)])
@pytest.mark.parametrize("cluster_size", [1, 4])
@pytest.mark.parametrize("level", [(0.5, 0), (0.1, 0), (0.1, 600)])
def test_two_levels_give_the_reference_sets_and_values(emulator, head_dim, group, kv_heads, page_size, cluster_size, level):
    """Prefixes of half a row, of 8 channels and of whole rows; shares of several steps of a warp, of a page and of none."""
    shape = Shape((2531, 301, 5), group * kv_heads, kv_heads, head_dim, page_size, 1, torch.bfloat16)
    options = {"selector": "shadow_prefix", "token_budget": 40, "budget_fraction": 1 / 7, "sink_tokens": 16, "recent_tokens": 20}
    options |= {"page_fraction": level[0], "min_scored_tokens": level[1], "top_p": 0.95}
    check(emulator, make_inputs(shape, seed=group, bounds_dtype="uint8"), options, cluster_size, seed=head_dim)


@pytest.mark.parametrize("group, head_dim", [(1, 64), (4, 128)])
@pytest.mark.parametrize("cluster_size", [1, 4])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_window_gives_the_reference_sets_and_values(emulator, group, head_dim, cluster_size, top_p):
    shape = Shape((1031, 199, 5), group, 1, head_dim, 16, 1, torch.bfloat16)
    options = {"selector": "streaming", "token_budget": 200, "budget_fraction": 0.3, "top_p": top_p, "sink_tokens": 6}
    check(emulator, make_inputs(shape, seed=group, bounds_dtype="uint8"), options, cluster_size, seed=head_dim)


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0])
def test_a_crowded_bin_gives_the_same_candidates(emulator, spread):
    """Many scores within a level of each other: whole blocks' items in the bin in which the budget ends."""
    inputs = make_inputs(Shape((5000,), 4, 1, 64, 16, 1, torch.bfloat16), spread=spread, bounds_dtype="uint8")
    check(emulator, inputs, {"selector": "shadow_prefix", "token_budget": 900, "top_p": 0.9}, 4, seed=2)


@pytest.mark.parametrize("page_fraction", [1.0, 0.5])
@pytest.mark.parametrize("group", [1, 4])
def test_logits_far_below_all_others_change_nothing(emulator, group, page_fraction):
    """As heads of real models have them: thousands of octaves below the rest."""
    inputs = make_inputs(Shape((1500, 70), group, 1, 64, 16, 1, torch.bfloat16), bounds_dtype="uint8")
    inputs.q.abs_()
    inputs.k_scale[:, :, ::3, 1] = -300.0
    check(emulator, inputs, {**PRUNED, "selector": "shadow_prefix", "token_budget": 90, "page_fraction": page_fraction}, 4, seed=2)


def test_many_weights_that_can_decide_give_the_same_set(emulator):
    inputs = make_inputs(Shape((6001,), 4, 1, 64, 16, 1, torch.bfloat16), spread=0.3, bounds_dtype="uint8")
    check(emulator, inputs, {**PRUNED, "selector": "full"}, 4, seed=2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("selector", ["dense", "full", "shadow_prefix", "two levels", "quest", "page_mean"])
def test_a_broken_query_ends_and_gives_nan(emulator, selector, value):
    inputs = make_inputs(Shape((700,), 1, 1, 64, 16, 1, torch.bfloat16), bounds_dtype="uint8")
    inputs.q[0, 0, 0, 5] = value
    asked = TWO_LEVELS if selector == "two levels" else {"selector": selector}
    arguments = inputs.arguments("decode_attention", token_budget=64, top_p=0.9, **asked, **observed(inputs))
    out, _ = emulate(emulator, arguments, 2, seed=3)
    assert out.isnan().all()


def test_the_schedule_of_threads_changes_no_bit(emulator):
    inputs, overrides, _ = random_call(5)
    results = []
    for schedule in (1, 2):
        lists = observed(inputs)
        out, lse = emulate(emulator, inputs.arguments("decode_attention", **overrides, **lists), 4, schedule)
        results.append((out.view(torch.int16), lse.view(torch.int32), lists["kept_indices"], lists["budget_counters"]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("by_head", [True, False], ids=["by head", "by tensor"])
@pytest.mark.parametrize("seed", range(16))
def test_blocks_of_all_tensors_give_the_bits_of_contiguous_ones(emulator, seed, by_head):
    inputs, overrides, cluster_size = random_call(seed)
    results = []
    for x in (inputs, interleaved(inputs, by_head)):
        lists = observed(x)
        out, lse = emulate(emulator, x.arguments("decode_attention", **overrides, **lists), cluster_size, seed)
        results.append((out.view(torch.int16), lse.view(torch.int32), *lists.values()))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@needs_plan
@pytest.mark.parametrize("seed", range(12))
def test_python_and_the_kernels_host_code_plan_alike(emulator, seed):
    inputs, overrides, cluster_size = random_call(seed)
    arguments = inputs.arguments("decode_attention", **overrides)
    chosen = request_of(arguments)
    for request in (chosen, chosen._replace(cluster_size=cluster_size)):
        assert launch_plan.PlanLibrary(emulator).plan(request) == launch_plan.plan_of(request)
