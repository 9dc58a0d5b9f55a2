"""What is published: the sdist is the repository, an index page stands alone, native modules load wherever they claim to."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import twilight_ops
from twilight_ops import native_modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(twilight_ops.__file__).parent
MODULES = sorted(PACKAGE.glob("_C_*.so"))
NAMES = [path.name.split(".")[0] for path in MODULES]

# Another Python has no PyTorch, so its C++ library alone comes first; then a module registers its kernels and defines their schemas.
LOAD = """
import ctypes, sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
for path in Path(sys.argv[2]).rglob("*.py"):
    compile(path.read_text("utf-8"), path, "exec")
for path in sys.argv[3:]:
    name = Path(path).name.split(".")[0]
    loader = ExtensionFileLoader(name, path)
    loader.exec_module(module_from_spec(spec_from_file_location(name, path, loader=loader)))
assert ctypes.CDLL(sys.argv[3]).twilight_define_schemas() & 1
"""


@pytest.fixture(scope="module")
def dist():
    pytest.importorskip("kernel_abi_check")
    if not (ROOT / "tools" / "dist.py").exists():
        pytest.skip("this copy of the tests has no tools beside it")
    sys.path.append(str(ROOT / "tools"))
    try:
        import dist
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return dist


def test_the_version_is_written_once_and_cited():
    if not (ROOT / "CITATION.cff").exists():
        pytest.skip("this copy of the tests has no CITATION.cff beside it")
    assert re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [twilight_ops.__version__]
    assert f"\n## {twilight_ops.__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_an_sdist_holds_every_tracked_file_and_an_index_page_that_stands_alone(dist, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    (tmp_path / "dist").mkdir()
    with tarfile.open(dist.make_sdist(tmp_path, tmp_path / "dist")) as archive:
        files = {name.partition("/")[2]: name for name in archive.getnames()}
        page = archive.extractfile(files["PKG-INFO"]).read().decode()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert not {name for name in tracked if name} - files.keys()
    assert "\nAuthor: The twilight_ops authors\n" in page and "\nProject-URL: Paper, https://" in page
    assert f"\nVersion: {twilight_ops.__version__}\n" in page and "## Install" in page
    assert not re.findall(r"\]\((?!https?:|#)[^)]*\)", page), "an index has no other file of the repository"


@pytest.mark.parametrize("library", MODULES, ids=NAMES)
def test_a_native_module_asks_for_nothing_but_stable_symbols(library, dist):
    assert dist.problems(library) == []
    assert b"\0TWILIGHT_NAMESPACE\0" not in library.read_bytes(), "a source that registers kernels does not include csrc/namespace.h"


def test_symbols_that_are_not_stable_are_named(dist):
    found = dist.problems(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any(problem.startswith("IncompatibleAbi3Symbol") for problem in found)
    assert any(problem.startswith("_ZNK5torch") and problem.endswith(" is not in PyTorch's stable ABI") for problem in found)


@pytest.mark.skipif({*native_modules.CPU_MODULES} - {*NAMES} != set(), reason="one instruction set was built, a wheel has three")
@pytest.mark.parametrize("capability", native_modules.CPU_CAPABILITIES)
def test_the_processor_decides_which_instruction_set_runs(capability):
    processor = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"]
    best = subprocess.run(ask, env=processor, capture_output=True, text=True, timeout=120, check=True).stdout.strip()
    order = native_modules.CPU_CAPABILITIES
    expected = capability if best not in order or order.index(capability) >= order.index(best) else best
    program = "from twilight_ops import backends; print(backends.CPU.name, backends.CPU.detail.split(';')[0])"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"native {expected}\n", done.stderr


def interpreter(version: str) -> str | None:
    """A Python of that version that starts, on PATH or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        if path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            return str(path)
    return None


@pytest.mark.skipif(not {*native_modules.CPU_MODULES} & {*NAMES}, reason="no native module was built for the CPU")
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_supported_python_compiles_the_sources_and_loads_the_modules(version):
    if (python := interpreter(version)) is None:
        pytest.skip(f"Python {version} is not on this machine")
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    names = [name for name in native_modules.CPU_MODULES if name in NAMES and native_modules.load(name) == ""]
    runnable = [MODULES[NAMES.index(name)] for name in names]
    done = subprocess.run([python, "-c", LOAD, library, PACKAGE, *runnable], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
