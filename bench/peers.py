"""Dense attention that others offer for a decode step: what sparse attention has to beat."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from .checks import exact_check
from .run import Entry
from .timing import Method
from .workload import Workload

# The paper's baseline: every speed-up of its Figure 7 is over this one.
FA2 = "torch_fa2"

# q [B, T, Hq, D], k and v [B, Hkv, L, D] contiguous, sm_scale -> out [B, T, Hq, D]; T = 1, so nothing is masked.
Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def peer(
    name: str, device: str, calls: Callable[[Workload], list[Callable[[], Tensor]]], missing: Callable[[], str | None] = lambda: None
) -> Entry:
    """One dense implementation and the device it is a fair peer on; `calls` gives one call a buffer set."""

    def prepare(data: Workload, options: argparse.Namespace) -> Method:
        report = {"bytes": data.sizes.kv_bytes, "kept_tokens": float(data.sizes.length), "captured_mass": 1.0}
        return Method(name, calls(data), lambda: report, check=exact_check(data.expected_of_peers[0]))

    return Entry(name, prepare, (device,), "peer", missing)


def contiguous(attend: Attention) -> Callable[[Workload], list[Callable[[], Tensor]]]:
    """Calls of an implementation that wants K and V of a sequence in one piece."""

    def calls(data: Workload) -> list[Callable[[], Tensor]]:
        return [partial(attend, q, k, v, data.sm_scale) for q, (k, v) in zip(data.queries, data.dense_copies(), strict=True)]

    return calls


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """The way a model calls it."""
    out = scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=sm_scale, enable_gqa=True)
    return out.transpose(1, 2)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """The group's heads as query rows of their KV head, so that K and V are read once a group."""
    batch, tokens, heads, dim = q.shape
    rows = q.view(batch, k.shape[1], -1, dim)  # [B, Hkv, G, D]: a view, because T = 1
    return scaled_dot_product_attention(rows, k, v, scale=sm_scale).view(batch, tokens, heads, dim)


def sdpa_backend(backend: SDPBackend) -> Attention:
    """`sdpa_gqa` by one backend of PyTorch's, which fails where that backend does not serve."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa_gqa(q, k, v, sm_scale)

    return attend


def flex_calls(data: Workload) -> list[Callable[[], Tensor]]:
    """FlexAttention, compiled for this very shape: for static ones it takes its split decoding kernel."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # a pool of compilers takes longer to start than two kernels take to compile
    torch.compiler.reset()  # or the ninth shape runs uncompiled
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
        return compiled(q.transpose(1, 2), k, v, scale=sm_scale, enable_gqa=True).transpose(1, 2)

    return contiguous(attend)(data)


# FlashInfer wants one scratch buffer; its documentation recommends this size.
FLASHINFER_WORKSPACE_BYTES = 128 << 20


def flashinfer_calls(data: Workload, use_tensor_cores: bool) -> list[Callable[[], Tensor]]:
    """FlashInfer's paged decode over the very pages that our kernels read."""
    import flashinfer

    sizes, (page_table, seq_lens) = data.sizes, data.paging
    pages = page_table.shape[1]
    workspace = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=page_table.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=use_tensor_cores)
    wrapper.plan(
        torch.arange(sizes.batch + 1, dtype=torch.int32, device=page_table.device) * pages,
        page_table.flatten(),
        (seq_lens - 1) % sizes.page_size + 1,
        sizes.num_qo_heads,
        sizes.num_kv_heads,
        sizes.head_dim,
        sizes.page_size,
        q_data_type=sizes.dtype,
        kv_data_type=sizes.dtype,
        sm_scale=data.sm_scale,
    )

    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return wrapper.run(q[:, 0], (k_cache, v_cache))[:, None]

    return [partial(attend, q, *layer.kv) for q, layer in zip(data.queries, data.cache.layers, strict=True)]


def fa3(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> Tensor:
    """FlashAttention 3, from the wheel fa3-fwd; `k` and `v` are read where they lie, by their strides."""
    from fa3_fwd_interface import flash_attn_with_kvcache

    out = flash_attn_with_kvcache(q, k.transpose(1, 2), v.transpose(1, 2), softmax_scale=sm_scale)
    return out[0] if isinstance(out, tuple) else out


def needs(module: str, package: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(module) is not None else f"{package} is not installed"


FLASHINFER = needs("flashinfer", "flashinfer")
PEERS = (
    peer("sdpa_gqa", "cpu", contiguous(sdpa_gqa)),
    peer("sdpa_folded", "cpu", contiguous(sdpa_folded)),
    peer("cudnn_sdpa", "cuda", contiguous(sdpa_backend(SDPBackend.CUDNN_ATTENTION))),
    peer(FA2, "cuda", contiguous(sdpa_backend(SDPBackend.FLASH_ATTENTION))),
    peer("fa3", "cuda", contiguous(fa3), needs("fa3_fwd_interface", "fa3-fwd")),
    peer("flashinfer", "cuda", partial(flashinfer_calls, use_tensor_cores=False), FLASHINFER),
    peer("flashinfer_tensor_cores", "cuda", partial(flashinfer_calls, use_tensor_cores=True), FLASHINFER),
    peer("flex_attention", "cuda", flex_calls),
)
