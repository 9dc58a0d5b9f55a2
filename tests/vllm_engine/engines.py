"""Engines for the tests of the vLLM backend, and what they are asked."""

from __future__ import annotations

import os
import random

# Before vLLM is imported: everything in this process, and no network.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_CI_ENV="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

from vllm import LLM, SamplingParams  # noqa: E402

VOCABULARY = 256


def numbers(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


class Engine:
    """An LLM with the settings of all tests; `twilight` None keeps vLLM's own attention."""

    def __init__(self, model_path, twilight: dict | None, **options):
        if twilight is not None:
            options |= {"attention_backend": "CUSTOM", "additional_config": {"twilight": twilight}}
        plain = {
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "num_gpu_blocks_override": 400,
        }
        self.llm = LLM(str(model_path), dtype="float32", seed=0, disable_log_stats=False, **(plain | options))

    def generate(self, prompts: list[list[int]], tokens: int | list[int]) -> list[list[int]]:
        """Greedy continuations."""
        return [list(out.outputs[0].token_ids) for out in self.outputs(prompts, tokens)]

    def outputs(self, prompts, tokens):
        counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        params = [greedy(count) for count in counts]
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def metric(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


def several(seed: int) -> tuple[list[list[int]], list[int]]:
    """64 requests of random lengths, and how many tokens each of them wants."""
    draw = random.Random(seed)
    prompts = [numbers(draw.randrange(1, 120), number) for number in range(64)]
    return prompts, [draw.randrange(1, 24) for _ in prompts]


# What engines are asked, by name: prompts, and tokens to generate.
REQUESTS = {
    "several": several(1),
    "long and short": ([numbers(length, seed) for seed, length in enumerate((5, 37, 300, 130, 1, 64, 200, 17, 90, 33))], 12),
    "four": ([numbers(length, seed) for seed, length in enumerate((5, 130, 64, 33))], 12),
    "repeating": ([numbers(9, seed) * 5 for seed in range(4)] + [numbers(50, seed) for seed in range(4)], 24),
}


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
