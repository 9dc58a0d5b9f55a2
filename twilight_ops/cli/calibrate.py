"""`python -m twilight_ops calibrate`: writes the shadow prefix of a model to a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .models import add_model_arguments, load_model

HELP = "calibrate the shadow prefix of a local model on a text, and write it to a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Forwards the first --tokens tokens of a text and writes each KV head's channel order and prefix, "
        "for ShadowPrefix(calibration=FILE) and DoubleSparsity(calibration=FILE)."
    )
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True, help="a text file; ordinary prose is enough")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text (default 4096)")
    parser.add_argument("--tau", type=float, default=None, help="share of attention mass a prefix may lose (default: ShadowPrefix's)")
    parser.add_argument("--budget-fraction", type=float, default=None, help="candidates it is judged with (default: ShadowPrefix's)")


def run(args: argparse.Namespace) -> int:
    if not args.text.is_file():
        raise ValueError(f"text: expected a text file, got {args.text}")
    if not args.out.parent.is_dir():
        raise ValueError(f"out: expected a file in a folder that exists, got {args.out}")

    import torch
    from rich.console import Console

    from .. import ShadowPrefix, TwilightConfig, calibration
    from ..integration import TwilightCache
    from ..integration.generate import cache_argument, layer_progress
    from .terminal import progress_bar

    given = {name: value for name in ("tau", "budget_fraction") if (value := getattr(args, name)) is not None}
    selector = ShadowPrefix(**given)
    model, tokenizer = load_model(args)
    limit = min(args.tokens, model.config.max_position_embeddings)
    ids = list(tokenizer(args.text.read_text())["input_ids"])[:limit]
    if len(ids) < calibration.MIN_TOKENS:
        raise ValueError(f"text: expected at least {calibration.MIN_TOKENS} tokens, got {len(ids)}")

    # Every layer is calibrated, so that the file serves any choice of dense layers.
    cache = TwilightCache(model.config, TwilightConfig(selector, dense_layers=0), max_cache_len=len(ids))
    console = Console()
    with progress_bar(console, f"{len(ids)} tokens, layers") as advance, layer_progress(model, advance), torch.no_grad():
        model(torch.tensor([ids], device=model.device), logits_to_keep=1, **{cache_argument(model): cache})
    paged = [layer.paged for layer in cache.layers]
    metadata = {"tau": str(selector.tau), "budget_fraction": str(selector.budget_fraction), "tokens": str(len(ids))}
    calibration.save(paged, args.out, {"model_type": model.config.model_type, **metadata})
    prefix = torch.stack([layer.prefix_channels for layer in paged]).float()
    console.print(
        f"{args.out}: {len(paged)} layers x {prefix.shape[1]} KV heads, "
        f"prefix {prefix.mean():.1f} of {paged[0].k_cache.shape[-1]} channels on average, {prefix.min():.0f} to {prefix.max():.0f}",
        soft_wrap=True,
    )
    return 0
