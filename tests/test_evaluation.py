"""The evaluator on a tiny random model: numbers that must be exact, tasks that must be solvable, runs that must resume."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from comparisons import assert_close_to_oracle
from transformers import Gemma2Config, Gemma2ForCausalLM

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig, calibration
from twilight_ops.cli import eval as command
from twilight_ops.cli.models import ByteTokenizer, random_tiny
from twilight_ops.evaluation import language, mass, methods, prefill, report, runner, smoke, tasks, texts
from twilight_ops.evaluation.aggregation import AGGREGATIONS, ExactTopK
from twilight_ops.evaluation.bytes_read import bytes_read
from twilight_ops.evaluation.ceiling import ExactTopP
from twilight_ops.evaluation.decoding import teacher_forced

LENGTH, TOKENS = 300, 4
TWO_DENSE = (("dense_layers", 2),)
NOTHING_FORCED = (("sink_tokens", 0), ("recent_tokens", 0))
MAX_KL = 1e-8  # of two exact fp32 runs


@pytest.fixture(scope="module")
def model():
    return random_tiny(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (LENGTH + TOKENS + 1,), generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def passage(model, documents):
    return language.prepare(model, documents, LENGTH, TOKENS, TOKENS)


@pytest.fixture(scope="module")
def calibrated(model, documents, tmp_path_factory):
    """A file, so that no centre comes from the prompts that happen to be together."""
    path = tmp_path_factory.mktemp("calibration") / "file"
    cache = prefill.cache_of(model, TwilightConfig(Full(), dense_below=0), [prefill.record(model, documents[0])], 1)
    calibration.save([layer.paged.shadow for layer in cache.layers], path, {})
    return str(path)


@pytest.fixture(scope="module")
def exact(model):
    return copy.deepcopy(model).double()


def assert_logits(got, model, exact, ids, begin):
    """`got` are the logits after ids[begin], ids[begin + 1], ..., as accurate as those of transformers' own attention."""
    plain, oracle = (forward(each, ids)[begin:] for each in (model, exact))
    assert_close_to_oracle(got, oracle, plain, "logits")


def forward(model, ids):
    with torch.no_grad(), prefill.attention(model, "sdpa"):
        return model(input_ids=ids[None]).logits[0]


def test_dense_steps_over_a_recorded_prompt_equal_one_forward(model, exact, documents, passage):
    for i, document in enumerate(documents):
        assert_logits(passage.dense_logits[:, i], model, exact, document[:-1], LENGTH)


