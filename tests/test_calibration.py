"""Calibration of the shadow prefix: order, prefix, file, and what a cache does with them."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from twilight_ops import (  # noqa: E402
    Candidates,
    Full,
    Paging,
    Pruning,
    Quest,
    ShadowPrefix,
    TwilightConfig,
    calibration,
    estimate_weights,
    prune_top_p,
)
from twilight_ops.decode_step import append  # noqa: E402
from twilight_ops.integration import TwilightCache  # noqa: E402
from twilight_ops.layer import allocate_layer  # noqa: E402
from twilight_ops.selectors import _channels  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SCALE = HEAD_DIM**-0.5
NO_CENTER = torch.zeros(KV_HEADS, HEAD_DIM)


def heavy_channels(tokens, heavy, batch=1, seed=0, spread=6.0):
    """q and k whose logits come from the given channels of each KV head; the other channels are faint."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, HEADS, HEAD_DIM, generator=generator)
    k = torch.randn(batch, tokens, KV_HEADS, HEAD_DIM, generator=generator)
    for head, channels in enumerate(heavy):
        faint = torch.ones(HEAD_DIM, dtype=torch.bool)
        faint[channels] = False
        factor = torch.where(faint, 0.05, spread / len(channels) ** 0.25)
        k[:, :, head] *= factor
        group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
        q[:, :, group] *= factor
    return q, k


def captured_mass(q, k, order, prefix, budget):
    """Worst query head's true mass a KV head, queries one by one: a plain oracle."""
    q, k = q[0].double(), k[0].double()
    tokens, group = k.shape[0], HEADS // KV_HEADS
    result = torch.zeros(KV_HEADS)
    columns = range(tokens - 1, max(0, tokens - 256) - 1, -math.ceil(min(tokens, 256) / _channels.SCORED_QUERIES))
    for head in range(KV_HEADS):
        kept = order[head, : prefix[head]].long()
        mass = torch.zeros(group)
        for t in columns:
            keys = k[: t + 1, head]
            queries = q[t, head * group : (head + 1) * group] * SCALE
            score = (queries[:, kept] @ keys[:, kept].T).softmax(-1).sum(0)
            chosen = score.topk(min(budget, t + 1)).indices
            mass += (queries @ keys.T).softmax(-1)[:, chosen].sum(-1).float()
        result[head] = (mass / len(columns)).min()
    return result


def test_heavy_channels_lead_the_order():
    heavy = [[3, 17, 40, 63], [0, 1, 30, 31]]
    q, k = heavy_channels(300, heavy)
    order = _channels.channel_order(q, k, None, NO_CENTER)
    assert [sorted(row[:4].tolist()) for row in order] == heavy
    assert (order.sort(-1).values == torch.arange(HEAD_DIM)).all()


def test_the_order_ignores_padding():
    q, k = heavy_channels(300, [[3, 17], [0, 30]])
    junk_q, junk_k = heavy_channels(300, [[5], [6]], seed=1, spread=500.0)
    positions = torch.cat([torch.full((1, 100), -1), torch.arange(200)[None]], 1).int()
    live = (positions >= 0)[..., None, None]
    mixed = _channels.channel_order(torch.where(live, q, junk_q), torch.where(live, k, junk_k), positions, NO_CENTER)
    assert torch.equal(mixed, _channels.channel_order(q[:, 100:], k[:, 100:], None, NO_CENTER))


@pytest.mark.parametrize("tau", [0.02, 0.1])
def test_the_prefix_is_the_shortest_that_loses_at_most_tau(tau):
    q, k = heavy_channels(512, [list(range(6)), list(range(0, 60, 3))])
    order = _channels.channel_order(q, k, None, NO_CENTER)
    prefix = _channels.shortest_prefix(q, k, None, NO_CENTER, order, 512, 0.125, tau, SCALE)
    assert (prefix % 8 == 0).all() and (prefix >= 8).all()
    assert prefix[0] == 8
    assert 8 < prefix[1] <= 32
    full = captured_mass(q, k, order, torch.full_like(prefix, HEAD_DIM), 64)
    # 4-bit codes are part of the calibration and not of the oracle, hence the margin.
    assert (full - captured_mass(q, k, order, prefix, 64) <= tau + 0.01).all()
    shorter = captured_mass(q, k, order, prefix - 8, 64)
    assert (full - shorter)[1] > tau - 0.01


