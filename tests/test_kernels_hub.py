"""The folder for Hugging Face's kernel-builder: what it demands of one, and a build of it beside the installed package."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "twilight_ops" / "__init__.py").exists():
    pytest.skip("this copy of the tests has no package beside it", allow_module_level=True)
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
sys.path.append(str(ROOT / "tools"))
import kernels_hub  # noqa: E402

# The fields that edition 5 knows (kernels-data/src/config/v5.rs); it refuses any other.
GENERAL = {"name", "version", "edition", "license", "upstream", "source", "backends", "cuda", "hub", "kernel-depends", "python-depends"}
TORCH = {"include", "minver", "maxver", "pyext", "src", "stable-abi", "cxx-flags"}
KERNEL = {"backend", "cxx-flags", "depends", "include", "src"}
CUDA = KERNEL | {"cuda-capabilities", "cuda-flags", "cuda-minver"}
# The module that kernel-builder writes beside its library (kernel-builder/src/pyproject/templates/torch/_ops.py.in).
OPS = """import torch
from . import {name}
ops = torch.ops.{name}

def add_op_namespace_prefix(op_name: str):
    return f"{name}::{{op_name}}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return kernels_hub.write(tmp_path_factory.mktemp("hub") / kernels_hub.NAME)


@pytest.fixture(scope="module")
def build(folder):
    return tomllib.loads((folder / "build.toml").read_text())


def test_the_build_file_has_what_edition_5_knows_and_needs(build):
    assert build.keys() == {"general", "torch", "kernel"} and build["general"].keys() <= GENERAL and build["torch"].keys() <= TORCH
    assert {"name", "version", "edition", "license", "backends"} <= build["general"].keys() and build["general"]["edition"] == 5
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", build["general"]["name"])
    assert build["torch"]["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"}
    for kernel in build["kernel"].values():
        assert {"backend", "depends", "src"} <= kernel.keys() <= (CUDA if kernel["backend"] == "cuda" else KERNEL)
    assert sorted(kernel["backend"] for kernel in build["kernel"].values()) == sorted(build["general"]["backends"])


def test_every_source_of_a_backend_is_compiled_once_with_the_namespace_of_the_build(folder, build):
    for kernel in build["kernel"].values():
        suffix = ".cu" if kernel["backend"] == "cuda" else ".cpp"
        compiled = [path for path in (*build["torch"]["src"], *kernel["src"]) if path.endswith((".cpp", ".cu"))]
        ours = {path.relative_to(folder).as_posix() for path in (folder / "csrc").rglob(f"*{suffix}")}
        assert ours <= {*compiled} and len(compiled) == len({*compiled})
        assert all((folder / path).is_file() for path in kernel["src"])
        flags = kernel["cuda-flags" if suffix == ".cu" else "cxx-flags"]
        assert kernels_hub.NAMESPACE in flags and kernels_hub.NAMESPACE in build["torch"]["cxx-flags"]
    for path in (folder / "csrc").rglob("*.*"):
        assert not re.search(r'LIBRARY_IMPL\(twilight\b|"twilight(::|")', path.read_text()), f"{path} names the namespace itself"


def test_python_imports_itself_by_relative_names_and_names_no_namespace(folder):
    package = folder / "torch-ext" / kernels_hub.PYTHON_NAME
    assert (package / "__init__.py").exists() and not (package / package.name).exists() and not (package / "_ops.py").exists()
    allowed = {*sys.stdlib_module_names, "torch", "triton", "safetensors"}  # the last where a calibration file is read
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= allowed, path
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library."):
                assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), f"{path}: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.ops.twilight", path


def built(folder: Path, build: dict, unique: str) -> Path:
    """The folder's package with a CPU library as kernel-builder makes it, optimised less."""
    name = f"_{kernels_hub.PYTHON_NAME}_cpu_{unique}"
    package = folder / "torch-ext" / kernels_hub.PYTHON_NAME
    (kernel,) = (kernel for kernel in build["kernel"].values() if kernel["backend"] == "cpu")
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    names = [f"-DTORCH_EXTENSION_NAME={name}", "-DCPU_KERNEL", *kernels_hub.toolchain.STABLE_ABI]

    def compile_one(source: str, flags: list[str]) -> Path:
        target = folder / "objects" / f"{Path(source).stem}.o"
        subprocess.run(["c++", "-O0", "-fPIC", "-w", *flags, *names, *includes, "-c", folder / source, "-o", target], check=True)
        return target

    (folder / "objects").mkdir()
    work = [(source, part["cxx-flags"]) for part in (build["torch"], kernel) for source in part["src"] if source.endswith(".cpp")]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        objects = [*pool.map(lambda job: compile_one(*job), work)]
    lib = Path(torch.__file__).parent / "lib"
    subprocess.run(["c++", "-shared", *objects, f"-L{lib}", "-ltorch_cpu", "-lc10", "-o", package / f"{name}.abi3.so"], check=True)
    (package / "_ops.py").write_text(OPS.format(name=name))
    return package


# Imports a build as `kernels.get_kernel` does, from a folder that is not on the path and under another name, after the installed package.
BESIDE = """
import importlib.util, sys, types
from pathlib import Path
import twilight_ops

def imported(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

folder = Path(sys.argv[1])
hub = imported("twilight_ops_of_the_hub", folder / "torch-ext" / "twilight_ops" / "__init__.py")
assert (hub.backends.CPU.name, hub.backends.CPU.detail) == ("native", "default"), hub.backends.CPU.describe()
assert sys.modules["twilight_ops_of_the_hub._ops"].ops.name == sys.argv[2] and hub.append_kv is not twilight_ops.append_kv
try:
    hub.decode_attention(*(None,) * 5)
except Exception as error:
    assert "twilight::" not in str(error), error
sys.modules["twilight_ops"] = hub
tests = imported("tests", folder / "tests" / "test_twilight_ops.py")
for case in tests.test_attention_over_a_paged_cache_is_that_of_pytorch.pytestmark[0].args[1]:
    tests.test_attention_over_a_paged_cache_is_that_of_pytorch(*case)

sys.modules["kernels.benchmark"] = types.SimpleNamespace(Benchmark=type("Benchmark", (), {"device": "cpu"}))
benchmark = imported("benchmark", folder / "benchmarks" / "benchmark.py").TwilightOpsBenchmark()
benchmark.kernel, benchmark.tokens = hub, 2048
benchmark.setup()
benchmark.benchmark_dense()
hub.backends.torch.testing.assert_close(benchmark.out, benchmark.verify_dense(), atol=1e-3, rtol=1e-3)
benchmark.benchmark_pruned()
"""


@pytest.mark.slow
def test_a_build_lives_beside_the_installed_package_and_passes_its_own_tests(folder, build):
    package = built(folder, build, "a1b2c3d")
    (library,) = package.glob("*.so")
    checked = pytest.importorskip("kernel_abi_check").ObjectFile(str(library))
    assert checked.check_manylinux("manylinux_2_28") == [] and checked.check_python_abi("3.9") == []
    program = [sys.executable, "-W", "error", "-c", BESIDE, folder, library.name.split(".")[0]]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
