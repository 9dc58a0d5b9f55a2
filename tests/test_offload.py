"""K and V outside the device: the same kept sets and tokens, and one clear line where they find no room."""

import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from twilight_ops import Full, PagedKVCache, Quest, ShadowPrefix, TwilightConfig, host_memory  # noqa: E402
from twilight_ops.host_memory import HostMemory  # noqa: E402
from twilight_ops.integration import CapturedStep, Decoder, TwilightCache, generate  # noqa: E402
from twilight_ops.integration.hf import attention, streaming  # noqa: E402

CPU, ROOT = torch.device("cpu"), Path(__file__).parent.parent
SELECTORS = {"full": Full(), "quest": Quest(token_budget=64), "shadow_prefix": ShadowPrefix(token_budget=64, budget_fraction=0.0)}
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# On a GPU other kernels serve a layer with copies, whose roundings reach the layers above it.
PLACES = pytest.mark.parametrize("device, hot_tokens", [("cpu", 0), ("cpu", 48), pytest.param("cuda", 0, marks=GPU)])


def config(selector="shadow_prefix", **settings):
    return TwilightConfig(SELECTORS[selector], **{"top_p": 0.7, "dense_below": 0, "recent_tokens": 8, **settings})


def make_model(device="cpu"):
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    settings = LlamaConfig(vocab_size=99, initializer_range=0.2, max_position_embeddings=4096, **sizes)
    settings.eos_token_id, settings.pad_token_id = None, 0
    settings._attn_implementation = "twilight"
    return LlamaForCausalLM(settings).to(device, torch.float32 if device == "cpu" else torch.bfloat16).eval()


class Kept:
    """A recorder: every step writes its kept positions to buffers of its own."""

    def __init__(self):
        self.steps = []

    def __call__(self, q, layer, page_table, seq_lens, sm_scale):
        heads = (q.shape[0], layer.num_kv_heads)
        buffers = (
            torch.full((*heads, page_table.shape[1] * layer.page_size), -1, dtype=torch.int32, device=q.device),
            torch.zeros(heads, dtype=torch.int32, device=q.device),
        )
        self.steps.append(buffers)
        return buffers


def run(model, settings, ids, mask=None, new_tokens=8, cache=None, **options):
    """(tokens, kept sets of every step and layer, the cache) of an eager run."""
    kept = Kept()
    if cache is None:
        cache = TwilightCache(model.config, settings, len(ids), 512, warn_never_sparse=False, recorder=kept)
    else:
        cache.sequences.recorder = kept
    found = generate(model, ids, attention_mask=mask, cache=cache, max_new_tokens=new_tokens, eos_token_ids=(), capture="eager", **options)
    return found.tokens, kept.steps, cache


def assert_equal_runs(a, b):
    assert torch.equal(a[0], b[0])
    assert len(a[1]) == len(b[1]) > 0
    for one, other in zip(a[1], b[1], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def prompt(batch=1, length=200, device="cpu"):
    return torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


@PLACES
@pytest.mark.parametrize("selector", SELECTORS)
def test_kept_sets_and_tokens_are_those_of_a_resident_cache(selector, hot_tokens, device):
    model, ids = make_model(device), prompt(2, device=device)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0  # ragged: the second sequence is shorter
    resident = run(model, config(selector), ids, mask)
    offloaded = run(model, config(selector, offload=True, hot_tokens=hot_tokens), ids, mask)
    assert_equal_runs(resident, offloaded)
    assert min(int(counts.min()) for _, counts in resident[1]) < 130  # something is pruned
    assert offloaded[2].nbytes()["offloaded"] == offloaded[2].nbytes()["kv"] == resident[2].nbytes()["kv"]


@PLACES
def test_crop_and_reset_leave_what_a_resident_cache_leaves(hot_tokens, device):
    model = make_model(device)
    caches = []
    for offload in (False, True):
        _, _, cache = run(model, config(offload=offload, hot_tokens=hot_tokens if offload else 0), prompt(device=device))
        cache.crop(-30)
        again = run(model, None, prompt(length=20, device=device), cache=cache)
        cache.reset()
        caches.append((again, run(model, None, prompt(length=150, device=device), cache=cache)))
    for a, b in zip(*caches, strict=True):
        assert_equal_runs(a, b)


def test_a_prompt_in_chunks_streams_what_is_cached_and_gives_what_one_pass_gives(monkeypatch):
    model, ids = make_model(), prompt(2, 300)
    mask = torch.ones_like(ids)
    mask[0, :33] = 0
    whole = run(model, config(), ids, mask, 1)[2]
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 64)
    calls = []
    monkeypatch.setattr(attention, "attend_streamed", lambda *a: calls.append(a) or streaming.attend_streamed(*a))
    chunked = run(model, config(offload=True), ids, mask, 1, prefill_chunk=90)[2]
    assert len(calls) > 3 * 3
    for a, b in zip(whole.paged.layers, chunked.paged.layers, strict=True):
        for one, other in zip(a.kv, b.kv, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)  # of fp32 sums in another order, layer on layer


