"""What people do with a cache, a loop and a mask without having read how they work inside."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import warnings
import weakref

import pytest
import torch

pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM  # noqa: E402

from twilight_ops import Full, ShadowPrefix, TwilightConfig  # noqa: E402
from twilight_ops.integration import (  # noqa: E402
    Decoder,
    Sampling,
    TwilightCache,
    cache_argument,
    generate,
)
from twilight_ops.integration.hf.attention import twilight_mask  # noqa: E402
from twilight_ops.integration.hf.sequences import live_columns  # noqa: E402

EXACT = TwilightConfig(Full(), top_p=1.0, dense_below=0)
# Keeps so little that every step that is pruned shows.
PRUNED = TwilightConfig(Full(), top_p=0.05, dense_below=0, sink_tokens=0, recent_tokens=1)


def make_model(attention="twilight", layers=2, **overrides):
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    config = LlamaConfig(vocab_size=99, num_hidden_layers=layers, initializer_range=0.2, **{**sizes, **overrides})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def dense():
    return make_model("sdpa")


def tokens(batch=1, length=40, seed=0):
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_cache(model, config=EXACT, batch=1, length=128, **kwargs):
    return TwilightCache(model.config, config, batch, length, **kwargs)


@torch.no_grad()
def logits(model, ids, cache=None, **kwargs):
    cache = {} if cache is None else cache_argument(model, cache)
    return model(ids, **cache, **kwargs).logits


def test_sampling_draws_what_is_likely_and_nothing_impossible():
    torch.manual_seed(0)
    rows, words = 64, 8192
    scores = torch.full((rows, words), -30.0)  # e**-30 each: all others together have probability 8e-10
    scores[:, 7] = 0.0
    assert all(bool((Sampling().draw(scores) == 7).all()) for _ in range(16))


def test_sampling_noise_is_exponential_down_to_small_values():
    from twilight_ops.integration.hf.generate import _exponential

    torch.manual_seed(0)
    noise = torch.cat([_exponential(torch.empty(1 << 20)) for _ in range(16)]).double()
    assert noise.min() > 0
    # Of 2**24 draws about 16 lie below 2**-20, whatever the resolution of one uniform number; a few hundred below 2**-16.
    assert 1 <= int((noise < 2.0**-20).sum()) <= 60
    assert 150 <= int((noise < 2.0**-16).sum()) <= 400
    torch.testing.assert_close(noise.mean(), torch.ones((), dtype=torch.float64), atol=2e-3, rtol=0)


@pytest.mark.parametrize("side", ["left", "right", "hole"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "mask_alone"])
def test_a_padding_mask_hides_the_same_columns_as_in_sdpa(model, dense, side, positions):
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, {"left": slice(0, 28), "right": slice(28, 40), "hole": slice(10, 13)}[side]] = 0
    kwargs = {"attention_mask": mask}
    if positions:
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    cache, other = make_cache(model, batch=2), DynamicCache(config=dense.config)
    live = mask.bool()
    torch.testing.assert_close(logits(model, ids, cache, **kwargs)[live], logits(dense, ids, other, **kwargs)[live], atol=2e-4, rtol=1e-3)
    assert cache.live_seq_lens.tolist() == mask.sum(1).tolist()
    # The next token sees what the prompt left, at the position that transformers gives it.
    kwargs["attention_mask"] = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    if positions:
        kwargs["position_ids"] = mask.sum(1, keepdim=True)
    more = tokens(2, 1, seed=5)
    torch.testing.assert_close(logits(model, more, cache, **kwargs), logits(dense, more, other, **kwargs), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("new", [12, 5], ids=["prompt", "few_tokens"])
def test_a_second_turn_of_unequal_length_continues_a_batch(model, dense, new):
    first, turn = tokens(2, 30, seed=1), tokens(2, new, seed=2)
    turn[0, :3] = 0

    def chat(model, cache):
        kwargs = {"max_new_tokens": 6, "do_sample": False, **cache_argument(model, cache)}
        out = model.generate(first, attention_mask=torch.ones_like(first), **kwargs)
        ids = torch.cat([out, turn], 1)
        mask = torch.ones_like(ids)
        mask[0, 36:39] = 0
        return model.generate(ids, attention_mask=mask, **kwargs)[:, -6:]

    assert torch.equal(chat(model, make_cache(model, batch=2)), chat(dense, DynamicCache(config=dense.config)))


def test_columns_are_read_from_positions():
    rows = {
        (0, 0, 0, 1): [0, 0, 1, 1],
        (-1, -1, 0, 1): [0, 0, 1, 1],
        (0, 1, 2, 0): [1, 1, 1, 0],
        (0, 0, 0, 0): [1, 0, 0, 0],
        (-1, -1, -1, 0): [0, 0, 0, 1],
        (0, 1, -1, 2): [1, 1, 0, 1],
    }
    for positions, expected in rows.items():
        assert live_columns(torch.tensor([positions]), torch.tensor([True])).int().tolist() == [expected], positions
    # Where another row shows that padding lies on the left, a row of zeros ends with its token.
    left = live_columns(torch.tensor([[0, 0, 0, 0], [0, 0, 1, 2]]), torch.tensor([True, True]))
    assert left.int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    # In a sequence that holds tokens, position 0 is padding.
    assert live_columns(torch.tensor([[0, 0, 7, 8]]), torch.tensor([False])).int().tolist() == [[0, 0, 1, 1]]


def test_nothing_depends_on_the_default_device(model):
    from twilight_ops.integration.hf.sequences import _read_prompt_rows

    positions = torch.arange(30)[None]
    padded = torch.tensor([[0, 0, 0, 1, 2]])
    expected = [_read_prompt_rows(positions, [0])[0], _read_prompt_rows(padded, [0])[1]]
    cache = make_cache(model)
    with torch.device("meta"):
        assert _read_prompt_rows(positions, [0])[0] == expected[0]
        assert torch.equal(_read_prompt_rows(padded, [0])[1], expected[1])
        cache.crop(0)
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    want = generate(model, ids, EXACT, mask, 4, capture="eager").tokens
    with torch.device("cpu"):
        assert torch.equal(generate(model, ids, EXACT, mask, 4, capture="eager").tokens, want)


@pytest.mark.parametrize("capture", ["eager", "compile"])
def test_a_dropped_decoder_frees_its_cache_at_once(model, capture):
    torch._dynamo.reset()
    decoder = Decoder(model, make_cache(model), capture=capture)
    decoder.generate(tokens(), None, 4)
    held = weakref.ref(decoder.cache.layers[0].paged.kv.k_cache)
    gc.collect()
    gc.disable()
    try:
        del decoder
        if capture == "compile":  # Dynamo's own frames and guards are cycles
            gc.collect()
        assert held() is None
    finally:
        gc.enable()


def test_a_dropped_cache_is_freed_without_the_cycle_collector(model):
    gc.collect()
    gc.disable()
    try:
        cache = make_cache(model)
        logits(model, tokens(), cache)
        held = weakref.ref(cache.layers[0].paged.kv.k_cache)
        del cache
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_copied_cache_goes_on_by_itself(model, clone, batch):
    ids = tokens(batch, 62)
    cache = make_cache(model, batch=2)  # of two sequences perhaps one is in use
    logits(model, ids[:, :50], cache)
    other = clone(cache)
    other.crop(-10)
    expected = generate(model, torch.cat([ids[:, :40], ids[:, 50:]], 1), EXACT, None, 8, capture="eager").tokens
    assert torch.equal(Decoder(model, other, batch, capture="eager").generate(ids[:, 50:], None, 8).tokens, expected)
    assert other.live_seq_lens.tolist() == [59] * batch and cache.live_seq_lens.tolist() == [50] * batch


def test_streamed_tokens_stop_where_the_returned_ones_do(model):
    ids = tokens(2, 20)
    free = generate(model, ids, EXACT, None, 40, capture="eager", eos_token_ids=()).tokens
    ends = [int(free[0, 4]), int(free[1, 7])]
    for every in (1, 3, 16):
        parts = []
        decoder = Decoder(model, make_cache(model, batch=2), 2, eos_token_ids=ends, capture="eager")
        result = decoder.generate(ids, None, 40, on_tokens=parts.append, steps_between_checks=every)
        assert torch.equal(torch.cat(parts, 1), result.tokens)
        assert all(part.shape[1] > 0 for part in parts)


def test_transformers_is_imported_and_extended_only_for_those_who_use_it():
    """Importing any name of `twilight_ops.integration` registers the attention; what serves every engine does without."""
    script = (
        "import sys, twilight_ops.integration.compile\n"
        "assert 'transformers' not in sys.modules\n"
        "from twilight_ops.integration import TwilightCache\n"
        "from transformers import AttentionInterface\n"
        "assert 'twilight' in AttentionInterface().valid_keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_another_attention_names_twilight(dense):
    for attention in ("sdpa", "eager"):
        dense.set_attn_implementation(attention)
        with pytest.raises(RuntimeError, match='attn_implementation: expected "twilight"'):
            dense.generate(tokens(), max_new_tokens=2, **cache_argument(dense, make_cache(dense)))
    dense.set_attn_implementation("sdpa")


def test_autocast_is_served_in_its_dtype(model, dense):
    ids = tokens(1, 30)
    with torch.autocast("cpu", torch.bfloat16):
        cache = make_cache(model)
        ours = logits(model, ids, cache)
        theirs = logits(dense, ids)
        assert cache.layers[0].paged.kv.k_cache.dtype == torch.bfloat16
        more = logits(model, ids[:, :1], cache)
    assert ours.dtype == theirs.dtype and more.shape == (1, 1, 99)
    # Both round to eight bits; the exact logits are the judge.
    exact = logits(dense, ids)
    assert (ours - exact).norm() < 2 * (theirs - exact).norm() + 1e-3 * exact.norm()
    with pytest.warns(UserWarning, match="rounded to the cache's torch.bfloat16"):
        logits(model, ids[:, :1], cache)


def test_a_forward_that_fails_leaves_the_cache_as_it_was(model):
    ids, more = tokens(1, 30), tokens(1, 12, seed=4)
    for first in (True, False):
        cache = make_cache(model)
        if not first:
            logits(model, ids, cache)
        before = (cache.filled, int(cache.get_seq_length()), None if first else cache.live_seq_lens.tolist())

        def out_of_memory(*_):
            raise MemoryError

        handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(out_of_memory)
        mended = model.model.layers[0].mlp.register_forward_pre_hook(out_of_memory)
        with pytest.raises(MemoryError):
            logits(model, more if not first else ids, cache)
        mended.remove()
        handle.remove()
        after = (cache.filled, int(cache.get_seq_length()), None if first else cache.live_seq_lens.tolist())
        assert after == before
        got = logits(model, ids if first else more, cache)
        fresh = make_cache(model)
        want = logits(model, ids, fresh)
        torch.testing.assert_close(got, want if first else logits(model, more, fresh))


def test_a_prompt_in_chunks_is_exact_to_its_last_token(model, dense):
    """transformers cuts a prompt where it likes; the last chunk may be as short as a decode step."""
    ids = tokens(1, 61)
    want = logits(dense, ids)[:, -1]
    for chunk in (61, 30, 20, 7, 4):
        cache = make_cache(model, PRUNED)
        for part in ids.split(chunk, 1):
            got = logits(model, part, cache)[:, -1]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)
        assert cache.budget_report().sparse is None
        # The step after a prompt in chunks may still be its tail; the one after that is a decode step of two layers with two KV heads.
        logits(model, ids[:, :1], cache)
        cache.reset_budget()
        logits(model, ids[:, :1], cache)
        assert cache.budget_report().sparse.calls == 4


def test_steps_of_several_tokens_are_pruned_where_that_is_asked_for(model):
    cache = make_cache(model, PRUNED, step_tokens=4)
    logits(model, tokens(1, 40), cache)
    logits(model, tokens(1, 4), cache)
    assert cache.budget_report().sparse.calls == 4
    logits(model, tokens(1, 5), cache)
    assert cache.budget_report().sparse.calls == 4
    with pytest.raises(ValueError, match="step_tokens: expected 1..8, got 9"):
        make_cache(model, step_tokens=9)


def test_speculative_steps_of_transformers_are_pruned_and_prompts_after_them_are_not(model):
    ids = tokens(1, 12).repeat(1, 4)
    cache = make_cache(model, PRUNED)
    kwargs = {"max_new_tokens": 12, "do_sample": False, **cache_argument(model, cache)}
    model.generate(ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3, **kwargs)
    calls = cache.budget_report().sparse.calls
    assert calls > 0
    logits(model, tokens(1, 10), cache)
    logits(model, tokens(1, 5), cache)
    assert cache.budget_report().sparse.calls == calls


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_step_takes_caches_of_several_lengths(model, fullgraph):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = CompileConfig(fullgraph=fullgraph, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    expected = None
    for room in (64, 96, 160):
        kwargs = {"max_new_tokens": 4, "do_sample": False, **cache_argument(model, make_cache(model, length=room))}
        out = model.generate(tokens(1, 20), compile_config=compiled, **kwargs)
        assert expected is None or torch.equal(out, expected)
        expected = out
    assert sum(counters["graph_break"].values()) == 0
    # The second length is the last that needs a graph of its own, or each needs one.
    assert counters["stats"]["unique_graphs"] <= 3


def test_a_compiled_prompt_says_that_the_cache_must_be_allocated(model):
    torch._dynamo.reset()
    ids = tokens(1, 20)
    with pytest.raises(Exception, match="expected to be allocated before tracing: give it device and dtype"):
        logits(torch.compile(model, backend="eager", fullgraph=True), ids, make_cache(model))
    torch._dynamo.reset()
    got = logits(torch.compile(model, backend="eager"), ids, make_cache(model))
    torch.testing.assert_close(got, logits(model, ids, make_cache(model)), atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_be_compiled_decodes_eagerly_and_says_so_once():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_model(max_position_embeddings=64, rope_parameters=rope)
    expected = generate(model, tokens(1, 20), EXACT, None, 8, capture="eager").tokens
    with pytest.warns(UserWarning, match='decodes with capture="eager" instead of "compile", which costs') as caught:
        result = generate(model, tokens(1, 20), EXACT, None, 8)
    assert torch.equal(result.tokens, expected) and result.capture == "eager"
    assert sum("which costs" in str(warning.message) for warning in caught) == 1
    with pytest.raises(ValueError, match='capture: expected "eager" for this model, got "compile"'):
        generate(model, tokens(1, 20), EXACT, None, 8, capture="compile")


def test_weights_that_accelerate_keeps_elsewhere_are_served(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    offloaded = make_model()
    accelerate.disk_offload(offloaded, tmp_path, execution_device=torch.device("cpu"))
    expected = generate(model, tokens(1, 20), EXACT, None, 4, capture="eager").tokens
    with pytest.warns(UserWarning, match="which costs"):
        assert torch.equal(generate(offloaded, tokens(1, 20), EXACT, None, 4).tokens, expected)
    with pytest.raises(ValueError, match="capture"):
        generate(offloaded, tokens(1, 20), EXACT, None, 4, capture="compile")


def test_layers_visited_twice_or_out_of_order_are_refused(model):
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def twice(*args, **kwargs):
        forward(*args, **kwargs)
        return forward(*args, **kwargs)

    attention.forward = twice
    try:
        with pytest.raises(RuntimeError, match="calls attention once in every layer, in order"):
            logits(model, tokens(), make_cache(model))
    finally:
        attention.forward = forward
    cache = make_cache(model)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(reversed(layers))
    try:
        with pytest.raises(RuntimeError, match="got a call of layer 1 where layer 0 was due"):
            logits(model, tokens(), cache)
    finally:
        model.model.layers = layers
    assert not cache.filled


@pytest.mark.parametrize("layers", [1, 3])
def test_a_cache_for_a_model_of_another_depth_is_refused(model, layers):
    with pytest.raises(RuntimeError, match=f"cache .*: expected one made for a model of 2 layers, got one for {layers}"):
        logits(model, tokens(), make_cache(make_model(layers=layers)))


def test_a_model_that_leaves_layers_out_is_told_that_nothing_is_cached():
    short = make_model(layers=3)
    short.model.layers = short.model.layers[:2]
    cache = make_cache(short)
    for _ in range(2):  # one forward may fail and be tried again
        logits(short, tokens(), cache)
    with pytest.warns(UserWarning, match="TwilightCache: forwards end after 2 of 3 layers with attention and do not count"):
        logits(short, tokens(), cache)
    with pytest.raises(ValueError, match="generate: model: expected attention in all 3 layers"):
        generate(short, tokens(), EXACT, max_new_tokens=2, capture="eager")


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_batch_size": 1.0}, "max_batch_size: expected an integer >= 1, got 1.0"),
        ({"max_cache_len": "64"}, "max_cache_len: expected an integer >= 1, got '64'"),
        ({"step_tokens": None}, "step_tokens: expected an integer 1..8, got None"),
        ({"twilight": {"top_p": 0.5}}, "twilight: expected a TwilightConfig, got {'top_p': 0.5}"),
        ({"device": "cpu", "dtype": torch.int32}, "dtype: expected torch.float32, torch.bfloat16, torch.float16, got torch.int32"),
    ],
)
def test_what_a_cache_cannot_be_made_of_is_named(model, setting, message):
    with pytest.raises(ValueError, match=f"TwilightCache: {re.escape(message)}"):
        TwilightCache(model.config, **setting)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected an integer >= 1, got 2.5"),
        ({"eos_token_ids": 5}, "eos_token_ids: expected a sequence of tokens, got 5"),
        ({"sampling": 0.7}, "sampling: expected a Sampling, got 0.7"),
    ],
)
def test_what_generate_cannot_use_is_named(model, setting, message):
    with pytest.raises(ValueError, match=f"generate: {re.escape(message)}"):
        generate(model, tokens(), EXACT, **{"max_new_tokens": 2, "capture": "eager", **setting})


def test_default_settings_sample_and_stream_on_a_padded_batch(model):
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    parts = []
    torch.manual_seed(0)
    result = generate(model, ids, TwilightConfig(ShadowPrefix()), mask, 6, sampling=Sampling(), capture="eager", on_tokens=parts.append)
    assert torch.equal(torch.cat(parts, 1), result.tokens)


def test_a_cache_that_can_never_be_sparse_says_so_once_with_the_first_length(model):
    ids = tokens(1, 30)
    cache = make_cache(model, TwilightConfig())
    with pytest.warns(UserWarning, match="this cache of 128 tokens will never be sparse: .* so the first sparse length is 513") as caught:
        logits(model, ids, cache)
        logits(model, ids[:, :1], cache)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, ids, max_new_tokens=2, capture="eager")
        logits(model, ids, make_cache(model, EXACT))
        logits(model, ids, make_cache(model, TwilightConfig(), length=1024))


def test_the_mask_of_a_decode_step_looks_the_same_at_every_length():
    """A compiled step guards on shape and strides of its inputs, and a recorded one on their storage."""
    masks = []
    for width in (20, 21, 37):
        mask = torch.ones(2, width, dtype=torch.bool)
        mask[1, -1] = False
        masks.append(twilight_mask(2, 1, 64, q_offset=width - 1, attention_mask=mask))
        assert masks[-1].untyped_storage().data_ptr() != mask.untyped_storage().data_ptr()
    assert {(mask.shape, mask.stride(), mask.storage_offset(), mask.untyped_storage().nbytes()) for mask in masks} == {
        ((2, 1, 1, 1), masks[0].stride(), 0, 2)
    }
    assert masks[0].flatten().tolist() == [True, False]
