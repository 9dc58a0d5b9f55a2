"""Explicit capture and replay of one decode step as a CUDA graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from .private import is_traceable_wrapper_subclass
from .regions import calls_of

WARMUP_STEPS = 3  # before a capture: compilation, autotuning and library workspaces happen here


class CapturedStep:
    """Calls `step` a few times, then records it once and replays the recording.

    Every call, warm-up included, is a real step: `step` takes and returns nothing, reads and writes only tensors whose addresses never
    change, and advances its own positions. Recording alone runs nothing. One object serves one batch shape and number of query tokens.

    The weights of `module` may change. Values written in place are what the next replay reads. Where a parameter, a buffer or a submodule
    was replaced, or moved to another address (`p.data = new`, `load_state_dict(assign=True)`, `module.to`), the recording is dropped before
    it could read freed memory, and the step is warmed up and recorded again. What a recording cannot notice is Python state that decides
    what the step does, an adapter switched off for one: call `recheck` after that.

    Args:
        step: the decode step, compiled or not.
        device: a CUDA device.
        module: whose weights the step reads; None: they never move.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, module: torch.nn.Module | None = None):
        if device.type != "cuda":
            raise ValueError(f"CapturedStep: device: expected cuda, got {device}")
        self.step = step
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recordings = 0
        self._stream: torch.cuda.Stream | None = None
        self._warmups_left = WARMUP_STEPS
        self._module = module
        self._weights: Weights | None = None  # where they were at the first warm-up
        self._recorded: list[int] = []  # the compiled graphs that the recorded step called
        self._recheck = False

    def __call__(self) -> None:
        if self._module is not None and (self._weights is None or self._weights.changed()):
            self._weights = Weights(self._module)
            self.graph, self._warmups_left = None, WARMUP_STEPS
        if self.graph is not None and self._recheck:
            # A real step, which the compiler's guards let through or compile anew.
            if calls_of(self._on_side_stream) != self._recorded:
                self.graph, self._warmups_left = None, WARMUP_STEPS - 1
        elif self.graph is not None:
            self.graph.replay()
        elif self._warmups_left:
            self._warmups_left -= 1
            self._on_side_stream()
        else:
            self._recorded = calls_of(self._record)
            self.recordings += 1
            self.graph.replay()
        self._recheck = False

    def recheck(self) -> None:
        """Makes the next call run `step` itself, which takes the host as long as a step that was never recorded.

        Where `step` was compiled by `compile_regions`, and anything that its guards know has changed since it was recorded, it is recorded
        again; else the recording goes on to serve. A step that is not compiled has no guards: make a new object for it.
        """
        self._recheck = True

    def _record(self) -> None:
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
        self.graph = graph

    def _on_side_stream(self) -> None:
        """Capture happens on this stream, so library handles and workspaces are made for it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.step()
        current.wait_stream(self._stream)


class Weights:
    """Where the parameters, buffers and submodules of a module are, and whether any is elsewhere by now; keeps none of them alive."""

    def __init__(self, module: torch.nn.Module):
        parts = list(module.modules())
        tables = [table for part in parts for table in (part._parameters, part._buffers, part._modules) if table]
        entries = _entries(tables)
        # What is freed was replaced. Its identity may come again, so that nothing is compared any more.
        self._alive = [weakref.ref(it, lambda _: tables.clear()) for it in {*parts, *entries} if it is not None]
        self._tables = tables
        self._identities = list(map(id, entries))
        tensors = {place: entry for place, entry in enumerate(entries) if isinstance(entry, Tensor)}
        self._wrapped = [place for place, tensor in tensors.items() if is_traceable_wrapper_subclass(tensor)]
        self._plain = [place for place in tensors if place not in self._wrapped]
        self._addresses = self._addresses_of(entries)

    def changed(self) -> bool:
        entries = _entries(self._tables)
        return list(map(id, entries)) != self._identities or self._addresses_of(entries) != self._addresses

    def _addresses_of(self, entries: list) -> list:
        return [entries[place].data_ptr() for place in self._plain] + [_addresses(entries[place]) for place in self._wrapped]


def _entries(tables: list) -> list:
    return [entry for table in tables for entry in table.values()]


def _addresses(value: object) -> list | int | None:
    """Of the tensors that a wrapper, quantised or sharded, holds."""
    if not isinstance(value, Tensor):
        return None
    if is_traceable_wrapper_subclass(value):
        return [_addresses(getattr(value, name)) for name in value.__tensor_flatten__()[0]]
    return value.data_ptr()
