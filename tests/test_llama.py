"""Models of the Llama family through transformers: exact where nothing is left out, and refusals by name."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig  # noqa: E402
from twilight_ops.integration import Decoder, Sampling, TwilightCache, generate  # noqa: E402

NEW_TOKENS = 64
LAYERS = 3
VOCABULARY = 199
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
}
# p = 1 and a budget that covers every length: each selector must then give exact attention, through its own code path.
EXACT = {
    "full": TwilightConfig(Full(), top_p=1.0, dense_layers=0, dense_below=0),
    "quest": TwilightConfig(Quest(token_budget=1024), top_p=1.0, dense_layers=1, dense_below=0),
    "shadow_prefix": TwilightConfig(ShadowPrefix(token_budget=1024), top_p=1.0, dense_layers=1, dense_below=0),
}


def make_model(family="llama", attention="twilight", **overrides):
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(1)
    config = config_class(**SIZES, **{**extra, **overrides})
    # Wide initial weights give logits apart from each other, so that equal tokens mean equal attention.
    config.initializer_range = 0.2
    config._attn_implementation = attention
    return model_class(config).eval()


@pytest.fixture(scope="module")
def llama():
    return make_model()


def make_prompt(lengths, side="left", seed=2):
    """Token ids and mask [B, max(lengths)], padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, length in enumerate(lengths):
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[b, columns] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[b, columns] = 1
    return ids, mask


def new_tokens(model, ids, mask, new=NEW_TOKENS, **kwargs):
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **kwargs)
    return out[:, ids.shape[1] :]


