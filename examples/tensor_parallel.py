"""A model that is sharded over several GPUs, or over processes without any. Run:

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model PATH

transformers shards the model, and every process keeps the cache of its own KV heads: cache, decoder and `generate` are used as in one
process, and a step is still one graph. NCCL serves processes with a GPU each, gloo those without. Started alone, it loads the whole model.
"""

import argparse
import gc
import os

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from twilight_ops import TwilightConfig
from twilight_ops.integration import generate


def run(args: argparse.Namespace) -> None:
    sharded = {"distributed_config": DistributedConfig(tp_plan="auto")} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="twilight", **sharded).eval()
    if torch.cuda.is_available() and model.device.type != "cuda":
        model = model.cuda()
    # Random tokens, the same in every process; a tokenizer's would be as good.
    ids = torch.randint(3, model.config.vocab_size, (1, args.prompt_tokens), generator=torch.Generator().manual_seed(1))
    config = TwilightConfig(dense_below=0)  # prunes at every length
    generation = generate(model, ids.to(model.device), config, max_new_tokens=args.new_tokens, eos_token_ids=())
    if os.environ.get("RANK", "0") == "0":
        print(generation.tokens.tolist())
        print(f"{generation.ms_per_token:.2f} ms a step, {generation.capture}, {generation.graphs} graph")
        print(generation.budget)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama-family model; its KV heads must be divisible by the processes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=16)
    run(parser.parse_args())
    # Recorded graphs hold collectives, which must go before their group; compiled steps hold the graphs.
    torch.compiler.reset()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
