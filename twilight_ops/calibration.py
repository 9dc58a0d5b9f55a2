"""Calibration files: the channel order, the prefix and the centre of every layer's shadow, as safetensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Shadow

PREFIX_STEP = 8  # channels; the shadow's layout wants multiples
FORMAT = "twilight-shadow-2"
WITHOUT_CENTRE = "twilight-shadow-prefix-1"  # of version 0.1


class Calibration(NamedTuple):
    """What a file says of one layer."""

    channel_order: Tensor  # [Hkv, D] int32
    prefix_channels: Tensor  # [Hkv] int32
    k_center: Tensor | None  # [Hkv, D] fp32; None: a file of version 0.1


def save(shadows: Sequence[Shadow | None], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the calibration of every layer's shadow to a safetensors file; a layer without one is left out."""
    from safetensors.torch import save_file

    tensors = {}
    for index, shadow in enumerate(shadows):
        if shadow is not None:
            for name in Calibration._fields:
                tensors[f"layers.{index}.{name}"] = getattr(shadow, name).cpu().clone()
    save_file(tensors, path, metadata={"format": FORMAT, **metadata})
    _read.cache_clear()


@functools.lru_cache(maxsize=4)
def _read(path: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"calibration: {path}: expected a file written by `python -m twilight_ops calibrate`, got no such file")
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("format")
            if found in (FORMAT, WITHOUT_CENTRE):
                return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        found = f"an unreadable file ({error})"
    raise ValueError(f"calibration: {path}: expected format {FORMAT} or {WITHOUT_CENTRE}, got {found}")


def load(path: str, index: int, kv_heads: int, head_dim: int, shard: int | None = None) -> Calibration:
    """One layer's calibration; with tensor parallelism this rank's heads of it.

    `shard` says which `kv_heads` of the model's heads these are; None: the rank in torch.distributed does.

    Raises:
        ValueError: a file that is missing, of another format or of another model.
    """
    tensors = _read(str(path))
    order, prefix, center = (tensors.get(f"layers.{index}.{name}") for name in Calibration._fields)
    if order is None or prefix is None:
        raise ValueError(f"calibration: {path}: expected an entry for layer {index}, got none")
    heads = order.shape[0]
    if order.shape[1] != head_dim or heads % kv_heads:
        raise ValueError(f"calibration: {path}: expected {kv_heads} KV heads of {head_dim} channels, got {list(order.shape)}")
    valid = (order.sort(-1).values == torch.arange(head_dim)).all() and (
        (prefix % PREFIX_STEP == 0) & (prefix > 0) & (prefix <= head_dim)
    ).all()
    if not valid:
        raise ValueError(f"calibration: {path}: expected permutations and prefixes that are multiples of {PREFIX_STEP}, got others")
    if center is not None and not (center.shape == order.shape and center.isfinite().all()):
        raise ValueError(f"calibration: {path}: expected finite centres of shape {list(order.shape)}, got others")
    if shard is None:
        shard = 0 if heads == kv_heads else torch.distributed.get_rank() % (heads // kv_heads)
    own = slice(shard * kv_heads, (shard + 1) * kv_heads)
    return Calibration(order[own], prefix[own], None if center is None else center[own])


def restore(shadow: Shadow, path: str | None, index: int, shard: int | None = None) -> bool:
    """Writes a file's calibration of layer `index` into a shadow, without a file identity and the whole row; whether the centre is known.

    Raises:
        ValueError: see `load`; the shadow is as it was.
    """
    kv_heads, head_dim = shadow.channel_order.shape
    if path is None:
        found = Calibration(torch.arange(head_dim), torch.tensor(head_dim), None)
    else:
        found = load(path, index, kv_heads, head_dim, shard)
    shadow.channel_order.copy_(found.channel_order)
    shadow.prefix_channels.copy_(found.prefix_channels)
    assert shadow.k_center is not None  # as a layer allocates it
    shadow.k_center.copy_(torch.zeros(()) if found.k_center is None else found.k_center)
    return found.k_center is not None
