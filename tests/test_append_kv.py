"""twilight::append_kv: this step's K and V, their 4-bit shadow, and bounds and means of the touched pages."""

import math
from dataclasses import replace

import pytest
import torch
from comparisons import assert_same_state
from flat import reference
from inputs import SHAPES, Shape, make_inputs, mean_keys, shadow_keys, strided

from twilight_ops import PageMeans, Shadow

pytestmark = pytest.mark.usefixtures("poisoned_empties")
SMALL = Shape((70, 0, 33), 6, 3, 64, 16, 1, torch.float32)


def blank(x):
    """The same geometry with nothing stored: NaN and random bytes."""
    empty = x.clone()
    for name in ("k_cache", "v_cache", "k_scale", "page_bounds", "bounds_scale", "page_means", "means_scale"):
        tensor = getattr(empty, name)
        if tensor is not None:
            tensor.fill_(math.nan if tensor.is_floating_point() else 201)
    empty.k_quant.fill_(90)
    return empty


def left_aligned(x):
    """Positions [B, N] of `x.keys`, -1 beyond each sequence."""
    position = torch.arange(x.keys.shape[1], dtype=torch.int32, device=x.q.device).expand(len(x.seq_lens), -1)
    return torch.where(position < x.seq_lens[:, None], position, -1)


def append(backend, x, k=None, v=None, **arguments):
    """Appends strided rows (by default the whole prompt) on `backend` and on a copy with the reference; both must agree."""
    k, v = x.keys if k is None else k, x.values if v is None else v
    expected = x.clone()
    reference.append_kv(**expected.arguments("append_kv", k=k, v=v, **arguments))
    backend.append_kv(**x.arguments("append_kv", k=strided(k), v=strided(v, gap=8), **arguments))
    assert_same_state(x, expected)


