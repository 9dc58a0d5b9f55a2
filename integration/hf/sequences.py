"""The state of a forward: which one is under way, where its tokens go, and what is cached once it is done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from ...layer import PagedKVLayer
from ...ops._checks import MAX_QUERY_TOKENS
from ...paged_kv_cache import PagedKVCache
from ..compile.private import assert_async, mark_static_address

# Called as recorder(q, layer, page_table, seq_lens, sm_scale), with softcap= too where there is one; returns buffers (kept_indices,
# kept_counts) or None.
Recorder = Callable[[Tensor, PagedKVLayer, Tensor, Tensor, float], "tuple[Tensor, Tensor] | None"]


# Tokens that a layer with a window remembers beyond it, so that so many can be taken back.
ROLLBACK = 64


@dataclass(frozen=True)
class PromptRow:
    """One sequence's share of a prompt chunk: its columns, and the slots `start .. start + count - 1` that they go to."""

    columns: slice | Tensor  # a run of columns, or their indices [count] where padding lies between them
    count: int
    start: int

    @property
    def end(self) -> int:
        return self.start + self.count


@dataclass
class Forward:
    """One forward of the model, from its first layer to its last: what its layers share.

    Nothing of it counts before `Sequences.commit`: a forward that fails leaves the cache as it was.

    Args:
        tokens: T, the columns of this forward.
        exact: a prompt, attended exactly; False for a decode step.
        dense: a decode step that attends to everything.
        page_table: [B, M] int32. seq_lens: [B] int32, tokens of each sequence with those of this forward. What the operators read.
        calibrates: this prompt is the first in the cache.
        slots: [B, T] int32, where each column goes, -1 for padding; None: the last T slots of every sequence.
        rows: of an exact forward; None while a graph is traced, where nothing can be read on the host.
        order: [B, T] columns with the padding first; None where every column of a decode step is a token.
        calls: of attention so far.
        visible: masks of a decode step that layers with equal windows share.
        past: rings of K and V by layer, as they were before this prompt, where later layers attend to them too.
    """

    tokens: int
    exact: bool
    page_table: Tensor
    seq_lens: Tensor
    calibrates: bool = False
    slots: Tensor | None = None
    rows: list[PromptRow] | None = None
    order: Tensor | None = None
    dense: bool = False
    calls: int = 0
    visible: dict[Hashable, Tensor] = field(default_factory=dict)
    past: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def positions(self) -> Tensor:
        """Of every column in its sequence, [B, T] int64, -1 for padding."""
        if self.slots is not None:
            return self.slots.long()
        return self.seq_lens.long()[:, None] + torch.arange(-self.tokens, 0, device=self.seq_lens.device)

    def padding_first(self, q: Tensor) -> Tensor:
        """q [B, T, Hq, D] as a decode step wants it: a row sees one token less than the row after it."""
        return q if self.order is None else q.gather(1, self._order(q))

    def in_columns(self, out: Tensor) -> Tensor:
        """Undoes `padding_first`, for out [B, T, Hq, D]."""
        return out if self.order is None else torch.empty_like(out).scatter_(1, self._order(out), out)

    def _order(self, like: Tensor) -> Tensor:
        return self.order[:, :, None, None].expand_as(like)


