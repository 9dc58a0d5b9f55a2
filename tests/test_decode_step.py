"""decode_step.py: one step of one layer over the cache's own tensors, growing token by token."""

from dataclasses import fields
from functools import partial

import pytest
import torch
from comparisons import plain_attention
from inputs import DecodeInputs

from twilight_ops import Full, LayerOverride, PagedKVCache, PageMean, Quest, ShadowPrefix, TwilightConfig, decode_step
from twilight_ops.capacity import COUNTER_CANDIDATES, COUNTER_KEPT, COUNTER_ROWS

pytestmark = pytest.mark.usefixtures("poisoned_empties")
HEADS, KV_HEADS, DIM, BATCH = 6, 2, 64, 2
SELECTORS = {
    "full": Full(),
    "quest-int8": Quest(token_budget=48),
    "quest-model": Quest(token_budget=48, bounds_dtype="model"),
    "page-mean": PageMean(token_budget=48, budget_fraction=0.0),
    "shadow-prefix": ShadowPrefix(token_budget=32, budget_fraction=0.25, prefix_channels=32),
    "two-levels": ShadowPrefix(token_budget=32, budget_fraction=0.1, prefix_channels=32, page_fraction=0.5, min_scored_tokens=0),
}


def new_cache(selector, dtype=torch.float32, **settings) -> PagedKVCache:
    config = TwilightConfig(selector=selector, dense_layers=0, **({"dense_below": 0, "sink_tokens": 0, "recent_tokens": 0} | settings))
    return PagedKVCache(config, 1, HEADS, KV_HEADS, DIM, BATCH, 200, dtype, "cpu")


def step_rows(tokens: int, seed: int, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, tokens, DIM, generator=rng).mul(3.7).to(dtype).transpose(1, 2)
    k, v = (torch.randn(BATCH, KV_HEADS, tokens, DIM, generator=rng).to(dtype).transpose(1, 2) for _ in range(2))
    return q, k, v


def run(step, cache: PagedKVCache, prompt: int, steps: int, tokens: int = 1) -> list[torch.Tensor]:
    """Fills `prompt` tokens, then decodes `steps` times; returns the outputs."""
    layer, scale = cache.layers[0], DIM**-0.5
    _, k, v = step_rows(prompt, seed=1)
    cache.seq_lens.fill_(prompt)
    decode_step.append(k.to(layer.kv.k_cache.dtype), v.to(layer.kv.k_cache.dtype), layer, cache.page_table, cache.seq_lens)
    outputs = []
    for i in range(steps):
        cache.seq_lens.add_(tokens)
        q, k, v = step_rows(tokens, seed=100 + i, dtype=layer.kv.k_cache.dtype)
        outputs.append(step(q, k, v, layer, cache.page_table, cache.seq_lens, scale))
    return outputs


def test_decode_step_caps_logits_in_one_call_and_by_stage():
    steps = (partial(step, softcap=2.0) for step in (decode_step.decode_step, decode_step.decode_step_by_stage))
    fused, staged = (run(step, new_cache(Full(), top_p=0.5), 120, 5) for step in steps)
    uncapped = run(decode_step.decode_step, new_cache(Full(), top_p=0.5), 120, 5)
    for a, b, other in zip(fused, staged, uncapped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert (a - other).abs().max() > 0.1


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_decode_step_equals_the_step_by_stage_over_growing_lengths(selector, tokens):
    fused = run(decode_step.decode_step, new_cache(selector), 120, 12, tokens)
    staged = run(decode_step.decode_step_by_stage, new_cache(selector), 120, 12, tokens)
    for a, b in zip(fused, staged, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
def test_decode_step_is_dense_attention_while_nothing_is_left_out(selector):
    cache = new_cache(selector, top_p=1.0)
    layer = cache.layers[0]
    outputs = run(decode_step.decode_step, cache, 20, 10)
    rows = torch.randn(0)
    keys, values = (t[cache.page_table.long()].transpose(2, 3).flatten(1, 2)[:, :30] for t in (layer.kv.k_cache, layer.kv.v_cache))
    q, _, _ = step_rows(1, seed=109)
    read = {"q": q, "page_table": cache.page_table, "seq_lens": cache.seq_lens, "sm_scale": DIM**-0.5, "keys": keys, "values": values}
    x = DecodeInputs(**{field.name: rows for field in fields(DecodeInputs)} | layer.kv._asdict() | read)
    torch.testing.assert_close(outputs[-1], plain_attention(x)[0])


def test_decode_step_equals_its_dense_self_up_to_dense_below_and_prunes_after():
    dense = run(decode_step.decode_step, new_cache(Full(), overrides={0: LayerOverride(selector="dense")}), 60, 10)
    mixed = run(decode_step.decode_step, new_cache(Full(), top_p=0.5, dense_below=65), 60, 10)
    for i, (a, b) in enumerate(zip(mixed, dense, strict=True)):
        close = torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert close == (60 + i + 1 <= 65)


def test_decode_step_counts_rows_candidates_and_kept_tokens():
    cache = new_cache(Quest(token_budget=48), top_p=0.85)
    run(decode_step.decode_step, cache, 120, 7)
    counters = cache.layers[0].budget_counters
    assert (counters[:, COUNTER_ROWS] == 7 * BATCH).all()
    assert (counters[:, COUNTER_KEPT] < counters[:, COUNTER_CANDIDATES]).all() and (counters[:, COUNTER_CANDIDATES] <= 48 * 7 * BATCH).all()


def test_decode_step_follows_overrides_of_budget_p_sinks_and_recent_tokens():
    override = LayerOverride(head_token_budget=(16, 40), head_top_p=(1.0,) * HEADS, sink_tokens=2, recent_tokens=3)
    cache = new_cache(ShadowPrefix(token_budget=64, budget_fraction=0.0, prefix_channels=32), overrides={0: override})
    run(decode_step.decode_step, cache, 120, 5)
    counters = cache.layers[0].budget_counters
    assert counters[:, COUNTER_KEPT].tolist() == [16 * 5 * BATCH, 40 * 5 * BATCH]


def test_decode_step_after_a_rollback_equals_never_having_gone_there():
    plain, detour = new_cache(Quest(token_budget=32)), new_cache(Quest(token_budget=32))
    run(decode_step.decode_step, detour, 120, 20)
    expected = run(decode_step.decode_step, plain, 60, 5)
    again = run(decode_step.decode_step, detour, 60, 5)
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_step_runs_in_half_precision(dtype):
    low = run(decode_step.decode_step, new_cache(Full(), dtype=dtype, top_p=1.0), 50, 3)
    full = run(decode_step.decode_step, new_cache(Full(), top_p=1.0), 50, 3)
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05)
