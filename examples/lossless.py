"""The tokens of dense attention, several at a time: sparse steps or the prompt draft, one dense step checks. Run:

    python examples/lossless.py [--model smollm2 --length 4000]

Prints tokens a second beside dense decoding, and how many drafts a round were right. In fp32 tokens are equal. In bf16 a dense step of
several tokens rounds otherwise than one of a single token, so that of two words that are equally likely either may come.
"""

import argparse

import torch

from twilight_ops import Full, TwilightConfig
from twilight_ops.cli.models import add_model_arguments, load_model
from twilight_ops.evaluation import texts
from twilight_ops.evaluation.methods import parse_method
from twilight_ops.integration import Decoder, LosslessDecoder, Sampling, Speculation, TwilightCache


def run(args: argparse.Namespace) -> None:
    method = parse_method(args.setting, "setting")
    sparse = TwilightConfig(method.selector, top_p=method.top_p, **{"dense_below": 0, **dict(method.settings)})
    model, tokenizer = load_model(args)
    documents = texts.build(args.text, args.batch, args.length, lambda text: tokenizer(text)["input_ids"])
    ids = torch.stack([torch.as_tensor(document.ids[: args.length]) for document in documents])
    dense = TwilightConfig(Full(), dense_layers=1 << 20)
    ways = {
        "dense": (Decoder, dense, {}),
        "sparse drafts": (LosslessDecoder, sparse, {"speculation": Speculation(args.drafts, adapt=not args.fixed)}),
        "prompt drafts": (LosslessDecoder, dense, {"speculation": Speculation(args.drafts, source="prompt")}),
    }
    expected = None
    for name, (make, config, more) in ways.items():
        cache = TwilightCache(model.config, config, args.batch, args.length + args.new_tokens + args.drafts, warn_never_sparse=False)
        sampling = Sampling(args.temperature) if args.temperature else None
        decoder = make(model, cache, batch_size=args.batch, sampling=sampling, eos_token_ids=(), capture=args.capture, **more)
        found = decoder.generate(ids, max_new_tokens=args.new_tokens, prefill_chunk=args.prefill_chunk)
        line = f"{name}: {args.batch / found.ms_per_token * 1e3:.1f} tokens a second"
        if (drafts := found.drafts) is None:
            expected = found.tokens
        else:
            same = (found.tokens == expected).cumprod(1).sum(1).tolist()
            line += f", {drafts.accepted_per_round:.2f} of {drafts.drafted / max(1, drafts.rounds):.2f} drafts a round accepted"
            line += f", tokens equal to dense: {same} of {args.new_tokens}" if sampling is None else ""
        print(line, flush=True)
        del decoder, cache


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--text", choices=texts.KINDS, default="mixed")
    for name, value in (("length", 1000), ("new-tokens", 64), ("batch", 1), ("drafts", 5), ("prefill-chunk", None)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--setting", default="shadow_prefix:.95", help="selector and p of sparse drafts, as `eval --methods` takes them")
    parser.add_argument("--fixed", action="store_true", help="always draft as many tokens, to measure their acceptance")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--capture", choices=("cuda_graph", "compile", "eager"))
    run(parser.parse_args())
