"""Whole models: rows of a tiny one on a CPU, what they count, and figures from made-up rows."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import twilight_ops  # noqa: E402
from bench import llama, rows, run  # noqa: E402
from bench.__main__ import main  # noqa: E402


def bf16_attention_fails() -> str:
    """What PyTorch's own bf16 attention, a peer of the bench, says where ATEN_CPU_CAPABILITY hides a CPU's AVX-512 from it, or ""."""
    rows = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(rows, rows, rows, is_causal=True)
    except RuntimeError as error:
        return str(error)
    return ""


FAILS = bf16_attention_fails()
pytestmark = pytest.mark.skipif(FAILS != "", reason=f"PyTorch's attention in bf16 fails here: {FAILS}")

CPU = ["--model", "tiny", "--device", "cpu", "--eager", "--layers", "3", "--warmup", "2", "--steps", "4"]
DECODE = ["run", "--op", "llama", *CPU]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of every method on a tiny model, by kind and method."""
    path = tmp_path_factory.mktemp("bench") / "rows" / "llama.jsonl"
    assert main([*DECODE, "--shapes", "2:2k", "--json", str(path)]) == 0
    prompt = ["run", "--op", "prefill", *CPU, "--shapes", "1:512", "--prefill-layers", "2"]
    assert main([*prompt, "--json", str(path), "--append"]) == 0
    found = rows.read(path)
    return {kind: {row["method"]: row for row in found if row["kind"] == kind} for kind in ("decode", "prefill")}


