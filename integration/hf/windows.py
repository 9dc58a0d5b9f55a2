"""Attention that sees a part of the past, and attention in plain PyTorch with a mask: what the layers do that are not Twilight's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...reference._paging import soft_capped
from .sequences import Forward

# Rows of a prompt that attend at once where their scores are made as a whole.
BLOCK = 256


@dataclass(frozen=True)
class Window:
    """Which tokens a layer sees: the newest `width`, the token itself among them; in chunks, those of the token's own chunk up to it."""

    width: int
    chunked: bool = False

    def __str__(self) -> str:
        return f"{'chunked' if self.chunked else 'sliding'}_attention"

    def first(self, position):
        """The first position that a token at `position` sees, an integer or a tensor of them; below 0 stands for 0."""
        return position - position % self.width if self.chunked else position - self.width + 1


@dataclass(frozen=True)
class Scores:
    """How a layer turns q . k into weights.

    Args:
        scale: of q . k.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
        sinks: [Hq], logits that take a share of the weight and have no value; None: there are none.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None


def attend_masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scores: Scores) -> Tensor:
    """Attention under a mask.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, N, D]. visible: [B or 1, 1, T, N] bool, with a token for every row; None: all.

    Returns:
        [B, Hq, T, D].
    """
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    # The heads of a group are rows of one head, which reads K and V once.
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)
    if visible is not None and group > 1:
        visible = visible.repeat(1, 1, group, 1)
    if scores.plain:
        out = scaled_dot_product_attention(rows, k, v, visible, scale=scores.scale)
    else:
        logits = soft_capped((rows @ k.transpose(-1, -2)).float() * scores.scale, scores.softcap)
        if visible is not None:
            logits = logits.masked_fill(~visible, -torch.inf)
        if scores.sinks is not None:
            sinks = scores.sinks.float().view(1, -1, group, 1, 1).expand(batch, -1, -1, tokens, 1).flatten(2, 3)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(-1)
        if scores.sinks is not None:
            weights = weights[..., :-1]
        out = weights.to(v.dtype) @ v
    return out.unflatten(2, (group, tokens)).flatten(1, 2)


def attend_run(q: Tensor, k: Tensor, v: Tensor, start: int, scores: Scores, window: Window | None = None) -> Tensor:
    """Attention of a run of tokens on itself and on what is before it, in blocks of rows.

    Args:
        q: [B, Hq, T, D] at positions `start .. start + T - 1`. k, v: [B, Hkv, N, D], the last of them at the last of these positions.

    Returns:
        [B, Hq, T, D].
    """
    tokens = q.shape[2]
    base = start + tokens - k.shape[2]  # the position of the first key
    out = []
    for begin in range(0, tokens, BLOCK):
        end = min(tokens, begin + BLOCK)
        low = base if window is None else max(base, window.first(start + begin))
        high = start + end
        positions = torch.arange(start + begin, high, device=q.device)[:, None]
        visible = sees(window, positions, torch.arange(low, high, device=q.device))
        keys = slice(low - base, high - base)
        out.append(attend_masked(q[:, :, begin:end], k[:, :, keys], v[:, :, keys], visible[None, None], scores))
    return torch.cat(out, dim=2)


def attend_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scores: Scores) -> Tensor:
    """Attention of a prompt on itself in blocks of rows; pairs [B, 1, T, T] bool: which columns a column sees, of padding none.

    Args:
        q: [B, Hq, T, D]. k, v: [B, Hkv, T, D].

    Returns:
        [B, Hq, T, D].
    """
    tokens = q.shape[2]
    visible = pairs | torch.eye(tokens, dtype=torch.bool, device=q.device)  # nobody reads the output of padding, but no row is empty
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, tokens, BLOCK)]
    return torch.cat([attend_masked(q[:, :, rows], k, v, visible[:, :, rows], scores) for rows in blocks], dim=2)


def sees(window: Window | None, positions: Tensor, keys: Tensor) -> Tensor:
    """Whether tokens at `positions` see those at `keys`, which broadcast; keys below 0 are none."""
    causal = (keys <= positions) & (keys >= 0)
    return causal if window is None else causal & (keys >= window.first(positions))


class Ring:
    """K and V of a layer with a window: a token at position p lies in slot p % R, where R slots hold the window and `ROLLBACK` more.

    One more slot takes what padding writes. Which position a slot holds follows from the length of its sequence, so that nothing has to be
    moved, ragged batches need no padding, and a step has fixed shapes and addresses.

    Args:
        keys, values: [max_batch_size, Hkv, R + 1, D].
    """

    def __init__(self, window: Window, keys: Tensor, values: Tensor):
        self.window, self.keys, self.values = window, keys, values

    @property
    def slots(self) -> int:
        """R."""
        return self.keys.shape[2] - 1

    def held(self, lens: Tensor) -> Tensor:
        """The position that each slot holds, [B, R]; below 0 where it holds none. lens [B]: tokens of each sequence."""
        last = lens.long()[:, None] - 1
        return last - (last - torch.arange(self.slots, device=lens.device)) % self.slots

    def write(self, k: Tensor, v: Tensor, positions: Tensor, lens: Tensor) -> None:
        """Stores k, v [B, Hkv, T, D] of tokens at `positions` [B, T], of which -1 are padding; lens [B] counts them already."""
        kept = positions >= (lens.long()[:, None] - self.slots).clamp(min=0)
        slots = torch.where(kept, positions % self.slots, self.slots)[:, None, :, None]
        for ring, new in ((self.keys, k), (self.values, v)):
            ring[: k.shape[0]].scatter_(2, slots.expand_as(new), new)

    def step(self, q: Tensor, k: Tensor, v: Tensor, forward: Forward, scores: Scores, stored: bool) -> Tensor:
        """A decode step for q [B, Hq, T, D]: writes k and v, unless they are `stored`, and reads the ring."""
        batch = q.shape[0]
        positions = forward.positions()
        if not stored:
            self.write(k, v, positions, forward.seq_lens)
        if self.window not in forward.visible:
            visible = sees(self.window, positions[:, :, None], self.held(forward.seq_lens)[:, None])
            # A padding column sees the slot of padding, so that no row is empty; nobody reads its output.
            forward.visible[self.window] = torch.cat([visible, (positions < 0)[:, :, None]], dim=2)[:, None]
        return attend_masked(q, self.keys[:batch], self.values[:batch], forward.visible[self.window], scores)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, forward: Forward, scores: Scores) -> Tensor:
        """Exact attention of a prompt, or of a part of one, on itself and on the ring, which is as it was before it."""
        if forward.rows is None:
            return self._prompt_traced(q, k, v, forward, scores)
        first = forward.rows[0]
        if forward.slots is None and all(row.start == first.start for row in forward.rows):
            keys, values = self._with_past(k, v, slice(0, q.shape[0]), first.start)
            return attend_run(q, keys, values, first.start, scores, self.window)
        out = torch.zeros_like(q)
        for b, row in enumerate(forward.rows):
            if row.count:
                one = slice(b, b + 1)
                keys, values = self._with_past(k[one][:, :, row.columns], v[one][:, :, row.columns], one, row.start)
                out[one, :, row.columns] = attend_run(q[one][:, :, row.columns], keys, values, row.start, scores, self.window)
        return out

    def _with_past(self, k: Tensor, v: Tensor, rows: slice, start: int) -> tuple[Tensor, Tensor]:
        """K and V of what a run from `start` on sees before it, and its own."""
        low = max(0, self.window.first(start))
        if low >= start:
            return k, v
        slots = torch.arange(low, start, device=k.device) % self.slots
        return torch.cat([self.keys[rows][:, :, slots], k], dim=2), torch.cat([self.values[rows][:, :, slots], v], dim=2)

    def _prompt_traced(self, q: Tensor, k: Tensor, v: Tensor, forward: Forward, scores: Scores) -> Tensor:
        """The same in fixed shapes: the whole ring and all columns, masked by position."""
        batch, _, tokens, _ = q.shape
        positions = forward.positions()
        held = self.held(forward.seq_lens - (positions >= 0).sum(1))
        keys = torch.cat([self.keys[:batch, :, : self.slots], k], dim=2)
        values = torch.cat([self.values[:batch, :, : self.slots], v], dim=2)
        visible = sees(self.window, positions[:, :, None], torch.cat([held, positions], dim=1)[:, None])
        # A padding column sees itself.
        own = torch.nn.functional.pad(torch.eye(tokens, dtype=torch.bool, device=q.device), (self.slots, 0))
        return attend_masked(q, keys, values, (visible | ((positions < 0)[:, :, None] & own))[:, None], scores)
