"""`python -m twilight_ops demo`: a small real model, a long document, dense and Twilight side by side."""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_right
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .arguments import check_outputs, whole, write_json
from .generate import add_twilight_arguments, encode, twilight_config
from .models import SMOLLM2, add_model_arguments, context_of, device_of, load_model

HELP = "SmolLM2 answers a question from a long document and continues a longer one, dense and with Twilight"

# How deep the fact lies in the document, as a share of its length.
FACT_DEPTH = 0.5
LEAST_TOKENS = 16
# Tokens from which on the method shows unless --dense-below says otherwise, whether or not it pays for so small a model on this device.
SPARSE_FROM = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "(a) A question whose answer lies deep in a document; (b) the continuation of a longer document, where speed shows. "
        "The document is read once, exactly; every method then decodes from the same K and V."
    )
    add_model_arguments(parser, default=SMOLLM2)
    add_twilight_arguments(parser, dense_below=SPARSE_FROM)
    parser.add_argument("--question-index", type=whole(0), default=0, help="which of the packaged questions")
    parser.add_argument("--question-tokens", type=whole(LEAST_TOKENS), default=3800, help="length of the prompt of (a)")
    parser.add_argument("--continue-tokens", type=whole(LEAST_TOKENS), default=7500, help="length of the prompt of (b)")
    parser.add_argument("--answer-tokens", type=whole(LEAST_TOKENS), default=24, help="most new tokens in (a)")
    parser.add_argument("--new-tokens", type=whole(LEAST_TOKENS), default=96, help="new tokens in (b)")
    parser.add_argument("--json", type=Path, help="also write the figures here")


@dataclass(frozen=True)
class Question:
    document: str
    fact_sentence: str
    question: str
    answer: str

    @property
    def text(self) -> str:
        return (resources.files("twilight_ops.data") / "prose" / self.document).read_text("utf-8")


def questions() -> list[Question]:
    path = resources.files("twilight_ops.data") / "prose" / "questions.json"
    return [Question(**entry) for entry in json.loads(path.read_text("utf-8"))]


def question_prompt(tokenizer, question: Question, tokens: int, depth: float = FACT_DEPTH) -> list[int]:
    """Chat prompt of at most `tokens` tokens: the start of the document with the fact inside, then the question."""
    sentences = [sentence + "." for sentence in question.text.replace("\n", " ").split(". ")]

    def prompt(count: int) -> list[int]:
        place = int(count * depth)
        document = " ".join([*sentences[:place], question.fact_sentence, *sentences[place:count]])
        return encode(tokenizer, document, question.question)

    count = bisect_right(range(1, len(sentences) + 1), tokens, key=lambda count: len(prompt(count)))
    if count == 0:
        raise ValueError(f"question-tokens: expected room for the question and a sentence, got {tokens}")
    return prompt(count)


@dataclass
class Contender:
    """One way of decoding: a decoder over a cache of its own, and the attention the model must have for it."""

    name: str
    attention: str
    decoder: object


def make_contenders(model, config, max_cache_len: int) -> list[Contender]:
    """transformers' sdpa on its static cache, our own dense attention, and Twilight; all compiled, all on our loop."""
    from transformers import StaticCache

    from .. import TwilightConfig
    from ..integration import Decoder, TwilightCache

    def twilight_cache(settings):
        return TwilightCache(model.config, settings, max_cache_len=max_cache_len, device=model.device, dtype=model.dtype)

    static = StaticCache(config=model.config, max_cache_len=max_cache_len)
    head_dim = model.get_decoder().layers[0].self_attn.head_dim
    static.early_initialization(1, model.config.num_key_value_heads, head_dim, model.dtype, model.device)
    stored = {"page_size": config.page_size, "kv_cache_dtype": config.kv_cache_dtype}
    dense = TwilightConfig(dense_layers=model.config.num_hidden_layers, **stored)
    return [
        Contender("dense, transformers sdpa", "sdpa", Decoder(model, static)),
        Contender("dense, twilight_ops", "twilight", Decoder(model, twilight_cache(dense))),
        Contender("Twilight", "twilight", Decoder(model, twilight_cache(config))),
    ]