@pytest.mark.parametrize("window", [16, 96, 4096], ids=["in the prompt", "in what follows it", "nowhere"])
def test_prompts_of_a_model_that_caps_its_logits_are_recorded_or_run_again(window):
    sizes = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    config = Gemma2Config(**sizes, **heads, sliding_window=window, attn_logit_softcapping=2.0)
    capped = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    for parameter in capped.parameters():
        parameter.data.normal_(0.0, 0.2) if parameter.dim() > 1 else None
    ids = torch.randint(10, 90, (100,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        want = capped(input_ids=ids[None]).logits[0]
    recorded = prefill.record(capped, ids[:92])
    assert bool(recorded.layers) == (window > 92)
    torch.testing.assert_close(recorded.last_logits, want[91], rtol=1e-4, atol=1e-4)
    cache = prefill.cache_of(capped, TwilightConfig(selector=Full(), top_p=1.0, dense_below=0), [recorded], 8)
    got = torch.cat([step.clone() for step in teacher_forced(capped, cache, ids[None, 92:])])
    torch.testing.assert_close(got, want[92:], rtol=1e-4, atol=1e-4)


def ragged_steps(model, prompts, tokens, top_p, calibration=None):
    """Logits [T, B, V] of a batch of prompts of different lengths."""
    config = TwilightConfig(selector=Full(), top_p=top_p, dense_below=0, calibration=calibration)
    cache = prefill.cache_of(model, config, [prefill.record(model, ids) for ids in prompts], tokens.shape[1])
    return torch.stack([step.clone() for step in teacher_forced(model, cache, tokens)])


def test_a_ragged_batch_of_prompts_decodes_like_each_alone(model, exact, documents):
    prompts = [documents[0][:LENGTH], documents[1][:77]]
    tokens = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(2))
    together = ragged_steps(model, prompts, tokens, top_p=1.0)
    for i, prompt in enumerate(prompts):
        assert_logits(together[:, i], model, exact, torch.cat([prompt, tokens[i]]), len(prompt))


def test_what_a_sequence_keeps_does_not_depend_on_those_beside_it(model, documents, calibrated):
    """Beside others of the same length, because one rounding, which depends on the shapes, can move a token across p."""
    lengths = (LENGTH, 77)
    tokens = torch.randint(0, 256, (2, 3), generator=torch.Generator().manual_seed(2))
    first, second, third = (
        ragged_steps(model, [documents[a][: lengths[0]], documents[b][: lengths[1]]], tokens, 0.9, calibrated)
        for a, b in ((0, 1), (1, 1), (0, 0))
    )
    assert torch.equal(first[:, 1], second[:, 1]) and torch.equal(first[:, 0], third[:, 0])
    assert not torch.equal(first[:, 0], second[:, 0]) and not torch.equal(first[:, 1], third[:, 1])


def test_what_attends_to_everything_has_no_distance_to_dense(model, passage):
    for method in (
        methods.DENSE,
        methods.Method(Full()),
        methods.Method(Quest(token_budget=1000)),
        methods.Method(ShadowPrefix(token_budget=1000)),
    ):
        result = language.evaluate(model, passage, method) | language.agreement(model, passage, method)
        assert abs(result["kl"]) < MAX_KL and result["top1"] == result["greedy_equal"] == 1.0
        assert language.together([result])["perplexity_change"] == pytest.approx(0.0, abs=1e-5)


def test_dense_steps_over_eight_bits_are_beside_those_over_whole_keys(model, passage):
    method = methods.parse_method("dense:kv_cache_dtype=fp8")
    result = language.evaluate(model, passage, method)
    # The same attention to everything, through the selector that proposes everything.
    full = language.evaluate(model, passage, methods.parse_method("full:kv_cache_dtype=fp8"))
    assert MAX_KL < result["kl"] == pytest.approx(full["kl"], rel=0.01)
    assert result["bytes_share"] == 1.0 and "kept" not in result


def test_pruning_moves_away_from_dense_and_says_how_much_it_kept(model, passage):
    results = [language.evaluate(model, passage, methods.Method(Full(), p, TWO_DENSE)) for p in (0.99, 0.9, 0.5)]
    assert MAX_KL < results[0]["kl"] < results[1]["kl"] < results[2]["kl"]
    for p, result in zip((0.99, 0.9, 0.5), results, strict=True):
        assert result["captured_mass"] >= p - 1e-3
        assert result["pruned"] == pytest.approx(1 - result["kept"] / result["live"])
        assert len(result["kept_by_head"]) == 4 and result["kept_by_head"][0] == [result["live"]] * 2


def test_bytes_are_those_of_the_scan_the_estimate_and_the_kept_rows(model, passage):
    method = methods.Method(ShadowPrefix(token_budget=1, budget_fraction=0.25, prefix_channels=16), 0.9, TWO_DENSE)
    cache = prefill.cache_of(model, method.config(), passage.prefills, TOKENS)
    cache.reset_budget()
    for _ in language.teacher_forced(model, cache, passage.forced):
        pass
    report_ = cache.budget_report()
    read = bytes_read([layer.paged for layer in cache.layers], report_)
    expected = 0.0
    for layer in report_.layers[2:]:
        for head in layer.heads:
            # 16 of 64 channels at 4 bits and 4 bytes of scale for all; the other 48 for candidates; 64 x 2 x 16 bits for kept rows.
            expected += head.live * (8 + 4) + head.candidates.mean * 24 + head.kept.mean * 256
    assert read.sparse_layers == pytest.approx(expected)
    live = report_.layers[0].heads[0].live
    assert read.dense == pytest.approx(4 * 2 * live * 256) and read.total == pytest.approx(expected + 2 * 2 * live * 256)


def test_each_query_heads_own_set_holds_its_estimated_mass(model, passage):
    rows = mass.masses(model, passage.prefills, passage.forced[:, :2], (0.7, 0.95))
    for row in rows:
        assert row["rows"] == 2 * 2 * 4 * 4  # steps, sequences, layers, query heads
        assert row["lowest_estimated_minus_p"] >= -1e-6
        assert row["estimated_mass"] >= row["top_p"]
        assert row["true_mass"] == pytest.approx(row["estimated_mass"], abs=0.02)
        assert 1 <= row["kept_a_query_head"] < LENGTH + TOKENS
    assert rows[0]["kept_a_query_head"] < rows[1]["kept_a_query_head"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_aggregation_runs_and_differs_from_none_at_full_budget(model, passage, aggregation):
    everything = methods.Method(ExactTopK(token_budget=1000, aggregation=aggregation))
    assert language.evaluate(model, passage, everything)["kl"] < MAX_KL
    few = methods.Method(ExactTopK(token_budget=30, budget_fraction=0.0, aggregation=aggregation), settings=NOTHING_FORCED)
    result = language.evaluate(model, passage, few)
    assert result["kept"] == 30 and result["kl"] > MAX_KL


def test_exact_top_p_keeps_the_mass_it_is_told_and_is_dense_at_one(model, passage):
    assert language.evaluate(model, passage, methods.Method(ExactTopP(mass=1.0)))["kl"] < MAX_KL
    exact = [language.evaluate(model, passage, methods.Method(ExactTopP(mass=p), settings=NOTHING_FORCED)) for p in (0.5, 0.9, 0.99)]
    assert exact[0]["kl"] > exact[1]["kl"] > exact[2]["kl"] > MAX_KL
    assert exact[0]["kept"] < exact[1]["kept"] < exact[2]["kept"] < exact[2]["live"]
    # The 4-bit estimate keeps about as many.
    estimated = language.evaluate(model, passage, methods.Method(Full(), 0.9, NOTHING_FORCED))
    assert estimated["kept"] == pytest.approx(exact[1]["kept"], rel=0.05)


def test_figures_by_document_do_not_depend_on_the_documents_beside_it(model, documents, passage, calibrated):
    """Batches of one size, because a matrix product rounds by its size, and one rounding can move a token across p."""
    method = methods.Method(Full(), 0.9, (("calibration", calibrated),))
    both = language.evaluate(model, passage, method)
    for place, document in enumerate(documents):
        twice = language.evaluate(model, language.prepare(model, [document, document], LENGTH, TOKENS, 0), method)
        for name, values in both["by_document"].items():
            assert values[place] == twice["by_document"][name][place]
    assert both["by_document"]["nll"][0] != both["by_document"]["nll"][1]
    for name, values in both["by_document"].items():
        assert both[name] == pytest.approx(sum(values) / 2, abs=1e-6)  # by_document holds six digits


def test_passages_together_are_as_one_of_all_their_documents():
    def result(kl, nll, dense_nll, worst, kept_by_head):
        by_document = {"kl": [kl], "nll": [nll], "dense_nll": [dense_nll]}
        figures = {"kl": kl, "nll": nll, "dense_nll": dense_nll, "worst_kl": worst, "kept": None, "kept_by_head": kept_by_head}
        return {"tokens": 4, **figures, "by_document": by_document}

    together = language.together([result(0.25, 2.0, 1.5, 0.5, [[8, 2]]), result(0.75, 3.0, 2.5, 1.0, [[4, 4]])])
    assert together == {
        "tokens": 8,
        "kl": 0.5,
        "nll": 2.5,
        "dense_nll": 2.0,
        "worst_kl": 1.0,
        "kept": None,
        "kept_by_head": [[6, 3]],
        "by_document": {"kl": [0.25, 0.75], "nll": [2.0, 3.0], "dense_nll": [1.5, 2.5]},
        "perplexity": math.exp(2.5),
        "perplexity_change": math.exp(0.5) - 1,
    }


def test_methods_survive_the_way_through_their_label():
    for text in (
        *methods.STANDARD,
        "tidal:token_budget=64,selection_layers=2+5+9,across_heads=False",
        "shadow_prefix:prefix_channels=16,sink_tokens=4",
        "exact_top_k:aggregation=logit_max",
        "quest:n/8:sink_tokens=0",
        "shadow_prefix:n/16:tau=0.05",
        "sparq:token_budget=100,budget_fraction=1/4",
        "exact_top_p:mass=0.99",
        "shadow_prefix:kv_cache_dtype=fp8",
    ):
        method = methods.parse_method(text)
        assert methods.parse_method(method.label) == method
        for top_p in (1.0, 0.85):
            pruned = method.with_top_p(top_p)
            assert methods.parse_method(pruned.setting) == pruned
    for text in ("dense", "dense:kv_cache_dtype=fp8"):
        method = methods.parse_method(text)
        assert method.label == method.setting == method.key == text and methods.parse_method(text) == method
    assert methods.parse_method("quest:n/4:.95") == methods.parse_method("quest:token_budget=1,budget_fraction=1/4").with_top_p(0.95)
    assert methods.parse_method("quest:8192:.85").setting == methods.parse_method("quest:.85").setting == "quest:0.85"
    assert methods.parse_method("shadow_prefix:256:.9:tau=.05").setting == "shadow_prefix:256:0.9:tau=0.05"
    method = methods.parse_method("quest:token_budget=1,budget_fraction=1/4,page_size=32").with_top_p(0.9)
    assert method.selector == Quest(token_budget=1, budget_fraction=0.25)
    assert method.config().page_size == 32 and method.config().top_p == 0.9 and method.config().dense_below == 0
    assert method.with_tokens(77).selector == Quest(token_budget=77) and method.with_tokens(77).top_p == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qest", "methods: expected one of dense, .*quest.*, got 'qest'"),
        ("quest:budget=3", "methods: quest: expected field=value with a field of token_budget, .*, got 'budget=3'"),
        ("quest:token_budget", "methods: quest: expected field=value"),
        ("quest:token_budget=many", "methods: Quest: token_budget: expected an integer >= 1, got 'many'"),
        ("quest:budget_fraction=1/0", "methods: Quest: budget_fraction: expected a number 0..1, got '1/0'"),
        ("quest:page_size=8", "methods: TwilightConfig: page_size: expected 16, 32 or 64, got 8"),
        ("quest:page_size=16,page_size=32", "methods: quest: expected page_size once, got 'page_size=32' again"),
        ("quest:n/4:8192", "methods: quest: expected token_budget once, got 'token_budget=8192' again"),
        ("quest:n/many", "methods: Quest: budget_fraction: expected a number 0..1, got '1/many'"),
        ("quest:.9:.8", "methods: quest: expected one p, 0 < p <= 1, got 'quest:.9:.8'"),
        ("quest:1.5", "methods: quest: expected one p, 0 < p <= 1, got 'quest:1.5'"),
        ("tidal:across_heads=maybe", "methods: Tidal: across_heads: expected True or False, got 'maybe'"),
        ("dense:page_size=16", "methods: expected dense or dense:kv_cache_dtype=fp8, got 'dense:page_size=16'"),
    ],
)
def test_bad_methods_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        methods.parse_method(text)


