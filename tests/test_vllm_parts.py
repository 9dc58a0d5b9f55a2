"""The parts of the vLLM backend that need no vLLM: pages, settings, versions, refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twilight_ops import Full, LayerOverride, PageMean, Quest, ShadowPrefix, TwilightConfig, calibration
from twilight_ops.decode_step import append, attend
from twilight_ops.integration.vllm import settings, versions
from twilight_ops.integration.vllm.pages import carve_layer, page_pieces, ragged_rows, split_rows, token_bytes
from twilight_ops.layer import allocate_layer

HEADS, KV_HEADS, DIM = 4, 2, 64


def plan_of(selector, page_size=16, **fields):
    return TwilightConfig(selector, page_size=page_size, dense_below=0, **fields).layer_plan(0, "cpu", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "selector",
    [Full(), Quest(), Quest(bounds_dtype="model"), ShadowPrefix(page_fraction=1.0), ShadowPrefix(prefix_channels=16)],
    ids=str,
)
def test_tensors_of_a_block_do_not_overlap_and_fit(selector, dim, page_size, dtype):
    pages, plan = 9, plan_of(selector, page_size)
    size = token_bytes({plan}, HEADS, KV_HEADS, dim, page_size, dtype)
    assert size % dtype.itemsize == 0
    buffer = torch.zeros(pages, KV_HEADS, page_size, size // dtype.itemsize, dtype=dtype)
    layer = carve_layer(plan, buffer, HEADS, dim)
    pages_of = (*(layer.bounds or ()), *(layer.means or ()))
    parts = [*layer.kv, layer.shadow.k_quant, layer.shadow.k_scale, *(x for x in pages_of if x is not None)]
    for number, part in enumerate(parts, start=1):
        lies = [part.data_ptr() - buffer.data_ptr(), *(stride * part.itemsize for stride in part.stride()[:2])]
        assert all(place % (128 if part[0, 0].nbytes >= 128 else 16) == 0 for place in lies)
        part.view(torch.uint8).fill_(number)
    for number, part in enumerate(parts, start=1):
        assert (part.view(torch.uint8) == number).all()
    assert sum(part.nbytes for part in parts) <= buffer.nbytes < sum(part.nbytes for part in parts) + pages * KV_HEADS * 256


def test_a_page_of_a_dense_model_is_k_and_v_alone():
    assert token_bytes({plan_of(Full(), dense_layers=1)}, HEADS, KV_HEADS, DIM, 16, torch.bfloat16) == 2 * DIM * 2
    # 4,672 bytes a head, 36.5 lines.
    assert token_bytes({plan_of(Full())}, HEADS, KV_HEADS, DIM, 16, torch.bfloat16) == 2 * DIM * 2 + DIM // 2 + 4 + 4


@pytest.mark.parametrize("selector", [Full(), Quest(), PageMean(), ShadowPrefix(prefix_channels=16, page_fraction=0.5)], ids=str)
def test_blocks_copied_whole_decode_as_where_they_came_from(selector):
    """To other blocks of another buffer, whose blocks lie apart, by nothing but their bytes."""
    plan = plan_of(selector, top_p=0.9)
    size = token_bytes({plan}, HEADS, KV_HEADS, DIM, 16, torch.float32)
    first = torch.zeros(12, KV_HEADS, 16, size // 4)
    second = torch.full((20, 2, KV_HEADS, 16, size // 4), torch.nan)[:, 1]
    here, there = (carve_layer(plan, buffer, HEADS, DIM) for buffer in (first, second))
    table, moved = torch.randperm(12).int().view(2, 6), torch.randperm(20)[:12].int().view(2, 6)
    lens = torch.tensor([90, 41], dtype=torch.int32)
    k, v = torch.randn(2, 2, 90, KV_HEADS, DIM)
    positions = torch.arange(90, dtype=torch.int32).expand(2, -1)
    append(k, v, here, table, lens, torch.where(positions < lens[:, None], positions, -1))
    second.view(torch.uint8)[moved.flatten().long()] = first.view(torch.uint8)[table.flatten().long()]
    q = torch.randn(2, 1, HEADS, DIM)
    for ours, copied in zip(attend(q, here, table, lens, 0.125), attend(q, there, moved, lens, 0.125), strict=True):
        assert torch.equal(ours, copied)


def test_a_buffer_of_another_layout_or_too_small_is_refused():
    with pytest.raises(ValueError, match="vLLM: kv_cache: expected heads of contiguous bytes, got 'strides"):
        carve_layer(plan_of(Full()), torch.zeros(4, 16, KV_HEADS, 200).transpose(1, 2), HEADS, DIM)
    with pytest.raises(ValueError, match="vLLM: kv_cache: expected at least [0-9]+ bytes a block and KV head, got"):
        carve_layer(plan_of(Full()), torch.zeros(4, KV_HEADS, 16, 2 * DIM), HEADS, DIM)


@pytest.mark.parametrize("page_size", [16, 32])
def test_prompts_cut_into_pages_are_written_as_if_appended_whole(page_size):
    """Chunks of several requests, some into pages that are partly full, against one append a request."""
    plan = plan_of(Quest(), page_size)
    whole = allocate_layer(plan, 30, HEADS, KV_HEADS, DIM, page_size, torch.float32, torch.device("cpu"))
    cut = allocate_layer(plan, 30, HEADS, KV_HEADS, DIM, page_size, torch.float32, torch.device("cpu"))
    table = torch.randperm(30).int().view(5, 6)
    lens = np.zeros(5, dtype=np.int32)
    for counts in ([1, 0, 7, 40, 16], [8, 3, 1, 30, 16], [0, 5, 70, 1, 17]):
        counts = np.array(counts, dtype=np.int32)
        lens = lens + counts
        starts = np.concatenate([[2], 2 + counts.cumsum()]).astype(np.int32)  # two decode rows come first
        k, v = (torch.randn(int(starts[-1]), KV_HEADS, DIM) for _ in range(2))
        request, page, token, position, live = (torch.from_numpy(x) for x in page_pieces(starts, lens, page_size))
        append(k[token], v[token], cut, table[request, page][:, None], live, position)
        for row in range(5):
            if counts[row]:
                part = slice(starts[row], starts[row + 1])
                append(k[None, part], v[None, part], whole, table[row : row + 1], torch.tensor(lens[row : row + 1]))
    for ours, expected in zip(cut.tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("counts", "prefilling", "most", "expected"),
    [
        ([1, 1, 1], None, 1, (3, 1)),
        ([1, 1, 1], [False, False, True], 1, (2, 1)),  # the last token of a prompt is no decode step
        ([1, 1, 0, 0], [False, False], 1, (2, 1)),  # padding; the engine says nothing of it
        ([1, 1, 1], [False, True, False], 1, (1, 1)),
        ([1, 5, 1], [False, True, False], 8, (3, 5)),  # with drafts, the host does not know the last row's exact length
        ([4, 1, 2, 3, 40], [False, True, False, True, True], 8, (3, 4)),
        ([1, 40, 1], [False, True, False], 8, (1, 1)),
        ([3, 3, 1], [False, False, False], 8, (3, 3)),
        ([1, 0, 4, 9], [False, False, False, False], 8, (3, 4)),
        ([0, 0], None, 8, (0, 0)),
        ([3, 3, 3], [True, True, True], 8, (0, 0)),
        ([9, 9], [False, False], 8, (0, 0)),
        ([], None, 1, (0, 0)),
    ],
)
def test_rows_are_decode_steps_because_the_engine_says_so(counts, prefilling, most, expected):
    flags = None if prefilling is None else torch.tensor(prefilling)
    assert split_rows(np.array(counts, dtype=np.int32), flags, most, sum(counts)) == expected


@pytest.mark.parametrize(
    ("counts", "prefilling", "most", "expected"),
    [
        ([1, 1, 1], [False, False, True], 1, (3, 1)),  # a prompt's last token
        ([1, 1, 0, 0], [True, True], 1, (2, 1)),
        ([3, 3, 3], [False, True, True], 8, (3, 3)),
        ([9, 9], [True, True], 8, (0, 0)),
        ([1, 2], [False, True], 1, (1, 1)),  # no graph has rows like these
        ([1, 1, 40], [False, True, True], 1, (1, 1)),
        ([], [], 1, (0, 0)),
    ],
)
def test_rows_that_a_full_graph_replays_are_decode_steps(counts, prefilling, most, expected):
    """vLLM chooses a graph by the numbers of tokens alone. A prompt's row that the metadata left out would be written at old positions."""
    assert (
        split_rows(np.array(counts, dtype=np.int32), torch.tensor(prefilling, dtype=torch.bool), most, sum(counts), replays=True)
        == expected
    )


