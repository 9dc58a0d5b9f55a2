"""`generate` of transformers with a sparse cache, streamed. Run: python examples/generate.py --model PATH --prompt-file book.txt

Only two lines differ from dense decoding: the attention's name and the cache. Prints the text, and what was kept of the cache.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from twilight_ops import ShadowPrefix, TwilightConfig
from twilight_ops.integration import TwilightCache, cache_argument


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="twilight").to(device).eval()
    inputs = tokenizer(args.prompt_file.read_text(), return_tensors="pt").to(device)
    length = inputs["input_ids"].shape[1] + args.new_tokens
    # dense_below=0 prunes at every length; left out, it is the length from which pruning is faster here.
    cache = TwilightCache(model.config, TwilightConfig(ShadowPrefix(), top_p=args.p, dense_below=0), max_cache_len=length)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**inputs, **cache_argument(model, cache), max_new_tokens=args.new_tokens, do_sample=False, streamer=streamer)
    print(cache.budget_report().summary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--prompt-file", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--p", type=float, default=0.95, help="share of the estimated attention weight to keep")
    run(parser.parse_args())
