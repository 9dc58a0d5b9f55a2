"""Builds what is published, in dist/: an sdist, a wheel made of it, and, where nvcc is, one with the CUDA kernels. `make dist` runs it.

The CPU kernels are compiled for every instruction set, and the processor decides at run time. The CUDA kernels come in a wheel
of their own, whose version names their CUDA as PyTorch's do, 0.2.0+cu130: they need a driver of that CUDA, which an index cannot
ask for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from kernel_abi_check import ObjectFile

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))
import toolchain  # noqa: E402

# glibc 2.34 and the libstdc++ of GCC 11, some of whose symbols PyTorch's headers ask for without their version.
PLATFORM = "manylinux_2_34_x86_64"
# What the Hugging Face Hub asks of a library, by the symbols that have versions.
HUB_PLATFORM, HUB_PYTHON = "manylinux_2_28", "3.9"
NO_CUDA = "this is the wheel without CUDA kernels: those whose version ends in +cu and a number have them"
# PyTorch's C++ names, which change from version to version; its stable ABI has C names alone.
UNSTABLE = re.compile(r"_ZN?K?(St\d+\w*)?\d*(2at|3c10|5torch)\d")


def problems(library: Path) -> list[str]:
    """What keeps a native module from loading in another Python, PyTorch or Linux than it was built in."""
    checked = ObjectFile(str(library))
    found = [str(problem) for problem in (*checked.check_manylinux(HUB_PLATFORM), *checked.check_python_abi(HUB_PYTHON))]
    names = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout.split()
    return found + [f"{name} is not in PyTorch's stable ABI" for name in names if UNSTABLE.match(name)]


def run(*command: str | Path, folder: Path = ROOT, **environment: str) -> None:
    """Runs a command, which prints only where it fails."""
    done = subprocess.run(list(map(str, command)), cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dist: {' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")


def tracked(folder: Path) -> Path:
    """A copy of the tracked files alone, so that nothing of an older build gets in."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def make_sdist(work: Path, dist: Path) -> Path:
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", hook, dist, folder=tracked(work / "source"), TWILIGHT_NATIVE="0")
    (path,) = dist.glob("*.tar.gz")
    return path


def unpacked(wheel: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel)
    (path,) = folder.iterdir()
    return path


def make_wheel(sdist: Path, work: Path, dist: Path) -> Path:
    """The wheel without CUDA kernels, built of the sdist as a user's pip builds it."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    everything = {"TWILIGHT_NATIVE": "required", "TWILIGHT_CPU_CAPABILITIES": ",".join(toolchain.CAPABILITY_FLAGS)}
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", work / "wheel")
    run(*pip, sdist, PATH=scripts, **everything)
    (built,) = (work / "wheel").iterdir()
    tree = unpacked(built, work / "cpu")
    (tree / "twilight_ops" / "native_build.json").write_text(json.dumps({"_C_cuda": NO_CUDA}) + "\n")
    info = next(tree.glob("*.dist-info")) / "WHEEL"
    info.write_text(re.sub("linux_x86_64", PLATFORM, info.read_text()))
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", dist, tree)
    (path,) = dist.glob("*.whl")
    return path


def make_cuda_wheel(nvcc: str, wheel: Path, work: Path, dist: Path) -> Path:
    """The same wheel, and the CUDA module in it."""
    version, objects = "".join(map(str, toolchain.nvcc_version(nvcc))), ROOT / "build" / "cu"
    tree = unpacked(wheel, work / "cuda")
    library = tree / "twilight_ops" / "_C_cuda.abi3.so"
    run(*toolchain.link_command(nvcc, toolchain.compile_objects(nvcc, toolchain.cuda_sources(), objects), library))
    run("strip", "--strip-unneeded", library)
    (tree / "twilight_ops" / "native_build.json").write_text("{}\n")
    (info,) = tree.glob("*.dist-info")
    name, public = info.name.removesuffix(".dist-info").split("-")
    metadata = (info / "METADATA").read_text("utf-8")
    (info / "METADATA").write_text(metadata.replace(f"\nVersion: {public}\n", f"\nVersion: {public}+cu{version}\n", 1), "utf-8")
    info.rename(tree / f"{name}-{public}+cu{version}.dist-info")
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", dist, tree)
    (path,) = dist.glob("*+cu*.whl")
    return path


def main() -> None:
    if torch.version.cuda is not None:
        raise SystemExit(f"dist: PyTorch: expected its CPU build, against which the wheel without CUDA is made, got {torch.__version__}")
    work, dist = ROOT / "build" / "dist", ROOT / "dist"
    for folder in (work, dist):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    sdist = make_sdist(work, dist)
    wheel = make_wheel(sdist, work, dist)
    nvcc = toolchain.find_nvcc()
    if problem := toolchain.nvcc_problem(nvcc):
        print(f"no wheel with CUDA kernels is made: {problem}")
    else:
        make_cuda_wheel(nvcc, wheel, work, dist)
    for library in sorted((work / "cpu").rglob("*.so")) + sorted((work / "cuda").rglob("*.so")):
        if found := problems(library):
            raise SystemExit(f"dist: {library.name}: " + "; ".join(found))
    for path in sorted(dist.iterdir()):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


if __name__ == "__main__":
    main()