def test_padded_rows_of_a_graph_are_decode_rows_of_length_zero():
    assert split_rows(np.array([1, 1, 0, 0]), None, 1, 4) == (4, 1)


def test_rows_of_different_numbers_of_tokens_have_their_own_last():
    assert ragged_rows(np.array([2, 2, 0])) is None
    tokens, live, places = ragged_rows(np.array([1, 3, 0, 2]))
    assert live.tolist() == [[False, False, True], [True] * 3, [False] * 3, [False, True, True]]
    assert tokens[live].tolist() == list(range(6))
    assert places.tolist() == [2, 3, 4, 5, 10, 11]


def test_settings_come_from_json_with_the_names_of_the_configuration(tmp_path):
    file = str(tmp_path / "c.safetensors")
    text = json.dumps(
        {
            "twilight": {
                "selector": {"name": "shadow_prefix", "token_budget": 512},
                "calibration": file,
                "top_p": 0.9,
                "dense_layers": 1,
                "dense_below": 0,
                "overrides": {"3": {"selector": "quest", "top_p": 0.8}, "4": {"selector": "dense"}},
                "log_every": 7,
            }
        }
    )
    parsed = settings.parse(json.loads(text))
    assert parsed.log_every == 7
    overrides = {3: LayerOverride(Quest(), 0.8), 4: LayerOverride("dense")}
    assert parsed.config == TwilightConfig(ShadowPrefix(512), 0.9, dense_layers=1, dense_below=0, overrides=overrides, calibration=file)
    assert parsed.config_of(64).page_size == 64
    dense = settings.parse({"twilight": {"selector": "dense"}}).config
    assert all(dense.layer_plan(layer, "cpu", 1).selector is None for layer in (0, 500))


