"""Keys and queries with the statistics of a real model's attention heads: parameters fitted to recorded heads, data made from seeds.

A head's key and the queries of its group, position encoding undone, are one Gaussian vector

    u_t = mean + sum over scales s of (factor_s z_s + noise_s e_s),

whose latents z_s and e_s stay as they are for a random stretch of tokens, of mean length s, and are then drawn anew: neighbours resemble
each other, a query resembles its own surroundings, and means and factors hold the heavy channels and the biases of the model. The
fastest latents, one a token, come from a vocabulary with Zipf's frequencies, so that words return. The first key is a recorded one,
a sink in some texts. Every length is the same process, and position encoding turns keys and queries to their places. `bench/fit.py`
fits the parameters and shows how well they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import torch
from torch import Tensor

DATA = Path(__file__).with_name("data") / "qwen_heads.npz"
HEAD_DIM = 128
VOCABULARY = 2000  # words, the i-th with a frequency of 1 / i
CHUNK = 1 << 19  # keys made at once


@cache
def parameters(path: Path = DATA) -> dict[str, Tensor]:
    """The file's arrays; factor and noise decoded from 8 bits."""
    with numpy.load(path) as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files}
    for name in ("factor", "noise"):
        found[name] = found[name].float() * found.pop(f"{name}_step")
    return found


def describe() -> str:
    fitted = parameters()
    return (
        f"keys and queries of {len(fitted['mean'])} KV heads fitted to Qwen2.5-Coder-1.5B ({DATA.name}: layers "
        f"{', '.join(str(layer) for layer in dict.fromkeys(sorted(fitted['layer'].tolist())))})"
    )


@dataclass
class Heads:
    """The parameters of `num_kv_heads` heads and their groups, on one device; recorded heads are taken in turn."""

    mean: Tensor  # [Hkv, 1 + G, D], the key's first
    factor: Tensor  # [S, Hkv, R, 1 + G, D]
    noise: Tensor  # [S, Hkv, 1 + G, D], standard deviations
    first: Tensor  # [texts, Hkv, D], the first key of each recorded text, those that are sinks first
    words: Tensor  # [Hkv, VOCABULARY, R], of mean 0 and variance 1
    scales: list[float]
    inv_freq: Tensor  # [D / 2] fp64

    @classmethod
    def fitted(cls, num_qo_heads: int, num_kv_heads: int, rng: torch.Generator, path: Path = DATA) -> Heads:
        fitted, device = parameters(path), rng.device
        heads = torch.arange(num_kv_heads) % len(fitted["mean"])
        group = torch.cat(
            [torch.zeros(1, dtype=torch.int64), 1 + torch.arange(num_qo_heads // num_kv_heads) % (fitted["mean"].shape[1] - 1)]
        )
        factor = fitted["factor"][:, heads][:, :, :, group]
        frequency = 1.0 / torch.arange(1, VOCABULARY + 1, device=device)
        frequency = (frequency / frequency.sum())[:, None]
        words = torch.randn(num_kv_heads, VOCABULARY, factor.shape[2], generator=rng, device=device)
        words = words - (frequency * words).sum(1, keepdim=True)
        return cls(
            mean=fitted["mean"][heads][:, group].float().to(device),
            factor=factor.to(device),
            noise=fitted["noise"][:, heads][:, :, group].to(device),
            first=fitted["first"][:, heads].float().to(device),
            words=words / (frequency * words.square()).sum(1, keepdim=True).sqrt(),
            scales=fitted["scales"].tolist(),
            inv_freq=(fitted["theta"].item() ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)).to(device),
        )

    def sequence(self, length: int, rng: torch.Generator, index: int = 0) -> Sequence:
        """One text of `length` tokens; texts take the recorded first keys in turn."""
        return Sequence(self, [self._stretches(scale, length, rng) for scale in self.scales], self.first[index % len(self.first)], rng)

    def _stretches(self, scale: float, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which stretch each token is in, [length], and the latents of every stretch, [Hkv, stretches, R]."""
        device, heads = rng.device, len(self.mean)
        if scale <= 1:
            return torch.arange(length, device=device), self.words[:, self._drawn_words(length, rng)]
        stretch = (torch.rand(length, generator=rng, device=device) < 1 / scale).long().cumsum(0)
        count = int(stretch[-1]) + 1
        return stretch, torch.randn(heads, count, self.factor.shape[2], generator=rng, device=device)

    def _drawn_words(self, count: int, rng: torch.Generator) -> Tensor:
        frequency = 1.0 / torch.arange(1, VOCABULARY + 1, device=rng.device)
        edges = frequency.cumsum(0)
        return torch.searchsorted(edges, torch.rand(count, generator=rng, device=rng.device) * edges[-1]).clamp(max=VOCABULARY - 1)

    def turned(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Position encoding of rows [..., tokens, D] at positions [tokens]."""
        angles = positions.double()[:, None] * self.inv_freq
        cos, sin = angles.cos().float(), angles.sin().float()
        a, b = rows.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass
class Sequence:
    """The latents of one text."""

    heads: Heads
    stretches: list[tuple[Tensor, Tensor]]
    first: Tensor  # [Hkv, D]
    rng: torch.Generator

    def keys(self, out: Tensor) -> None:
        """Writes the keys, turned to their places, to out [L, Hkv, D]; a few heads at a time, because fp32 of all may not fit."""
        heads, device, length = self.heads, self.rng.device, len(out)
        positions = torch.arange(length, device=device)
        at_once = max(1, CHUNK // length)
        for begin in range(0, len(heads.mean), at_once):
            some = slice(begin, begin + at_once)
            found = heads.mean[some, 0, None].repeat(1, length, 1)  # [heads, L, D]
            for s, (stretch, latents) in enumerate(self.stretches):
                part = latents[some] @ heads.factor[s, some, :, 0]
                part += torch.randn(part.shape, generator=self.rng, device=device) * heads.noise[s, some, 0, None]
                found += part[:, stretch]
            found[:, 0] = self.first[some]
            out[:, some] = heads.turned(found, positions).transpose(0, 1).to(out.dtype)

    def queries(self, positions: Tensor, own_words: bool = True) -> Tensor:
        """[tokens, Hq, D] fp32 of the tokens at `positions`, turned to their places; without their own words, of other tokens there."""
        heads, device = self.heads, self.rng.device
        found = heads.mean[:, None, 1:].repeat(1, len(positions), 1, 1)  # [Hkv, tokens, G, D]
        for s, (stretch, latents) in enumerate(self.stretches):
            fresh = heads.scales[s] <= 1 and not own_words
            latent = heads.words[:, heads._drawn_words(len(positions), self.rng)] if fresh else latents[:, stretch[positions]]
            found += torch.einsum("htr,hrgd->htgd", latent, heads.factor[s, :, :, 1:])
            found += torch.randn(found.shape, generator=self.rng, device=device) * heads.noise[s, :, None, 1:]
        turned = heads.turned(found.transpose(1, 2), positions)  # [Hkv, G, tokens, D]
        return turned.permute(2, 0, 1, 3).flatten(1, 2)