PROSE = ["The lamp was lit at dusk.", "Nobody came.", "A cart went by with apples.", "The bell rang twice."]


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_tasks_fit_their_length_and_repeat_by_seed(name):
    tokenizer, built = ByteTokenizer(), []
    build = tasks.TASKS[name].build
    task = dataclasses.replace(tasks.TASKS[name], build=lambda rng, units, *more: (built.append(units), build(rng, units, *more))[1])
    ids, sample = tasks.fit(tokenizer, task, 6000, 0.5, 7, PROSE)
    # As much filler as there is room for, found without building many prompts.
    more = tasks.encode(tokenizer, build(random.Random(7), built[-1] + 1, 0.5, PROSE))
    assert len(ids) <= 6000 and (len(more) > 6000 or name == "frequent_words" and len(ids) > 5990)
    assert len(built) < 16
    again, same = tasks.fit(tokenizer, tasks.TASKS[name], 6000, 0.5, 7, PROSE)
    assert ids == again and sample == same
    assert tasks.fit(tokenizer, tasks.TASKS[name], 6000, 0.5, 8, PROSE)[1].answers != sample.answers
    assert all(answer.split()[0] in sample.prompt for answer in sample.answers)
    assert tasks.score(" and ".join(sample.answers).upper(), sample.answers) == 1.0
    assert tasks.score("nothing of the kind", sample.answers) == 0.0


