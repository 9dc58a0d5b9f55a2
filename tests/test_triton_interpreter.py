"""The Triton kernels, run by Triton's interpreter on the CPU, against the references and the fp64 oracle.

The interpreter has to be chosen before Triton is imported, so the tests below run in a process of their own, which the first test starts.
fp16 and fp32 only: the interpreter computes bf16 matrix products wrongly, without a word.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import test_attend_sparse
    import test_custom_selector
    import test_decode_attention
    import test_decode_attention_hot
    import test_estimate_weights
    import test_extreme_integers
    import test_fp8
    import test_prune_top_p
    import test_softcap
    import test_strides
    import triton_interpreter
    from comparisons import assert_same_state, page_mean_scores, page_scores, plain_weights, token_scores
    from custom_selector import launch, page_scores_kernel
    from flat import reference
    from inputs import BY_MEANS, Shape, in_fp8, make_inputs, random_candidates
    from selection import Ranking
    from test_append_kv import blank, left_aligned

    from twilight_ops import kernels
    from twilight_ops.kernels import _rank
    from twilight_ops.kernels._launch import Launch

    triton_interpreter.repair()

    class Stages:
        """The kernels' launchers, called directly: nothing is registered for CUDA on a machine without it."""

        device = "cpu"

        def __getattr__(self, op: str):
            return kernels.stage(op)

    STAGES = Stages()
    RAGGED = Shape((0, 1, 16, 17, 45), 4, 2, 64, 16, 1, torch.float16)
    SPECULATIVE = Shape((33, 40), 3, 1, 96, 32, 3, torch.float32)
    WIDE_HEAD = Shape((70, 5), 8, 1, 128, 64, 2, torch.float16)
    SHAPES = (RAGGED, SPECULATIVE, WIDE_HEAD)
    TWO_LEVELS = {"token_budget": 5, "sink_tokens": 3, "recent_tokens": 5, "page_fraction": 0.5}
    FEW = Shape((0, 45), 2, 1, 64, 16, 1, torch.float16)
    PRUNER = ({"top_p": 0.85}, {"top_p": 0.3, "sink_tokens": 3, "recent_tokens": 9}, {"top_p": 1.0}, {"top_p": 0.9999})

else:
    SHAPES = PRUNER = ()


def run_interpreted() -> subprocess.CompletedProcess:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
def test_kernels_under_the_interpreter_agree_with_the_references():
    done = run_interpreted()
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and " passed" in summary, done.stdout[-6000:] + done.stderr[-2000:]
    print(f"interpreted: {summary}")


interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@interpreted
@every_shape
@pytest.mark.parametrize("bounds_dtype", ["model", "uint8"])
@pytest.mark.parametrize("stored", ["model", "fp8"])
def test_append_kv_writes_what_the_reference_writes(shape, stored, bounds_dtype):
    x = make_inputs(shape, bounds_dtype=bounds_dtype)
    x = in_fp8(x) if stored == "fp8" else x
    rng = torch.Generator().manual_seed(1)
    size = (len(shape.seq_lens), shape.query_tokens, shape.num_kv_heads, shape.head_dim)
    rows = [torch.randn(size, generator=rng).to(shape.dtype) for _ in range(2)]
    prompt = blank(x)
    for start, arguments in ((x, {"k": rows[0], "v": rows[1]}), (prompt, {"positions": left_aligned(x), "k": x.keys, "v": x.values})):
        got, want = start.clone(), start.clone()
        STAGES.append_kv(**got.arguments("append_kv", **arguments))
        reference.append_kv(**want.arguments("append_kv", **arguments))
        assert_same_state(got, want)


@interpreted
@every_shape
@pytest.mark.parametrize("bounds_dtype", ["model", "uint8"])
def test_select_pages_takes_what_the_oracle_takes(shape, bounds_dtype):
    x = make_inputs(shape, bounds_dtype=bounds_dtype)
    bounds, means = Ranking("select_pages", page_scores, True), Ranking("select_pages", page_mean_scores, True, BY_MEANS)
    for ranking in (bounds, means) if bounds_dtype == "model" else (bounds,):
        ranking.check_against_oracle(STAGES, x, token_budget=shape.page_size + 1)
        ranking.check_against_oracle(STAGES, x, token_budget=1, budget_fraction=0.5, sink_tokens=3, recent_tokens=20)


