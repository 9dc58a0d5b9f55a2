"""`twilight chat`: a conversation, about a long document if you like, whose every turn decodes with Twilight attention."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .arguments import read_text, whole
from .generate import (
    COMPILES,
    MIN_PREFILL_CHUNK,
    add_capture_argument,
    add_sampling_arguments,
    add_twilight_arguments,
    check_capture,
    sampling_arguments,
    twilight_config,
)
from .models import add_model_arguments, context_of, load_model

HELP = "a conversation, about a long document if you like; what is cached stays, and each turn reads only what is new"
MAX_CONTEXT = 32768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Reads one line a turn from the terminal or from standard input, answers through the model's chat template, and says after each "
        "answer what was kept. An empty line or the end of input ends it; Ctrl-C ends an answer."
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt-file", type=Path, help="a text file that the conversation is about: stands before the first turn")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--max-new-tokens", type=whole(1), default=512, help="of one answer (default 512)")
    parser.add_argument("--context", type=whole(16), help=f"tokens that the cache holds (default: the model's own, at most {MAX_CONTEXT})")
    add_twilight_arguments(parser)
    add_sampling_arguments(parser)
    add_capture_argument(parser)


class Conversation:
    """Messages, and a cache that holds the tokens of all of them that are sure to stay.

    Args:
        decoder: of one sequence.
        tokenizer: with a chat template, or without: turns are then lines.
        context: tokens that the cache holds.
        max_new_tokens: of one answer.
    """

    def __init__(self, decoder, tokenizer, context: int, max_new_tokens: int):
        self.decoder, self.tokenizer, self.context, self.max_new_tokens = decoder, tokenizer, context, max_new_tokens
        self.messages: list[dict[str, str]] = []
        self.cached: list[int] = []

    def encode(self) -> list[int]:
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer("".join(message["content"] + "\n" for message in self.messages))["input_ids"])
        text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ask(self, content: str, on_prefill=None, on_tokens=None):
        """Adds a turn and the answer to it; the `Generation`. A failed or interrupted turn is as if it had not been."""
        import torch

        self.messages.append({"role": "user", "content": content})
        try:
            ids = self.encode()
            if len(ids) + self.max_new_tokens > self.context:
                raise ValueError(
                    f"context: expected at least {len(ids) + self.max_new_tokens} tokens for this turn and {self.max_new_tokens} new ones, "
                    f"got {self.context}"
                )
            self._keep(ids)
            result = self.decoder.generate(
                torch.tensor([ids[len(self.cached) :]]),
                max_new_tokens=self.max_new_tokens,
                on_prefill=on_prefill,
                on_tokens=on_tokens,
            )
        except BaseException:
            # What the cache holds now is not known: the next turn fills it again.
            self.messages.pop()
            self.decoder.cache.reset()
            self.cached = []
            raise
        tokens = result.tokens[0, : int(result.lengths[0])].tolist()
        self.cached = [*ids, *tokens[:-1]]  # the last one is not fed
        self.messages.append({"role": "assistant", "content": self.tokenizer.decode(tokens, skip_special_tokens=True)})
        return result

    def _keep(self, ids: list[int]) -> None:
        """Takes from the cache what `ids` does not begin with; at least one token is left to be fed."""
        pairs = zip(self.cached, ids[:-1], strict=False)
        equal = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self.cached), len(ids) - 1))
        # A part of a few tokens that follows a filled cache would be taken for a decode step, and pruned.
        equal = max(0, min(equal, len(ids) - MIN_PREFILL_CHUNK))
        if 0 < equal < len(self.cached):
            try:
                self.decoder.cache.crop(equal)
            except ValueError:  # layers with states or windows cannot go back so far
                equal = 0
        if equal == 0:
            self.decoder.cache.reset()
        self.cached = self.cached[:equal]


def run(args: argparse.Namespace) -> int:
    document = None if args.prompt_file is None else read_text(args.prompt_file, "prompt-file")
    drawn = sampling_arguments(args)
    config = twilight_config(args)
    check_capture(args)

    import torch

    from ..integration import Decoder, Sampling, TwilightCache
    from .terminal import Terminal, TextStream

    with Terminal() as terminal:
        model, tokenizer = load_model(args)
        own = context_of(model)
        context = args.context or min(own, MAX_CONTEXT)
        if context > own:
            raise ValueError(f"context: expected at most the model's {own} tokens, got {context}")
        torch.manual_seed(args.seed)
        cache = TwilightCache(model.config, config, max_cache_len=context, device=model.device, dtype=model.dtype, warn_never_sparse=False)
        decoder = Decoder(model, cache, sampling=None if drawn is None else Sampling(*drawn), capture=args.capture)
        talk = Conversation(decoder, tokenizer, context, args.max_new_tokens)
        if args.system:
            talk.messages.append({"role": "system", "content": args.system})
        while (line := _read_line()) is not None:
            if document is not None:
                line, document = f"{document.strip()}\n\n{line}", None
            stream = TextStream(terminal, tokenizer)

            def on_tokens(tokens: torch.Tensor, stream: TextStream = stream) -> None:
                if not stream.tokens and decoder.capture != "eager" and not decoder.graphs:
                    terminal.note(COMPILES)
                stream(tokens)

            cache_before = len(talk.cached)
            try:
                with terminal.progress("prompt") as on_prefill:
                    result = talk.ask(line, on_prefill, on_tokens)
            except KeyboardInterrupt:
                stream.finish()
                terminal.note("interrupted: this turn is forgotten, and the next one reads the conversation again")
                continue
            stream.finish()
            read = len(talk.cached) - len(result.tokens[0]) + 1 - cache_before
            terminal.note(f"[{len(talk.cached)} of {context} tokens, {read} of them read now; {result.budget.summary}]")
            decoder.cache.reset_budget()
    return 0


def _read_line() -> str | None:
    """A turn; None at the end of input and for an empty line. The prompt stands on stderr, where it is no result."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline().strip()
    return line or None