def copy_prompt(source, target, tokens: int) -> None:
    """Gives `target`, a StaticCache or a dense TwilightCache, the K and V of the `tokens` tokens in `source`."""
    from ..integration import TwilightCache
    from ..integration.hf.attention import cached_rows

    target.reset()
    pairs = zip(source.layers, target.layers, strict=True)
    if isinstance(target, TwilightCache):
        target.sequences.begin(1, tokens)
        for ours, theirs in pairs:
            pairs_of = zip((*ours.paged.kv, *(ours.paged.scales or ())), (*theirs.paged.kv, *(theirs.paged.scales or ())), strict=True)
            for held, copy in pairs_of:
                copy.copy_(held)
        target.sequences.commit()
        return
    for ours, theirs in pairs:
        for cached, rows in zip(cached_rows(ours.paged, source.live_page_table, tokens), (theirs.keys, theirs.values), strict=True):
            rows[0, :, :tokens] = cached[0]
        theirs.cumulative_length.fill_(tokens)


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import backends
    from .terminal import Terminal

    asked = questions()
    if args.question_index >= len(asked):
        raise ValueError(f"question-index: expected 0 to {len(asked) - 1}, got {args.question_index}")
    check_outputs(json=args.json)
    config = twilight_config(args)
    backend = backends.CUDA if device_of(args).type == "cuda" else backends.CPU
    started = time.perf_counter()
    with Terminal() as terminal:
        terminal.line(
            f"torch {torch.__version__}, {backend.device} kernels: {backend.name} ({backend.detail}), {torch.get_num_threads()} threads"
        )
        model, tokenizer = load_model(args)
        question = asked[args.question_index]
        qa = question_prompt(tokenizer, question, args.question_tokens)
        story = list(tokenizer(question.text)["input_ids"])
        if len(story) < args.continue_tokens:
            raise ValueError(f"continue-tokens: expected at most the document's {len(story)} tokens, got {args.continue_tokens}")
        story = story[: args.continue_tokens]
        longest, limit = max(len(qa) + args.answer_tokens, len(story) + args.new_tokens), context_of(model)
        if longest > limit:
            raise ValueError(f"continue-tokens: expected at most {limit} tokens in all, got {longest}")
        contenders = make_contenders(model, config, longest + 1)

        terminal.heading(f"(a) {len(qa)} tokens: {question.question}")
        answers = run_part(terminal, model, tokenizer, contenders, qa, args.answer_tokens, stop=True)
        terminal.heading(f"(b) {len(story)} tokens, continued by {args.new_tokens}")
        stories = run_part(terminal, model, tokenizer, contenders, story, args.new_tokens, stop=False)

        records = [contender_record(*one, answers[0], stories[0]) for one in zip(contenders, answers, stories, strict=True)]
        rows = figures(records, stories)
        terminal.table("", ("", *(c.name for c in contenders)), [(name, *values) for name, values in rows.items()])
        speedup = min(r.ms_per_token for r in stories[:-1]) / stories[-1].ms_per_token
        speed = f"{speedup:.2f} times as fast as" if speedup == speedup else "in too few steps to be timed beside"
        terminal.line(
            f"Twilight decodes {speed} the best dense at {len(story)} tokens; "
            f"expected answer: {question.answer}; {time.perf_counter() - started:.0f} s in all"
        )
        if args.json is not None:
            record = {"prompt_tokens": [len(qa), len(story)], "expected_answer": question.answer, "speedup": speedup, "methods": records}
            write_json(args.json, record)
    return 0


@dataclass
class Outcome:
    """What one contender made of one prompt; agreement is with the first contender's tokens."""

    tokens: list[int]
    text: str
    ms_per_token: float
    agreement: float
    generation: object