NEEDLES = ["passkey", "needle_single", "needle_multikey", "needle_haystack", "needle_multivalue", "needle_multiquery"]


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_lie_at_their_depth_and_only_there(name):
    for depth in (0.0, 0.5, 1.0):
        sample = tasks.TASKS[name].build(random.Random(3), 200, depth, PROSE)
        place = sample.prompt.index(sample.answers[0]) / len(sample.prompt)
        assert place == pytest.approx(depth, abs=0.08)
        assert len(set(sample.answers)) == len(sample.answers)


def told(prompt: str) -> dict[str, list[str]]:
    """The magic numbers of each name."""
    found: dict[str, list[str]] = {}
    for name, number in re.findall(r"One of the special magic numbers for (\w+ \w+) is: (\d{5})\.", prompt):
        found.setdefault(name, []).append(number)
    return found


@pytest.mark.parametrize(
    ("name", "keys", "values", "queries"),
    [("needle_multikey", 4, 1, 1), ("needle_haystack", 201, 1, 1), ("needle_multivalue", 1, 4, 1), ("needle_multiquery", 4, 1, 4)],
)
def test_needles_asked_for_are_all_those_of_the_names_in_the_question(name, keys, values, queries):
    sample = tasks.TASKS[name].build(random.Random(3), 200, 0.5, PROSE)
    found = told(sample.prompt)
    assert len(found) == keys and {len(numbers) for numbers in found.values()} == {values}
    question = sample.prompt.rsplit("\n", 1)[1]
    asked = [key for key in found if key in question]
    assert len(asked) == queries and all(key in sample.answer_start for key in asked)
    assert sorted(number for key in asked for number in found[key]) == sorted(sample.answers)
    # Every number counts alike, wherever it stands in the answer.
    assert tasks.score(f"{sample.answers[-1]} and 123", sample.answers) == pytest.approx(1 / (values * queries))


