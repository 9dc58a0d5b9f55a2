"""A Llama of the 8B shape, four layers deep, generating inside CUDA graphs."""

import copy

import pytest
import torch
from torch._inductor import config as inductor_config
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig
from twilight_ops.integration import CapturedStep, LosslessDecoder, Sampling, Speculation, TwilightCache
from twilight_ops.integration.hf.generate import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPT = 600  # tokens
STEPS = 2000
DENSE_BELOW = 1000  # crossed by the growing sequence
SELECTORS = {
    "full": Full(),
    "quest": Quest(token_budget=256),
    "shadow_prefix": ShadowPrefix(token_budget=256, budget_fraction=0.0),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        initializer_range=0.03,
        attn_implementation="twilight",
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).bfloat16().eval()


def new_cache(model, selector, batch=1, room=PROMPT + STEPS + 64, **kwargs):
    config = TwilightConfig(selector=selector, top_p=0.9, dense_layers=1, dense_below=DENSE_BELOW)
    return TwilightCache(model.config, config, max_batch_size=batch, max_cache_len=room, device=model.device, dtype=model.dtype, **kwargs)


def prompt(batch=1, seed=0):
    return torch.randint(0, 32000, (batch, PROMPT), generator=torch.Generator().manual_seed(seed)).cuda()