def test_a_smaller_tau_never_shortens_the_prefix():
    q, k = heavy_channels(512, [list(range(0, 40, 2)), list(range(0, 60, 3))], seed=3)
    order = _channels.channel_order(q, k, None, NO_CENTER)
    lengths = [_channels.shortest_prefix(q, k, None, NO_CENTER, order, 512, 0.125, tau, SCALE) for tau in (0.3, 0.1, 0.03, 0.005)]
    assert all((a <= b).all() for a, b in zip(lengths, lengths[1:], strict=False))
    assert (lengths[0] < lengths[-1]).any()


def test_padding_does_not_change_the_prefix_of_a_sequence():
    q, k = heavy_channels(512, [list(range(0, 40, 2)), list(range(0, 60, 3))], seed=3)
    order = _channels.channel_order(q, k, None, NO_CENTER)
    alone = _channels.shortest_prefix(q, k, None, NO_CENTER, order, 512, 0.125, 0.05, SCALE)
    pad = torch.nn.functional.pad
    positions = torch.cat([torch.full((1, 128), -1), torch.arange(512)[None]], 1).int()
    padded = _channels.shortest_prefix(
        pad(q, (0, 0, 0, 0, 128, 0), value=7.0),
        pad(k, (0, 0, 0, 0, 128, 0), value=7.0),
        positions,
        NO_CENTER,
        order,
        512,
        0.125,
        0.05,
        SCALE,
    )
    assert torch.equal(alone, padded)


def sampled_prefix(monkeypatch, sampled_tokens, q, k, positions=None, tau=0.05):
    monkeypatch.setattr(_channels, "WHOLE_TOKENS", sampled_tokens)
    monkeypatch.setattr(_channels, "SAMPLED_TOKENS", sampled_tokens)
    order = _channels.channel_order(q, k, positions, NO_CENTER)
    return _channels.shortest_prefix(q, k, positions, NO_CENTER, order, 64, 0.125, tau, SCALE)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_of_a_long_prompt_finds_the_prefix_of_the_whole(monkeypatch, seed):
    q, k = heavy_channels(4096, [list(range(6)), list(range(0, 60, 3))], seed=seed)
    whole = sampled_prefix(monkeypatch, 4096, q, k)
    sample = sampled_prefix(monkeypatch, 1024, q, k)
    assert whole[1] > whole[0]
    assert ((sample - whole).abs() <= 8).all()


def test_a_sample_weighs_the_first_tokens_as_one_each():
    """A first token that holds half the mass still holds half of it among a quarter of the other tokens."""
    tokens, stride = 4096, 4
    columns, is_sink, counts = _channels._scored_tokens(tokens, stride, None, torch.device("cpu"))
    logits = torch.randn(tokens, generator=torch.Generator().manual_seed(0)).double()
    logits[0] = logits[1:].logsumexp(0)
    biased = (logits[columns] + torch.where(is_sink, -math.log(stride), 0.0)).masked_fill(~counts, float("-inf")).softmax(0)
    assert biased[0] == pytest.approx(0.5, abs=0.02)
    assert logits[columns].masked_fill(~counts, float("-inf")).softmax(0)[0] > 0.75  # what a sample without weights would say


def test_the_first_tokens_of_a_padded_prompt_are_found_behind_its_padding():
    live = torch.arange(9000) >= 1000
    columns, is_sink, counts = _channels._scored_tokens(9000, 2, live, live.device)
    assert columns[is_sink].tolist() == list(range(1000, 1000 + _channels.SINK_TOKENS))
    used = columns[counts]
    assert len(used.unique()) == len(used) and columns[-1] == 8999
    ones, _, all_count = _channels._scored_tokens(500, 1, None, live.device)
    assert torch.equal(ones, torch.arange(500)) and all_count.all()


def test_padding_does_not_change_the_prefix_of_a_sampled_sequence(monkeypatch):
    q, k = heavy_channels(2048, [list(range(0, 40, 2)), list(range(0, 60, 3))], seed=3)
    alone = sampled_prefix(monkeypatch, 1024, q, k)
    pad = torch.nn.functional.pad
    positions = torch.cat([torch.full((1, 2048), -1), torch.arange(2048)[None]], 1).int()
    padded = [pad(x, (0, 0, 0, 0, 2048, 0), value=7.0) for x in (q, k)]
    # Twice the columns at the same distance: the sample of the live part is the same.
    assert torch.equal(sampled_prefix(monkeypatch, 2048, *padded, positions), alone)


