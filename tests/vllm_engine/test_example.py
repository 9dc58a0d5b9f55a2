"""The example of vLLM answers."""

import argparse

import engines
import vllm_offline


def test_the_example_answers_two_prompts_with_every_layer_sparse(model_path, tmp_path, monkeypatch, capsys):
    made = vllm_offline.LLM
    few = {"dtype": engines.DTYPE, "num_gpu_blocks_override": 100} | ({"gpu_memory_utilization": 0.3} if engines.GPU else {})
    monkeypatch.setattr(vllm_offline, "LLM", lambda *model, **options: made(*model, **options | few))
    files = [tmp_path / name for name in ("first.txt", "second.txt")]
    for path, words in zip(files, ("the lamp ", "a canal "), strict=True):
        path.write_text(words * 20)
    twilight = {"calibration": str(model_path.with_suffix(".safetensors")), "dense_below": 0}
    settings = {"new_tokens": 6, "max_model_len": 512, "enforce_eager": True, "ignore_eos": True}
    vllm_offline.run(argparse.Namespace(model=str(model_path), prompt_file=files, twilight=twilight, **settings))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if ".txt:" in line] == ["first.txt", "second.txt"]
