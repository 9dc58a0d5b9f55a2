"""The selectors of other papers, on a GPU: inside one captured step, with the selections that a CPU makes of the same tokens."""

from __future__ import annotations

import pytest
import torch
from test_selectors import HEAD_DIM, HEADS, KV_HEADS, PAGE, SCALE, SELECTORS, keys_values, left_padded, lists, name, query

from twilight_ops import PagedKVCache, TwilightConfig, backends
from twilight_ops.decode_step import append, attend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends.CUDA.name == "none" or not torch.cuda.is_available(), reason="no CUDA device, or a PyTorch without CUDA"),
]

LENS, STEPS, LAYERS = (150, 47, 1), 40, 2
DENSE_BELOW = 60  # the second sequence grows past it
DTYPE = torch.float16


def filled_cache(selector, device: str) -> PagedKVCache:
    """Two layers that hold the prompts, calibrated on them; pages in random order."""
    forced = {"sink_tokens": 2, "recent_tokens": 0}  # fewer than by default, which is half of these sequences
    config = TwilightConfig(selector=selector, dense_layers=0, dense_below=DENSE_BELOW, page_size=PAGE, top_p=0.9, **forced)
    cache = PagedKVCache(config, LAYERS, HEADS, KV_HEADS, HEAD_DIM, len(LENS), max(LENS) + STEPS, DTYPE, device)
    order = torch.randperm(cache.page_table.numel(), generator=torch.Generator().manual_seed(3)).int()
    cache.page_table.copy_(order.view_as(cache.page_table))
    cache.seq_lens.copy_(torch.tensor(LENS, dtype=torch.int32))
    k, v = (rows.to(device) for rows in keys_values(LENS, dtype=DTYPE))
    positions = left_padded(LENS).to(device)
    for layer in cache.layers:
        layer.plan.selector.calibrate(query(len(LENS), k.shape[1], seed=5).to(device, DTYPE), k, layer, positions, SCALE)
        append(k, v, layer, cache.page_table, cache.seq_lens, positions)
    return cache


class Step:
    """One decode step of both layers over fixed inputs, and what it selected, kept and gave."""

    def __init__(self, cache: PagedKVCache):
        self.cache = cache
        device, batch = cache.seq_lens.device, len(LENS)
        self.q = torch.zeros(batch, 1, HEADS, HEAD_DIM, dtype=DTYPE, device=device)
        self.k, self.v = (torch.zeros(batch, 1, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=device) for _ in range(2))
        slots = cache.max_pages * PAGE
        self.kept = [torch.zeros(batch, KV_HEADS, slots, dtype=torch.int32, device=device) for _ in range(LAYERS)]
        self.kept_counts = [torch.zeros(batch, KV_HEADS, dtype=torch.int32, device=device) for _ in range(LAYERS)]

    def load(self, step: int) -> None:
        """Inputs of one step, the same on every device, and the tokens valid once it is done."""
        k, v = keys_values([1] * len(LENS), seed=100 + step, dtype=DTYPE)
        self.k.copy_(k)
        self.v.copy_(v)
        self.q.copy_(query(len(LENS), seed=200 + step))
        self.cache.seq_lens.copy_(torch.tensor(LENS, dtype=torch.int32) + step + 1)

    def __call__(self):
        cache = self.cache
        outs, selected = [], []
        for layer, kept, counts in zip(cache.layers, self.kept, self.kept_counts, strict=True):
            append(self.k, self.v, layer, cache.page_table, cache.seq_lens)
            selected.append(layer.plan.selector.select(self.q, layer, cache.page_table, cache.seq_lens, SCALE))
            outs.append(attend(self.q, layer, cache.page_table, cache.seq_lens, SCALE, kept, counts)[0])
        return outs, selected

    def selected_lists(self, selected) -> list:
        """Lists by layer; None where a layer proposes every token."""
        return [None if found.indices is None else lists(type(found)(found.indices.cpu(), found.counts.cpu(), 1)) for found in selected]


@pytest.mark.parametrize("selector", SELECTORS, ids=name)
def test_a_captured_step_selects_what_the_cpu_selects(selector):
    graphed, eager, on_cpu = Step(filled_cache(selector, "cuda")), Step(filled_cache(selector, "cuda")), Step(filled_cache(selector, "cpu"))
    for step in (graphed, eager, on_cpu):
        step.load(0)
    # Whatever is compiled or allocated lazily happens outside the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs, selected = graphed()
    for t in range(STEPS):
        for step in (graphed, eager, on_cpu):
            step.load(t)
        graph.replay()
        eager_outs, eager_selected = eager()
        cpu_outs, cpu_selected = on_cpu()
        found = graphed.selected_lists(selected)
        assert found == eager.selected_lists(eager_selected)
        assert found == on_cpu.selected_lists(cpu_selected), f"step {t}"
        for mine, theirs in zip(outs + graphed.kept + graphed.kept_counts, eager_outs + eager.kept + eager.kept_counts, strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(outs, cpu_outs, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-2, atol=1e-2)
