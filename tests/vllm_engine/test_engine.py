"""vLLM with Select-then-Prune attention in one process.

Its tokens are those of vLLM's own attention where nothing is left out, and its pages hold what one append of the whole sequence writes.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from engines import GPU, REQUESTS, greedy, numbers

from twilight_ops import Full, TwilightConfig
from twilight_ops.decode_step import append, attend
from twilight_ops.integration.vllm import backend, metrics
from twilight_ops.layer import allocate_layer
from twilight_ops.report import budget_report


def layers_of(engine):
    return metrics.layers_of(engine.llm.llm_engine.vllm_config)


def test_dense_tokens_are_those_of_vllms_own_attention(engine, expected):
    """64 requests through 8 slots and too few blocks, so that some are preempted and computed again; then some are aborted."""
    (prompts, counts), several = REQUESTS["several"], expected["several"]
    dense = engine({"selector": "dense"}, block_size=16, num_gpu_blocks_override=34)
    several.check(dense.generate(prompts, counts))
    assert dense.metric("vllm:num_preemptions") > 0, "nothing was preempted"
    assert all(layer.plan.selector is None and layer.shadow is None for layer in layers_of(dense))

    core, done = dense.llm.llm_engine, {}
    for name in range(8):
        core.add_request(str(name), {"prompt_token_ids": prompts[name]}, greedy(counts[name] + 8))
    for _ in range(4):
        done |= {out.request_id: list(out.outputs[0].token_ids) for out in core.step() if out.finished}
    core.abort_request([str(name) for name in range(0, 8, 2)])
    while core.has_unfinished_requests():
        done |= {out.request_id: list(out.outputs[0].token_ids) for out in core.step() if out.finished}
    several.check([done[str(name)][: counts[name]] for name in range(1, 8, 2)], slice(1, 8, 2))
    several.check(dense.generate(prompts[:8], counts[:8]), slice(8))


def test_chunks_of_1_to_8_tokens_attend_exactly(engine, expected):
    """At p = 1 every token is kept, by prompts that are cut as small as decode steps and by the steps between them."""
    chunks = set()
    exact = engine({"selector": "full", "top_p": 1.0, "dense_below": 0}, block_size=64, max_num_seqs=4, max_num_batched_tokens=8)
    build = backend.TwilightMetadataBuilder._prompts

    def watched(self, m, decodes, starts):
        chunks.update((starts[decodes + 1 :] - starts[decodes:-1]).tolist())
        return build(self, m, decodes, starts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.TwilightMetadataBuilder, "_prompts", watched)
        expected["long and short"].check(exact.generate(*REQUESTS["long and short"]))
    assert chunks == set(range(1, 9))
    assert not any(head.dense for layer in budget_report(layers_of(exact)).layers for head in layer.heads)


class Watch:
    """Stands for `attend`: keeps the kept sets of each call, and compares each with those of a cache of its own.

    That cache gets K and V of each sequence in one append, so everything that vLLM's blocks hold beside them is checked too.
    """

    def __init__(self):
        self.kept = []

    def __call__(self, q, layer, page_table, seq_lens, sm_scale, out):
        slots = page_table.shape[1] * layer.page_size
        sets = [torch.empty(q.shape[0], layer.num_kv_heads, *size, dtype=torch.int32, device=q.device) for size in ((slots,), ())]
        out, lse = attend(q, layer, page_table, seq_lens, sm_scale, *sets, out)
        lens = seq_lens.tolist()
        self.kept.append([(layer.index, lens[row], sets[0][row, :, : lens[row]].clone()) for row in range(len(lens))])

        own = allocate_layer(
            layer.plan,
            q.shape[0] * page_table.shape[1],
            q.shape[2],
            layer.num_kv_heads,
            layer.head_dim,
            layer.page_size,
            q.dtype,
            q.device,
            index=layer.index,
        )
        own.policy = layer.policy
        table = torch.arange(q.shape[0] * page_table.shape[1], dtype=torch.int32, device=q.device).view(page_table.shape)
        for row, length in enumerate(lens):
            pages = page_table[row, : -(-length // layer.page_size)].long()
            k, v = (cache[pages].transpose(1, 2).flatten(0, 1)[None, :length] for cache in layer.kv)
            append(k, v, own, table[row : row + 1], seq_lens[row : row + 1])
        fresh = [torch.empty_like(tensor) for tensor in sets]
        expected, _ = attend(q, own, table, seq_lens, sm_scale, *fresh)
        assert torch.equal(sets[1], fresh[1])
        assert all(torch.equal(a[row, :, :n], b[row, :, :n]) for a, b in [(sets[0], fresh[0])] for row, n in enumerate(lens))
        assert torch.equal(out, expected)
        return out, lse


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(backend, "attend", watch)
    return watch


def test_pages_serve_every_selector_and_a_cached_prefix_changes_nothing(engine, calibrated, watch, monkeypatch):
    """A layer each of dense, ShadowPrefix, Quest and Full. The prompt whose prefix is cached runs in the same last chunk as the one that is
    computed whole, so tokens and kept sets are the same bit by bit."""
    overrides = {"0": {"selector": "dense"}, "2": {"selector": {"name": "quest", "token_budget": 48}}, "3": {"selector": "full"}}
    twilight = {"selector": calibrated, "calibration": calibrated["calibration"], "top_p": 0.9, "dense_below": 0, "overrides": overrides}
    twilight |= {"sink_tokens": 2, "recent_tokens": 4}
    lines = []
    monkeypatch.setattr(metrics.logger, "info", lambda text, *values: lines.append(text % values))
    sparse = engine(twilight | {"log_every": 5}, block_size=16)
    prefix, end = numbers(192, 7), numbers(40, 8)

    def run(prompt):
        watch.kept.clear()
        (out,) = sparse.outputs([prompt], 16)
        return list(out.outputs[0].token_ids), out.num_cached_tokens, list(watch.kept)

    whole, cached, sets = run(prefix + end)
    assert cached == 0 and len(sets) == 15 * 4
    sparse.llm.reset_prefix_cache()
    run(prefix + numbers(9, 9))
    again, cached, again_sets = run(prefix + end)
    assert cached == 192
    assert again == whole
    for first, second in zip(sets, again_sets, strict=True):
        for (layer, length, kept), (other_layer, other_length, other_kept) in zip(first, second, strict=True):
            assert (layer, length) == (other_layer, other_length)
            assert torch.equal(kept, other_kept)
    pruned = {layer: (kept >= 0).sum() < kept.numel() for (layer, _, kept) in (call[0] for call in sets)}
    assert pruned == {0: False, 1: True, 2: True, 3: True}

    _, cached, _ = run(prefix + end)
    assert cached == 224, "all but the last token can come from the cache"

    # Mixed batches: prompts arrive while others decode.
    sparse.generate(REQUESTS["long and short"][0], [3, 20, 9, 14, 25, 6, 11, 2, 30, 5])

    report = budget_report(layers_of(sparse))
    assert [layer.selector for layer in report.layers] == ["dense", "shadow_prefix", "quest", "full"]
    assert 0 < report.sparse.pruned < 1 and report.sparse.dense == 0
    assert lines[0].startswith("twilight: steps 1 to 5: 3 of 4 layers are sparse")
    assert "% pruned), mass 0.9" in lines[2] and "no call of theirs took the dense path" in lines[2]


@pytest.mark.skipif(GPU, reason="the host copies between the caches of two engines; on a GPU one engine's memory is all there is")
def test_a_connector_brings_whole_blocks_to_another_engine(engine, calibrated, tmp_path):
    """vLLM's example connector writes the blocks of prompts to files and takes them from there: tokens and kept sets are the same."""
    overrides = {"0": {"selector": "dense"}, "2": {"selector": {"name": "quest", "token_budget": 48}}, "3": {"selector": "page_mean"}}
    twilight = {"selector": calibrated, "calibration": calibrated["calibration"], "top_p": 0.9, "dense_below": 0, "overrides": overrides}
    options = {"block_size": 16, "enable_prefix_caching": False, "max_num_batched_tokens": 512}
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    prompts = [numbers(length, length) for length in (200, 100, 40)]
    found = []
    for transfer in (None, connector, connector):
        made = engine(twilight, **options, kv_transfer_config=transfer)
        outs = made.outputs(prompts, 24)
        found.append([list(out.outputs[0].token_ids) for out in outs])
        cached = [out.num_cached_tokens for out in outs]
        report = budget_report(layers_of(made))
        assert 0 < report.sparse.pruned < 1
        del made, outs
        gc.collect()
    assert cached == [192, 96, 32]
    assert found[0] == found[1] == found[2]


