"""Explicit capture and replay of one decode step as a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

WARMUP_STEPS = 3  # before a capture: compilation, autotuning and library workspaces happen here


class CapturedStep:
    """Calls `step` a few times, then records it once and replays the recording.

    Every call, warm-up included, is a real step: `step` takes and returns nothing, reads and writes only tensors whose addresses never
    change, and advances its own positions. Recording alone runs nothing. One object serves one batch shape and number of query tokens.

    Args:
        step: the decode step, compiled or not.
        device: a CUDA device.
    """

    def __init__(self, step: Callable[[], None], device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"CapturedStep: device: expected cuda, got {device}")
        self.step = step
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device)
        self._warmups_left = WARMUP_STEPS

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
            return
        if self._warmups_left:
            self._warmups_left -= 1
            self._on_side_stream()
            return
        self.graph = self._record()
        self.graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        """Records the step, with the garbage collector held back: freeing another graph or its memory would end the recording."""
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads (a collective's watchdog, a loader that pins memory) may go on calling CUDA.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self.step()
        finally:
            if collects:
                gc.enable()
        return graph

    def _on_side_stream(self) -> None:
        """Capture happens on this stream, so library handles and workspaces are made for it."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.step()
        current.wait_stream(self._stream)