def locate(x, b: int, position: int) -> tuple[int, int]:
    return int(x.page_table[b, position // x.page_size]), position % x.page_size


def code_at(x, page: int, head: int, slot: int, j: int) -> int:
    """Ordered channel j of one token, read from the bytes as the contract lays them out."""
    r, dim = int(x.prefix_channels[head]), x.q.shape[-1]
    byte = slot * r // 2 + j // 2 if j < r else x.page_size * r // 2 + slot * (dim - r) // 2 + (j - r) // 2
    value = int(x.k_quant[page, head, byte])
    return value >> 4 if j % 2 else value & 15


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bounds_dtype", ["model", "uint8"])
def test_append_kv_writes_whole_prompts_as_the_reference_does(backend, shape, bounds_dtype):
    x = blank(make_inputs(shape, device=backend.device, bounds_dtype=bounds_dtype))
    append(backend, x, positions=left_aligned(x))


def test_append_kv_stores_rows_where_the_page_table_says(backend):
    x = blank(make_inputs(SMALL, device=backend.device))
    append(backend, x, positions=left_aligned(x))
    written = torch.zeros(x.k_cache.shape[0], x.page_size, dtype=torch.bool)
    for b, length in enumerate(SMALL.seq_lens):
        for position in range(length):
            page, slot = locate(x, b, position)
            assert torch.equal(x.k_cache[page, :, slot], x.keys[b, position])
            assert torch.equal(x.v_cache[page, :, slot], x.values[b, position])
            written[page, slot] = True
    assert x.k_cache.cpu()[~written[:, None].expand(-1, 3, -1)].isnan().all(), "nothing else is written"


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "not-centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_append_kv_quantises_by_the_documented_formula_and_layout(backend, dtype, centred):
    x = blank(make_inputs(replace(SMALL, dtype=dtype), device=backend.device))
    center = x.k_center
    if not centred:
        x, center = replace(x, k_center=None), torch.zeros_like(center)
    append(backend, x, positions=left_aligned(x))
    for b, position in ((0, 0), (0, 15), (0, 69), (2, 16), (2, 32)):
        page, slot = locate(x, b, position)
        for head in range(3):
            k = x.keys[b, position, head].float() - center[head]
            scale, zero = ((k.max() - k.min()) / 15).bfloat16(), k.min().bfloat16()
            assert torch.equal(x.k_scale[page, head, slot], torch.stack([scale, zero]))
            codes = ((k - zero.float()) / scale.float()).round().clamp(0, 15).int()[x.channel_order[head].long()].tolist()
            assert [code_at(x, page, head, slot, j) for j in range(64)] == codes


def test_append_kv_shadow_is_off_by_half_a_step_at_most(backend):
    x = blank(make_inputs(Shape((500,), 2, 2, 128, 32, 1, torch.float32), device=backend.device))
    append(backend, x, positions=left_aligned(x))
    keys, shadow = x.k_cache - x.k_center[:, None], shadow_keys(x, torch.float32)
    scale, zero = x.k_scale.float()[..., :1], x.k_scale.float()[..., 1:]
    low, high = keys.amin(-1, keepdim=True), keys.amax(-1, keepdim=True)
    # Rounding zero and scale to bf16 may leave the ends of the range outside the codes.
    outside = (zero - low).clamp(min=0) + (high - zero - 15 * scale).clamp(min=0)
    live = ~keys.isnan()
    assert ((keys - shadow).abs() <= scale * 0.5001 + outside + 1e-6)[live].all()


@pytest.mark.parametrize("steps", [(1,) * 40, (7, 16, 17), (39, 1), (3, 30, 5, 1, 1)], ids=str)
def test_append_kv_in_chunks_leaves_what_one_call_leaves(backend, steps):
    x = blank(make_inputs(Shape((40, 40), 4, 2, 64, 16, 1, torch.bfloat16), device=backend.device))
    whole = x.clone()
    reference.append_kv(**whole.arguments("append_kv", k=x.keys, v=x.values))
    start = 0
    for count in steps:
        x.seq_lens.fill_(start + count)
        append(backend, x, x.keys[:, start : start + count], x.values[:, start : start + count])
        start += count
    assert_same_state(x, whole)


def test_append_kv_skips_the_left_padding_of_a_ragged_batch(backend):
    x = blank(make_inputs(SMALL, device=backend.device))
    longest, lengths = max(SMALL.seq_lens), SMALL.seq_lens
    padded = [torch.full_like(rows, math.nan) for rows in (x.keys, x.values)]
    for b, length in enumerate(lengths):
        padded[0][b, longest - length :] = x.keys[b, :length]
        padded[1][b, longest - length :] = x.values[b, :length]
    expected = x.clone()
    reference.append_kv(**expected.arguments("append_kv", k=x.keys, v=x.values, positions=left_aligned(x)))
    append(backend, x, *padded)
    assert_same_state(x, expected)


def test_append_kv_skips_rows_with_negative_or_too_large_positions_and_foreign_pages(backend):
    x = blank(make_inputs(SMALL, device=backend.device))
    x.page_table[0, 1], x.page_table[0, 2] = -1, x.k_cache.shape[0]
    before = x.clone()
    positions = torch.tensor([[-1, 16, 40], [-(2**31), x.max_tokens, 2**31 - 1], [-1, -1, -1]], dtype=torch.int32, device=backend.device)
    append(backend, x, x.keys[:, :3], x.values[:, :3], positions=positions)
    assert_same_state(x, before)
    positions[2, 1] = 5
    append(backend, x, x.keys[:, :3], x.values[:, :3], positions=positions)
    page, slot = locate(x, 2, 5)
    assert torch.equal(x.k_cache[page, :, slot], x.keys[2, 1])
    assert (~x.k_cache.isnan()).sum() == 3 * 64, "one row a head and nothing else"


def test_append_kv_takes_positions_in_any_order(backend):
    x = blank(make_inputs(Shape((50,), 2, 1, 64, 16, 1, torch.float32), device=backend.device))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).int().to(backend.device)
    whole = x.clone()
    append(backend, whole)
    append(backend, x, x.keys[:, order.long()], x.values[:, order.long()], positions=order[None])
    assert_same_state(x, whole)


def live_bounds(x, b: int, logical: int):
    """(min, max) over a page's live tokens, from the rows themselves."""
    rows = x.k_cache[int(x.page_table[b, logical]), :, : int(x.seq_lens[b]) - logical * x.page_size]
    return torch.stack([rows.amin(1), rows.amax(1)], dim=1)


def test_append_kv_leaves_no_stale_bound_after_a_rollback(backend):
    x = blank(make_inputs(Shape((40,), 2, 2, 64, 16, 1, torch.float32), device=backend.device))
    wild = x.keys.clone()
    wild[:, 20:] *= 1000
    append(backend, x, wild, x.values)
    x.seq_lens.fill_(22)  # crop to 20, then two new tokens
    append(backend, x, x.keys[:, :2], x.values[:, :2])
    page = int(x.page_table[0, 1])
    assert torch.equal(x.page_bounds[page], live_bounds(x, 0, 1)) and x.page_bounds[page].abs().max() < 100


def test_append_kv_leaves_no_stale_bound_when_another_sequence_takes_over_a_page(backend):
    x = blank(make_inputs(Shape((32, 0), 2, 2, 64, 16, 1, torch.float32), device=backend.device, extra_pages=2))
    append(backend, x, x.keys * 1000, x.values, positions=left_aligned(x))
    x.page_table[1, 0], x.page_table[0, :] = x.page_table[0, 1].item(), -1
    x.seq_lens.copy_(torch.tensor([0, 3]))
    append(backend, x, x.keys[:1, :3].expand(2, -1, -1, -1), x.values[:, :3])
    page = int(x.page_table[1, 0])
    assert torch.equal(x.page_bounds[page], live_bounds(x, 1, 0)) and x.page_bounds[page].abs().max() < 100


def test_append_kv_never_touches_the_shadow_of_old_tokens(backend):
    x = make_inputs(Shape((20, 37), 4, 3, 64, 16, 1, torch.bfloat16), device=backend.device)
    before = x.clone()
    x.seq_lens.add_(1)
    append(backend, x, x.keys[:, :1] * 3, x.values[:, :1])
    for b, length in ((0, 20), (1, 37)):
        for position in range(length):
            page, slot = locate(x, b, position)
            assert torch.equal(x.k_scale[page, :, slot], before.k_scale[page, :, slot])
        page, slot = locate(x, b, length)
        for head in range(3):
            for old in range(slot):
                for j in range(64):
                    assert code_at(x, page, head, old, j) == code_at(before, page, head, old, j)


def test_append_kv_eight_bit_bounds_are_off_by_half_a_step_at_most(backend):
    shape = Shape((100,), 2, 2, 64, 32, 1, torch.float32)
    x = blank(make_inputs(shape, device=backend.device, bounds_dtype="uint8"))
    append(backend, x, positions=left_aligned(x))
    for logical in range(4):
        page = int(x.page_table[0, logical])
        truth = live_bounds(x, 0, logical)
        scale, zero = x.bounds_scale[page].float().unbind(-1)
        stored = x.page_bounds[page].float() * scale[:, None, None] + zero[:, None, None]
        low, high = truth.amin((1, 2)), truth.amax((1, 2))
        outside = (zero - low).clamp(min=0) + (high - zero - 255 * scale).clamp(min=0)
        assert ((stored - truth).abs() <= (scale * 0.5001 + outside + 1e-6)[:, None, None]).all()


GROUPS = {"shadow": Shadow._fields, "bounds": ("page_bounds",), "means": PageMeans._fields}


@pytest.mark.parametrize("without", ["shadow", "bounds", "means", "shadow bounds", "bounds means", "shadow means", "shadow bounds means"])
def test_append_kv_serves_layers_that_lack_a_group(backend, without):
    x = blank(make_inputs(SMALL, device=backend.device))
    absent = dict.fromkeys(name for group in without.split() for name in GROUPS[group])
    append(backend, x, positions=left_aligned(x), **absent)
    untouched = blank(x)
    for name in absent:
        if name not in ("channel_order", "prefix_channels"):
            torch.testing.assert_close(getattr(x, name), getattr(untouched, name), rtol=0, atol=0, equal_nan=True)


def true_means(x) -> dict[int, torch.Tensor]:
    """fp64 means [Hkv, D] of the live rows of each page less the centre, by its number."""
    means = {}
    for b, length in enumerate(x.seq_lens.tolist()):
        for logical in range(-(-length // x.page_size)):
            rows = x.k_cache[int(x.page_table[b, logical]), :, : length - logical * x.page_size]
            means[int(x.page_table[b, logical])] = rows.double().mean(1) - x.k_center.double()
    return means


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_append_kv_means_are_off_by_half_a_step_at_most(backend, shape):
    x = blank(make_inputs(shape, device=backend.device))
    append(backend, x, positions=left_aligned(x))
    stored = mean_keys(x)
    for page, mean in true_means(x).items():
        scale, zero = x.means_scale[page].double()[..., None].unbind(1)
        low, high = mean.amin(-1, keepdim=True), mean.amax(-1, keepdim=True)
        outside = (zero - low).clamp(min=0) + (high - zero - 15 * scale).clamp(min=0)
        assert ((stored[page] - mean).abs() <= scale * 0.5001 + outside + 1e-6).all()


def test_append_kv_codes_the_mean_of_a_page_as_a_row_of_the_shadow(backend):
    """In channel order, low nibble first, with the scale of its own range; of a page with one token it is that token's row."""
    x = blank(make_inputs(Shape((33,), 6, 3, 64, 16, 1, torch.float32), device=backend.device))
    append(backend, x, positions=left_aligned(x))
    page, slot = locate(x, 0, 32)
    assert torch.equal(x.means_scale[page], x.k_scale[page, :, slot])
    for head in range(3):
        codes = [code_at(x, page, head, slot, j) for j in range(64)]
        assert x.page_means[page, head].tolist() == [low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)]


def test_append_kv_leaves_no_stale_mean_after_a_rollback_and_codes_a_page_of_zeros(backend):
    x = blank(make_inputs(Shape((40,), 2, 2, 64, 16, 1, torch.float32), device=backend.device))
    x.k_center.zero_()
    append(backend, x, x.keys * 1000, x.values)
    x.seq_lens.fill_(20)  # crop to 16, then four zeros
    append(backend, x, torch.zeros_like(x.keys[:, :4]), x.values[:, :4])
    page = int(x.page_table[0, 1])
    assert (mean_keys(x)[page] == 0).all() and (x.page_means[page] == 0).all()


def test_append_kv_quantises_a_constant_row_to_code_zero(backend):
    x = blank(make_inputs(SMALL, device=backend.device))
    x.k_center.zero_()
    x.keys.fill_(-1.5)
    append(backend, x, positions=left_aligned(x))
    page, slot = locate(x, 0, 3)
    assert x.k_scale[page, :, slot].tolist() == [[0.0, -1.5]] * 3
    assert [code_at(x, page, 0, slot, j) for j in range(64)] == [0] * 64


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_append_kv_keeps_a_broken_row_to_itself(backend, value):
    x = make_inputs(SMALL, device=backend.device)
    before = x.clone()
    rows = x.keys[:, 20:21].clone()
    rows[0, 0, 1, 7] = value
    positions = torch.tensor([[20], [-1], [-1]], dtype=torch.int32, device=backend.device)
    append(backend, x, rows, x.values[:, 20:21], positions=positions)
    page, slot = locate(x, 0, 20)
    assert not x.k_scale[page, 1, slot].isfinite().all()
    x.k_scale[page, :, slot] = before.k_scale[page, :, slot]
    torch.testing.assert_close(x.k_scale, before.k_scale, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("magnitude", [6e4, 1e-6], ids=str)
def test_append_kv_quantises_the_whole_range_of_fp16(backend, magnitude):
    x = blank(make_inputs(replace(SMALL, dtype=torch.float16), device=backend.device))
    x.k_center.zero_()
    x.keys.copy_((x.keys.float() / x.keys.float().abs().max() * magnitude).half())
    append(backend, x, positions=left_aligned(x))
    page, slot = locate(x, 0, 3)
    error = (shadow_keys(x, torch.float32)[page, :, slot] - (x.keys[0, 3].float() - x.k_center)).abs().max()
    assert x.k_scale[page, :, slot].isfinite().all() and error < 0.1 * magnitude


def test_append_kv_writes_a_prompt_of_4096_tokens_the_same_for_any_number_of_threads(backend, threads):
    x = blank(make_inputs(Shape((4096, 1000), 2, 2, 128, 16, 1, torch.bfloat16), device=backend.device, bounds_dtype="uint8"))
    states = []
    for count in (1, 2):
        threads(count)
        state = x.clone()
        append(backend, state, positions=left_aligned(state))
        states.append(state)
    assert_same_state(*states)