def dense_tokens(model, ids, mask, new=NEW_TOKENS, **kwargs):
    """What transformers' own sdpa attention generates with the same weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        return new_tokens(model, ids, mask, new, **kwargs)
    finally:
        model.set_attn_implementation(before)


def dense_rows(model, lengths, new=NEW_TOKENS):
    """Each sequence alone through sdpa: the answer that a ragged batch must give, whatever its padding."""
    ids, mask = make_prompt(lengths)
    return torch.cat([dense_tokens(model, ids[b : b + 1, -n:], mask[b : b + 1, -n:], new) for b, n in enumerate(lengths)])


def make_cache(model, config=EXACT["full"], batch=1, length=256, **kwargs):
    return TwilightCache(model.config, config, max_batch_size=batch, max_cache_len=length, **kwargs)


COMPILE = CompileConfig(fullgraph=True, dynamic=False)
COMPILE._compile_all_devices = True


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selector", EXACT)
def test_p_1_and_full_budget_give_the_tokens_of_sdpa(family, selector):
    model = make_model(family)
    ids, mask = make_prompt([75])
    cache = make_cache(model, EXACT[selector])
    assert torch.equal(new_tokens(model, ids, mask, past_key_values=cache), dense_tokens(model, ids, mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_left_padded_batch_gives_the_tokens_of_sdpa(family):
    model = make_model(family)
    lengths = [75, 9, 48]
    ids, mask = make_prompt(lengths)
    cache = make_cache(model, EXACT["shadow_prefix"], batch=3)
    assert torch.equal(new_tokens(model, ids, mask, past_key_values=cache), dense_rows(model, lengths))


@pytest.mark.parametrize("lengths", [[75], [75, 9, 48]], ids=["batch1", "ragged3"])
@pytest.mark.parametrize("selector", EXACT)
def test_compiled_model_generate_gives_the_tokens_of_sdpa(llama, selector, lengths):
    torch._dynamo.reset()
    ids, mask = make_prompt(lengths)
    cache = make_cache(llama, EXACT[selector], batch=len(lengths))
    tokens = new_tokens(llama, ids, mask, past_key_values=cache, compile_config=COMPILE)
    assert torch.equal(tokens, dense_rows(llama, lengths))


@pytest.mark.parametrize("capture", ["eager", "compile"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_own_loop_equals_sdpa_with_padding_on_either_side(llama, side, capture):
    torch._dynamo.reset()
    lengths = [75, 9, 48]
    ids, mask = make_prompt(lengths, side)
    result = generate(llama, ids, EXACT["shadow_prefix"], mask, NEW_TOKENS, capture=capture)
    assert torch.equal(result.tokens, dense_rows(llama, lengths))
    assert result.lengths.tolist() == [NEW_TOKENS] * 3
    assert (result.graphs, result.breaks, result.recompiles) == ((1, 0, 0) if capture == "compile" else (0, 0, 0))


def test_a_right_padded_forward_fills_the_cache_with_the_live_tokens_only(llama):
    lengths = [40, 12, 27]
    ids, mask = make_prompt(lengths, "right")
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    cache = make_cache(llama, batch=3)
    with torch.no_grad():
        logits = llama(ids, position_ids=positions, past_key_values=cache).logits
        assert cache.live_seq_lens.tolist() == lengths
        last = logits[torch.arange(3), torch.tensor(lengths) - 1].argmax(-1, keepdim=True)
        following = llama(last, position_ids=torch.tensor(lengths)[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
    expected = dense_rows(llama, lengths, 2)
    assert torch.equal(last[:, 0], expected[:, 0])
    assert torch.equal(following, expected[:, 1])


@pytest.mark.parametrize("lengths", [[75], [75, 9, 48]], ids=["batch1", "ragged3"])
@pytest.mark.parametrize("chunk", [16, 33, 70])
def test_chunked_prefill_gives_the_same_tokens_as_one_forward(llama, lengths, chunk):
    ids, mask = make_prompt(lengths)
    cache = make_cache(llama, EXACT["quest"], batch=len(lengths))
    expected = dense_rows(llama, lengths, 8)
    assert torch.equal(Decoder(llama, cache, len(lengths), capture="eager").generate(ids, mask, 8, prefill_chunk=chunk).tokens, expected)
    cache.reset()
    assert torch.equal(new_tokens(llama, ids, mask, 8, past_key_values=cache, prefill_chunk_size=chunk), expected)


def test_compiled_chunks_of_a_prompt_give_the_same_tokens(llama):
    torch._dynamo.reset()
    lengths = [48, 21]
    ids, mask = make_prompt(lengths)
    cache = TwilightCache(llama.config, EXACT["quest"], 2, 128, device="cpu", dtype=torch.float32)
    tokens = new_tokens(llama, ids, mask, 8, past_key_values=cache, prefill_chunk_size=16, compile_config=COMPILE)
    assert torch.equal(tokens, dense_rows(llama, lengths, 8))


@pytest.mark.parametrize("turn_tokens", [3, 20])
def test_a_second_turn_continues_on_the_cache(llama, turn_tokens):
    lengths = [60, 31]
    ids, mask = make_prompt(lengths)
    cache = make_cache(llama, EXACT["shadow_prefix"], batch=2)
    decoder = Decoder(llama, cache, 2, capture="eager")
    first = decoder.generate(ids, mask, 10).tokens
    turn = torch.randint(1, VOCABULARY, (2, turn_tokens), generator=torch.Generator().manual_seed(5))
    second = decoder.generate(torch.cat([first[:, -1:], turn], 1), None, 10).tokens
    whole = torch.cat([ids, first, turn], 1)
    ones = torch.ones_like(whole)
    ones[:, : ids.shape[1]] = mask
    for b, length in enumerate(lengths):
        pad = ids.shape[1] - length
        assert torch.equal(second[b : b + 1], dense_tokens(llama, whole[b : b + 1, pad:], ones[b : b + 1, pad:], 10))


def test_a_ragged_second_turn_does_not_overwrite_what_is_cached(llama):
    first_lens, second_lens = [60, 31], [4, 19]
    ids, mask = make_prompt(first_lens)
    more, more_mask = make_prompt(second_lens, seed=9)
    cache = make_cache(llama, EXACT["quest"], batch=2)
    decoder = Decoder(llama, cache, 2, capture="eager")
    first = decoder.generate(ids, mask, 1).tokens
    second = decoder.generate(more, more_mask, 10).tokens
    assert first.shape == (2, 1)
    for b in range(2):
        whole = torch.cat([ids[b, -first_lens[b] :], more[b, -second_lens[b] :]])[None]
        assert torch.equal(second[b : b + 1], dense_tokens(llama, whole, torch.ones_like(whole), 10))


def test_model_generate_reuses_the_cache_over_turns(llama):
    ids, mask = make_prompt([50])
    cache = make_cache(llama)
    first = llama.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, make_prompt([12], seed=7)[0]], 1)
    tokens = new_tokens(llama, longer, torch.ones_like(longer), 10, past_key_values=cache)
    assert torch.equal(tokens, dense_tokens(llama, longer, torch.ones_like(longer), 10))


@pytest.mark.parametrize("selector", EXACT)
def test_crop_takes_tokens_back(llama, selector):
    ids, mask = make_prompt([61])
    cache = make_cache(llama, EXACT[selector])
    decoder = Decoder(llama, cache, capture="eager")
    expected = decoder.generate(ids, mask, 20).tokens
    cache.crop(-19)
    assert int(cache.get_seq_length()) == 61 and cache.live_seq_lens.tolist() == [61]
    cache.crop(-30)
    tail = ids[:, 31:]
    assert torch.equal(decoder.generate(tail, None, 20).tokens, expected)
    with pytest.raises(ValueError, match="tokens_to_remove: expected at most the 80 cached tokens, got 81"):
        cache.crop(-81)


def test_reset_serves_a_new_prompt_with_the_same_graph(llama):
    torch._dynamo.reset()
    cache = make_cache(llama, EXACT["shadow_prefix"])
    decoder = Decoder(llama, cache)
    addresses = None
    for seed, length in ((2, 75), (3, 20), (4, 130)):
        ids, mask = make_prompt([length], seed=seed)
        result = decoder.generate(ids, mask, 30)
        assert torch.equal(result.tokens, dense_tokens(llama, ids, mask, 30))
        now = [t.data_ptr() for layer in cache.layers for t in layer.paged.tensors()]
        assert addresses in (None, now)
        addresses = now
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        assert cache.budget_report().sparse is None
    assert (decoder.graphs, decoder.breaks) == (1, 0)


def test_the_comparison_with_sdpa_can_fail(llama):
    """Attention that drops most of its weight gives other tokens, so equal tokens above mean exact attention."""
    ids, mask = make_prompt([75])
    pruned = TwilightConfig(Full(), top_p=0.05, dense_layers=0, dense_below=0)
    tokens = generate(llama, ids, pruned, mask, NEW_TOKENS, capture="eager").tokens
    expected = dense_tokens(llama, ids, mask)
    assert len(expected.unique()) > 5
    assert (tokens != expected).sum() > NEW_TOKENS // 4


def test_decoders_side_by_side_keep_their_own_graphs(llama):
    torch._dynamo.reset()
    ids, mask = make_prompt([40])
    expected = dense_tokens(llama, ids, mask, 8)
    decoders = [Decoder(llama, make_cache(llama, EXACT[name])) for name in ("full", "quest")]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for decoder in decoders:
                assert torch.equal(decoder.generate(ids, mask, 8).tokens, expected)
                decoder.cache.reset()
    assert [decoder.graphs for decoder in decoders] == [1, 1]


def test_sequences_end_at_their_own_end_token_and_stay_in_the_cache_without_it(llama):
    lengths = [33, 20]
    ids, mask = make_prompt(lengths)
    free = dense_rows(llama, lengths, 30)
    stop = int(free[0, 5])
    ends = [(row == stop).nonzero()[0, 0].item() + 1 if (row == stop).any() else 30 for row in free]
    cache = make_cache(llama, batch=2)
    result = Decoder(llama, cache, 2, eos_token_ids=[stop], pad_token_id=0, capture="eager").generate(ids, mask, 30)
    assert result.lengths.tolist() == ends
    assert result.tokens.shape[1] == max(ends)
    assert cache.live_seq_lens.tolist() == [n + end - 1 for n, end in zip(lengths, ends, strict=True)]
    for row, expected, end in zip(result.tokens, free, ends, strict=True):
        assert torch.equal(row[:end], expected[:end])
        assert (row[end:] == 0).all()
    decoder = Decoder(llama, cache, 2, eos_token_ids=[stop], capture="eager")
    decoder.stop_at(())
    cache.reset()
    assert torch.equal(decoder.generate(ids, mask, 30).tokens, free)
    with pytest.raises(ValueError, match="eos_token_ids: expected at most 8, got 9"):
        decoder.stop_at(range(9))


def test_sampling_follows_the_model_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20000, 1)
    torch.manual_seed(0)
    plain = Sampling(temperature=2.0).draw(logits).bincount(minlength=4) / 20000
    torch.testing.assert_close(plain, (logits[0] / 2).softmax(-1), atol=0.015, rtol=0)
    two = Sampling(top_k=2).draw(logits).bincount(minlength=4) / 20000
    torch.testing.assert_close(two, torch.cat([logits[0, :2].softmax(-1), torch.zeros(2)]), atol=0.015, rtol=0)
    # p = 0.85 of (.644, .237, .087, .032) keeps the first two.
    nucleus = Sampling(top_p=0.85).draw(logits).bincount(minlength=4) / 20000
    torch.testing.assert_close(nucleus, two, atol=0.02, rtol=0)


def test_sampled_generation_is_compiled_and_repeats_with_a_seed(llama):
    torch._dynamo.reset()
    ids, mask = make_prompt([30])
    cache = make_cache(llama)
    decoder = Decoder(llama, cache, sampling=Sampling(temperature=1.5, top_k=50, top_p=0.9))
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(decoder.generate(ids, mask, 24).tokens)
        cache.reset()
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert (decoder.graphs, decoder.breaks) == (1, 0)


def test_streamed_tokens_are_the_returned_ones(llama):
    ids, mask = make_prompt([30])
    parts, progress = [], []
    hooks = [list(layer._forward_hooks) for layer in llama.model.layers]  # transformers leaves its own after output_attentions
    result = generate(
        llama,
        ids,
        EXACT["full"],
        mask,
        23,
        capture="eager",
        prefill_chunk=10,
        on_tokens=parts.append,
        on_prefill=lambda *p: progress.append(p),
    )
    assert torch.equal(torch.cat(parts, 1), result.tokens)
    assert progress == [(0, 30), (3, 30), (6, 30), (10, 30), (13, 30), (16, 30), (20, 30), (23, 30), (26, 30), (30, 30)]
    assert [list(layer._forward_hooks) for layer in llama.model.layers] == hooks


def test_budget_report_counts_every_decode_step(llama):
    ids, mask = make_prompt([200])
    config = TwilightConfig(Quest(token_budget=64), top_p=0.5, dense_layers=1, dense_below=0, sink_tokens=0, recent_tokens=4)
    cache = make_cache(llama, config, length=256)
    result = Decoder(llama, cache, capture="eager").generate(ids, mask, 11)
    report = result.budget
    assert [layer.selector for layer in report.layers] == ["dense", "quest", "quest"]
    for layer in report.layers:
        for head in layer.heads:
            assert head.calls == 10
            assert head.live == pytest.approx(205.5)
            if layer.selector == "dense":
                assert head.kept.mean == head.live and head.captured_mass == 1.0
            else:
                assert head.candidates.mean <= 64
                assert 1 <= head.kept.p5 <= head.kept.mean <= head.candidates.mean
                assert 0.5 <= head.captured_mass <= 1.0
    assert report.sparse.calls == 2 * 2 * 10
    assert report.sparse.pruned > 0.6
    assert str(report).count("\n") == 8
    cache.reset_budget()
    assert cache.budget_report().sparse is None


def refused_calls(model):
    """(name, call on a cache, message) for everything that must be refused."""
    ids, mask = make_prompt([20])
    two, two_mask = make_prompt([20, 20])
    packed = torch.cat([torch.arange(10), torch.arange(10)])[None]
    gap = torch.arange(20)[None] + 5
    future = torch.tensor([[[[True]]]]).expand(1, 1, 20, 20)

    def forward(cache, **kwargs):
        with torch.no_grad():
            return model(**{"input_ids": ids, "past_key_values": cache, **kwargs})

    def train(cache):
        model.train()
        try:
            return model(ids, past_key_values=cache)
        finally:
            model.eval()

    return {
        "beam search": (lambda c: new_tokens(model, ids, mask, 4, num_beams=2, past_key_values=make_cache(model, batch=2)), "beam search"),
        "foreign cache": (lambda c: forward(None, past_key_values=DynamicCache(config=model.config)), "expected a TwilightCache"),
        "no cache": (lambda c: forward(None, use_cache=False), "expected a TwilightCache"),
        "training": (train, "training is not supported"),
        "gradients": (lambda c: model(ids, past_key_values=c), "training is not supported"),
        "custom mask": (lambda c: forward(c, attention_mask=torch.ones(1, 1, 20, 20)), "custom mask"),
        "mask of every pair": (lambda c: forward(c, attention_mask=future), "custom mask"),
        "weights": (lambda c: forward(c, output_attentions=True), "output_attentions"),
        "packed sequences": (lambda c: forward(c, position_ids=packed), "packed sequences"),
        "packed lengths": (lambda c: forward(c, cu_seq_lens_q=torch.tensor([0, 10, 20])), "packed sequences"),
        "a gap": (lambda c: forward(c, position_ids=gap), "expected sequence 0 to go on at 0, got 5"),
        "too long": (
            lambda c: forward(c, input_ids=torch.ones(1, 300, dtype=torch.long)),
            "at most max_cache_len = 256 tokens a sequence, got 300",
        ),
        "too many new tokens": (
            lambda c: Decoder(model, c, capture="eager").generate(ids, mask, 300),
            r"max_cache_len = 256, got 20 \+ 300 = 320",
        ),
        "batch": (lambda c: forward(c, input_ids=two), "at most max_batch_size = 1 sequences, got 2|expected 1 to max_batch_size"),
        "padding row": (lambda c: Decoder(model, c, capture="eager").generate(ids, mask * 0, 3), "at least 1 token a sequence"),
        "short chunks": (
            lambda c: Decoder(model, c, capture="eager").generate(ids, mask, 3, prefill_chunk=8),
            "prefill_chunk: expected > 8",
        ),
        "capture": (lambda c: Decoder(model, c, capture="fast"), "capture: expected one of cuda_graph, compile, eager"),
        "cuda graph on cpu": (lambda c: Decoder(model, c, capture="cuda_graph"), 'capture: expected "compile" or "eager" on cpu'),
    }


@pytest.mark.parametrize("name", [
    "beam search", "foreign cache", "no cache", "training", "gradients", "custom mask", "mask of every pair", "weights",
    "packed sequences", "packed lengths",
    "a gap", "too long", "too many new tokens", "batch", "padding row", "short chunks", "capture", "cuda graph on cpu",
])  # fmt: skip
def test_unsupported_use_is_refused_by_name_and_leaves_the_cache_alone(llama, name):
    ids, mask = make_prompt([20])
    cache = make_cache(llama, EXACT["shadow_prefix"])
    decoder = Decoder(llama, cache, capture="eager")
    expected = decoder.generate(ids, mask, 12).tokens
    cache.reset()
    call, message = refused_calls(llama)[name]
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        call(cache)
    assert not cache.filled and int(cache.get_seq_length()) == 0
    assert torch.equal(decoder.generate(ids, mask, 12).tokens, expected)


def test_a_filled_cache_refuses_what_does_not_follow(llama):
    ids, mask = make_prompt([20])
    cache = make_cache(llama, EXACT["full"], length=64)
    decoder = Decoder(llama, cache, capture="eager")
    decoder.generate(ids, mask, 5)
    length = cache.live_seq_lens.tolist()
    with torch.no_grad():
        with pytest.raises(ValueError, match="at most max_cache_len = 64 tokens a sequence, got 65"):
            llama(torch.ones(1, 41, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match="expected sequence 0 to go on at 24, got 0"):
            llama(ids, position_ids=torch.arange(20)[None], past_key_values=cache)
        with pytest.raises(ValueError, match="expected the 1 sequences already cached"):
            llama(ids[:, :1].repeat(2, 1), position_ids=torch.tensor([[24], [24]]), past_key_values=cache)
        with pytest.raises(RuntimeError, match="a column for each of the 24 cached and 20 new tokens, got 20"):
            llama(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"call cache.reset\(\) before another prompt"):
            llama.generate(ids[:, :9], attention_mask=mask[:, :9], max_new_tokens=2, past_key_values=cache)
        decoder.cache.crop(-2)
        for _ in range(42):
            llama(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="at most max_cache_len = 64 tokens a sequence, got 65"):
            llama(ids[:, :1], past_key_values=cache)
    assert length == [24] and cache.live_seq_lens.tolist() == [64]


def test_sliding_windows_serve_also_where_they_are_shorter_than_the_cache():
    ids, mask = make_prompt([90])
    for windowed in (
        make_model("mistral", sliding_window=64),
        make_model("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1),
    ):
        for length in (64 + 32, 128):
            cache = make_cache(windowed, length=length, warn_never_sparse=False)
            tokens = new_tokens(windowed, ids, mask, 6, past_key_values=cache)
            assert torch.equal(tokens, dense_tokens(windowed, ids, mask, 6))
    foreign = make_cache(make_model("mistral"))
    with pytest.raises(RuntimeError, match="sliding_window: expected none, or at least max_cache_len = 256 in layer 1, got 64"):
        new_tokens(windowed, ids, mask, 8, past_key_values=foreign)


def test_several_query_tokens_in_one_step_equal_one_at_a_time(llama):
    ids, mask = make_prompt([50, 23])
    more, _ = make_prompt([6, 6], seed=11)
    positions = torch.tensor([50, 23])[:, None] + torch.arange(6)
    logits = []
    for step in (6, 2, 1):
        cache = make_cache(llama, EXACT["quest"], batch=2, step_tokens=8)
        Decoder(llama, cache, 2, capture="eager").generate(ids, mask, 1)
        with torch.no_grad():
            parts = [
                llama(more[:, i : i + step], position_ids=positions[:, i : i + step], past_key_values=cache).logits
                for i in range(0, 6, step)
            ]
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(logits[0], logits[2], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], logits[2], atol=2e-4, rtol=1e-4)
