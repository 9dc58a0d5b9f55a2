"""Engines for the tests of the vLLM backend, and what they are asked."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

# Before vLLM is imported: everything in this process, and no network.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_CI_ENV="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402

VOCABULARY = 256
GPU = torch.cuda.is_available()
DTYPE = "float16" if GPU else "float32"  # FlashAttention takes no fp32
TIE = 0.05 if GPU else 0.0  # by how much less likely a token may be that rounding prefers


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
        if GPU:
            plain["gpu_memory_utilization"] = 0.3
        self.llm = LLM(str(model_path), dtype=DTYPE, seed=0, disable_log_stats=False, **(plain | options))

    def generate(self, prompts: list[list[int]], tokens: int | list[int]) -> list[list[int]]:
        """Greedy continuations."""
        return [list(out.outputs[0].token_ids) for out in self.outputs(prompts, tokens)]

    def outputs(self, prompts, tokens, logprobs: int | None = None):
        counts = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        params = [greedy(count, logprobs) for count in counts]
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def margins(self, prompts: list[list[int]], tokens: int | list[int]) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy continuations, and by how much each token was more likely than the next best, in log space."""
        outs = [out.outputs[0] for out in self.outputs(prompts, tokens, logprobs=2)]
        steps = [[sorted((entry.logprob for entry in step.values()), reverse=True) for step in out.logprobs] for out in outs]
        return [list(out.token_ids) for out in outs], [[best[0] - best[1] for best in row] for row in steps]

    def metric(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def close(self) -> None:
        """Ends what engines of one process share: vLLM freezes an engine's objects, so that no collection does."""
        llm, self.llm = self.llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            type(current_platform)._global_graph_pool = None  # which died with this engine's graphs


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


def greedy(tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs)


@dataclass(frozen=True)
class Expected:
    """What vLLM's own attention gives for one of REQUESTS."""

    tokens: list[list[int]]
    margins: list[list[float]]

    def check(self, tokens: list[list[int]], rows: slice = slice(None)) -> None:
        """The same tokens; on a GPU, up to the first that rounding may decide, and nearly all of them all the same."""
        same = total = 0
        for mine, theirs, margins in zip(tokens, self.tokens[rows], self.margins[rows], strict=True):
            first = next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), len(theirs))
            assert first == len(theirs) or margins[first] < TIE, (first, mine, theirs, margins)
            same, total = same + first, total + len(theirs)
        assert same >= total * (0.5 if TIE else 1.0)
