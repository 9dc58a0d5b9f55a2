"""twilight::select_tokens: the tokens whose shadow-prefix score is largest."""

import math

import pytest
import torch
from comparisons import leading_channels, listed_set, page_mean_scores, token_scores, top_k_borderline
from inputs import SHAPES, Shape, break_key, make_inputs
from selection import Ranking

from twilight_ops import Always, Budget
from twilight_ops.capacity import Limits

pytestmark = pytest.mark.usefixtures("poisoned_empties")
RANKING = Ranking("select_tokens", token_scores, by_page=False)
LONG = Shape((1200, 48, 333), 6, 3, 64, 16, 2, torch.float32)
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_tokens_matches_the_oracle(backend, shape):
    x = make_inputs(shape, device=backend.device)
    fixed = shape.query_tokens % 2 == 1
    RANKING.check_against_oracle(backend, x, token_budget=48 if fixed else 1, budget_fraction=0.0 if fixed else 0.125)


def test_select_tokens_takes_everything_when_the_budget_covers_the_sequence(backend):
    x = make_inputs(SMALL, device=backend.device)
    member = RANKING.check_against_oracle(backend, x, exact=True, token_budget=300)
    assert member.sum(-1).tolist() == [[300] * 3, [40] * 3]


def test_select_tokens_always_takes_sinks_and_the_newest_tokens_first(backend):
    x = make_inputs(Shape((300, 40, 5), 4, 2, 64, 16, 3, torch.float32), device=backend.device)
    member = RANKING.check_against_oracle(backend, x, token_budget=20, sink_tokens=4, recent_tokens=10)
    assert member[0, :, :4].all() and member[0, :, 290:300].all() and (member[0].sum(-1) == 20).all()
    # Three query tokens bring three newest tokens even where nobody asks for recent ones.
    member = RANKING.check_against_oracle(backend, x, token_budget=1)
    assert (member.sum(-1) == 3).all() and member[0, :, 297:300].all()


def test_select_tokens_gives_forced_tokens_a_place_beyond_the_budget(backend):
    x = make_inputs(SMALL, device=backend.device)
    member = RANKING.check_against_oracle(backend, x, exact=True, token_budget=2, sink_tokens=8, recent_tokens=8)
    assert (member.sum(-1) == 16).all()


def test_select_tokens_takes_the_lowest_positions_of_equal_scores(backend):
    x = make_inputs(SMALL, device=backend.device)
    x.k_quant.fill_(0x77)
    x.k_scale.fill_(1.0)
    member = RANKING.check_against_oracle(backend, x, exact=True, token_budget=33)
    assert member[0, :, :32].all() and member[0, :, 299].all() and (member[0].sum(-1) == 33).all()


def test_select_tokens_takes_hardly_other_tokens_than_the_best(backend):
    """Of fp64 scores, without rounding or bins: as many as asked for, and nearly all of the mass that the best have."""
    x = make_inputs(Shape((4000,), 8, 2, 128, 16, 1, torch.float32), device=backend.device)
    member = listed_set(*backend.select_tokens(**x.arguments("select_tokens", token_budget=500)), x.max_tokens)
    scores = token_scores(x, torch.float64, rounded=False)[0].nan_to_num(0.0)
    scores[:, 3999] = 1e9  # the newest token
    best = scores.topk(500, dim=-1)
    assert (member[0].sum(-1) == 500).all()
    others = member[0] ^ torch.zeros_like(member[0]).scatter(1, best.indices, True)
    assert (others.sum(-1) <= 0.1 * 500).all()
    # They score within a bin, and a rounding, of the worst of the best.
    ratio = (scores / best.values[:, -1:])[others]
    assert (ratio <= 1.126).all() and (ratio >= 1 / 1.126).all()
    scores[:, 3999] = 0.0
    assert ((scores * member[0]).sum(-1) >= 0.998 * best.values[:, 1:].sum(-1)).all()


def test_select_tokens_follows_one_budget_a_head_clamped_to_the_capacity(backend):
    x = make_inputs(SMALL, device=backend.device)
    per_head = torch.tensor([0, 17, 1000], dtype=torch.int32, device=backend.device)
    member = RANKING.check_against_oracle(backend, x, token_budget=64, head_token_budget=per_head)
    assert member[0].sum(-1).tolist() == [1, 17, 64]


