"""What only a GPU shows: decode steps are replays of full CUDA graphs, and nothing of ours waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from engines import GPU, REQUESTS, numbers

from twilight_ops.integration.vllm import backend, metrics
from twilight_ops.report import budget_report

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]

SIZES = [1, 2, 4, 8]
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}


def never_waiting(function):
    def call(*args, **kwargs):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return call


@pytest.mark.parametrize("selector", ["dense", "full", "quest", "shadow_prefix"])
def test_decode_steps_replay_full_graphs_and_wait_for_nothing(engine, expected, calibrated, monkeypatch, selector):
    """Batches of 1 to 8 rows replay graphs of 1, 2, 4 and 8, padded; at p = 1 and with room for every token their tokens are exact."""
    options = {"dense": "dense", "full": "full", "quest": {"name": "quest"}, "shadow_prefix": calibrated}[selector]
    if isinstance(options, dict):
        options = options | {"token_budget": 4096}
    exact = engine(
        {"selector": options, "top_p": 1.0, "dense_below": 0, "log_every": 5}, enforce_eager=False, compilation_config=GRAPHS, block_size=16
    )
    config = exact.llm.llm_engine.vllm_config
    layers = metrics.layers_of(config)
    impls = {type(layer.impl) for layer in config.compilation_config.static_forward_context.values()}
    assert impls == {backend.TwilightImpl} and len(layers) == 4
    exact.generate(*REQUESTS["four"])  # kernels are built

    replays, decodes = [], []
    replay, build = torch.cuda.CUDAGraph.replay, backend.TwilightMetadataBuilder.build
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])

    def watched(*args, **kwargs):
        metadata = build(*args, **kwargs)
        decodes.append(metadata.prompts is None)
        return metadata

    monkeypatch.setattr(backend.TwilightMetadataBuilder, "build", never_waiting(watched))
    monkeypatch.setattr(backend.TwilightImpl, "forward", never_waiting(backend.TwilightImpl.forward))
    expected["several"].check(exact.generate(*REQUESTS["several"]))
    assert len(replays) >= sum(decodes) > 0
    assert all(a is b for a, b in zip(metrics.layers_of(config), layers, strict=True))
    if selector != "dense":
        assert budget_report(layers).sparse.dense == 0


def test_a_prefix_evicted_to_host_memory_comes_back_whole(engine, calibrated):
    """vLLM's own offloading: the blocks of a prefix have left the GPU, and tokens are those of an engine that has to compute it anew."""
    overrides = {"0": {"selector": "dense"}, "2": {"selector": {"name": "quest", "token_budget": 48}}, "3": {"selector": "page_mean"}}
    twilight = {"selector": calibrated, "calibration": calibrated["calibration"], "top_p": 0.9, "dense_below": 0, "overrides": overrides}
    prefix, end = numbers(192, 7), numbers(40, 8)

    def cached_and_tokens(**options) -> tuple[int, list[int]]:
        each = engine(twilight, block_size=16, num_gpu_blocks_override=48, **options)
        each.generate([prefix + numbers(9, 9)], 8)
        for seed in range(4):
            each.generate([numbers(300, 20 + seed)], 8)
        (out,) = each.outputs([prefix + end], 24)
        assert 0 < budget_report(metrics.layers_of(each.llm.llm_engine.vllm_config)).sparse.pruned < 1
        each.close()
        return out.num_cached_tokens, list(out.outputs[0].token_ids)

    cached, expected = cached_and_tokens()
    assert cached == 0
    assert cached_and_tokens(kv_offloading_size=0.125) == (192, expected)
