"""Models that mix full attention with windows, chunks, states, shared K and V and sinks: one cache, equal to transformers' own."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import models_table  # noqa: E402
from models_table import MAX_CACHE_LEN, WINDOW  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from twilight_ops import Full, LayerOverride, ShadowPrefix, TwilightConfig  # noqa: E402
from twilight_ops.evaluation.mass import exact_weights  # noqa: E402
from twilight_ops.integration import Decoder, TwilightCache  # noqa: E402
from twilight_ops.integration.hf.sequences import ROLLBACK
from twilight_ops.integration.hf.windows import Ring, Scores, Window, attend_masked, attend_run, sees  # noqa: E402

WINDOWS = ("gemma2", "gemma3_text", "mistral", "gpt_oss", "llama4_text", "gemma3n_text")
STATES = ("qwen3_next", "lfm2", "falcon_h1", "jamba")
EXACT = TwilightConfig(Full(), top_p=1.0, dense_below=0)


def models(name):
    family = models_table.families()[name]
    return models_table.make_model(family, "twilight"), models_table.make_model(family, "eager")


def make_cache(model, batch=1, max_cache_len=MAX_CACHE_LEN, config=EXACT, **kwargs):
    return TwilightCache(model.config, config, batch, max_cache_len, warn_never_sparse=False, **kwargs)


def tokens_of(count, batch=1, seed=5):
    return torch.randint(10, 90, (batch, count), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits


def assert_same(got, expected):
    assert (got - expected).abs().max() < 1e-3 * expected.std(), f"off by {(got - expected).abs().max() / expected.std():.2g}"


@pytest.mark.parametrize("name", [*WINDOWS, *STATES])
@pytest.mark.parametrize("chunks", [(40, 1, 1, 1), (9, 1, 1, 30, 1, 20, 12, 1), (1,) * 20], ids=str)
def test_hybrid_prompts_in_chunks_and_steps_give_the_logits_of_transformers(name, chunks):
    ours, theirs = models(name)
    ids = tokens_of(sum(chunks), batch=2)
    cache, oracle = make_cache(ours, 2), DynamicCache(config=theirs.config)
    begin = 0
    for chunk in chunks:
        part = ids[:, begin : begin + chunk]
        assert_same(forward(ours, part, cache), forward(theirs, part, oracle))
        begin += chunk


@pytest.mark.parametrize("name", WINDOWS)
def test_hybrid_turns_of_unequal_length_are_those_of_each_sequence_alone(name):
    ours, _ = models(name)
    turns = [(30, 12), (5, 25), (1, 1), (17, 3), (1, 1)]
    both, alone = make_cache(ours, 2), [make_cache(ours), make_cache(ours)]
    masks = torch.ones(2, 0, dtype=torch.long)
    for turn, lengths in enumerate(turns):
        rows = [tokens_of(length, seed=10 * turn + row) for row, length in enumerate(lengths)]
        width = max(lengths)
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
        live = torch.arange(width) >= (width - torch.tensor(lengths))[:, None]
        masks = torch.cat([masks, live.long()], dim=1)
        positions = (masks.cumsum(1) - 1).clamp(min=0)[:, -width:]
        got = forward(ours, ids, both, attention_mask=masks, position_ids=positions)
        for row, length in enumerate(lengths):
            assert_same(got[row, width - length :], forward(ours, rows[row], alone[row])[0])


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("removed", [1, 7, ROLLBACK])
def test_hybrid_a_crop_gives_what_was_never_forwarded(name, removed):
    ours, _ = models(name)
    cache, fresh = make_cache(ours, max_cache_len=256), make_cache(ours, max_cache_len=256)
    ids = tokens_of(120)
    forward(ours, ids, cache)
    cache.crop(-removed)
    forward(ours, ids[:, :-removed], fresh)
    for step in range(3):
        more = tokens_of(1, seed=step)
        assert_same(forward(ours, more, cache), forward(ours, more, fresh))


def test_hybrid_a_crop_beyond_what_windows_remember_is_refused_also_in_parts():
    ours, _ = models("gemma3_text")
    cache = make_cache(ours, max_cache_len=256)
    forward(ours, tokens_of(120), cache)
    cache.crop(-ROLLBACK + 10)
    with pytest.raises(ValueError, match=f"tokens_to_remove: expected at most {ROLLBACK} in all"):
        cache.crop(-11)
    cache.crop(-10)
    assert cache.get_seq_length() == 120 - ROLLBACK
    cache.reset()
    forward(ours, tokens_of(WINDOW + ROLLBACK), cache)
    cache.crop(-WINDOW - ROLLBACK + 1)  # nothing was overwritten yet


@pytest.mark.parametrize("name", [*WINDOWS, *STATES])
def test_hybrid_after_a_reset_the_cache_is_as_new_also_for_another_batch(name):
    ours, _ = models(name)
    cache, fresh = make_cache(ours, 2), make_cache(ours, 2)
    forward(ours, tokens_of(50, batch=2), cache)
    cache.reset()
    for ids in (tokens_of(20, seed=1), tokens_of(1, seed=2)):
        assert_same(forward(ours, ids, cache), forward(ours, ids, fresh))


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_next"])
def test_hybrid_a_pickled_cache_goes_on_as_the_original(name):
    ours, _ = models(name)
    cache = make_cache(ours)
    forward(ours, tokens_of(50), cache)
    other = pickle.loads(pickle.dumps(cache))
    for step in range(2):
        ids = tokens_of(1, seed=step)
        assert torch.equal(forward(ours, ids, cache), forward(ours, ids, other))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gpt_oss", "qwen3_next", "falcon_h1"])
def test_hybrid_one_compiled_graph_serves_prompts_before_and_beyond_the_window(name):
    ours, _ = models(name)
    ours.generation_config.eos_token_id = None
    cache = make_cache(ours, 2)
    with models_table.traced_only():
        decoder = Decoder(ours, cache, 2, eos_token_ids=(), pad_token_id=0, capture="compile")
        for count in (5, 30):
            cache.reset()
            ids = tokens_of(count, batch=2, seed=count)
            got = decoder.generate(ids, max_new_tokens=16)
            expected = Decoder(ours, make_cache(ours, 2), 2, eos_token_ids=(), pad_token_id=0, capture="eager").generate(
                ids, max_new_tokens=16
            )
            assert torch.equal(got.tokens, expected.tokens)
    assert decoder.graphs == 1 and got.breaks == 0


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
def test_hybrid_a_compiled_prompt_is_exact(name):
    ours, _ = models(name)
    ids, mask = models_table.make_prompt()
    cache, eager = make_cache(ours, 2, device="cpu", dtype=torch.float32), make_cache(ours, 2)
    compiled = torch.compile(ours, backend="eager", fullgraph=True, dynamic=False)
    for part in (slice(0, 20), slice(20, 24)):
        kwargs = {"attention_mask": mask[:, : part.stop], "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, part]}
        got, expected = forward(compiled, ids[:, part], cache, **kwargs), forward(ours, ids[:, part], eager, **kwargs)
        assert_same(got[mask[:, part].bool()], expected[mask[:, part].bool()])
    torch._dynamo.reset()


def test_hybrid_a_refused_forward_leaves_windows_as_they_were():
    ours, _ = models("gemma3_text")
    cache, fresh = make_cache(ours, max_cache_len=64), make_cache(ours, max_cache_len=64)
    ids, more = tokens_of(40), tokens_of(1, seed=3)
    forward(ours, ids, cache), forward(ours, ids, fresh)
    with pytest.raises(ValueError, match="expected at most max_cache_len = 64 tokens a sequence, got 80"):
        forward(ours, ids, cache)
    assert_same(forward(ours, more, cache), forward(ours, more, fresh))


def test_hybrid_states_that_a_refused_forward_has_moved_are_named_until_a_reset():
    ours, _ = models("qwen3_next")
    cache = make_cache(ours, max_cache_len=64)
    ids = tokens_of(40)
    forward(ours, ids, cache)
    with pytest.raises(ValueError, match="max_cache_len"):
        forward(ours, ids, cache)
    with pytest.raises(RuntimeError, match=r"cache: expected reset\(\) before another forward.*linear_attention"):
        forward(ours, ids[:, :1], cache)
    cache.reset()
    assert_same(forward(ours, ids, cache), forward(ours, ids, make_cache(ours)))


def test_hybrid_states_cannot_go_back_and_say_so():
    ours, _ = models("qwen3_next")
    cache = make_cache(ours)
    forward(ours, tokens_of(20), cache)
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove: expected 0, because linear_attention layers cannot go back, got 3"):
        cache.crop(-3)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="assistant_model: expected a model whose layers can take tokens back"):
        cache.activate_past_recording()


@pytest.mark.parametrize("mask", [[1, 1, 0, 1], [1, 1, 1, 0]])
def test_hybrid_states_refuse_padding_that_they_would_take_for_tokens(mask):
    ours, _ = models("qwen3_next")
    with pytest.raises(ValueError, match="attention_mask: expected padding on the left of the first prompt alone"):
        forward(ours, tokens_of(4), make_cache(ours), attention_mask=torch.tensor([mask]))


def test_hybrid_a_sequence_that_ends_first_leaves_states_that_another_turn_refuses():
    ours, _ = models("qwen3_next")
    ids = tokens_of(20, batch=2)
    free = Decoder(ours, make_cache(ours, 2), 2, eos_token_ids=(), pad_token_id=0, capture="eager").generate(ids, max_new_tokens=6)
    end = next(int(token) for token in free.tokens[0, :4] if token not in free.tokens[1])
    decoder = Decoder(ours, make_cache(ours, 2), 2, eos_token_ids=(end,), pad_token_id=0, capture="eager")
    first = decoder.generate(ids, max_new_tokens=6)
    assert first.lengths[0] < first.lengths[1] == 6
    with pytest.raises(RuntimeError, match=r"expected reset\(\)"):
        decoder.generate(ids[:, :3], max_new_tokens=2)


def test_hybrid_report_and_sizes_name_the_layers_that_are_not_ours():
    ours, _ = models("gemma3_text")
    kinds = ours.config.layer_types
    cache = make_cache(ours)
    forward(ours, tokens_of(40), cache)
    forward(ours, tokens_of(1), cache)
    report = cache.budget_report()
    assert [layer.layer for layer in report.layers] == [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    assert report.others == {index: kind for index, kind in enumerate(kinds) if kind != "full_attention"}
    assert report.summary.endswith("1 sliding_attention layers are not Twilight's")
    assert "not Twilight's: sliding_attention, layers 0" in str(report)
    assert cache.nbytes()["others"] == 2 * 2 * (WINDOW + ROLLBACK + 1) * 64 * 4  # K and V, heads, slots, channels, bytes


def test_hybrid_layers_are_read_alike_whichever_transformers_describes_them(monkeypatch):
    from twilight_ops.integration.hf import cache

    config = models("gemma3n_text")[0].config
    expected, (types, settings) = cache.read_layers(config, MAX_CACHE_LEN), cache.get_layer_types_and_kwargs(config)
    if len(types) == config.num_hidden_layers:
        pytest.skip("this transformers describes layers that share K and V as since 5.24, and all tests of them run so")
    modes = ["store"] * len(types) + ["reuse"] * (config.num_hidden_layers - len(types))

    def since_5_24(config):
        types = ["dummy" if mode == "reuse" else kind for kind, mode in zip(config.layer_types, config.kv_sharing_modes, strict=True)]
        return types, [settings if "sliding" in kind else {} for kind in types]

    monkeypatch.setattr(cache, "get_layer_types_and_kwargs", since_5_24)
    config.kv_sharing_modes = modes
    assert cache.read_layers(config, MAX_CACHE_LEN) == expected
    config.kv_sharing_modes = ["reuse", *modes[1:]]
    with pytest.raises(ValueError, match="kv_sharing_modes: expected layers without K and V of their own at the end, got gemma3n_text"):
        cache.read_layers(config, MAX_CACHE_LEN)


def test_hybrid_a_model_of_windows_alone_says_that_nothing_is_pruned():
    ours, _ = models("mistral")
    with pytest.warns(UserWarning, match="expected a model with layers of full attention, got none: nothing is pruned"):
        cache = TwilightCache(ours.config, EXACT, 1, MAX_CACHE_LEN)
    assert cache.budget_report().layers == []


def test_hybrid_an_override_of_a_layer_that_is_not_ours_is_refused():
    ours, _ = models("gemma3_text")
    config = TwilightConfig(overrides={0: LayerOverride(top_p=0.5)})
    with pytest.raises(ValueError, match=r"overrides: expected layers of full attention, \[1\], got 0"):
        make_cache(ours, config=config)


def test_hybrid_overrides_go_by_the_number_of_the_layer_in_its_model():
    ours, _ = models("gemma3_text")
    cache = make_cache(ours, config=TwilightConfig(overrides={1: LayerOverride(top_p=0.5)}))
    forward(ours, tokens_of(20), cache)
    assert [layer.plan.top_p for layer in cache.paged.layers] == [0.5]


CAP = 0.5  # the tiny model's logits are small


def capped_model(implementation="twilight"):
    """Gemma 2, tiny, with heavier logits and a cap that changes them."""
    model = models_table.make_model(models_table.families()["gemma2"], implementation)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = CAP
        layer.self_attn.q_proj.weight.data.mul_(20.0)
        layer.self_attn.k_proj.weight.data.mul_(20.0)
    return model


def test_hybrid_capped_layers_give_the_logits_of_transformers_at_p_1_and_not_those_of_uncapped_ones():
    ours, theirs, uncapped = capped_model(), capped_model("eager"), capped_model("eager")
    for layer in uncapped.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    ids = tokens_of(60, batch=2)
    caches = [make_cache(ours, 2, config=config) for config in (EXACT, TwilightConfig(ShadowPrefix(512), 1.0, dense_below=0))]
    oracle, other = (DynamicCache(config=model.config) for model in (theirs, uncapped))
    for part in (ids[:, :40], *ids[:, 40:].split(1, dim=1)):
        want, far = forward(theirs, part, oracle), forward(uncapped, part, other)
        assert (want - far).abs().max() > 0.05 * want.std()
        for cache in caches:
            assert_same(forward(ours, part, cache), want)


def test_hybrid_capped_layers_are_pruned_and_attend_to_what_they_keep_with_the_cap():
    ours = capped_model()
    layer = ours.config.layer_types.index("full_attention")
    outputs, seen = [], []
    ours.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    buffers = torch.full((1, 2, MAX_CACHE_LEN), -1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)

    def recorder(*step, softcap):
        seen.append((*step, softcap))
        return buffers

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing says that nothing is pruned
        config = TwilightConfig(Full(), 0.5, dense_below=0, sink_tokens=0, recent_tokens=4)
        cache = TwilightCache(ours.config, config, 1, MAX_CACHE_LEN, recorder=recorder)
    forward(ours, tokens_of(100), cache)
    forward(ours, tokens_of(1), cache)
    report = cache.budget_report()
    assert [found.layer for found in report.layers] == [layer]
    assert report.others == {1 - layer: "sliding_attention"}
    assert all(0.1 < head.pruned < 0.9 and head.dense == 0 for head in report.layers[0].heads)
    q, paged, table, lens, scale, softcap = seen[-1]
    assert softcap == CAP
    k, v = (pages.transpose(0, 1).flatten(1, 2)[None, :, :101] for pages in paged.kv)
    visible = torch.zeros(1, 2, 1, MAX_CACHE_LEN + 1, dtype=torch.bool)
    visible.scatter_(3, buffers[0].long()[:, :, None].where(buffers[0][:, :, None] >= 0, MAX_CACHE_LEN), True)
    expected = oracle(q.transpose(1, 2), k, v, visible[..., :101].repeat_interleave(2, 1), Scores(scale, CAP))
    assert (outputs[-1].view(4, 64) - expected[0, :, 0]).abs().max() < 1e-5
    # Estimates are of capped logits: what is kept holds about half of the true weight, and would hold more without the cap.
    weights = exact_weights(q, paged, table, lens, scale, softcap).unflatten(1, (2, 2))[..., :MAX_CACHE_LEN]
    held = (weights * visible[:, :, :, :MAX_CACHE_LEN]).sum(-1)
    assert 0.45 < held.min() and (buffers[1] > 20).all()


def oracle(q, k, v, visible, scores):
    """fp64."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = q.double() @ k.transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    weights = logits.masked_fill(~visible, -torch.inf).exp()
    sinks = 0.0 if scores.sinks is None else scores.sinks.double().exp()[None, :, None, None]
    return weights @ v / (weights.sum(-1, keepdim=True) + sinks)


