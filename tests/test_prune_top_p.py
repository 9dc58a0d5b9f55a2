"""twilight::prune_top_p: the fewest bins of weights whose mass reaches p, bit for bit the same everywhere."""

import math
import struct

import pytest
import torch
from comparisons import listed_set
from flat import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import SHAPES, Shape, make_inputs, random_candidates

from twilight_ops.capacity import WEIGHT_UNIT

pytestmark = pytest.mark.usefixtures("poisoned_empties")
PROPERTY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def prune(
    backend, weights, top_p, *, num_kv_heads=None, seq_lens=None, indices=None, counts=None, unit=1, per_head=None, sinks=0, recent=0
):
    """Runs the operator on `backend` and asserts that the reference gives the same bits; returns (set [B, Hkv, N], mass).

    Unless `seq_lens` says otherwise the newest tokens lie behind the slots, so that only weights decide.
    """
    weights = weights.to(backend.device)
    batch, query_tokens, heads, slots = weights.shape
    if seq_lens is None:
        seq_lens = torch.full((batch,), slots + query_tokens, dtype=torch.int32, device=backend.device)
    num_kv_heads = heads if num_kv_heads is None else num_kv_heads
    arguments = (weights, seq_lens, indices, counts, unit, num_kv_heads, top_p, per_head, sinks, recent)
    got, want = backend.prune_top_p(*arguments), reference.prune_top_p(*arguments)
    for name, g, w in zip(("indices", "counts", "mass"), got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w), f"{name} differ from the reference"
    size = slots if indices is None else int(seq_lens.max().clamp(min=1))
    return listed_set(got[0], got[1], size), got[2]


def row(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def softmax_rows(*size: int, seed: int = 0, spread: float = 3.7) -> torch.Tensor:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread).softmax(-1)


def bin_of(weight: float) -> int:
    """Leading bits of the fp32 pattern: 32 bins an octave."""
    return struct.unpack("<I", struct.pack("<f", weight))[0] >> 18


def assert_whole_bins(weights: list[float], kept: list[bool], top_p: float) -> None:
    """Exactly, in integers: whole bins from the highest down, whose mass reaches p, and does not without the lowest of them."""
    mass = [math.floor(w * WEIGHT_UNIT) for w in weights]
    need = max(1, math.ceil(top_p * sum(mass)))
    inside = [i for i, k in enumerate(kept) if k]
    assert sum(mass[i] for i in inside) >= need
    cut = min(bin_of(weights[i]) for i in inside)
    assert sum(mass[i] for i in inside if bin_of(weights[i]) > cut) < need
    assert all(k == (bin_of(w) >= cut) for w, k in zip(weights, kept, strict=True))


# Weights as fp32 sees them: anything from a denormal to 1, with many equal ones.
weight = st.one_of(
    st.floats(0.0, 1.0, width=32, allow_nan=False),
    st.sampled_from([0.0, 2.0**-149, 2.0**-32, 2.0**-31, 1e-5, 0.25, 0.5, 1.0]),
)
probability = st.one_of(st.floats(1e-3, 1.0, exclude_max=True), st.sampled_from([1e-3, 0.5, 0.85, 0.95, 1.0 - 2.0**-53]))


@PROPERTY
@given(weights=st.lists(weight, min_size=1, max_size=80), top_p=probability)
def test_prune_top_p_keeps_the_fewest_bins_that_reach_p(backend, weights, top_p):
    kept, mass = prune(backend, row(weights), top_p)
    if sum(math.floor(w * WEIGHT_UNIT) for w in weights) == 0:
        assert kept.all() and mass.item() == 1.0
        return
    assert_whole_bins(row(weights).flatten().tolist(), kept.flatten().tolist(), top_p)
    assert mass.item() >= top_p * (1 - 1e-6)


