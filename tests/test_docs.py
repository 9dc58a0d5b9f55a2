"""README and docs: tables are those of their files, paths exist, programs run, commands are taken."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from twilight_ops import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]) if (ROOT / "README.md").exists() else []
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
FENCE = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "bench|csrc|docs|examples|integration|tests|tools|twilight_ops"
pytestmark = pytest.mark.skipif(not PAGES, reason="this copy of the tests has no README and docs beside it")


def blocks(page, language):
    return [match for match in FENCE.finditer(page.read_text("utf-8")) if match["language"] == language]


def commands(page):
    """Command lines of the page's shell blocks, without comments; a backslash goes on."""
    for block in blocks(page, "bash"):
        if block["reason"]:
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def test_tables_are_those_of_their_files():
    from bench import tables

    for page in PAGES:
        text = page.read_text("utf-8")
        assert tables.rewritten(text) == text, f"{page.name}: `python -m bench tables` writes another table"


def test_a_table_that_differs_is_found():
    from bench import tables

    text = "<!-- table: accuracy bench/results/accuracy_qwen.jsonl -->\n| another | table |\n<!-- end of table -->"
    assert "| Full, p .95 |" in tables.rewritten(text) and tables.rewritten(tables.rewritten(text)) == tables.rewritten(text)


def test_tables_of_tasks_and_methods_have_what_was_measured_beside_dense():
    from bench import tables

    cell = {"task": "passkey", "length": 16000}
    found = [cell | {"setting": "dense", "score": 1.0}, cell | {"setting": "quest:n/4:0.95", "score": 0.5, "no_worse_than_dense": "1 of 2"}]
    assert tables.tasks(found).splitlines()[::2] == [
        "| task | tokens | dense | Quest, n/4, p .95 |",
        "| passkey | 16,000 | 100% | 50% (1 of 2) |",
    ]
    quality = {"kl": 0.01, "worst_kl": 0.5, "top1": 0.9, "perplexity_change": 0.02}
    row = quality | {
        "task": "language",
        "method": "quest:n/4",
        "setting": "quest:n/4:0.95",
        "top_p": 0.95,
        "live": 8000,
        "bytes_share": 0.1,
    }
    row |= {"kept": 500, "without": quality | {"kept": 2000}}
    told = "0.0100 / 0.500 / +2.0%"
    assert tables.methods([row]).splitlines()[2] == f"| Quest, n/4, p .95 | {told} | {told} | 2,000 -> 500 of 8,000 | 10.0% |"
    eighths = {"task": "language", "method": "dense:kv_cache_dtype=fp8", "top_p": 1.0, "bytes_share": 1.0}
    assert (
        tables.accuracy([quality | eighths]).splitlines()[2].startswith("| dense, K and V in fp8 | 0.0100 | 0.500 | 0.900 | +2.0% | all |")
    )


def test_what_is_said_of_the_break_even_is_what_decides():
    from twilight_ops import Full, ShadowPrefix
    from twilight_ops.config import BREAK_EVEN

    gpu, cpu = BREAK_EVEN["cuda"], BREAK_EVEN["cpu"]
    readme, faq = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/faq.md"))
    one, four, many = (f"{gpu.tokens(8 * batch, ShadowPrefix()):,}" for batch in (1, 4, 25))
    assert f"{gpu.row_tokens:,} tokens shared by batch x KV heads" in readme
    assert f"above {one} tokens of the whole batch (batch 1: {one}; batch 4: {four} each; batch 25: {many})" in faq
    assert f"with `Full` above {gpu.tokens(8, Full()):,}, on a CPU always above {cpu.tokens(8, None)}." in faq


@pytest.mark.parametrize("name", NAMES)
def test_paths_exist(name):
    text = (ROOT / name).read_text("utf-8")
    named = {match[1] for match in re.finditer(rf"`((?:{FOLDERS})/[\w./-]+)`", text)}
    linked = {match[1] for match in re.finditer(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
    named |= {f"bench/results/{match[1]}" for match in re.finditer(r"`((?:h200|cpu|accuracy)_\w+\.\w+)`", text)}
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [path for path in linked if not ((ROOT / name).parent / path).exists()]
    assert not missing


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the programs take for given: a model, its folder and a prompt."""
    pytest.importorskip("transformers")
    import twilight_ops.integration.hf  # noqa: F401  registers attn_implementation="twilight"
    from twilight_ops.cli.models import random_tiny

    folder = tmp_path_factory.mktemp("model")
    model = random_tiny(torch.device("cpu"), torch.float32)
    model.save_pretrained(folder)
    return {"path": str(folder), "model": model, "input_ids": torch.randint(1, 256, (1, 600))}


@pytest.mark.parametrize("name", [page.relative_to(ROOT).as_posix() for page in PAGES if blocks(page, "python")])
def test_programs_run(name, given, monkeypatch, capsys):
    """Blocks of one page share their names, as a reader's session does."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # what is checked is the same everywhere
    space = dict(given)
    for block in blocks(ROOT / name, "python"):
        if block["reason"] is None:
            exec(compile(block["code"], name, "exec"), space)


@pytest.mark.parametrize("name", [page.relative_to(ROOT).as_posix() for page in PAGES if [*commands(page)]])
def test_commands_are_taken(name, monkeypatch):
    from bench import __main__ as bench

    ran = []
    monkeypatch.setattr(bench, "run", lambda arguments: ran.append(arguments) or 0)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(ROOT / name):
        if words[0] == "make":
            assert words[1] in targets, words
            continue
        ours = words[1:] if words[0] == command_line.SCRIPT else words[3:] if words[:3] == ["python", "-m", "twilight_ops"] else None
        if ours:
            monkeypatch.setattr(f"twilight_ops.cli.{ours[0].replace('-', '_')}.run", lambda args: 0)
            assert command_line.main(ours) == 0, words
