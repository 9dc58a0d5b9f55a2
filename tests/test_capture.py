"""A decode step is one graph: no breaks, no recompiles, no copies of the cache, two twilight operators a layer."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

pytest.importorskip("transformers")

from expecttest import assert_expected_inline  # noqa: E402
from torch._dynamo.backends.registry import lookup_backend  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs  # noqa: E402
from torch._dynamo.utils import ReinplaceCounters, counters  # noqa: E402
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM  # noqa: E402

from twilight_ops import Full, Quest, Selector, ShadowPrefix, TwilightConfig  # noqa: E402
from twilight_ops.integration import Decoder, TwilightCache  # noqa: E402
from twilight_ops.integration.compile.regions import compile_regions  # noqa: E402
from twilight_ops.integration.hf.generate import most_likely  # noqa: E402
from twilight_ops.selectors import Candidates  # noqa: E402

LAYERS = 2
PROMPT = 70
STEPS = 64
# Crossed by the growing lengths, 70 to 134, like pages (16 tokens).
DENSE_BELOW = 96


@dataclass(frozen=True)
class SinksAndWindow(Selector):
    """Somebody else's selector: the first and the newest tokens, through the "given" path of decode_attention."""

    name: ClassVar[str] = "sinks_and_window"
    sinks: int = 4

    def allocate(self, layer, previous):
        return {"steps": torch.zeros(1, dtype=torch.int64, device=layer.kv.k_cache.device)}

    def append(self, k, layer, page_table, seq_lens, positions):
        layer.selector_state["steps"].add_(1)

    def select(self, q, layer, page_table, seq_lens, sm_scale):
        slots = torch.arange(self.token_budget, device=q.device)
        window = seq_lens[:, None] - (self.token_budget - self.sinks) + (slots - self.sinks)
        tokens = torch.where((slots < self.sinks) | (seq_lens[:, None] <= self.token_budget), slots, window)
        counts = seq_lens.clamp(max=self.token_budget)
        tokens = torch.where(slots < counts[:, None], tokens, -1).int()
        kv_heads = layer.kv.k_cache.shape[1]
        return Candidates(tokens[:, None].repeat(1, kv_heads, 1), counts[:, None].repeat(1, kv_heads), 1)


FEW = {"sink_tokens": 2, "recent_tokens": 4}  # the defaults would keep whole sequences of this length
SELECTORS = {
    "dense": TwilightConfig(Full(), dense_layers=LAYERS, dense_below=DENSE_BELOW),
    "full": TwilightConfig(Full(), top_p=0.9, dense_layers=0, dense_below=DENSE_BELOW, **FEW),
    "quest": TwilightConfig(Quest(token_budget=48), top_p=0.9, dense_layers=1, dense_below=DENSE_BELOW, **FEW),
    "shadow_prefix": TwilightConfig(ShadowPrefix(token_budget=24), top_p=0.9, dense_layers=1, dense_below=DENSE_BELOW, **FEW),
    "third_party": TwilightConfig(SinksAndWindow(token_budget=40), top_p=0.9, dense_layers=0, dense_below=DENSE_BELOW, **FEW),
}


def make_model(num_hidden_layers=LAYERS):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "twilight"
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def prompt(batch=1):
    return torch.randint(1, 99, (batch, PROMPT), generator=torch.Generator().manual_seed(3))


def filled_cache(model, name, batch=1, recorder=None):
    cache = TwilightCache(model.config, SELECTORS[name], max_batch_size=batch, max_cache_len=256, recorder=recorder)
    with torch.no_grad():
        model(prompt(batch), past_key_values=cache)
    return cache


class Step:
    """A bare decode step of the model, apart from our own loop."""

    def __init__(self, model, cache, batch=1):
        self.model, self.cache = model, cache
        self.token = torch.ones(batch, 1, dtype=torch.long)
        self.position = torch.full((batch, 1), PROMPT)
        for tensor in (self.token, self.position):
            torch._dynamo.mark_static_address(tensor)

    @torch.no_grad()
    def __call__(self):
        logits = self.model(self.token, position_ids=self.position, past_key_values=self.cache).logits
        self.position.add_(1)
        self.token.copy_(logits.argmax(-1))
        return logits


