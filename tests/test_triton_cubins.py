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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from twilight_ops import kernels
from twilight_ops.capacity import COUNTER_COLUMNS
from twilight_ops.kernels import _launch

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


def decode(selector: str, dtype: torch.dtype, dim: int, page: int, max_pages: int, query_tokens: int = 1, group: int = 4, **options):
    """One append and one staged decode step of nothing: only launches are made, and those are recorded."""
    batch, kv_heads, pages, ints = 2, 2, 3, torch.int32
    cache = [empty(pages, kv_heads, page, dim, dtype=dtype) for _ in range(2)]
    shadow = [empty(pages, kv_heads, page * dim // 2, dtype=torch.uint8), empty(pages, kv_heads, page, 2, dtype=torch.bfloat16)]
    bounds = [empty(pages, kv_heads, 2, dim, dtype=torch.uint8), empty(pages, kv_heads, 2, dtype=torch.bfloat16)]
    order = [empty(kv_heads, dim, dtype=ints), empty(kv_heads, dtype=ints)]
    paging = [empty(batch, max_pages, dtype=ints), empty(batch, dtype=ints)]
    if options.pop("model_bounds", False):
        bounds = [empty(pages, kv_heads, 2, dim, dtype=dtype), None]
    if selector == "given":
        options |= {"candidates": empty(batch, kv_heads, 40, dtype=ints), "candidate_counts": empty(batch, kv_heads, dtype=ints)}
    new = [empty(batch, query_tokens, kv_heads, dim, dtype=dtype) for _ in range(2)]
    kernels.append_kv(*new, *cache, *shadow, *bounds, *order, *paging)
    q = empty(batch, query_tokens, kv_heads * group, dim, dtype=dtype)
    counters = torch.empty(kv_heads, COUNTER_COLUMNS, dtype=torch.int64)
    arguments = (q, *cache, *shadow, *bounds, *order, *paging, selector, 1024, 0.125, 0.85, dim**-0.5)
    kernels.decode_attention(*arguments, budget_counters=counters, **options)
    return q, shadow, order, paging


def test_every_kernel_compiles_for_sm_80_and_sm_90(recorder):
    half, brain = torch.float16, torch.bfloat16
    q, shadow, order, paging = decode("quest", brain, 128, 16, 2048)
    decode("shadow_prefix", brain, 128, 16, 2048)
    decode("full", half, 64, 32, 32, query_tokens=2, head_token_budget=None)
    decode("given", brain, 96, 64, 16, group=3)
    decode("dense", half, 256, 16, 64, group=1)
    decode("quest", half, 256, 32, 64, group=8, model_bounds=True)
    decode("shadow_prefix", torch.float32, 64, 16, 32, group=2)
    decode("quest", torch.float32, 64, 16, 32, group=1)
    # Short rows and few of them: the smallest tiles.
    decode("shadow_prefix", half, 96, 32, 4, query_tokens=2, group=3)
    # Rows of 131072 tokens: ranked from a bound, pruned in loops.
    decode("shadow_prefix", half, 64, 16, 8192)
    decode("full", brain, 128, 16, 8192, top_p_per_head=empty(1, 8))
    # The operators that decode_attention does not go through as they are.
    weights = kernels.estimate_weights(q, *shadow, *order, *paging, None, None, 1, 0.1)
    kernels.prune_top_p(weights, paging[1], None, None, 1, 2, 0.9)

    for architecture in recorder.architectures:
        assert recorder.names(architecture) == every_kernel()
    for key, kernel in recorder.compiled.items():
        assert len(kernel.asm["cubin"]) > 0
        assert kernel.metadata.shared <= SHARED_LIMIT, (key[:2], kernel.metadata.shared)
