"""The example of a selector with a Triton kernel of its own: its operator, its state, and the steps that capture it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from test_selectors import KV_HEADS, PAGE, SCALE, keys_values, left_padded, make_cache, query
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import custom_selector
import triton
from custom_selector import PageBalls, page_scores, plain
from triton.backends.compiler import GPUTarget

from twilight_ops import TwilightConfig, backends
from twilight_ops.capacity import COUNTER_CANDIDATES, COUNTER_LIVE
from twilight_ops.decode_step import append, attend
from twilight_ops.integration import CapturedStep, TwilightCache, generate
from twilight_ops.integration.hf.generate import Decoder

HAS_GPU = backends.CUDA.name != "none" and torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if HAS_GPU else [])]
LENS = [0, 1, 15, 16, 17, 150]


def scored(dtype: torch.dtype, head_dim: int = 64, query_tokens: int = 2, page: int = 16, device: str = "cpu", whole: bool = False):
    """Arguments of `page_scores`: 6 query heads on 2 KV heads, 70 pages a sequence, holes in the table; `whole`: every sum is exact."""
    rng = torch.Generator().manual_seed(1)
    lens = torch.tensor([0, 1, page, 69 * page + 1, 70 * page], dtype=torch.int32)
    table = torch.randint(0, 90, (len(lens), 70), generator=rng, dtype=torch.int32)
    table[3, 5] = table[4, 40] = -1
    q = torch.randn(len(lens), query_tokens, 6, head_dim, generator=rng)
    centers, radii = torch.randn(91, 2, head_dim, generator=rng), torch.rand(91, 2, generator=rng) * 8
    if whole:
        q, centers, radii = q.sign(), centers.mul(4).round(), radii.round()
    tensors = (q.to(dtype), centers.to(dtype), radii, table, lens)
    return *(tensor.to(device) for tensor in tensors), page, 0.5


def oracle(q, centers, radii, table, lens, page, reach):
    """Scores in fp64, and the same sum of absolute values."""
    query, center, radius = q.double().unflatten(2, (2, -1)), centers[table.long()].double(), radii[table.long()].double()
    around = reach * torch.einsum("bthg,bmh->bthgm", query.square().sum(-1).sqrt(), radius)
    inside = torch.arange(table.shape[1], device=q.device) * page < lens[:, None, None]
    sums = (torch.einsum("bthgd,bmhd->bthgm", *pair) + around for pair in ((query, center), (query.abs(), center.abs())))
    return [values.amax((1, 3)).where(inside, -torch.inf) for values in sums]


def check_launch(launch, device: str = "cpu") -> None:
    """`launch` against the PyTorch branch: bit by bit where sums are exact, else both within what rounding in fp32 allows."""
    for dtype, head_dim, query_tokens, page in (torch.float16, 64, 2, 16), (torch.float32, 96, 1, 32), (torch.float16, 256, 3, 64):
        arguments = scored(dtype, head_dim, query_tokens, page, device)
        exact, largest = oracle(*arguments)
        for found in launch(*arguments), plain(*arguments):
            assert found.dtype == torch.float32 and torch.equal(found.isinf(), exact.isinf())
            finite = exact.isfinite()
            assert ((found - exact).abs() <= (head_dim + 8) * torch.finfo(torch.float32).eps * largest)[finite].all()
    for head_dim in (64, 256):
        arguments = scored(torch.float16, head_dim, device=device, whole=True)
        assert torch.equal(launch(*arguments), plain(*arguments))
    broken = scored(torch.float16, device=device)
    broken[0][4, 1, 0, 3] = broken[1][7, 1, 5] = torch.nan
    assert torch.equal(launch(*broken).isnan(), plain(*broken).isnan()) and plain(*broken).isnan().any()


def filled(selector, lens, cuts=(), device="cpu", **settings):
    """A cache that holds prompts of the lengths `lens`, appended in parts that end at `cuts` and at the end."""
    cache = make_cache(selector, lens, **settings)
    k, v = keys_values(lens)
    positions = left_padded(lens)
    for start, end in zip((0, *cuts), (*cuts, k.shape[1]), strict=True):
        part = positions[:, start:end].contiguous()
        for layer in cache.layers:
            append(k[:, start:end], v[:, start:end], layer, cache.page_table, (part[:, -1] + 1).int(), part)
    return cache, k


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_passes_opcheck(device):
    torch.library.opcheck(page_scores, scored(torch.float16, device=device, whole=True))


def test_the_gpu_branch_compiles_to_one_kernel_without_a_gpu(monkeypatch):
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))  # for which PyTorch asks what the kernel writes
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    graphs = []
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graphs.append(graph) or graph)
    *tensors, page, reach = scored(torch.float16)
    torch._dynamo.reset()
    with FakeTensorMode():
        arguments = *(torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors), page, reach
        torch.compile(page_scores, fullgraph=True, backend=backend)(*arguments)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    (kernel,) = (node for node in nodes if "triton_kernel_wrapper" in str(node.target))
    assert kernel.kwargs["tensors_to_clone"] == ["scores"]
    assert not [node for node in nodes if "page_scores" in str(node.target) or "einsum" in str(node.target)]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("budget", [{"token_budget": 40}, {"token_budget": 1, "budget_fraction": 0.25}], ids=str)
def test_a_list_is_ascending_unique_live_within_budget_and_holds_what_is_forced(budget, tokens):
    selector = PageBalls(**budget)
    cache, _ = filled(selector, LENS, sink_tokens=2, recent_tokens=5)
    indices, counts, unit = selector.select(query(len(LENS), tokens), cache.layers[0], cache.page_table, cache.seq_lens, SCALE)
    assert unit == PAGE and indices.dtype == counts.dtype == torch.int32
    assert ((indices >= 0) == (torch.arange(indices.shape[2]) < counts[..., None])).all()
    for length, lists, sizes in zip(LENS, indices, counts, strict=True):
        wanted = math.ceil(max(selector.token_budget, math.ceil(selector.budget_fraction * length)) / PAGE)
        forced = {t // PAGE for t in range(length) if t < 2 or t >= length - 5}
        for row, size in zip(lists, sizes.tolist(), strict=True):
            listed = row[:size].tolist()
            assert listed == sorted(set(listed)) and forced <= set(listed)
            assert size == min(max(wanted, len(forced)), -(-length // PAGE))


def test_with_the_whole_radius_a_score_bounds_every_logit_of_its_page():
    cache, k = filled(PageBalls(reach=1.0), [150, 33])
    q, state = query(2, 2), cache.layers[0].selector_state
    scores = page_scores(q, state["centers"], state["radii"], cache.page_table, cache.seq_lens, PAGE, 1.0)
    logits = torch.einsum("bthgd,bnhd->bthgn", q.unflatten(2, (KV_HEADS, -1)), k).amax((1, 3))  # [B, Hkv, N]
    for b, length in enumerate([150, 33]):
        for page, tokens in enumerate(logits[b, :, k.shape[1] - length :].split(PAGE, dim=-1)):
            assert (scores[b, :, page] >= tokens.amax(-1) * (1 - 1e-5)).all()


def test_state_depends_on_the_tokens_alone_not_on_how_they_came():
    whole, _ = filled(PageBalls(), [150, 90])
    parts, _ = filled(PageBalls(), [150, 90], cuts=(37, 147, 148, 149))
    again, _ = filled(PageBalls(), [150, 90])
    k, _ = keys_values([150, 90])
    for tokens in (torch.full_like(k[:, :20], 50.0), k[:, -20:]):  # the last 20 tokens, overwritten and written again
        append(tokens, tokens, again.layers[0], again.page_table, again.seq_lens)
    for cache in (parts, again):
        for name, tensor in cache.layers[0].selector_state.items():
            assert torch.equal(tensor[:-1], whole.layers[0].selector_state[name][:-1])


def test_a_compiled_step_captures_it_in_one_graph():
    cache, twin = (filled(PageBalls(token_budget=40), [30, 20], top_p=0.9)[0] for _ in range(2))

    def step(cache, q, k):
        cache.seq_lens.add_(1)
        append(k, k, cache.layers[0], cache.page_table, cache.seq_lens)
        return attend(q, cache.layers[0], cache.page_table, cache.seq_lens, SCALE)[0]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for i in range(20):
        q, k = query(2, seed=20 + i), keys_values([1, 1], seed=40 + i)[0]
        torch.testing.assert_close(compiled(cache, q, k), step(twin, q, k), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"PageBalls: reach: expected 0\.\.1, got 2"):
        PageBalls(reach=2)


def test_the_example_runs(capsys):
    custom_selector.main()
    assert capsys.readouterr().out.count("page_balls") == 8  # four layers of two KV heads


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device, or a PyTorch without CUDA")
def test_a_gpu_runs_the_kernel_and_one_graph_replays_it_in_generate():
    check_launch(page_scores, "cuda")
    model = custom_selector.tiny_model().half()
    prompt = torch.randint(0, 1000, (1, 600), device="cuda")
    config = TwilightConfig(selector=PageBalls(token_budget=128), top_p=0.9, dense_below=0)
    generated = generate(model, prompt, config, max_new_tokens=40)
    assert (generated.capture, generated.graphs, generated.breaks, generated.recompiles) == ("cuda_graph", 1, 0, 0)
    tokens, counters = [], []
    for recorded in (False, True):
        cache = TwilightCache(model.config, config, max_batch_size=1, max_cache_len=700, device=model.device, dtype=model.dtype)
        decoder = Decoder(model, cache, eos_token_ids=(), capture="eager")
        if recorded:  # the eager step, so that every kernel around attention is the same
            decoder.step = CapturedStep(decoder.step_eager, model.device)
        tokens.append(decoder.generate(prompt, max_new_tokens=40).tokens)
        counters.append(torch.stack([layer.paged.budget_counters for layer in cache.layers]))
    assert torch.equal(*tokens) and torch.equal(*counters)
    live, proposed = counters[0][..., [COUNTER_LIVE, COUNTER_CANDIDATES]].sum((0, 1)).tolist()
    assert 0 < proposed < live / 2
