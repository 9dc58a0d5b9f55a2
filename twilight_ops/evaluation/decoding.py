"""Decode steps over a filled cache: teacher-forced or greedy, recorded as a CUDA graph where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..integration import CapturedStep, TwilightCache, cache_argument
from .prefill import attention


class Stepper:
    """Feeds one token a sequence and returns the next logits; buffers are static, so a GPU replays one graph."""

    def __init__(self, model, cache: TwilightCache):
        lens = cache.live_seq_lens
        self.token = torch.zeros(len(lens), 1, dtype=torch.int64, device=lens.device)
        self.position = lens.long()[:, None].clone()
        self.logits = torch.zeros(len(lens), model.config.vocab_size, device=lens.device)
        token, position, logits = self.token, self.position, self.logits
        named = cache_argument(model, cache)

        # A closure over the buffers and not a bound method: a cycle through self would keep a graph and its memory until some later
        # garbage collection.
        def forward() -> None:
            out = model(input_ids=token, position_ids=position, use_cache=True, **named)
            logits.copy_(out.logits[:, -1])
            position.add_(1)

        self._step = CapturedStep(forward, lens.device, model) if lens.device.type == "cuda" else forward

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] fp32, overwritten by the next call."""
        self.token.copy_(tokens[:, None])
        self._step()
        return self.logits


@torch.no_grad()
def teacher_forced(model, cache: TwilightCache, tokens: Tensor) -> Iterator[Tensor]:
    """Feeds tokens [B, T] one step at a time; yields the logits [B, V] after each."""
    with attention(model, "twilight"):
        step = Stepper(model, cache)
        for t in range(tokens.shape[1]):
            yield step(tokens[:, t])


@torch.no_grad()
def greedy(model, cache: TwilightCache, first_logits: Tensor, new_tokens: int) -> Tensor:
    """The `new_tokens` most likely tokens in turn, [B, new_tokens]; first_logits [B, V] follow the prompt."""
    token = first_logits.argmax(-1)
    chosen = [token]
    with attention(model, "twilight"):
        step = Stepper(model, cache)
        for _ in range(new_tokens - 1):
            token = step(token).argmax(-1)
            chosen.append(token)
    return torch.stack(chosen, dim=1)
