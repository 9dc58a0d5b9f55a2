"""What all tests share: the backends an operator runs on, memory that shows when it was never written, the same start for each."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import tempfile
import warnings
from dataclasses import dataclass

import pytest
import torch

# Inductor's cache does not know ATEN_CPU_CAPABILITY: code compiled under one setting corrupts the heap under another. Importing Inductor
# settles the folder, so this comes first.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
)

import twilight_ops  # noqa: E402
from twilight_ops import backends  # noqa: E402

# Workers that all use every core slow each other down many times over.
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# They need vLLM, in an environment of its own: `make test-vllm`.
collect_ignore = [] if importlib.util.find_spec("vllm") else ["vllm_engine"]

# What rich and argparse ask about the terminal. Tests of other widths set COLUMNS themselves.
TERMINAL = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Every test and its fixtures draw the same numbers whatever ran before."""
    random.seed(0)
    torch.manual_seed(0)


def process_state() -> dict[str, object]:
    """What a test could leave behind for the next one."""
    state: dict[str, object] = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "CPU threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "fill of uninitialised memory": torch.utils.deterministic.fill_uninitialized_memory,
        "working directory": os.getcwd(),
    }
    for name in ("torch._dynamo.config", "torch._inductor.config"):
        if name in sys.modules:
            # Whether settings can be read: after `monkeypatch.setattr` they cannot. Their values the compiler itself changes now and then.
            config = sys.modules[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated settings
                state |= {f"{name}.{key} can be read": hasattr(config, key) for key in config.get_config_copy()}
    return state


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """A terminal of 200 columns, and a failure for a test that leaves the process other than it was."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)
    before = process_state()
    yield
    after = process_state()
    changed = [name for name in before if after.get(name, "removed") != before[name]]
    assert not changed, "left behind: " + ", ".join(f"{name} was {before[name]}, is {after.get(name, 'removed')}" for name in changed)


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


def pytest_configure(config) -> None:
    expected = os.environ.get("TWILIGHT_EXPECTED_PACKAGE")
    found = os.path.dirname(twilight_ops.__file__)
    if expected not in (None, found):
        raise pytest.UsageError(f"TWILIGHT_EXPECTED_PACKAGE: expected twilight_ops in {expected}, got {found}")


def pytest_report_header(config) -> str:
    return f"twilight_ops {twilight_ops.__version__}: cpu {backends.CPU.name} ({backends.CPU.detail}), cuda {backends.CUDA.name}"
