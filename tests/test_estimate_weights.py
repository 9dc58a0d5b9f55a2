"""twilight::estimate_weights: softmax over the candidates of q . dequant(K)."""

import math

import pytest
import torch
from comparisons import assert_close_to_oracle, dot_rounding, listed_set, plain_weights
from inputs import SHAPES, Shape, break_key, make_inputs, random_candidates

pytestmark = pytest.mark.usefixtures("poisoned_empties")
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)


def check(x, got, want, plain):
    """Weights are at most 1, so the rounding of a logit is the relative, and a bound on the absolute, rounding of a weight."""
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert_close_to_oracle(got, want, plain, "weights", slack=dot_rounding(x))


def slots_of(x, indices, unit: int):
    """Positions [B, Hkv, slots] of a list's slots, pads clamped to 0."""
    offsets = torch.arange(unit, device=x.q.device)
    return (indices.long().clamp(min=0)[..., None] * unit + offsets).flatten(-2)


def plain_slots(x, indices, counts, unit: int, softcap=None):
    """`plain_weights` in fp32 in the slot layout of a candidate list."""
    slots = slots_of(x, indices, unit)
    used = (torch.arange(indices.shape[-1], device=x.q.device) < counts[..., None]).repeat_interleave(unit, -1)
    member = listed_set(indices, counts, x.max_tokens // unit).repeat_interleave(unit, -1)
    weights = plain_weights(x, torch.float32, member, softcap)
    per_head = slots.repeat_interleave(x.group_size, 1)[:, None].expand(*weights.shape[:3], -1)
    return weights.gather(-1, per_head).masked_fill(~used.repeat_interleave(x.group_size, 1)[:, None], 0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimate_weights_of_every_token_match_the_oracle(backend, shape):
    x = make_inputs(shape, device=backend.device)
    got = backend.estimate_weights(**x.arguments("estimate_weights"))
    check(x, got, x.oracle("estimate_weights"), plain_weights(x, torch.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_page", [False, True], ids=["tokens", "pages"])
def test_estimate_weights_of_a_list_match_the_oracle(backend, shape, by_page):
    x = make_inputs(shape, device=backend.device)
    unit = x.page_size if by_page else 1
    indices, counts = random_candidates(x, unit)
    listed = {"indices": indices, "counts": counts, "tokens_per_index": unit}
    got = backend.estimate_weights(**x.arguments("estimate_weights", **listed))
    check(x, got, x.oracle("estimate_weights", **listed), plain_slots(x, indices, counts, unit))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_estimate_weights_rows_sum_to_one_or_are_empty(backend, shape):
    x = make_inputs(shape, device=backend.device)
    total = backend.estimate_weights(**x.arguments("estimate_weights")).double().sum(-1)
    position = x.seq_lens[:, None] - x.q.shape[1] + torch.arange(x.q.shape[1], device=x.q.device)
    expected = (position >= 0).double()[..., None].expand_as(total)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-5)


def test_estimate_weights_hide_tokens_newer_than_the_query_token(backend):
    x = make_inputs(Shape((50,), 2, 1, 64, 16, 8, torch.float32), device=backend.device)
    weights = backend.estimate_weights(**x.arguments("estimate_weights"))
    for t in range(8):
        assert (weights[0, t, :, : 43 + t] > 0).all() and (weights[0, t, :, 43 + t :] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_estimate_weights_are_nan_in_live_slots_of_a_row_with_a_broken_key(backend, value):
    x = make_inputs(SMALL, device=backend.device)
    break_key(x, 0, 77, value)
    weights = backend.estimate_weights(**x.arguments("estimate_weights"))
    assert weights[0, :, :, :300].isnan().all() and (weights[0, :, :, 300:] == 0).all()
    assert weights[1].isfinite().all()
    chosen = torch.tensor([[[3, 9, 80]] * 3, [[1, 2, -1]] * 3], dtype=torch.int32, device=backend.device)
    counts = torch.tensor([[3] * 3, [2] * 3], dtype=torch.int32, device=backend.device)
    without = backend.estimate_weights(**x.arguments("estimate_weights", indices=chosen, counts=counts))
    assert without.isfinite().all(), "a broken key outside the candidates must not matter"


def test_estimate_weights_are_nan_only_for_the_head_whose_query_is_nan(backend):
    x = make_inputs(SMALL, device=backend.device)
    x.q[0, 0, 2, 7] = math.nan
    weights = backend.estimate_weights(**x.arguments("estimate_weights"))
    assert weights[0, 0, 2, :300].isnan().all()
    x.q[0, 0, 2] = 0.0
    others = [0, 1, 3, 4, 5]
    check(x, weights[:, :, others].contiguous(), x.oracle("estimate_weights")[:, :, others], plain_weights(x, torch.float32)[:, :, others])


@pytest.mark.parametrize("seq_len", [0, -3])
def test_estimate_weights_are_zero_for_empty_sequences(backend, seq_len):
    x = make_inputs(SMALL, device=backend.device)
    x.seq_lens.fill_(seq_len)
    assert (backend.estimate_weights(**x.arguments("estimate_weights")) == 0).all()


def test_estimate_weights_survive_logits_far_beyond_the_range_of_exp(backend):
    x = make_inputs(SMALL, device=backend.device, spread=2000.0)
    got = backend.estimate_weights(**x.arguments("estimate_weights"))
    check(x, got, x.oracle("estimate_weights"), plain_weights(x, torch.float32))


def test_estimate_weights_are_bitwise_the_same_for_any_number_of_threads(backend, threads):
    x = make_inputs(Shape((3000, 100), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device)
    threads(1)
    alone = backend.estimate_weights(**x.arguments("estimate_weights"))
    threads(2)
    for _ in range(2):
        again = backend.estimate_weights(**x.arguments("estimate_weights"))
        if backend.name == "reference":  # PyTorch's own matrix product may split its sums by thread
            torch.testing.assert_close(again, alone, rtol=1e-4, atol=1e-9)
        else:
            assert torch.equal(again, alone)


def test_estimate_weights_of_an_empty_candidate_list_have_no_slots(backend):
    x = make_inputs(SMALL, device=backend.device)
    indices = torch.empty(2, 3, 0, dtype=torch.int32, device=backend.device)
    counts = torch.zeros(2, 3, dtype=torch.int32, device=backend.device)
    for unit in (1, x.page_size):
        weights = backend.estimate_weights(**x.arguments("estimate_weights", indices=indices, counts=counts, tokens_per_index=unit))
        assert weights.shape == (2, 1, 6, 0) and weights.dtype == torch.float32
