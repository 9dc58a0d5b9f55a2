"""Any integer that an argument's type can hold gives the result of exact arithmetic, and the same one in every backend."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from comparisons import listed_set, page_mean_scores, page_scores, token_scores
from flat import reference
from inputs import BY_MEANS, DecodeInputs, Shape, make_inputs, random_candidates
from selection import Ranking

from twilight_ops import Always, Budget, capacity

pytestmark = pytest.mark.usefixtures("poisoned_empties")

RANKINGS = {
    "bounds": Ranking("select_pages", page_scores, True),
    "means": Ranking("select_pages", page_mean_scores, True, BY_MEANS),
    "tokens": Ranking("select_tokens", token_scores, False),
}
LARGE = (2**29, 2**30, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
INT32 = (-(2**31), -1, 0, 1, 2**31 - 1)


def extreme_inputs(rng: random.Random, device: str) -> DecodeInputs:
    """A small cache without poison, whose lengths are any int32."""
    query_tokens, page_size = rng.choice([1, 1, 2, 8]), rng.choice([16, 32])
    shape = Shape((rng.randint(1, 90), rng.randint(1, 40)), 4, 2, 64, page_size, query_tokens, torch.float16)
    x = make_inputs(shape, device=device, seed=rng.randrange(1000), extra_pages=rng.choice([0, 1]))
    for name in ("k_cache", "v_cache", "k_scale", "page_bounds", "means_scale"):
        getattr(x, name).nan_to_num_(0.25)
    x.page_table.clamp_(0, x.k_cache.shape[0] - 1)
    lengths = [rng.choice([*INT32, length, x.max_tokens - 1, x.max_tokens, x.max_tokens + 1]) for length in shape.seq_lens]
    x.seq_lens.copy_(torch.tensor(lengths))
    return x


def extreme_tokens(rng: random.Random, max_tokens: int, least: int = 0) -> int:
    return rng.choice([least, least + 1, rng.randint(1, max_tokens), max_tokens - 1, max_tokens, max_tokens + 1, *LARGE])


def extreme_limits(rng: random.Random, max_tokens: int) -> dict:
    return {name: extreme_tokens(rng, max_tokens) for name in ("sink_tokens", "recent_tokens")}


def extreme_budget(rng: random.Random, x: DecodeInputs) -> dict:
    budget = extreme_limits(rng, x.max_tokens) | {
        "token_budget": extreme_tokens(rng, x.max_tokens, least=1),
        "budget_fraction": rng.choice([0.0, 5e-324, 1 / 3, 0.7, 1.0 - 2.0**-53, 1.0]),
    }
    if rng.random() < 0.3:
        heads = [rng.choice([*INT32, 17, x.max_tokens]) for _ in range(x.num_kv_heads)]
        budget["head_token_budget"] = torch.tensor(heads, dtype=torch.int32, device=x.q.device)
    return budget


def expected_count(x: DecodeInputs, ranking: Ranking, sequence: int, head: int, budget: dict, capacity: int) -> int:
    """How many items a row has, in integers of any size."""
    unit = ranking.unit(x)
    length = min(max(int(x.seq_lens[sequence]), 0), x.max_tokens)
    items = -(-length // unit)
    if "head_token_budget" in budget:
        tokens = max(int(budget["head_token_budget"][head]), 0)
    else:
        share = length * budget["budget_fraction"]
        tokens = max(budget["token_budget"], int(share) + (int(share) < share))
    newest = length - max(budget["recent_tokens"], x.q.shape[1])
    forced = sum(item * unit < budget["sink_tokens"] or (item + 1) * unit > newest for item in range(items))
    return min(max(-(-tokens // unit), forced), items, capacity)


def check_selection(backend, kind: str, seed: int) -> None:
    rng = random.Random(seed)
    x = extreme_inputs(rng, backend.device)
    budget = extreme_budget(rng, x)
    ranking = RANKINGS[kind]
    op, fixed = ranking.op, ranking.arguments
    arguments = x.arguments(op, **fixed, **budget)
    indices, counts = getattr(backend, op)(**arguments)
    member, oracle = (listed_set(*lists, ranking.items(x)) for lists in ((indices, counts), x.oracle(op, **fixed, **budget)))
    assert ((member ^ oracle).sum(-1) <= 2).all(), "the oracle's set, but for one pair that rounding may swap"
    forced = ranking.forced(x, budget["sink_tokens"], budget["recent_tokens"])
    assert (member | ~forced[:, None]).all(), budget
    on_meta = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    assert getattr(torch.ops.twilight, op)(**on_meta)[0].shape == indices.shape, "the fake's capacity"
    want = [[expected_count(x, ranking, b, h, budget, indices.shape[2]) for h in range(x.num_kv_heads)] for b in range(len(x.seq_lens))]
    assert counts.tolist() == want, budget


def check_pruner(backend, seed: int) -> None:
    rng = random.Random(seed)
    x = extreme_inputs(rng, backend.device)
    unit = rng.choice([1, x.page_size])
    indices, counts = random_lists(rng, x, unit) if rng.random() < 0.6 else (None, None)
    slots = x.max_tokens if indices is None else indices.shape[2] * unit
    weights = torch.rand(2, x.q.shape[1], 4, slots, generator=torch.Generator().manual_seed(seed)).to(backend.device) / max(slots, 1)
    pruner = {"weights": weights, "indices": indices, "counts": counts, "tokens_per_index": unit, "num_kv_heads": 2, "top_p": 0.3}
    pruner |= extreme_limits(rng, x.max_tokens)
    arguments = x.arguments("prune_top_p", **pruner)
    got, want = backend.prune_top_p(**arguments), reference.prune_top_p(**arguments)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w), pruner
    for b, length in enumerate(x.seq_lens.tolist()):
        newest = length - max(pruner["recent_tokens"], x.q.shape[1])
        for h in range(2):
            kept = set(got[0][b, h, : got[1][b, h]].tolist())
            forced = {p for p in offered(x, indices, counts, unit, slots, b, h) if p < pruner["sink_tokens"] or p >= newest}
            assert forced <= kept, pruner


def offered(x: DecodeInputs, indices, counts, unit: int, slots: int, sequence: int, head: int) -> set[int]:
    """Live positions of a row's candidate list, in integers of any size."""
    length = max(int(x.seq_lens[sequence]), 0)
    if indices is None:
        return set(range(min(slots, length)))
    listed = indices[sequence, head, : max(int(counts[sequence, head]), 0)].tolist()
    return {i * unit + s for i in listed if i >= 0 for s in range(unit) if i * unit + s < length}


