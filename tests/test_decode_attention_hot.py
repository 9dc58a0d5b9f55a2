"""decode_attention_hot: what decode_attention gives, read from copies of rows that were kept lately."""

import sys

import pytest
import torch
from flat import reference
from inputs import Shape, make_inputs, on_device

from twilight_ops import KV, PagedKVCache, Quest, TwilightConfig
from twilight_ops.arguments import HotRows
from twilight_ops.decode_step import append, attend

RAGGED = Shape((0, 5, 45, 90), 4, 2, 64, 16, 1, torch.float16)
SPECULATIVE = Shape((33, 70), 3, 1, 96, 32, 3, torch.float32)
ALWAYS = {"sink_tokens": 2, "recent_tokens": 4, "dense_below": 8}
CASES = (
    (RAGGED, 13, {"selector": "full", "top_p": 0.5, **ALWAYS}),
    (SPECULATIVE, 40, {"selector": "shadow_prefix", "token_budget": 20, "top_p": 0.9, **ALWAYS}),
    (RAGGED, 7, {"selector": "quest", "token_budget": 32, "top_p": 1.0, **ALWAYS}),  # lists of pages
    (RAGGED, 13, {"selector": "full", "top_p": 0.3, "softcap": 1.0, **ALWAYS}),
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Registered:
    device = "cuda"

    def __getattr__(self, op):
        return getattr(torch.ops.twilight, op).default


def new_rows(x, places):
    size = (len(x.seq_lens) + 1, x.num_kv_heads, places)  # a cache may have more sequences than a call
    copies = (torch.full((*size, x.q.shape[3]), torch.nan, dtype=x.q.dtype, device=x.q.device) for _ in range(2))
    return HotRows(*copies, *(torch.full(size, -1, dtype=torch.int32, device=x.q.device) for _ in range(2)))


def queries(x, steps):
    """Neighbours alike, and one that is not."""
    rng = torch.Generator().manual_seed(3)
    other = torch.randn(x.q.shape, generator=rng).to(x.q)
    for step in range(steps):
        noise = torch.randn(x.q.shape, generator=rng).to(x.q)
        yield (other if step == steps // 2 else x.q) + 0.2 * noise


def check_steps(backend, shape, places, options, steps=8):
    """Results, kept sets and copies over some steps, against the reference's and those without copies."""
    x = make_inputs(shape)
    moved = on_device(x, backend.device)
    mine, theirs = new_rows(moved, places), new_rows(x, places)
    for q in queries(x, steps):
        kept = [torch.zeros(len(x.seq_lens), x.num_kv_heads, *size, dtype=torch.int32) for size in ((x.max_tokens,), ())]
        found = [tensor.to(moved.q.device) for tensor in kept]
        observed = dict(zip(("kept_indices", "kept_counts"), kept, strict=True))
        out, lse = backend.decode_attention_hot(
            **moved.arguments(
                "decode_attention_hot",
                **options,
                **mine._asdict(),
                **dict(zip(observed, found, strict=True)),
                q=q.to(moved.q.device),
            )
        )
        want = reference.decode_attention_hot(**x.arguments("decode_attention_hot", **options, **theirs._asdict(), **observed, q=q))
        plain = reference.decode_attention(**x.arguments("decode_attention", **options, q=q))
        assert all(torch.equal(a, b) for a, b in zip(want, plain, strict=True))
        torch.testing.assert_close(out.cpu(), want[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse.cpu(), want[1], atol=1e-3, rtol=1e-3)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, kept, strict=True))
        for name, a, b in zip(HotRows._fields, mine, theirs, strict=True):
            assert torch.equal(a.cpu().nan_to_num(7.0), b.nan_to_num(7.0)), name
    held = theirs.hot_tokens >= 0
    assert held.any() and not held[-1].any() and (theirs.hot_claims == -1).all()
    for b, h, place in held.nonzero().tolist():
        token = int(theirs.hot_tokens[b, h, place])
        assert token % places == place and torch.equal(theirs.hot_keys[b, h, place], x.keys[b, token, h])
        assert torch.equal(theirs.hot_values[b, h, place], x.values[b, token, h])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2]["selector"])
def test_copies_change_no_result(case):
    class Itself:
        device = "cpu"
        decode_attention_hot = staticmethod(torch.ops.twilight.decode_attention_hot.default)

    check_steps(Itself, *case)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[2]["selector"])
def test_triton_leaves_the_copies_of_the_reference(case):
    check_steps(Registered(), *case)


def call(x, hot, listed):
    indices = torch.full((1, 1, 8), -1, dtype=torch.int32)
    indices[0, 0, : len(listed)] = torch.tensor(listed)
    counts = torch.tensor([[len(listed)]], dtype=torch.int32)
    options = {"selector": "given", "top_p": 1.0, "indices": indices, "counts": counts, **hot._asdict()}
    return torch.ops.twilight.decode_attention_hot(**x.arguments("decode_attention_hot", **options))[0]