class Sequences:
    """Which forward of a paged cache is under way, and where its tokens go.

    A slot is the number of tokens before a token in its sequence: padding takes none, so ragged batches stay packed. `paged.seq_lens` holds
    what is cached; `step_lens` is what the operators of the forward under way read, and becomes `seq_lens` when the last layer is done.

    Args:
        paged: pages, table, lengths and layers, those of full attention.
        callers: the layers that call attention, by their number in the model.
        step_tokens: a forward of up to so many tokens on a filled cache is a decode step.
        recorder: see `TwilightCache`.
        slots: the least that a layer with a window remembers; None where no layer has one.
        states: the kind of layers that keep a state instead of tokens; None where there are none.
        sharing: whether layers attend to K and V of earlier ones.
        num_layers: of the model.
    """

    def __init__(
        self,
        paged: PagedKVCache,
        callers: Sequence[int],
        step_tokens: int,
        recorder: Recorder | None = None,
        slots: int | None = None,
        states: str | None = None,
        sharing: bool = False,
        num_layers: int | None = None,
    ):
        self.num_layers = num_layers
        self.paged, self.callers, self.step_tokens, self.recorder = paged, callers, step_tokens, recorder
        self.slots, self.states, self.sharing = slots, states, sharing
        self.reach: Tensor | None = None  # [max_batch_size] int32: the longest each sequence has been since the last reset
        self.step_lens: Tensor | None = None  # [max_batch_size] int32
        self.live_step_lens: Tensor | None = None  # [B], a view: the sequences in use
        self.seen: Tensor | int = 0  # columns forwarded so far, padding included: what generate() slices its inputs with
        self._forget()

    def _forget(self) -> None:
        self.filled = False
        self.forward: Forward | None = None
        self.unfinished: int | None = None  # calls of attention in the forward before the last, where neither was done
        # Two prompts in a row show that one comes in chunks. Decode steps read only the second flag, so that all of them are one graph.
        self.after_prompt = self.in_chunks = False
        # transformers announces speculative decoding before its prompt, and a rollback of plain decoding after it.
        self.announced = self.speculates = False
        # Our loop checks drafts: forwards are dense decode steps, of which every column is a token.
        self.verifies = False
        # Whether layers that keep a state, and cannot go back, have gone beyond what is cached.
        self.ahead = False

    def add_layer(self, *sizes, **kinds) -> PagedKVLayer:
        """`PagedKVCache.add_layer`, with tensors that a graph may hold."""
        # Tensors made under inference mode could not be written by a graph compiled outside it.
        with torch.inference_mode(False), torch.no_grad():
            layer = self.paged.add_layer(*sizes, **kinds)
        self.allocate(layer.kv.k_cache.device)
        mark_static(*layer.tensors())
        return layer

    def allocate(self, device: torch.device) -> None:
        """Lengths and page table, with whichever layer comes first."""
        if self.step_lens is not None:
            return
        with torch.inference_mode(False):
            self.paged.allocate_table(device)
            self.step_lens = torch.zeros_like(self.paged.seq_lens)
            self.reach = torch.zeros_like(self.paged.seq_lens)
            self.seen = torch.zeros((), dtype=torch.int64, device=device)
            self._view_rows()

    def _view_rows(self) -> None:
        """`PagedKVCache.use_rows` has pointed its live views elsewhere: this one follows."""
        paged = self.paged
        with torch.inference_mode(False):
            self.live_step_lens = self.step_lens[: paged.batch_size]
        if not torch.compiler.is_compiling():
            mark_static(paged.page_table, paged.seq_lens, paged.live_page_table, paged.live_seq_lens)
            mark_static(self.step_lens, self.live_step_lens, self.seen, self.reach)

    def __getstate__(self) -> dict:
        return {**vars(self), "forward": None, "live_step_lens": None}  # a view does not stay one through pickle

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.step_lens is not None:
            self._view_rows()
        for layer in self.paged.layers:
            mark_static(*layer.tensors())

    def enter_layer(self, index: int, batch: int, tokens: int, live: Tensor | None, position_ids: Tensor | None) -> Forward:
        """The forward that this call of attention by layer `index` belongs to; the first one begins it.

        Raises:
            RuntimeError: the model does not visit every layer once and in order.
        """
        forward = self.begin(batch, tokens, live, position_ids) if index == self.callers[0] else self.forward
        if forward is None or forward.calls == len(self.callers) or index != self.callers[forward.calls]:
            self.refuse_order(index)
        forward.calls += 1
        return forward

    def shares(self, index: int, caller: int | None) -> bool:
        """Whether this call of attention is that of layer `caller`, which has no K and V of its own and takes those of layer `index`."""
        forward = self.forward
        due = None if forward is None or forward.calls == len(self.callers) else self.callers[forward.calls]
        return due is not None and caller == due and index in self.callers[: forward.calls]

    def leave_layer(self) -> None:
        """Ends the forward with the last layer that calls attention."""
        if self.forward.calls == len(self.callers):
            self.commit()

    def refuse_order(self, index: int) -> NoReturn:
        due = self.callers[0 if self.forward is None else min(self.forward.calls, len(self.callers) - 1)]
        raise RuntimeError(
            f"TwilightCache: layer {index}: expected a model that calls attention once in every layer, in order, got a call of layer "
            f"{index} where layer {due} was due"
        )

    def check_states(self) -> None:
        """Refuses to go on from states that have gone beyond what is cached (RuntimeError)."""
        if self.ahead:
            raise RuntimeError(
                f"TwilightCache: cache: expected reset() before another forward, because the states of its {self.states} layers cannot go "
                "back, got states that are ahead of what is cached (a forward failed, or a sequence ended before others)"
            )

    def begin(self, batch: int, tokens: int, live: Tensor | None = None, position_ids: Tensor | None = None) -> Forward:
        """Checks a forward and says where its tokens go; nothing that is cached changes.

        Args:
            batch, tokens: B and T.
            live: [B, T] bool, False for padding. None: every column is a token, unless `position_ids` says otherwise.
            position_ids: [B or 1, T]; without `live`, -1 is padding, and so are zeros before the first token and after the last.

        Raises:
            ValueError: the forward does not fit, or does not follow what is cached.
        """
        paged = self.paged
        if self.filled and batch != paged.batch_size:
            raise ValueError(
                f"TwilightCache: input_ids: expected the {paged.batch_size} sequences already cached (or reset()), got {batch}"
            )
        if not 1 <= batch <= paged.max_batch_size:
            raise ValueError(f"TwilightCache: input_ids: expected 1 to max_batch_size = {paged.max_batch_size} sequences, got {batch}")
        positions = None
        if self.verifies:
            live = None
        elif live is None and tokens > 1 and position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == tokens:
            # One column is a token: nobody forwards padding alone.
            positions = position_ids.expand(batch, -1)
        if paged.use_rows(batch):
            self._view_rows()
        unfinished = None if self.forward is None else self.forward.calls
        if unfinished is not None and unfinished == self.unfinished and not torch.compiler.is_compiling():
            warnings.warn(
                f"TwilightCache: forwards end after {unfinished} of {len(self.callers)} layers with attention and do not count: they fail, "
                "or the model leaves layers out",
                stacklevel=2,
            )
        self.unfinished = unfinished
        self.forward = self._begin_prompt(tokens, live, positions) if self._is_prompt(tokens) else self._begin_step(tokens, live, positions)
        return self.forward

    def commit(self) -> None:
        """Makes the forward count; its columns are cached from now on."""
        forward = self.forward
        self.paged.live_seq_lens.copy_(self.live_step_lens)
        self.seen.add_(forward.tokens)
        if self.slots is not None:
            reach = self.reach[: self.paged.batch_size]
            reach.copy_(torch.maximum(reach, self.live_step_lens))
        limit = self._step_limit()
        if forward.exact and (forward.tokens > limit or not self.filled):
            self.after_prompt, self.in_chunks = True, self.after_prompt
            self.speculates, self.announced = self.announced, False
        else:
            self.begin_decoding()
        self.filled = True
        self.ahead = False
        self.forward = None

    def begin_decoding(self) -> None:
        """The prompt is complete: the next forward of few tokens is a decode step."""
        self.after_prompt = self.in_chunks = self.announced = False

    def _step_limit(self) -> int:
        return MAX_QUERY_TOKENS if self.speculates else self.step_tokens

    def _is_prompt(self, tokens: int) -> bool:
        # The tail of a prompt that comes in chunks may be as short as a decode step.
        return not self.verifies and (not self.filled or tokens > self._step_limit() or self.in_chunks)

    def _begin_step(self, tokens: int, live: Tensor | None, positions: Tensor | None) -> Forward:
        slots = order = None
        cached = self.paged.live_seq_lens
        if live is None and positions is not None:
            live = live_columns(positions, cached == 0)
        if live is None:
            new_lens = cached + tokens
        else:
            new_lens, slots = _place(live, cached)
            order = live.long().argsort(dim=1, stable=True) if tokens > 1 else None
        fits = (new_lens <= self.paged.max_cache_len).all()
        if not _readable(new_lens):
            # On a GPU this is an assertion of the device.
            assert_async(fits, "TwilightCache: input_ids: expected new tokens that fit max_cache_len")
        elif not bool(fits):
            self._refuse_length(int(new_lens.max()))
        return self._forward(tokens, new_lens, exact=False, slots=slots, order=order, dense=self.verifies)

    def _forward(self, tokens: int, new_lens: Tensor, **kinds) -> Forward:
        self.live_step_lens.copy_(new_lens)
        return Forward(tokens, page_table=self.paged.live_page_table, seq_lens=self.live_step_lens, **kinds)

    def _refuse_length(self, longest: int) -> None:
        raise ValueError(
            f"TwilightCache: input_ids: expected at most max_cache_len = {self.paged.max_cache_len} tokens a sequence, got {longest}"
        )

    def _begin_prompt(self, tokens: int, live: Tensor | None, positions: Tensor | None) -> Forward:
        cached = self.paged.live_seq_lens
        if _readable(cached):
            rows, slots = self._read_prompt(tokens, live, positions)
            new_lens = torch.tensor([row.end for row in rows], dtype=torch.int32, device="cpu").to(cached.device)
        else:
            rows = None
            if live is None:
                if positions is None:
                    live = torch.ones(self.paged.batch_size, tokens, dtype=torch.bool, device=cached.device)
                else:
                    live = live_columns(positions, cached == 0)
            new_lens, slots = _place(live, cached)
            assert_async(
                (new_lens <= self.paged.max_cache_len).all(), "TwilightCache: input_ids: expected a prompt that fits max_cache_len"
            )
        return self._forward(tokens, new_lens, exact=True, calibrates=not self.filled, slots=slots, rows=rows)

    def _read_prompt(self, tokens: int, live: Tensor | None, positions: Tensor | None) -> tuple[list[PromptRow], Tensor | None]:
        """The rows of a prompt, and their slots [B, T] where there is padding; reads the host once."""
        lens = self.paged.live_seq_lens
        cached = lens.tolist() if self.filled else [0] * self.paged.batch_size
        if live is None and positions is None:
            rows = [PromptRow(slice(0, tokens), tokens, length) for length in cached]
            slots = None
        elif live is not None:
            rows, slots = _rows(live.cpu(), cached)
        else:
            rows, slots = _read_prompt_rows(positions, cached)
        longest = max(row.end for row in rows)
        if longest > self.paged.max_cache_len:
            self._refuse_length(longest)
        if self.states is not None and slots is not None:
            left = all(row.count == tokens or (row.start == 0 and _is_right(row.columns, row.count, tokens)) for row in rows)
            if not left or live is None:
                raise ValueError(
                    f"TwilightCache: attention_mask: expected padding on the left of the first prompt alone, because {self.states} layers "
                    f"take every later column for a token, got {'other padding' if left is False else 'padding without a mask'}"
                )
        return rows, None if slots is None else slots.to(lens.device)

    def reset(self) -> None:
        """`PagedKVCache.reset`, and the forward under way; addresses stay."""
        self._forget()
        self.paged.reset()
        if self.step_lens is not None:
            self.seen.zero_()
            self.reach.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest `-tokens_to_remove` columns; a positive number is the length to keep, as in transformers."""
        seen = int(self.seen)
        removed = max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if removed > seen:
            raise ValueError(f"TwilightCache: tokens_to_remove: expected at most the {seen} cached tokens, got {removed}")
        if not removed:
            return
        if self.states is not None:
            raise ValueError(f"TwilightCache: tokens_to_remove: expected 0, because {self.states} layers cannot go back, got {removed}")
        if self.slots is not None:
            lens = self.paged.seq_lens
            gone = int(torch.where(self.reach > self.slots, self.reach - lens, 0).amax()) + removed
            if int(self.reach.amax()) > self.slots and gone > ROLLBACK:
                raise ValueError(
                    f"TwilightCache: tokens_to_remove: expected at most {ROLLBACK} in all, because layers with a window have "
                    f"forgotten what was before it, got {gone}"
                )
        self.paged.seq_lens.sub_(removed).clamp_(min=0)
        self.seen.sub_(removed)


def mark_static(*tensors: Tensor) -> None:
    """Tells the compiler that these addresses never change; without it CUDA graphs are skipped."""
    for tensor in tensors:
        mark_static_address(tensor)


def _readable(tensor: Tensor) -> bool:
    """Whether values may be read on the host: not while a graph is traced or recorded."""
    return not torch.compiler.is_compiling() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def live_columns(positions: Tensor, empty: Tensor) -> Tensor:
    """Which columns of position_ids [B, T] are tokens, [B, T] bool: not -1, and not the zeros that pad a row on either side.

    Position 0 is a token only in a sequence that is `empty` [B], and only once a row: where positions go on from it, or, in a row of
    nothing else, in its first column, unless another row shows that padding lies on the left.
    """
    zero = positions == 0
    positive = positions > 0
    started = positive.cumsum(1) > 0
    following = torch.nn.functional.pad(positive[:, 1:], (0, 1))
    first = zero & (zero.cumsum(1) == 1)
    last = zero & (zero.flip(1).cumsum(1).flip(1) == 1)
    alone = ~started[:, -1:]
    left = (following & zero & (zero.cumsum(1) > 1) & ~started).any()
    token = torch.where(alone, torch.where(left, last, first), zero & ~started & following)
    return positive | (token & empty[:, None])


def _is_right(columns: slice | Tensor, count: int, tokens: int) -> bool:
    """Whether these columns are the last of a row."""
    return count == 0 or (isinstance(columns, slice) and columns.stop == tokens)


def _place(live: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths [B] int32 of sequences of `lens` [B] after the columns `live` [B, T], and the slots [B, T] int32 of those columns."""
    # In 64 bits and rounded last: Inductor of torch 2.13 hands a cumsum in 32 bits over as 64.
    ends = lens.long()[:, None] + live.long().cumsum(1)
    return ends[:, -1].int(), torch.where(live, ends - 1, -1).int()