def test_every_method_gives_a_row_in_the_file(measured):
    decode, prefill = measured["decode"], measured["prefill"]
    assert set(decode) == {llama.HF_STATIC, *llama.OURS} and set(prefill) == {llama.HF_DYNAMIC, *llama.OURS}
    for row in [*decode.values(), *prefill.values()]:
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        assert row["torch"] == torch.__version__ and row["gpus"] == 1
    for row in decode.values():
        assert row["layers"] == 3
        assert row["tokens_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
        assert row["floor_ms"] > row["weights_floor_ms"] > 0
    assert all(row["layers"] == 2 and row["dense_layers"] == 0 for row in prefill.values())


def test_floors_count_weights_once_and_the_cache_of_every_sequence(measured):
    row = measured["decode"]["dense"]
    vocabulary, hidden, intermediate, head_dim, layers = 512, 256, 512, 64, 3
    attention = hidden * head_dim * (4 + 2 + 2) + 4 * head_dim * hidden
    parameters = layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden + vocabulary * hidden  # the head, no embedding
    assert row["weights_floor_ms"] == pytest.approx(2 * parameters / row["read_bandwidth"] * 1e3)
    cached = 2 * 2 * layers * 2 * head_dim * 2048 * 2
    assert row["floor_ms"] - row["weights_floor_ms"] == pytest.approx(cached / row["read_bandwidth"] * 1e3)


def test_memory_beside_the_cache_is_what_the_shadow_and_the_bounds_take(measured):
    decode, prefill = measured["decode"], measured["prefill"]
    shadow, bounds = (64 / 2 + 4) / (4 * 64), (2 * 64 + 4) / 16 / (4 * 64)
    means = shadow / 16
    # Counters and channel orders are a few kilobytes a layer, which show in a cache this small.
    for found, sparse_layers in ((decode, 1 / 3), (prefill, 1.0)):
        fixed = found["dense"]["extra_over_kv"]
        for method, share in (
            ("quest", bounds),
            ("full+twilight", shadow),
            ("quest+twilight", shadow + bounds),
            ("shadow_prefix+twilight", shadow + means),
        ):
            assert found[method]["extra_over_kv"] == pytest.approx(fixed + share * sparse_layers, abs=0.01), method


def test_methods_read_the_candidates_and_keep_what_the_paper_keeps(measured):
    decode = measured["decode"]
    length = 2048 + 2 + 4
    assert "kept" not in decode["dense"] and "kept" not in decode[llama.HF_STATIC]
    assert decode["full+twilight"]["candidates"] == pytest.approx(length, abs=4)
    assert decode["quest"]["kept"] == decode["quest"]["candidates"] <= 512
    for method in ("full+twilight", "quest+twilight", "shadow_prefix+twilight"):
        assert 4 < decode[method]["kept"] < 120, method
        assert 0.84 < decode[method]["captured_mass"] < 0.95
    assert all(0 < decode[method]["attention_share"] < 1 for method in llama.OURS)


def test_a_lossless_round_counts_the_tokens_that_its_acceptance_gives(tmp_path):
    path = tmp_path / "lossless.jsonl"
    more = ["--shapes", "2:1k", "--drafts", "3", "--acceptance", "0.5", "--json", str(path)]
    assert main(["run", "--op", "lossless", *CPU, *more]) == 0
    found = {row["method"]: row for row in llama.LOSSLESS.compared(rows.read(path))}
    assert set(found) == {"dense", *llama.LOSSLESS.ours}
    dense = found.pop("dense")
    assert dense["tokens_per_s"] == pytest.approx(2 / dense["ms"] * 1e3) and dense["x_dense"] == 1.0
    for row in found.values():
        assert row["tokens_a_round"] == 1.875
        assert row["tokens_per_s"] == pytest.approx(2 * 1.875 / row["ms"] * 1e3)
        assert row["x_dense"] == pytest.approx(row["tokens_per_s"] / dense["tokens_per_s"])
        assert row["ms"] == pytest.approx(3 * row["draft_ms"] + row["check_ms"])


def test_the_logits_have_the_spread_that_was_asked_for():
    model, _ = llama.make_model(run.parse(llama.DECODE, CPU))
    rms = llama.measured_query_rms(model)
    context = llama.Context.of(rms, kv_heads=2, length=4096, spread=3.7)
    keys = torch.cat([k for _, _, k, _ in context.chunks(1)], dim=1)[0]  # [4096, Hkv, D]
    for layer in range(3):
        q = torch.randn(64, 4, 64) * rms[layer]
        logits = torch.einsum("thd,nhd->htn", q, (keys * context.key_std[layer]).repeat_interleave(2, dim=1)) / 8
        assert logits.std(-1).mean() == pytest.approx(3.7, rel=0.1)
    contribution = (keys.std(0) * context.key_std[0]).gather(1, context.channel_order.long())
    assert (contribution[:, :16].square().sum(1) > 0.8 * contribution.square().sum(1)).all()
    assert all(torch.equal(a[2], b[2]) for a, b in zip(context.chunks(2), context.chunks(2), strict=True))


def test_a_method_that_fails_leaves_its_reason_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    def no_room(name, data, options):
        if name == "quest":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more lines")
        return llama.Method(name, [], sampled=lambda seconds: [2e3, 4e3, 3e3, 5e3])

    monkeypatch.setattr(llama.DECODE, "method", no_room)
    path = tmp_path / "rows.jsonl"
    assert main([*DECODE, "--shapes", "1:64", "--methods", "quest", "dense", "--json", str(path)]) == 1
    found = {row["method"]: row for row in rows.read(path)}
    assert found["dense"]["ms"] == 3.5 and "ms" not in found["quest"]
    assert found["quest"]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert "quest: OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


def test_later_rows_replace_earlier_ones_and_ratios_stay_in_their_cell():
    def row(method, ms, batch=1, **more):
        return {"kind": "decode", "shape": "s", "layers": 2, "context": 64, "batch": batch, "gpus": 1, "method": method, "ms": ms} | more

    measured = [row("dense", 9.0), row("quest", 2.0), row("dense", 8.0), row("dense", 30.0, batch=4), {"kind": "prefill"}]
    found = rows.latest(measured, "decode")
    assert [(r["method"], r["ms"], r["batch"]) for r in found] == [("dense", 8.0, 1), ("quest", 2.0, 1), ("dense", 30.0, 4)]
    assert rows.speed_up(found[1], found, "dense") == 4.0
    assert rows.speed_up(row("quest", 3.0, batch=2), found, "dense") is None


@pytest.mark.parametrize("selector", ["page_mean:n/8", "shadow_prefix:n/8"])
def test_a_setting_is_a_further_method_with_its_own_p(tmp_path, selector):
    path, setting = tmp_path / "llama.jsonl", f"{selector}:.9"
    more = ["--shapes", "2:2k", "--settings", setting, "--methods", "dense", setting, "--dense-below", "0", "--json", str(path)]
    assert main([*DECODE, *more]) == 0
    found = {row["method"]: row for row in rows.read(path)}
    assert set(found) == {"dense", setting}
    row = found[setting]
    assert row["setting"] == f"{selector}:0.9:dense_layers=2"
    assert row["kept"] < row["candidates"] < row["live"] / 4
    assert main([*DECODE, *more, "--resume"]) == 0
    assert len(rows.read(path)) == 2, "measured again"


@pytest.mark.parametrize("text", ["dense", "nothing:.9", "sparq:.9", "quest", "full:.9:kv_cache_dtype=fp8"])
def test_a_setting_that_cannot_be_filled_or_told_apart_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*DECODE, "--settings", text])
    assert "--settings: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["32768", "x:1", "0:1k", "1:0", "1:32k:32/8", ":"])