@pytest.mark.parametrize(
    "device, dtype", [("cpu", torch.float32), ("cpu", torch.bfloat16), pytest.param("cuda", torch.bfloat16, marks=GPU)]
)
def test_streamed_attention_is_exact(device, dtype):
    q, k, v = torch.randn(1, 4, 40, 64), torch.randn(1, 4, 240, 64), torch.randn(1, 4, 240, 64)
    q, k, v = q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)
    past = [(k[:, :, a : a + 64], v[:, :, a : a + 64]) for a in (0, 64, 128)]
    past.append((k[:, :, 192:200], v[:, :, 192:200]))
    out = streaming.attend_streamed(q, k[:, :, 200:], v[:, :, 200:], past, 0.3)
    logits = (q.double() @ k.double().transpose(-1, -2)) * 0.3
    hidden = torch.ones(40, 240, device=device).tril(200) == 0
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.double()
    error = (out.double() - expected).abs().max()
    rounding = (expected.to(dtype).double() - expected).abs().max()
    assert error <= (1e-5 if dtype == torch.float32 else 8 * rounding)


def test_compiled_steps_give_the_tokens_of_a_resident_cache():
    model, ids = make_model(), prompt()
    found = []
    for settings in ({}, {"offload": True}, {"offload": True, "hot_tokens": 48}):
        cache = TwilightCache(model.config, config(**settings), 1, 256, warn_never_sparse=False)
        found.append(generate(model, ids, cache=cache, max_new_tokens=6, eos_token_ids=(), capture="compile"))
        assert (found[-1].graphs, found[-1].breaks, found[-1].recompiles) == (1, 0, 0)
        assert torch.equal(found[0].tokens, found[-1].tokens)
    assert (cache.paged.layers[-1].hot.hot_tokens >= 0).any()


def new_cache(offload=True, layers=2):
    return PagedKVCache(config(offload=offload), layers, 4, 2, 64, 1, 64, torch.float32, CPU)


def test_the_file_has_no_name_and_goes_with_a_killed_process(tmp_path):
    code = f"""
import os, signal, torch
from twilight_ops import PagedKVCache, TwilightConfig
cache = PagedKVCache(TwilightConfig(dense_below=0, offload={str(tmp_path)!r}), 2, 4, 2, 64, 1, 4096, torch.float32, "cpu")
cache.layers[1].kv.k_cache.fill_(1.0)
assert os.listdir({str(tmp_path)!r}) == []
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_file_that_may_not_grow_is_refused_before_anything_is_written(tmp_path):
    code = f"""
import resource, torch
from twilight_ops import PagedKVCache, TwilightConfig
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    PagedKVCache(TwilightConfig(dense_below=0, offload={str(tmp_path)!r}), 2, 4, 2, 64, 1, 4096, torch.float32, "cpu")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = f"TwilightConfig: offload: expected a directory that takes a file of 8.0 MiB, got '{tmp_path}': File too large\n"
    assert (done.stdout, done.returncode) == (expected, 0), done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 16 and os.listdir(tmp_path) == []


