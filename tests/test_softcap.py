"""Soft-capped logits, softcap * tanh(x / softcap): in estimates and in attention, in every backend."""

import pytest
import test_decode_attention
import test_estimate_weights
import torch
from comparisons import assert_attention_close, plain_logits, plain_weights, visible_mask
from flat import reference
from inputs import SHAPES, Shape, break_key, in_fp8, make_inputs, random_candidates
from test_decode_attention import Decoded, options_for

pytestmark = pytest.mark.usefixtures("poisoned_empties")
CAPS = (1.0, 30.0, 50.0)
FEW = (SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[6])
SELECTORS = ("dense", "full", "quest", "page_mean", "shadow_prefix", "streaming", "given")


def lists(x):
    """Every token, some tokens, some pages."""
    yield {}
    for unit in (1, x.page_size):
        indices, counts = random_candidates(x, unit)
        yield {"indices": indices, "counts": counts, "tokens_per_index": unit}


def check_stages(backend, x, softcap):
    for listed in lists(x):
        named = {"softcap": softcap, **listed}
        arguments = x.arguments("attend_sparse", **named)
        assert_attention_close(
            x, backend.attend_sparse(**arguments), x.oracle("attend_sparse", **named), reference.attend_sparse(**arguments)
        )
        got, want = backend.estimate_weights(**x.arguments("estimate_weights", **named)), x.oracle("estimate_weights", **named)
        plain = plain_weights(x, torch.float32, softcap=softcap)
        if listed:
            plain = test_estimate_weights.plain_slots(x, *listed.values(), softcap)
        test_estimate_weights.check(x, got, want, plain)


def check_decode(backend, x, selector, softcap):
    """The kept set and the attention to it are the oracle's, by the rounding of weights near p; the counters are the reference's."""
    options = options_for(x, selector, token_budget=20, dense_below=16, sink_tokens=2, recent_tokens=3, softcap=softcap)
    got = test_decode_attention.check(backend, x, **options)
    counters = torch.zeros_like(got.counters)
    reference.decode_attention(**{**got.arguments, "budget_counters": counters})
    assert torch.equal(got.counters[:, :3], counters[:, :3])


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("shape", FEW, ids=str)
@pytest.mark.parametrize("stored", ["model", "fp8"])
def test_softcap_attention_and_estimates_are_those_of_the_oracle(backend, stored, shape, softcap):
    """The shift of a cache in float8 and the centre of a shadow cancel out of every weight, but not out of one whose logit is capped."""
    x = make_inputs(shape, device=backend.device)
    x = in_fp8(x) if stored == "fp8" else x
    check_stages(backend, x, softcap)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_softcap_kept_sets_are_those_of_the_oracle(backend, selector, softcap):
    for shape in FEW[1:3]:
        check_decode(backend, make_inputs(shape, device=backend.device, bounds_dtype="uint8"), selector, softcap)


@pytest.mark.parametrize("softcap", CAPS)
def test_softcap_the_reference_is_attention_as_gemma_2_computes_it(softcap):
    x = make_inputs(SHAPES[4])
    mask = visible_mask(x)
    logits = plain_logits(x, x.keys, torch.float64, softcap).masked_fill(~mask, -torch.inf)
    values = x.values.double().nan_to_num(0.0)
    padded = values.new_zeros(len(x.seq_lens), x.max_tokens, *values.shape[2:])
    padded[:, : values.shape[1]] = values
    want = torch.einsum("bthn,bnhd->bthd", logits.softmax(-1).nan_to_num(0.0), padded.repeat_interleave(x.group_size, 2))
    out, lse = x.oracle("attend_sparse", softcap=softcap)
    assert (out - want).abs().max() < 1e-12
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_softcap_the_same_tokens_stay_in_every_backend(backend):
    """Weights are far from p and from the edges of bins here, so that no rounding decides."""
    x = make_inputs(Shape((300, 40), 6, 3, 64, 16, 1, torch.float32), device=backend.device)
    for softcap in CAPS:
        for top_p in (0.3, 0.5, 0.9):
            options = {"selector": "full", "top_p": top_p, "sink_tokens": 4, "recent_tokens": 8, "softcap": softcap}
            got = Decoded(backend, x, **options)
            kept = Decoded(reference, x, **options)
            assert torch.equal(got.indices, kept.indices) and torch.equal(got.counts, kept.counts)


def test_softcap_keeps_other_tokens_than_attention_without_it(backend):
    """A cap of 1 makes weights alike: p takes many more of them."""
    x = make_inputs(Shape((300,), 2, 1, 64, 16, 1, torch.float32), device=backend.device)
    counts = [int(Decoded(backend, x, selector="full", top_p=0.5, softcap=cap).counts[0, 0]) for cap in (1.0, 30.0, None)]
    assert counts[0] > 5 * counts[1] > 5 * counts[2] > 0 or counts[0] > 100 > counts[1] >= counts[2]


def test_softcap_huge_is_none_and_tiny_is_a_mean(backend):
    x = make_inputs(Shape((300, 40), 6, 3, 64, 16, 1, torch.float32), device=backend.device)
    plain = backend.attend_sparse(**x.arguments("attend_sparse"))
    for got, want in zip(backend.attend_sparse(**x.arguments("attend_sparse", softcap=1e30)), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    out, lse = backend.attend_sparse(**x.arguments("attend_sparse", softcap=1e-30))
    means = torch.stack([x.values[b, :n].float().mean(0) for b, n in enumerate((300, 40))]).repeat_interleave(2, 1)
    torch.testing.assert_close(out[:, 0], means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[:, 0].exp(), torch.tensor([300.0, 40.0], device=lse.device)[:, None].expand(2, 6), rtol=1e-4, atol=0)


def test_softcap_an_infinite_logit_is_the_cap_and_nan_stays_nan(backend):
    x = make_inputs(Shape((300, 40), 2, 1, 64, 16, 1, torch.float32), device=backend.device)
    break_key(x, 0, 77, torch.inf)
    x.q[0, ..., 5] = 1.0
    x.q[1, 0, 0, 5] = torch.nan
    out, lse = backend.attend_sparse(**x.arguments("attend_sparse", softcap=30.0))
    want = x.oracle("attend_sparse", softcap=30.0)
    assert out[0].isfinite().all() and not backend.attend_sparse(**x.arguments("attend_sparse"))[0][0].isfinite().all()
    torch.testing.assert_close((out[0].double(), lse[0].double()), (want[0][0], want[1][0].double()), rtol=1e-5, atol=1e-5)
    assert out[1, 0, 0].isnan().all() and lse[1, 0, 0].isnan() and out[1, 0, 1].isfinite().all()


@pytest.mark.parametrize("op", ["attend_sparse", "estimate_weights", "decode_attention"])
def test_softcap_calls_without_the_argument_are_what_they_were(backend, op):
    """By position too, as exported programs call: the argument came last, with a default."""
    x = make_inputs(SHAPES[5], device=backend.device)
    schema = getattr(torch.ops.twilight, op).default._schema
    assert schema.arguments[-1].name == "softcap" and schema.arguments[-1].default_value is None
    named = x.arguments(op)
    required = [named[a.name] for a in schema.arguments if not a.has_default_value()]
    optional = {a.name: named[a.name] for a in schema.arguments if a.has_default_value() and a.name in named}
    before = getattr(backend, op)(*required, **optional)
    after = getattr(backend, op)(**named, softcap=None)
    for a, b in zip(*((r,) if torch.is_tensor(r) else r for r in (before, after)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