@interpreted
@every_shape
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "histogram"])
def test_select_tokens_takes_what_the_oracle_takes(shape, resident, monkeypatch):
    if not resident:
        # Several blocks a row.
        for name, value in {"RESIDENT": 0, "COUNT": 16, "LIST": 32}.items():
            monkeypatch.setattr(_rank, name, Launch(value, 1, 1, "small enough for these rows"))
    x = make_inputs(shape)
    ranking = Ranking("select_tokens", token_scores, False)
    ranking.check_against_oracle(STAGES, x, token_budget=20)
    ranking.check_against_oracle(STAGES, x, token_budget=7, budget_fraction=0.3, sink_tokens=3, recent_tokens=5)
    # Few enough pages and tokens for one set: the oracle's.
    fewer = ({"token_budget": shape.page_size + 1, "page_fraction": 0.1}, {"page_fraction": 0.1, "min_scored_tokens": 20})
    for options in (TWO_LEVELS, *(TWO_LEVELS | level for level in fewer)):
        got, want = STAGES.select_tokens(**x.arguments("select_tokens", **options)), x.oracle("select_tokens", **options)
        assert torch.equal(got[1], want[1]) and (got[0] != want[0]).sum() <= 2
    # Equal scores everywhere: the lowest positions.
    x.k_quant.fill_(0x55)
    x.k_scale.fill_(1.0)
    ranking.check_against_oracle(STAGES, x, exact=True, token_budget=20)


@interpreted
@every_shape
def test_estimate_weights_and_attend_sparse_match_the_oracle(shape):
    x = make_inputs(shape)
    got = STAGES.estimate_weights(**x.arguments("estimate_weights"))
    test_estimate_weights.check(x, got, x.oracle("estimate_weights"), plain_weights(x, torch.float32))
    test_attend_sparse.check(STAGES, x)
    for unit in (1, shape.page_size):
        indices, counts = random_candidates(x, unit)
        listed = {"indices": indices, "counts": counts, "tokens_per_index": unit}
        got = STAGES.estimate_weights(**x.arguments("estimate_weights", **listed))
        plain = test_estimate_weights.plain_slots(x, indices, counts, unit)
        test_estimate_weights.check(x, got, x.oracle("estimate_weights", **listed), plain)


@interpreted
@every_shape
def test_attend_sparse_reads_caches_in_float8_as_the_reference_does(shape):
    for by_token in (False, True):
        test_fp8.test_attend_sparse_matches_the_oracle_on_what_is_stored(STAGES, shape, by_token)


@interpreted
@pytest.mark.parametrize("stored", ["model", "fp8"])
@pytest.mark.parametrize("shape, softcap", zip(SHAPES, (1.0, 30.0, 50.0), strict=False))
def test_capped_logits_are_those_of_the_oracle(shape, softcap, stored):
    x = make_inputs(shape, bounds_dtype="uint8")
    test_softcap.check_stages(STAGES, in_fp8(x) if stored == "fp8" else x, softcap)


@interpreted
def test_capped_sets_are_those_of_the_oracle():
    test_softcap.check_decode(STAGES, make_inputs(RAGGED, bounds_dtype="uint8"), "full", 1.0)


@interpreted
def test_append_kv_rounds_to_float8_as_pytorch_does():
    test_fp8.test_append_kv_rounds_every_number_to_the_nearest_ties_to_even_and_keeps_nan(STAGES, torch.float16)


@interpreted
@pytest.mark.parametrize("listed", [False, True], ids=["every token", "list"])
def test_attend_sparse_lets_no_query_token_see_a_newer_broken_value(listed):
    test_attend_sparse.check_newer_broken_values(STAGES, torch.float16, listed)


@interpreted
@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix", "streaming", "given"])
def test_a_table_without_pages_keeps_nothing(selector):
    test_decode_attention.test_decode_attention_of_a_table_without_pages_keeps_nothing(STAGES, selector)