def twilight_calls(graph):
    return [str(node.target) for node in graph.nodes if node.op == "call_function" and "twilight" in str(node.target)]


@pytest.mark.parametrize("name", SELECTORS)
def test_a_growing_decode_is_one_graph_without_breaks_recompiles_or_clones_of_the_cache(model, name):
    eager = Step(model, filled_cache(model, name))
    expected = [eager() for _ in range(STEPS)]
    step = Step(model, filled_cache(model, name))
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step.__call__, backend=backend, fullgraph=True, dynamic=False)
    # A cached graph would skip the pass that counts the clones.
    with torch._dynamo.config.patch(error_on_recompile=True), torch._inductor.config.patch(force_disable_caches=True):
        ReinplaceCounters.clear()
        logits = [compiled() for _ in range(STEPS)]
    assert backend.frame_count == 1
    assert dict(counters["graph_break"]) == {}
    assert dict(ReinplaceCounters._values) == {}
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-3, rtol=1e-3)
    assert torch.equal(step.token, eager.token)
    assert str(step.cache.budget_report()) == str(eager.cache.budget_report())
    if name == "third_party":
        assert [int(layer.paged.selector_state["steps"]) for layer in step.cache.layers] == [STEPS + 1] * LAYERS


@pytest.mark.parametrize("name", ["dense", "quest", "shadow_prefix", "third_party"])
def test_a_recorder_has_what_every_step_kept_eagerly_and_compiled(model, name):
    runs = []
    for backend in (None, "aot_eager"):
        buffers = [(torch.full((1, 2, 256), -1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)) for _ in range(LAYERS)]
        for tensor in (tensor for pair in buffers for tensor in pair):
            torch._dynamo.mark_static_address(tensor)
        step = Step(model, filled_cache(model, name, recorder=lambda q, layer, *_, buffers=buffers: buffers[layer.index]))
        call = step.__call__ if backend is None else torch.compile(step.__call__, backend=backend, fullgraph=True, dynamic=False)
        seen = [call() is not None and [tensor.clone() for pair in buffers for tensor in pair] for _ in range(STEPS)]
        for layer, counted in enumerate(step.cache.budget_report().layers):
            counts = torch.stack([tensors[2 * layer + 1][0] for tensors in seen]).double()  # [steps, Hkv]
            assert all(torch.equal((tensors[2 * layer] >= 0).sum(-1), tensors[2 * layer + 1].long()) for tensors in seen)
            assert [head.kept.mean for head in counted.heads] == pytest.approx(counts.mean(0).tolist())
        runs.append([tensor for tensors in seen for tensor in tensors])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*runs, strict=True))


def test_a_read_of_the_cache_before_its_mutation_would_be_caught(model):
    """The guard above sees what it is there for: a sum that the compiler sinks below the append makes it clone the cache."""
    from twilight_ops import Candidates, Paging, append_kv, attend_sparse

    layer = filled_cache(model, "dense").layers[0].paged
    table, lens = torch.arange(16, dtype=torch.int32)[None], torch.tensor([PROMPT], dtype=torch.int32)

    def wrong_order(k, v, q):
        total = layer.kv.k_cache.sum(0)
        append_kv(k, v, layer.kv, Paging(table, lens))
        out, _ = attend_sparse(q, layer.kv, Paging(table, lens), Candidates(), 0.125)
        return out + total.mean()

    ReinplaceCounters.clear()
    row = torch.randn(1, 1, 2, 64)
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        torch.compile(wrong_order, fullgraph=True)(row, row, torch.randn(1, 1, 4, 64))
    assert dict(ReinplaceCounters._values) != {}


def test_a_layer_is_two_twilight_nodes(model):
    targets = {}
    for name in SELECTORS:
        torch._dynamo.reset()
        recorder = EagerAndRecordGraphs()
        torch.compile(Step(model, filled_cache(model, name)).__call__, backend=recorder, fullgraph=True, dynamic=False)()
        assert len(recorder.graphs) == 1
        targets[name] = twilight_calls(recorder.graphs[0].graph)
    assert len({tuple(calls) for calls in targets.values()}) == 1
    assert_expected_inline(
        "\n".join(targets["quest"]),
        """\
twilight.append_kv.default
twilight.decode_attention.default
twilight.append_kv.default
twilight.decode_attention.default""",
    )


