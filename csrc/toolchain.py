"""How the native modules are compiled: the one place that spells their flags. setup.py, `make test` and the benches use it.

    python csrc/toolchain.py build/cu

compiles every CUDA source of the repository as an install does, except what has not changed since, and needs no GPU. Only functions that
compile import torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CUDA_SOURCES = (CSRC, CSRC.parent / "bench")

# What torch 2.13 compiles extensions with; older ones are content with it.
STANDARD = "-std=c++20"
# One binary for every PyTorch from 2.11 and every Python from 3.10 on.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
PYTHON_ABI = "cp310"

# Instruction sets PyTorch means by the names that torch.backends.cpu.get_cpu_capability() returns.
CAPABILITY_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mbmi2", "-mprefer-vector-width=512"],
}
CPU_FLAGS = [STANDARD, "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized", *STABLE_ABI]

# sm_90a, not sm_90: the kernels use wgmma, setmaxnreg and clusters of sixteen. nvcc 12.0 is the first that knows it.
LEAST_NVCC = (12, 0)
ARCHITECTURE = "-gencode=arch=compute_90a,code=sm_90a"
CUDA_HOST_FLAGS = [STANDARD, "-O3", "-fvisibility=hidden", *STABLE_ABI]
NVCC_FLAGS = [STANDARD, "-O3", "-DUSE_CUDA", ARCHITECTURE, *STABLE_ABI]


def cpu_flags(capability: str) -> list[str]:
    """Flags of the C++ compiler for one CPU extension."""
    return [*CPU_FLAGS, *CAPABILITY_FLAGS[capability]]


def find_nvcc(cuda_home: str | None = None) -> str | None:
    """nvcc of a CUDA toolkit, by default of the first of CUDA_HOME, PATH and /usr/local/cuda that has one."""
    if cuda_home is not None:
        return shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    home = os.environ.get("CUDA_HOME")
    folders = [os.path.join(home, "bin")] if home else []
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"{nvcc} --version: expected `release X.Y`, got {text.strip()!r}")
    return int(found[1]), int(found[2])


def nvcc_problem(nvcc: str | None, torch_cuda: str | None = None) -> str:
    """Why the CUDA sources cannot be compiled, for a PyTorch of CUDA `torch_cuda` if given; "" if they can."""
    if nvcc is None:
        return "nvcc was not found (set CUDA_HOME to a CUDA toolkit)"
    version = nvcc_version(nvcc)
    name = f"nvcc {version[0]}.{version[1]}"
    if version < LEAST_NVCC:
        return f"{name} was found, sm_90a needs 12.0 or newer"
    if torch_cuda is not None and version[0] != int(torch_cuda.split(".")[0]):
        return f"{name} was found, this PyTorch is built for CUDA {torch_cuda}"
    return ""


def cuda_sources(folder: Path = CSRC) -> list[Path]:
    """The CUDA sources of a folder and of those in it."""
    return sorted(folder.rglob("*.cu"))


def object_command(nvcc: str, source: Path, target: Path, defines: Sequence[str] = ()) -> list[str]:
    """The nvcc command for one object of `_C_cuda`, with the flags that PyTorch's CUDAExtension gives it in an install, and `defines`."""
    from torch.utils import cpp_extension

    api = f"-DPy_LIMITED_API={cpp_extension.min_supported_cpython}"
    names = ["-DTORCH_API_INCLUDE_EXTENSION_H", api, "-DTORCH_EXTENSION_NAME=_C_cuda"]
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    flags = [*cpp_extension.COMMON_NVCC_FLAGS, "--compiler-options", "-fPIC", *NVCC_FLAGS, *names, *(f"-D{name}" for name in defines)]
    return [nvcc, *flags, *includes, "-c", str(source), "-o", str(target)]


def link_command(nvcc: str, objects: Iterable[Path], library: Path) -> list[str]:
    """The nvcc command that links objects of `_C_cuda`."""
    import torch

    lib = Path(torch.__file__).parent / "lib"
    libraries = ["-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch", "-lc10"]
    return [nvcc, "-shared", *map(str, objects), f"-L{lib}", *libraries, "-o", str(library)]


def library_command(nvcc: str, source: Path, library: Path) -> list[str]:
    """The nvcc command for a shared library that needs no PyTorch."""
    return [nvcc, STANDARD, "-O3", "--compiler-options", "-fPIC", "-shared", ARCHITECTURE, str(source), "-o", str(library)]


def _fingerprint(command: Sequence[str], source: Path) -> str:
    """Changes with the command, the versions of nvcc and torch, and any source or header of its folder."""
    import torch

    known = hashlib.sha256(repr((command, nvcc_version(command[0]), torch.__version__)).encode())
    folder = next((folder for folder in CUDA_SOURCES if folder in source.parents), source.parent)
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        known.update(path.name.encode() + path.read_bytes())
    return known.hexdigest()


def compile_objects(nvcc: str, sources: Iterable[Path], folder: Path, defines: Sequence[str] = ()) -> list[Path]:
    """Compiles CUDA sources side by side into `folder`, those that changed; raises CalledProcessError for the first that fails."""

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        stamp = folder / f"{source.name}.stamp"
        command = object_command(nvcc, source, target, defines)
        fingerprint = _fingerprint(command, source)
        if target.exists() and stamp.exists() and stamp.read_text() == fingerprint:
            print(f"nvcc {source.name}: unchanged", flush=True)
            return target
        stamp.unlink(missing_ok=True)
        print(f"nvcc {source.name}", flush=True)
        subprocess.run(command, check=True)
        stamp.write_text(fingerprint)
        return target

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, sources))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python csrc/toolchain.py FOLDER", file=sys.stderr)
        return 2
    nvcc = find_nvcc()
    if problem := nvcc_problem(nvcc):
        print(f"CUDA sources are not compiled here: {problem}")
        return 0
    try:
        compile_objects(nvcc, [path for folder in CUDA_SOURCES for path in cuda_sources(folder)], Path(arguments[0]))
    except subprocess.CalledProcessError as error:
        print(f"nvcc failed with exit code {error.returncode}: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