@interpreted
def test_an_empty_candidate_list_keeps_nothing():
    test_prune_top_p.test_prune_top_p_of_an_empty_candidate_list_keeps_nothing(STAGES, 0.9)
    test_attend_sparse.test_attend_sparse_gives_zeros_for_an_empty_candidate_list(STAGES)


def check_pruner(x, options):
    """Real weights, ties all along the row, and rows with a NaN."""
    weights = x.oracle("estimate_weights").float()
    for values in (weights, torch.full_like(weights, 2.0**-9), weights.masked_fill(weights > 0.1, torch.nan)):
        arguments = x.arguments("prune_top_p", weights=values, **options)
        for got, want in zip(STAGES.prune_top_p(**arguments), reference.prune_top_p(**arguments), strict=True):
            assert torch.equal(got, want)


@interpreted
@pytest.mark.parametrize("options", PRUNER, ids=str)
def test_prune_top_p_keeps_bit_for_bit_what_the_reference_keeps(options):
    for shape in (FEW, SPECULATIVE) if options["top_p"] == 0.85 else (FEW,):
        check_pruner(make_inputs(shape), options)


@interpreted
def test_prune_top_p_walks_rows_that_no_program_holds(monkeypatch):
    # The package's attribute of that name is the function.
    pruner = importlib.import_module("twilight_ops.kernels.prune_top_p")
    for name in ("RESIDENT", "SHORT", "LOOPED"):
        monkeypatch.setattr(pruner, name, Launch(32, 1, 1, "several tiles a row"))
    monkeypatch.setattr(pruner, "BISECT", Launch(32, 1, 1, "several tiles a list"))
    check_pruner(make_inputs(FEW), PRUNER[3])


@interpreted
@pytest.mark.parametrize("seed", range(6))
def test_any_integer_gives_the_result_of_exact_arithmetic(seed):
    for kind in test_extreme_integers.RANKINGS:
        test_extreme_integers.check_selection(STAGES, kind, seed)
    test_extreme_integers.check_pruner(STAGES, seed)
    test_extreme_integers.check_lists(STAGES, seed)
    test_extreme_integers.check_decode(STAGES, ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming")[seed], seed)


@interpreted
def test_append_kv_writes_nothing_at_positions_that_no_table_holds():
    for length, positions in test_extreme_integers.NOWHERE:
        test_extreme_integers.check_append_nowhere(STAGES, length, positions)


@interpreted
@every_shape
@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix", "streaming", "given"])
def test_decode_attention_keeps_the_oracles_set_and_attends_to_it(shape, selector):
    x = make_inputs(shape, bounds_dtype="uint8")
    options = test_decode_attention.options_for(x, selector, token_budget=20, dense_below=16, sink_tokens=2, recent_tokens=3)
    got = test_decode_attention.Decoded(STAGES, x, **options)
    test_decode_attention.check(STAGES, x, **options)
    # The counters, against the reference's.
    counters = torch.zeros_like(got.counters)
    reference.decode_attention(**{**got.arguments, "budget_counters": counters})
    mass = 4
    assert torch.equal(got.counters[:, :mass], counters[:, :mass]) and torch.equal(got.counters[:, mass + 1 :], counters[:, mass + 1 :])
    assert (got.counters[:, mass] - counters[:, mass]).abs().max() <= 2 * len(shape.seq_lens)


@interpreted
@pytest.mark.parametrize("by_head", [True, False])
def test_blocks_of_all_tensors_give_the_bits_of_contiguous_ones(by_head):
    for group, selectors in (2, ("quest", "two levels")), (8, ("full",)):
        shape = Shape((45,), 2 * group, 2, 64, 16, 1, torch.float16)
        test_strides.check_reads(STAGES, shape, "uint8", by_head, selectors)
    test_strides.check_append(STAGES, shape, "uint8", by_head)


@interpreted
@pytest.mark.parametrize("case", range(4) if INTERPRETED else ())
def test_copies_of_rows_are_those_of_the_reference(case):
    test_decode_attention_hot.check_steps(STAGES, *test_decode_attention_hot.CASES[case], steps=3)


@interpreted
def test_the_kernel_of_the_example_selector_computes_what_its_pytorch_branch_does():
    test_custom_selector.check_launch(partial(launch, page_scores_kernel))