def test_our_own_step_has_the_same_two_nodes_a_layer(model):
    decoder = Decoder(model, filled_cache(model, "shadow_prefix"), capture="eager")
    decoder.position.fill_(PROMPT)
    recorder = EagerAndRecordGraphs()
    with torch.no_grad():
        torch.compile(decoder.step_eager, backend=recorder, fullgraph=True, dynamic=False)()
    assert Counter(twilight_calls(recorder.graphs[0].graph)) == {
        "twilight.append_kv.default": LAYERS,
        "twilight.decode_attention.default": LAYERS,
    }


@pytest.mark.parametrize("name, batch", [*((name, 1) for name in SELECTORS), ("shadow_prefix", 3)])
def test_model_generate_compiles_one_graph(model, name, batch):
    cache = TwilightCache(model.config, SELECTORS[name], max_batch_size=batch, max_cache_len=256)
    ids = prompt(batch)
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 1, do_sample=False, past_key_values=cache)
    expected = model.generate(ids, **kwargs)
    cache.reset()
    graphs = []

    # A function, because CompileConfig copies its backend deeply.
    def backend(graph, example_inputs):
        graphs.append(twilight_calls(graph.graph))
        return lookup_backend("inductor")(graph, example_inputs)

    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens = model.generate(ids, compile_config=config, **kwargs)
    assert [len(calls) for calls in graphs] == [2 * LAYERS]
    assert dict(counters["graph_break"]) == {}
    assert torch.equal(tokens, expected)
    assert cache.live_seq_lens.tolist() == [PROMPT + STEPS] * batch


def test_several_query_tokens_are_a_graph_of_their_own(model):
    cache = filled_cache(model, "quest")
    token, position = torch.ones(1, 4, dtype=torch.long), PROMPT + torch.arange(4)[None]
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda: model(token, position_ids=position, past_key_values=cache).logits, backend=backend, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled()
            position.add_(4)
    assert backend.frame_count == 1
    assert cache.live_seq_lens.tolist() == [PROMPT + 12]


def through_regions(model, name, batch=1, steps=STEPS):
    """(tokens, budget) of a decoder whose step `compile_regions` compiles."""
    torch._dynamo.reset()
    cache = TwilightCache(model.config, SELECTORS[name], max_batch_size=batch, max_cache_len=256)
    decoder = Decoder(model, cache, batch, eos_token_ids=(), capture="eager")
    decoder.step = torch.compile(decoder.step_eager, backend=compile_regions, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        generation = decoder.generate(prompt(batch), max_new_tokens=steps)
    return generation.tokens, str(cache.budget_report())


def through_eager(model, name, batch=1, steps=STEPS):
    cache = TwilightCache(model.config, SELECTORS[name], max_batch_size=batch, max_cache_len=256)
    tokens = Decoder(model, cache, batch, eos_token_ids=(), capture="eager").generate(prompt(batch), max_new_tokens=steps).tokens
    return tokens, str(cache.budget_report())


@pytest.mark.filterwarnings("error:compile_regions")  # it says so where it compiles the step as one
@pytest.mark.parametrize("name, batch", [("dense", 1), ("shadow_prefix", 1), ("third_party", 1), ("quest", 3)])
def test_a_step_compiled_in_regions_decodes_and_keeps_what_eager_does(model, name, batch):
    tokens, budget = through_regions(model, name, batch)
    expected_tokens, expected_budget = through_eager(model, name, batch)
    assert torch.equal(tokens, expected_tokens)
    assert budget == expected_budget


@pytest.mark.parametrize("width", [128, 640, 100])
def test_the_most_likely_token_is_argmax(width):
    logits = torch.randint(0, 30, (6, width), generator=torch.Generator().manual_seed(0)).float()
    logits[1], logits[2, width // 2] = float("-inf"), float("nan")
    assert torch.equal(most_likely(logits), logits.argmax(-1))
    assert torch.equal(most_likely(logits.bfloat16()), logits.bfloat16().argmax(-1))