def test_the_budget_is_never_the_whole_of_a_short_prompt():
    assert _channels.calibration_budget(256, 512, 0.125) == 32
    assert _channels.calibration_budget(8192, 512, 0.125) == 1024
    assert _channels.calibration_budget(8192, 512, 0.0) == 512
    assert _channels.calibration_budget(256, 512, 0.5) == 128


def make_model(**overrides):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.3,
    )
    config = LlamaConfig(**{**sizes, **overrides})
    config._attn_implementation = "twilight"
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def ids(length, seed=0):
    return torch.randint(1, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model, selector, prompt, dense_layers=1):
    cache = TwilightCache(model.config, TwilightConfig(selector, dense_layers=dense_layers), max_cache_len=512)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def settings(cache):
    return [
        (layer.paged.shadow.channel_order.clone(), layer.paged.shadow.prefix_channels.clone())
        for layer in cache.layers
        if layer.paged.shadow is not None
    ]


def equal_settings(first, second):
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


IDENTITY = torch.arange(HEAD_DIM, dtype=torch.int32).expand(KV_HEADS, -1)


def test_the_first_prompt_calibrates_and_later_ones_do_not(model):
    cache = calibrated(model, ShadowPrefix(tau=0.2), ids(300))
    first = settings(cache)
    assert len(first) == 2
    assert all(not torch.equal(order, IDENTITY) for order, _ in first)
    with torch.no_grad():
        model(ids(100, seed=1), past_key_values=cache)
    assert equal_settings(first, settings(cache))
    cache.reset()
    assert all(torch.equal(order, IDENTITY) and (prefix == HEAD_DIM).all() for order, prefix in settings(cache))
    with torch.no_grad():
        model(ids(300, seed=2), past_key_values=cache)
    assert not equal_settings(first, settings(cache))


def test_a_very_short_first_prompt_keeps_the_whole_row(model):
    cache = calibrated(model, ShadowPrefix(tau=0.2), ids(_channels.MIN_TOKENS - 1))
    assert all(torch.equal(order, IDENTITY) and (prefix == HEAD_DIM).all() for order, prefix in settings(cache))


def test_a_fixed_prefix_still_gets_its_order(model):
    free = settings(calibrated(model, ShadowPrefix(), ids(300)))
    fixed = settings(calibrated(model, ShadowPrefix(prefix_channels=24), ids(300)))
    for (order, _), (fixed_order, prefix) in zip(free, fixed, strict=True):
        assert torch.equal(order, fixed_order)
        assert (prefix == 24).all()


def test_other_selectors_keep_their_shadow_in_order(model):
    for selector in (Full(), Quest()):
        assert all(
            torch.equal(order, IDENTITY) and (prefix == HEAD_DIM).all() for order, prefix in settings(calibrated(model, selector, ids(300)))
        )


def test_calibration_reads_nothing_on_the_host_and_has_fixed_shapes(model):
    """It traces as one graph, with padding and without."""
    q, k = heavy_channels(200, [[1, 2], [3, 4]])
    positions = torch.arange(200)[None].int()
    for given in (None, positions):
        order = _channels.channel_order(q, k, given, NO_CENTER)

        def both(q, k, given=given, order=order):
            return _channels.channel_order(q, k, given, NO_CENTER), _channels.shortest_prefix(
                q, k, given, NO_CENTER, order, 512, 0.125, 0.05, SCALE
            )

        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k)
        assert all(torch.equal(a, b) for a, b in zip(compiled, both(q, k), strict=True))


def test_a_file_restores_the_calibration_of_every_layer(model, tmp_path):
    path = str(tmp_path / "calibration.safetensors")
    source = calibrated(model, ShadowPrefix(tau=0.2), ids(300), dense_layers=0)
    calibration.save([layer.paged.shadow for layer in source.layers], path, {"tau": "0.2"})
    from_file = calibrated(model, ShadowPrefix(calibration=path), ids(20), dense_layers=1)
    assert equal_settings(settings(source)[1:], settings(from_file))
    with torch.no_grad():
        model(ids(300, seed=4), past_key_values=from_file)
    from_file.reset()
    assert equal_settings(settings(source)[1:], settings(from_file))
    fixed = calibrated(model, ShadowPrefix(calibration=path, prefix_channels=16), ids(20))
    assert all((prefix == 16).all() for _, prefix in settings(fixed))