@pytest.fixture
def one():
    x = make_inputs(Shape((60,), 1, 1, 64, 16, 1, torch.float32))
    return x, new_rows(x, 10)


def test_a_place_that_is_read_is_kept_and_the_newest_token_gets_any_other(one):
    x, hot = one
    places = hot.hot_tokens[0, 0]
    call(x, hot, [3, 13, 24])
    assert places[3] == 13 and places[4] == 24
    call(x, hot, [3, 13, 53])
    assert places[3] == 13  # it is read
    call(x, hot, [3, 34])
    assert places[3] == 3 and places[4] == 34
    call(x, hot, [35])
    assert places[3] == 3 and places[4] == 34  # nobody wants them


def test_what_is_held_is_read_from_its_copy(one):
    x, hot = one
    before = call(x, hot, [3, 59])
    hot.hot_values[0, 0, 3] += 1.0
    assert not torch.equal(call(x, hot, [3, 59]), before)
    hot.hot_tokens.fill_(-1)
    assert torch.equal(call(x, hot, [3, 59]), before)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hot_keys", lambda t: t[:, :, :0], "hot_keys: R: expected >= 1, got 0"),
        ("hot_keys", lambda t: t[:0], "hot_keys: expected rows of at least 1 sequences, got 0"),
        ("hot_values", lambda t: t.half(), "hot_values: expected dtype float32, got float16"),
        ("hot_tokens", lambda t: t.long(), "hot_tokens: expected dtype int32, got int64"),
        ("hot_claims", lambda t: t[:, :, :3], r"hot_claims: expected shape \[N, Hkv, R\] with R = 10, got \[2, 1, 3\]"),
    ],
)
def test_malformed_copies_are_refused(one, name, change, message):
    x, hot = one
    changed = {field: change(value) if field == name else value for field, value in hot._asdict().items()}
    if name == "hot_keys":
        changed = {field: change(value) for field, value in hot._asdict().items()}
    with pytest.raises(RuntimeError, match=f"twilight::decode_attention_hot: {message}"):
        torch.ops.twilight.decode_attention_hot(**x.arguments("decode_attention_hot", **changed))


def test_opcheck(one):
    x, hot = one
    torch.library.opcheck(torch.ops.twilight.decode_attention_hot.default, (), x.arguments("decode_attention_hot", **hot._asdict()))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])])
def test_rows_that_are_written_again_are_read_again(device):
    """Steps, a step back, other tokens in their place: as a cache without copies."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    caches = []
    for settings in ({}, {"offload": True, "hot_tokens": 32}):
        config = TwilightConfig(Quest(token_budget=32), top_p=0.9, dense_below=0, recent_tokens=8, **settings)
        caches.append(PagedKVCache(config, 1, 4, 2, 64, 2, 128, dtype, device))
    rng = torch.Generator().manual_seed(0)

    def rows(tokens, heads):
        return torch.randn(2, tokens, heads, 64, generator=rng).to(device, dtype)

    for tokens, back in ((60, 0), (1, 0), (1, 0), (1, 0), (1, 3), (1, 0), (2, 2), (30, 20), (1, 0), (1, 0)):
        k, v, q = rows(tokens, 2), rows(tokens, 2), rows(min(tokens, 2), 4)
        found = []
        for cache in caches:
            cache.seq_lens.add_(tokens - back)
            layer, paging = cache.layers[0], (cache.page_table, cache.seq_lens)
            append(k, v, layer, *paging)
            kept = torch.zeros(2, 2, 128, dtype=torch.int32, device=device), torch.zeros(2, 2, dtype=torch.int32, device=device)
            found.append((*attend(q, layer, *paging, 0.125, *kept), *kept))
        (out, lse, *kept), (hot_out, hot_lse, *hot_kept) = found
        assert all(map(torch.equal, kept, hot_kept))
        torch.testing.assert_close(hot_out, out, atol=2e-2 if device == "cuda" else 1e-5, rtol=1e-2 if device == "cuda" else 1e-5)
        torch.testing.assert_close(hot_lse, lse, atol=1e-3, rtol=1e-3)
    assert (caches[1].layers[0].hot.hot_tokens >= 0).any()
    caches[1].reset()
    assert (caches[1].layers[0].hot.hot_tokens == -1).all()
    assert isinstance(caches[1].layers[0].kv, KV)


def test_copies_without_offload_are_refused():
    with pytest.raises(ValueError, match="TwilightConfig: hot_tokens: expected 0 without offload, got 8"):
        TwilightConfig(dense_below=0, hot_tokens=8)


def test_there_are_no_more_copies_than_tokens():
    config = TwilightConfig(Quest(32), dense_below=0, offload=True, hot_tokens=sys.maxsize)
    cache = PagedKVCache(config, 1, 4, 2, 64, 1, 120, torch.float32, "cpu")
    assert cache.layers[0].hot.hot_keys.shape == (1, 2, 128, 64)