def test_names_differ_however_many_there_are():
    pairs = len(tasks.ADJECTIVES) * len(tasks.NOUNS)
    for count in (4, 500, pairs, pairs + 1):
        assert len(set(tasks._names(random.Random(0), count))) == count


def test_variable_tracking_leads_from_the_value_to_every_name():
    sample = tasks.TASKS["variable_tracking"].build(random.Random(5), 50, 0.2, PROSE)
    example, text = sample.prompt.split("\n\n")
    assert not any(name in example for name in sample.answers)
    assigned = re.findall(r"VAR (\w{5}) = (?:VAR (\w{5})|(\d{5}))", text)
    value = assigned[0][2]
    holders = {assigned[0][0]}
    for name, source, _ in assigned[1:]:
        assert source in holders
        holders.add(name)
    assert holders == set(sample.answers) and f"the value {value} in" in sample.prompt


def test_common_and_frequent_words_are_the_most_common():
    for units, times, rare in ((60, 10, 1), (1000, 63, 7)):
        sample = tasks.TASKS["common_words"].build(random.Random(1), units, 0.0, PROSE)
        example, asked = sample.prompt.split("\n\n")
        listed, solved = example.split("\nQuestion")
        for text, answers, counted in ((listed, re.findall(r"\d+\. (\w+)", solved), (3, 1)), (asked, sample.answers, (times, rare))):
            counts = Counter(re.findall(r"\d+\. (\w+)", text))
            assert {word for word, _ in counts.most_common(10)} == set(answers)
            assert (counts.most_common(11)[9][1], counts.most_common(11)[10][1]) == counted
    sample = tasks.TASKS["frequent_words"].build(random.Random(1), 500, 0.0, PROSE)
    counts = Counter(sample.prompt.split("\n")[1].split())
    assert tuple(word for word, _ in counts.most_common(3)) == sample.answers
    ranked = [count for _, count in counts.most_common(4)]
    assert ranked == sorted(set(ranked), reverse=True)


def test_prose_of_the_package_is_long_enough_to_evaluate_on():
    prose = texts.packaged_prose().values()
    assert len(prose) >= 8
    assert all(len(tasks.sentences(text)) > 150 and len(text) > 35_000 for text in prose)


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_texts_of_the_machine_are_long_repeat_and_share_nothing_with_held_out_ones():
    first, again, held_out = (texts.build("mixed", 3, 120_000, encode, other) for other in (False, False, True))
    assert [document.kind for document in first] == ["code", "prose", "mixed"]
    assert [document.name for document in first] == [document.name for document in again]
    assert all(len(document.ids) >= 120_000 for document in first + held_out)
    sources = [source for document in first + held_out for source in document.sources]
    assert len(sources) == len(set(sources))
    assert {"argparse.py", "canal.txt"} & set(sources) and {source.endswith(".txt") for source in first[2].sources} == {True, False}
    with pytest.raises(ValueError, match="text: expected 400000 tokens of prose, got [0-9]+ left on this machine"):
        texts.build("prose", 1, 400_000, encode)


def test_captured_mass_is_that_of_the_kept_set(model, passage):
    everything = mass.captured(model, passage.prefills, passage.forced[:, :2], methods.Method(Full()).config())
    assert torch.allclose(everything, torch.ones(2 * 2 * 4 * 4, dtype=torch.float64))  # steps, sequences, layers, query heads
    exact = methods.Method(ExactTopP(mass=0.9), settings=NOTHING_FORCED)
    found = mass.captured(model, passage.prefills, passage.forced[:, :2], exact.config())
    assert (found >= 0.9 - 1e-6).all() and found.mean() < 0.99
    told = mass.spread_of(found)
    assert told["mass_lowest"] <= told["mass_p1"] <= told["mass_mean"] < 1.0 and told["mass_rows"] == 64
    # Keys in 8 bits are weighed as what they stand for.
    whole, eighths = (methods.parse_method(text).config() for text in ("full:.9", "full:.9:kv_cache_dtype=fp8"))
    found, rounded = (mass.captured(model, passage.prefills, passage.forced[:, :2], config) for config in (whole, eighths))
    assert rounded.mean() == pytest.approx(float(found.mean()), abs=2e-3)
    assert mass.captured(model, passage.prefills, passage.forced[:, :2], methods.DENSE.config()).numel() == 0