def test_select_tokens_reads_only_the_prefix_channels(backend):
    x = make_inputs(SMALL, device=backend.device)
    before = backend.select_tokens(**x.arguments("select_tokens"))
    x.prefix_channels.fill_(16)
    narrow = backend.select_tokens(**x.arguments("select_tokens"))
    x.k_quant[:, :, 16 * 16 // 2 :] = 255  # every byte behind the prefix block
    after = backend.select_tokens(**x.arguments("select_tokens"))
    assert torch.equal(narrow[0], after[0]) and torch.equal(narrow[1], after[1])
    assert not torch.equal(before[0], narrow[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_tokens_takes_tokens_of_pages_with_the_best_means(backend, shape):
    """A budget of whole pages, and a share that is none: all tokens of the pages that are kept."""
    x = make_inputs(shape, device=backend.device)
    options = {"token_budget": 5 * shape.page_size, "page_fraction": 1e-3, "sink_tokens": 3, "recent_tokens": 20}
    got, want = backend.select_tokens(**x.arguments("select_tokens", **options)), x.oracle("select_tokens", **options)
    assert torch.equal(got[1], want[1]) and got[0].shape == want[0].shape
    member = listed_set(*got, x.max_tokens)
    pages, wanted = (tokens.unflatten(-1, (-1, shape.page_size)).any(-1) for tokens in (member, listed_set(*want, x.max_tokens)))
    scores = [page_mean_scores(x, dtype, leading_channels(x)) for dtype in (torch.float64, torch.float32)]
    assert ((pages ^ wanted).sum(-1) <= 2 * top_k_borderline(*scores, wanted)).all()
    live = torch.arange(x.max_tokens, device=x.q.device) < x.seq_lens[:, None, None]
    assert torch.equal(member, pages.repeat_interleave(shape.page_size, -1) & live)


@pytest.mark.parametrize("fraction, least", [(0.25, 0), (0.5, 0), (0.01, 150)])
def test_select_tokens_takes_the_best_tokens_of_the_kept_pages(backend, fraction, least):
    """Pages whose means are broken come first: which are kept is known."""
    x = make_inputs(LONG, device=backend.device)
    rng = torch.Generator().manual_seed(3)
    kept = torch.zeros(3, 3, x.page_table.shape[1], dtype=torch.bool)
    for b, length in enumerate(LONG.seq_lens):
        pages = -(-length // 16)
        wanted = min(max(math.ceil(fraction * pages), -(-least // 16), 2), pages)
        for h in range(3):
            # The page of sinks and that of the newest tokens are among them.
            kept[b, h, [0, pages - 1, *(1 + torch.randperm(pages - 2, generator=rng)[: wanted - 2]).tolist()]] = True
        broken = torch.where(kept[b, :, :pages], math.nan, 1.0).T.to(x.means_scale)
        x.means_scale[x.page_table[b, :pages].long()] = broken[..., None].expand(-1, -1, 2).contiguous()
    options = {"token_budget": 30, "sink_tokens": 4, "recent_tokens": 5}
    got = backend.select_tokens(**x.arguments("select_tokens", page_fraction=fraction, min_scored_tokens=least, **options))
    member, open_tokens = listed_set(*got, x.max_tokens), kept.to(x.q.device).repeat_interleave(16, -1)
    assert not (member & ~open_tokens).any() and (member.sum(-1) == 30).all()
    want = listed_set(*x.oracle("select_tokens", page_fraction=fraction, min_scored_tokens=least, **options), x.max_tokens)
    scores = [token_scores(x, dtype).masked_fill(~open_tokens, math.nan) for dtype in (torch.float64, torch.float32)]
    assert ((member ^ want).sum(-1) <= 2 * top_k_borderline(*scores, want)).all()


def test_select_tokens_scores_all_tokens_where_all_pages_are_kept(backend):
    x = make_inputs(LONG, device=backend.device)
    x.means_scale.fill_(math.nan)  # as good as any
    whole = backend.select_tokens(**x.arguments("select_tokens", token_budget=50))
    for page_fraction, least in ((1.0, 0), (0.9999, 0), (0.01, x.max_tokens), (0.01, 2**40), (0.01, x.max_tokens - 1)):
        level = {"page_fraction": page_fraction, "min_scored_tokens": least}
        same = backend.select_tokens(**x.arguments("select_tokens", token_budget=50, **level))
        assert torch.equal(whole[0], same[0]) and torch.equal(whole[1], same[1])


def test_select_tokens_takes_no_more_than_the_kept_pages_hold(backend):
    x = make_inputs(Shape((1000,), 2, 1, 64, 16, 1, torch.float32), device=backend.device)
    indices, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=33, page_fraction=0.01))
    assert counts.tolist() == [[33]]  # three pages, the last of eight tokens
    indices, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=48, page_fraction=0.01))
    assert counts.tolist() == [[40]] and (indices[0, 0, 40:] == -1).all()
    heads = torch.tensor([64], dtype=torch.int32, device=backend.device)
    _, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=48, page_fraction=0.01, head_token_budget=heads))
    assert counts.tolist() == [[40]]  # clamped to the capacity
    level = {"page_fraction": 0.01, "min_scored_tokens": 60}  # four pages, the last of eight tokens
    _, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=60, **level))
    assert counts.tolist() == [[56]]
    heads.fill_(20)
    _, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=60, head_token_budget=heads, **level))
    assert counts.tolist() == [[20]]


