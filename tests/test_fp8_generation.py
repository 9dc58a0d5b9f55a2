"""Models on a TwilightCache in float8_e4m3fn: dense, pruned, in chunks, over turns and with drafts."""

import pytest
import torch

pytest.importorskip("transformers")

from test_lossless import make_model, prompts  # noqa: E402

from twilight_ops import Full, SparQ, Tidal, TwilightConfig  # noqa: E402
from twilight_ops.integration import Decoder, LosslessDecoder, Speculation, TwilightCache  # noqa: E402
from twilight_ops.selectors._paged import read_keys  # noqa: E402

FP8 = {"kv_cache_dtype": "fp8"}
DENSE = TwilightConfig(Full(), dense_layers=2, **FP8)
PRUNED = TwilightConfig(Full(), top_p=0.6, dense_below=0, sink_tokens=1, recent_tokens=2, **FP8)


@pytest.fixture(scope="module")
def model():
    return make_model()


def make_cache(model, config, batch=3, room=160):
    return TwilightCache(model.config, config, batch, room, device="cpu", dtype=model.dtype, warn_never_sparse=False)


@torch.no_grad()
def logits(model, cache, ids, mask=None):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def test_a_prompt_is_exact_and_later_chunks_see_what_is_stored(model):
    ids, _ = prompts((80,))
    exact = logits(model, make_cache(model, TwilightConfig(Full(), dense_layers=2), 1), ids)
    cache = make_cache(model, DENSE, 1)
    assert torch.equal(logits(model, cache, ids), exact), "of itself a prompt sees what nothing has rounded"
    cache.reset()
    first = logits(model, cache, ids[:, :50])
    second = logits(model, cache, ids[:, 50:])
    torch.testing.assert_close(first, exact[:, :50])
    error = (second - exact[:, 50:]).std()
    assert 0 < error < 0.1 * exact.std(), "rounding shows, and no more than that"
    step = logits(model, cache, ids[:, :1])
    assert step.isfinite().all()


def test_a_traced_prompt_with_padding_is_exact_too(model):
    ids, mask = prompts()
    traced = torch.compile(lambda cache: logits(model, cache, ids, mask), fullgraph=True, backend="eager")
    found, expected = traced(make_cache(model, DENSE)), logits(model, make_cache(model, DENSE), ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [DENSE, PRUNED], ids=["dense", "pruned"])
def test_generation_runs_and_the_cache_may_be_cropped_reset_and_filled_again(model, config):
    ids, mask = prompts()
    cache = make_cache(model, config)
    decoder = Decoder(model, cache, 3, eos_token_ids=(), capture="eager")
    first = decoder.generate(ids, mask, max_new_tokens=20).tokens
    layer = cache.layers[0].paged
    assert layer.kv.k_cache.dtype == torch.float8_e4m3fn and layer.scales.k_shift.any()
    cache.reset()
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=20).tokens, first)
    cache.crop(-5)
    lens = cache.live_seq_lens.clone()
    again = logits(model, cache, first[:, -1:])
    assert again.isfinite().all() and torch.equal(cache.live_seq_lens, lens + 1)


@pytest.mark.parametrize("draft", ["sparse", "prompt"])
def test_drafts_give_the_tokens_of_dense_attention_over_the_same_cache(model, draft):
    ids, mask = prompts()
    dense = Decoder(model, make_cache(model, DENSE), 3, eos_token_ids=(), capture="eager").generate(ids, mask, max_new_tokens=30)
    decoder = LosslessDecoder(
        model, make_cache(model, PRUNED), 3, eos_token_ids=(), capture="eager", speculation=Speculation(3, draft, adapt=False)
    )
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=30).tokens, dense.tokens)


def test_a_cache_outside_the_device_stores_fp8_too_but_keeps_no_copies(model, tmp_path):
    ids, mask = prompts()
    found = []
    for settings in ({}, {"offload": str(tmp_path)}):
        config = TwilightConfig(Full(), top_p=0.6, dense_below=0, **settings, **FP8)
        cache = make_cache(model, config)
        found.append(Decoder(model, cache, 3, eos_token_ids=(), capture="eager").generate(ids, mask, max_new_tokens=8).tokens)
        assert cache.layers[0].paged.kv.is_fp8
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="hot_tokens: expected 0 with kv_cache_dtype"):
        TwilightConfig(offload=True, hot_tokens=8, **FP8)


def test_a_model_with_biased_keys_loses_nothing_more_than_another():
    model = make_model()
    ids, _ = prompts((100,))
    found = []
    for size in (0.0, 200.0):
        for layer in model.model.layers:
            projection = layer.self_attn.k_proj
            bias = torch.zeros(projection.out_features).view(2, 64)
            bias[:, 31] = bias[:, 63] = size  # of the slowest rotation: almost the same at every position
            projection.bias = torch.nn.Parameter(bias.flatten(), requires_grad=False)
        exact, cache = make_cache(model, TwilightConfig(Full(), dense_layers=2), 1), make_cache(model, DENSE, 1)
        steps = []
        for one in (exact, cache):
            logits(model, one, ids)
            steps.append(torch.cat([logits(model, one, ids[:, i : i + 1]) for i in range(8)], 1).log_softmax(-1))
        found.append(torch.nn.functional.kl_div(steps[1], steps[0], log_target=True, reduction="batchmean").item())
    assert found[1] < 4 * found[0] + 1e-4, f"KL without and with a bias: {found}"


@pytest.mark.parametrize("selector", [SparQ(32, channels=48), Tidal(32, selection_layers=(0,))], ids=["sparq", "tidal"])
def test_selectors_that_read_keys_read_what_they_stand_for(model, selector):
    ids, _ = prompts((80,))
    plain, cache = (make_cache(model, TwilightConfig(selector, top_p=1.0, dense_below=0, **settings), 1) for settings in ({}, FP8))
    for filled in (plain, cache):
        logits(model, filled, ids)
    want, found = (read_keys(filled.paged.layers[0], filled.live_page_table)[:, :, :80] for filled in (plain, cache))
    assert found.dtype == model.dtype
    assert (found - want).abs().max() <= 2**-4 * (want - want.mean(2, keepdim=True)).abs().max()
    assert logits(model, cache, ids[:, :1]).isfinite().all()
