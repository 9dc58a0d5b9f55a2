"""A context whose keys and values lie outside the GPU: pinned host memory, or on a CPU a file. Run:

    python examples/long_context_offload.py [--tokens 1000000 --device cuda --layers 32 --heads 32/8]

Fills a cache with random keys and values, takes a few steps of attention, resident and offloaded, and says what lies where, how long
an eager step took, and whether the outputs are equal, which they are only where the kept tokens are.
"""

import argparse
import time

import torch

from twilight_ops import PagedKVCache, ShadowPrefix, TwilightConfig
from twilight_ops.decode_step import append, attend
from twilight_ops.host_memory import size


def decode(args: argparse.Namespace, offload: bool) -> list[torch.Tensor]:
    heads, kv_heads = map(int, args.heads.split("/"))
    dtype = {"cpu": torch.float32}.get(args.device, torch.bfloat16)
    # Random keys have no structure that top-p could use: a twentieth of the tokens are candidates.
    config = TwilightConfig(ShadowPrefix(256, 0.05, prefix_channels=32), dense_below=0, offload=offload)
    began = time.perf_counter()
    cache = PagedKVCache(config, args.layers, heads, kv_heads, 128, 1, args.tokens + args.steps, dtype, args.device)
    setup = time.perf_counter() - began
    rng = torch.Generator(args.device).manual_seed(0)
    lens, table, kept = cache.live_seq_lens, cache.live_page_table, []
    for start in range(0, args.tokens, 4096):
        tokens = min(4096, args.tokens - start)
        k, v = torch.randn(2, 1, tokens, kv_heads, 128, generator=rng, device=args.device).to(dtype)
        lens.fill_(start + tokens)
        for layer in cache.layers:
            append(k, v, layer, table, lens)
    for _ in range(args.steps):
        began = time.perf_counter()
        lens += 1
        for layer in cache.layers:
            q = torch.randn(1, 1, heads, 128, generator=rng, device=args.device).to(dtype)
            append(*torch.randn(2, 1, 1, kv_heads, 128, generator=rng, device=args.device).to(dtype), layer, table, lens)
            kept.append(attend(q, layer, table, lens, 128**-0.5)[0])
        kept[-1].sum().item()  # waits for the device
        took = time.perf_counter() - began
    where = args.device if not offload else "pinned host memory" if args.device == "cuda" else "a file"
    kv, extra = (size(cache.nbytes()[part]) for part in ("kv", "extra"))
    print(f"K and V in {where}: {kv}; beside them on {args.device}: {extra}; allocated in {setup:.2f} s")
    print(f"  a step of {args.layers} layers at {args.tokens:,} tokens: {took * 1e3:.2f} ms", flush=True)
    return kept


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 8192), ("layers", 2), ("steps", 4), ("heads", "8/2"), ("device", "cpu")):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--offloaded-only", action="store_true", help="of more than fits the GPU")
    options = parser.parse_args()
    outputs = [decode(options, offload) for offload in ([True] if options.offloaded_only else [False, True])]
    print("equal outputs:", all(map(torch.equal, outputs[0], outputs[-1])))
