"""Calibration files: the channel order and the prefix of every layer, as safetensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .layer import PagedKVLayer

PREFIX_STEP = 8  # channels; the shadow's layout wants multiples
FORMAT = "twilight-shadow-prefix-1"


def save(layers: Sequence[PagedKVLayer], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the calibration of every layer that has one to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {}
    for index, layer in enumerate(layers):
        if layer.shadow is not None:
            tensors[f"layers.{index}.channel_order"] = layer.shadow.channel_order.cpu().clone()
            tensors[f"layers.{index}.prefix_channels"] = layer.shadow.prefix_channels.cpu().clone()
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
            if found == FORMAT:
                return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        found = f"an unreadable file ({error})"
    raise ValueError(f"calibration: {path}: expected format {FORMAT}, got {found}")


def load(path: str, index: int, kv_heads: int, head_dim: int, shard: int | None = None) -> tuple[Tensor, Tensor]:
    """One layer's (channel_order [Hkv, D], prefix_channels [Hkv]); with tensor parallelism this rank's heads of them.

    `shard` says which `kv_heads` of the model's heads these are; None: the rank in torch.distributed does.
    """
    tensors = _read(str(path))
    order, prefix = (tensors.get(f"layers.{index}.{name}") for name in ("channel_order", "prefix_channels"))
    if order is None or prefix is None:
        raise ValueError(f"calibration: {path}: expected an entry for layer {index}, got none")
    heads = order.shape[0]
    if order.shape[1] != head_dim or heads % kv_heads:
        raise ValueError(f"calibration: {path}: expected {kv_heads} KV heads of {head_dim} channels, got {list(order.shape)}")
    if heads != kv_heads:
        part = (torch.distributed.get_rank() % (heads // kv_heads) if shard is None else shard) * kv_heads
        order, prefix = order[part : part + kv_heads], prefix[part : part + kv_heads]
    valid = (order.sort(-1).values == torch.arange(head_dim)).all() and (
        (prefix % PREFIX_STEP == 0) & (prefix > 0) & (prefix <= head_dim)
    ).all()
    if not valid:
        raise ValueError(f"calibration: {path}: expected permutations and prefixes that are multiples of {PREFIX_STEP}, got others")
    return order, prefix
