"""Tasks with checkable answers through the HTTP API of `vllm serve`, with vLLM's own attention or ours.

python -m twilight_ops calibrate --model MODEL --text book.txt --out calibration.safetensors
python -m bench.vllm_needle --model MODEL --length 31k --twilight '{"calibration": "calibration.safetensors", "dense_below": 0}'
python -m bench.vllm_needle --model MODEL --length 31k
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from twilight_ops.evaluation import tasks

from .run import tokens_of

PROSE = Path(tasks.__file__).parents[1] / "data" / "prose" / "moby_dick.txt"
SHOWN = ("twilight:", "Enum.CUSTOM backend", "Graph capturing finished")  # of the server's log


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=tasks.TASKS, default="needle_single")
    parser.add_argument("--length", type=tokens_of, default=31 * 1024, help="tokens of each prompt at most (default 31k)")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="where in the prompt the answer lies, 0 to 1")
    parser.add_argument("--twilight", type=json.loads, help="settings of our backend, as JSON; without them vLLM's own attention")
    parser.add_argument("--start-seconds", type=float, default=300.0, help="that the server may take to start (default 300)")
    parser.add_argument("serve", nargs="*", metavar="-- ARGUMENT", help="further arguments of `vllm serve`")
    return parser.parse_args()


def reply(url: str, body: dict | None = None, timeout: float = 120.0) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        text = answer.read()
    return json.loads(text) if text else {}


def wait(url: str, server: subprocess.Popen, seconds: float) -> None:
    """Until the server is healthy.

    Raises:
        RuntimeError: it has ended, or is not there in time.
    """
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            reply(f"{url}/health", timeout=5.0)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError(f"the server ended with code {server.poll()}" if server.poll() is not None else f"no server after {seconds} s")


def ask(url: str, args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    tokenizer, task = AutoTokenizer.from_pretrained(args.model), tasks.TASKS[args.task]
    prose = tasks.sentences(PROSE.read_text("utf-8"))
    for seed, depth in enumerate(args.depths):
        prompt, sample = tasks.fit(tokenizer, task, args.length, depth, seed, prose)
        start = time.monotonic()
        body = {"model": "served", "prompt": list(prompt), "max_tokens": task.new_tokens, "temperature": 0}
        text = reply(f"{url}/v1/completions", body)["choices"][0]["text"]
        row = {"task": task.name, "tokens": len(prompt), "depth": depth, "score": tasks.score(text, sample.answers)}
        print(json.dumps(row | {"expected": sample.answers, "text": text, "seconds": round(time.monotonic() - start, 2)}), flush=True)


def main() -> None:
    args = arguments()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model, "--port", str(port), "--served-model-name", "served"]
    command += ["--generation-config", "vllm"]  # a model's own penalties of repetition would count against an answer from the prompt
    if args.twilight is not None:
        settings = json.dumps({"twilight": args.twilight})
        command += ["--block-size", "16", "--attention-backend", "CUSTOM", "--additional-config", settings]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen([*command, *args.serve], stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, server, args.start_seconds)
            ask(url, args)
        except BaseException:
            log.seek(0)
            print(log.read()[-6000:], file=sys.stderr)
            raise
        finally:
            server.terminate()
        server.wait()
        log.seek(0)
        print("".join(line for line in log if any(text in line for text in SHOWN)))


if __name__ == "__main__":
    main()