def test_a_bad_file_is_one_clear_error(model, tmp_path):
    from safetensors.torch import save_file

    def refused(path, message, wanted=model):
        with pytest.raises(ValueError, match=message):
            calibrated(wanted, ShadowPrefix(calibration=str(path)), ids(20))

    refused(tmp_path / "missing", "expected a file written by .*, got no such file")
    (tmp_path / "text").write_text("not a tensor")
    refused(tmp_path / "text", "expected format twilight-shadow-2 or twilight-shadow-prefix-1, got an unreadable file")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    refused(tmp_path / "foreign", "expected format twilight-shadow-2 or twilight-shadow-prefix-1, got None")
    sparse_only = calibrated(model, ShadowPrefix(), ids(300), dense_layers=2)
    calibration.save([layer.paged.shadow for layer in sparse_only.layers], tmp_path / "partial", {})
    refused(tmp_path / "partial", "expected an entry for layer 1, got none")
    whole = calibrated(model, ShadowPrefix(), ids(300), dense_layers=0)
    calibration.save([layer.paged.shadow for layer in whole.layers], tmp_path / "whole", {})
    refused(tmp_path / "whole", r"expected 2 KV heads of 128 channels, got \[2, 64\]", make_model(head_dim=128))
    whole.layers[1].paged.shadow.channel_order[0, 0] = whole.layers[1].paged.shadow.channel_order[0, 1]
    calibration.save([layer.paged.shadow for layer in whole.layers], tmp_path / "broken", {})
    refused(tmp_path / "broken", "expected permutations and prefixes that are multiples of 8, got others")


