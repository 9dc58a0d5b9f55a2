"""Native extensions; everything declarative is in pyproject.toml.

Environment:
    TWILIGHT_NATIVE: "required" makes a failed native build an error, "0" builds none, anything else tries and falls back to pure Python.
    TWILIGHT_CPU_CAPABILITIES: comma-separated subset of default,avx2,avx512; by default the best that this machine runs.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
NATIVE = os.environ.get("TWILIGHT_NATIVE", "try")
REQUIRED = NATIVE == "required"

# Instruction sets PyTorch means by the names that torch.backends.cpu.get_cpu_capability() returns.
CAPABILITY_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mbmi2", "-mprefer-vector-width=512"],
}

# One binary for every PyTorch from 2.11 on.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]


def warn(reason: object) -> None:
    print(f"twilight_ops: no native extension: {reason}; the operators run on plain PyTorch (and Triton on a GPU)", file=sys.stderr)


def capabilities(torch) -> list[str]:
    """CPU extensions to build."""
    asked = os.environ.get("TWILIGHT_CPU_CAPABILITIES")
    if asked is None:
        best = torch.backends.cpu.get_cpu_capability().lower()
        return [best if best in CAPABILITY_FLAGS else "default"]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = sorted(set(names) - set(CAPABILITY_FLAGS))
    if unknown or not names:
        raise SystemExit(f"TWILIGHT_CPU_CAPABILITIES: expected a subset of {','.join(CAPABILITY_FLAGS)}, got {asked!r}")
    return names


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(f"*{suffix}"))


def headers(*suffixes: str) -> list[str]:
    return [name for suffix in suffixes for name in sources(suffix)]


def native_build() -> dict:
    """Arguments of setup() that build the extensions; empty where there is no PyTorch to build against."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if REQUIRED:
            raise SystemExit(f"TWILIGHT_NATIVE=required, but {error}: install torch and pass --no-build-isolation") from error
        warn(error)
        return {}

    extensions = [
        CppExtension(
            f"twilight_ops._C_{capability}",
            sources(".cpp"),
            depends=headers(".h"),
            py_limited_api=True,
            extra_compile_args={
                "cxx": [
                    "-O3",
                    "-g0",
                    "-fno-math-errno",
                    "-fvisibility=hidden",
                    "-Wall",
                    "-Wno-maybe-uninitialized",
                    *CAPABILITY_FLAGS[capability],
                    *STABLE_ABI,
                ]
            },
        )
        for capability in capabilities(torch)
    ]
    if torch.version.cuda is not None and CUDA_HOME is not None and sources(".cu"):
        extensions.append(
            CUDAExtension(
                "twilight_ops._C_cuda",
                sources(".cu"),
                depends=headers(".h", ".cuh"),
                py_limited_api=True,
                extra_compile_args={
                    "cxx": ["-O3", "-fvisibility=hidden", *STABLE_ABI],
                    "nvcc": ["-O3", "-DUSE_CUDA", "-gencode=arch=compute_90a,code=sm_90a", *STABLE_ABI],
                },
            )
        )

    class BuildNative(BuildExtension):
        """Builds each extension in a directory of its own, because they share sources, and falls back where that is allowed."""

        def build_extension(self, ext) -> None:
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if REQUIRED:
                    raise
                warn(error)
                for ext in self.extensions:  # an older one must not stay behind
                    Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                self.extensions = []
                self.distribution.ext_modules = []

    use_ninja = shutil.which("ninja") is not None
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildNative.with_options(use_ninja=use_ninja)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


integration = ["", *(f".{name}" for name in find_packages("integration"))]
setup(
    packages=find_namespace_packages(include=["twilight_ops", "twilight_ops.*"], exclude=["*.__pycache__"])
    + [f"twilight_ops.integration{name}" for name in integration],
    package_dir={"twilight_ops.integration": "integration"},
    **({} if NATIVE == "0" else native_build()),
)
