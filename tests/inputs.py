"""One factory for the inputs of every operator test: ragged paged caches with poison wherever nothing may be read."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
from flat import reference
from torch import Tensor

from twilight_ops.arguments import FP8, Scales

# What every selector and pruner argument is unless a test says otherwise.
DEFAULTS = {
    "token_budget": 64,
    "budget_fraction": 0.0,
    "top_p": 0.85,
    "indices": None,
    "counts": None,
    "tokens_per_index": 1,
    "selector": "full",
    "head_token_budget": None,
    "head_top_p": None,
    "sink_tokens": 0,
    "recent_tokens": 0,
    "dense_below": 0,
    "page_fraction": 1.0,
    "min_scored_tokens": 0,
}
CACHE_TENSORS = "k_cache v_cache k_quant k_scale page_bounds bounds_scale page_means means_scale".split()
# What select_pages reads instead of means, and instead of bounds.
BY_BOUNDS = {"page_means": None, "means_scale": None}
BY_MEANS = {"page_bounds": None, "bounds_scale": None}


@dataclass(frozen=True)
class Shape:
    """Sizes of one decode call; the fields are the symbols of the operator docstrings."""

    seq_lens: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    query_tokens: int
    dtype: torch.dtype

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.seq_lens))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"L{lengths}_H{self.num_qo_heads}/{self.num_kv_heads}_D{self.head_dim}_S{self.page_size}_T{self.query_tokens}_{dtype}"


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16

# Together: dtypes fp32/bf16/fp16, D 64/96/128/256, G 1/3/4/8, S 16/32/64, T 1..8, lengths 0, 1, S-1, S, S+1, 1000 and odd ones.
SHAPES = (
    Shape((0, 1, 15, 16, 17, 1000), 8, 2, 128, 16, 1, _BF16),
    Shape((1000, 0, 33), 3, 1, 64, 16, 1, _F32),
    Shape((31, 32, 33, 500), 8, 1, 96, 32, 2, _F16),
    Shape((63, 64, 65, 777), 2, 2, 256, 64, 3, _BF16),
    Shape((0, 1, 7, 8, 1000), 4, 4, 64, 32, 8, _F32),
    Shape((129, 1000), 8, 2, 128, 16, 4, _F32),
    Shape((650, 9), 6, 2, 96, 64, 5, _BF16),
    Shape((130,), 16, 2, 256, 16, 6, _F16),
    Shape((1,), 1, 1, 64, 16, 1, _BF16),
    Shape((511, 64), 9, 3, 128, 64, 7, _F32),
    Shape((255, 16, 47), 24, 3, 64, 16, 1, _F16),
    Shape((3001,), 8, 2, 96, 32, 1, _F32),
    Shape((2000, 63), 4, 1, 256, 32, 1, _F32),
)


@dataclass(frozen=True)
class DecodeInputs:
    """Every tensor of one decode call, named as the operators name them."""

    q: Tensor  # [B, T, Hq, D], a view of a wider buffer
    k_cache: Tensor  # [P, Hkv, S, D]
    v_cache: Tensor  # [P, Hkv, S, D]
    k_quant: Tensor  # [P, Hkv, S * D / 2] uint8
    k_scale: Tensor  # [P, Hkv, S, 2] bf16
    page_bounds: Tensor  # [P, Hkv, 2, D]
    bounds_scale: Tensor | None  # [P, Hkv, 2] bf16
    channel_order: Tensor  # [Hkv, D] int32
    prefix_channels: Tensor  # [Hkv] int32
    k_center: Tensor | None  # [Hkv, D] fp32
    page_table: Tensor  # [B, M] int32
    seq_lens: Tensor  # [B] int32
    sm_scale: float
    keys: Tensor  # [B, N, Hkv, D], N = max(seq_lens), left-aligned: what the pages hold; zero beyond a sequence's end
    values: Tensor  # [B, N, Hkv, D]
    page_means: Tensor | None = None  # [P, Hkv, D / 2] uint8
    means_scale: Tensor | None = None  # [P, Hkv, 2] bf16
    k_descale: Tensor | None = None  # [Hkv] fp32
    v_descale: Tensor | None = None  # [Hkv] fp32
    k_shift: Tensor | None = None  # [Hkv, D] fp32

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[2]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[1]

    @property
    def group_size(self) -> int:
        return self.q.shape[2] // self.num_kv_heads

    @property
    def max_tokens(self) -> int:
        return self.page_table.shape[1] * self.page_size

    def arguments(self, op: str, **overrides) -> dict[str, object]:
        """Flat keyword arguments of `twilight::<op>`: from `overrides`, else this object's fields, else DEFAULTS, else the schema.

        select_pages is given bounds, unless `overrides` contain BY_MEANS.
        """
        if op == "select_pages" and not set(BY_MEANS) <= set(overrides):
            overrides = BY_BOUNDS | overrides
        schema = getattr(torch.ops.twilight, op).default._schema
        unknown = set(overrides) - {a.name for a in schema.arguments}
        if unknown:
            raise TypeError(f"{op} has no argument {sorted(unknown)}")
        arguments = {}
        for argument in schema.arguments:
            name = argument.name
            if name in overrides:
                arguments[name] = overrides[name]
            elif hasattr(self, name):
                arguments[name] = getattr(self, name)
            elif name in DEFAULTS:
                arguments[name] = DEFAULTS[name]
        return arguments

    def upcast(self) -> DecodeInputs:
        """The same numbers in fp64: what makes a reference the oracle."""
        floats = ("q", "k_cache", "v_cache", "keys", "values")
        wide = {name: getattr(self, name).double() for name in floats}
        if self.k_cache.dtype == FP8:
            scales = Scales(self.k_descale, self.v_descale, self.k_shift)
            wide |= {"k_cache": scales.keys(self.k_cache, torch.float64), "v_cache": scales.values(self.v_cache, torch.float64)}
            wide |= dict.fromkeys(Scales._fields)
        if self.bounds_scale is None:
            wide["page_bounds"] = self.page_bounds.double()
        return replace(self, **wide)

    def oracle(self, op: str, **overrides):
        """Result of the fp64 oracle."""
        return getattr(reference, op)(**self.upcast().arguments(op, **overrides))

    def clone(self) -> DecodeInputs:
        """Separate memory for every tensor."""
        return replace(self, **{name: tensor.clone() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}


def strided(x: Tensor, gap: int = 3) -> Tensor:
    """A view with the values of x [B, T, H, D] as a transposed, sliced projection has them; NaN lies in the gaps."""
    batch, tokens, heads, dim = x.shape
    buffer = torch.full((batch, heads, tokens, dim + gap), math.nan, dtype=x.dtype, device=x.device)
    view = buffer.transpose(1, 2)[..., :dim]
    view.copy_(x)
    return view


def interleaved(x: DecodeInputs, by_head: bool = True) -> DecodeInputs:
    """The same cache in one buffer with a row a page, as an engine's block has it; bytes that no tensor owns are 255, a NaN.

    Args:
        by_head: all tensors of a head together, in a multiple of 128 bytes; else all heads of a tensor.
    """
    cache = {name: tensor for name, tensor in x.tensors().items() if name in CACHE_TENSORS}
    num_pages, heads = x.k_cache.shape[:2]
    sizes = {name: -(-tensor[0, 0].nbytes // 16) * 16 for name, tensor in cache.items()}
    head_bytes = -(-sum(sizes.values()) // 128) * 128
    page_bytes = 128 + heads * head_bytes  # the first 128 are nobody's
    buffer = torch.full((num_pages * page_bytes,), 255, dtype=torch.uint8, device=x.q.device)
    views, start = {}, 128
    for name, tensor in cache.items():
        strides = (page_bytes, head_bytes if by_head else sizes[name])
        strides = [stride // tensor.itemsize for stride in strides] + list(tensor.stride()[2:])
        views[name] = buffer.view(tensor.dtype).as_strided(tensor.shape, strides, start // tensor.itemsize).copy_(tensor)
        start += sizes[name] if by_head else heads * sizes[name]
    return replace(x, **views)


def channel_energy(head_dim: int, kv_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """[Hkv, D] standard deviation of each K channel, mean square 1: a few heavy channels, as trained models have them."""
    decay = torch.exp(-torch.arange(head_dim, dtype=torch.float32, device=device) / (head_dim / 4))
    return (decay / decay.square().mean().sqrt()).expand(kv_heads, -1)


def make_inputs(
    shape: Shape,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spread: float = 3.7,
    bounds_dtype: str = "model",
    spare_pages: int = 3,
    extra_pages: int = 1,
) -> DecodeInputs:
    """Random inputs whose logits have standard deviation `spread`, in natural-log units.

    Physical pages are shuffled; every slot that holds no token (spare pages, the rest of a sequence's last page) is NaN, its codes are
    random bytes, and page-table entries past a sequence's last page are -1 or far out of range.

    Args:
        bounds_dtype: "model" or "uint8".
        spare_pages: physical pages no sequence owns.
        extra_pages: logical pages beyond the longest sequence.
    """
    return on_device(_host_inputs(shape, seed, spread, bounds_dtype, spare_pages, extra_pages).clone(), device)


# Several tests use the same shape; a copy is far cheaper than filling the pages again.
@functools.lru_cache(maxsize=64)
def _host_inputs(shape: Shape, seed: int, spread: float, bounds_dtype: str, spare_pages: int, extra_pages: int) -> DecodeInputs:
    rng = torch.Generator().manual_seed(seed)
    batch, kv_heads, dim, page = len(shape.seq_lens), shape.num_kv_heads, shape.head_dim, shape.page_size
    longest = max(shape.seq_lens)
    owned = [-(-length // page) for length in shape.seq_lens]
    max_pages = max(owned) + extra_pages
    num_pages = sum(owned) + spare_pages

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng)

    heavy = torch.stack([torch.randperm(dim, generator=rng) for _ in range(kv_heads)])
    energy = channel_energy(dim, kv_heads).gather(1, heavy)
    keys = (normal(batch, longest, kv_heads, dim) * energy).to(shape.dtype)
    values = normal(batch, longest, kv_heads, dim).to(shape.dtype)
    q = (normal(batch, shape.query_tokens, shape.num_qo_heads, dim) * spread).to(shape.dtype)
    lengths = torch.tensor(shape.seq_lens, dtype=torch.int32)
    beyond = torch.arange(longest) >= lengths[:, None]
    keys[beyond], values[beyond] = 0, 0

    physical = torch.randperm(num_pages, generator=rng).int()
    page_table = torch.full((batch, max_pages), -1, dtype=torch.int32)
    page_table[:, -1] = 2**31 - 1
    start = 0
    for b, pages in enumerate(owned):
        page_table[b, :pages] = physical[start : start + pages]
        start += pages

    def poison(*size: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, size, generator=rng, dtype=torch.uint8)
        return torch.full(size, math.nan, dtype=dtype)

    eight_bit = bounds_dtype == "uint8"
    order = torch.stack([torch.randperm(dim, generator=rng) for _ in range(kv_heads)]).int()
    # Different prefixes a head: half of the channels, the smallest, the whole row.
    prefix = torch.tensor([(dim // 2, 8, dim)[h % 3] for h in range(kv_heads)], dtype=torch.int32)
    center = torch.randn(kv_heads, dim, generator=rng)
    host = DecodeInputs(
        q=q,
        k_cache=poison(num_pages, kv_heads, page, dim, dtype=shape.dtype),
        v_cache=poison(num_pages, kv_heads, page, dim, dtype=shape.dtype),
        k_quant=poison(num_pages, kv_heads, page * dim // 2, dtype=torch.uint8),
        k_scale=poison(num_pages, kv_heads, page, 2, dtype=torch.bfloat16),
        page_bounds=poison(num_pages, kv_heads, 2, dim, dtype=torch.uint8 if eight_bit else shape.dtype),
        bounds_scale=poison(num_pages, kv_heads, 2, dtype=torch.bfloat16) if eight_bit else None,
        page_means=poison(num_pages, kv_heads, dim // 2, dtype=torch.uint8),
        means_scale=poison(num_pages, kv_heads, 2, dtype=torch.bfloat16),
        channel_order=order,
        prefix_channels=prefix,
        k_center=center,
        page_table=page_table,
        seq_lens=lengths,
        sm_scale=dim**-0.5,
        keys=keys,
        values=values,
    )
    if longest > 0:
        positions = torch.arange(longest, dtype=torch.int32).expand(batch, -1).masked_fill(beyond, -1)
        reference.append_kv(**host.arguments("append_kv", k=keys, v=values, positions=positions))
    return host


def in_fp8(x: DecodeInputs) -> DecodeInputs:
    """The same call on K and V in float8_e4m3fn, by scales that differ from head to head; keys and values become what is stored then."""
    rng = torch.Generator().manual_seed(1)
    kv_heads, dim = x.num_kv_heads, x.q.shape[-1]
    k_descale, v_descale = (2.0 ** torch.randint(-6, 2, (kv_heads,), generator=rng).float() for _ in range(2))
    scales = Scales(k_descale, v_descale, 3 * torch.randn(kv_heads, dim, generator=rng))._asdict()
    scales = {name: tensor.to(x.q.device) for name, tensor in scales.items()}
    pages = {name: getattr(x, name).to(FP8) for name in ("k_cache", "v_cache")}  # NaN
    y = replace(x.clone(), **pages, **scales)
    position = torch.arange(x.keys.shape[1], dtype=torch.int32, device=x.q.device).expand(len(x.seq_lens), -1)
    position = torch.where(position < x.seq_lens[:, None], position, -1)
    reference.append_kv(**y.arguments("append_kv", k=x.keys, v=x.values, positions=position))
    wide = y.upcast()
    return replace(
        y, **{name: paged_rows(x, getattr(wide, page)).to(x.q.dtype) for name, page in (("keys", "k_cache"), ("values", "v_cache"))}
    )


def paged_rows(x: DecodeInputs, pages: Tensor) -> Tensor:
    """Live rows of `pages` [P, Hkv, S, D], left-aligned: [B, max(seq_lens), Hkv, D]."""
    rows = torch.zeros(x.keys.shape, dtype=pages.dtype, device=pages.device)
    for b, length in enumerate(x.seq_lens.tolist()):
        owned = x.page_table[b, : -(-length // x.page_size)].long()
        rows[b, :length] = pages[owned].transpose(1, 2).flatten(0, 1)[:length]
    return rows


def on_device(x: DecodeInputs, device: torch.device | str) -> DecodeInputs:
    """Moves everything and gives q the strides of a transposed projection."""
    moved = {name: tensor.to(device) for name, tensor in x.tensors().items()}
    moved["q"] = strided(moved["q"])
    return replace(x, **moved)


def break_key(x: DecodeInputs, sequence: int, position: int, value: float) -> None:
    """Stores `value` in one channel of every head's K at a position, shadow and bounds included, as append_kv does."""
    keys = x.keys[:, position, None].clone()
    keys[..., 5] = value
    rows = torch.full((len(x.seq_lens), 1), -1, dtype=torch.int32, device=x.q.device)
    rows[sequence] = position
    reference.append_kv(**x.arguments("append_kv", k=keys, v=x.values[:, position, None], positions=rows))
    x.keys[sequence, position] = keys[sequence, 0]


def random_candidates(x: DecodeInputs, unit: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random ascending list a KV head of half of the live items (and -1 pads), as a selector would return it."""
    rng = torch.Generator().manual_seed(seed)
    items = x.max_tokens // unit
    member = torch.rand(len(x.seq_lens), x.num_kv_heads, items, generator=rng) < 0.5
    member &= torch.arange(items) * unit < x.seq_lens.cpu()[:, None, None]
    picked = torch.where(member, torch.arange(items), items).sort(-1).values
    indices = torch.where(picked == items, -1, picked).int()[..., : max(items - 2, 1)].contiguous()
    counts = member.sum(-1).clamp(max=indices.shape[-1]).int()
    return indices.to(x.q.device), counts.to(x.q.device)


def mean_keys(x: DecodeInputs, dtype: torch.dtype = torch.float64) -> Tensor:
    """Dequantised page means [P, Hkv, D] in the model's channel order."""
    codes = torch.stack([x.page_means & 15, x.page_means >> 4], dim=-1).flatten(-2).to(dtype)
    ordered = codes * x.means_scale[..., :1].to(dtype) + x.means_scale[..., 1:].to(dtype)
    return torch.empty_like(ordered).scatter_(-1, x.channel_order.long().expand_as(ordered), ordered)


def shadow_keys(x: DecodeInputs, dtype: torch.dtype = torch.float64) -> Tensor:
    """Dequantised shadow [P, Hkv, S, D] in the model's channel order."""
    from twilight_ops.reference import _paging

    codes = _paging.unpack_shadow(x.k_quant, x.prefix_channels, x.page_size)
    ordered = _paging.dequantise(codes, x.k_scale, dtype)
    order = x.channel_order.long()[None, :, None].expand_as(ordered)
    return torch.empty_like(ordered).scatter_(-1, order, ordered)