def test_a_malformed_cell_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*DECODE, "--shapes", text])
    assert "expected batch:context such as 4:32k or max:32k" in capsys.readouterr().err


def test_cells_are_batch_and_context():
    assert run.parse(llama.DECODE, [*CPU, "--shapes", "max:8k", "3:64"]).shapes == [("max", 8192), ("3", 64)]


@pytest.mark.slow
def test_a_step_is_compared_with_the_same_step_of_another_package(tmp_path):
    (tmp_path / "twilight_ops").symlink_to(Path(twilight_ops.__file__).parent)
    path = tmp_path / "rows.jsonl"
    assert main([*DECODE, "--shapes", "1:64", "--methods", "dense", "--rounds", "1", "--base", str(tmp_path), "--json", str(path)]) == 0
    (row,) = rows.read(path)
    assert row["base_us"] > 0 and row["equal_bits"] is None


def test_the_largest_batch_leaves_room_for_the_shadow_and_the_reserve(monkeypatch):
    config = llama.SHAPES["llama31-8b"]
    properties = type("Properties", (), {"total_memory": 150 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    weights = 16 * 10**9
    batch = llama.largest_batch(config, 32768, weights, torch.device("cuda"))
    assert llama.cached_bytes(config, 32768) == 4 << 30
    used = batch * (4 << 30) * 1.17 + weights + llama.RESERVE_BYTES
    assert used <= 150 * 10**9 < used + (4 << 30) * 1.17
    assert llama.cached_bytes(config, 32768, "fp8") == 2 << 30
    assert 42 <= llama.largest_batch(config, 32768, weights, torch.device("cuda"), "fp8") < 2 * batch


def made_up_rows():
    found = []
    for batch in (4, 1):
        for method, ms in ((llama.HF_STATIC, 40.0), ("dense", 20.0), ("quest", 8.0), ("quest+twilight", 5.0)):
            row = {"kind": "decode", "shape": "llama31-8b", "layers": 32, "gpus": 1, "context": 32768, "batch": batch, "method": method}
            found.append(row | {"ms": ms * batch, "floor_ms": 4.0})
    found[0] = {key: value for key, value in found[0].items() if key != "ms"} | {"error": "OutOfMemoryError: none left"}
    return found


def test_the_plot_has_a_bar_a_method_and_its_speed_up(tmp_path):
    plots = pytest.importorskip("bench.plots", reason="needs matplotlib")
    (ax,) = plots.draw_llama(made_up_rows()).axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["batch 1", "batch 4"]
    assert sorted(bar.get_height() for bar in ax.patches) == [5.0, 8.0, 20.0, 20.0, 32.0, 40.0, 80.0]
    assert [text.get_text().strip() for text in ax.texts] == ["0.5x", "1.0x", "2.5x", "4.0x", "failed", "1.0x", "2.5x", "4.0x"]
    assert ax.get_title() == "llama31-8b, 32k tokens"
    with pytest.raises(ValueError, match="expected decode steps"):
        plots.draw_llama([{"kind": "prefill", "method": "dense"}])