def arguments(out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    small = [
        "--random-tiny",
        "--lengths",
        "400",
        "--depths",
        "0.5",
        "--limit",
        "1",
        "--tokens",
        "3",
        "--greedy-tokens",
        "3",
        "--mass-steps",
        "1",
    ]
    methods_ = ["--methods", "full", "quest:token_budget=64", "--p", "0.9"]
    return parser.parse_args(["--out", str(out), *small, *methods_, *more])


def test_a_run_writes_tables_and_resumes_after_an_interruption(tmp_path, monkeypatch):
    short = tmp_path / "prose.txt"
    short.write_text("The lamp was lit at dusk. Nobody came by. " * 40)
    extra = ("--documents", str(short), "--tasks", "language", "passkey", "--budget-log", "2")
    whole = tmp_path / "whole"
    assert command.run(arguments(whole, *extra)) == 0
    result = json.loads((whole / "results.json").read_text())
    keys = [cell["key"] for cell in result["cells"]]
    quest = "quest:64"
    assert keys == [
        "mass/400",
        "language/400/dense",
        "language/400/full p=1",
        "language/400/full p=0.9",
        f"language/400/{quest} p=1",
        f"language/400/{quest} p=0.9",
        f"language/400/equal/{quest} p=0.9",
        "passkey/400/dense",
        "passkey/400/full p=1",
        "passkey/400/full p=0.9",
        f"passkey/400/{quest} p=1",
        f"passkey/400/{quest} p=0.9",
    ]
    cells = {cell["key"]: cell for cell in result["cells"]}
    assert abs(cells["language/400/full p=1"]["kl"]) < MAX_KL < cells["language/400/full p=0.9"]["kl"]
    pruned, alone = cells[f"language/400/{quest} p=0.9"], cells[f"language/400/equal/{quest} p=0.9"]
    assert alone["method"] == f"quest:{round(pruned['kept'])}"
    table = [json.loads(line) for line in (whole / "table.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in table if row["task"] == "language"] == [
        "dense",
        "full:1.0",
        "full:0.9",
        "quest:64:1.0",
        "quest:64:0.9",
    ]
    row = table[4]
    assert row["kl"] == pruned["kl"] and row["without"]["kl"] == cells[f"language/400/{quest} p=1"]["kl"]
    assert 0 < row["mass_lowest"] <= row["mass_p1"] <= row["mass_mean"] <= 1 and row["mass_rows"] == 4 * 4
    assert {"command", "commit", "machine", "versions", "documents", "tokens_a_document"} <= set(row)
    table = (whole / "table.md").read_text()
    assert "400 tokens, teacher-forced" in table and "| full |" in table and "passkey, 400 tokens" in table
    assert result["options"]["seed"] == 0 and result["versions"]["torch"] == torch.__version__
    logs = sorted(path.name for path in (whole / "budget").iterdir())
    assert logs == ["400_full_p=0.9_0.jsonl", "400_quest_64_p=0.9_0.jsonl"]
    windows = [json.loads(line) for line in (whole / "budget" / logs[1]).read_text().splitlines()]
    assert [window["steps"] for window in windows] == [[1, 2], [3, 3]]
    kept = sum(window["sparse"]["kept"]["mean"] * window["sparse"]["calls"] for window in windows)
    assert kept / sum(window["sparse"]["calls"] for window in windows) == pytest.approx(pruned["kept"], rel=1e-5)
    if importlib.util.find_spec("matplotlib"):
        assert {path.stem for path in whole.glob("*.png")} == {"pareto", "accuracy", "mass", "budget_by_head"}

    # Cut short in the middle of a line, then resumed: no cell runs twice and the figures agree.
    cut = tmp_path / "cut"
    cut.mkdir()
    lines = (whole / "cells.jsonl").read_text().splitlines(keepends=True)
    (cut / "cells.jsonl").write_text("".join(lines[:10]) + lines[10][:25])
    measured = []
    original = runner.CellStore.add
    monkeypatch.setattr(runner.CellStore, "add", lambda store, cell: (measured.append(cell["key"]), original(store, cell))[1])
    with pytest.raises(ValueError, match="out: expected a new file"):
        command.run(arguments(cut, *extra))
    assert command.run(arguments(cut, *extra, "--resume")) == 0
    assert measured == keys[9:]
    resumed = {cell["key"]: cell for cell in json.loads((cut / "results.json").read_text())["cells"]}
    for key, cell in cells.items():
        assert {**resumed[key], "seconds": 0} == {**cell, "seconds": 0}
    with pytest.raises(ValueError, match="resume: expected the options of"):
        command.run(arguments(cut, *extra, "--resume", "--seed", "1"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--methods", "full@1.5"), "methods: full@1.5: expected 0 < value < 1, got 1.5"),
        (("--methods", "full:.9@.8"), "methods: full:.9@.8: expected p once, got 0.9 and .8"),
        (("--documents", "/none", "--held-out"), "held-out: expected --text, got none"),
        (("--methods", "full@"), "methods: full@: expected a number 0 < value < 1, got ''"),
        (("--mass-steps", "9"), r"mass_steps: expected 0\.\.3, got 9"),
        (("--greedy-tokens", "-1"), "greedy_tokens: expected >= 0, got -1"),
        (("--lengths", "0"), r"lengths\[0\]: expected >= 1, got 0"),
        (("--lengths", "40000", "--tasks", "passkey"), "lengths: expected at most 32765 tokens"),
        (("--methods", "shadow_prefix:calibration=/no/such/file"), "methods: shadow_prefix: calibration: expected a file"),
        (("--tasks", "pass"), "tasks: expected some of language, passkey, .*, got 'pass'"),
        (("--limit", "0"), "limit: expected >= 1, got 0"),
        (("--budget-log", "-1"), "budget_log: expected >= 0, got -1"),
        (("--depths", "2"), r"depths\[0\]: expected 0\.\.1, got 2.0"),
        (("--tasks", "common_words"), "lengths: common_words: expected at least [0-9]+ tokens, got 400"),
        (("--lengths", "100000", "--tasks", "language"), "documents: expected at least 100004 tokens each, got"),
        (("--methods", "dense"), "methods: expected at least one, got none"),
    ],
)
def test_a_run_that_cannot_work_is_refused_before_it_starts(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        command.run(arguments(tmp_path / "out", *more))


def test_cells_of_another_run_are_not_gone_on_with(tmp_path):
    path = tmp_path / "cells.jsonl"
    described = {"model": "a", "documents": ["x.txt"], "kept_by_default": {"recent_tokens": 64}}
    runner.CellStore(path, described, resume=False).add({"key": "one"})
    assert "one" in runner.CellStore(path, described, resume=True)
    for change in ({"model": "b"}, {"documents": ["y.txt"]}, {"kept_by_default": {"recent_tokens": 32}}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=f"resume: expected the {next(iter(change))} of "):
            runner.check_cells(path, described | change, resume=True)
    with pytest.raises(ValueError, match="out: expected a new file"):
        runner.check_cells(path, described, resume=False)
    path.write_text("no cells\n")
    with pytest.raises(ValueError, match="resume: expected cells of an earlier run"):
        runner.check_cells(path, described, resume=True)


def test_a_missing_model_is_named(tmp_path):
    args = arguments(tmp_path / "out")
    args.random_tiny, args.model = False, "/nowhere"
    with pytest.raises(ValueError, match="model: expected a folder with config.json, a .gguf file, a Hub id or smollm2, got /nowhere"):
        command.run(args)


def test_tables_put_a_method_beside_itself_alone():
    def cell(method, selector, p, kl, **more):
        base = {"task": "language", "length": 10, "method": method, "selector": selector, "top_p": p, "kl": kl, "worst_kl": kl, "top1": 1.0}
        budget = {"perplexity_change": 0.0, "kept": 5.0, "live": 10.0, "pruned": 0.5, "bytes_share": 0.4, "sparse_layers_bytes_share": 0.3}
        return base | budget | more

    cells = [
        cell("quest:x", "quest", 1.0, 0.1),
        cell("quest:x", "quest", 0.9, 0.2),
        cell("quest:y", "quest", 1.0, 0.3, equal_tokens_of="quest:x p=0.9"),
        cell("tidal", "tidal", 1.0, 0.4),
    ]
    rows = report.language_rows(cells, 10)
    assert [row[0] for row in rows] == ["quest:x", "tidal"]
    assert rows[0][1].startswith("0.1000") and rows[0][3].startswith("0.2000") and rows[0][8] == "0.3000"
    assert rows[0][4:7] == ("5 of 10", "50.0%", "30.0% (40.0%)") and rows[1][3] == "-"


def test_tasks_are_compared_with_dense_sample_by_sample():
    def cell(method, p, *scores):
        by_depth = {"0.1": list(scores[:2]), "0.9": list(scores[2:])}
        score = sum(scores) / len(scores)
        return {"task": "passkey", "length": 9, "method": method, "top_p": p, "score": score, "scores_by_depth": by_depth}

    cells = [cell("dense", 1.0, 1.0, 0.5, 0.0, 1.0), cell("quest", 0.9, 1.0, 0.25, 1.0, 1.0), cell("full", 0.9, 1.0, 0.5, 0.0, 1.0)]
    rows = report.task_rows(cells, "passkey", 9)
    assert rows == [
        ("dense", "62.5%", "-", "-", "-"),
        ("quest", "-", "0.9", "81.2%", "2 of 3"),
        ("full", "-", "0.9", "62.5%", "3 of 3"),
    ]
    # Where dense attention itself fails there is nothing to compare with, and the row says so.
    cells = [cell("dense", 1.0, 0.0, 0.0, 0.0, 0.0), cell("quest", 0.9, 0.0, 1.0, 0.0, 0.0)]
    assert report.task_rows(cells, "passkey", 9)[1] == ("quest", "-", "0.9", "25.0%", "dense fails on every sample")


def test_tasks_run_beside_dense_and_their_rows_say_how_dense_did(tmp_path):
    small = ("--limit", "2", "--lengths", "3200", "--only-pruned", "--methods", "dense", "dense:kv_cache_dtype=fp8", "full:1.0")
    names = ["needle_multiquery", "common_words"]
    assert command.run(arguments(tmp_path, "--tasks", *names, *small)) == 0
    rows = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert [(row["task"], row["setting"]) for row in rows] == [
        (name, method) for name in names for method in ("dense", "dense:kv_cache_dtype=fp8", "full:1.0")
    ]
    for row in rows:
        assert row["dense_score"] == 0.0 and row["no_worse_than_dense"] == "dense fails on every sample"  # random weights
        assert [len(scores) for scores in row["scores_by_depth"].values()] == [2]
        assert all(2700 < tokens <= 3200 for tokens in row["prompt_tokens"])
    texts_of = {cell["key"]: cell["texts"] for cell in json.loads((tmp_path / "results.json").read_text())["cells"]}
    assert all(len(set(found)) == 2 for found in texts_of.values())


def test_the_smoke_set_fails_when_a_default_is_worse_and_when_it_did_not_run():
    def rows(**worse):
        found = [{"setting": "dense", "task": "passkey", "score": 1.0}]
        for setting, limits in smoke.LIMITS.items():
            good = {name: getattr(limits, name) for name in ("kl", "worst_kl", "bytes_share", "mass_mean")}
            found.append({"setting": setting, "task": "language"} | good | worse)
            found.append({"setting": setting, "task": "passkey", "score": worse.get("score", 1.0)})
        return found

    # What runs is what has limits, and its defaults are among them.
    assert list(smoke.LIMITS) == [methods.parse_method(text).setting for text in smoke.SETTINGS["methods"]]
    assert methods.Method(TwilightConfig().selector, TwilightConfig().top_p).setting in smoke.LIMITS
    assert smoke.failures(rows()) == []
    for worse in ({"kl": 1.0}, {"worst_kl": 9.0}, {"bytes_share": 1.0}, {"mass_mean": 0.1}, {"kl": math.nan}):
        assert len(smoke.failures(rows(**worse))) == len(smoke.LIMITS)
    assert len(smoke.failures(rows(score=0.0))) == sum(limits.passkey > 0 for limits in smoke.LIMITS.values()) == 2
    assert smoke.failures([]) == [f"{setting}: expected a result, got none" for setting in smoke.LIMITS]


def test_options_that_change_cells_are_part_of_the_fingerprint():
    options = runner.Options(lengths=(10,), methods=(methods.DENSE,))
    assert runner.Options(lengths=(20,), methods=(methods.parse_method("full"),)).fingerprint() == options.fingerprint()
    assert dataclasses.replace(options, batch_size=2).fingerprint() != options.fingerprint()