def biased(tokens, bias=60.0):
    """q and k of heads whose keys share a large vector, as projections with a bias make them."""
    generator = torch.Generator().manual_seed(7)
    q, k = heavy_channels(tokens, [list(range(0, 40, 4)), list(range(1, 60, 6))])
    direction = torch.randn(KV_HEADS, HEAD_DIM, generator=generator).sign() * torch.tensor([1.0, 0.02] * (HEAD_DIM // 2))
    return q, k, bias * direction


def layer_of(config, path=None):
    plan = TwilightConfig(config, sink_tokens=0, recent_tokens=0, calibration=path).layer_plan(0, "cpu", 2)
    return allocate_layer(plan, 32, HEADS, KV_HEADS, HEAD_DIM, 16, torch.float32, torch.device("cpu"))


def test_the_centre_is_the_mean_of_the_keys_that_are_no_padding():
    q, k, bias = biased(200)
    layer = layer_of(Full())
    layer.calibrate(q, k + bias, None, SCALE)
    torch.testing.assert_close(layer.shadow.k_center, (k + bias)[0].mean(0))
    positions = torch.arange(200)[None].int() - 50
    positions[positions < 0] = -1
    layer.calibrate(q, torch.where((positions >= 0)[..., None, None], k + bias, torch.nan), positions, SCALE)
    torch.testing.assert_close(layer.shadow.k_center, (k + bias)[0, 50:].mean(0))
    layer.calibrate(q, torch.where(torch.arange(HEAD_DIM) == 3, torch.inf, k), None, SCALE)
    assert layer.shadow.k_center.isfinite().all() and (layer.shadow.k_center[:, 3] == 0).all()
    layer.reset()
    assert not layer.shadow.k_center.any()


def test_what_all_keys_share_changes_neither_order_nor_prefix():
    q, k, bias = biased(512)
    plain, moved = layer_of(ShadowPrefix()), layer_of(ShadowPrefix())
    plain.calibrate(q, k, None, SCALE)
    moved.calibrate(q, k + bias, None, SCALE)
    assert torch.equal(plain.shadow.prefix_channels, moved.shadow.prefix_channels)
    for head in range(KV_HEADS):
        prefix = plain.shadow.prefix_channels[head]
        ours, theirs = (set(layer.shadow.channel_order[head, :prefix].tolist()) for layer in (plain, moved))
        assert ours == theirs


def test_pruning_keeps_its_mass_where_keys_share_a_large_vector():
    """A later topic and a far longer context than the prompt that the centre came from; without a centre the codes lose the keys."""
    tokens, p = 512, 0.95
    q, k, bias = biased(tokens)
    keys, table = k + bias, torch.arange(32, dtype=torch.int32)[None]
    lens, step = torch.tensor([tokens], dtype=torch.int32), slice(tokens - 1, tokens)
    weights = torch.einsum("hgd,nhd->hgn", q[0, -1].view(KV_HEADS, -1, HEAD_DIM).double() * SCALE, keys[0].double()).softmax(-1)
    lowest = {}
    for name, seen in (("first 64", 64), ("all", tokens), ("none", 0)):
        layer = layer_of(Full())
        if seen:
            layer.calibrate(q[:, :seen], keys[:, :seen], None, SCALE)
        append(keys, keys, layer, table, lens)
        paging = Paging(table, lens)
        estimate = estimate_weights(q[:, step], layer.shadow, paging, Candidates(), SCALE)
        indices, _, _ = prune_top_p(estimate, lens, Candidates(), HEADS, Pruning(p))
        kept = weights.flatten(0, 1).gather(1, indices[0].clamp(min=0).long()).masked_fill(indices[0] < 0, 0.0).sum(-1)
        lowest[name] = kept.min().item()
    assert lowest["all"] > p - 0.03 and lowest["first 64"] > p - 0.05 and lowest["none"] < 0.7, lowest


def test_a_file_of_version_0_1_loads_and_the_prompt_centres_what_it_says(tmp_path):
    from safetensors.torch import save_file

    q, k, bias = biased(300)
    source = layer_of(ShadowPrefix())
    source.calibrate(q, k, None, SCALE)
    order, prefix = source.shadow.channel_order, source.shadow.prefix_channels
    path = str(tmp_path / "old")
    save_file({"layers.0.channel_order": order, "layers.0.prefix_channels": prefix}, path, metadata={"format": calibration.WITHOUT_CENTRE})
    for selector in (ShadowPrefix(), Full()):
        layer = layer_of(selector, path)
        layer.calibrate(q, k + bias, None, SCALE)
        assert torch.equal(layer.shadow.channel_order, order) and torch.equal(layer.shadow.prefix_channels, prefix)
        torch.testing.assert_close(layer.shadow.k_center, (k + bias)[0].mean(0))


def test_a_centre_from_a_file_stays(tmp_path):
    q, k, bias = biased(300)
    source = layer_of(ShadowPrefix())
    source.calibrate(q, k + bias, None, SCALE)
    path = str(tmp_path / "file")
    calibration.save([source.shadow], path, {})
    layer = layer_of(Full(), path)
    for _ in range(2):
        layer.calibrate(q, k, None, SCALE)
        assert torch.equal(layer.shadow.k_center, source.shadow.k_center)
        layer.reset()


def test_the_operators_select_as_calibrated(model):
    """append_kv and select_tokens with the calibrated order and prefix find the mass; the same prefix of the reversed order does not."""
    tokens, budget = 512, 64
    q, k = heavy_channels(tokens, [list(range(0, 40, 4)), list(range(1, 60, 6))])
    table, lens = torch.arange(32, dtype=torch.int32)[None], torch.tensor([tokens], dtype=torch.int32)
    selector = ShadowPrefix(token_budget=1, budget_fraction=budget / tokens, tau=0.03)
    plan = TwilightConfig(selector, dense_layers=0, sink_tokens=0, recent_tokens=0).layer_plan(0, "cpu", 2)
    losses = {}
    for name in ("calibrated", "reversed", "whole"):
        layer = allocate_layer(plan, 32, HEADS, KV_HEADS, HEAD_DIM, 16, torch.float32, torch.device("cpu"))
        layer.calibrate(q, k, None, SCALE)
        assert (layer.shadow.prefix_channels < HEAD_DIM).all()
        if name == "reversed":
            layer.shadow.channel_order.copy_(layer.shadow.channel_order.flip(-1))
        elif name == "whole":
            layer.shadow.prefix_channels.fill_(HEAD_DIM)
        append(k, k, layer, table, lens)
        losses[name] = 0.0
        for t in range(480, 512, 4):
            newest = torch.tensor([t + 1], dtype=torch.int32)
            chosen = selector.select(q[:, t : t + 1], layer, table, newest, SCALE)
            for head in range(HEADS):
                kv_head = head * KV_HEADS // HEADS
                weights = (k[0, : t + 1, kv_head] @ q[0, t, head] * SCALE).softmax(-1)
                kept = chosen.indices[0, kv_head, : chosen.counts[0, kv_head]].long()
                losses[name] += (1 - weights[kept].sum().item()) / (8 * HEADS)
    assert losses["calibrated"] <= losses["whole"] + selector.tau + 0.01
    assert losses["reversed"] > losses["whole"] + 0.2
