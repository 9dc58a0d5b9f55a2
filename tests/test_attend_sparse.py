"""twilight::attend_sparse: exact softmax attention on a list."""

import math

import pytest
import torch
from comparisons import assert_attention_close, assert_close_to_oracle, dot_rounding, listed_set, plain_attention
from inputs import SHAPES, Shape, break_key, make_inputs, random_candidates

pytestmark = pytest.mark.usefixtures("poisoned_empties")
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)


def check(backend, x, member=None, **listed):
    got = backend.attend_sparse(**x.arguments("attend_sparse", **listed))
    want = x.oracle("attend_sparse", **listed)
    plain = plain_attention(x, member)
    assert got[0].dtype == x.q.dtype and got[0].is_contiguous() and got[1].dtype == torch.float32
    assert_attention_close(x, got, want, plain)
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attend_sparse_on_every_token_matches_the_oracle(backend, shape):
    check(backend, make_inputs(shape, device=backend.device))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by_page", [False, True], ids=["tokens", "pages"])
def test_attend_sparse_on_a_list_matches_the_oracle(backend, shape, by_page):
    x = make_inputs(shape, device=backend.device)
    unit = x.page_size if by_page else 1
    indices, counts = random_candidates(x, unit)
    member = listed_set(indices, counts, x.max_tokens // unit).repeat_interleave(unit, -1)
    check(backend, x, member, indices=indices, counts=counts, tokens_per_index=unit)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_attend_sparse_is_pytorch_sdpa_when_nothing_is_left_out(backend, shape):
    x = make_inputs(shape, device=backend.device)
    out, _ = backend.attend_sparse(**x.arguments("attend_sparse"))
    for b, length in enumerate(shape.seq_lens):
        if length < shape.query_tokens:
            continue
        q, k, v = (t.transpose(0, 1)[None] for t in (x.q[b], x.keys[b, :length], x.values[b, :length]))
        mask = torch.ones(shape.query_tokens, length, dtype=torch.bool, device=q.device).tril(length - shape.query_tokens)
        plain, oracle = (
            torch.nn.functional.scaled_dot_product_attention(q.to(d), k.to(d), v.to(d), mask, scale=x.sm_scale, enable_gqa=True)[0]
            for d in (q.dtype, torch.float64)
        )
        assert_close_to_oracle(out[b].transpose(0, 1), oracle, plain, "out", slack=dot_rounding(x))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[9]], ids=str)
def test_attend_sparse_partial_results_merge_by_lse_into_the_whole(backend, shape):
    x = make_inputs(shape, device=backend.device)
    whole = x.oracle("attend_sparse")
    position = torch.arange(x.max_tokens, device=x.q.device).expand(len(x.seq_lens), x.num_kv_heads, -1)
    parts = []
    for parity in (0, 1):
        indices = position[..., parity::2].int().contiguous()
        counts = torch.full(indices.shape[:2], indices.shape[-1], dtype=torch.int32, device=x.q.device)
        parts.append(backend.attend_sparse(**x.arguments("attend_sparse", indices=indices, counts=counts)))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    shares = [(part[1] - lse.masked_fill(lse == -math.inf, 0.0)).exp()[..., None] for part in parts]
    merged = sum(share * part[0].float() for share, part in zip(shares, parts, strict=True))
    assert_attention_close(x, (merged.to(x.q.dtype), lse), whole, plain_attention(x))


def test_attend_sparse_gives_zeros_and_minus_infinity_where_nothing_is_visible(backend):
    x = make_inputs(Shape((0, 2, 40), 4, 2, 64, 16, 4, torch.float32), device=backend.device)
    out, lse = check(backend, x)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert (out[1, :2] == 0).all() and (lse[1, :2] == -math.inf).all() and lse[1, 2:].isfinite().all()
    empty = torch.zeros(3, 2, dtype=torch.int32, device=backend.device)
    pads = torch.full((3, 2, 5), -1, dtype=torch.int32, device=backend.device)
    out, lse = backend.attend_sparse(**x.arguments("attend_sparse", indices=pads, counts=empty))
    assert (out == 0).all() and (lse == -math.inf).all()
    x.seq_lens.fill_(-5)
    out, lse = backend.attend_sparse(**x.arguments("attend_sparse"))
    assert (out == 0).all() and (lse == -math.inf).all()


