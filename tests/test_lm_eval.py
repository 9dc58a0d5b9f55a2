"""The adapter for lm-evaluation-harness on a tiny random model: scores are those of the method, and a local task runs to its end."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs pip install 'twilight_ops[lm-eval]'")
from lm_eval.api.instance import Instance  # noqa: E402

from twilight_ops.evaluation import prefill  # noqa: E402
from twilight_ops.evaluation.lm_eval import TwilightLM  # noqa: E402

CONTEXT = "The lamp was lit at dusk. Nobody came by. " * 5


@pytest.fixture(scope="module")
def dense():
    return TwilightLM("random-tiny", method="dense", device="cpu", max_length=600)


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]


def test_dense_scores_are_those_of_one_forward(dense):
    ((score, greedy),) = dense.loglikelihood(asked("loglikelihood", CONTEXT, " A cart"))
    ids = torch.tensor([list((CONTEXT.rstrip() + "  A cart").encode())])
    with torch.no_grad(), prefill.attention(dense.model, "sdpa"):
        logits = dense.model(input_ids=ids).logits[0].log_softmax(-1)
    first = len(CONTEXT.rstrip())
    expected = logits[torch.arange(first - 1, ids.shape[1] - 1), ids[0, first:]].sum().item()
    assert score == pytest.approx(expected, abs=1e-3) and not greedy
    (rolled,) = dense.loglikelihood_rolling(asked("loglikelihood_rolling", "A cart went by."))
    assert rolled == pytest.approx(dense.loglikelihood(asked("loglikelihood", "", "A cart went by."))[0][0], abs=1e-3)


def test_what_greedy_decoding_gives_is_scored_as_such_and_stops_where_it_should(dense):
    (text,) = dense.generate_until(asked("generate_until", CONTEXT, {"until": [], "max_gen_toks": 4}))
    tokens = list(dense._greedy(dense._encode(CONTEXT), 4))
    assert dense.tokenizer.decode(tokens) == text
    assert dense._score(dense._encode(CONTEXT), tokens)[1]
    if text[1:]:
        (cut,) = dense.generate_until(asked("generate_until", CONTEXT, {"until": text[1], "max_gen_toks": 4}))
        assert cut == text.split(text[1])[0]
    with pytest.raises(ValueError, match="do_sample: expected greedy decoding"):
        dense.generate_until(asked("generate_until", CONTEXT, {"do_sample": True, "temperature": 0.7}))


def test_a_method_decodes_the_continuation(dense):
    sparse = TwilightLM("random-tiny", method="streaming:32:.5:recent_tokens=8,sink_tokens=0", device="cpu", max_length=600)
    request = asked("loglikelihood", CONTEXT, " A cart went by")
    assert sparse.loglikelihood(request)[0][0] != pytest.approx(dense.loglikelihood(request)[0][0], abs=1e-4)
    with pytest.raises(ValueError, match="method: expected one of dense"):
        TwilightLM("random-tiny", method="dreamt")


def test_a_local_task_runs_to_its_end(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lines = [{"question": f"{i} lamps and one are", "choices": [str(i + 1), str(i + 2)], "answer": 0} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "lamps.yaml").write_text(
        "task: lamps\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: answer\n"
        "metric_list: [{metric: acc}]\n"
    )
    found = simple_evaluate(model=dense, tasks=["lamps"], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
    assert 0.0 <= found["results"]["lamps"]["acc,none"] <= 1.0 and found["n-samples"]["lamps"]["original"] == 4
