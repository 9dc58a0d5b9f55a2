"""One rank of a tensor-parallel generation: transformers shards the model, every rank keeps the cache of its own KV heads.

    torchrun --nproc-per-node 2 -m twilight_ops.integration.tensor_parallel --model PATH --prompt-tokens 300 --output DIR

writes DIR/rank<r>.pt with the tokens, the kept positions of every sparse layer, step and local KV head, and, with --timed-steps, the
captured step's tokens and time. NCCL serves processes with a GPU each, gloo those without; 32-bit models run everywhere.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from .. import decode_step
from ..config import TwilightConfig
from ..paged_kv_cache import PagedKVLayer
from ..selectors import Full, Quest, ShadowPrefix
from .hf import attention
from .hf.cache import TwilightCache
from .hf.generate import Decoder

SELECTORS = {"full": Full, "quest": Quest, "shadow_prefix": ShadowPrefix}


class KeptRecorder:
    """Stands in for `decode_step.attend` and copies the kept positions of every call to the host; for inspection, not for speed."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []  # [B, Hkv of this rank, M * S] int32, -1 pads

    def __call__(self, q: Tensor, layer: PagedKVLayer, page_table: Tensor, seq_lens: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
        batch, kv_heads = q.shape[0], layer.k_cache.shape[1]
        positions = page_table.shape[1] * layer.page_size
        kept = torch.empty(batch, kv_heads, positions, dtype=torch.int32, device=q.device)
        counts = torch.empty(batch, kv_heads, dtype=torch.int32, device=q.device)
        result = decode_step.attend(q, layer, page_table, seq_lens, sm_scale, kept, counts)
        self.calls.append(kept.cpu())
        return result


def load_sharded(path: str, dtype: torch.dtype):
    """The model, sharded over the processes that torchrun started; alone it is loaded whole."""
    kwargs = {"dtype": dtype, "attn_implementation": "twilight"}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        kwargs["distributed_config"] = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()
    if torch.cuda.is_available() and model.device.type != "cuda":
        model = model.cuda()
    return model


def prompt(model, batch: int, tokens: int) -> Tensor:
    """Random token ids [B, T], the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    """Generates once with the kept sets recorded, then, where asked, times the captured step."""
    rank = int(os.environ.get("RANK", "0"))
    model = load_sharded(args.model, getattr(torch, args.dtype))
    config = TwilightConfig(
        selector=SELECTORS[args.selector](token_budget=args.token_budget, budget_fraction=0.0),
        top_p=args.top_p,
        dense_layers=1,
        dense_below=0,
    )
    ids = prompt(model, args.batch, args.prompt_tokens)
    room = args.prompt_tokens + args.new_tokens + args.timed_steps + 16

    recorder = KeptRecorder()
    cache = TwilightCache(model.config, config, max_batch_size=args.batch, max_cache_len=room)
    attention.attend, original = recorder, attention.attend
    try:
        generation = Decoder(model, cache, args.batch, eos_token_ids=(), capture="eager").generate(ids, max_new_tokens=args.new_tokens)
    finally:
        attention.attend = original
    result = {"tokens": generation.tokens.cpu(), "kept": recorder.calls, "kv_heads": recorder.calls[0].shape[1]}

    if args.timed_steps:
        cache.reset()
        decoder = Decoder(model, cache, args.batch, eos_token_ids=())
        result["captured_tokens"] = decoder.generate(ids, max_new_tokens=args.new_tokens).tokens.cpu()
        times = []
        for _ in range(args.timed_steps):
            start = time.perf_counter()
            decoder.step()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
        result["ms_per_step"] = statistics.median(times)
        result["capture"] = decoder.capture
    args.output.mkdir(parents=True, exist_ok=True)
    torch.save(result, args.output / f"rank{rank}.pt")
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama-family model")
    parser.add_argument("--output", type=Path, required=True, help="folder for rank<r>.pt")
    parser.add_argument("--selector", choices=sorted(SELECTORS), default="shadow_prefix")
    parser.add_argument("--token-budget", type=int, default=128)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--timed-steps", type=int, default=0, help="steps of the captured graph to time after the recorded run")
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_arguments())
    # Recorded graphs hold collectives, which must go before their group; compiled steps hold the graphs.
    torch.compiler.reset()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
