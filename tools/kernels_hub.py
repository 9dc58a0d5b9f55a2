"""Lays the operators out as Hugging Face's kernel-builder takes them, in build/kernels-hub/twilight-ops. `make kernels-hub` runs it.

Everything comes from this repository: the sources as they are, the flags from csrc/toolchain.py. kernel-builder compiles one
library a backend and writes `_ops.py`, so the operators' namespace is its own and two versions live in one process. Its CPU
library is compiled for every x86-64 processor: kernel-builder knows no choice at run time, which the wheels have.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))
import toolchain  # noqa: E402

NAME = "twilight-ops"
PYTHON_NAME = NAME.replace("-", "_")
VERSION = 1  # of the kernel on the Hub: it rises with a release that breaks what the one before took
LICENSE = "Apache-2.0"
STABLE_ABI = "2.11"
# Not of a kernel: commands, measurements, what they read; and what kernel-builder writes.
LEFT_OUT = ("cli", "evaluation", "data", "__main__.py", "_ops.py", "py.typed", "native_build.json", "*.so", "__pycache__")
NAMESPACE = "-DTWILIGHT_NAMESPACE=TORCH_EXTENSION_NAME"
# csrc/module.cu is these two for a build of our own.
BINDING = ["csrc/module.cpp", "csrc/plan.cpp"]


def files(*suffixes: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


def without(flags: list[str]) -> list[str]:
    """Without those that kernel-builder sets."""
    return [flag for flag in flags if flag not in (*toolchain.STABLE_ABI, toolchain.ARCHITECTURE, "-O3", "-g0")]


def build_toml() -> dict:
    """The tables of build.toml, edition 5."""
    cpp = [*without(toolchain.cpu_flags("default")), NAMESPACE]
    headers = files(".h")
    backends = {
        "cpu": {"src": [path for path in files(".cpp") if path not in BINDING] + headers, "cxx-flags": cpp},
        "cuda": {
            "src": [path for path in files(".cu", ".cuh") if path != "csrc/module.cu"] + headers,
            "cuda-capabilities": ["9.0a"],
            "cuda-flags": [*without(toolchain.NVCC_FLAGS), NAMESPACE],
        },
    }
    return {
        "general": {"name": NAME, "version": VERSION, "edition": 5, "license": LICENSE, "backends": [*backends]},
        "torch": {"src": [*BINDING, *headers], "cxx-flags": cpp, "minver": STABLE_ABI},
        "torch.stable-abi": dict.fromkeys(backends, STABLE_ABI),
        **{f"kernel.{PYTHON_NAME}_{name}": {"backend": name, "depends": ["torch"], **more} for name, more in backends.items()},
    }


def write(folder: Path) -> Path:
    """Writes the folder anew and returns it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "tools" / "hub", folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("*.py", "__pycache__", "module.cu"))
    shutil.copytree(ROOT / "twilight_ops", folder / "torch-ext" / PYTHON_NAME, ignore=shutil.ignore_patterns(*LEFT_OUT))
    # TOML writes numbers, strings and lists of strings as JSON does.
    tables = (
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value, indent=4)}\n" for key, value in table.items())
        for name, table in build_toml().items()
    )
    (folder / "build.toml").write_text("\n".join(tables))
    return folder


if __name__ == "__main__":
    print(write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "kernels-hub" / NAME))