def repeated(batch):
    """A prompt in which every run of tokens has been before, so that there is something to look up."""
    return prompt(batch)[:, :100].repeat(1, PROMPT // 100)


class KeptBuffers:
    """A recorder: every layer writes its kept positions to buffers that a graph can hold, made in the first step, which is not recorded."""

    def __init__(self):
        self.by_layer = {}

    def __call__(self, q, layer, page_table, seq_lens, sm_scale):
        if layer.index not in self.by_layer:
            heads = (q.shape[0], layer.num_kv_heads)
            kept = torch.full((*heads, page_table.shape[1] * layer.page_size), -1, dtype=torch.int32, device=q.device)
            self.by_layer[layer.index] = kept, torch.zeros(heads, dtype=torch.int32, device=q.device)
        return self.by_layer[layer.index]

    def tensors(self):
        return [tensor for buffers in self.by_layer.values() for tensor in buffers]


@pytest.mark.parametrize("name", SELECTORS)
def test_a_replayed_graph_keeps_and_says_what_eager_does_over_2000_steps(model, name):
    runs = []
    for capture in ("eager", "cuda_graph"):
        buffers = KeptBuffers()
        cache = new_cache(model, SELECTORS[name], recorder=buffers)
        decoder = Decoder(model, cache, eos_token_ids=(), capture=capture)
        if capture == "cuda_graph":
            # Eager and replayed runs must share every kernel around attention, or their roundings differ.
            decoder.step = CapturedStep(decoder.step_eager, model.device)
        snapshots = []

        def note(tokens, snapshots=snapshots, buffers=buffers):
            snapshots.append([tensor.clone() for tensor in buffers.tensors()])

        generation = decoder.generate(prompt(), max_new_tokens=STEPS, on_tokens=note, steps_between_checks=100)
        counters = torch.stack([layer.paged.budget_counters for layer in cache.layers])
        runs.append((generation.tokens, snapshots, counters))
    (eager_tokens, eager_kept, eager_counters), (tokens, kept, counters) = runs
    assert torch.equal(tokens, eager_tokens)
    assert len(kept) == len(eager_kept) > 10
    for step, (a, b) in enumerate(zip(kept, eager_kept, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), f"kept sets differ at snapshot {step}"
    assert torch.equal(counters, eager_counters)


@pytest.mark.parametrize("name", SELECTORS)
def test_our_loop_is_one_graph_launch_a_step_without_waits_or_allocations(model, name):
    cache = new_cache(model, SELECTORS[name])
    decoder = Decoder(model, cache, eos_token_ids=())
    generation = decoder.generate(prompt(), max_new_tokens=16)
    assert (generation.capture, generation.graphs, generation.breaks, generation.recompiles) == ("cuda_graph", 1, 0, 0)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    steps = 64
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            decoder.step()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("cudaGraphLaunch", 0) == steps
    # The profiler itself waits for the device once when it stops.
    assert calls.get("cudaStreamSynchronize", 0) == 0 and calls.get("cudaEventSynchronize", 0) == 0
    assert calls.get("cudaDeviceSynchronize", 0) <= 1
    assert calls.get("cudaMalloc", 0) == 0 and calls.get("cudaMemcpyAsync", 0) == 0 and calls.get("cudaLaunchKernel", 0) == 0
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


def test_after_reset_the_same_graph_serves_a_new_prompt(model):
    cache = new_cache(model, SELECTORS["shadow_prefix"])
    decoder = Decoder(model, cache, eos_token_ids=())
    decoder.generate(prompt(seed=1), max_new_tokens=32)
    graph = decoder.captured.graph
    cache.reset()
    again = decoder.generate(prompt(seed=2), max_new_tokens=32)
    fresh = Decoder(model, new_cache(model, SELECTORS["shadow_prefix"]), eos_token_ids=()).generate(prompt(seed=2), max_new_tokens=32)
    assert decoder.captured.graph is graph and graph is not None
    assert again.graphs == 1 and again.recompiles == 0
    assert torch.equal(again.tokens, fresh.tokens)


@pytest.mark.parametrize("name", SELECTORS)
@inductor_config.patch({"triton.cudagraph_or_error": True})
def test_generate_of_transformers_compiles_with_cuda_graphs_or_fails(model, name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = new_cache(model, SELECTORS[name])
    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    with torch.no_grad():
        out = model.generate(
            prompt(),
            past_key_values=cache,
            max_new_tokens=64,
            do_sample=False,
            compile_config=compile_config,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert out.shape[1] == PROMPT + 64
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_p_1_and_full_budget_give_the_greedy_tokens_of_sdpa(model):
    cache = TwilightCache(model.config, TwilightConfig(selector=Full(), top_p=1.0, dense_layers=0, dense_below=0), 1, PROMPT + 80)
    twilight = Decoder(model, cache, eos_token_ids=(), capture="eager")
    ours = twilight.generate(prompt(), max_new_tokens=32).tokens
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            theirs = model.generate(prompt(), max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[:, PROMPT:]
    finally:
        model.set_attn_implementation("twilight")
    # bf16 logits tie or nearly tie now and then; after the first such token the texts may part.
    assert (ours == theirs).long().cumprod(1).sum() >= 8


@pytest.mark.parametrize("source", ["sparse", "prompt"])
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8)])
def test_recorded_rounds_give_the_tokens_of_eager_ones(model, source, sampling):
    runs = []
    for recorded in (False, True):
        cache = new_cache(model, SELECTORS["shadow_prefix"], batch=2)
        decoder = LosslessDecoder(model, cache, 2, sampling, (), capture="eager", speculation=Speculation(4, source=source))
        if recorded:  # every kernel around attention is the eager one
            decoder.captured = CapturedStep(decoder.step_eager, model.device)
            decoder.captured_draft = CapturedStep(decoder.draft_eager, model.device)
        torch.manual_seed(0)
        runs.append(decoder.generate(repeated(2), max_new_tokens=200))
    assert runs[0].drafts.drafted > 0
    # Replays draw other numbers than eager calls do.
    assert sampling is not None or (torch.equal(runs[0].tokens, runs[1].tokens) and runs[0].drafts == runs[1].drafts)


@pytest.mark.parametrize("source", ["sparse", "prompt"])
def test_lossless_tokens_are_the_likeliest_of_dense_attention_up_to_rounding(model, source):
    cache = new_cache(model, SELECTORS["quest"], batch=2)
    decoder = LosslessDecoder(model, cache, 2, eos_token_ids=(), speculation=Speculation(5, source=source))
    found = decoder.generate(prompt(2), max_new_tokens=500)
    assert (found.capture, found.breaks, found.recompiles) == ("cuda_graph", 0, 0)
    text = torch.cat([prompt(2), found.tokens], 1)
    model.set_attn_implementation("sdpa")
    try:
        exact_model = copy.deepcopy(model).float()
        with torch.no_grad():
            rounded, exact = (m(text).logits[:, PROMPT - 1 : -1].float() for m in (model, exact_model))
    finally:
        model.set_attn_implementation("twilight")
    short = exact.amax(-1) - exact.gather(2, found.tokens[..., None])[..., 0]
    error = (rounded - exact).abs().max()
    print(f"{source}: {found.drafts}, {(short > 0).sum()} of {short.numel()} not the likeliest, short by {short.max():.4f} ({error:.4f})")
    # Two words whose logits each carry that error, from a step that rounds otherwise than the whole text does.
    assert short.max() <= 4 * error
    assert short.max() < exact.std()
