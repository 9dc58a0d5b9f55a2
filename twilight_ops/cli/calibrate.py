"""`python -m twilight_ops calibrate`: writes what the shadow of a model's keys needs to know of them to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..selectors._channels import MIN_TOKENS
from .arguments import check_outputs, number, read_text, whole
from .models import add_model_arguments, context_of, load_model

HELP = "calibrate the key shadow of a local model on a text, and write it to a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Forwards the first --tokens tokens of a text and writes each KV head's mean key, channel order and prefix, "
        "for TwilightConfig(calibration=FILE)."
    )
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="a text file; ordinary prose is enough")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--tokens", type=whole(MIN_TOKENS), default=4096, help="tokens of the text at most (default 4096)")
    parser.add_argument(
        "--tau", type=number(above=0.0, below=1.0), help="share of attention mass a prefix may lose (default: ShadowPrefix's)"
    )
    parser.add_argument(
        "--budget-fraction", type=number(least=0.0, most=1.0), help="candidates it is judged with (default: ShadowPrefix's)"
    )


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text, "text")
    check_outputs(out=args.out)
    if args.out.exists() and args.out.samefile(args.text):
        raise ValueError(f"out: expected another file than that of text, got {args.out}")

    import torch

    from .. import ShadowPrefix, TwilightConfig, calibration
    from ..integration import TwilightCache
    from ..integration.hf.generate import cache_argument, layer_progress
    from .terminal import Terminal

    given = {name: value for name in ("tau", "budget_fraction") if (value := getattr(args, name)) is not None}
    selector = ShadowPrefix(**given)
    with Terminal() as terminal:
        model, tokenizer = load_model(args)
        ids = list(tokenizer(text)["input_ids"])[: min(args.tokens, context_of(model))]
        if len(ids) < MIN_TOKENS:
            raise ValueError(f"text: expected at least {MIN_TOKENS} tokens, got {len(ids)}")

        # Every layer is calibrated, so that the file serves any choice of dense layers; nothing is decoded, so nothing need be kept.
        config = TwilightConfig(selector, dense_layers=0, dense_below=0, sink_tokens=0, recent_tokens=0)
        cache = TwilightCache(model.config, config, max_cache_len=len(ids))
        with terminal.progress(f"{len(ids)} tokens, layers") as advance, layer_progress(model, advance), torch.no_grad():
            model(torch.tensor([ids], device=model.device), logits_to_keep=1, **cache_argument(model, cache))
        paged = cache.paged.layers
        metadata = {"tau": str(selector.tau), "budget_fraction": str(selector.budget_fraction), "tokens": str(len(ids))}
        shadows = {layer.index: layer.shadow for layer in paged}
        calibration.save(
            [shadows.get(index) for index in range(len(cache.layers))], args.out, {"model_type": model.config.model_type, **metadata}
        )
        prefix = torch.stack([layer.shadow.prefix_channels for layer in paged]).float()
        terminal.line(
            f"{args.out}: {len(paged)} layers x {prefix.shape[1]} KV heads from {len(ids)} tokens, "
            f"prefix {prefix.mean():.1f} of {paged[0].head_dim} channels on average, {prefix.min():.0f} to {prefix.max():.0f}"
        )
    return 0
