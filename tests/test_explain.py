"""`twilight_ops.explain`: which kernel serves a call, and why."""

import pytest
import torch
from fused_calls import needs_plan
from inputs import Shape, make_inputs, on_device

import twilight_ops
from twilight_ops import backends, launch_plan
from twilight_ops.ops.decode_attention import OPERATOR as DECODE_ATTENTION

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: nothing has to be assumed")


def explain(device: str | None = None, **flat):
    return twilight_ops.explain(*DECODE_ATTENTION.groups(DECODE_ATTENTION.values((), flat)), device=device)


def call(device: str = "meta", shape: Shape | None = None, **overrides) -> dict:
    inputs = make_inputs(shape or Shape((700, 5), 8, 2, 128, 16, 1, torch.bfloat16), bounds_dtype="uint8")
    return on_device(inputs, device).arguments("decode_attention", **overrides)


def test_a_cpu_call_is_served_by_what_the_backend_says():
    for found in (explain(**call("cpu")), explain(**call(), device="cpu")):
        native = backends.serving("decode_attention", "cpu") == "native"
        assert found.kernel == ("native CPU kernel" if native else "PyTorch reference") and found.plan is None
        assert backends.CPU.detail in str(found) and bool(found.reason) == (not native)


@needs_plan
@without_gpu
def test_a_machine_without_a_gpu_says_what_an_h200_would_do():
    found = explain(**call(selector="quest"), device="cuda")
    assert found.kernel == "fused CUDA kernel" and "as if on an H200" in found.detail and found.reason == ""
    assert (found.plan.selector, found.plan.grid) == ("quest", 4 * found.plan.cluster_size)
    assert 0 < found.plan.shared_bytes <= launch_plan.H200.shared_per_block
    for fact in ("fused CUDA kernel", "selector quest", f"{found.plan.grid} blocks", f"{found.plan.shared_bytes:,} bytes of shared memory"):
        assert fact in str(found)


@needs_plan
@without_gpu
@pytest.mark.parametrize(
    "shape, overrides, reason",
    [
        (Shape((70,), 2, 2, 96, 16, 1, torch.float16), {}, "head_dim: expected 64 or 128, got 96"),
        (Shape((70,), 2, 2, 64, 16, 1, torch.float32), {}, "q: expected a dtype of 16 bits, got 32"),
        (Shape((70,), 8, 2, 64, 16, 4, torch.float16), {}, "q: expected at most 8 query rows a KV head, got 16"),
        (Shape((70,), 72, 2, 64, 16, 1, torch.float16), {"selector": "dense"}, "q: expected at most 32 query rows a KV head, got 36"),
        (Shape((70,), 2, 2, 64, 16, 1, torch.float16), {"softcap": 50.0}, "softcap: expected None, got 50"),
        (
            Shape((70,), 2, 2, 64, 16, 1, torch.float16),
            {
                "selector": "given",
                "indices": torch.zeros(1, 2, 3, dtype=torch.int32, device="meta"),
                "counts": torch.zeros(1, 2, dtype=torch.int32, device="meta"),
            },
            "selector: expected dense, full, quest, page_mean, shadow_prefix or streaming, got given",
        ),
    ],
)
def test_what_the_fused_kernel_does_not_serve_is_left_to_the_stages_with_the_reason(shape, overrides, reason):
    found = explain(**call(shape=shape, **overrides), device="cuda")
    assert (found.kernel, found.reason, found.plan) == ("Triton stages", reason, None)
    assert reason in str(found)


@needs_plan
@without_gpu
def test_a_table_that_is_always_read_whole_says_so():
    tokens = 16 * call()["page_table"].shape[1]
    found = explain(**call(selector="quest", dense_below=tokens), device="cuda")
    assert (found.kernel, found.plan.selector) == ("fused CUDA kernel", "dense")
    assert f"  why: page_table holds {tokens} tokens, dense_below is {tokens}\n" in str(found)


def as_gpu(monkeypatch, name: str, detail: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", "NVIDIA number {}".format)
    monkeypatch.setattr(backends, "CUDA", backends.Backend("cuda", lambda: (name, detail)))


def test_a_gpu_without_the_fused_kernels_runs_the_stages_and_says_why(monkeypatch):
    as_gpu(monkeypatch, "triton", "Triton stages; _C_cuda was not built")
    found = explain(**call(), device="cuda:3")
    assert (found.kernel, found.detail, found.plan) == ("Triton stages", "cuda:3, NVIDIA number 3", None)
    assert "_C_cuda was not built" in str(found)


@needs_plan
def test_the_plan_is_for_the_gpu_that_is_here(monkeypatch):
    as_gpu(monkeypatch, "native", "fused kernels")
    few = {0: launch_plan.H200, 1: launch_plan.H200._replace(shared_per_block=1000)}
    monkeypatch.setattr(launch_plan, "limits_of", few.get)
    plans = [explain(**call(selector="quest"), device=f"cuda:{device}").plan for device in few]
    assert [plan is None for plan in plans] == [False, True]


def test_without_a_native_module_there_is_no_plan_to_ask(monkeypatch):
    monkeypatch.setattr(launch_plan, "available", lambda: False)
    monkeypatch.setattr(launch_plan.native_modules, "CPU_MODULES", ("_C_none",))
    with pytest.raises(RuntimeError, match=r"^launch plan: expected a native module, got none \(_C_none\)$"):
        launch_plan.library.__wrapped__()


def test_explaining_runs_and_writes_nothing():
    arguments = call("cpu", selector="full")
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    explain(**arguments)
    for name, value in before.items():
        torch.testing.assert_close(arguments[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_call_that_decode_attention_refuses_is_refused_alike():
    arguments = call("cpu", top_p=1.5)
    with pytest.raises(RuntimeError) as refused:
        torch.ops.twilight.decode_attention(**arguments)
    with pytest.raises(RuntimeError) as explained:
        explain(**arguments)
    assert str(explained.value) == str(refused.value)


def test_a_device_without_kernels_is_refused():
    with pytest.raises(ValueError, match=r"^explain: device: expected cpu or cuda, got meta$"):
        explain(**call())