def test_the_fast_configuration_is_spelt_as_the_document_says():
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text("utf-8")
    given = json.loads(re.search(r"`TwilightConfig.fast\(\)` is `(.*)`", page)[1])
    assert settings.parse({"twilight": given | {"calibration": "c"}}).config == TwilightConfig.fast(calibration="c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_q": 1}, 'vLLM: additional_config["twilight"]: expected one of selector, top_p, dense_layers, dense_below, sink_tokens, '),
        ([1], 'vLLM: additional_config["twilight"]: expected a mapping from names to values, got [1]'),
        (
            {"kv_cache_dtype": "fp8"},
            'vLLM: kv_cache_dtype: expected "auto" (scales of float8 come from prompts, and sequences share pages), got',
        ),
        ({"page_size": 16}, "vLLM: page_size: expected none, because vLLM's block_size is the page size, got 16"),
        ({"selector": "full", "top_p": 2}, "TwilightConfig: top_p: expected 0 < top_p <= 1, got 2"),
        (
            {"selector": "tidal"},
            "vLLM: selector: expected dense or a selector whose tensors lie in the pages (shadow_prefix, page_mean, quest, full, ",
        ),
        (
            {"selector": {"name": "quest", "budget": 3}},
            'vLLM: additional_config["twilight"]["selector"] (quest): expected one of token_budget',
        ),
        ({"selector": {"name": "quest", "token_budget": 0}}, "Quest: token_budget: expected >= 1, got 0"),
        ({}, "vLLM: calibration: expected a file for shadow_prefix, written by `python -m twilight_ops calibrate --model"),
        ({"selector": "full"}, "vLLM: calibration: expected a file for full, written by"),
        (
            {"selector": "full", "top_p": 1.0, "overrides": {"2": {"top_p": 0.9}}},
            "vLLM: overrides[2]: calibration: expected a file for full, written by",
        ),
        ({"selector": "full", "overrides": {"x": {}}}, "vLLM: overrides: layer: expected an integer >= 0, got 'x'"),
        (
            {"selector": "full", "overrides": {"1": {"p": 1}}},
            'vLLM: additional_config["twilight"]["overrides"][1]: expected one of selector,',
        ),
        ({"selector": "full", "log_every": -1}, "vLLM: log_every: expected >= 0, got -1"),
    ],
)
def test_a_setting_is_refused_by_name(given, message):
    with pytest.raises(ValueError) as caught:
        settings.parse({"twilight": given})
    assert str(caught.value).startswith(message)


def test_a_block_of_another_size_is_refused():
    with pytest.raises(ValueError, match="vLLM: block_size: expected 16, 32 or 64, got 128"):
        settings.parse({"twilight": {"selector": "dense"}}).config_of(128)


@pytest.mark.parametrize(("version", "line"), [("0.26.0", "0.26"), ("0.26.1", "0.26"), ("0.32.0", "0.32"), ("0.32.0+cpu", "0.32")])
def test_the_two_lines_of_vllm_are_taken(version, line):
    assert versions.check(version) == line


@pytest.mark.parametrize("version", ["0.2.6", "0.25.1", "0.27.0", "0.33.0", "1.26.0", "dev"])
def test_any_other_vllm_is_refused_by_name(version):
    with pytest.raises(ValueError, match=f"vLLM: version: expected 0.26.x or 0.32.x, got '{version}'"):
        versions.check(version)


