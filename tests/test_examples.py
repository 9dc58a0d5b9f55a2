"""Examples: short, and each runs. Those of vLLM, tensor parallelism, export and lossless decoding run in the tests of those."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Longer than 60 lines, and why.
LONG = {
    "custom_selector.py": "a Triton kernel, its launch and its plain PyTorch",
    "export.py": "two processes, one of which has no package",
    "gemma3_needle.py": "fetches a model",
    "tutorial.py": "the tutorial",
}
TINY = ["--random-tiny", "--device", "cpu"]
pytest.importorskip("transformers")


def run(name: str, *arguments: str | Path) -> str:
    """Its output; a deprecated call of ours is an error."""
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", EXAMPLES / name, *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def test_examples_are_shorter_than_60_lines_and_say_what_they_are_and_how_to_run_them():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text("utf-8")
        assert (len(text.splitlines()) < 60) != (path.name in LONG), path.name
        assert re.search(rf"examples/{path.name}\b", ast.get_docstring(ast.parse(text))), path.name


def test_one_page_table_serves_sequences_that_come_and_go():
    off = [float(line.rpartition("by ")[2].rstrip("%")) for line in run("page_table.py").splitlines()]
    assert len(off) == 6 and max(off) < 5


def test_a_loop_of_ones_own_repeats_no_recent_token_and_prunes():
    first, summary, second, _ = run("own_loop.py", *TINY, "--new-tokens", "12").splitlines()
    assert first != second and re.search(r"kept \d+ of \d+ tokens a KV head \((?!0\.0%)", summary)


def test_a_selector_in_plain_pytorch_proposes_its_pages():
    *_, summary = run("selector.py").splitlines()
    assert summary.startswith("4 of 4 layers are sparse")


@pytest.mark.slow
def test_transformers_streams_and_the_cache_says_what_it_kept(tmp_path):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import twilight_ops.integration.hf  # noqa: F401  registers attn_implementation="twilight"
    from twilight_ops.cli.models import random_tiny

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    random_tiny(torch.device("cpu"), torch.float32).save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("the lamp was lit " * 30)
    out = run("generate.py", "--model", tmp_path, "--prompt-file", tmp_path / "prompt.txt", "--new-tokens", "8")
    assert out.splitlines()[-1].startswith("4 of 4 layers are sparse")


@pytest.mark.slow
def test_the_tutorial_draws_what_it_explains(tmp_path):
    pytest.importorskip("matplotlib")
    out = run("tutorial.py", *TINY, "--tokens", "400", "--out", tmp_path / "plot.png")
    kept, off = zip(*re.findall(r"([\d.]+)% of the tokens kept.*off by ([\d.]+)%", out), strict=True)
    assert len(kept) == 7 and sorted(map(float, kept)) == [*map(float, kept)] and float(off[-1]) < float(off[0])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
