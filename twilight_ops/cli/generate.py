"""`python -m twilight_ops generate`: a local model continues or answers a prompt with Twilight attention."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

from ..ops._checks import MAX_QUERY_TOKENS
from .arguments import check_outputs, number, read_text, whole, write_json
from .models import add_model_arguments, context_of, device_of, load_model

MIN_PREFILL_CHUNK = MAX_QUERY_TOKENS + 1  # a smaller chunk would be taken for a decode step
OFFLOAD_CHUNK = 4096
LOG_STEPS = 16
COMPILES = "compiling the decode step; later steps do not wait for it"

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
    parser.add_argument("--max-new-tokens", type=whole(1), default=128, help="default 128")
    add_twilight_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--lossless",
        type=whole(1, MAX_QUERY_TOKENS - 1),
        nargs="?",
        const=5,
        metavar="K",
        help="the tokens of dense attention: up to K drafts a round (default 5), checked by one dense step",
    )
    parser.add_argument(
        "--drafts", choices=("sparse", "prompt"), help="of --lossless: by sparse steps (default), or from what the prompt repeats"
    )
    parser.add_argument("--ignore-eos", action="store_true", help="do not stop at the model's end token")
    parser.add_argument(
        "--prefill-chunk",
        type=whole(MIN_PREFILL_CHUNK),
        help=f"tokens of the prompt a forward, at least {MIN_PREFILL_CHUNK} (default: all, with --offload {OFFLOAD_CHUNK})",
    )
    add_capture_argument(parser)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--budget-log", type=Path, help="write the budgets over the steps here, one JSON line a window")
    parser.add_argument(
        "--budget-log-steps", type=whole(1), help=f"steps a window (default {LOG_STEPS}; on cuda rounded up to {LOG_STEPS}s)"
    )


def add_capture_argument(parser: argparse.ArgumentParser) -> None:
    """--capture; see `check_capture`."""
    parser.add_argument("--capture", choices=("cuda_graph", "compile", "eager"), help="default: cuda_graph on cuda, compile on cpu")


def check_capture(args: argparse.Namespace) -> None:
    """ValueError where --device or --capture asks for what this machine does not have."""
    device = device_of(args)
    if args.capture == "cuda_graph" and device.type != "cuda":
        raise ValueError(f"capture: expected compile or eager on {device.type}, got cuda_graph")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """--temperature, --sample-top-k, --sample-top-p and --seed; see `sampling_arguments`."""
    parser.add_argument(
        "--temperature",
        type=number(least=0.0),
        help="0 takes the most likely token (default: 0, or 1 where --sample-top-k or --sample-top-p is given)",
    )
    parser.add_argument("--sample-top-k", type=whole(0), help="draw among this many tokens, 0 for all; implies --temperature 1")
    parser.add_argument(
        "--sample-top-p",
        type=number(above=0.0, most=1.0),
        help="draw among the likeliest tokens with this share of probability; implies --temperature 1",
    )
    parser.add_argument("--seed", type=whole(0, 2**63 - 1), default=0, help="of the sampling (default 0)")


def add_twilight_arguments(parser: argparse.ArgumentParser, dense_below: int | None = None) -> None:
    """--selector and the options of TwilightConfig; `dense_below` None: the device's break-even."""
    parser.add_argument(
        "--selector",
        default="shadow_prefix",
        help="dense, or a selector with its fields and those of TwilightConfig, e.g. quest:token_budget=2048,recent_tokens=128 "
        "(default shadow_prefix)",
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="estimated attention weight to keep; 1 switches the pruner off (default 0.95)"
    )
    parser.add_argument("--dense-layers", type=int, help="first layers that attend to everything (default 0)")
    shown = "the device's break-even" if dense_below is None else dense_below
    parser.add_argument("--dense-below", type=int, help=f"lengths up to this attend to everything (default: {shown})")
    parser.add_argument("--page-size", type=int, help="16, 32 or 64 tokens (default 16)")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), help="fp8 halves the memory of K and V (default auto: the model's)")
    parser.add_argument(
        "--offload", nargs="?", const=True, default=False, metavar="DIR", help="keep K and V in host memory, on a CPU in a file in DIR"
    )
    parser.add_argument("--hot-tokens", type=whole(0), default=0, help="of --offload: rows a KV head with copies on the device (default 0)")
    parser.set_defaults(default_dense_below=dense_below)
    parser.epilog = selectors_help()