def engine_config(**changes):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(is_hybrid=False),
        speculative_config=None,
    )
    for name, value in changes.items():
        part, _, field = name.partition("__")
        setattr(getattr(config, part) if field else config, field or part, value)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel_config__decode_context_parallel_size": 2}, "vLLM: decode_context_parallel_size: expected 1, got 2"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "vLLM: prefill_context_parallel_size: expected 1, got 2"),
        ({"model_config__is_hybrid": True}, "vLLM: model: expected attention in every layer that keeps a state, got 'Mamba or linear"),
        (
            {"speculative_config": SimpleNamespace(num_speculative_tokens=8)},
            "vLLM: num_speculative_tokens: expected at most 7, got 8",
        ),
    ],
)
def test_what_an_engine_asks_for_is_refused_by_name(changes, message):
    settings.check_engine(engine_config())
    settings.check_engine(engine_config(speculative_config=SimpleNamespace(num_speculative_tokens=7)))
    with pytest.raises(ValueError) as caught:
        settings.check_engine(engine_config(**changes))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sliding_window": 4096}, "vLLM: sliding_window: expected none, got 4096"),
        ({"sinks": torch.zeros(4)}, "vLLM: sinks: expected none, got 'Tensor'"),
        ({"alibi_slopes": [0.5]}, "vLLM: alibi_slopes: expected none, got 'list'"),
        ({"logits_soft_cap": 30.0}, "vLLM: logits_soft_cap: expected none, got 30.0"),
        ({"kv_sharing_target_layer_name": "layers.3"}, "vLLM: kv_sharing_target_layer_name: expected none, got 'layers.3'"),
        ({"kv_cache_dtype": "fp8"}, "vLLM: kv_cache_dtype: expected auto, float16 or bfloat16, got 'fp8'"),
        ({"attn_type": "encoder_decoder"}, "vLLM: attn_type: expected decoder, got 'encoder_decoder'"),
    ],
)
def test_what_a_layer_asks_for_is_refused_by_name(given, message):
    plain = {"kv_cache_dtype": "auto", "attn_type": "decoder"}
    settings.check_layer(**plain, sinks=None, logits_soft_cap=0, alibi_slopes=None)
    with pytest.raises(ValueError) as caught:
        settings.check_layer(**(plain | given))
    assert str(caught.value) == message


FullAttentionSpec = type("FullAttentionSpec", (SimpleNamespace,), {})
PLAIN_SPEC = {"sliding_window": None, "attention_chunk_size": None, "head_size": 64, "head_size_v": 64, "non_causal": False}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SimpleNamespace(**PLAIN_SPEC), "vLLM: kv_cache_spec: expected FullAttentionSpec, got 'SimpleNamespace'"),
        (FullAttentionSpec(**PLAIN_SPEC | {"sliding_window": 128}), "vLLM: sliding_window: expected none, got 128"),
        (FullAttentionSpec(**PLAIN_SPEC | {"attention_chunk_size": 8192}), "vLLM: attention_chunk_size: expected none, got 8192"),
        (FullAttentionSpec(**PLAIN_SPEC | {"head_size_v": 128}), "vLLM: head_size_v: expected 64, as head_size, got 128"),
        (FullAttentionSpec(**PLAIN_SPEC | {"non_causal": True}), "vLLM: non_causal: expected False, got True"),
    ],
)
def test_a_cache_of_another_kind_is_refused_by_name(spec, message):
    settings.check_spec(FullAttentionSpec(**PLAIN_SPEC))
    with pytest.raises(ValueError) as caught:
        settings.check_spec(spec)
    assert str(caught.value) == message


def test_each_rank_reads_its_own_heads_of_a_calibration(tmp_path):
    """By the rank that the engine names, whatever torch.distributed says or does not say."""
    plan = plan_of(ShadowPrefix(prefix_channels=8))
    layer = allocate_layer(plan, 1, 8, 4, DIM, 16, torch.float32, torch.device("cpu"))
    order = torch.stack([torch.randperm(DIM) for _ in range(4)]).int()
    layer.shadow.channel_order.copy_(order)
    layer.shadow.k_center.copy_(torch.randn(4, DIM))
    file = tmp_path / "c.safetensors"
    calibration.save([layer.shadow], file, {})
    plan = plan_of(ShadowPrefix(calibration=str(file)))
    buffer = torch.zeros(3, 2, 16, token_bytes({plan}, 4, 2, DIM, 16, torch.float32) // 4)
    for shard in range(2):
        part = carve_layer(plan, buffer, 4, DIM, index=0, shard=shard)
        assert torch.equal(part.shadow.channel_order, order[2 * shard : 2 * shard + 2])
        assert torch.equal(part.shadow.k_center, layer.shadow.k_center[2 * shard : 2 * shard + 2])
