"""Lossless decoding: whatever is drafted, tokens and cache are those of dense attention, and draws are distributed as its own."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from torch._dynamo.backends.registry import lookup_backend  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from twilight_ops import DoubleSparsity, Full, PageMean, Quest, ShadowPrefix, TwilightConfig  # noqa: E402
from twilight_ops.decode_step import append  # noqa: E402
from twilight_ops.integration import Decoder, LosslessDecoder, Sampling, Speculation, TwilightCache, generate  # noqa: E402
from twilight_ops.integration.compile import regions  # noqa: E402
from twilight_ops.integration.hf.speculate import Acceptance, best_length, judge, look_up  # noqa: E402
from twilight_ops.layer import PagedKVLayer  # noqa: E402

loop = sys.modules["twilight_ops.integration.hf.generate"]  # the package's `generate` is the function
LAYERS = 2
LENGTHS = (75, 40, 18)
BATCH = len(LENGTHS)
NEW = 40
ROOM = 160
# So little is kept that drafts are often wrong.
FEW = {"top_p": 0.6, "dense_below": 0, "sink_tokens": 1, "recent_tokens": 2}
SELECTORS = {
    "full": Full(),
    "quest": Quest(token_budget=24),
    "page_mean": PageMean(token_budget=24),
    "shadow_prefix": ShadowPrefix(token_budget=8),
    "double_sparsity": DoubleSparsity(token_budget=8, label_dtype="int8"),
}
DENSE = TwilightConfig(Full(), dense_layers=LAYERS)


def make_model(vocabulary=97, dtype=torch.float32):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "twilight"
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompts(lengths=LENGTHS, seed=2):
    """Ids and mask [B, T] of prompts that repeat themselves, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for b, length in enumerate(lengths):
        ids[b, -length:] = torch.randint(1, 97, (12,), generator=generator).repeat(length // 12 + 1)[:length]
    return ids, (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()


def new_cache(model, config, batch=BATCH):
    return TwilightCache(model.config, config, max_batch_size=batch, max_cache_len=ROOM, device="cpu", dtype=model.dtype)


def dense_run(model, ids, mask, new=NEW, **kwargs):
    cache = new_cache(model, DENSE, len(ids))
    decoder = Decoder(model, cache, len(ids), eos_token_ids=kwargs.pop("eos", ()), capture="eager")
    return decoder.generate(ids, mask, max_new_tokens=new), cache


def lossless(model, selector="shadow_prefix", speculation=4, batch=BATCH, eos=(), capture="eager", **kwargs):
    cache = new_cache(model, TwilightConfig(SELECTORS[selector], **FEW), batch)
    return LosslessDecoder(model, cache, batch, eos_token_ids=eos, capture=capture, speculation=speculation, **kwargs), cache


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_greedy_tokens_and_the_cache_are_those_of_dense_decoding(model, selector, drafts):
    ids, mask = prompts()
    expected, reference = dense_run(model, ids, mask)
    decoder, cache = lossless(model, selector, Speculation(drafts, adapt=False))
    found = decoder.generate(ids, mask, max_new_tokens=NEW)
    assert torch.equal(found.tokens, expected.tokens)
    assert 0 < found.drafts.accepted < found.drafts.drafted
    assert found.drafts.new == BATCH * (NEW - 1)
    assert torch.equal(cache.live_seq_lens, reference.live_seq_lens)
    assert int(cache.get_seq_length()) == int(reference.get_seq_length())
    # The next token computes bounds and means of the page that refused drafts have left anew.
    for held in (cache, reference):
        with torch.no_grad():
            model(expected.tokens[:, -1:], position_ids=held.live_seq_lens[:, None].long(), past_key_values=held)
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        check_layer(cache, ours.paged, theirs.paged)


def check_layer(cache: TwilightCache, layer: PagedKVLayer, dense: PagedKVLayer) -> None:
    """K and V are those of dense decoding, and whatever is made of K is what one append of all of it makes."""
    table, lens = cache.live_page_table, cache.live_seq_lens
    slots = torch.arange(ROOM)
    live = slots < lens[:, None]  # [B, N]

    def rows(pages):
        return pages[table.long()].transpose(2, 3).flatten(1, 2)  # [B, N, Hkv, D]

    checked = slots < lens[:, None] - 1  # all but the last token, which came by a sparse step
    for ours, theirs in zip(layer.kv, dense.kv, strict=True):
        torch.testing.assert_close(rows(ours)[checked], rows(theirs)[checked], atol=1e-3, rtol=1e-3)
    state = {f"{name} {field}": getattr(group, field) for name in ("shadow", "bounds", "means")
             if (group := getattr(layer, name)) is not None for field in group._fields if getattr(group, field) is not None}  # fmt: skip
    state |= layer.selector_state
    before = {name: tensor.clone() for name, tensor in state.items()}
    k, v = rows(layer.kv.k_cache).clone(), rows(layer.kv.v_cache).clone()
    append(k, v, layer, table, lens, torch.where(live, slots, -1).int())
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_drafts_from_the_prompt_give_the_tokens_of_dense_decoding(model):
    ids, mask = prompts()
    expected, _ = dense_run(model, ids, mask)
    decoder, _ = lossless(model, speculation=Speculation(5, source="prompt"))
    found = decoder.generate(ids, mask, max_new_tokens=NEW)
    assert torch.equal(found.tokens, expected.tokens)
    assert 0 < found.drafts.accepted < found.drafts.drafted
    assert found.steps < NEW - 1


@pytest.mark.parametrize("source", ["sparse", "prompt"])
def test_a_sequence_ends_at_its_end_token_and_streams_what_it_returns(model, source):
    ids, mask = prompts()
    free, _ = dense_run(model, ids, mask)
    eos = (int(free.tokens[0, 9]), int(free.tokens[1, 21]))
    expected, _ = dense_run(model, ids, mask, eos=eos)
    decoder, cache = lossless(model, speculation=Speculation(6, source=source), eos=eos)
    for every in (1, 30):
        cache.reset()
        runs: list[torch.Tensor] = []
        found = decoder.generate(ids, mask, max_new_tokens=NEW, on_tokens=runs.append, steps_between_checks=every)
        assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.lengths, expected.lengths)
        assert torch.equal(torch.cat(runs, 1), expected.tokens)
        assert cache.live_seq_lens.tolist() == (mask.sum(1) + expected.lengths - 1).tolist()


@pytest.mark.parametrize("new", [1, 2, 3, 9])
def test_a_call_gives_as_many_tokens_as_were_asked_for(model, new):
    ids, mask = prompts()
    expected, _ = dense_run(model, ids, mask, new=new)
    decoder, _ = lossless(model, speculation=7)
    assert torch.equal(decoder.generate(ids, mask, max_new_tokens=new).tokens, expected.tokens)


@pytest.mark.parametrize("source", ["sparse", "prompt"])
def test_a_second_turn_goes_on_where_the_first_ended(model, source):
    ids, mask = prompts()
    more = torch.randint(1, 97, (BATCH, 11), generator=torch.Generator().manual_seed(9))
    reference = new_cache(model, DENSE)
    dense = Decoder(model, reference, BATCH, eos_token_ids=(), capture="eager")
    decoder, _ = lossless(model, speculation=Speculation(5, source=source))
    turns = []
    for each in (dense, decoder):
        first = each.generate(ids, mask, max_new_tokens=10).tokens
        second = each.generate(torch.cat([first[:, -1:], more], 1), max_new_tokens=20).tokens
        turns.append(torch.cat([first, second], 1))
    assert torch.equal(*turns)


@pytest.mark.filterwarnings("error:compile_regions")
@pytest.mark.parametrize("in_regions", [False, True])
def test_two_compiled_graphs_serve_every_draft_length(model, monkeypatch, in_regions):
    ids, mask = prompts()
    expected, _ = dense_run(model, ids, mask)
    torch._dynamo.reset()
    fast = lookup_backend("aot_eager")
    monkeypatch.setattr(regions, "lookup_backend", lambda _: fast)
    monkeypatch.setattr(loop, "lookup_backend", lambda _: regions.compile_regions if in_regions else fast)
    decoder, _ = lossless(model, speculation=7, capture="compile")
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = decoder.generate(ids, mask, max_new_tokens=NEW)
    torch._dynamo.reset()
    assert torch.equal(found.tokens, expected.tokens)
    assert (found.graphs, found.breaks, found.recompiles) == (2, 0, 0)
    # Not every round drafted all seven.
    assert found.drafts.drafted < 7 * found.drafts.rounds


def test_checks_are_no_sparse_steps_of_the_budget_report(model):
    ids, mask = prompts()
    decoder, cache = lossless(model, speculation=Speculation(3, adapt=False))
    found = decoder.generate(ids, mask, max_new_tokens=NEW)
    rounds = found.steps // 4
    assert all(head.calls == 3 * rounds * BATCH for layer in cache.budget_report().layers for head in layer.heads)


def chi_square(counts: torch.Tensor, probability: torch.Tensor) -> float:
    """Standard deviations that the statistic lies above its mean; cells too rare for it are one."""
    expected = probability.double() * counts.sum()
    common = expected >= 10
    observed = torch.cat([counts[common].double(), counts[~common].sum()[None].double()])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return (float(((observed - expected) ** 2 / expected).sum()) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("certain", [False, True])
def test_judged_drafts_are_distributed_as_the_target(certain):
    torch.manual_seed(3)
    rows, drafts, words = 60_000, 2, 5
    target = torch.randn(drafts + 1, words).softmax(-1)
    draft = torch.randn(drafts, words).softmax(-1)
    draft[0, 2] = 0.0
    guesses = torch.stack([row.multinomial(rows, True) for row in draft], 1)
    tables = target.expand(rows, -1, -1), None if certain else (draft / draft.sum(-1, keepdim=True)).expand(rows, -1, -1)
    known = torch.ones(rows, drafts, dtype=torch.bool)
    known[: rows // 3, 1] = False
    tokens, accepted = judge(*tables, guesses, known)
    assert int(accepted[: rows // 3].max()) == 1 and int(accepted.max()) == 2
    for place in range(drafts + 1):
        reached = tokens[accepted >= place, place]
        assert abs(chi_square(reached.bincount(minlength=words), target[place])) < 4.5
    both = tokens[accepted >= 1]
    pairs = (both[:, 0] * words + both[:, 1]).bincount(minlength=words**2)
    first = both[:, 0].bincount(minlength=words) / len(both)
    assert abs(chi_square(pairs, (first[:, None] * target[1]).flatten())) < 4.5


@pytest.mark.parametrize("source", ["sparse", "prompt"])
def test_sampled_tokens_are_distributed_as_dense_attention_draws_them(source):
    words, rows, new = 6, 3000, 3
    model = make_model(vocabulary=words)
    model.lm_head.weight.data.mul_(0.3)
    prompt = torch.randint(0, words, (1, 30), generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=0.8, top_p=0.97)
    config = TwilightConfig(ShadowPrefix(token_budget=8), **FEW)
    cache = TwilightCache(model.config, config, max_batch_size=rows, max_cache_len=48, device="cpu", dtype=model.dtype)
    speculation = Speculation(2, source=source, adapt=False)
    decoder = LosslessDecoder(model, cache, rows, sampling, eos_token_ids=(), capture="eager", speculation=speculation)
    counts = torch.zeros(words**new, dtype=torch.int64)
    torch.manual_seed(11)
    for _ in range(2):
        cache.reset()
        found = decoder.generate(prompt.expand(rows, -1), max_new_tokens=new)
        assert 0 < found.drafts.accepted < found.drafts.drafted
        counts += (found.tokens * torch.tensor([words**2, words, 1])).sum(1).bincount(minlength=words**new)
    every = torch.tensor(list(itertools.product(range(words), repeat=new)))
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(every), -1), every], 1)).logits[:, 29 : 29 + new]
    probability = sampling.probabilities(logits).gather(2, every[..., None])[..., 0].prod(1)
    assert abs(chi_square(counts, probability)) < 4.5


def test_look_up_finds_the_longest_match_and_of_equals_the_newest():
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(0, 4, (40, 30), generator=generator)
    history[:4] = torch.arange(30)
    history[4:8, 10:20] = -1
    last = torch.randint(0, 30, (40,), generator=generator)
    drafts, found = look_up(history, last, 4, 3)
    for row, end, guess, any_found in zip(history.tolist(), last.tolist(), drafts.tolist(), found.tolist(), strict=True):
        best = (0, 0)
        for slot in range(end):
            length = 0
            while length < 3 and slot >= length and row[slot - length] == row[end - length] >= 0:
                length += 1
            best = max(best, (length, slot))
        assert any_found == (best[0] > 0)
        if any_found:
            assert guess == [max(0, row[best[1] + 1 + i % (end - best[1])]) for i in range(4)]


def test_rounds_draft_fewer_where_fewer_are_accepted():
    assert [best_length(rate, 0.4, 7) for rate in (0.0, 0.5, 0.8, 0.95, 1.0)] == [1, 1, 2, 6, 7]
    assert best_length(0.8, 0.1, 7) > best_length(0.8, 0.8, 7)
    recent = Acceptance()
    assert recent.after(0, 0) == 1.0
    rates = [recent.after(0, 3) for _ in range(6)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.05
    assert recent.after(100, 0) > 0.8


def test_generate_speculates_where_it_is_told_to(model):
    ids, _ = prompts((40,))
    config = TwilightConfig(SELECTORS["shadow_prefix"], **FEW)
    expected = generate(model, ids, DENSE, max_new_tokens=20, eos_token_ids=(), capture="eager")
    assert expected.drafts is None
    for speculate in (3, Speculation(2, source="prompt")):
        found = generate(model, ids, config, max_new_tokens=20, eos_token_ids=(), capture="eager", speculate=speculate)
        assert torch.equal(found.tokens, expected.tokens)
        assert found.drafts.tokens_per_round == found.drafts.new / found.drafts.rounds >= 1
        assert found.drafts.accepted_per_round == found.drafts.accepted / found.drafts.rounds


def test_settings_and_caches_that_cannot_be_lossless_are_refused(model):
    for arguments, message in (
        ({"drafts": 0}, "Speculation: drafts: expected 1..7, got 0"),
        ({"drafts": 8}, "Speculation: drafts: expected 1..7, got 8"),
        ({"source": "tree"}, 'Speculation: source: expected "sparse" or "prompt", got \'tree\''),
        ({"adapt": 1}, "Speculation: adapt: expected True or False, got 1"),
        ({"ngram": 0}, "Speculation: ngram: expected 1..8, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Speculation(**arguments)
    from transformers import StaticCache

    with pytest.raises(ValueError, match="speculate: expected full attention of a TwilightCache in every layer, got Static"):
        LosslessDecoder(model, StaticCache(config=model.config, max_cache_len=64))
    decoder, cache = lossless(model, speculation=7, batch=1)
    with pytest.raises(ValueError, match=r"prompt and new tokens and 7 drafts to fit max_cache_len = 160, got 75 \+ 79 = 154"):
        decoder.generate(prompts((75,))[0], max_new_tokens=79)
    assert not cache.filled
    decoder.generate(prompts((75,))[0], max_new_tokens=78)


def test_a_step_that_fails_leaves_the_cache_to_plain_decoding(model):
    decoder, cache = lossless(model, speculation=3, batch=1)

    def broken(*_):
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(lambda *_: broken() if cache.sequences.verifies else None)
    try:
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(prompts((40,))[0], max_new_tokens=9)
    finally:
        handle.remove()
    assert not cache.sequences.verifies
    assert cache.live_seq_lens.tolist() == [40]


def test_the_example_says_that_its_tokens_are_those_of_dense_attention():
    path = Path(__file__).resolve().parents[1] / "examples" / "lossless.py"
    assert len(path.read_text().splitlines()) < 60
    more = ["--random-tiny", "--device", "cpu", "--capture", "eager", "--length", "300", "--new-tokens", "16", "--batch", "2"]
    done = subprocess.run([sys.executable, str(path), *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    dense, sparse, prompt = done.stdout.splitlines()
    assert re.fullmatch(r"dense: \d+\.\d tokens a second", dense)
    drafted = r"\d+\.\d tokens a second, \d\.\d\d of \d\.\d\d drafts a round accepted"
    for line, name in ((sparse, "sparse"), (prompt, "prompt")):
        assert re.fullmatch(rf"{name} drafts: {drafted}, tokens equal to dense: \[16, 16\] of 16", line)


def test_in_bf16_every_token_is_the_likeliest_up_to_rounding():
    """Which of two almost equal words comes may differ from dense decoding; that it is one of them may not."""
    model = make_model(dtype=torch.bfloat16)
    ids, mask = prompts((60,))
    decoder, _ = lossless(model, speculation=Speculation(5, adapt=False), batch=1)
    found = decoder.generate(ids, mask, max_new_tokens=NEW)
    exact = make_model(dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    for attention in (model, exact):
        attention.set_attn_implementation("eager")  # PyTorch's sdpa in bf16 asks for AVX-512 even where it is told to do without
    with torch.no_grad():
        logits, rounded = (each(torch.cat([ids, found.tokens], 1)).logits[:, 59:-1].double() for each in (exact, model))
    short = logits.amax(-1) - logits.gather(2, found.tokens[..., None])[..., 0]
    # Both words of a tie may be off by what dense attention itself is off; a step of few tokens rounds as often as a prompt does.
    assert short.max() <= 4 * (rounded - logits).abs().max()
    assert short.max() < logits.std()
