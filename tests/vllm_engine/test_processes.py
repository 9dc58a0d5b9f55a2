"""vLLM's own launchers: two ranks of tensor parallelism, and `vllm serve` as a client sees it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from engines import DTYPE, GPU, REQUESTS

from twilight_ops import calibration

REPORTS = "twilight_ops.integration.vllm.metrics.BudgetReports"


@pytest.fixture
def everything(calibrated):
    """ShadowPrefix that proposes every token and prunes none: exact, and yet it runs on the calibration."""
    return {"selector": calibrated | {"token_budget": 4096}, "top_p": 1.0, "dense_below": 0}


@pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="two GPUs, one a rank")
def test_two_ranks_give_the_tokens_of_one(engine, everything, expected, model_path):
    pair = engine(everything, worker_extension_cls=REPORTS, distributed_executor_backend="mp", tensor_parallel_size=2)
    expected["four"].check(pair.generate(*REQUESTS["four"]))
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
    options = f"--dtype {DTYPE} --enforce-eager --block-size 32 --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64".split()
    options += ["--gpu-memory-utilization", "0.3"] if GPU else []
    settings = ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"twilight": everything})]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path), "--port", str(port)]
    command += ["--served-model-name", "tiny"]
    with log.open("w") as out, subprocess.Popen([*command, *options, *settings], stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 240
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
            streams = []
            for prompt in REQUESTS["four"][0][:2]:
                request = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0}
                extra = {"ignore_eos": True, "return_token_ids": True}
                chunks = list(client.completions.create(**request, stream=True, extra_body=extra))
                streams.append([token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()])
                assert len(chunks) > 1
            expected["four"].check(streams, slice(2))
        finally:
            server.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
