"""A decoding loop of one's own on a transformers model. Run: python examples/own_loop.py --random-tiny

Every forward of one token with a `TwilightCache` is a decode step: appended to the cache, then pruned. What comes next is
the loop's to decide; this one repeats none of its last eight tokens. `Decoder` and `generate` are faster: they record the step.
"""

import argparse

import torch

from twilight_ops import TwilightConfig
from twilight_ops.cli.models import add_model_arguments, load_model
from twilight_ops.integration import TwilightCache, cache_argument


@torch.no_grad()
def continuation(model, cache: TwilightCache, tokens: list[int], count: int) -> list[int]:
    """`count` tokens after a prompt."""
    new, held = tokens, cache_argument(model, cache)
    for _ in range(count):
        ids = torch.tensor([new], device=model.device)
        position = torch.arange(len(tokens) - len(new), len(tokens), device=model.device)[None]
        logits = model(input_ids=ids, position_ids=position, **held, use_cache=True, logits_to_keep=1).logits[0, -1]
        recent = torch.tensor(tokens[-8:], device=model.device)
        new = [int(logits.index_fill(0, recent, -torch.inf).argmax())]
        tokens = tokens + new
    return tokens[-count:]


def run(args: argparse.Namespace) -> None:
    model, tokenizer = load_model(args)
    cache = TwilightCache(model.config, TwilightConfig(dense_below=0), max_cache_len=1024)
    for prompt in ("The lamp of the lighthouse was lit by ", "A canal is a river that "):
        print(repr(tokenizer.decode(continuation(model, cache, tokenizer(prompt * 12)["input_ids"], args.new_tokens))))
        print(cache.budget_report().summary)
        cache.reset()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--new-tokens", type=int, default=16)
    run(parser.parse_args())