def test_attend_sparse_ignores_listed_tokens_beyond_the_sequence(backend):
    x = make_inputs(SMALL, device=backend.device)
    listed = torch.tensor([3, 299, 300, 301, 10**6, 2**31 - 1], dtype=torch.int32, device=backend.device).expand(2, 3, -1).contiguous()
    counts = torch.full((2, 3), 6, dtype=torch.int32, device=backend.device)
    got = backend.attend_sparse(**x.arguments("attend_sparse", indices=listed, counts=counts))
    inside = backend.attend_sparse(**x.arguments("attend_sparse", indices=listed[..., :2].contiguous(), counts=counts.clamp(max=2)))
    torch.testing.assert_close(got, inside)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_attend_sparse_gives_what_dense_attention_gives_for_a_broken_key(backend, value):
    x = make_inputs(SMALL, device=backend.device)
    break_key(x, 0, 77, value)
    out, _ = backend.attend_sparse(**x.arguments("attend_sparse"))
    want, _ = x.oracle("attend_sparse")
    assert torch.equal(out.isnan(), want.isnan()) and out[1].isfinite().all()
    assert out[0].isnan().all() if math.isnan(value) else out[0].isnan().any()
    chosen = torch.tensor([3, 80], dtype=torch.int32, device=backend.device).expand(2, 3, -1).contiguous()
    counts = torch.full((2, 3), 2, dtype=torch.int32, device=backend.device)
    out, _ = backend.attend_sparse(**x.arguments("attend_sparse", indices=chosen, counts=counts))
    assert out.isfinite().all(), "a broken key outside the list must not matter"


def check_newer_broken_values(backend, dtype, listed):
    """A draft token's NaN or infinity reaches the query tokens that see it, and no others."""
    lengths = (70, 41)
    x = make_inputs(Shape(lengths, 4, 2, 64, 16, 3, dtype), device=backend.device)
    lists = {}
    if listed:
        newest = ((x.seq_lens - 1) // x.page_size)[:, None].expand(-1, 2)
        indices = torch.stack([torch.zeros_like(newest), newest], dim=-1).contiguous()
        lists = {"indices": indices, "counts": torch.full_like(newest, 2).contiguous(), "tokens_per_index": x.page_size}
    clean, _ = backend.attend_sparse(**x.arguments("attend_sparse", **lists))
    for row, value in ((0, math.nan), (1, math.inf)):
        position = lengths[row] - 2
        x.v_cache[x.page_table[row, position // x.page_size], 1, position % x.page_size, 5] = value
    out, lse = backend.attend_sparse(**x.arguments("attend_sparse", **lists))
    assert lse.isfinite().all()
    assert torch.equal(out[:, 0], clean[:, 0]), "the first query token sees neither"
    assert torch.equal(out[:, :, :2], clean[:, :, :2]), "the first KV head holds neither"
    assert not out[:, 1:, 2:, 5].isfinite().any()
    others = [d for d in range(64) if d != 5]
    assert torch.equal(out[..., others], clean[..., others])


@pytest.mark.parametrize("listed", [False, True], ids=["every token", "list"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attend_sparse_lets_no_query_token_see_a_newer_broken_value(backend, dtype, listed):
    check_newer_broken_values(backend, dtype, listed)


def test_attend_sparse_gives_zeros_for_an_empty_candidate_list(backend):
    x = make_inputs(Shape((40, 0), 4, 2, 64, 16, 2, torch.float16), device=backend.device)
    indices = torch.empty(2, 2, 0, dtype=torch.int32, device=backend.device)
    counts = torch.zeros(2, 2, dtype=torch.int32, device=backend.device)
    for unit in (1, x.page_size):
        out, lse = backend.attend_sparse(**x.arguments("attend_sparse", indices=indices, counts=counts, tokens_per_index=unit))
        assert (out == 0).all() and (lse == -math.inf).all()


def test_attend_sparse_gives_nan_only_in_the_rows_whose_query_is_nan(backend):
    x = make_inputs(SMALL, device=backend.device)
    x.q[0, 0, 2, 7] = math.nan
    out, _ = backend.attend_sparse(**x.arguments("attend_sparse"))
    assert out[0, 0, 2].isnan().all() and out.isnan().sum() == 64


def test_attend_sparse_survives_logits_far_beyond_the_range_of_exp(backend):
    check(backend, make_inputs(SMALL, device=backend.device, spread=2000.0))


def test_attend_sparse_on_131072_tokens_matches_the_oracle(backend):
    x = make_inputs(Shape((131072,), 2, 1, 64, 64, 1, torch.bfloat16), device=backend.device)
    check(backend, x)


def test_attend_sparse_is_bitwise_the_same_for_any_number_of_threads(backend, threads):
    if backend.name == "reference":
        pytest.skip("PyTorch's own matrix product may split its sums by thread")
    x = make_inputs(Shape((3000, 100), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device)
    threads(1)
    alone = backend.attend_sparse(**x.arguments("attend_sparse"))
    threads(2)
    for _ in range(2):
        again = backend.attend_sparse(**x.arguments("attend_sparse"))
        assert torch.equal(again[0], alone[0]) and torch.equal(again[1], alone[1])