def run_part(terminal, model, tokenizer, contenders: list[Contender], prompt: list[int], new_tokens: int, stop: bool) -> list[Outcome]:
    """Reads the prompt once, then lets every contender decode from it; the last token is each one's own first step."""
    import torch

    from ..integration.hf.generate import end_tokens_of
    from .terminal import TextStream

    ids = torch.tensor([prompt], device=model.device)
    twilight = contenders[-1].decoder
    model.set_attn_implementation("twilight")
    twilight.cache.reset()
    with terminal.progress("reading the document") as on_prefill:
        twilight.prefill(ids[:, :-1], on_prefill=on_prefill)
    end_tokens = end_tokens_of(model) if stop else []

    outcomes: list[Outcome] = []
    for contender in contenders:
        decoder = contender.decoder
        model.set_attn_implementation(contender.attention)
        if decoder is not twilight:
            copy_prompt(twilight.cache, decoder.cache, len(prompt) - 1)
        terminal.write(f"{contender.name}: ")
        stream = TextStream(terminal, tokenizer)
        decoder.stop_at(end_tokens)
        result = decoder.generate(ids[:, -1:], max_new_tokens=new_tokens, on_tokens=stream)
        stream.finish()
        tokens = cut(result.tokens[0].tolist(), end_tokens)
        decoder.stop_at(())
        agreement = forced_agreement(decoder, ids, outcomes[0].generation.tokens) if outcomes else 1.0
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        outcomes.append(Outcome(tokens, text, result.ms_per_token, agreement, result))
    return outcomes


def forced_agreement(decoder, prompt, tokens) -> float:
    """Share of `tokens` [1, N] that the decoder would choose after the prompt and the tokens before: top-1 agreement, teacher-forced."""
    import torch

    start = prompt.shape[1] - 1
    cache = decoder.cache
    if hasattr(cache, "live_seq_lens"):
        cache.crop(start - int(cache.live_seq_lens[0]))
    else:
        for layer in cache.layers:
            layer.cumulative_length.fill_(start)
    decoder.count.zero_()
    decoder.finished.zero_()
    decoder.position.fill_(start)
    fed = torch.cat([prompt[:, -1:], tokens[:, :-1]], dim=1)
    with torch.no_grad():
        for t in range(fed.shape[1]):
            decoder.token.copy_(fed[:, t : t + 1])
            decoder.step()
    return (decoder.output[:, : fed.shape[1]] == tokens).float().mean().item()


def cut(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """Up to and without the first end token."""
    ends = [i for i, token in enumerate(tokens) if token in end_tokens]
    return tokens[: ends[0]] if ends else tokens


def equal_from_start(ours: Outcome, first: Outcome) -> int:
    """Tokens before the first difference."""
    pairs = zip(first.tokens, ours.tokens, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first.tokens), len(ours.tokens)))


def contender_record(contender: Contender, answer: Outcome, story: Outcome, first_answer: Outcome, first_story: Outcome) -> dict:
    """One contender for --json; times in milliseconds, null where no step came after the warm-up."""
    return {
        "name": contender.name,
        "answer": answer.text,
        "same_answer_as_dense": answer.text == first_answer.text,
        "ms_per_token": story.ms_per_token,
        "top1_agreement": story.agreement,
        "equal_tokens_from_start": equal_from_start(story, first_story),
        "new_tokens": len(story.tokens),
        "graphs": contender.decoder.graphs,
        "breaks": contender.decoder.breaks,
        "recompiles": max(0, contender.decoder.graphs - 1),
        "budget": None if story.generation.budget is None else story.generation.budget.to_dict(),
    }


def figures(records: list[dict], stories: list[Outcome]) -> dict[str, list[str]]:
    """Rows of the table, one value a contender."""
    from .terminal import budget_rows, milliseconds

    columns = [
        {
            "(a) answer": record["answer"],
            "(a) same as dense": "yes" if record["same_answer_as_dense"] else "no",
            "(b) a token": milliseconds(record["ms_per_token"], story.generation.steps),
            "(b) top-1 agreement, teacher-forced": f"{record['top1_agreement']:.1%}",
            "(b) equal tokens before the first difference": f"{record['equal_tokens_from_start']} of {len(stories[0].tokens)}",
            **{f"(b) {name}": value for name, value in budget_rows(story.generation.budget).items()},
            "graphs, breaks, recompiles": f"{record['graphs']}, {record['breaks']}, {record['recompiles']}",
        }
        for record, story in zip(records, stories, strict=True)
    ]
    return {name: [column[name] for column in columns] for name in columns[0]}
