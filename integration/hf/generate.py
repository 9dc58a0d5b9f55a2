"""A generation loop on static buffers: compiled step, CUDA graph replay, no host read a step."""

from __future__ import annotations

import inspect
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..._settings import integer, normalise, number, refuse, share
from ...ops._checks import MAX_QUERY_TOKENS
from ...report import BudgetReport
from ..compile.cuda_graph import WARMUP_STEPS, CapturedStep
from ..compile.private import TorchDynamoException, counters, lookup_backend, mark_static_address
from ..compile.regions import compile_regions
from .cache import TwilightCache

CAPTURES = ("cuda_graph", "compile", "eager")
MAX_END_TOKENS = 8
ARGMAX_PARTS = 64
# Reading whether all sequences have ended makes the host wait for the device, so it is done once in this many steps.
STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 16}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; without it the most likely one is taken.

    Args:
        temperature: > 0.
        top_k: tokens kept, 0 for all.
        top_p: share of probability kept, 0 < top_p <= 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        normalise(self, temperature=number(above=0.0), top_k=integer(0), top_p=share())

    def draw(self, logits: Tensor) -> Tensor:
        """One token a row of logits [B, V], on the device, in fixed shapes."""
        return drawn(self.probabilities(logits))

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn with: fp32 in the shape of logits [..., V]."""
        logits = logits.float() / self.temperature
        if self.top_k:
            least = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if self.top_p < 1.0:
            ranked = logits.sort(dim=-1, descending=True)
            probability = ranked.values.softmax(-1)
            # A token stays while the mass before it is below top_p, so the first one always does.
            surplus = probability.cumsum(-1) - probability >= self.top_p
            logits = ranked.values.masked_fill(surplus, float("-inf")).gather(-1, ranked.indices.argsort(-1))
        return logits.softmax(-1)


def drawn(probability: Tensor) -> Tensor:
    """One token a row of [B, V] fp32, whose rows need not sum to 1.

    The largest of p / Exponential(1) is a draw from p, without the host read of torch.multinomial.
    """
    return most_likely(probability / _exponential(probability))


def _exponential(like: Tensor) -> Tensor:
    """Draws from Exponential(1) in the shape of `like` [B, V] fp32, small ones with all their digits.

    torch.rand knows 2**24 numbers. Among 128,256 words one of them is 0 in 0.8% of all draws, and 0 makes an impossible word win; a second
    draw fills in the digits below.
    """
    uniform = torch.rand_like(like) + torch.rand_like(like) * 2.0**-24
    return -torch.log1p(-uniform.clamp(min=2.0**-49, max=1.0 - 2.0**-24))


def most_likely(logits: Tensor) -> Tensor:
    """argmax over the last dimension, [..., V] -> [...], the first of equals.

    In two stages where V allows: the compiler gives a row's argmax to one block, which takes 50 us for the 128256 words of Llama 3.
    """
    if logits.shape[-1] % ARGMAX_PARTS:
        return logits.argmax(-1)
    best = logits.unflatten(-1, (ARGMAX_PARTS, -1)).max(-1)  # values and places in their part, [B, ARGMAX_PARTS]
    part = best.values.argmax(-1, keepdim=True)
    return (part * (logits.shape[-1] // ARGMAX_PARTS) + best.indices.gather(-1, part)).squeeze(-1)


@dataclass
class Generation:
    """New tokens and what making them took.

    Args:
        tokens: [B, N] int64, the prompt left out; padding after a sequence's end.
        lengths: [B] int64, tokens of each sequence up to and including its end token.
        prefill_s: seconds for the prompt.
        warmup_s: seconds for the first steps, which compile and capture.
        ms_per_token: milliseconds a step after the warm-up, or a token where steps are drafts and checks; NaN where there was none.
        steps: decode steps run, drafts among them.
        capture: "cuda_graph", "compile" or "eager".
        graphs, breaks, recompiles: of the compiled step since the decoder was made.
        budget: the cache's budget report; None for a cache that keeps none.
        drafts: what became of drafted tokens; None where none were made.
    """

    tokens: Tensor
    lengths: Tensor
    prefill_s: float
    warmup_s: float
    ms_per_token: float
    steps: int
    capture: str
    graphs: int
    breaks: int
    recompiles: int
    budget: BudgetReport | None
    drafts: Drafts | None = None


@dataclass(frozen=True)
class Drafts:
    """What became of drafted tokens, over all sequences that had not ended.

    Args:
        rounds: rounds of drafts and one check, counted once a sequence.
        drafted, accepted: tokens.
        new: tokens generated by these rounds, the accepted ones and the check's own.
    """

    rounds: int
    drafted: int
    accepted: int
    new: int

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / max(1, self.rounds)

    @property
    def tokens_per_round(self) -> float:
        return self.new / max(1, self.rounds)


@dataclass
class Steps:
    """What the decode steps of one `Decoder.generate` took; its fields are those of `Generation`. `written`: tokens a sequence."""

    steps: int
    written: int
    warmup_s: float
    ms_per_token: float
    drafts: Drafts | None = None


class Decoder:
    """Decodes with one model and one cache, again and again: after `cache.reset()` the same graph serves the next prompt.

    Args:
        model: a transformers causal language model.
        cache: a `TwilightCache` (attn_implementation="twilight"), or any compileable cache for comparison.
        batch_size: sequences.
        sampling: None takes the most likely token.
        eos_token_ids: tokens that end a sequence; None takes the model's, () never stops.
        pad_token_id: what follows the end.
        capture: "cuda_graph" (the default on a GPU; `compile_regions`, then recorded), "compile" (the default elsewhere) or
            "eager". By default a model that cannot be compiled decodes eagerly, and a warning says why.

    Raises:
        ValueError: a model, cache and capture that do not go together.
    """

    drafts_ahead = 0  # tokens that a step may cache beyond the last that is kept
    _compiled = 1  # functions that are compiled for it

    def __init__(
        self,
        model,
        cache: Cache,
        batch_size: int = 1,
        sampling: Sampling | None = None,
        eos_token_ids: Sequence[int] | None = None,
        pad_token_id: int | None = None,
        capture: str | None = None,
    ):
        device = execution_device(model)
        if not isinstance(sampling, Sampling | None):
            refuse("generate", "sampling", "a Sampling", sampling)
        self.model, self.cache, self.sampling = model, cache, sampling
        self.device = device
        self._chosen = capture is not None  # by the user, who then gets an error where the default would fall back
        self.capture = capture or ("cuda_graph" if device.type == "cuda" else "compile")
        if self.capture not in CAPTURES:
            raise ValueError(f"generate: capture: expected one of {', '.join(CAPTURES)}, got {capture!r}")
        if self.capture == "cuda_graph" and device.type != "cuda":
            raise ValueError(f'generate: capture: expected "compile" or "eager" on {device.type}, got "cuda_graph"')
        attention = model.config.get_text_config(decoder=True)._attn_implementation
        if isinstance(cache, TwilightCache) and attention != "twilight":
            raise ValueError(f'generate: model: expected attn_implementation="twilight" for a TwilightCache, got "{attention}"')
        if eos_token_ids is None:
            eos_token_ids = end_tokens_of(model)
        if pad_token_id is None and (pad_token_id := model.generation_config.pad_token_id) is None:
            pad_token_id = eos_token_ids[0] if eos_token_ids else 0
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size

        self.token = self._buffer(batch_size, 1)  # fed by the next step
        self.position = self._buffer(batch_size, 1)  # where it goes
        self.finished = self._buffer(batch_size, dtype=torch.bool)
        self.output = self._buffer(batch_size, cache.get_max_length())
        self.count = self._buffer(1)  # tokens written to `output`
        self.eos = self._buffer(MAX_END_TOKENS)
        self.stop_at(eos_token_ids)
        self.breaks = 0
        self._traced: list[int] = []  # nodes of each graph that was traced
        self._held = cache_argument(model, cache)
        if self.capture != "eager" and any(getattr(hook, "offload", False) for hook in _hooks(model)):
            self._fall_back("weights that accelerate loads for every layer can be neither compiled nor recorded")
        self.captured = self._make_step(type(self).step_eager)  # None: eager
        self._steps_run = 0

    def _buffer(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Zeros that a graph may hold."""
        with torch.inference_mode(False):
            tensor = torch.zeros(shape, dtype=dtype, device=self.device)
        mark_static_address(tensor)
        return tensor

    @property
    def graphs(self) -> int:
        """Graphs traced for the decode step since the decoder was made."""
        return len(self._traced)

    def stop_at(self, eos_token_ids: Sequence[int]) -> None:
        """Changes the tokens that end a sequence; () never stops. The graph stays: it reads them from a buffer."""
        if isinstance(eos_token_ids, int):
            refuse("generate", "eos_token_ids", "a sequence of tokens", eos_token_ids)
        if len(eos_token_ids) > MAX_END_TOKENS:
            raise ValueError(f"generate: eos_token_ids: expected at most {MAX_END_TOKENS}, got {len(eos_token_ids)}")
        self.stops = len(eos_token_ids) > 0
        padded = [*eos_token_ids, *[-1] * (MAX_END_TOKENS - len(eos_token_ids))]
        self.eos.copy_(torch.tensor(padded))

    def step(self) -> None:
        """One decode step on the buffers, as captured."""
        self._run(self.captured, self.step_eager)

    def _run(self, captured: Callable[[], None] | None, eager: Callable[[], None]) -> None:
        if captured is None or self.captured is None:
            eager()
            return
        try:
            captured()
        except TorchDynamoException as error:
            # Tracing runs nothing, so the step can still be made in another way.
            self._fall_back(str(error).strip().splitlines()[0], error)
            eager()

    def _fall_back(self, reason: str, error: Exception | None = None) -> None:
        """To capture="eager", unless the user asked for something else."""
        if self._chosen:
            raise ValueError(f'generate: capture: expected "eager" for this model, got "{self.capture}": {reason}') from error
        warnings.warn(
            f'generate: this model decodes with capture="eager" instead of "{self.capture}", which costs the host a call of every operator '
            f"of every step: {reason}",
            stacklevel=3,
        )
        self.capture, self.captured = "eager", None

    def _make_step(self, function: Callable[..., None]) -> Callable[[], None] | None:
        """`function`, a method of this decoder that takes and returns nothing, as `capture` says; None: eagerly."""
        if self.capture == "eager":
            return None
        # Calling pieces one by one costs the host time on every step, which only a recorded graph does not pay.
        compiler = compile_regions if self.capture == "cuda_graph" else lookup_backend("inductor")
        traced = self._traced

        def backend(graph: torch.fx.GraphModule, example_inputs: list):
            # The compiler keeps every backend for ever, so this one must not hold the decoder and its cache.
            compiled = compiler(graph, example_inputs)
            traced.append(len(graph.graph.nodes))
            return compiled

        # The compiler keeps its graphs by code object: with one of its own, a decoder neither counts as a recompile of the last one nor
        # uses up its recompile limit.
        name = f"{function.__name__}_{id(self):x}"
        own = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__)
        compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
        # A decoder that nobody else holds goes at once, with its cache.
        decoder = weakref.ref(self)

        def step() -> None:
            compiled(decoder())

        return CapturedStep(step, self.device, self.model) if self.capture == "cuda_graph" else step

    def _forward(self, ids: Tensor, positions: Tensor, **kwargs) -> Tensor:
        """Logits [B, T, V]."""
        return self.model(input_ids=ids, position_ids=positions, use_cache=True, **self._held, **kwargs).logits

    def step_eager(self) -> None:
        """One decode step: reads and writes only the static buffers and the cache."""
        logits = self._forward(self.token, self.position)
        # A sequence that has ended stays where it is, so that padding never grows its cache.
        self.position.add_((~self.finished).long()[:, None])
        if isinstance(self.cache, TwilightCache):
            self.cache.live_seq_lens.copy_(self.position[:, 0])
        self._emit(logits[:, -1])

    def _emit(self, logits: Tensor) -> None:
        """Chooses the next token from logits [B, V], records it and makes it the next input."""
        token = most_likely(logits) if self.sampling is None else self.sampling.draw(logits)
        token = torch.where(self.finished, self.pad_token_id, token)
        self.finished.logical_or_((token[:, None] == self.eos).any(-1))
        self.output.index_copy_(1, self.count, token[:, None])
        self.count.add_(1)
        self.token.copy_(token[:, None])

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        prefill_chunk: int | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        steps_between_checks: int | None = None,
    ) -> Generation:
        """Generates after `input_ids`, which follow whatever the cache already holds.

        Afterwards the cache holds everything but each sequence's last token: start the next turn's input with it.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 0 for padding on either side; None: no padding.
            max_new_tokens: at least 1.
            prefill_chunk: tokens of the prompt a forward; None: all at once. The first chunk is what a shadow prefix is calibrated from.
            on_prefill: called with (tokens done, tokens in all) before the first chunk and after every layer, whose share of a chunk counts
                as so many tokens.
            on_tokens: called with each run of new tokens [B, n] as it is known.
            steps_between_checks: steps between calls of on_tokens and looks at whether all sequences have ended.

        Raises:
            ValueError: the prompt and the new tokens do not fit; the cache is as before.
        """
        cache, device = self.cache, self.device
        ids, positions, prompt_lens = self._place_prompt(input_ids, attention_mask, max_new_tokens)
        every = steps_between_checks or STEPS_BETWEEN_CHECKS.get(device.type, 1)

        start = self._now()
        logits = self._forward_prompt(ids, positions, prefill_chunk, on_prefill)
        self.finished.zero_()
        self.count.zero_()
        self.position.copy_(prompt_lens[:, None])
        self._emit(logits)
        prefill_s = self._now() - start
        if on_tokens is not None:
            on_tokens(self.output[:, :1].clone())

        seen = cache.get_seq_length() + 0
        breaks_before = _graph_breaks()
        ran = self._decode(max_new_tokens, every, on_tokens)
        self.breaks += _graph_breaks() - breaks_before

        tokens, lengths = self._collect(ran.written)
        if isinstance(cache, TwilightCache):
            cache.live_seq_lens.copy_(prompt_lens + lengths - 1)
            cache.sequences.seen.copy_(seen + tokens.shape[1] - 1)
            cache.sequences.ahead |= cache.sequences.states is not None and ran.steps >= int(lengths.min())
        return Generation(
            tokens=tokens,
            lengths=lengths,
            prefill_s=prefill_s,
            warmup_s=ran.warmup_s,
            ms_per_token=ran.ms_per_token,
            steps=ran.steps,
            capture=self.capture,
            graphs=self.graphs,
            breaks=self.breaks,
            recompiles=max(0, self.graphs - self._compiled),
            budget=cache.budget_report() if isinstance(cache, TwilightCache) else None,
            drafts=ran.drafts,
        )

    def _decode(self, max_new_tokens: int, every: int, on_tokens: Callable[[Tensor], None] | None) -> Steps:
        """The decode steps after the first token, which is out."""
        warmup = self._warmup(self.captured)
        start = warm = time.perf_counter()
        steps, reported, ended = 0, 1, False
        for step in range(1, max_new_tokens):
            if self.stops and (step - 1) % every == 0 and (ended := bool(self.finished.all())):
                break
            self.step()
            steps = step
            if step == warmup:
                warm = self._now()
            if on_tokens is not None and step % every == 0:
                reported = self._report(on_tokens, reported, step + 1)
        if on_tokens is not None and not ended:
            self._report(on_tokens, reported, steps + 1)
        end = self._now()
        self._steps_run += steps
        timed = steps - warmup
        return Steps(steps, steps + 1, warm - start, (end - warm) / timed * 1e3 if timed > 0 else float("nan"))

    def _warmup(self, *captured: Callable[[], None] | None) -> int:
        """Steps to leave out of a timing; a recorded step is checked by running it once."""
        recorded = [step for step in captured if isinstance(step, CapturedStep)]
        for step in recorded:
            step.recheck()
        return max(int(bool(recorded)), WARMUP_STEPS + 1 - self._steps_run)

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefill_chunk: int | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Puts `input_ids` into the cache and generates nothing; returns the logits [B, V] after the last token."""
        ids, positions, _ = self._place_prompt(input_ids, attention_mask, 1)
        return self._forward_prompt(ids, positions, prefill_chunk, on_prefill)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _place_prompt(self, input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Moves padding to the left; returns tokens and positions [B, T] (-1 for padding) and the lengths after the prompt [B]."""
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size or input_ids.shape[1] == 0:
            raise ValueError(f"generate: input_ids: expected shape [{self.batch_size}, T] with T >= 1, got {list(input_ids.shape)}")
        max_new_tokens = integer(1)("generate", "max_new_tokens", max_new_tokens)
        ids = input_ids.to(self.device)
        mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(self.device).bool()
        if mask.shape != ids.shape:
            raise ValueError(f"generate: attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
        counts = mask.sum(1)
        if isinstance(self.cache, TwilightCache):
            cached = self.cache.live_seq_lens if self.cache.filled else torch.zeros_like(counts)
            if cached.shape[0] != self.batch_size:
                raise ValueError(f"generate: input_ids: expected the {cached.shape[0]} sequences already cached, got {self.batch_size}")
        else:
            cached = torch.zeros_like(counts) + self.cache.get_seq_length()
            if not mask.all():
                raise ValueError("generate: attention_mask: expected no padding, which only a TwilightCache places, got some")
        if int(counts.min()) == 0:
            raise ValueError("generate: attention_mask: expected at least 1 token a sequence, got a row of padding")
        lens = cached.long() + counts
        longest, room = int(lens.max()), self.cache.get_max_length()
        if longest + max_new_tokens + self.drafts_ahead > room:
            ahead = f" and {self.drafts_ahead} drafts" if self.drafts_ahead else ""
            raise ValueError(
                f"generate: input_ids: expected prompt and new tokens{ahead} to fit max_cache_len = {room}, "
                f"got {longest} + {max_new_tokens} = {longest + max_new_tokens}"
            )
        order = mask.long().argsort(dim=1, stable=True)  # padding first, tokens in their order
        columns = torch.arange(ids.shape[1], device=self.device) - (ids.shape[1] - counts)[:, None]
        return ids.gather(1, order), torch.where(columns >= 0, columns + cached[:, None], -1), lens

    def _forward_prompt(self, ids: Tensor, positions: Tensor, chunk: int | None, on_prefill: Callable[[int, int], None] | None) -> Tensor:
        """Forwards the prompt; returns the logits [B, V] after its last token."""
        total = ids.shape[1]
        if chunk is not None and chunk <= MAX_QUERY_TOKENS:
            raise ValueError(f"generate: prefill_chunk: expected > {MAX_QUERY_TOKENS}, got {chunk}")
        if on_prefill is not None:
            on_prefill(0, total)
        keep = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        begin, logits = 0, None
        while begin < total:
            end = total if chunk is None else min(total, begin + chunk)
            # A tail of a few tokens would be taken for a decode step, and pruned.
            end = total if total - end <= MAX_QUERY_TOKENS else end
            part = slice(begin, end)

            def report(layers: int, of: int, begin: int = begin, end: int = end) -> None:
                on_prefill(begin + (end - begin) * layers // of, total)

            with nullcontext() if on_prefill is None else layer_progress(self.model, report):
                live = positions[:, part] >= 0
                # With a column for every cached one too, as layers that keep a state and masks of windows want it.
                seen = int(self.cache.get_seq_length())
                padding = {} if bool(live.all()) else {"attention_mask": torch.nn.functional.pad(live.long(), (seen, 0), value=1)}
                logits = self._forward(ids[:, part], positions[:, part].clamp(min=0), **padding, **keep)[:, -1]
            begin = end
        if isinstance(self.cache, TwilightCache):
            if not self.cache.filled:
                refuse("generate", "model", f"attention in all {self.cache.sequences.num_layers} layers", "one that leaves layers out")
            self.cache.sequences.begin_decoding()
        return logits

    def _report(self, on_tokens: Callable[[Tensor], None], reported: int, written: int) -> int:
        """Hands out the columns after the first `reported`, up to where the last sequence ends; returns how many are out then."""
        tokens, _ = self._collect(written)
        if tokens.shape[1] > reported:
            on_tokens(tokens[:, reported:])
        return tokens.shape[1]

    def _collect(self, written: int) -> tuple[Tensor, Tensor]:
        """The tokens written by this call, cut after the last sequence's end, and each sequence's length."""
        tokens = self.output[:, :written].clone()
        if not self.stops:
            return tokens, torch.full((tokens.shape[0],), written, dtype=torch.int64, device=self.device)
        ends = (tokens[..., None] == self.eos).any(-1)
        lengths = torch.where(ends.any(1), ends.long().argmax(1) + 1, written)
        return tokens[:, : int(lengths.max())], lengths


def cache_argument(model, cache: Cache) -> dict[str, Cache]:
    """A cache under the name by which a model, and its `generate`, take it: `cache` from transformers 5.24 on, before `past_key_values`.

    >>> model.generate(input_ids, **cache_argument(model, cache), max_new_tokens=8)
    """
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def end_tokens_of(model) -> list[int]:
    """The tokens that end a sequence, which the model's generation configuration names."""
    eos = model.generation_config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def decoder_layers(model) -> torch.nn.ModuleList:
    """The list of decoder layers, whatever the family calls it."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList)]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return next((modules for modules in lists if len(modules) == layers), torch.nn.ModuleList())


def _hooks(model) -> Iterator:
    """What accelerate hangs on modules whose weights lie elsewhere."""
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            yield from getattr(hook, "hooks", (hook,))


def execution_device(model) -> torch.device:
    """Where the model computes: its own device, or accelerate's where that holds no weights."""
    if model.device.type != "meta":
        return model.device
    found = [device for hook in _hooks(model) if (device := getattr(hook, "execution_device", None)) is not None]
    if not found:
        raise ValueError("generate: model: expected weights on a device, got a model on meta")
    return torch.device("cuda", found[0]) if isinstance(found[0], int) else torch.device(found[0])


@contextmanager
def layer_progress(model, report: Callable[[int, int], None]) -> Iterator[None]:
    """Calls report(layers done, layers in all) after every decoder layer of the forwards inside."""
    layers = decoder_layers(model)

    def hook(done: int) -> Callable[..., None]:
        return lambda *_: report(done, len(layers))

    handles = [layer.register_forward_hook(hook(index + 1)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _graph_breaks() -> int:
    return sum(counters["graph_break"].values())
