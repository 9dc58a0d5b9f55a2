"""The bench's own parts: what is built, counted, checked, compared and drawn. The GPU's flow runs on stand-ins of what only a GPU has."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import twilight_ops  # noqa: E402
from bench import base, checks, fit, heads, peers, phases, registry, rows, run, speed_of_light, timing, workload  # noqa: E402
from bench.__main__ import main  # noqa: E402
from bench.workload import Sizes, buffer_sets  # noqa: E402
from twilight_ops import DoubleSparsity, Full, Quest, ShadowPrefix, TwilightConfig, kernels  # noqa: E402

SMALL = Sizes(2, 1, 8, 2, 128, 16, 1024, torch.float32)
GIB = 2**30


@pytest.fixture(scope="module")
def data():
    with torch.inference_mode():
        return workload.build(SMALL, "cpu", 2)


def configured(data, selector) -> dict:
    layer = data.layers(TwilightConfig(selector=selector, top_p=0.85, dense_layers=0, dense_below=0))[1]
    return workload.call_arguments("decode_attention", data, 1, layer)


def kept_of(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    batch, max_pages = arguments["page_table"].shape
    _, kv_heads, page_size, _ = arguments["k_cache"].shape
    kept = torch.empty(batch, kv_heads, max_pages * page_size, dtype=torch.int32)
    counts = torch.empty(batch, kv_heads, dtype=torch.int32)
    workload.operator("decode_attention")(**arguments, kept_indices=kept, kept_counts=counts)
    return kept, counts


def chunk_bytes(chunk: speed_of_light.Chunks) -> list[torch.Tensor]:
    """What the reader loads, one [count, size] uint8 tensor a unit; an address outside the tensor is an error here."""
    memory = chunk.base.contiguous().view(torch.uint8).flatten()
    assert chunk.base.is_contiguous()
    found = []
    for offsets, count in zip(chunk.offsets, chunk.counts.tolist(), strict=True):
        assert (offsets[:count] % speed_of_light.VECTOR_BYTES == 0).all()
        found.append(memory[offsets[:count, None] + torch.arange(chunk.size)])
    return found


def test_buffer_sets_share_layers_and_leave_the_data_as_it_was(data):
    first, second = data.cache.layers
    assert first.kv.k_cache.data_ptr() != second.kv.k_cache.data_ptr()
    for a, b in zip(first.tensors(), second.tensors(), strict=True):
        assert torch.equal(a, b)
    pages = data.cache.page_table[1].long()
    keys = first.kv.k_cache[pages].transpose(1, 2).flatten(0, 1)  # [M * S, Hkv, D]
    assert torch.equal(keys[: SMALL.length], data.keys[1])
    assert not torch.equal(data.queries[0], data.queries[1])


def test_dense_copies_are_contiguous_and_taken_in_turn(data):
    sets = data.dense_copies()
    assert len(sets) == len(data.queries)
    assert len({k.data_ptr() for k, _ in sets}) == data.copies
    for k, v in sets:
        assert k.is_contiguous() and v.is_contiguous()
        assert torch.equal(k.transpose(1, 2), data.keys) and torch.equal(v.transpose(1, 2), data.values)


def test_exact_is_sdpa(data):
    out, lse = data.exact(1)
    k, v = data.dense_copies()[1]
    torch.testing.assert_close(out, peers.sdpa_gqa(data.queries[1], k, v, data.sm_scale))
    layer = data.layers(TwilightConfig(dense_layers=2))[1]
    ours, our_lse = workload.call("decode_attention", data, 1, layer=layer)()
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(our_lse, lse)


@torch.inference_mode()
def test_double_sparsity_has_codes_of_its_own_and_leaves_the_others_theirs(data):
    """Its prefix is its heavy channels; K, V and the shadow that other selectors read stay as they were."""
    before = [t.clone() for layer in data.cache.layers for t in layer.tensors()]
    layers = data.layers(TwilightConfig(selector=DoubleSparsity(128, 0.25, heavy_channels=24), top_p=0.95, dense_below=0))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for layer in data.cache.layers for t in layer.tensors()), strict=True))
    for layer, other in zip(layers, data.cache.layers, strict=True):
        assert (layer.shadow.prefix_channels == 24).all() and layer.shadow.k_quant.data_ptr() != other.shadow.k_quant.data_ptr()
    kept, counts = kept_of(registry.decode_arguments(data, 1, layers[1]))
    cache = data.cache
    candidates = layers[1].plan.selector.select(data.queries[1], layers[1], cache.page_table, cache.seq_lens, data.sm_scale).indices
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        assert 0 < counts[b, h] < 300 and set(kept[b, h, : counts[b, h]].tolist()) <= set(candidates[b, h].tolist())


def test_a_spread_of_logits_is_the_one_asked_for():
    wide = workload.build(Sizes(1, 1, 2, 2, 64, 16, 4096, torch.float32), "cpu", 1, spread=2.0)
    logits = torch.einsum("bthd,blhd->bhl", wide.queries[0], wide.keys) * wide.sm_scale
    assert torch.allclose(logits.std(-1), torch.tensor(2.0), atol=0.2)


@pytest.mark.parametrize("memory", [None, 150 * 10**9, 141 * 10**9, 80 * 10**9])
@pytest.mark.parametrize("heads", [8, 32])
def test_buffer_sets_fit_the_memory_and_empty_the_l2(heads, memory):
    for batch, length, _ in registry.GRIDS["all"]:
        sizes = Sizes(batch, 1, 32, heads, 128, 16, length, torch.bfloat16)
        paged, dense = buffer_sets(sizes, "cuda", memory)
        used = paged * sizes.paged_bytes + dense * sizes.kv_bytes
        if memory is not None:
            assert used <= memory
        if paged == 0:
            assert dense == 0 and sizes.paged_bytes + sizes.kv_bytes + workload.RESERVED_BYTES > memory
        elif memory is None:
            assert paged >= 2 and paged * sizes.kv_bytes > 4 * 60e6  # four times an H200's L2
            assert paged == workload.MAX_SETS or paged * sizes.touched_bytes >= min(workload.COLD_TOUCHED_BYTES, 2 * sizes.touched_bytes)
            assert dense >= 1 and dense * sizes.kv_bytes >= min(GIB, paged * sizes.kv_bytes)


def test_the_largest_cell_of_the_targets_fits_an_h200_and_the_next_does_not():
    bf16 = torch.bfloat16
    assert buffer_sets(Sizes(64, 1, 32, 32, 128, 16, 32768, bf16), "cuda", 150 * 10**9) == (2, 1)
    assert buffer_sets(Sizes(64, 1, 32, 32, 128, 16, 131072, bf16), "cuda", 150 * 10**9) == (0, 0)


def test_a_cell_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 140 * GIB))
    with pytest.raises(MemoryError, match=r"B64 .* need 78 GiB, 10 GiB are free"):
        workload.build(Sizes(64, 1, 32, 32, 128, 16, 32768, torch.bfloat16), "cuda")


def test_the_grid_has_every_cell_once_and_the_targets_first():
    every = registry.GRIDS["all"]
    assert len(every) == len(set(every)) == 32
    assert every[: len(registry.TARGETS)] == registry.TARGETS and set(registry.TARGETS) <= set(registry.GRID)


def test_speed_of_light_reads_the_kept_rows_of_k_and_v(data):
    for selector in (Quest(token_budget=256), ShadowPrefix(token_budget=128, budget_fraction=0.0, prefix_channels=32)):
        arguments = configured(data, selector)
        kept, counts = kept_of(arguments)
        candidates = torch.zeros(2, 2, 1, dtype=torch.int32), torch.ones(2, 2, dtype=torch.int32)
        *_, keys, values = speed_of_light.decode_chunks(arguments, candidates, (kept, counts))
        for chunk, expected in ((keys, data.keys), (values, data.values)):
            for unit, got in enumerate(chunk_bytes(chunk)):
                b, h = divmod(unit, SMALL.num_kv_heads)
                rows = expected[b, kept[b, h, : counts[b, h]].long(), h].contiguous()
                assert torch.equal(got.view(torch.float32), rows)


def test_speed_of_light_reads_whole_pages_bounds_and_shadow_for_quest(data):
    arguments = configured(data, Quest(token_budget=256))
    pages, counts = workload.select_call(data, "quest", 256, 1)()
    bounds, bounds_scale, codes, scales, *_ = speed_of_light.decode_chunks(arguments, (pages, counts), kept_of(arguments))
    table = data.cache.page_table.long()
    for unit in range(SMALL.lists):
        b, h = divmod(unit, SMALL.num_kv_heads)
        listed = table[b, pages[b, h, : counts[b, h]].long()]
        assert torch.equal(chunk_bytes(bounds)[unit], arguments["page_bounds"][table[b], h].flatten(1))
        assert torch.equal(chunk_bytes(codes)[unit], arguments["k_quant"][listed, h])
        assert torch.equal(chunk_bytes(scales)[unit].view(torch.bfloat16), arguments["k_scale"][listed, h].flatten(1))
        # A scale of 4 bytes lies in the 16 that are read for it.
        wanted = arguments["bounds_scale"][table[b], h].contiguous().view(torch.uint8)
        windows = chunk_bytes(bounds_scale)[unit].unfold(1, 4, 4)
        assert (windows == wanted[:, None]).all(-1).any(-1).all()


@pytest.mark.parametrize("prefix", [32, 64, 80])
def test_speed_of_light_reads_prefixes_and_tails_for_the_shadow_prefix(data, prefix):
    arguments = configured(data, ShadowPrefix(token_budget=128, budget_fraction=0.0, prefix_channels=32))
    arguments["prefix_channels"] = torch.full_like(arguments["prefix_channels"], prefix)
    tokens = torch.arange(3, 1003, 11, dtype=torch.int32).expand(2, 2, -1).contiguous()
    counts = torch.tensor([[91, 0], [17, 90]], dtype=torch.int32)
    codes, scales, tails, *_ = speed_of_light.decode_chunks(arguments, (tokens, counts), kept_of(arguments))
    table, tail = data.cache.page_table.long(), (128 - prefix) // 2
    for unit in range(SMALL.lists):
        b, h = divmod(unit, SMALL.num_kv_heads)
        block = arguments["k_quant"][table[b], h]  # [M, S * D / 2]
        assert torch.equal(chunk_bytes(codes)[unit], block[:, : 16 * prefix // 2])
        assert torch.equal(chunk_bytes(scales)[unit].view(torch.bfloat16), arguments["k_scale"][table[b], h].flatten(1))
        rows = block[:, 16 * prefix // 2 :].reshape(-1, tail)[tokens[b, h, : counts[b, h]].long()]
        windows = chunk_bytes(tails)[unit].unfold(1, tail, 4)  # a tail starts at a multiple of 4 bytes
        assert (windows == rows[:, None]).all(-1).any(-1).all()
    assert tails.nbytes == int(counts.sum()) * tails.size


def test_speed_of_light_reads_prefixes_that_differ_between_heads(data):
    arguments = configured(data, ShadowPrefix(token_budget=128, budget_fraction=0.0))
    arguments["prefix_channels"] = torch.tensor([32, 128], dtype=torch.int32)
    tokens = torch.arange(3, 1003, 11, dtype=torch.int32).expand(2, 2, -1).contiguous()
    counts = torch.tensor([[91, 80], [17, 90]], dtype=torch.int32)
    codes, _, tails, *_ = speed_of_light.decode_chunks(arguments, (tokens, counts), kept_of(arguments))
    table = data.cache.page_table.long()
    for unit in range(SMALL.lists):
        b, h = divmod(unit, SMALL.num_kv_heads)
        block = arguments["k_quant"][table[b], h]  # [M, S * D / 2]
        assert torch.equal(chunk_bytes(codes)[unit].flatten(), block[:, : 16 * (32, 128)[h] // 2].flatten())
        rows = block[:, 16 * 32 // 2 :].reshape(-1, 48)[tokens[b, h, : counts[b, h]].long()]  # multiples of 16 bytes
        assert torch.equal(chunk_bytes(tails)[unit].flatten(), rows.flatten() if h == 0 else rows.flatten()[:0])


def test_speed_of_light_reads_all_of_k_and_v_for_dense(data):
    arguments = configured(data, Quest())
    arguments["selector"] = "dense"
    chunks = speed_of_light.decode_chunks(arguments)
    assert sum(c.nbytes for c in chunks) == SMALL.kv_bytes
    keys = torch.stack(chunk_bytes(chunks[0])).view(torch.float32).view(2, 2, -1, 128)
    assert torch.equal(keys, data.keys.transpose(1, 2))


@pytest.mark.parametrize("size", [16, 32, 48, 64, 256, 4096])
def test_the_reciprocal_divides_exactly(size):
    chunk = speed_of_light.Chunks(torch.zeros(1), torch.zeros(1, 1), torch.ones(1, dtype=torch.int32), size)
    vectors = size // speed_of_light.VECTOR_BYTES
    for index in [*range(5000), *range(2**21 - 2000, 2**21)]:  # 32 MiB of a unit's vectors
        assert (index if chunk.reciprocal == 0 else index * chunk.reciprocal >> 32) == index // vectors


def row(method: str, us: float, batch: int = 1, length: int = 32768, heads: tuple[int, int] = (32, 8), **columns) -> dict:
    shape = {"B": batch, "T": 1, "Hq": heads[0], "Hkv": heads[1], "D": 128, "S": 16, "L": length}
    return {"device": "cuda", "shape": shape, "dtype": "bfloat16", "method": method, "median_us": us} | columns


def test_ratios_are_to_what_the_same_cell_measured():
    medians = {"torch_fa2": 50.0, "cudnn_sdpa": 40.0, "speed_of_light_quest": 5.0, "speed_of_light_dense": 32.0}
    medians |= {"twilight_quest": 10.0, "twilight_dense": 40.0}
    sparse = registry.ratios("twilight_quest", {"takes_dense_path": False}, medians)
    dense = registry.ratios("twilight_dense", {"takes_dense_path": True}, medians)
    assert "ratio_to_best_dense" not in registry.ratios("torch_fa2", {}, medians)  # another peer may follow
    assert sparse == {"ratio_to_best_dense": 4.0, "ratio_to_fa2": 5.0, "share_of_speed_of_light": 0.5}
    assert dense == {"ratio_to_best_dense": 1.0, "ratio_to_fa2": 1.25, "share_of_speed_of_light": 0.8}


def test_wrong_results_are_refused(data):
    exact, lse = data.exact(0)
    assert checks.exact_check(exact)(exact) is None
    assert "differs" in checks.exact_check(exact)(exact * 1.1)
    assert "differs" in checks.exact_check(exact)(torch.full_like(exact, torch.nan))
    check = checks.sparse_check(lse, 0.85)
    assert check((exact, lse - 0.15)) is None
    assert "not finite" in check((torch.full_like(exact, torch.nan), lse))
    assert "exceeds" in check((exact, lse + 0.1))
    assert "captures only" in check((exact, lse - 1.0))


def test_a_cache_in_fp8_is_timed_on_what_it_stores_and_counts_its_bytes():
    sizes = replace(SMALL, kv_cache_dtype="fp8")
    assert sizes.stored_bytes * 4 == sizes.kv_bytes == SMALL.kv_bytes and "K and V fp8" in str(sizes)
    data = workload.build(sizes, "cpu", 1)
    layer = data.layers(TwilightConfig(Full(), dense_layers=1))[0]
    out, _ = workload.operator("decode_attention")(**workload.call_arguments("decode_attention", data, 0, layer))
    torch.testing.assert_close(out, data.expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["64:32k", "64:32k:32", "a:32k:32/8", "64:32k:32/5", "0:1k:32/8", "::", "every"])
def test_a_malformed_shape_is_refused(text):
    with pytest.raises(Exception, match="expected batch:length:heads"):
        registry.shape_of(text)


def test_a_shape_is_batch_length_and_heads():
    assert registry.shape_of("64:32k:32/8") == (64, 32768, "32/8")
    assert registry.shape_of("1:1000:32/32") == (1, 1000, "32/32")


class Replayed:
    """Stands in for a captured graph: runs the calls."""

    def __init__(self, calls):
        self.calls, self.outputs = calls, [call() for call in calls]

    def __call__(self):
        for kept, call in zip(self.outputs, self.calls, strict=True):
            for old, new in zip(timing.tensors_of(kept), timing.tensors_of(call()), strict=True):
                old.copy_(new)

    def sample(self, samples):
        return [10.0 + i for i in range(samples)]


@pytest.fixture
def gpu_stand_ins(monkeypatch):
    """What the GPU's flow touches of a GPU. Peers: one right, one wrong, one that fails, one that is not installed."""
    build = workload.build
    monkeypatch.setattr(workload, "build", lambda sizes, device, sets=None, **named: build(sizes, "cpu", sets or 2, **named))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "Replay", Replayed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    monkeypatch.setattr(kernels, "stage", workload.operator)
    monkeypatch.setattr(speed_of_light, "reader", lambda chunks, cluster_size: lambda: [chunk_bytes(c) for c in chunks] and None)

    def fails(data):
        raise RuntimeError("no kernel\nand a long trace")

    found = (
        peers.peer("cudnn_sdpa", "cuda", peers.contiguous(peers.sdpa_gqa)),
        peers.peer(peers.FA2, "cuda", peers.contiguous(peers.sdpa_folded)),
        peers.peer("flex_attention", "cuda", peers.contiguous(lambda q, k, v, scale: 2 * peers.sdpa_gqa(q, k, v, scale))),
        peers.peer("flashinfer", "cuda", fails),
        peers.peer("flashinfer_tensor_cores", "cuda", fails, lambda: "not installed"),
    )
    monkeypatch.setattr(peers, "PEERS", found)