def _rows(live: Tensor, cached: Sequence[int]) -> tuple[list[PromptRow], Tensor | None]:
    """Rows and slots [B, T] of the columns `live` [B, T], both on the host; slots are None where nothing is padding."""
    tokens = live.shape[1]
    if bool(live.all()):
        return [PromptRow(slice(0, tokens), tokens, length) for length in cached], None
    rows = []
    for line, length in zip(live, cached, strict=True):
        columns = line.nonzero()[:, 0]
        count = len(columns)
        first, last = (int(columns[0]), int(columns[-1])) if count else (0, -1)
        rows.append(PromptRow(slice(first, last + 1) if last + 1 - first == count else columns, count, length))
    return rows, _place(live, torch.tensor(cached, device=live.device))[1]


def _read_prompt_rows(positions: Tensor, cached: Sequence[int]) -> tuple[list[PromptRow], Tensor | None]:
    """Rows and slots of a prompt of which only position_ids [B, T] are known; reads the host once.

    Raises:
        ValueError: positions that do not go on from what is cached, or that start again inside a row.
    """
    host = positions.cpu()
    empty = torch.tensor(cached, device=host.device) == 0
    live = live_columns(host, empty)
    # What would be a token of an empty sequence is the start of another prompt in a filled one.
    restarts = live_columns(host, torch.ones_like(empty)) & (host == 0) & (host.amax(1, keepdim=True) > 0)
    for b, length in enumerate(cached):
        line = host[b][live[b] | restarts[b]]
        if bool((line.diff() <= 0).any()):
            raise ValueError(
                "TwilightCache: position_ids: expected one run of increasing positions a sequence, got several (packed sequences are not "
                "supported)"
            )
        if len(line) and int(line[0]) != length:
            raise ValueError(f"TwilightCache: position_ids: expected sequence {b} to go on at {length}, got {int(line[0])}")
    return _rows(live, cached)
