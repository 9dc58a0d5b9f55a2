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
from twilight_ops.integration import Generation, generate


def load(path: str, dtype: torch.dtype):
    """The model, sharded over the processes that torchrun started."""
    sharded = {"distributed_config": DistributedConfig(tp_plan="auto")} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="twilight", **sharded).eval()
    return model.cuda() if torch.cuda.is_available() and model.device.type != "cuda" else model


def run(args: argparse.Namespace) -> Generation:
    model = load(args.model, getattr(torch, args.dtype))
    # Random tokens, the same in every process; a tokenizer's would be as good.
    ids = torch.randint(3, model.config.vocab_size, (args.batch, args.prompt_tokens), generator=torch.Generator().manual_seed(1))
    config = TwilightConfig(top_p=args.top_p, dense_below=0)  # prunes at every length
    return generate(model, ids.to(model.device), config, max_new_tokens=args.new_tokens, eos_token_ids=())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama-family model; its KV heads must be divisible by the processes")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--top-p", type=float, default=0.95)
    generation = run(parser.parse_args())
    if os.environ.get("RANK", "0") == "0":
        print(generation.tokens.tolist())
        print(f"{generation.ms_per_token:.2f} ms a step, {generation.capture}, {generation.graphs} graph")
        print(generation.budget)
    # Recorded graphs hold collectives, which must go before their group; compiled steps hold the graphs.
    torch.compiler.reset()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
