"""bench_llama.py and its plot: rows of a tiny model on a CPU, what they count, and figures from made-up rows."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bench_llama as bench  # noqa: E402


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

CPU = ["--shape", "tiny", "--device", "cpu", "--eager", "--layers", "3", "--warmup", "2", "--steps", "4"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(rows returned, rows of the file) of every method on a tiny model."""
    path = tmp_path_factory.mktemp("bench") / "rows" / "llama.json"
    rows = bench.main([*CPU, "--cell", "2048:2", "--prefill", "512", "--prefill-layers", "2", "--json", str(path)])
    return rows, [json.loads(line) for line in path.read_text().splitlines()]


def by_method(rows, kind):
    return {row["method"]: row for row in rows if row["kind"] == kind}


def test_every_method_gives_a_row_in_the_file(measured):
    rows, written = measured
    assert written == json.loads(json.dumps(rows))
    assert not [row["error"] for row in rows if "error" in row]
    decode, prefill = by_method(rows, "decode"), by_method(rows, "prefill")
    assert set(decode) == set(bench.DECODE_METHODS) and set(prefill) == set(bench.PREFILL_METHODS)
    for row in rows:
        assert 0 < row["p10_ms"] <= row["ms"] <= row["p90_ms"]
        assert row["torch"] == torch.__version__ and row["gpus"] == 1
    for row in decode.values():
        assert row["layers"] == 3
        assert row["tokens_per_s"] == pytest.approx(2 / row["ms"] * 1e3)
        assert row["floor_ms"] > row["weights_floor_ms"] > 0
    assert all(row["layers"] == 2 and row["dense_layers"] == 0 for row in prefill.values())


def test_floors_count_weights_once_and_the_cache_of_every_sequence(measured):
    row = by_method(measured[0], "decode")["dense"]
    vocabulary, hidden, intermediate, head_dim, layers = 512, 256, 512, 64, 3
    attention = hidden * head_dim * (4 + 2 + 2) + 4 * head_dim * hidden
    parameters = layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden + vocabulary * hidden  # the head, no embedding
    assert row["weights_floor_ms"] == pytest.approx(2 * parameters / row["read_bandwidth"] * 1e3)
    cached = 2 * 2 * layers * 2 * head_dim * 2048 * 2
    assert row["floor_ms"] - row["weights_floor_ms"] == pytest.approx(cached / row["read_bandwidth"] * 1e3)


def test_memory_beside_the_cache_is_what_the_shadow_and_the_bounds_take(measured):
    decode, prefill = by_method(measured[0], "decode"), by_method(measured[0], "prefill")
    shadow, bounds = (64 / 2 + 4) / (4 * 64), (2 * 64 + 4) / 16 / (4 * 64)
    # Counters and channel orders are a few kilobytes a layer, which show in a cache this small.
    for rows, sparse_layers in ((decode, 1 / 3), (prefill, 1.0)):
        fixed = rows["dense"]["extra_over_kv"]
        for method, share in (
            ("quest", bounds),
            ("full+twilight", shadow),
            ("quest+twilight", shadow + bounds),
            ("shadow_prefix+twilight", shadow),
        ):
            assert rows[method]["extra_over_kv"] == pytest.approx(fixed + share * sparse_layers, abs=0.01), method


def test_methods_read_the_candidates_and_keep_what_the_paper_keeps(measured):
    decode = by_method(measured[0], "decode")
    length = 2048 + 2 + 4
    assert "kept" not in decode["dense"] and "kept" not in decode[bench.HF_STATIC]
    assert decode["full+twilight"]["candidates"] == pytest.approx(length, abs=4)
    assert decode["quest"]["kept"] == decode["quest"]["candidates"] <= 512
    for method in ("full+twilight", "quest+twilight", "shadow_prefix+twilight"):
        assert 4 < decode[method]["kept"] < 120, method
        assert 0.84 < decode[method]["captured_mass"] < 0.95
    assert all(0 < decode[method]["attention_share"] < 1 for method in ("dense", *bench.SPARSE))


def test_the_logits_have_the_spread_that_was_asked_for():
    options = bench.parse_arguments(CPU)
    model, _ = bench.make_model(options)
    rms = bench.measured_query_rms(model)
    context = bench.Context.of(rms, kv_heads=2, length=4096, spread=3.7)
    keys = torch.cat([k for _, _, k, _ in context.chunks(1)], dim=1)[0]  # [4096, Hkv, D]
    for layer in range(3):
        q = torch.randn(64, 4, 64) * rms[layer]
        logits = torch.einsum("thd,nhd->htn", q, (keys * context.key_std[layer]).repeat_interleave(2, dim=1)) / 8
        assert logits.std(-1).mean() == pytest.approx(3.7, rel=0.1)
    contribution = (keys.std(0) * context.key_std[0]).gather(1, context.channel_order.long())
    assert (contribution[:, :16].square().sum(1) > 0.8 * contribution.square().sum(1)).all()
    assert all(torch.equal(a[2], b[2]) for a, b in zip(context.chunks(2), context.chunks(2), strict=True))