def selectors_help() -> str:
    """Every selector with its fields and their defaults, as --selector spells them."""
    from ..evaluation.methods import CONFIG_FIELDS, selector_classes

    lines = ["selectors:", "  dense"]
    for name, selector in selector_classes().items():
        settings = ",".join(f"{field.name}={field.default}" for field in fields(selector))
        lines.append(f"  {name}:{settings}" if settings else f"  {name}")
    return "\n".join([*lines, f"and of TwilightConfig: {', '.join(CONFIG_FIELDS)}"])


def twilight_config(args: argparse.Namespace):
    """The TwilightConfig of the arguments above; ValueError where --selector and an option disagree."""
    from .. import TwilightConfig
    from ..evaluation.methods import ALL_LAYERS, parse_method

    method = parse_method(args.selector, "selector")
    method.check_files("selector")
    settings = dict(method.settings)
    for name in ("dense_layers", "dense_below", "page_size", "kv_cache_dtype"):
        given = getattr(args, name)
        if given is not None and settings.setdefault(name, given) != given:
            raise ValueError(f"{name.replace('_', '-')}: expected {settings[name]} as in --selector {args.selector}, got {given}")
    if args.default_dense_below is not None:
        settings.setdefault("dense_below", args.default_dense_below)
    settings |= {"offload": args.offload, "hot_tokens": args.hot_tokens}
    if method.selector is None:
        # Checked as if they mattered, so that a mistake shows whatever selects.
        return TwilightConfig(top_p=args.top_p, **{**settings, "dense_layers": ALL_LAYERS})
    return TwilightConfig(selector=method.selector, top_p=args.top_p, **settings)


def sampling_arguments(args: argparse.Namespace) -> tuple[float, int, float] | None:
    """(temperature, top k, top p) to draw with; None takes the most likely token.

    As in llama.cpp, asking for a top k or top p asks for a draw. Without a temperature that is one from the model's own distribution.
    """
    named = [option for option in ("sample_top_k", "sample_top_p") if getattr(args, option) is not None]
    temperature = args.temperature if args.temperature is not None else 1.0 if named else 0.0
    if temperature == 0.0:
        if named:
            raise ValueError(f"temperature: expected > 0 with --{named[0].replace('_', '-')}, got 0")
        return None
    return temperature, args.sample_top_k or 0, 1.0 if args.sample_top_p is None else args.sample_top_p


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
    """ValueError where the prompt does not fit the model."""
    limit = context_of(model)
    if new_tokens >= limit:
        raise ValueError(f"max-new-tokens: expected fewer than the model's {limit} tokens, got {new_tokens}")
    if prompt_tokens == 0:
        raise ValueError("prompt: expected at least 1 token, got an empty prompt")
    if prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"prompt: expected at most {limit - new_tokens} tokens (the model's {limit} less {new_tokens} new ones), got {prompt_tokens}"
        )


def draft_rows(drafts) -> dict[str, str]:
    """What a table says about drafts; nothing where none were made."""
    if drafts is None:
        return {}
    share = drafts.accepted / max(1, drafts.drafted)
    return {"accepted drafts a round": f"{drafts.accepted_per_round:.2f} ({share:.0%} of {drafts.drafted} in {drafts.rounds} rounds)"}


def memory_rows(cache) -> dict[str, str]:
    """What a table says about memory; nothing where K and V lie on the device."""
    from ..host_memory import size

    sizes = cache.nbytes()
    if "offloaded" not in sizes:
        return {}
    where = "in pinned host memory" if cache.paged.page_table.is_cuda else "in a file"
    return {"K and V": f"{size(sizes['offloaded'])} {where}, {size(sizes['extra'])} beside them on {cache.paged.page_table.device}"}


