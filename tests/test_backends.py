"""Which kernels serve: registration, the pure-PyTorch fallback, and an install without a compiler."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fused_calls import needs_plan, planned

from twilight_ops import backends, launch_plan
from twilight_ops.ops.decode_attention import SELECTORS

ROOT = Path(__file__).resolve().parents[1]

# Runs in a process of its own: the backend is chosen once, at import.
REPORT = """
import json, torch, twilight_ops
from twilight_ops import Candidates, Pruning, backends
weights = torch.tensor([0.6, 0.3, 0.1, 0.0]).view(1, 1, 1, 4)
indices, counts, mass = twilight_ops.prune_top_p(weights, torch.tensor([5], dtype=torch.int32), Candidates(), 1, Pruning(0.85))
try:
    twilight_ops.prune_top_p(weights, torch.tensor([4], dtype=torch.int32), Candidates(), 1, Pruning(2.0))
    refused = ""
except RuntimeError as error:
    refused = str(error)
has_kernel = {op: torch._C._dispatch_has_kernel_for_dispatch_key(f"twilight::{op}", "CPU") for op in backends.OPS}
print(json.dumps({
    "name": backends.CPU.name, "detail": backends.CPU.detail, "kept": indices.tolist(), "refused": refused,
    "has_kernel": has_kernel, "file": twilight_ops.__file__,
}))
"""


def report(cwd: Path, *flags: str, **environment: str) -> dict:
    env = {k: v for k, v in os.environ.items() if not k.startswith("TWILIGHT_") and k != "PYTHONPATH"} | environment
    done = subprocess.run([sys.executable, *flags, "-c", REPORT], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sources(destination: Path) -> Path:
    """What is packaged, without built extensions, which a build would pick up again."""
    destination.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, destination)
    for name in ("twilight_ops", "integration", "csrc"):
        shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return destination


def assert_works(found: dict) -> None:
    assert found["kept"] == [[[0, 1, -1, -1]]]
    assert found["refused"].startswith("twilight::prune_top_p: top_p: expected 0 < top_p <= 1, got 2")
    assert all(found["has_kernel"].values()), found["has_kernel"]


@pytest.mark.parametrize("op", backends.OPS)
def test_every_operator_has_a_cpu_kernel_a_fake_and_the_layout_tag(op):
    operator = getattr(torch.ops.twilight, op).default
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"twilight::{op}", "CPU")
    assert torch.Tag.needs_exact_strides in operator.tags and torch.Tag.cudagraph_unsafe not in operator.tags
    assert torch._library.simple_registry.singleton.find(f"twilight::{op}").fake_impl.kernel is not None


def test_the_native_backend_serves_where_it_was_required():
    if os.environ.get("TWILIGHT_NATIVE") != "required":
        pytest.skip("TWILIGHT_NATIVE=required was not asked for")
    assert backends.CPU.name == "native", backends.CPU.detail


def test_the_reference_serves_when_asked_for():
    found = report(ROOT, PYTHONPATH=str(ROOT), TWILIGHT_CPU_BACKEND="reference")
    assert found["name"] == "reference" and "TWILIGHT_CPU_BACKEND" in found["detail"]
    assert_works(found)


def test_the_best_built_extension_serves_unless_told_otherwise():
    found = report(ROOT, PYTHONPATH=str(ROOT))
    assert (found["name"], found["detail"]) == (backends.CPU.name, backends.CPU.detail)
    assert_works(found)


def test_an_install_without_native_code_works_from_another_directory(tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), "."]
    done = subprocess.run(
        command, cwd=sources(tmp_path / "source"), env=os.environ | {"TWILIGHT_NATIVE": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(target.rglob("_C_*")), "nothing may be compiled with TWILIGHT_NATIVE=0"
    # -S: no .pth files, or the editable install of this checkout would lend its native extension.
    path = os.pathsep.join(map(str, (target, Path(torch.__file__).parents[1])))
    found = report(tmp_path, "-S", PYTHONPATH=path)
    assert Path(found["file"]).is_relative_to(target)
    assert found["name"] == "reference" and "was not built" in found["detail"]
    assert_works(found)
    command = [sys.executable, "-S", "-m", "twilight_ops", "info"]
    info = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert info.returncode == 0 and "reference" in info.stdout, info.stderr


# Batch, tokens, query and KV heads: what was fastest on an H200 (bench/results/h200_fused_time.log).
FASTEST = {
    "dense": {
        (1, 32768, 32, 8): 8,
        (1, 32768, 16, 4): 16,
        (2, 32768, 32, 8): 4,
        (4, 32768, 32, 8): 2,
        (8, 32768, 32, 8): 2,
        (64, 32768, 32, 8): 1,
        (16, 1024, 32, 8): 1,
        (64, 1024, 32, 8): 1,
        (1, 1024, 32, 32): 2,
        (8, 1024, 32, 32): 1,
    },
    "quest": {
        (1, 131072, 32, 8): 8,
        (2, 32768, 32, 8): 8,
        (4, 32768, 32, 8): 4,
        (8, 131072, 32, 8): 2,
        (16, 32768, 32, 8): 2,
        (64, 8192, 32, 8): 1,
        (64, 32768, 32, 8): 2,
        (64, 131072, 32, 8): 2,
        (1, 32768, 32, 32): 4,
        (2, 32768, 32, 32): 2,
        (16, 32768, 32, 32): 1,
    },
    "shadow_prefix": {
        (1, 131072, 32, 8): 16,
        (2, 32768, 32, 8): 8,
        (4, 32768, 32, 8): 4,
        (4, 131072, 32, 8): 16,
        (8, 32768, 32, 8): 2,
        (8, 131072, 32, 8): 16,
        (16, 32768, 32, 8): 2,
        (64, 32768, 32, 8): 4,
        (1, 32768, 32, 32): 4,
        (16, 32768, 32, 32): 2,
    },
    # On data of a real model, bench/results/h200_qwen_data.jsonl.
    "page_mean": {(1, 131072, 32, 8): 16, (8, 131072, 32, 8): 8, (8, 32768, 32, 8): 2, (64, 32768, 32, 8): 2},
    "two levels": {
        (1, 131072, 32, 8): 16,
        (1, 32768, 32, 8): 8,
        (8, 32768, 32, 8): 2,
        (8, 131072, 32, 8): 8,
        (25, 32768, 32, 8): 2,
        (64, 32768, 32, 8): 2,
        (4, 32768, 32, 32): 2,
        (64, 32768, 32, 32): 1,
    },
    # n/12 and, of an eighth of the pages, n/32, the same data.
    **dict.fromkeys(
        ("page_mean, few", "two levels, few"),
        {
            (1, 131072, 32, 8): 16,
            (1, 32768, 32, 8): 8,
            (4, 32768, 32, 8): 4,
            (8, 32768, 32, 8): 2,
            (8, 131072, 32, 8): 2,
            (25, 32768, 32, 8): 1,
            (64, 32768, 32, 8): 1,
            (64, 32768, 32, 32): 1,
        },
    ),
    "full": {(8, 32768, 32, 8): 8, (25, 32768, 32, 8): 8, (64, 32768, 32, 8): 8},
}


@needs_plan
@pytest.mark.parametrize("selector", FASTEST)
@pytest.mark.parametrize("generated", [0, 96])
def test_as_many_blocks_share_a_head_as_were_fastest(selector, generated):
    """Also with some room behind the context for what is generated."""
    for (batch, tokens, query_heads, kv_heads), blocks in FASTEST[selector].items():
        levels = {"page_fraction": 0.25, "min_scored_tokens": 8192}
        budget = {
            "quest": {"token_budget": min(8192, tokens // 4)},
            "page_mean": {"budget_fraction": 0.25},
            "page_mean, few": {"budget_fraction": 1 / 12},
            "two levels": {"budget_fraction": 0.125} | levels,
            "two levels, few": {"budget_fraction": 1 / 32, "page_fraction": 0.125, "min_scored_tokens": 4096},
        }.get(selector, {"budget_fraction": 0.125})
        plan = planned(
            "shadow_prefix" if selector.startswith("two levels") else selector.removesuffix(", few"),
            batch,
            tokens + generated,
            query_heads,
            kv_heads,
            dense_below=512,
            **budget,
        )
        assert plan.cluster_size == blocks, (batch, tokens, query_heads, kv_heads)
        assert plan.grid == batch * kv_heads * blocks and plan.serves


@needs_plan
def test_a_table_no_longer_than_dense_below_runs_dense():
    assert planned("quest", 1, 512, 32, 8, dense_below=511).selector == "quest"
    assert planned("quest", 1, 512, 32, 8, dense_below=512) == planned("dense", 1, 512, 32, 8, dense_below=512)
    assert planned("quest", 1, 512, 32, 8, dense_below=512, bounds_bits=16, query_tokens=8).serves


@needs_plan
@pytest.mark.parametrize(
    "selector, settings, reason",
    [
        ("given", {}, "selector: expected dense, full, quest, page_mean, shadow_prefix or streaming, got given"),
        ("quest", {"dtype_bits": 32}, "q: expected a dtype of 16 bits, got 32"),
        ("quest", {"head_dim": 96}, "head_dim: expected 64 or 128, got 96"),
        ("quest", {"query_tokens": 3}, "q: expected at most 8 query rows a KV head, got 12"),
        ("dense", {"query_tokens": 9}, "q: expected at most 32 query rows a KV head, got 36"),
        ("quest", {"bounds_bits": 16}, "page_bounds: expected 8 bits, got 16"),
        ("quest", {"num_pages": 2**21}, "k_cache: expected fewer than 2**32 words of 16 bytes, of 4 in the shadow, got 4294967296"),
        ("quest", {"max_pages": 0}, "page_table: expected at least one page, got 0"),
        ("full", {"max_pages": 2**16}, "page_table: expected at most 232448 bytes of shared memory a block, got 1107328"),
    ],
)
def test_a_call_that_no_plan_serves_is_refused_by_the_arguments_name(selector, settings, reason):
    assert planned("quest", 1, 4096, 32, 8).serves
    assert planned(selector, 1, 4096, 32, 8, **settings) == (reason, "dense", 0, 0, 0, 0)


@needs_plan
def test_selectors_have_the_same_names_in_python_and_in_cpp():
    assert launch_plan.library().selectors == SELECTORS


def test_poisoned_empties_are_nan(poisoned_empties):
    assert torch.empty(7).isnan().all() and torch.zeros(3).new_empty(5).isnan().all()
    assert (torch.empty(7, dtype=torch.int32) == 2**31 - 1).all()