DECODE = ["run", "--op", "decode_attention"]
CELL = [*DECODE, "--device", "cuda", "--shapes", "2:1k:8/2", "--head-dim", "64", "--dtype", "bf16", "--seconds", "0.001"]


def test_the_gpu_flow_measures_every_method_and_explains_the_others(gpu_stand_ins, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main([*CELL, "--dense-below", "512", "--json", str(path)]) == 1  # 1: some methods failed
    found = {r["method"]: r for r in rows.read(path)}
    assert set(found) == {
        "cudnn_sdpa",
        "torch_fa2",
        "flex_attention",
        "flashinfer",
        *(f"{family}_{name}" for family in ("twilight", "speed_of_light") for name in ("dense", "quest", "shadow_prefix_eighth")),
        *(f"stages_{name}" for name in ("quest", "shadow_prefix_eighth")),
        *(f"{family}_{name}" for family in ("twilight", "stages") for name in ("shadow_prefix_levels", "page_mean")),
    }
    assert "differs from exact attention" in found["flex_attention"]["error"]
    assert found["flashinfer"]["error"] == "RuntimeError: no kernel"
    assert "flashinfer_tensor_cores: left out, not installed" in capsys.readouterr().out
    quest = found["twilight_quest"]
    assert quest["token_budget"] == 256 and quest["candidates"] == 256 and not quest["takes_dense_path"]
    assert 0.5 < quest["captured_mass"] <= 1 and 1 < quest["kept_tokens"] <= 256
    assert {"ratio_to_best_dense", "ratio_to_fa2", "share_of_speed_of_light", "served_by", "bytes", "spread"} <= set(quest)
    assert quest["kept_tokens"] == found["stages_quest"]["kept_tokens"]
    assert found["speed_of_light_quest"]["us_by_cluster_size"].keys() == {"1", "2", "4", "8", "16"}
    assert found["twilight_dense"]["takes_dense_path"] and found["twilight_dense"]["captured_mass"] == pytest.approx(1, abs=0.01)
    sizes = Sizes(2, 1, 8, 2, 64, 16, 1024, torch.bfloat16)
    assert found["cudnn_sdpa"]["bytes"] == found["speed_of_light_dense"]["bytes"] == sizes.kv_bytes
    # The reader's windows of 16 bytes around scales of 4 make it read somewhat more than the least.
    assert 1 <= found["speed_of_light_quest"]["bytes"] / quest["bytes"] < 1.2


def test_a_call_on_the_dense_path_is_checked_and_compared_as_one(gpu_stand_ins, tmp_path):
    path = tmp_path / "rows.jsonl"
    main([*CELL, "--dense-below", "4096", "--methods", "torch_fa2", "twilight_quest", "speed_of_light_*", "--json", str(path)])
    found = {r["method"]: r for r in rows.read(path)}
    assert set(found) == {"torch_fa2", "twilight_quest", "speed_of_light_dense"}
    assert found["twilight_quest"]["takes_dense_path"] and "share_of_speed_of_light" in found["twilight_quest"]


def test_a_resumed_run_measures_what_is_missing_against_what_is_there(gpu_stand_ins, tmp_path):
    path = tmp_path / "rows.jsonl"
    main([*CELL, "--methods", "torch_fa2", "cudnn_sdpa", "--json", str(path)])
    lines = path.read_text().splitlines()
    known = json.loads(lines[0]) | {"median_us": 1000.0}
    path.write_text(json.dumps(known) + "\n")
    assert main([*CELL, "--methods", "torch_fa2", "cudnn_sdpa", "twilight_dense", "--resume", "--json", str(path)]) == 0
    found = rows.read(path)
    assert [r["method"] for r in found] == ["cudnn_sdpa", "torch_fa2", "twilight_dense"]
    assert found[0] == known
    # 1000 us of the first run is the slower of the two dense peers.
    assert found[2]["ratio_to_best_dense"] == pytest.approx(found[1]["median_us"] / found[2]["median_us"], rel=1e-3)


def test_a_lost_device_ends_the_run_and_leaves_its_reason(gpu_stand_ins, tmp_path, monkeypatch):
    path, synchronize = tmp_path / "rows.jsonl", torch.cuda.synchronize
    lost = []

    def breaks(data):
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def raise_when_lost():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        synchronize()

    monkeypatch.setattr(torch.cuda, "synchronize", raise_when_lost)
    monkeypatch.setattr(peers, "PEERS", (peers.PEERS[0], peers.peer("flex_attention", "cuda", breaks), peers.PEERS[1]))
    assert main([*CELL, "--json", str(path)]) == 3
    found = {r["method"]: r for r in rows.read(path)}
    assert set(found) == {"cudnn_sdpa", "flex_attention"} and "illegal memory access" in found["flex_attention"]["error"]
    lost.clear()
    assert main([*CELL, "--methods", "torch_fa2", "flex_attention", "--resume", "--json", str(path)]) == 0
    assert [r["method"] for r in rows.read(path)][-1] == "torch_fa2"


def test_time_limits_leave_methods_and_cells_out_aloud(gpu_stand_ins, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    two = [*CELL, "--shapes", "1:1k:8/2", "2:1k:8/2", "--methods", "torch_fa2"]
    assert main([*two, "--method-time-limit", "0", "--json", str(path)]) == 0
    assert len(rows.read(path)) == 1 and "torch_fa2: left out, it has used" in capsys.readouterr().out
    assert main([*two, "--time-limit", "-1", "--json", str(path)]) == 0
    assert not path.exists() and capsys.readouterr().out.count("the time limit of -1 s has passed") == 2


def test_served_by_names_the_stages_where_no_fused_kernel_serves(data):
    assert registry.served_by(configured(data, Quest(token_budget=256))) == "stages"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees_with_sdpa_uncompiled(data, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    calls = peers.flex_calls(data)
    torch.testing.assert_close(calls[1](), data.exact(1)[0])


def test_flash_attention_3_is_given_what_it_takes(data, monkeypatch):
    def with_kvcache(q, k_cache, v_cache, softmax_scale):
        k, v = (t.transpose(1, 2) for t in (k_cache, v_cache))  # [B, L, Hkv, D]
        return peers.sdpa_gqa(q, k, v, softmax_scale)

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", type(sys)("fa3_fwd_interface"))
    sys.modules["fa3_fwd_interface"].flash_attn_with_kvcache = with_kvcache
    torch.testing.assert_close(peers.contiguous(peers.fa3)(data)[1](), data.exact(1)[0])


@pytest.mark.parametrize("op", [op.name for op in registry.LAYER_OPS])
def test_every_operator_is_measured_on_a_cpu(op, tmp_path):
    path = tmp_path / "rows.jsonl"
    small = ["--shapes", "1:512:4/2", "--head-dim", "64", "--dtype", "fp32", "--sets", "2", "--seconds", "0.001"]
    budgets = ["--budgets", "full", "quest:128", "shadow_prefix:64"] if op in registry.STAGE_OPS_OF else []
    assert main(["run", "--op", op, *small, *budgets, "--json", str(path)]) == 0
    found = rows.read(path)
    parsed = run.parse(registry.find(op), [*small, *budgets])
    assert [row["method"] for row in found] == [e.name for e in registry.find(op).entries(parsed) if "cpu" in e.devices]
    for row in found:
        assert row["median_us"] > 0 and row["bytes"] > 0 and row["torch"] == torch.__version__ and "commit" in row
    for row in found:
        if row.get("selector", "").startswith("shadow_prefix"):
            assert row["candidates"] == 64 and 0 < row["kept_tokens"] <= 64


def test_stages_give_each_other_what_decode_attention_attends_to(data):
    found = workload.pipeline(data, "quest", 256, 0.85)
    kept, counts = kept_of(configured(data, Quest(token_budget=256)))
    listed = found.pruned[1]
    assert torch.equal(listed["counts"], counts)
    for ours, theirs, count in zip(listed["indices"].flatten(0, 1), kept.flatten(0, 1), counts.flatten(), strict=True):
        assert torch.equal(ours[:count], theirs[:count])
    assert workload.pipeline(data, "quest", 256, 0.85) is found


def test_the_list_names_every_operator_method_and_shape(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for word in (*registry.NAMES, *registry.GRIDS, *(peer.name for peer in peers.PEERS), "twilight_quest", "prune quest:8192"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "invalid choice: 'nothing'"),
        ([*DECODE[1:], "--methods", "dreamt"], "--methods: expected some of this operator's on cpu, got dreamt"),
        ([*DECODE[1:], "--json", "rows.json"], "expected a name that ends in .jsonl, got 'rows.json'"),
        ([*DECODE[1:], "--resume"], "expected --json FILE.jsonl"),
        ([*DECODE[1:], "--query-tokens", "2"], "--query-tokens: dense peers attend with one query token"),
        (["--op", "prune_top_p", "--budgets", "quest"], "expected full, quest:TOKENS or shadow_prefix:TOKENS, got 'quest'"),
        ([*DECODE[1:], "--base", "no-such-commit"], "--base: expected a commit, a checkout or a folder"),
    ],
)
def test_a_malformed_command_says_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(rows.RESULTS.glob("*.json*")), ids=lambda path: path.name)
def test_every_result_file_is_what_its_name_says(path):
    if path.suffix == ".json":
        assert isinstance(json.loads(path.read_text()), (dict, list))
    else:
        found = rows.read(path)
        assert found and all(isinstance(row, dict) for row in found)


def test_rows_are_added_or_put_in_place_of_what_was_there(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.write(path, [{"a": 1}])
    rows.write(path, [{"a": 2}])
    assert rows.read(path) == [{"a": 1}, {"a": 2}]
    rows.write(path, [{"a": 3}], append=False)
    assert rows.read(path) == [{"a": 3}]
    with pytest.raises(ValueError, match=r"expected a name that ends in \.jsonl, got"):
        rows.write(tmp_path / "rows.json", [])


@pytest.fixture
def same_package(tmp_path):
    """A folder in which the package of this process is installed once more."""
    package = Path(twilight_ops.__file__).parent
    site = tmp_path / "site"
    site.mkdir()
    (site / "twilight_ops").symlink_to(package)
    return site


BASE = [*DECODE, "--shapes", "1:512:4/2", "--head-dim", "64", "--dtype", "fp32", "--seconds", "0.001", "--sets", "2", "--rounds", "2"]


def test_a_base_is_measured_in_turns_on_equal_data(same_package, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    methods = ["--methods", "sdpa_gqa", "twilight_dense", "twilight_quest", "--dense-below", "0"]
    assert main([*BASE, *methods, "--base", str(same_package), "--json", str(path)]) == 0
    found = rows.read(path)
    assert [row["method"] for row in found] == ["twilight_dense", "twilight_quest"]
    for row in found:
        assert row["equal_bits"] and len(row["by_turn"]) == 2 and row["base"] == str(same_package)
        assert min(row["new_us"], row["base_us"]) > 0 and min(row["by_turn"]) <= row["new_over_base"] <= max(row["by_turn"])
    assert "measured by the bench of this checkout" in capsys.readouterr().out


def test_a_base_that_cannot_be_loaded_says_so(tmp_path, capsys):
    (tmp_path / "twilight_ops").mkdir()
    (tmp_path / "twilight_ops" / "__init__.py").write_text("raise ImportError('broken')")
    with pytest.raises(SystemExit, match="2"):
        main([*BASE, "--base", str(tmp_path)])
    assert "--base: base: ImportError: broken" in capsys.readouterr().err


def test_a_commit_is_installed_once_for_equal_sources(tmp_path, monkeypatch):
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this folder has no git history")
    monkeypatch.setattr(base, "BUILT", tmp_path / "built")
    monkeypatch.setenv("TWILIGHT_NATIVE", "0")  # the Python files alone: what is compiled is `make`'s to test
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    name, site = base.installed("HEAD", tmp_path / "first")
    assert name == subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (site / "twilight_ops" / "integration" / "__init__.py").exists() and (site / "bench" / "__main__.py").exists()
    monkeypatch.setattr(base.shutil, "move", lambda *found: pytest.fail("built again"))
    assert base.installed("HEAD", tmp_path / "second") == (name, site)


plots = pytest.importorskip("bench.plots", reason="needs matplotlib")


def example_rows() -> list[dict]:
    rows = []
    for counts in ((32, 8), (32, 32)):
        for batch in (1, 64):
            for length in (1024, 32768):
                base = batch * length / 100
                rows += [
                    row(name, base * share, batch, length, counts, token_budget=length // 4, budget_fraction=0.0, takes_dense_path=False)
                    for name, share in (("torch_fa2", 2.0), ("cudnn_sdpa", 1.0), ("twilight_quest", 0.25), ("stages_quest", 0.5))
                ]
    rows.append({k: v for k, v in row("flex_attention", 0.0).items() if k != "median_us"} | {"error": "did not compile"})
    return rows


def stage_rows() -> list[dict]:
    shared = {key: value for key, value in row("", 1.0).items() if key != "method"} | {"selector": "quest:8192"}
    parts = zip(plots.STAGES, (30.0, 40.0, 20.0, 10.0), strict=True)
    return [*(shared | {"stage": stage, "median_us": us} for stage, us in parts), shared | {"stage": "prune", "selector": "full"}]


def test_what_is_not_at_equal_accuracy_is_not_drawn_beside_dense_attention():
    shape = {"shape": {"B": 8, "Hq": 32, "Hkv": 8, "L": 32768}}
    peer, ours = shape | {"method": "cudnn_sdpa", "median_us": 90.0}, shape | {"method": "twilight_quest:n/4:.95", "median_us": 30.0}
    equal, other = (
        {"setting": f"{name}:n/4:0.95", "accuracy": told} for name, told in (("quest", "equal"), ("page_mean", "not at equal accuracy"))
    )
    ax = plots.draw_equal_accuracy([peer, ours | equal, ours | other]).axes[0]
    assert [round(bar.get_height(), 6) for bar in ax.patches] == [3.0]
    with pytest.raises(ValueError, match="at equal accuracy, got none"):
        plots.draw_equal_accuracy([peer, ours | other])


def test_speedups_are_over_fa2_of_the_same_cell():
    inaccurate = row("twilight_shadow_prefix_eighth", 1.0, accuracy=rows.NOT_EQUAL)
    found = plots.speedups([*example_rows(), row("twilight_quest", 5.0, batch=8), inaccurate])
    assert len(found) == 8  # the lone row has nothing to be compared with
    assert all("twilight_shadow_prefix_eighth" not in methods for methods in found.values())
    assert found[64, 32, 8, 32768] == {"cudnn_sdpa": 2.0, "twilight_quest": 8.0, "stages_quest": 4.0}


def test_stages_stand_beside_the_call_of_the_same_budget():
    other = row("twilight_shadow_prefix_eighth", 7.0, token_budget=512, budget_fraction=0.125, takes_dense_path=False)
    ((label, parts, whole),) = plots.stages([*example_rows(), other, *stage_rows()])
    assert "quest, 8192 of 32k" in label and sum(parts.values()) == 100.0
    assert whole == 32768 / 100 * 0.25
    assert plots.stages(stage_rows()[:3]) == []


def test_plots_show_a_bar_a_method_and_cell():
    panels = [ax for ax in plots.draw_speedup(example_rows()).axes if ax.get_title()]
    assert len(panels) == 4
    for ax in panels:
        assert sorted(round(bar.get_height(), 3) for bar in ax.patches) == [2.0, 2.0, 4.0, 4.0, 8.0, 8.0]
    (ax,) = plots.draw_stages([*example_rows(), *stage_rows()]).axes
    assert sorted(round(bar.get_width(), 2) for bar in ax.patches) == [10.0, 20.0, 30.0, 40.0, 81.92]


def test_the_plot_command_writes_what_the_rows_suffice_for(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows.write(path, example_rows())
    assert main(["plot", str(path), "-o", str(tmp_path), "--prefix", "h200_"]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'h200_decode_attention_speedup.png'}" in out and "h200_llama.png: not drawn, expected decode steps" in out
    assert [path.name for path in tmp_path.glob("*.png")] == ["h200_decode_attention_speedup.png"]
    rows.write(path, [*stage_rows(), phase_row()])
    assert main(["plot", str(path), "-o", str(tmp_path)]) == 0
    assert all((tmp_path / f"decode_attention_{name}.png").stat().st_size > 5_000 for name in ("speedup", "stages", "phases"))
    rows.write(path, [], append=False)
    assert main(["plot", str(path), "-o", str(tmp_path)]) == 1


def phase_row(**more) -> dict:
    shape = {"B": 64, "T": 1, "Hq": 32, "Hkv": 8, "D": 128, "S": 16, "L": 32768}
    scored = {"query read": 2.0, "candidates scored": 20.0, "bin found": 1.0, "candidates dealt": 3.0}
    timed = scored | {"weights estimated": 10.0, "attended": 4.0} | more
    return {"shape": shape, "device": "cuda", "stage": "fused phases", "selector": "quest", "cluster_size": 2, "phase_us": timed}


def test_phases_add_up_by_what_they_are_for():
    ((label, parts, _),) = plots.phases([*example_rows(), phase_row()])
    assert label == "quest\n32/8, batch 64, 32k, 2 blocks"
    assert parts["candidates chosen"] == 4.0 and sum(parts.values()) == 40.0
    ((label, _, _),) = plots.phases([phase_row() | {"setting": "page_mean:n/12:.9"}])
    assert label.startswith("page mean:n/12:.9\n")
    with pytest.raises(ValueError, match="got dreamt"):
        plots.phases([phase_row(dreamt=1.0)])


def test_every_phase_that_the_sources_mark_is_timed_and_drawn():
    names = phases.phases_of(ROOT / "csrc")
    assert sorted(names) == sorted([phases.START, *(name for group in plots.PHASES_OF.values() for name in group)])


@pytest.mark.parametrize("selector", phases.SELECTORS)
def test_the_call_that_phases_are_read_in_is_a_valid_one(data, selector):
    budget = workload.candidate_budget(selector, data.sizes.length)
    asked = {"selector": selector, "token_budget": budget, "dense_below": 0} | phases.SELECTORS[selector]
    workload.call("decode_attention", data, 0, budget_counters=None, **asked)()


def test_phases_last_from_mark_to_mark_and_those_not_passed_are_left_out():
    clock = [(0, 0), (1000, 5000), (3000, 6000), (4000, 6500)]
    times = phases.durations(clock, ["dreamt", "start", "candidates scored", "attended"])
    assert times == {"candidates scored": 1.0, "attended": 0.5}
    with pytest.raises(ValueError, match="expected `start` first"):
        phases.durations([(5, 5), (1, 1)], ["start", "attended"])


def test_generated_heads_repeat_by_seed_and_serve_any_number_of_heads():
    for num_qo_heads, num_kv_heads in ((8, 2), (3, 3), (40, 20)):
        found = []
        for seed in (0, 0, 1):
            rng = torch.Generator().manual_seed(seed)
            text = heads.Heads.fitted(num_qo_heads, num_kv_heads, rng).sequence(300, rng)
            keys = torch.empty(300, num_kv_heads, heads.HEAD_DIM)
            text.keys(keys)
            found.append((keys, text.queries(torch.tensor([0, 299]))))
        assert found[0][1].shape == (2, num_qo_heads, heads.HEAD_DIM)
        assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
        assert not torch.equal(found[0][0], found[2][0]) and not torch.equal(found[0][1], found[2][1])


def test_a_fit_gives_back_the_process_that_it_was_fitted_to(tmp_path):
    """Means, covariances and correlations of one head, recorded from the generator itself."""
    rng = torch.Generator().manual_seed(0)
    made = heads.Heads.fitted(2, 1, rng)
    texts = []
    for _ in range(2):
        text = made.sequence(4000, rng)
        keys = torch.empty(4000, 1, heads.HEAD_DIM)
        text.keys(keys)
        rows = torch.cat([keys, text.queries(torch.arange(4000))], dim=1)
        texts.append(fit.plain(rows, heads.parameters()["theta"].item()))
    found = fit.fit(texts) | {"first": texts[0][:1, 0]}
    path = tmp_path / "heads.npz"
    fit.save(path, [found], [(12, 0)], heads.parameters()["theta"].item())
    assert path.stat().st_size < heads.DATA.stat().st_size < 1_000_000
    again = heads.Heads.fitted(2, 1, torch.Generator().manual_seed(0), path)
    scale = made.mean.square().mean().sqrt()
    assert (again.mean - made.mean).square().mean().sqrt() < 0.1 * scale
    variances = [(h.factor.square().sum(2) + h.noise.square()).sum(0) for h in (made, again)]  # [Hkv, 1 + G, D]
    assert torch.corrcoef(torch.stack([v.flatten() for v in variances]))[0, 1] > 0.95
    assert variances[1].sum() == pytest.approx(variances[0].sum().item(), rel=0.15)


def test_the_fit_that_is_kept_shows_generated_heads_beside_recorded_ones():
    table = rows.read(rows.RESULTS / "qwen_heads_fit.jsonl")
    lengths = {row["tokens"] for row in table}
    assert lengths
    for length in lengths:
        means = {row["data"]: row for row in table if row["layer"] == "mean" and row["tokens"] == length}
        recorded, generated = means["recorded"], means["generated"]
        assert generated["logit_std"] == pytest.approx(recorded["logit_std"], rel=0.1)
        for name in ("kept_p85", "kept_p95", "quest_n/4", "prefix_n/8"):
            assert generated[name] == pytest.approx(recorded[name], abs=0.04)


def test_data_are_those_asked_for_and_every_row_says_which(tmp_path, capsys):
    small = ["--shapes", "1:512:4/2", "--dtype", "fp32", "--sets", "2", "--seconds", "0.001", "--dense-below", "0"]
    small += ["--methods", "twilight_quest*"]
    for asked, expected in (([], "qwen"), (["--data", "gaussian"], "gaussian"), (["--head-dim", "64"], "gaussian")):
        path = tmp_path / f"{expected}.jsonl"
        assert main([*DECODE, *small, *asked, "--settings", "quest:n/4:.95", "--json", str(path)]) == 0
        found = rows.read(path)
        assert [row["method"] for row in found] == ["twilight_quest", "twilight_quest:n/4:.95"]
        assert all(row["data"] == expected and ("logit_std" in row) == (expected == "gaussian") for row in found)
        assert found[1]["setting"] == "quest:n/4:0.95" and 0.0 < found[1]["captured_mass"] <= 1.001
    assert "taken in turn; prefixes calibrated" in capsys.readouterr().out


def test_a_setting_is_at_equal_accuracy_only_where_that_was_measured(tmp_path):
    path = tmp_path / "accuracy.jsonl"
    assert rows.accuracy_of("quest:0.85", path) == {"setting": "quest:0.85", "accuracy": rows.NOT_MEASURED}
    assert rows.setting_of(TwilightConfig(Quest(), 0.85, dense_layers=2, recent_tokens=0)) == "quest:0.85:dense_layers=2,recent_tokens=0"

    def measured(setting, kl, change, length=31_000, tokens=128):
        texts = {"documents": ["code"], "tokens_a_document": tokens}
        return {"task": "language", "length": length, "setting": setting, "kl": kl, "perplexity_change": change} | texts

    rows.write(
        path,
        [
            measured("full:0.95", 0.001, 0.001),
            measured("full:0.95", 0.002, -0.02, tokens=384),  # other documents, more of them
            measured("quest:0.9", 0.001, -0.02),
            measured("quest:0.9", 0.002, -0.004, tokens=384),
            measured("full:0.95", 9.0, 9.0, length=8000),
            measured("quest:0.85", 0.016, 0.0),
            measured("quest:0.95", 0.001, -0.02),
            {"task": "passkey", "length": 31_000, "setting": "tidal:0.9", "score": 1.0},
        ],
    )
    equal = {"setting": "quest:0.9", "accuracy": rows.EQUAL, "kl_31k": 0.002, "perplexity_change_31k": -0.00802}
    assert rows.accuracy_of("quest:0.9", path) == equal
    assert rows.accuracy_of("full:0.95", path) == equal | {
        "setting": "full:0.95",
        "accuracy": rows.NOT_EQUAL,
        "perplexity_change_31k": -0.01479,
    }
    assert rows.accuracy_of("quest:0.85", path)["accuracy"] == rows.accuracy_of("quest:0.95", path)["accuracy"] == rows.NOT_EQUAL
    assert rows.accuracy_of("tidal:0.9", path)["accuracy"] == rows.NOT_MEASURED