def test_an_engine_says_what_it_lacks(engine):
    with pytest.raises(
        ValueError, match="vLLM: calibration: expected a file for shadow_prefix, written by `python -m twilight_ops calibrate"
    ):
        engine({})
    with pytest.raises(ValueError, match='vLLM: attention_backend: expected CUSTOM, because additional_config has "twilight", got None'):
        engine(None, additional_config={"twilight": {"selector": "dense"}})
    with pytest.raises(ValueError, match="vLLM: block_size: expected 16, 32 or 64, got 128"):
        engine({"selector": "dense"}, block_size=128)


def test_without_dense_below_a_step_takes_the_break_even_of_its_own_batch():
    config = TwilightConfig(Full())
    layer = allocate_layer(config.layer_plan(0, "cuda", 64 * 8), 4, 32, 8, 64, 16, torch.float32, torch.device("cpu"))
    engine = SimpleNamespace(device_type="cuda", settings=SimpleNamespace(config=config))
    impl = SimpleNamespace(engine=engine, num_kv_heads=8, _by_rows={})
    lengths = {rows: backend.TwilightImpl._for_rows(impl, layer, rows).policy.dense_below for rows in (1, 4, 64)}
    assert lengths == {1: 131_072, 4: 32_768, 64: layer.policy.dense_below}
    assert backend.TwilightImpl._for_rows(impl, layer, 4).kv is layer.kv
    engine.settings.config = replace(config, dense_below=7)
    assert backend.TwilightImpl._for_rows(impl, layer, 1) is layer


