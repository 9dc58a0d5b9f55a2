"""What only a GPU shows: decode steps are replays of full CUDA graphs, and nothing of ours waits for the GPU."""

from __future__ import annotations

import pytest
import torch
from engines import GPU, REQUESTS

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

    def watched(self, common_prefix_len, m, *args, **kwargs):
        metadata = build(self, common_prefix_len, m, *args, **kwargs)
        decodes.append(metadata.prompts is None)
        return metadata

    monkeypatch.setattr(backend.TwilightMetadataBuilder, "build", never_waiting(watched))
    monkeypatch.setattr(backend.TwilightImpl, "forward", never_waiting(backend.TwilightImpl.forward))
    expected["several"].check(exact.generate(*REQUESTS["several"]))
    assert len(replays) >= sum(decodes) > 0
    assert all(a is b for a, b in zip(metrics.layers_of(config), layers, strict=True))
    if selector != "dense":
        assert budget_report(layers).sparse.dense == 0
