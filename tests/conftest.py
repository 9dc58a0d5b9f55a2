"""Fixtures shared by all tests: the backends an operator runs on, and memory that shows when it was never written."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

import twilight_ops
from twilight_ops import backends

# Workers that all use every core slow each other down many times over.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class OpBackend:
    """One implementation of all operators; `backend.<op>(**kwargs)` calls it."""

    name: str
    device: str

    def __getattr__(self, op: str):
        if op not in backends.OPS:
            raise AttributeError(op)
        if self.name == "reference":
            return backends.checked_reference(op)
        return getattr(torch.ops.twilight, op).default


def _registered() -> list[OpBackend]:
    """The fallback that runs where nothing is compiled, and whatever serves each device of this machine."""
    found = [OpBackend("reference", "cpu")]
    if backends.CPU.name == "native":
        found.append(OpBackend("native", "cpu"))
    if backends.CUDA.name != "none" and torch.cuda.is_available():
        found.append(OpBackend(backends.CUDA.name, "cuda"))
    return found


@pytest.fixture(params=_registered(), ids=lambda b: b.name)
def backend(request) -> OpBackend:
    return request.param


@pytest.fixture
def poisoned_empties():
    """Every `empty` tensor starts as NaN, or the largest integer, so that an output nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def threads():
    """Sets the number of CPU threads for one test: `threads(1)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_report_header(config) -> str:
    return f"twilight_ops {twilight_ops.__version__}: cpu {backends.CPU.name} ({backends.CPU.detail}), cuda {backends.CUDA.name}"