def flash_attention(q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, softmax_scale, causal, block_table, fa_version):
    """What FlashAttention documents for a paged cache [P, S, Hkv, D], row by row."""
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert causal and max_seqlen_k == max(lens) and max_seqlen_q == max(last - first for first, last in pairwise(starts))
    for row, (first, last) in enumerate(pairwise(starts)):
        keys, values = (cache[block_table[row].long()].flatten(0, 1)[: lens[row]].repeat_interleave(2, 1) for cache in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[first:last], keys) * softmax_scale
        hidden = torch.ones(last - first, lens[row], dtype=torch.bool).triu(lens[row] - (last - first) + 1)
        out[first:last] = torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)


@pytest.mark.parametrize("counts", [[1, 1, 1], [7, 40]])
def test_a_dummy_run_writes_nothing(engine, counts):
    """Ranks of data parallelism run along with no request of theirs: no slots, and the block table of the step before."""
    small = engine({"selector": "full", "top_p": 1.0, "dense_below": 0})
    small.generate([numbers(50, 1)], 4)
    runner = small.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    builder = runner.attn_groups[0][0].get_metadata_builder()
    layer, tokens = builder.layers[0], sum(counts)
    device, lens = layer.kv_cache.device, torch.tensor(counts, dtype=torch.int32)
    batch = SimpleNamespace(
        num_reqs=len(counts),
        num_actual_tokens=tokens,
        query_start_loc_cpu=torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        is_prefilling=torch.zeros(len(counts), dtype=torch.bool),
        causal=True,
        seq_lens=lens.to(device),
        seq_lens_cpu_upper_bound=lens,
        block_table_tensor=torch.arange(1, 1 + 4 * len(counts), dtype=torch.int32, device=device).view(len(counts), 4),
        slot_mapping=torch.full((tokens,), -1, device=device),
    )
    before, metadata = layer.kv_cache.clone(), builder.build(0, batch)
    q, k, v = (torch.randn(tokens, heads, 64, dtype=before.dtype, device=device) for heads in (4, 2, 2))
    layer.impl.forward(layer, q, k, v, layer.kv_cache, metadata, torch.empty_like(q))
    assert torch.equal(layer.kv_cache.view(torch.uint8), before.view(torch.uint8)) and before.any()


@pytest.mark.skipif(GPU, reason="stands for a GPU where there is none")
def test_a_gpu_finds_its_layers_before_it_captures_a_graph_and_hands_prompts_to_flash_attention(engine, expected):
    """What is counted while graphs are captured is forgotten at the first step. FlashAttention itself is written out here."""
    small = engine({"selector": "full", "top_p": 1.0, "dense_below": 0})
    runner = small.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    builder = runner.attn_groups[0][0].get_metadata_builder()
    assert layers_of(small) == []
    batch = SimpleNamespace(
        num_reqs=4,
        num_actual_tokens=4,
        query_start_loc_cpu=torch.arange(5, dtype=torch.int32),
        is_prefilling=None,
        causal=True,
        seq_lens=torch.zeros(4, dtype=torch.int32),
        block_table_tensor=torch.zeros(4, 16, dtype=torch.int32),
        slot_mapping=torch.full((4,), -1),
    )
    metadata = builder.build_for_cudagraph_capture(batch)
    assert (metadata.decodes, metadata.query_tokens, metadata.ragged, metadata.prompts) == (4, 1, None, None)
    layers = layers_of(small)
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    for layer in layers:
        layer.budget_counters += 1
    small.generate([numbers(20, 1)], 4)
    assert all(a is b for a, b in zip(layers_of(small), layers, strict=True))
    assert {head.calls for layer in budget_report(layers).layers for head in layer.heads} == {3}

    for layer in builder.layers:
        layer.impl.attend_prompts = partial(backend._attend_on_gpu, flash_attention, 3)
    expected["four"].check(small.generate(*REQUESTS["four"]))