def run(args: argparse.Namespace) -> int:
    # Whatever can be wrong without a model is found before one is loaded.
    if args.budget_log_steps is not None and args.budget_log is None:
        raise ValueError(f"budget-log-steps: expected --budget-log FILE with it, got {args.budget_log_steps} alone")
    if args.drafts is not None and args.lossless is None:
        raise ValueError(f"drafts: expected --lossless with it, got {args.drafts} alone")
    if args.lossless is not None and args.budget_log is not None:
        raise ValueError("budget-log: expected no --lossless, whose steps are no single tokens, got both")
    check_outputs(json=args.json, budget_log=args.budget_log)
    prompt = args.prompt if args.prompt is not None else read_text(args.prompt_file, "prompt-file")
    if not prompt:
        raise ValueError("prompt: expected at least 1 token, got an empty prompt")
    drawn = sampling_arguments(args)
    config = twilight_config(args)
    check_capture(args)

    import torch

    from ..integration import Sampling, Speculation, TwilightCache, generate
    from ..report import BudgetLog
    from .terminal import Terminal, TextStream, budget_rows, milliseconds

    with Terminal() as terminal:
        model, tokenizer = load_model(args)
        ids = encode(tokenizer, prompt, args.question)
        ahead = args.lossless or 0  # drafts beyond the last new token
        check_length(model, len(ids), args.max_new_tokens + ahead)
        torch.manual_seed(args.seed)

        room = len(ids) + args.max_new_tokens + ahead
        cache = TwilightCache(model.config, config, max_cache_len=room, device=model.device, dtype=model.dtype, warn_never_sparse=False)
        logging = nullcontext() if args.budget_log is None else BudgetLog(args.budget_log, cache, args.budget_log_steps or LOG_STEPS)
        stream = TextStream(terminal, tokenizer)
        with logging as log, terminal.progress("prompt") as on_prefill:

            def on_tokens(tokens: torch.Tensor) -> None:
                if not stream.tokens and args.capture != "eager":
                    terminal.note(COMPILES)
                if log is not None:
                    # The first token comes with the prompt, not from a decode step.
                    log.advance(tokens.shape[1] if stream.tokens else tokens.shape[1] - 1)
                stream(tokens)

            result = generate(
                model,
                torch.tensor([ids]),
                cache=cache,
                max_new_tokens=args.max_new_tokens,
                sampling=None if drawn is None else Sampling(*drawn),
                eos_token_ids=() if args.ignore_eos else None,
                capture=args.capture,
                prefill_chunk=args.prefill_chunk or (OFFLOAD_CHUNK if args.offload else None),
                on_prefill=on_prefill,
                on_tokens=on_tokens,
                speculate=Speculation(args.lossless, args.drafts or "sparse") if ahead else None,
            )
        stream.finish()
        rows = {
            "prompt, new tokens": f"{len(ids)}, {result.tokens.shape[1]}",
            "prompt": f"{result.prefill_s:.2f} s",
            "warm-up": f"{result.warmup_s:.1f} s",
            "a token": milliseconds(result.ms_per_token, result.steps),
            **budget_rows(result.budget),
            **draft_rows(result.drafts),
            **memory_rows(cache),
            "step": f"{result.capture}: {result.graphs} graphs, {result.breaks} breaks, {result.recompiles} recompiles",
        }
        terminal.table("", ("", args.selector), list(rows.items()))
        terminal.line(result.budget.summary)
        if args.json is not None:
            tokens = result.tokens[0].tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            record = {"text": text, "tokens": tokens, "selector": args.selector, "prompt_tokens": len(ids), "new_tokens": len(tokens)}
            figures = ("prefill_s", "warmup_s", "ms_per_token", "steps", "capture", "graphs", "breaks", "recompiles")
            drafts = {} if result.drafts is None else {"drafts": asdict(result.drafts)}
            budget = {"budget": result.budget.to_dict()}
            write_json(args.json, {**record, **{name: getattr(result, name) for name in figures}, **drafts, **budget})
    return 0
