"""`python -m twilight_ops generate`: a local model continues or answers a prompt with Twilight attention."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from .models import add_model_arguments, load_model

HELP = "generate with a local model; prints the tokens as they come, then a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads a prompt, streams the model's continuation or its answer to --question, then shows what was kept and how long it took."
    )
    add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the prompt itself")
    prompt.add_argument("--prompt-file", type=Path, help="a text file with the prompt")
    parser.add_argument("--question", help="ask this about the prompt, through the model's chat template where it has one")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    add_twilight_arguments(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    parser.add_argument("--sample-top-k", type=int, default=0, help="draw among this many tokens, 0 for all; needs --temperature")
    parser.add_argument(
        "--sample-top-p", type=float, default=1.0, help="draw among tokens with this share of probability; needs --temperature"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end token")
    parser.add_argument("--prefill-chunk", type=int, default=None, help="tokens of the prompt a forward (default: all at once)")
    parser.add_argument("--capture", choices=("cuda_graph", "compile", "eager"), help="default: cuda_graph on cuda, compile on cpu")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--budget-log", type=Path, help="write the budgets over the steps here, one JSON line a window")
    parser.add_argument("--budget-log-steps", type=int, default=16, help="steps a window (default 16; on cuda rounded up to 16s)")


def add_twilight_arguments(parser: argparse.ArgumentParser, dense_below: int | None = None) -> None:
    """--selector and the options of TwilightConfig; `dense_below` None: the device's break-even."""
    parser.add_argument(
        "--selector",
        default="shadow_prefix",
        help="dense, or a selector with its fields, e.g. quest:token_budget=2048 (default shadow_prefix)",
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="estimated attention weight to keep; 1 switches the pruner off (default 0.95)"
    )
    parser.add_argument("--dense-layers", type=int, default=0, help="first layers that attend to everything (default 0)")
    shown = "the device's break-even" if dense_below is None else dense_below
    parser.add_argument("--dense-below", type=int, default=dense_below, help=f"lengths up to this attend to everything (default: {shown})")
    parser.add_argument("--page-size", type=int, default=16, help="16, 32 or 64 tokens")


def twilight_config(args: argparse.Namespace):
    """The TwilightConfig of the arguments above."""
    from .. import TwilightConfig
    from ..evaluation.methods import parse_method

    selector = parse_method(args.selector).selector
    config = TwilightConfig(top_p=args.top_p, page_size=args.page_size, dense_layers=args.dense_layers, dense_below=args.dense_below)
    return replace(config, dense_layers=1 << 20) if selector is None else replace(config, selector=selector)


def encode(tokenizer, prompt: str, question: str | None) -> list[int]:
    """Token ids of the prompt alone, or of a chat turn that asks `question` about it."""
    if question is None:
        return list(tokenizer(prompt)["input_ids"])
    content = f"{prompt.strip()}\n\n{question.strip()}"
    if tokenizer.chat_template is None:
        return list(tokenizer(content + "\n")["input_ids"])
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_length(model, prompt_tokens: int, new_tokens: int) -> None:
    """ValueError where the prompt is empty or does not fit the model."""
    limit = model.config.max_position_embeddings
    if new_tokens >= limit:
        raise ValueError(f"max-new-tokens: expected fewer than the model's {limit} tokens, got {new_tokens}")
    if prompt_tokens == 0:
        raise ValueError("prompt: expected at least 1 token, got an empty prompt")
    if prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"prompt: expected at most {limit - new_tokens} tokens (the model's {limit} less {new_tokens} new ones), got {prompt_tokens}"
        )


def run(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens: expected >= 1, got {args.max_new_tokens}")
    if args.budget_log_steps < 1:
        raise ValueError(f"budget-log-steps: expected >= 1, got {args.budget_log_steps}")
    if args.budget_log is not None and not args.budget_log.parent.is_dir():
        raise ValueError(f"budget-log: expected a file in a folder that exists, got {args.budget_log}")
    if args.prompt_file is not None and not args.prompt_file.is_file():
        raise ValueError(f"prompt-file: expected a text file, got {args.prompt_file}")

    from contextlib import nullcontext

    import torch
    from rich.console import Console

    from ..integration import Sampling, TwilightCache, generate
    from ..report import BudgetLog
    from .terminal import TextStream, budget_rows, progress_bar, table

    config = twilight_config(args)
    sampling = Sampling(args.temperature, args.sample_top_k, args.sample_top_p) if args.temperature != 0.0 else None
    console = Console()
    prompt = args.prompt if args.prompt is not None else args.prompt_file.read_text()
    model, tokenizer = load_model(args)
    ids = encode(tokenizer, prompt, args.question)
    check_length(model, len(ids), args.max_new_tokens)
    torch.manual_seed(args.seed)

    cache = TwilightCache(model.config, config, max_cache_len=len(ids) + args.max_new_tokens, device=model.device, dtype=model.dtype)
    logging = nullcontext() if args.budget_log is None else BudgetLog(args.budget_log, cache, args.budget_log_steps)
    stream = TextStream(console, tokenizer)
    with logging as log, progress_bar(console, "prompt") as on_prefill:

        def on_tokens(tokens: torch.Tensor) -> None:
            if log is not None:
                # The first token comes with the prompt, not from a decode step.
                log.advance(tokens.shape[1] if stream.tokens else tokens.shape[1] - 1)
            stream(tokens)

        result = generate(
            model,
            torch.tensor([ids]),
            cache=cache,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            eos_token_ids=() if args.ignore_eos else None,
            capture=args.capture,
            prefill_chunk=args.prefill_chunk,
            on_prefill=on_prefill,
            on_tokens=on_tokens,
        )
    stream.finish()
    rows = {
        "prompt, new tokens": f"{len(ids)}, {result.tokens.shape[1]}",
        "prompt": f"{result.prefill_s:.2f} s",
        "a token": f"{result.ms_per_token:.2f} ms after {result.warmup_s:.1f} s of warm-up",
        **budget_rows(result.budget),
        "step": f"{result.capture}: {result.graphs} graphs, {result.breaks} breaks, {result.recompiles} recompiles",
    }
    console.print(table("", ("", args.selector), list(rows.items())))
    if args.json is not None:
        text = tokenizer.decode(result.tokens[0].tolist(), skip_special_tokens=True)
        record = {"text": text, "tokens": result.tokens[0].tolist(), **rows, "budget": result.budget.to_dict()}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0