def test_a_full_file_system_is_refused_with_both_sizes(tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(ValueError, match=r"offload: expected a directory with 128\.0 KiB free for K and V, got '.*' with 12\.0 KiB$"):
        new_cache(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"offload: expected a directory that takes a file of .*: No such file or directory"):
        new_cache(tmp_path / "missing")


def test_host_memory_that_does_not_fit_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(host_memory, "available_memory", lambda: 3 << 30)
    monkeypatch.setattr(host_memory, "_touched", lambda nbytes: pytest.fail("allocated"))
    message = r"offload: expected K and V that fit the 3\.0 GiB of host memory that are free, got 122\.1 GiB"
    with pytest.raises(ValueError, match=message):
        HostMemory(2 * 32 * HostMemory.bytes_of((62_500, 8, 16, 128), torch.bfloat16), torch.device("cuda"))
    with pytest.raises(ValueError, match=r"offload: expected True on cuda, .*, got '/data'"):
        HostMemory(1, torch.device("cuda"), "/data")


def test_host_memory_is_touched_as_zeros_and_asked_for_in_one_line():
    memory = torch.frombuffer(host_memory._touched(3 << 20), dtype=torch.uint8)
    assert not memory.any() and memory.fill_(7).eq(7).all()
    with pytest.raises(ValueError, match=r"offload: expected \d+\.0 GiB of host memory, got none: Cannot allocate memory"):
        host_memory._touched(1 << 48)


def test_available_memory_is_what_the_control_group_leaves(monkeypatch):
    files = {
        "/sys/fs/cgroup/memory.max": "1000000",
        "/sys/fs/cgroup/memory.current": "900000",
        "/sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 40000\n",
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5000 kB\n",
    }

    def read(self, *_):
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(host_memory.Path, "read_text", read)
    assert host_memory.available_memory() == 140_000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert host_memory.available_memory() == 5_120_000


def test_layers_share_one_file_but_no_storage(tmp_path):
    cache = new_cache(tmp_path, layers=3)
    tensors = [tensor for layer in cache.layers for tensor in layer.kv]
    assert all(not tensor.any() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 6
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [int(tensor.unique()) for tensor in tensors] == list(range(6))
    assert cache._host.taken == cache._host.nbytes


def test_more_layers_than_announced_get_memory_of_their_own():
    cache = PagedKVCache.without_layers(config(offload=True), 1, 64)
    for heads in (2, 4, 2):
        layer = cache.add_layer(4, heads, 64, torch.float32, CPU)
        layer.kv.v_cache.fill_(heads)
    assert [int(layer.kv.v_cache.unique()) for layer in cache.layers] == [2, 4, 2]


def test_an_offloaded_cache_is_not_pickled():
    with pytest.raises(TypeError, match="PagedKVCache: pickle and copy: expected K and V on the device, got an offloaded cache"):
        pickle.dumps(new_cache())


@pytest.mark.parametrize("name, value", [("offload", True), ("hot_tokens", 8)])
def test_vllm_whose_memory_it_is_refuses_both_settings(name, value):
    from twilight_ops.integration.vllm.settings import parse

    with pytest.raises(ValueError, match=f"expected one of .*, got '{name}'"):
        parse({"twilight": {name: value}})


def test_a_layer_on_another_device_is_refused_and_the_cache_stays_as_it_was():
    model = make_model()
    cache = TwilightCache(model.config, config(offload=True), 1, 64, warn_never_sparse=False)
    rows = torch.zeros(1, 2, 4, 64)
    cache.layers[0].lazy_initialization(rows, rows)
    with pytest.raises(ValueError, match="TwilightCache: layer 1: expected device cpu, got meta"):
        cache.layers[1].lazy_initialization(rows.to("meta"), rows.to("meta"))
    assert len(cache.paged.layers) == 1


def test_the_command_says_where_keys_and_values_lie(capsys, tmp_path):
    from twilight_ops.__main__ import main

    args = ["generate", "--random-tiny", "--device", "cpu", "--capture", "eager", "--prompt", "one two three", "--max-new-tokens", "4"]
    assert main([*args, "--offload", str(tmp_path)]) == 0
    assert re.search(r"K and V +. [\d.]+ KiB in a file, [\d.]+ KiB beside them on cpu", capsys.readouterr().out)
    assert main([*args, "--offload", str(tmp_path / "missing")]) != 0
    assert "offload: expected a directory that takes a file of" in capsys.readouterr().err


def test_the_bench_finds_equal_kept_sets_and_says_what_crosses_the_bus(tmp_path):
    pytest.importorskip("rich")
    rows = tmp_path / "rows.jsonl"
    sizes = ["--device", "cpu", "--shapes", "1:1k:4/2", "--layers", "1", "--steps", "2", "--hot-tokens", "512"]
    command = [sys.executable, "-m", "bench", "run", "--op", "offload", *sizes, "--json", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["method"]: row for row in map(json.loads, rows.read_text().splitlines())}
    assert set(found) == {"fetch_dense", "resident", "zero_copy", "hot"}
    fetched = found["fetch_dense"]["bus_mib"]
    assert fetched > found["zero_copy"]["bus_mib"] > found["hot"]["bus_mib"] > 0
    assert 0 < found["hot"]["hit_rate"] < 1 and found["resident"]["overlap"] == found["hot"]["overlap"]


def test_the_example_says_that_outputs_are_equal():
    example = ROOT / "examples" / "long_context_offload.py"
    done = subprocess.run([sys.executable, str(example), "--tokens", "1024", "--layers", "1"], capture_output=True, text=True)
    assert done.stdout.endswith("equal outputs: True\n") and "K and V in a file: 2.0 MiB" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_reads_host_memory_and_gives_the_tokens_of_a_resident_cache():
    model, ids = make_model("cuda"), prompt(2, device="cuda")
    found = []
    for settings in ({}, {"offload": True}):
        before = torch.cuda.memory_allocated()
        cache = TwilightCache(model.config, config(**settings), 2, 4096, device=model.device, dtype=model.dtype, warn_never_sparse=False)
        taken = torch.cuda.memory_allocated() - before
        assert (taken < cache.nbytes()["kv"]) == bool(settings)
        found.append(generate(model, ids, cache=cache, max_new_tokens=64, eos_token_ids=()))
        assert found[-1].capture == "cuda_graph" and found[-1].graphs == 1
    assert torch.equal(found[0].tokens, found[1].tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_fills_copies_and_gives_the_tokens_of_eager_steps():
    model, ids = make_model("cuda"), prompt(2, device="cuda")
    settings, tokens = config(offload=True, hot_tokens=64), []
    for capture in (False, True):
        cache = TwilightCache(model.config, settings, 2, 512, device=model.device, dtype=model.dtype, warn_never_sparse=False)
        decoder = Decoder(model, cache, 2, eos_token_ids=(), capture="eager")
        if capture:  # of the same kernels around attention, or their roundings differ
            decoder.step = CapturedStep(decoder.step_eager, model.device)
        tokens.append(decoder.generate(ids, max_new_tokens=64).tokens)
        assert (cache.paged.layers[-1].hot.hot_tokens >= 0).any()
    assert torch.equal(*tokens)
