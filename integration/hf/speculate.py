"""`generate`, and lossless decoding: cheap drafts, checked by one dense step, so that what comes out is what dense attention gives.

A round drafts up to K tokens and checks them in one dense step of K + 1 tokens. The check takes the drafts out of the cache again and
appends the same tokens with the keys and values of the dense pass, so that what stays of a round is what dense decoding would have cached:
of K, V, the shadow and a selector's labels slot by slot, and of a page's bounds and mean with the next token that the page receives, when
`append_kv` computes them anew from the tokens that count. Each sequence keeps its own number of drafts.

Nothing inside a round waits for the device. Between rounds the host reads one small tensor: who has ended, and how many drafts were taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._settings import flag, integer, normalise, one_of
from ...config import TwilightConfig
from ...ops._checks import MAX_QUERY_TOKENS
from .cache import TwilightCache, TwilightLayer
from .generate import Decoder, Drafts, Generation, Sampling, Steps, drawn, most_likely

MAX_DRAFTS = MAX_QUERY_TOKENS - 1
MAX_NGRAM = 8
# What a sparse step reads of K and V, as a share: 10 to 13% by the default selector at 7,500 to 31,000 tokens.
SPARSE_SHARE = 0.125
# How much of what was accepted before the last look counts on.
MEMORY = 0.75


@dataclass(frozen=True)
class Speculation:
    """Where drafts come from.

    Args:
        drafts: most tokens a round drafts, 1 to 7. The dense step that checks them takes one token more, whatever the round drafted.
        source: "sparse", the model's own decode step as the cache's `TwilightConfig` says; or "prompt", what followed the last
            occurrence of the newest tokens in the prompt and the answer so far, which costs next to nothing.
        adapt: draft fewer tokens where fewer are accepted; of "sparse" drafts, which cost a step each. Without it every round drafts all.
        ngram: of "prompt", most of the newest tokens that are looked for; the longest match wins, then the newest.
    """

    drafts: int = 5
    source: str = "sparse"
    adapt: bool = True
    ngram: int = 3

    def __post_init__(self) -> None:
        counts = {"drafts": integer(1, MAX_DRAFTS), "ngram": integer(1, MAX_NGRAM)}
        normalise(self, source=one_of("sparse", "prompt"), adapt=flag, **counts)


def best_length(acceptance: float, draft_cost: float, most: int) -> int:
    """Drafts a round, 1 to `most`, that give the most tokens for their time.

    Args:
        acceptance: the share of drafts that are right where all before them were, 0..1.
        draft_cost: time of a draft over that of a check.
    """

    def speed(drafts: int) -> float:
        return sum(acceptance**i for i in range(drafts + 1)) / (1 + draft_cost * drafts)

    return max(range(1, most + 1), key=speed)


def look_up(history: Tensor, last: Tensor, drafts: int, ngram: int) -> tuple[Tensor, Tensor]:
    """What followed the newest tokens when they were last seen.

    Args:
        history: [B, N] int64, tokens by slot; only slots up to `last` [B] count, and -1 is a token that nobody knows.
        drafts: K. ngram: most tokens compared.

    Returns:
        drafts [B, K], and whether there are any [B]. Where they run over the newest token they start again behind the match.
    """
    slots = torch.arange(history.shape[1], device=history.device)
    equal = (slots < last[:, None]) & (history >= 0)
    longest = torch.zeros_like(history)
    for back in range(ngram):
        key = history.gather(1, (last[:, None] - back).clamp(min=0))
        shifted = torch.nn.functional.pad(history, (back, 0), value=-1)[:, : history.shape[1]]
        equal = equal & (shifted == key) & (key >= 0) & (last[:, None] >= back)
        longest = longest + equal
    best = (longest * len(slots) + slots * (longest > 0)).argmax(1, keepdim=True)
    found = longest.gather(1, best)[:, 0] > 0
    period = (last[:, None] - best).clamp(min=1)
    following = best + 1 + torch.arange(drafts, device=history.device) % period
    return history.gather(1, following.clamp(max=history.shape[1] - 1)).clamp(min=0), found


class LosslessDecoder(Decoder):
    """A `Decoder` whose tokens are those of dense attention, drafted as `speculation` says and checked by dense steps.

    Greedy decoding takes a draft where it is the most likely token of the dense step. Sampling takes it with probability min(1, p / q),
    where it was drawn from q and dense attention says p, and draws from max(0, p - q) where it does not: tokens are distributed as p.
    A dense step of several tokens may round otherwise than one of a single token, as it may in another batch: where two words are equally
    likely up to rounding, dense decoding itself has no one answer.

    `step` is the check, `draft` a draft; both are captured as `capture` says, so there are two graphs whatever a round drafts. Other
    arguments are those of `Decoder`; the cache needs room for `speculation.drafts` tokens beyond the last new one.

    Raises:
        ValueError: a cache whose layers cannot all take back a token.
    """

    def __init__(self, model, cache: TwilightCache, *args, speculation: Speculation | int | None = None, **kwargs):
        if not isinstance(cache, TwilightCache) or not all(isinstance(layer, TwilightLayer) for layer in cache.layers):
            layer = next((layer for layer in getattr(cache, "layers", ()) if not isinstance(layer, TwilightLayer)), cache)
            raise ValueError(f"generate: speculate: expected full attention of a TwilightCache in every layer, got {type(layer).__name__}")
        self.speculation = speculation_of(speculation)
        self.drafts_ahead = self.speculation.drafts
        self.sparse = self.speculation.source == "sparse"
        self._compiled = 2 if self.sparse else 1
        super().__init__(model, cache, *args, **kwargs)
        self.captured_draft = self._make_step(type(self).draft_eager) if self.sparse else None
        drafts, batch, vocabulary = self.speculation.drafts, self.batch_size, model.config.get_text_config(decoder=True).vocab_size

        self.limit = self._buffer(1)  # of new tokens a sequence
        self.written = self._buffer(batch)  # new tokens so far
        self.tally = self._buffer(5)  # rounds, drafts, of which accepted, rounds that refused one, new tokens
        self.drafts = self._buffer(batch, drafts)
        self.drafted = self._buffer(1)
        self.draft_token = self._buffer(batch, 1)
        self.draft_position = self._buffer(batch, 1)
        # What drafts were drawn with; without a draw, and where they were looked up, they are certain.
        drawn_with = self.sparse and self.sampling is not None
        self.draft_probability = self._buffer(batch, drafts, vocabulary, dtype=torch.float32) if drawn_with else None
        # Tokens by slot; the last column takes what is no token.
        self.history = None if self.sparse else self._buffer(batch, cache.get_max_length() + 1).fill_(-1)

    def draft(self) -> None:
        """One sparse step, which drafts one token a sequence."""
        self._run(self.captured_draft, self.draft_eager)

    def draft_eager(self) -> None:
        logits = self._forward(self.draft_token, self.draft_position)[:, -1]
        if self.draft_probability is None:
            token = most_likely(logits)
        else:
            probability = self.sampling.probabilities(logits)
            self.draft_probability.index_copy_(1, self.drafted, probability[:, None])
            token = drawn(probability)
        self.drafts.index_copy_(1, self.drafted, token[:, None])
        self.drafted.add_(1)
        self.draft_token.copy_(token[:, None])
        self.draft_position.add_(1)

    def step_eager(self) -> None:
        """The dense step that checks the drafts and ends the round; reads and writes only static buffers and the cache."""
        sequences, columns = self.cache.sequences, torch.arange(self.drafts.shape[1] + 1, device=self.device)
        drafts, known = self._drafts(columns[:-1])
        # The drafts' own keys and values are no longer there.
        self.cache.live_seq_lens.copy_(self.position[:, 0])
        positions = self.position + columns
        sequences.verifies = True
        try:
            logits = self._forward(torch.cat([self.token, drafts], 1), positions)
        finally:
            sequences.verifies = False
        tokens, accepted = self._judge(logits, drafts, known)

        live = ~self.finished
        new = torch.minimum(accepted + 1, self.limit - self.written)
        ends = (tokens[..., None] == self.eos).any(-1)
        new = torch.minimum(new, torch.where(ends.any(1), ends.long().argmax(1) + 1, len(columns))) * live
        drafted = known.sum(1)
        counts = (live, drafted * live, torch.minimum(accepted, new), live & (accepted < drafted), new)
        self.tally.add_(torch.stack([count.sum() for count in counts]))
        kept = columns < new[:, None]
        place = (self.written[:, None] + columns).clamp(max=self.output.shape[1] - 1)
        self.output.scatter_(1, place, torch.where(kept, tokens, self.pad_token_id))
        if self.history is not None:
            beyond = self.history.shape[1] - 1
            self.history.scatter_(1, torch.where(kept, positions + 1, beyond), tokens)
        self.written.add_(new)
        self.finished.logical_or_((ends & kept).any(1) | (self.written >= self.limit))
        self.token.copy_(torch.where(live[:, None], tokens.gather(1, (new - 1).clamp(min=0)[:, None]), self.token))
        self.position.add_(new[:, None])
        self.restart()

    def restart(self) -> None:
        """The cache holds what comes before `token`, and nothing is drafted."""
        self.cache.live_seq_lens.copy_(self.position[:, 0])
        self.drafted.zero_()
        self.draft_token.copy_(self.token)
        self.draft_position.copy_(self.position)

    def _drafts(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The drafts [B, K] of this round, and which of them there are [B, K]."""
        if self.history is None:
            return self.drafts, (columns < self.drafted).expand_as(self.drafts)
        drafts, found = look_up(self.history[:, :-1], self.position[:, 0], len(columns), self.speculation.ngram)
        return drafts, found[:, None].expand_as(drafts)

    def _judge(self, logits: Tensor, drafts: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [B, K + 1], accepted [B]) for logits [B, K + 1, V]: the accepted drafts, then a token of the dense step's own."""
        if self.sampling is None:
            tokens = most_likely(logits)
            return tokens, ((drafts == tokens[:, :-1]) & known).long().cumprod(1).sum(1)
        target = self.sampling.probabilities(logits)
        return judge(target, self.draft_probability, drafts, known)

    def _forward_prompt(self, ids: Tensor, positions: Tensor, *args) -> Tensor:
        logits = super()._forward_prompt(ids, positions, *args)
        if self.history is not None:
            self.history.scatter_(1, torch.where(positions < 0, self.history.shape[1] - 1, positions), ids)
        return logits

    def _decode(self, max_new_tokens: int, every: int, on_tokens: Callable[[Tensor], None] | None) -> Steps:
        most, adapts = self.speculation.drafts, self.speculation.adapt and self.sparse
        # The first token came with the prompt.
        self.written.fill_(1)
        self.limit.fill_(max_new_tokens)
        self.finished.logical_or_(self.written >= self.limit)
        self.output[:, 1:] = self.pad_token_id
        self.tally.zero_()
        if self.history is not None:
            self.history.scatter_(1, self.position, self.token)
        self.restart()

        warmup = self._warmup(self.captured, self.captured_draft)
        start = warm = time.perf_counter()
        length, steps, rounds, reported, before_warm = most if self.sparse else 0, 0, 0, 1, 0
        recent = Acceptance()
        tally, ahead, cached, common = self._look()
        while ahead:
            # No round runs in vain: each takes a sequence at most `most + 1` tokens on.
            run = min(max(1, every // (length + 1)), -(-ahead // (most + 1)))
            for _ in range(run):
                self.round(length)
                rounds += 1
                if rounds == warmup:
                    warm, before_warm = self._now(), int(self.tally[-1])
            steps += run * (length + 1)
            last, (tally, ahead, cached, common) = tally, self._look()
            if on_tokens is not None:
                reported = self._report(on_tokens, reported, common)
            if adapts:
                acceptance = recent.after(tally[2] - last[2], tally[3] - last[3])
                length = best_length(acceptance, self._draft_cost(cached), most)
        end = self._now()
        self._steps_run += rounds
        timed = (tally[-1] - before_warm) / self.batch_size
        ms = (end - warm) / timed * 1e3 if rounds > warmup and timed else float("nan")
        return Steps(steps, common, warm - start, ms, Drafts(tally[0], tally[1], tally[2], tally[-1]))

    def round(self, drafts: int) -> None:
        """Drafts and their check; one that fails takes its drafts along."""
        try:
            for _ in range(drafts):
                self.draft()
            self.step()
        except BaseException:
            self.restart()
            raise

    def _look(self) -> tuple[list[int], int, int, int]:
        """Reads the device once: the tally, most tokens that a sequence still wants, tokens cached, new tokens that are final in all."""
        ahead = torch.where(self.finished, 0, self.limit - self.written).max()
        common = torch.where(self.finished, self.written.max(), self.written).min()
        *tally, wanted, cached, written = torch.cat([self.tally, torch.stack([ahead, self.position.sum(), common])]).tolist()
        return tally, wanted, cached, written

    def _draft_cost(self, cached: int) -> float:
        """Time of a sparse step over that of a dense one, by the bytes that they read with so many tokens cached."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        kv = cached * sum(tensor[0, :, 0].nbytes for layer in self.cache.paged.layers for tensor in layer.kv)
        return (weights + SPARSE_SHARE * kv) / (weights + kv)


class Acceptance:
    """The share of drafts that were right where all before them were, of late."""

    def __init__(self) -> None:
        self.right, self.wrong = 1.0, 0.0

    def after(self, accepted: int, refused: int) -> float:
        self.right, self.wrong = MEMORY * self.right + accepted, MEMORY * self.wrong + refused
        return self.right / (self.right + self.wrong)


def judge(target: Tensor, draft: Tensor | None, drafts: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Rejection sampling of drafts, so that what comes out is distributed as `target`.

    Args:
        target: [B, K + 1, V] fp32, what dense attention says after the token before each draft, and after the last.
        draft: [B, K, V] fp32, what the drafts were drawn with; None: they are certain.
        drafts: [B, K] int64. known: [B, K] bool, which of them there are; none follows a missing one.

    Returns:
        tokens [B, K + 1]: the accepted drafts and one token drawn, behind which nothing counts; accepted [B].

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1.
    """
    certain = torch.nn.functional.one_hot(drafts, target.shape[-1]).float() if draft is None else draft
    p, q = (table.gather(2, drafts[..., None])[..., 0] for table in (target[:, :-1], certain))
    taken = (torch.rand_like(p) * q < p) & known
    accepted = taken.long().cumprod(1).sum(1)
    # A refused draft leaves what dense attention gives a word beyond the draft's share; after the last one nothing is taken off.
    off = torch.nn.functional.pad(certain * known[..., None], (0, 0, 0, 1))
    row = accepted[:, None, None].expand(-1, 1, target.shape[-1])
    own = target.gather(1, row)[:, 0]
    rest = (own - off.gather(1, row)[:, 0]).clamp(min=0)
    token = drawn(torch.where(rest.sum(-1, keepdim=True) > 0, rest, own))
    places = torch.arange(target.shape[1], device=target.device)
    padded = torch.nn.functional.pad(drafts, (0, 1))
    return torch.where(places == accepted[:, None], token[:, None], padded), accepted


def speculation_of(speculate: Speculation | int | None) -> Speculation:
    """What `speculate` of `generate` stands for: a number of drafts, or all of it."""
    if speculate is None:
        return Speculation()
    return speculate if isinstance(speculate, Speculation) else Speculation(speculate)


def generate(
    model,
    input_ids: Tensor,
    config: TwilightConfig | None = None,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    max_cache_len: int | None = None,
    cache: TwilightCache | None = None,
    sampling: Sampling | None = None,
    eos_token_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    capture: str | None = None,
    prefill_chunk: int | None = None,
    on_prefill: Callable[[int, int], None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
    speculate: Speculation | int | None = None,
) -> Generation:
    """Generates from a prompt with Twilight attention; make a `Decoder` to serve many prompts with one graph.

    Args:
        model: a transformers causal language model with attn_implementation="twilight".
        input_ids: [B, T] int64. attention_mask: [B, T], 0 for padding on either side.
        config: selector, p, page size; not with `cache`.
        max_cache_len: tokens a sequence; None: as many as this call needs.
        cache: continue on this cache instead of a new one.
        capture, eos_token_ids, pad_token_id, sampling: see `Decoder`.
        max_new_tokens, prefill_chunk, on_prefill, on_tokens: see `Decoder.generate`.
        speculate: lossless: the tokens are those of dense attention, with up to so many drafts a round, or as a `Speculation` says; see
            `LosslessDecoder`. None: the tokens of sparse attention.
    """
    if cache is not None and config is not None:
        raise ValueError("generate: config: expected None together with cache, got a TwilightConfig")
    if cache is None:
        max_new_tokens = integer(1)("generate", "max_new_tokens", max_new_tokens)
        ahead = 0 if speculate is None else speculation_of(speculate).drafts
        room = input_ids.shape[-1] + max_new_tokens + ahead if max_cache_len is None else max_cache_len
        chosen = max_cache_len is not None
        cache = TwilightCache(model.config, config, input_ids.shape[0], room, warn_never_sparse=chosen)
    arguments = (model, cache, input_ids.shape[0], sampling, eos_token_ids, pad_token_id, capture)
    decoder = Decoder(*arguments) if speculate is None else LosslessDecoder(*arguments, speculation=speculate)
    return decoder.generate(input_ids, attention_mask, max_new_tokens, prefill_chunk, on_prefill, on_tokens)