def random_lists(rng: random.Random, x: DecodeInputs, unit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of which some name no token, among them those whose position would wrap around to a live one."""
    indices, counts = random_candidates(x, unit, seed=rng.randrange(1000))
    strange = [-(2**31), -1, 2**31 - 1, 2**32 // unit // 2, 2**32 // unit + 1, 2**31 // unit]
    strange = [i for i in strange if i < 2**31]
    extra = torch.tensor(strange, dtype=torch.int32, device=x.q.device).expand(*indices.shape[:2], -1)
    indices = torch.cat([indices[..., :1], extra, indices[..., 1:]], dim=-1).contiguous()
    choices = [*INT32, indices.shape[2], indices.shape[2] + 1, 2**31 // unit - 1]
    counts = torch.tensor([[rng.choice(choices) for _ in row] for row in counts.tolist()], dtype=torch.int32, device=x.q.device)
    return indices, counts


def check_lists(backend, seed: int) -> None:
    """attend_sparse and estimate_weights read of a list what exact arithmetic says is live."""
    rng = random.Random(seed)
    x = extreme_inputs(rng, backend.device)
    unit = rng.choice([1, x.page_size])
    indices, counts = random_lists(rng, x, unit)
    listed = {"indices": indices, "counts": counts, "tokens_per_index": unit}
    for op, tolerance in (("estimate_weights", 1e-3), ("attend_sparse", 2e-2)):
        got, want = getattr(backend, op)(**x.arguments(op, **listed)), x.oracle(op, **listed)
        got, want = (got, want) if op == "attend_sparse" else ((got,), (want,))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w.double(), rtol=tolerance, atol=tolerance)
    clean = replace(x, seq_lens=x.seq_lens.clamp(0, x.max_tokens))
    weights = x.oracle("estimate_weights", **listed)
    for b in range(2):
        for h in range(2):
            live = bool(offered(clean, indices, counts, unit, 0, b, h))
            assert live or not weights[b, :, 2 * h : 2 * h + 2].any()


def check_decode(backend, selector: str, seed: int) -> None:
    """What is asked for beyond the table is the table: the result of the clamped call, which arithmetic of any width computes alike."""
    rng = random.Random(seed)
    x = extreme_inputs(rng, backend.device)
    asked = extreme_budget(rng, x) | {"selector": selector, "top_p": 0.5, "dense_below": rng.choice([0, 0, 20, *LARGE])}
    within = asked | {name: min(asked[name], x.max_tokens) for name in ("token_budget", "sink_tokens", "recent_tokens", "dense_below")}
    results = []
    for call in (asked, within):
        outputs = {
            "kept_indices": torch.full((2, 2, x.max_tokens), 99, dtype=torch.int32, device=x.q.device),
            "kept_counts": torch.full((2, 2), 99, dtype=torch.int32, device=x.q.device),
            "budget_counters": torch.zeros(2, capacity.COUNTER_COLUMNS, dtype=torch.int64, device=x.q.device),
        }
        out, lse = backend.decode_attention(**x.arguments("decode_attention", **call, **outputs))
        results.append((out, lse, *outputs.values()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other), asked
    kept = listed_set(results[0][2], results[0][3], x.max_tokens)
    positions = torch.arange(x.max_tokens, device=x.q.device)
    lengths = x.seq_lens.long().clamp(0, x.max_tokens)[:, None]
    newest = lengths - max(asked["recent_tokens"], x.q.shape[1])
    forced = (positions < lengths) & ((positions < asked["sink_tokens"]) | (positions >= newest))
    assert (kept | ~forced[:, None]).all(), asked
    dense = (lengths[:, 0] > 0) & ((lengths[:, 0] <= asked["dense_below"]) | (selector == "dense"))
    assert (results[0][4][:, capacity.COUNTER_DENSE] == dense.sum()).all()
    want = x.oracle("attend_sparse", indices=results[0][2], counts=results[0][3])
    torch.testing.assert_close(results[0][0].double(), want[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(results[0][1].double(), want[1].double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", RANKINGS)
@pytest.mark.parametrize("seed", range(30))
def test_selectors_take_what_exact_arithmetic_takes(backend, kind, seed):
    check_selection(backend, kind, seed)


@pytest.mark.parametrize("seed", range(40))
def test_the_pruner_keeps_what_exact_arithmetic_keeps(backend, seed):
    check_pruner(backend, seed)


@pytest.mark.parametrize("seed", range(20))
def test_lists_of_any_integers_are_read_as_their_live_part(backend, seed):
    check_lists(backend, seed)


@pytest.mark.parametrize("selector", ["dense", "full", "quest", "page_mean", "shadow_prefix", "streaming"])
@pytest.mark.parametrize("seed", range(15))
def test_decode_attention_reads_more_than_the_table_as_the_table(backend, selector, seed):
    check_decode(backend, selector, seed)


NOWHERE = [(length, None) for length in INT32 if length != 1] + [(40, position) for position in (-(2**31), -1, 2**31 - 1)]


@pytest.mark.parametrize("length, positions", NOWHERE)
def test_append_kv_writes_nothing_at_positions_that_no_table_holds(backend, length, positions):
    check_append_nowhere(backend, length, positions)


def check_append_nowhere(backend, length: int, positions: int | None) -> None:
    x = make_inputs(Shape((40, 17), 4, 2, 64, 16, 1, torch.float16), device=backend.device)
    before = x.clone()
    x.seq_lens.fill_(length)
    before.seq_lens.fill_(length)
    given = None if positions is None else torch.full((2, 3), positions, dtype=torch.int32, device=backend.device)
    backend.append_kv(**x.arguments("append_kv", k=x.keys[:, :3], v=x.values[:, :3], positions=given))
    for name, tensor in x.tensors().items():
        torch.testing.assert_close(tensor, before.tensors()[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("max_tokens", [0, 16, 80, 2**29])
@pytest.mark.parametrize("page_size", [16, 64])
def test_no_budget_of_a_live_length_exceeds_the_capacity(max_tokens, page_size):
    """Rounding of fraction * length, in both units, at the lengths where it could differ."""
    rng = random.Random(max_tokens)
    pages = -(-max_tokens // page_size)
    for _ in range(200):
        fraction = rng.choice([rng.random(), 1 / 3, 0.1, 0.7, 1.0 - 2.0**-53])
        limits = capacity.Limits.of(pages * page_size, 1, Budget(1, fraction), Always())
        tokens, listed = limits.token_capacity, limits.page_capacity(page_size)
        for length in {rng.randint(0, pages * page_size) for _ in range(5)} | {pages * page_size}:
            share = length * fraction
            budget = min(length, max(1, int(share) + (int(share) < share)))
            assert budget <= tokens and -(-budget // page_size) <= listed
