"""What conftest promises to every test: the same start, and a failure for whoever leaves the process other than it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import process_state
from torch._inductor import config as inductor_config

FIRST_NUMBER = torch.rand((), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("time", range(2))
def test_every_test_draws_the_same_numbers(time):
    assert torch.rand(()) == FIRST_NUMBER


def test_the_terminal_is_the_same_for_every_test():
    assert os.environ["COLUMNS"] == "200" and "FORCE_COLOR" not in os.environ


def test_every_instruction_set_has_an_inductor_cache_of_its_own():
    report = "import conftest, os; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    folders = set()
    for capability in ("default", torch.backends.cpu.get_cpu_capability().lower()):
        done = subprocess.run(
            [sys.executable, "-c", report],
            cwd=Path(__file__).parent,
            env=environment | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            check=True,
        )
        folders.add(done.stdout)
    assert len(folders) == (1 if torch.backends.cpu.get_cpu_capability().lower() == "default" else 2)


def test_what_is_left_behind_is_seen(tmp_path):
    before = process_state()
    assert process_state() == before
    directory, threads = os.getcwd(), torch.get_num_threads()
    try:
        os.chdir(tmp_path)
        torch.set_num_threads(threads + 1)
        torch.set_default_dtype(torch.float64)
        with torch.no_grad():
            after = process_state()
    finally:
        os.chdir(directory)
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert {name for name in before if before[name] != after[name]} == {
        "default dtype",
        "CPU threads",
        "grad mode",
        "working directory",
    }


def test_a_setting_of_the_compiler_that_can_no_longer_be_read_is_seen():
    """What `monkeypatch.setattr` on these modules leaves behind; `config.patch` does not."""
    before, value = process_state(), inductor_config.triton.cudagraph_or_error
    try:
        del inductor_config.triton.cudagraph_or_error
        assert process_state() != before
    finally:
        inductor_config.triton.cudagraph_or_error = value
    assert inductor_config.triton.cudagraph_or_error == value
