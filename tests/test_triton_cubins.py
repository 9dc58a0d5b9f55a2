"""Every Triton kernel compiled to machine code for sm_80 and sm_90, on a machine without a GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from custom_selector import launch, page_scores_kernel
from test_custom_selector import scored
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from twilight_ops import (
    KV,
    Always,
    Budget,
    Candidates,
    Observation,
    PageBounds,
    PageLevel,
    PageMeans,
    Paging,
    Policy,
    Pruning,
    Shadow,
    kernels,
)
from twilight_ops.arguments import FP8, HotRows, Scales
from twilight_ops.capacity import COUNTER_COLUMNS
from twilight_ops.kernels import _launch
from twilight_ops.kernels.append_kv import append_kv
from twilight_ops.kernels.decode_attention import decode_attention
from twilight_ops.kernels.decode_attention_hot import decode_attention_hot
from twilight_ops.kernels.estimate_weights import estimate_weights
from twilight_ops.kernels.prune_top_p import prune_top_p

# Shared memory that a block may have: on sm_86 and sm_89 the least of all that count as sm_80 and newer.
SHARED_LIMIT = 99 * 1024
MULTIPROCESSORS = 108


@dataclass
class Recorder:
    """Stands in for the launch of every kernel: compiles it for each architecture, for exactly the arguments of the call."""

    architectures: tuple[int, ...]
    compiled: dict[tuple, object] = field(default_factory=dict)

    def launch(self, kernel: JITFunction, *args, grid, warmup, **kwargs) -> None:
        for architecture in self.architectures:
            target = GPUTarget("cuda", architecture, 32)
            backend = make_backend(target)
            options = {**kwargs, "debug": False}
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            bound, specialization, options = bind(*args, **options)
            options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
            source = ASTSource(kernel, signature, constants, attributes)
            key = (architecture, kernel.__name__, source.hash(), str(options))
            if key not in self.compiled:
                self.compiled[key] = triton.compile(source, target=target, options=options.__dict__)

    def names(self, architecture: int) -> set[str]:
        return {key[1] for key in self.compiled if key[0] == architecture}


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    recorder = Recorder((80, 90))
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **kwargs: recorder.launch(kernel, *args, **kwargs))
    monkeypatch.setattr(_launch, "_multiprocessors", lambda index: MULTIPROCESSORS)
    return recorder


def every_kernel() -> set[str]:
    """Names of all kernels of the package: whatever is jitted and named so."""
    names = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        members = vars(importlib.import_module(f"{kernels.__name__}.{module.name}"))
        names |= {name for name, value in members.items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
    return names


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def decode(
    selector: str,
    dtype: torch.dtype,
    dim: int,
    page: int,
    max_pages: int,
    query_tokens: int = 1,
    group: int = 4,
    model_bounds: bool = False,
    page_fraction: float = 1.0,
    head_top_p: torch.Tensor | None = None,
    hot_rows: int = 0,
    fp8: bool = False,
    softcap: float | None = None,
):
    """One append and one staged decode step of nothing: only launches are made, and those are recorded."""
    batch, kv_heads, pages, ints = 2, 2, 3, torch.int32
    cache = KV(*(empty(pages, kv_heads, page, dim, dtype=FP8 if fp8 else dtype) for _ in range(2)))
    scales = Scales(empty(kv_heads), empty(kv_heads), empty(kv_heads, dim)) if fp8 else None
    codes = (empty(pages, kv_heads, page * dim // 2, dtype=torch.uint8), empty(pages, kv_heads, page, 2, dtype=torch.bfloat16))
    shadow = Shadow(*codes, empty(kv_heads, dim, dtype=ints), empty(kv_heads, dtype=ints), empty(kv_heads, dim))
    bounds = PageBounds(empty(pages, kv_heads, 2, dim, dtype=torch.uint8), empty(pages, kv_heads, 2, dtype=torch.bfloat16))
    means = PageMeans(empty(pages, kv_heads, dim // 2, dtype=torch.uint8), empty(pages, kv_heads, 2, dtype=torch.bfloat16))
    paging = Paging(empty(batch, max_pages, dtype=ints), empty(batch, dtype=ints))
    if model_bounds:
        bounds = PageBounds(empty(pages, kv_heads, 2, dim, dtype=dtype))
    candidates = Candidates()
    if selector == "given":
        candidates = Candidates(empty(batch, kv_heads, 40, dtype=ints), empty(batch, kv_heads, dtype=ints))
    new = [empty(batch, query_tokens, kv_heads, dim, dtype=dtype) for _ in range(2)]
    append_kv(*new, cache, paging, None, shadow, bounds, means, scales)
    q = empty(batch, query_tokens, kv_heads * group, dim, dtype=dtype)
    counters = torch.empty(kv_heads, COUNTER_COLUMNS, dtype=torch.int64)
    policy = Policy(selector, Budget(1024, 0.125), Pruning(0.85, head_top_p), level=PageLevel(page_fraction))
    decode_attention(q, cache, paging, policy, dim**-0.5, shadow, bounds, candidates, Observation(counters), means, None, scales, softcap)
    if hot_rows:
        copies = (empty(batch, kv_heads, hot_rows, dim, dtype=dtype) for _ in range(2))
        hot = HotRows(*copies, *(empty(batch, kv_heads, hot_rows, dtype=ints) for _ in range(2)))
        observe = Observation(counters)
        decode_attention_hot(q, cache, paging, policy, dim**-0.5, hot, shadow, bounds, candidates, observe, means, None, softcap)
    return q, shadow, paging


def test_every_kernel_compiles_for_sm_80_and_sm_90(recorder):
    half, brain = torch.float16, torch.bfloat16
    q, shadow, paging = decode("quest", brain, 128, 16, 2048)
    decode("shadow_prefix", brain, 128, 16, 2048)
    decode("shadow_prefix", brain, 128, 16, 2048, page_fraction=0.5)
    decode("page_mean", brain, 128, 16, 2048, hot_rows=8192)
    decode("page_mean", half, 96, 32, 64, group=8)
    decode("page_mean", torch.float32, 256, 16, 32, group=1)
    decode("full", half, 64, 32, 32, query_tokens=2)
    decode("given", brain, 96, 64, 16, group=3, hot_rows=100)
    decode("streaming", brain, 128, 16, 64)
    decode("dense", half, 256, 16, 64, group=1)
    decode("quest", half, 256, 32, 64, group=8, model_bounds=True)
    decode("shadow_prefix", torch.float32, 64, 16, 32, group=2)
    decode("quest", brain, 128, 16, 64, fp8=True)
    decode("page_mean", half, 96, 32, 64, query_tokens=2, fp8=True)
    decode("quest", torch.float32, 64, 16, 32, group=1)
    decode("full", brain, 256, 16, 64, group=2, softcap=50.0)
    decode("shadow_prefix", brain, 128, 16, 2048, hot_rows=100, softcap=50.0)
    decode("page_mean", half, 64, 16, 64, query_tokens=2, fp8=True, softcap=30.0)
    # Short rows and few of them: the smallest tiles.
    decode("shadow_prefix", half, 96, 32, 4, query_tokens=2, group=3)
    # Rows of 131072 tokens: ranked from a bound, pruned in loops.
    decode("shadow_prefix", half, 64, 16, 8192)
    decode("shadow_prefix", half, 64, 16, 8192, page_fraction=0.5)
    decode("full", brain, 128, 16, 8192, head_top_p=empty(1, 8))
    # The operators that decode_attention does not go through as they are.
    weights = estimate_weights(q, shadow, paging, Candidates(), 0.1)
    prune_top_p(weights, paging.seq_lens, Candidates(), 2, Pruning(0.9), Always())

    for architecture in recorder.architectures:
        assert recorder.names(architecture) == every_kernel()
    check_machine_code(recorder)


def test_the_kernel_of_the_example_selector_compiles(recorder):
    for dtype, head_dim, page in (torch.bfloat16, 128, 16), (torch.float16, 96, 64), (torch.float32, 256, 32):
        launch(page_scores_kernel, *scored(dtype, head_dim, page=page))
    assert len(recorder.compiled) == 6
    check_machine_code(recorder)


def check_machine_code(recorder):
    for key, kernel in recorder.compiled.items():
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= SHARED_LIMIT, (key[:2], kernel.metadata.shared)
