"""Tokens a second of vLLM, with its own attention or ours: `python -m bench.vllm_throughput --help`. One method a process, one row a batch.

Random weights of a real shape, drawn so that logits have the standard deviation of bench/llama.py. Prompts of random tokens are computed
once; then the same requests, whose prefix vLLM has cached, decode few and many tokens, and the difference is the time of the steps between.
No two prompts share a block, so nothing is read twice from the cache of the GPU.

    python -m bench.vllm_throughput --batch 25 1 --length 32k --json rows.jsonl
    python -m bench.vllm_throughput --batch 25 1 --length 32k --twilight '{"selector": "quest", "top_p": 0.85}' --json rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from twilight_ops import ShadowPrefix, TwilightConfig, calibration
from twilight_ops.integration.vllm import versions
from twilight_ops.integration.vllm.metrics import BudgetReports
from twilight_ops.layer import allocate_layer

from .llama import SHAPES
from .run import tokens_of
from .workload import SPREAD

WARM_UP = 8  # tokens of the shorter run
BLOCK = 16


class Worker(BudgetReports):
    """What the worker processes are asked beside their reports."""

    model_runner: Any

    def attention(self) -> str:
        """The backend that vLLM chose, and which batches of decode steps replay a full CUDA graph."""
        names = {group.backend.get_name() for groups in self.model_runner.attn_groups for group in groups}
        if names == {"FLASH_ATTN"}:
            names = {f"FLASH_ATTN {versions.flash_attention(self.model_runner.model_config.get_head_size())[1]}"}
        graphs = getattr(getattr(self.model_runner, "cudagraph_manager", None), "graphs", ())
        return f"{', '.join(sorted(names))}, full graphs of {sorted(graph.num_tokens for graph in graphs)} tokens"

    def forbid_waits(self) -> None:
        """From here on, what our backend does on the host in a step raises where it waits for the GPU."""
        from twilight_ops.integration.vllm.backend import TwilightImpl, TwilightMetadataBuilder

        def never_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode(before)

            return call

        TwilightMetadataBuilder.build = never_waiting(TwilightMetadataBuilder.build)  # type: ignore[method-assign]
        TwilightImpl.forward = never_waiting(TwilightImpl.forward)  # type: ignore[method-assign]

    def draw_weights(self) -> None:
        """Normal weights: queries and keys whose products have the standard deviation SPREAD, outputs as small as trained ones."""
        with torch.no_grad():
            for name, weight in self.model_runner.get_model().named_parameters():
                if "norm" in name:
                    weight.fill_(1.0)
                else:
                    weight.normal_(std=0.5 * weight.shape[-1] ** -0.5)
                if "qkv_proj" in name:
                    # Their inputs have a mean square of 1, so an entry of q or k has a variance of std^2 times their number.
                    config = self.model_runner.model_config.hf_text_config
                    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
                    queries_and_keys = weight.shape[0] * (heads + kv_heads) // (heads + 2 * kv_heads)
                    weight[:queries_and_keys].normal_(std=(SPREAD / weight.shape[1]) ** 0.5)


def calibrate(path: Path, shape: Any) -> None:
    """A file that orders nothing and takes a quarter of the channels: random keys have no better order."""
    plan = TwilightConfig(ShadowPrefix(prefix_channels=shape.head_dim // 4)).layer_plan(0, "cpu", 1)
    sizes = (1, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim, BLOCK, torch.bfloat16, torch.device("cpu"))
    calibration.save([allocate_layer(plan, *sizes, index=layer).shadow for layer in range(shape.num_hidden_layers)], path, {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama31-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[25], help="one row each; the prompts of the largest are computed once")
    parser.add_argument("--length", type=tokens_of, default=32768, help="tokens of each prompt (default 32k)")
    parser.add_argument("--steps", type=int, default=64, help="timed decode steps (default 64)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--twilight", type=json.loads, help="settings of our backend, as JSON; without them vLLM's own attention")
    parser.add_argument("--backend", help="which of vLLM's own backends, such as FLASH_ATTN or FLASHINFER; by default its choice")
    parser.add_argument("--memory", type=float, default=0.96, help="share of the GPU's memory for vLLM (default 0.96)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--no-compile", action="store_true", help="no torch.compile, which saves a minute of start-up; graphs all the same")
    parser.add_argument("--json", type=Path, help="file that the row is added to")
    return parser.parse_args()


def measure(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    import vllm
    from vllm import LLM, SamplingParams

    shape = SHAPES[args.shape]
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(folder / "model")
    options: dict[str, Any] = {}
    if args.twilight is not None:
        settings = dict(args.twilight)
        if "calibration" not in settings:
            calibrate(folder / "calibration.safetensors", shape)
            settings["calibration"] = str(folder / "calibration.safetensors")
        options = {"attention_backend": "CUSTOM", "additional_config": {"twilight": settings}}
    elif args.backend is not None:
        options = {"attention_backend": args.backend}
    if not args.eager:
        options["compilation_config"] = {"cudagraph_capture_sizes": sorted(args.batch)}
        if args.no_compile:
            options["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = args.memory
    most, tokens = max(args.batch), args.length + WARM_UP + args.steps + BLOCK
    llm = LLM(
        str(folder / "model"),
        load_format="dummy",
        dtype=args.dtype,
        skip_tokenizer_init=True,
        block_size=BLOCK if args.twilight is not None or torch.cuda.is_available() else 32,
        max_model_len=tokens,
        max_num_seqs=most,
        tensor_parallel_size=args.tensor_parallel_size,
        enforce_eager=args.eager,
        enable_prefix_caching=True,
        worker_extension_cls="bench.vllm_throughput.Worker",
        **options,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    if cache.num_gpu_blocks * cache.block_size < most * tokens:
        raise SystemExit(f"the cache holds {cache.num_gpu_blocks * cache.block_size} tokens, and {most} sequences need {most * tokens}")
    attention = llm.collective_rpc("attention")[0]
    if torch.cuda.is_available():  # a CPU engine has packed its weights by now: it shows that this file runs, and no figures
        llm.collective_rpc("draw_weights")
    draw = random.Random(0)
    prompts = [{"prompt_token_ids": draw.choices(range(shape.vocab_size), k=args.length)} for _ in range(most)]

    def seconds(batch: int, tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts[:batch], params, use_tqdm=False)
        return time.perf_counter() - start

    prefill = seconds(most, 1)
    for batch in args.batch:
        seconds(batch, WARM_UP)
        if args.twilight is not None:
            llm.collective_rpc("twilight_reset_budget")
        steps = [seconds(batch, WARM_UP + args.steps) - seconds(batch, WARM_UP) for _ in range(args.repeats)]
        step = statistics.median(steps) / args.steps
        row = {
            "op": "vllm",
            "method": "vllm" if args.twilight is None else "twilight",
            "settings": args.twilight if args.twilight is not None else args.backend,
            "attention": attention,
            "shape": args.shape,
            "batch": batch,
            "length": args.length,
            "dtype": args.dtype,
            "ranks": args.tensor_parallel_size,
            "graphs": not args.eager,
            "compiled": not (args.eager or args.no_compile),
            "ms_per_step": round(step * 1e3, 3),
            "tokens_per_s": round(batch / step, 1),
            "spread": round((max(steps) - min(steps)) / args.steps * 1e3, 3),
            "prefill_s": round(prefill, 2),
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }
        if args.twilight is not None:
            row["kept"] = llm.collective_rpc("twilight_budget_report")[0]["text"].splitlines()[-1]
        yield row
    if args.twilight is not None and torch.cuda.is_available():
        llm.collective_rpc("forbid_waits")
        seconds(most, WARM_UP)
        print("neither building metadata nor prompts of ours waited for the GPU")


def main() -> None:
    args = arguments()
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process may have asked for its GPUs already
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(args, Path(folder)):
            print(json.dumps(row), flush=True)
            if args.json is not None:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