SINKS = torch.tensor([0.3, -2.0, 1.0, 2.0])


@pytest.mark.parametrize("scores", [Scores(0.2), Scores(0.2, 1.5), Scores(0.2, None, SINKS), Scores(0.2, 1.5, SINKS)], ids=str)
@pytest.mark.parametrize("window", [None, Window(50), Window(50, chunked=True)], ids=str)
def test_hybrid_a_run_in_blocks_of_rows_is_the_oracle(scores, window):
    generator = torch.Generator().manual_seed(0)
    past, tokens = 30, 600
    q = torch.randn(2, 4, tokens, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, past + tokens, 16, generator=generator)
    got = attend_run(q, k, v, past, scores, window)
    visible = sees(window, torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens))
    expected = oracle(q, k, v, visible, scores)
    assert (got - expected).abs().max() < 1e-5
    assert (attend_masked(q, k, v, visible[None, None], scores) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("window", [Window(5), Window(5, chunked=True)], ids=str)
def test_hybrid_a_ring_holds_what_the_window_shows(window):
    ring = Ring(window, torch.zeros(2, 1, 5 + ROLLBACK + 1, 1), torch.zeros(2, 1, 5 + ROLLBACK + 1, 1))
    positions = torch.arange(200).expand(2, -1).float()
    for begin, end in ((0, 90), (90, 91), (91, 99), (99, 200)):
        part = positions[:, begin:end]
        ring.write(part[:, None, :, None], part[:, None, :, None], part.long(), torch.tensor([end, end]))
        held = ring.held(torch.tensor([end, end]))
        stored = ring.keys[:, 0, : ring.slots, 0].long()
        assert torch.equal(torch.where(held >= 0, stored, held), held)
        assert sees(window, torch.tensor(end - 1), held).sum(1).tolist() == [min(end, end - max(0, window.first(end - 1)))] * 2


def test_hybrid_sinks_leave_the_kept_sets_alone_and_take_their_share_of_what_is_kept():
    """p is a share of the tokens' weight alone; the sink is one more term of the denominator over what was kept."""
    model, _ = models("gpt_oss")
    layer = model.config.layer_types.index("full_attention")
    attention = model.model.layers[layer].self_attn
    kept, seen, outputs = [], [], []
    attention.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    for sinks in (SINKS, SINKS - 1e4):
        attention.sinks.data.copy_(sinks)
        buffers = torch.full((1, 2, MAX_CACHE_LEN), -1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)

        def recorder(*step, buffers=buffers):
            seen.append(step)
            return buffers

        config = TwilightConfig(ShadowPrefix(token_budget=32), 0.8, dense_below=0, sink_tokens=0, recent_tokens=4)
        cache = make_cache(model, config=config, recorder=recorder)
        forward(model, tokens_of(100), cache)
        forward(model, tokens_of(1), cache)
        kept.append(buffers)
        q, paged, _, _, scale = seen[-1]
        k, v = (pages.transpose(0, 1).flatten(1, 2)[None, :, :101] for pages in paged.kv)
        visible = torch.zeros(1, 2, 1, MAX_CACHE_LEN + 1, dtype=torch.bool)
        visible.scatter_(3, buffers[0].long()[:, :, None].where(buffers[0][:, :, None] >= 0, MAX_CACHE_LEN), True)
        expected = oracle(q.transpose(1, 2), k, v, visible[..., :101].repeat_interleave(2, 1), Scores(scale, None, sinks))
        assert (outputs[-1].view(4, 64) - expected[0, :, 0]).abs().max() < 1e-5
    assert torch.equal(kept[0][0], kept[1][0]) and (kept[0][1] < 101).all()


GEMMA = Path(os.environ.get("TWILIGHT_GEMMA3_270M", "gemma3_270m"))


@pytest.mark.skipif(
    not (GEMMA / "model.gguf").exists(),
    reason=f"no {GEMMA}/model.gguf (TWILIGHT_GEMMA3_270M names its folder): examples/gemma3_needle.py fetches it",
)
def test_hybrid_gemma3_270m_finds_a_number_among_two_thousand_tokens():
    example = Path(__file__).parents[1] / "examples" / "gemma3_needle.py"
    done = subprocess.run([sys.executable, str(example), str(GEMMA.resolve()), "--tokens", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 sliding_attention layers are not Twilight's" in done.stdout
