"""vLLM's own launchers: two ranks of tensor parallelism, and `vllm serve` as a client sees it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def serving(model_path, twilight: dict, log, *arguments: str) -> Iterator[str]:
    """The address of a `vllm serve` of the model "tiny", while it runs."""
    port = free_port()
    options = f"--dtype {DTYPE} --enforce-eager --block-size 32 --max-model-len 512 --max-num-seqs 8 --max-num-batched-tokens 64".split()
    options += ["--distributed-executor-backend", "uni"]  # the engine is its own worker: a process less that imports vLLM
    options += ["--gpu-memory-utilization", "0.3"] if GPU else []
    settings = ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"twilight": twilight})]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path), "--port", str(port)]
    command += ["--served-model-name", "tiny", *options, *settings, *arguments]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as server:
        try:
            deadline = time.monotonic() + 480  # up to four processes import vLLM, on cores that may be busy
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:  # one that is still starting may miss it
                server.kill()


REQUEST = {"model": "tiny", "max_tokens": 12, "temperature": 0}
EXACTLY = {"ignore_eos": True, "return_token_ids": True}


def test_vllm_serve_streams_to_an_openai_client(model_path, everything, expected, tmp_path):
    openai = pytest.importorskip("openai", reason="vLLM brings the OpenAI client")
    with serving(model_path, everything, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        streams = []
        for prompt in REQUESTS["four"][0][:2]:
            chunks = list(client.completions.create(**REQUEST, prompt=prompt, stream=True, extra_body=EXACTLY))
            streams.append([token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()])
            assert len(chunks) > 1
        expected["four"].check(streams, slice(2))


@pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="two GPUs, one a replica")
def test_each_of_two_replicas_gives_the_tokens_of_one_engine(model_path, everything, expected, tmp_path):
    """Data parallelism: engines of their own behind one address, and the header of a request says which of them answers."""
    with serving(model_path, everything, tmp_path / "log", "--data-parallel-size", "2", "--api-server-count", "1") as url:
        for rank in range(2):
            tokens = []
            for prompt in REQUESTS["four"][0]:
                body = json.dumps(REQUEST | EXACTLY | {"prompt": prompt}).encode()
                headers = {"Content-Type": "application/json", "X-data-parallel-rank": str(rank)}
                with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body, headers), timeout=60) as reply:
                    tokens.append(json.load(reply)["choices"][0]["token_ids"])
            expected["four"].check(tokens)
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith("vllm:generation_tokens_total{")]
        assert sorted(float(line.rsplit(" ", 1)[1]) for line in lines) == [48.0, 48.0], lines


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
