"""twilight::select_pages: the pages with the best softmax of their scores, from bounds as Quest has them or from means."""

import math

import pytest
import torch
from comparisons import page_mean_scores, page_scores
from inputs import BY_MEANS, SHAPES, Shape, make_inputs
from selection import Ranking

from twilight_ops import Always, Budget, Shadow
from twilight_ops.capacity import Limits

pytestmark = pytest.mark.usefixtures("poisoned_empties")
RANKINGS = {
    "bounds": Ranking("select_pages", page_scores, by_page=True),
    "means": Ranking("select_pages", page_mean_scores, by_page=True, arguments=BY_MEANS),
}
SMALL = Shape((300, 40), 6, 3, 64, 16, 1, torch.float32)


@pytest.fixture(params=RANKINGS.values(), ids=RANKINGS)
def ranking(request) -> Ranking:
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranked, bounds_dtype", [("bounds", "model"), ("bounds", "uint8"), ("means", "model")])
def test_select_pages_matches_the_oracle(backend, shape, ranked, bounds_dtype):
    ranking = RANKINGS[ranked]
    x = make_inputs(shape, device=backend.device, bounds_dtype=bounds_dtype)
    budget = {"token_budget": 5 * shape.page_size - 3} if bounds_dtype == "model" else {"token_budget": 1, "budget_fraction": 0.3}
    ranking.check_against_oracle(backend, x, **budget)


def test_select_pages_rounds_the_budget_up_to_whole_pages(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    for tokens, pages in ((1, 1), (16, 1), (17, 2), (64, 4)):
        member = ranking.check_against_oracle(backend, x, token_budget=tokens)
        assert (member[0].sum(-1) == pages).all()


def test_select_pages_takes_everything_when_the_budget_covers_the_sequence(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    member = ranking.check_against_oracle(backend, x, exact=True, token_budget=300)
    assert member.sum(-1).tolist() == [[19] * 3, [3] * 3]


def test_select_pages_always_takes_the_pages_of_sinks_and_newest_tokens(backend, ranking):
    x = make_inputs(Shape((300, 40, 5), 4, 2, 64, 16, 3, torch.float32), device=backend.device)
    member = ranking.check_against_oracle(backend, x, token_budget=80, sink_tokens=17, recent_tokens=14)
    assert member[0, :, :2].all() and member[0, :, 17:19].all() and (member[0].sum(-1) == 5).all()
    member = ranking.check_against_oracle(backend, x, token_budget=1)
    assert member[0, :, 18].all() and member[1, :, 2].all() and (member.sum(-1) == 1).all()


def test_select_pages_takes_two_newest_pages_when_the_query_tokens_straddle_them(backend, ranking):
    x = make_inputs(Shape((33,), 2, 1, 64, 16, 4, torch.float32), device=backend.device)
    member = ranking.check_against_oracle(backend, x, exact=True, token_budget=1)
    assert member[0, 0].tolist() == [False, True, True, False]


def test_select_pages_takes_the_lowest_of_pages_with_equal_scores(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    x.page_bounds.fill_(1.0)
    x.page_means.fill_(0x55)
    x.means_scale.fill_(1.0)
    member = ranking.check_against_oracle(backend, x, exact=True, token_budget=5 * 16)
    assert member[0, :, :4].all() and member[0, :, 18].all() and (member[0].sum(-1) == 5).all()


def test_select_pages_follows_one_budget_a_head_clamped_to_the_capacity(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    per_head = torch.tensor([0, 17, 10000], dtype=torch.int32, device=backend.device)
    member = ranking.check_against_oracle(backend, x, token_budget=64, head_token_budget=per_head)
    assert member[0].sum(-1).tolist() == [1, 2, 4]


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_select_pages_ranks_a_broken_page_above_all_others(backend, ranking, value):
    x = make_inputs(SMALL, device=backend.device)
    x.page_bounds[x.page_table[0, 7], :, 1] = value
    x.means_scale[x.page_table[0, 7], :, 1] = value
    member = ranking.check_against_oracle(backend, x, exact=True, token_budget=32)
    assert member[0, :, 7].all() and member[0, :, 18].all() and (member[0].sum(-1) == 2).all()


def test_select_pages_ends_when_q_is_nan(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    x.q[0, 0, 0, 3] = math.nan
    member = ranking.check_against_oracle(backend, x, exact=True, token_budget=64)
    assert (member[0].sum(-1) == 4).all()


@pytest.mark.parametrize("seq_len", [0, -3])
def test_select_pages_returns_empty_lists_for_empty_sequences(backend, ranking, seq_len):
    x = make_inputs(SMALL, device=backend.device)
    x.seq_lens.fill_(seq_len)
    indices, counts = backend.select_pages(**x.arguments("select_pages", **ranking.arguments))
    assert (counts == 0).all() and (indices == -1).all()


def test_select_pages_has_the_capacity_that_was_promised(backend, ranking):
    x = make_inputs(SMALL, device=backend.device)
    for budget, fraction, sinks, recent in ((1, 0.0, 0, 0), (7, 0.3, 0, 0), (7, 1.0, 0, 0), (1, 0.0, 20, 30), (10**6, 0.0, 0, 0)):
        options = {"token_budget": budget, "budget_fraction": fraction, "sink_tokens": sinks, "recent_tokens": recent}
        indices, _ = backend.select_pages(**x.arguments("select_pages", **ranking.arguments, **options))
        limits = Limits.of(x.max_tokens, 1, Budget(budget, fraction), Always(sinks, recent))
        assert indices.shape[-1] == limits.page_capacity(16)


def test_select_pages_is_bitwise_the_same_for_any_number_of_threads(backend, ranking, threads):
    x = make_inputs(Shape((3000, 100), 8, 2, 128, 16, 1, torch.bfloat16), device=backend.device, bounds_dtype="uint8")
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(backend.select_pages(**x.arguments("select_pages", **ranking.arguments, token_budget=320)))
    for indices, counts in results[1:]:
        assert torch.equal(indices, results[0][0]) and torch.equal(counts, results[0][1])
    assert results[0][1][0].tolist() == [20, 20]


def test_select_pages_reads_means_in_their_own_order_without_a_shadow(backend):
    x = make_inputs(SMALL, device=backend.device)
    x.channel_order.copy_(torch.arange(64).expand(3, -1))
    no_shadow = dict.fromkeys(Shadow._fields)
    ranking = Ranking("select_pages", page_mean_scores, by_page=True, arguments=BY_MEANS | no_shadow)
    ranking.check_against_oracle(backend, x, token_budget=64)
