"""vLLM's own launchers: two ranks of tensor parallelism, and `vllm serve` as a client sees it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from engines import REQUESTS

from twilight_ops import calibration

REPORTS = "twilight_ops.integration.vllm.metrics.BudgetReports"


@pytest.fixture
def everything(calibrated):
    """ShadowPrefix that proposes every token and prunes none: exact, and yet it runs on the calibration."""
    return {"selector": calibrated | {"token_budget": 4096}, "top_p": 1.0, "dense_below": 0}


def test_two_ranks_give_the_tokens_of_one(engine, everything, expected, model_path):
    pair = engine(everything, worker_extension_cls=REPORTS, distributed_executor_backend="mp", tensor_parallel_size=2)
    assert pair.generate(*REQUESTS["four"]) == expected["four"]
    reports = pair.llm.collective_rpc("twilight_budget_report")
    calls = [[head["calls"] for layer in report["layers"] for head in layer["heads"]] for report in reports]
    assert calls == [[4 * 11] * 4] * 2, "a head a rank and layer, and every token but the first from a decode step"

    # Each rank has the prefixes of its own heads.
    file = str(model_path.with_suffix(".safetensors"))
    prefixes = [calibration.load(file, layer, 2, 64)[1].tolist() for layer in range(4)]
    assert pair.llm.collective_rpc("twilight_prefix_channels") == [[heads[rank : rank + 1] for heads in prefixes] for rank in range(2)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_vllm_serve_streams_to_an_openai_client(model_path, everything, expected, tmp_path):
    openai = pytest.importorskip("openai", reason="vLLM brings the OpenAI client")
    port, log = free_port(), tmp_path / "log"
    options = "--dtype float32 --enforce-eager --block-size 32 --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64".split()
    settings = ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"twilight": everything})]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model_path), "--port", str(port), "--served-model-name", "tiny"]
    with log.open("w") as out, subprocess.Popen([*command, *options, *settings], stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 240
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            for prompt, tokens in list(zip(REQUESTS["four"][0], expected["four"], strict=True))[:2]:
                request = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
                extra = {"ignore_eos": True, "return_token_ids": True}
                chunks = list(client.completions.create(**request, stream=True, extra_body=extra))
                streamed = [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()]
                assert len(chunks) > 1
                assert streamed == tokens
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
