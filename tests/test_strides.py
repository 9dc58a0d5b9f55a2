"""Operators on caches whose pages and heads lie apart: all tensors of a page in one range of bytes, as in an engine's block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from comparisons import assert_same_state
from flat import reference
from inputs import BY_BOUNDS, BY_MEANS, CACHE_TENSORS, SHAPES, Shape, interleaved, make_inputs, random_candidates
from torch import Tensor
from torch._subclasses import FakeTensorMode

from twilight_ops.capacity import COUNTER_COLUMNS

FEW = Shape((40, 17), 4, 2, 64, 16, 2, torch.float16)
STRIDES = "page and head strides that are multiples of 16 bytes"
SELECTORS = ("dense", "full", "quest", "page_mean", "shadow_prefix", "two levels", "streaming")


def decode_steps(selectors: Sequence[str]) -> list[tuple[str, dict]]:
    """A call of decode_attention with each."""
    two_levels = {"selector": "shadow_prefix", "page_fraction": 0.5}
    chosen = [two_levels if selector == "two levels" else {"selector": selector} for selector in selectors]
    return [("decode_attention", {"token_budget": 20, "sink_tokens": 2, "recent_tokens": 3} | options) for options in chosen]


def calls(x) -> list[tuple[str, dict]]:
    """Every operator that reads a cache, with what a test gives it, once each way."""
    indices, counts = random_candidates(x, 1)
    listed = {"indices": indices, "counts": counts}
    found = [("select_pages", BY_BOUNDS), ("select_pages", BY_MEANS), ("select_tokens", {}), ("select_tokens", {"page_fraction": 0.5})]
    found += [("estimate_weights", {}), ("estimate_weights", listed), ("attend_sparse", {}), ("attend_sparse", listed)]
    return found + decode_steps(SELECTORS)


def results(backend, x, op: str, options: dict) -> list[Tensor]:
    """What a call returns and what it writes beside that, as bytes."""
    written = {}
    if op == "decode_attention":
        lists = (len(x.seq_lens), x.num_kv_heads)
        written = {
            "kept_indices": x.seq_lens.new_zeros(*lists, x.max_tokens),
            "kept_counts": x.seq_lens.new_zeros(lists),
            "budget_counters": torch.zeros(x.num_kv_heads, COUNTER_COLUMNS, dtype=torch.int64, device=x.q.device),
        }
    got = getattr(backend, op)(**x.arguments(op, **options, **written))
    tensors = [*(got if isinstance(got, tuple) else (got,)), *written.values()]
    return [tensor.contiguous().view(torch.uint8) for tensor in tensors]


def check_reads(backend, shape: Shape, bounds_dtype: str, by_head: bool, selectors: Sequence[str] = ()) -> None:
    """Results are those of contiguous tensors, bit by bit: of every operator, or of decode steps with these selectors."""
    x = make_inputs(shape, device=backend.device, bounds_dtype=bounds_dtype)
    blocks = interleaved(x, by_head)
    for op, options in decode_steps(selectors) if selectors else calls(x):
        for got, want in zip(results(backend, blocks, op, options), results(backend, x, op, options), strict=True):
            assert torch.equal(got, want), (op, options)


def owned(x) -> Tensor:
    """The buffer of an interleaved cache with everything that a tensor owns set to 0."""
    memory = x.k_cache.untyped_storage()
    others = torch.empty(0, dtype=torch.uint8, device=x.q.device).set_(memory).clone()
    for name in CACHE_TENSORS:
        tensor = getattr(x, name)
        if tensor is not None:
            others.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return others


def check_append(backend, shape: Shape, bounds_dtype: str, by_head: bool) -> None:
    """What is written is what the reference writes to contiguous tensors, and not a byte elsewhere."""
    want = make_inputs(shape, device=backend.device, bounds_dtype=bounds_dtype)
    rows = {"k": want.keys.flip(1), "v": want.values.flip(1)} if max(shape.seq_lens) else {}
    got = interleaved(want, by_head)
    before = owned(got)
    backend.append_kv(**got.arguments("append_kv", **rows))
    reference.append_kv(**want.arguments("append_kv", **rows))
    assert_same_state(got, want)
    assert torch.equal(owned(got), before), "bytes of nobody were written"


@pytest.mark.parametrize(("bounds_dtype", "by_head"), [("uint8", True), ("model", False)], ids=["by head", "by tensor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_of_all_tensors_give_the_bits_of_contiguous_ones(backend, shape, bounds_dtype, by_head):
    if backend.device != "cpu" and shape.dtype == torch.float32:
        pytest.skip("fp32 is for the CPU only")
    check_reads(backend, shape, bounds_dtype, by_head)
    check_append(backend, shape, bounds_dtype, by_head)


def apart(x, name: str, page: int, head: int, offset: int = 0):
    """One tensor of a cache with these strides, in bytes."""
    tensor = getattr(x, name)
    pages, heads = tensor.shape[:2]
    size = tensor.itemsize
    buffer = torch.zeros((pages * page + heads * head + offset) // size + tensor[0, 0].numel(), dtype=tensor.dtype)
    return replace(x, **{name: buffer.as_strided(tensor.shape, (page // size, head // size, *tensor.stride()[2:]), offset // size)})


@pytest.mark.parametrize(
    "name, strides, message",
    [
        ("k_cache", (4096 + 8, 2048), f"{STRIDES}, from 2048 bytes to 4 GiB, got strides [2052, 1024, 64, 1] of 2 bytes"),
        ("v_cache", (8192, 2048 + 4), f"{STRIDES}, from 2048 bytes to 4 GiB, got strides [4096, 1026, 64, 1] of 2 bytes"),
        ("k_quant", (2048, 520), f"{STRIDES}, from 512 bytes to 4 GiB, got strides [2048, 520, 1] of 1 bytes"),
        ("k_scale", (256, 32), f"{STRIDES}, from 64 bytes to 4 GiB, got strides [128, 16, 2, 1] of 2 bytes"),
        ("page_means", (128, 40), f"{STRIDES}, from 32 bytes to 4 GiB, got strides [128, 40, 1] of 1 bytes"),
        ("k_cache", (8192, 2048, 8), "a view that starts at a multiple of 16 bytes, got byte 8"),
    ],
)
def test_strides_that_vector_loads_cannot_take_are_refused_by_name(name, strides, message):
    x = apart(make_inputs(FEW, bounds_dtype="uint8"), name, *strides)
    for op in ("append_kv", "decode_attention"):
        arguments = x.arguments(op, **({"k": x.keys[:, :2], "v": x.values[:, :2]} if op == "append_kv" else {}))
        with FakeTensorMode() as mode:
            fakes = {key: mode.from_tensor(a) if isinstance(a, Tensor) else a for key, a in arguments.items()}
        for given in (arguments, fakes):
            with pytest.raises(RuntimeError, match=re.escape(f"twilight::{op}: {name}: expected {message}")):
                getattr(torch.ops.twilight, op)(**given)


def test_a_page_and_head_must_be_contiguous():
    x = make_inputs(FEW, bounds_dtype="uint8")
    for name in CACHE_TENSORS:
        tensor = getattr(x, name)
        wide = torch.stack([tensor, tensor], -1)[..., 0]
        with pytest.raises(
            RuntimeError, match=f"twilight::decode_attention: {name}: expected contiguous dimensions behind pages and heads"
        ):
            torch.ops.twilight.decode_attention(**replace(x, **{name: wide}).arguments("decode_attention"))


def test_one_page_or_one_head_may_have_any_stride_there(backend):
    x = make_inputs(Shape((16,), 4, 1, 64, 16, 1, torch.float16), spare_pages=0, device=backend.device)
    want = backend.decode_attention(**x.arguments("decode_attention"))
    for strides in ((4096, 3), (3, 2048)):
        view = x.k_cache.as_strided(x.k_cache.shape, (*strides, *x.k_cache.stride()[2:]))
        got = backend.decode_attention(**replace(x, k_cache=view).arguments("decode_attention"))
        assert torch.equal(got[0], want[0])