@PROPERTY
@given(
    size=st.integers(1, 400),
    peak=st.integers(0, 399),
    spread=st.floats(0.0, 30.0),
    top_p=probability,
    seed=st.integers(0, 2**16),
)
def test_prune_top_p_is_exact_wherever_the_maximum_sits(backend, size, peak, spread, top_p, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread
    logits[peak % size] = logits.max() + 1.0
    weights = logits.softmax(0)
    kept, _ = prune(backend, row(weights), top_p)
    assert kept[0, 0, peak % size]
    assert_whole_bins(weights.tolist(), kept.flatten().tolist(), top_p)


@PROPERTY
@given(top_p=probability, distinct=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_prune_top_p_keeps_equal_weights_together(backend, top_p, distinct, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(distinct, generator=rng)
    weights = values[torch.randint(0, distinct, (200,), generator=rng)]
    weights = weights / weights.sum()
    kept, _ = prune(backend, row(weights), top_p)
    assert_whole_bins(weights.tolist(), kept.flatten().tolist(), top_p)


@PROPERTY
@given(data=st.data(), top_p=probability, group=st.sampled_from([1, 2, 3, 8]), tokens=st.integers(1, 3))
def test_prune_top_p_returns_the_union_of_the_groups_sets(backend, data, top_p, group, tokens):
    seed = data.draw(st.integers(0, 2**16))
    weights = softmax_rows(1, tokens, 2 * group, 120, seed=seed, spread=2.0)
    union, mass = prune(backend, weights, top_p, num_kv_heads=2)
    single = torch.zeros_like(union)
    for t in range(tokens):
        for head in range(2 * group):
            kept, own = prune(backend, weights[:, t, head].view(1, 1, 1, -1), top_p)
            single[:, head // group] |= kept[:, 0]
            assert own.item() == mass[0, t, head].item(), "the mass is that of the row's own set"
    assert torch.equal(union, single)


def test_prune_top_p_keeps_one_token_when_the_first_exceeds_p(backend):
    kept, mass = prune(backend, row([0.9, 0.05, 0.05]), 0.85)
    assert kept.flatten().tolist() == [True, False, False] and mass.item() == pytest.approx(0.9)


@pytest.mark.parametrize("top_p", [1e-3, 0.5, 0.85, 0.95, 1.0 - 1e-9, 1.0])
def test_prune_top_p_keeps_every_token_of_an_all_equal_row_of_131072(backend, top_p):
    kept, mass = prune(backend, torch.full((1, 1, 1, 131072), 1.0 / 131072), top_p)
    assert kept.all() and mass.item() == 1.0


def test_prune_top_p_keeps_one_token_of_one_hot_rows_of_131072(backend):
    positions = [0, 1, 65535, 131070, 131071]
    weights = torch.zeros(1, 1, 5, 131072)
    weights[0, 0, range(5), positions] = 1.0
    for top_p in (1e-3, 1.0 - 1e-9):
        kept, mass = prune(backend, weights, top_p)
        assert kept[0].nonzero().tolist() == [[head, position] for head, position in enumerate(positions)] and (mass == 1.0).all()
    kept, _ = prune(backend, weights, 1.0)
    assert kept.all()


def test_prune_top_p_is_exact_on_a_realistic_row_of_131072(backend):
    weights = softmax_rows(1, 1, 4, 131072)
    kept, mass = prune(backend, weights, 0.85)
    for head in range(4):
        assert_whole_bins(weights[0, 0, head].tolist(), kept[0, head].tolist(), 0.85)
    assert (mass >= 0.85).all() and (mass < 0.855).all()
    assert 200 < kept.sum(-1).float().mean() < 2000, "a spread of 3.7 leaves a fraction of a percent"


@pytest.mark.parametrize("top_p", [0.5, 0.85, 0.95, 0.99])
@pytest.mark.parametrize("spread", [1.0, 2.0, 3.7])
def test_prune_top_p_keeps_hardly_more_than_the_exact_nucleus(backend, spread, top_p):
    """Of fp64 masses: never less than p, every token that the nucleus has, a few percent more tokens than it."""
    weights = softmax_rows(1, 1, 16, 8192, spread=spread)
    kept, mass = prune(backend, weights, top_p)
    exact = weights[0, 0].double()
    ordered = exact.sort(dim=-1, descending=True)
    needed = (ordered.values.cumsum(-1) < top_p * exact.sum(-1, keepdim=True)).sum(-1) + 1
    nucleus = torch.zeros(16, 8192, dtype=torch.bool).scatter(1, ordered.indices, torch.arange(8192) < needed[:, None])
    kept = kept[0].cpu()
    share = (exact * kept).sum(-1) / exact.sum(-1)
    # Masses lose less than a unit a token.
    assert (share >= top_p - 8192 / WEIGHT_UNIT).all() and (share - mass[0, 0].cpu()).abs().max() <= 8192 / WEIGHT_UNIT
    assert (kept | ~nucleus).all()
    assert kept.sum() <= 1.03 * needed.sum()


def test_prune_top_p_keeps_more_for_a_larger_p(backend):
    weights = softmax_rows(1, 1, 4, 1000, spread=2.0)
    levels = [0.05 * i for i in range(1, 20)] + [0.99, 0.999, 0.9999, 1.0]
    sets = [prune(backend, weights, p)[0] for p in levels]
    assert all((more | ~fewer).all() for fewer, more in zip(sets, sets[1:], strict=False))


def test_prune_top_p_counts_weights_above_one_as_one_and_negative_ones_as_nothing(backend):
    kept, mass = prune(backend, row([5.0, -3.0, 0.5, math.inf, -math.inf]), 0.5)
    assert kept.flatten().tolist() == [True, False, False, True, False] and mass.item() == pytest.approx(0.8)


def test_prune_top_p_keeps_every_live_candidate_of_a_row_with_a_nan(backend):
    weights = softmax_rows(2, 1, 4, 100)
    weights[0, 0, 1, 60] = math.nan
    kept, mass = prune(backend, weights, 0.5, num_kv_heads=2, seq_lens=torch.tensor([90, 100], dtype=torch.int32, device=backend.device))
    assert kept[0, 0].sum() == 90 and kept[0, 1].sum() < 90 and kept[1].sum() < 100 and mass[0, 0, 1] == 1.0
    weights[0, 0, 1, 60], weights[0, 0, 1, 95] = 0.0, math.nan  # beyond the sequence: nobody may look
    kept, _ = prune(backend, weights, 0.5, num_kv_heads=2, seq_lens=torch.tensor([90, 100], dtype=torch.int32, device=backend.device))
    assert kept[0, 0].sum() < 90


def test_prune_top_p_gives_empty_lists_and_no_mass_for_empty_rows(backend):
    weights = torch.zeros(3, 2, 4, 64)
    lengths = torch.tensor([0, -7, 5], dtype=torch.int32, device=backend.device)
    kept, mass = prune(backend, weights, 0.9, num_kv_heads=2, seq_lens=lengths)
    assert not kept[:2].any() and (mass[:2] == 0).all()
    assert kept[2].sum(-1).tolist() == [5, 5] and (mass[2] == 1).all(), "live but without any mass: everything is kept"


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_prune_top_p_of_an_empty_candidate_list_keeps_nothing(backend, top_p):
    def ints(*size):
        return torch.zeros(size, dtype=torch.int32, device=backend.device)

    weights = torch.empty(2, 3, 4, 0, device=backend.device)
    for unit, lists in ((1, (None, None)), (1, (ints(2, 2, 0), ints(2, 2))), (16, (ints(2, 2, 0), ints(2, 2)))):
        kept, counts, mass = backend.prune_top_p(
            weights=weights,
            seq_lens=ints(2) + 50,
            indices=lists[0],
            counts=lists[1],
            tokens_per_index=unit,
            num_kv_heads=2,
            top_p=top_p,
            sink_tokens=2,
            recent_tokens=2,
        )
        assert kept.shape == (2, 2, 0) and (counts == 0).all() and mass.shape == (2, 3, 4) and (mass == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
def test_prune_top_p_broadcasts_a_tensor_p_over_sequences_and_heads(backend, size):
    weights = softmax_rows(2, 2, 4, 200)
    p = torch.linspace(0.3, 0.99, size[0] * size[1]).view(size).to(backend.device)
    union, mass = prune(backend, weights, 0.5, num_kv_heads=2, per_head=p)
    wide = p.expand(2, 4).cpu()
    for b in range(2):
        for head in range(4):
            for t in range(2):
                kept, own = prune(backend, weights[b, t, head].view(1, 1, 1, -1), wide[b, head].item())
                assert (union[b, head // 2] | ~kept[0, 0]).all() and own.item() == mass[b, t, head].item()


def test_prune_top_p_reads_a_tensor_p_outside_its_range_as_the_nearest_end_and_nan_as_one(backend):
    weights = softmax_rows(1, 1, 6, 50)
    p = torch.tensor([[-1.0, 0.0, 1e-9, 1.5, math.inf, math.nan]], device=backend.device)
    kept, _ = prune(backend, weights, 0.5, per_head=p)
    assert kept[0].sum(-1).tolist() == [1, 1, 1, 50, 50, 50]


def test_prune_top_p_keeps_sinks_and_the_newest_candidates_whatever_their_weight(backend):
    weights = torch.zeros(1, 1, 2, 100)
    weights[..., 50] = 1.0
    lengths = torch.tensor([90], dtype=torch.int32, device=backend.device)
    kept, mass = prune(backend, weights, 0.9, num_kv_heads=1, seq_lens=lengths, sinks=3, recent=4)
    assert kept[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 50, 86, 87, 88, 89] and (mass == 1).all()


@pytest.mark.parametrize("query_tokens", [1, 3, 12])
@pytest.mark.parametrize("recent", [0, 1, 5])
def test_prune_top_p_never_loses_the_newest_tokens(backend, query_tokens, recent):
    weights = torch.zeros(2, query_tokens, 2, 100)
    weights[..., 50] = 1.0
    lengths = torch.tensor([90, 4], dtype=torch.int32, device=backend.device)
    kept, _ = prune(backend, weights, 0.9, num_kv_heads=1, seq_lens=lengths, recent=recent)
    newest = range(90 - max(recent, query_tokens), 90)
    assert kept[0, 0].nonzero().flatten().tolist() == sorted({50, *newest})
    # Of a list, what is listed of them.
    indices = torch.tensor([[[2, 50, 88, 89]], [[0, 3, -1, -1]]], dtype=torch.int32, device=backend.device)
    counts = torch.tensor([[4], [2]], dtype=torch.int32, device=backend.device)
    listed = torch.zeros(2, query_tokens, 2, 4)
    listed[..., 1] = 1.0
    kept, _ = prune(backend, listed, 0.9, num_kv_heads=1, seq_lens=lengths, indices=indices, counts=counts, recent=recent)
    assert kept[0, 0].nonzero().flatten().tolist() == [50] + [i for i in (88, 89) if i in newest] and kept[1, 0, 3]


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[9]], ids=str)
@pytest.mark.parametrize("by_page", [False, True], ids=["tokens", "pages"])
def test_prune_top_p_returns_positions_of_listed_candidates(backend, shape, by_page):
    x = make_inputs(shape, device=backend.device)
    unit = x.page_size if by_page else 1
    indices, counts = random_candidates(x, unit)
    weights = reference.estimate_weights(**x.arguments("estimate_weights", indices=indices, counts=counts, tokens_per_index=unit))
    kept, _ = prune(
        backend,
        weights,
        0.85,
        num_kv_heads=x.num_kv_heads,
        seq_lens=x.seq_lens,
        indices=indices,
        counts=counts,
        unit=unit,
        sinks=2,
        recent=2,
    )
    offered = listed_set(indices, counts, x.max_tokens // unit).repeat_interleave(unit, -1)[..., : kept.shape[-1]]
    assert not (kept & ~offered).any() and torch.equal(kept.any(-1), offered.any(-1))


def test_prune_top_p_is_bitwise_the_same_for_any_number_of_threads(backend, threads):
    weights = softmax_rows(2, 1, 8, 5000).to(backend.device)
    arguments = (weights, torch.tensor([5000, 700], dtype=torch.int32, device=backend.device), None, None, 1, 2, 0.9)
    threads(1)
    alone = backend.prune_top_p(*arguments)
    threads(2)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(alone, backend.prune_top_p(*arguments), strict=True))


def test_prune_top_p_takes_any_number_of_slots(backend):
    for slots in (1, 2, 15, 16, 17, 63, 1000):
        weights = softmax_rows(1, 1, 2, slots, seed=slots)
        kept, _ = prune(backend, weights, 0.7)
        assert_whole_bins(weights[0, 0, 0].tolist(), kept[0, 0].tolist(), 0.7)


def test_prune_top_p_serves_shapes_with_no_slots(backend):
    shape = Shape((0,), 2, 1, 64, 16, 1, torch.float32)
    x = make_inputs(shape, device=backend.device)
    kept, mass = prune(backend, torch.zeros(1, 1, 2, x.max_tokens), 0.9, num_kv_heads=1, seq_lens=x.seq_lens)
    assert not kept.any() and (mass == 0).all()
