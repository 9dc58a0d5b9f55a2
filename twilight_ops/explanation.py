"""Which kernel serves a call of decode_attention, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, launch_plan
from .arguments import KV, Candidates, Observation, PageBounds, PageMeans, Paging, Policy, Scales, Shadow
from .ops.decode_attention import OPERATOR

NATIVE, FUSED, STAGES, REFERENCE, NONE = "native CPU kernel", "fused CUDA kernel", "Triton stages", "PyTorch reference", "none"


@dataclass(frozen=True)
class Explanation:
    """What serves a call; `str()` says it in a few lines.

    Attributes:
        kernel: "native CPU kernel", "fused CUDA kernel", "Triton stages", "PyTorch reference", or "none" where nothing serves the device.
        detail: the instruction set, or the GPU that the plan is for.
        reason: why no faster kernel serves the call, or why another selector runs than was asked for; "" where neither is so.
        plan: how the fused kernel is launched: the selector that runs, blocks, shared memory. None for other kernels.
    """

    kernel: str
    detail: str
    reason: str = ""
    plan: launch_plan.Plan | None = None

    def __str__(self) -> str:
        lines = [f"{self.kernel} ({self.detail})"]
        if self.reason:
            lines.append(f"  why: {self.reason}")
        if self.plan is not None:
            p = self.plan
            blocks = f"{p.grid} blocks, {p.cluster_size} a KV head of a sequence"
            lines.append(f"  selector {p.selector}, {blocks}, {p.shared_bytes:,} bytes of shared memory each")
        return "\n".join(lines)


def explain(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    shadow: Shadow | None = None,
    bounds: PageBounds | None = None,
    candidates: Candidates = Candidates(),
    observe: Observation = Observation(),
    means: PageMeans | None = None,
    out: Tensor | None = None,
    scales: Scales | None = None,
    softcap: float | None = None,
    device: str | torch.device | None = None,
) -> Explanation:
    """Which kernel serves a call of `decode_attention`, and why. Nothing is read but shapes, dtypes and settings, and nothing runs.

    Args:
        q, kv, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, out, scales, softcap: what `decode_attention` takes.
            Its tensors may be on the meta device.
        device: "cpu", "cuda" or "cuda:N"; by default the device of q. "cuda" where there is no CUDA device stands for an H200 on which
            `_C_cuda` was built: 132 multiprocessors, 227 KB of shared memory a block.

    Returns:
        An `Explanation`; `print` it.

    Raises:
        RuntimeError: a malformed argument; or no native module is loaded, which holds the plan that a "cuda" without a GPU asks for.
        ValueError: a device that has no kernels.

    Example:
        >>> print(explain(q, kv, paging, Policy("quest", Budget(8192)), 0.088, bounds=bounds, device="cuda"))
        fused CUDA kernel (no CUDA device is here: as if on an H200 with _C_cuda)
          selector quest, 128 blocks, 2 a KV head of a sequence, 112,128 bytes of shared memory each
    """
    OPERATOR.check(q, kv, paging, policy, sm_scale, shadow, bounds, candidates, observe, means, out, scales, softcap)
    place = torch.device(q.device if device is None else device)
    if place.type == "cpu":
        if backends.serving("decode_attention", "cpu") == "native":
            return Explanation(NATIVE, backends.CPU.detail)
        return Explanation(REFERENCE, "cpu", backends.CPU.detail)
    if place.type != "cuda":
        raise ValueError(f"explain: device: expected cpu or cuda, got {place}")
    return _on_cuda(q, kv, paging, policy, shadow, bounds, softcap, place)


def _on_cuda(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    shadow: Shadow | None,
    bounds: PageBounds | None,
    softcap: float | None,
    place: torch.device,
) -> Explanation:
    if torch.cuda.is_available():
        index = torch.cuda.current_device() if place.index is None else place.index
        detail = f"cuda:{index}, {torch.cuda.get_device_name(index)}"
        if backends.CUDA.name != "native":
            return Explanation(STAGES if backends.CUDA.name == "triton" else NONE, detail, backends.CUDA.detail)
        limits = launch_plan.limits_of(index)
    else:
        detail, limits = "no CUDA device is here: as if on an H200 with _C_cuda", launch_plan.H200
    request = launch_plan.Request.of_call(q, kv, paging, policy, shadow, bounds, softcap, limits)
    plan = launch_plan.plan_of(request)
    if not plan.serves:
        return Explanation(STAGES, detail, plan.reason)
    dense = f"page_table holds {request.max_pages * request.page_size} tokens, dense_below is {request.dense_below}"
    return Explanation(FUSED, detail, "" if plan.selector == request.selector else dense, plan)