def test_select_tokens_reads_means_for_two_levels_only(backend):
    x = make_inputs(SMALL, device=backend.device)
    before = backend.select_tokens(**x.arguments("select_tokens", page_fraction=0.5))
    head_dim, prefix = 64, 8
    x.page_means[:, 1, prefix // 2 :] = 255  # behind the prefix of head 1
    assert x.prefix_channels[1] == prefix and head_dim > prefix
    after = backend.select_tokens(**x.arguments("select_tokens", page_fraction=0.5))
    assert torch.equal(before[0], after[0])
    without = {"page_means": None, "means_scale": None}
    one = [backend.select_tokens(**x.arguments("select_tokens", **options)) for options in ({}, without)]
    assert torch.equal(one[0][0], one[1][0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_select_tokens_ranks_a_broken_key_above_all_others(backend, value):
    x = make_inputs(SMALL, device=backend.device)
    break_key(x, 0, 77, value)
    member = RANKING.check_against_oracle(backend, x, exact=True, token_budget=2)
    assert member[0, :, 77].all() and (member[0].sum(-1) == 2).all()


def test_select_tokens_ends_when_q_is_nan(backend):
    x = make_inputs(SMALL, device=backend.device)
    x.q[0, 0, 0, 3] = math.nan
    member = RANKING.check_against_oracle(backend, x, exact=True, token_budget=32)
    assert (member[0].sum(-1) == 32).all()


def test_select_tokens_treats_lengths_beyond_the_page_table_as_full(backend):
    x = make_inputs(Shape((320,), 2, 1, 64, 16, 1, torch.float32), device=backend.device, extra_pages=0)
    x.page_table.copy_(torch.arange(20, device=backend.device))
    x.k_scale.nan_to_num_(1.0)
    x.seq_lens.fill_(2**31 - 1)
    indices, counts = backend.select_tokens(**x.arguments("select_tokens", token_budget=10**6))
    assert counts.tolist() == [[320]] and indices[0, 0].tolist() == list(range(320))


@pytest.mark.parametrize("seq_len", [0, -3])
def test_select_tokens_returns_empty_lists_for_empty_sequences(backend, seq_len):
    x = make_inputs(SMALL, device=backend.device)
    x.seq_lens.fill_(seq_len)
    indices, counts = backend.select_tokens(**x.arguments("select_tokens"))
    assert (counts == 0).all() and (indices == -1).all()


def test_select_tokens_has_the_capacity_that_was_promised(backend):
    x = make_inputs(SMALL, device=backend.device)
    for budget, fraction, sinks, recent in ((1, 0.0, 0, 0), (7, 0.3, 0, 0), (7, 1.0, 0, 0), (1, 0.0, 20, 30), (10**6, 0.0, 0, 0)):
        arguments = x.arguments("select_tokens", token_budget=budget, budget_fraction=fraction, sink_tokens=sinks, recent_tokens=recent)
        indices, _ = backend.select_tokens(**arguments)
        limits = Limits.of(x.max_tokens, 1, Budget(budget, fraction), Always(sinks, recent))
        assert indices.shape[-1] == limits.token_capacity


def test_select_tokens_is_bitwise_the_same_for_any_number_of_threads(backend, threads):
    x = make_inputs(Shape((3000, 100), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(backend.select_tokens(**x.arguments("select_tokens", token_budget=300)))
    for indices, counts in results[1:]:
        assert torch.equal(indices, results[0][0]) and torch.equal(counts, results[0][1])
    assert listed_set(*results[0], x.max_tokens)[0].sum(-1).tolist() == [300, 300]
