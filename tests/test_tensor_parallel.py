"""Two processes, with gloo or on two GPUs, give the tokens and, KV head by KV head, the kept sets of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twilight_ops.cli.demo_tp import compare, generate_with
from twilight_ops.cli.models import random_tiny


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_tiny(torch.device("cpu"), torch.float32, "sdpa").save_pretrained(path)
    return str(path)


def check(model_path, folder, selector: str, capture: str) -> None:
    (alone,) = generate_with(1, model_path, folder / "alone", selector, 12, timed_steps=2)
    ranks = generate_with(2, model_path, folder / "sharded", selector, 12, timed_steps=2)
    result = compare(alone, ranks)
    assert result["tokens equal"]
    assert result["captured step's tokens equal"] and result["capture"] == capture
    assert result["kept sets equal"]
    assert result["KV heads"] == 2 and result["KV heads a rank"] == 1
    pruned = sum(int((call >= 0).sum()) for call in alone["kept"]) / sum(call.shape[0] * call.shape[1] * 300 for call in alone["kept"])
    assert 0.0 < pruned < 0.9  # something was kept and something was pruned


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["quest", "shadow_prefix"])
def test_two_processes_give_the_tokens_and_kept_sets_of_one(model_path, tmp_path, selector, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # processes would take GPUs where there are some
    check(model_path, tmp_path, selector, "compile")


@pytest.mark.slow
def test_the_example_gives_the_tokens_of_one_process(model_path):
    import torch.distributed.run as launcher
    from transformers import AutoModelForCausalLM

    from twilight_ops import TwilightConfig
    from twilight_ops.integration import generate

    example = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"
    command = [sys.executable, "-m", launcher.__name__, "--standalone", "--nproc-per-node", "2", str(example), "--model", model_path]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="twilight").eval()
    ids = torch.randint(3, model.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(1))
    expected = generate(model, ids, TwilightConfig(dense_below=0), max_new_tokens=16, eos_token_ids=(), capture="eager")
    assert done.stdout.splitlines()[0] == str(expected.tokens.tolist())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("selector", ["quest", "shadow_prefix"])
def test_two_gpus_give_the_tokens_and_kept_sets_of_one(model_path, tmp_path, selector):
    """Eagerly and from a recorded graph, whose sums over processes are one launch each."""
    check(model_path, tmp_path, selector, "cuda_graph")