def test_a_method_that_fails_leaves_its_reason_and_the_run_goes_on(monkeypatch, tmp_path, capsys):
    def no_room(model, method, batch, context, options):
        if method == "quest":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nand more lines")
        return [2.0, 4.0, 3.0, 5.0], {}

    monkeypatch.setattr(bench, "decode_twilight", no_room)
    path = tmp_path / "rows.json"
    rows = bench.main([*CPU, "--cell", "64:1:quest,dense", "--json", str(path)])
    assert [row.get("ms") for row in rows] == [None, 3.5]
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert len(path.read_text().splitlines()) == 2
    shown = capsys.readouterr()
    assert "OutOfMemoryError: CUDA out of memory" in shown.err and "OutOfMemoryError" in shown.out


def test_later_rows_replace_earlier_ones_and_ratios_stay_in_their_cell():
    def row(method, ms, batch=1, **more):
        return {"kind": "decode", "shape": "s", "layers": 2, "context": 64, "batch": batch, "gpus": 1, "method": method, "ms": ms} | more

    rows = bench.latest(
        [row("dense", 9.0), row("quest", 2.0), row("dense", 8.0), row("dense", 30.0, batch=4), {"kind": "prefill"}], "decode"
    )
    assert [(r["method"], r["ms"], r["batch"]) for r in rows] == [("dense", 8.0, 1), ("quest", 2.0, 1), ("dense", 30.0, 4)]
    assert bench.speed_up(rows[1], rows, "dense") == 4.0
    assert bench.speed_up(row("quest", 3.0, batch=2), rows, "dense") is None


@pytest.mark.parametrize("text", ["32768", "32768:x", "x:1", "32768:1:dense,nothing", "32768:1:"])
def test_a_malformed_cell_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--cell", text])
    assert "--cell" in capsys.readouterr().err


def test_cells_name_their_methods():
    assert bench.parse_arguments(["--cell", "8192:max:dense,quest", "64:3"]).cell == [
        (8192, "max", ("dense", "quest")),
        (64, "3", bench.DECODE_METHODS),
    ]


def test_the_largest_batch_leaves_room_for_the_shadow_and_the_reserve(monkeypatch):
    config = bench.SHAPES["llama31-8b"]
    properties = type("Properties", (), {"total_memory": 150 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    weights = 16 * 10**9
    batch = bench.largest_batch(config, 32768, weights, torch.device("cuda"))
    assert bench.cached_bytes(config, 32768) == 4 << 30
    used = batch * (4 << 30) * 1.17 + weights + bench.RESERVE_BYTES
    assert used <= 150 * 10**9 < used + (4 << 30) * 1.17


def made_up_rows():
    rows = []
    for batch in (4, 1):
        for method, ms in ((bench.HF_STATIC, 40.0), ("dense", 20.0), ("quest", 8.0), ("quest+twilight", 5.0)):
            row = {"kind": "decode", "shape": "llama31-8b", "layers": 32, "gpus": 1, "context": 32768, "batch": batch, "method": method}
            rows.append(row | {"ms": ms * batch, "floor_ms": 4.0})
    rows[0] = {key: value for key, value in rows[0].items() if key != "ms"} | {"error": "OutOfMemoryError: none left"}
    return rows


def test_the_plot_has_a_bar_a_method_and_its_speed_up(tmp_path):
    plot = pytest.importorskip("plot_llama", reason="needs matplotlib")
    figure = plot.draw(made_up_rows())
    (ax,) = figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["batch 1", "batch 4"]
    assert sorted(bar.get_height() for bar in ax.patches) == [5.0, 8.0, 20.0, 20.0, 32.0, 40.0, 80.0]
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["0.5x", "1.0x", "2.5x", "4.0x", "failed", "1.0x", "2.5x", "4.0x"]
    assert ax.get_title() == "llama31-8b, 32k tokens"
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows()))
    plot.main([str(path), "-o", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_plot_refuses_rows_without_a_decode_step():
    plot = pytest.importorskip("plot_llama", reason="needs matplotlib")
    with pytest.raises(ValueError, match="expected decode rows"):
        plot.draw([{"kind": "prefill", "method": "dense"}])
