"""What an install gives: how sources are compiled, which wheel comes out, what is said when native kernels are missing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from test_backends import sources
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))
import toolchain  # noqa: E402

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-ins of the compilers are shell scripts")
pytestmark = LINUX

# Stands in for every compiler: logs its arguments, fails where they contain $STUB_FAILS, and touches what it was to write.
STUB = """#!/bin/sh
case "$*" in
  *-dumpfullversion*) echo 13.2.0; exit 0 ;;
  *--version*) echo "Cuda compilation tools, release ${STUB_NVCC:-13.0}, V13.0.88"; exit 0 ;;
esac
echo "$(basename "$0") $*" >> "$STUB_LOG"
case "$*" in *"${STUB_FAILS:-nothing fails}"*) echo "stub: $STUB_FAILS is refused" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o | -MF) : > "$2" ;; esac
  shift
done
"""
# Runs scripts in forks of a process that has imported torch, which takes longer than any of them.
SERVER = """
import json, os, sys, traceback
import setuptools, torch, torch.utils.cpp_extension
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for fd, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), fd)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
        sys.path[0] = job["folder"]
        sys.argv = ["-c", *job["arguments"]]
        code = 0
        try:
            exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            code = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
RUN = "import runpy, sys; sys.argv[:1] = []; runpy.run_path(sys.argv[0], run_name='__main__')"
# PyTorch's CPU build as if it were one for CUDA 13.0, whose toolkit argv[1] names.
AS_CUDA_BUILD = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", sys.argv[1] or None
sys.argv = ["setup.py", *sys.argv[2:]]
runpy.run_path("setup.py", run_name="__main__")
"""


def own_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("TWILIGHT_") and k not in ("CC", "CXX", "CUDA_HOME", "PYTHONPATH")}


class Server:
    """`run(script, ...)` as subprocess.run would, in a process that has torch already."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def run(self, script: str, *arguments: str | Path, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
        outputs = {name: str(self.folder / name) for name in ("stdout", "stderr")}
        job = {"script": script, "arguments": list(map(str, arguments)), "folder": str(folder), "environment": environment, **outputs}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(script, code, *(Path(path).read_text() for path in outputs.values()))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.process.stdin.close()
    started.process.wait(timeout=60)


class Builder:
    """A copy of what is packaged, beside compilers that compile nothing."""

    def __init__(self, folder: Path, server: Server):
        self.server = server
        self.source = sources(folder / "source")
        self.cuda_home, self.log, self.wheels = folder / "cuda", folder / "log", folder / "wheels"
        tools = self.cuda_home / "bin"
        tools.mkdir(parents=True)
        for name in ("cc", "c++", "gcc", "g++", "nvcc"):
            (tools / name).write_text(STUB)
            (tools / name).chmod(0o755)
        self.environment = own_environment() | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "STUB_LOG": str(self.log)}

    def run(self, script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        for objects in (self.source / "build").glob("temp*"):  # whoever compiles, compiles everything; libraries stay as they were
            shutil.rmtree(objects)
        return self.server.run(script, *arguments, folder=self.source, environment=self.environment | environment)

    def wheel(self, script: str, *arguments: str | Path, **environment: str) -> tuple[str, dict[str, bytes], str]:
        """(name, files, stderr) of a wheel."""
        done = self.run(script, *arguments, "-q", "bdist_wheel", "--dist-dir", self.wheels, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        (path,) = self.wheels.iterdir()
        with zipfile.ZipFile(path) as archive:
            files = {name: archive.read(name) for name in archive.namelist()}
        path.unlink()
        return path.name, files, done.stderr

    def commands(self, tool: str) -> list[list[str]]:
        return [words[1:] for line in self.log.read_text().splitlines() if (words := shlex.split(line))[0] == tool]


@pytest.fixture(scope="module")
def builder(server, tmp_path_factory):
    return Builder(tmp_path_factory.mktemp("builder"), server)


def modules_of(files: dict[str, bytes]) -> set[str]:
    return {Path(name).name.split(".")[0] for name in files if Path(name).name.startswith("_C_")}


def record_of(files: dict[str, bytes]) -> dict[str, str]:
    return json.loads(files["twilight_ops/native_build.json"])


def tag(name: str) -> str:
    return name.removesuffix(".whl").split("-", 2)[2]


NATIVE_TAG = f"cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def notices(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("twilight_ops: native kernels are missing")]


BOTH = {"TWILIGHT_CPU_CAPABILITIES": "default,avx2"}


def test_a_wheel_holds_every_extension_that_was_asked_for_and_the_tag_of_native_code(builder):
    name, files, stderr = builder.wheel(AS_CUDA_BUILD, builder.cuda_home, **BOTH)
    assert tag(name) == NATIVE_TAG and modules_of(files) == {"_C_default", "_C_avx2", "_C_cuda"}
    assert record_of(files) == {} and not notices(stderr)
    written = [words[words.index("-o") + 1] for tool in ("c++", "nvcc") for words in builder.commands(tool) if "-c" in words]
    assert written and len(written) == len({*written}), "something was compiled twice"


@pytest.mark.parametrize("module, refused", [("_C_avx2", "-mavx2"), ("_C_cuda", "-DUSE_CUDA")])
def test_an_extension_that_fails_takes_no_other_along(builder, module, refused):
    for path in (builder.source / "build").glob("lib*/twilight_ops"):
        (path / f"{module}.abi3.so").write_text("older")
    name, files, stderr = builder.wheel(AS_CUDA_BUILD, builder.cuda_home, STUB_FAILS=refused, **BOTH)
    assert tag(name) == NATIVE_TAG and modules_of(files) == {"_C_default", "_C_avx2", "_C_cuda"} - {module}
    assert set(record_of(files)) == {module}
    (line,) = notices(stderr)
    assert module in line and "was measured" in line and "TWILIGHT_NATIVE=required pip install --no-build-isolation" in line


def test_a_failed_extension_leaves_no_older_one_of_its_own_in_the_source_folder(builder):
    stale = {name: builder.source / "twilight_ops" / f"_C_{name}.abi3.so" for name in ("default", "avx2", "avx512")}
    for path in stale.values():
        path.write_text("older")
    done = builder.run(RUN, "setup.py", "-q", "build_ext", "--inplace", STUB_FAILS="-mavx2", **BOTH)
    found = {name: path.read_text() for name, path in stale.items() if path.exists()}
    for path in stale.values():
        path.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert found == {"default": "", "avx512": "older"}


def test_an_older_setuptools_is_named(tmp_path):
    folder = tmp_path / "setuptools"
    (folder / "command").mkdir(parents=True)
    (folder / "__init__.py").write_text("__version__ = '65.5.0'\nCommand = find_namespace_packages = find_packages = setup = None\n")
    (folder / "command" / "__init__.py").touch()
    (folder / "command" / "build.py").write_text("build = None\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        capture_output=True,
        text=True,
        env=own_environment() | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr == "setup.py: setuptools: expected 77 or newer, got 65.5.0 (python -m pip install -U setuptools)\n"


def test_a_required_native_build_that_fails_is_an_error(builder):
    done = builder.run(AS_CUDA_BUILD, builder.cuda_home, "-q", "build", TWILIGHT_NATIVE="required", STUB_FAILS="-DUSE_CUDA")
    assert done.returncode != 0 and "Error" in done.stderr
    done = builder.run(RUN, "setup.py", "build", TWILIGHT_NATIVE="yes")
    assert done.returncode != 0 and done.stderr.strip() == "TWILIGHT_NATIVE: expected try, required or 0, got 'yes'"


def test_a_wheel_of_python_alone_is_tagged_for_every_machine(builder):
    name, files, stderr = builder.wheel(RUN, "setup.py", TWILIGHT_NATIVE="0")
    assert tag(name) == "py3-none-any" and not modules_of(files) and not notices(stderr)
    assert record_of(files) == {"every module": "TWILIGHT_NATIVE=0 was set"}
    assert {f"twilight_ops/{path.relative_to(ROOT)}" for path in (ROOT / "integration").rglob("*.py")} <= set(files)
    name, files, stderr = builder.wheel(RUN, "setup.py", STUB_FAILS="append_kv.cpp")
    assert tag(name) == "py3-none-any" and not modules_of(files) and len(notices(stderr)) == 1
    assert b"Root-Is-Purelib: true" in next(text for name, text in files.items() if name.endswith("/WHEEL"))


def test_a_toolkit_that_cannot_build_the_cuda_kernels_is_named_and_the_cpu_kernels_are_built(builder, monkeypatch):
    _, files, stderr = builder.wheel(AS_CUDA_BUILD, "")
    assert modules_of(files) and "_C_cuda" not in modules_of(files)
    (line,) = notices(stderr)
    assert "nvcc was not found" in line and "nvcc was not found" in record_of(files)["_C_cuda"]
    nvcc = toolchain.find_nvcc(str(builder.cuda_home))
    for version, reason in {"11.8": "sm_90a needs 12.0", "12.4": "this PyTorch is built for CUDA 13.0"}.items():
        monkeypatch.setenv("STUB_NVCC", version)
        assert toolchain.nvcc_problem(nvcc, "13.0").startswith(f"nvcc {version} was found, {reason}")
    assert toolchain.nvcc_problem(nvcc) == ""


# Runs a build hook as pip does: in the target's interpreter, whose packages are hidden, with setuptools in a folder of its own.
HIDE = """
import site, sys
hidden = {*site.getsitepackages(), site.getusersitepackages()}
sys.path[:] = [path for path in sys.path if path not in hidden]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
"""
FIND_TORCH = "import runpy, sys; sys.argv[:] = ['setup.py', '--name']; runpy.run_path('setup.py'); import torch; print(torch.__file__)"
HOOK = "import sys; from setuptools import build_meta as hooks; sys.argv[:1] = []; print(hooks.build_wheel(sys.argv[0]))"


def isolated(builder: Builder, folder: Path) -> dict[str, str]:
    """The environment of an isolated build."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDE)
    purelib = Path(sysconfig.get_path("purelib"))
    for name in ("setuptools", "wheel", "packaging", "_distutils_hack"):
        for path in [purelib / name, *purelib.glob(f"{name}-*.dist-info")]:
            if path.exists():
                (folder / path.name).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


def hook(builder: Builder, script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, "-c", script, str(folder)], builder.environment | environment
    return subprocess.run(command, cwd=builder.source, env=environment, capture_output=True, text=True, timeout=300)


def test_an_isolated_build_compiles_against_the_torch_of_the_environment_it_is_for(builder, tmp_path):
    environment = isolated(builder, tmp_path / "overlay")
    assert "No module named 'torch'" in hook(builder, "import torch", tmp_path, **environment).stderr
    done = hook(builder, HOOK, tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not notices(done.stderr) and tag(done.stdout.splitlines()[-1]) == NATIVE_TAG


def test_a_build_in_an_interpreter_of_its_own_finds_the_active_environment(builder, tmp_path):
    """As uv and build do."""
    environment = isolated(builder, tmp_path / "overlay")
    (tmp_path / "overlay" / "sitecustomize.py").write_text(HIDE + "sys.prefix = sys.exec_prefix = '/nowhere'\n")
    path = os.pathsep.join([str(Path(sys.prefix, "bin")), builder.environment["PATH"]])
    done = hook(builder, FIND_TORCH, tmp_path, PATH=path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Path(done.stdout.splitlines()[-1]) == Path(torch.__file__)


def test_an_isolated_build_without_torch_says_on_one_line_what_is_missing(builder, tmp_path):
    """Also to the program that runs the build, which shows nothing of a build that succeeds."""
    environment = isolated(builder, tmp_path / "overlay")
    (tmp_path / "overlay" / "sitecustomize.py").write_text(HIDE + "site.getsitepackages = lambda prefixes=None: []\n")
    silently = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOOK!r}, sys.argv[1]], capture_output=True, check=True)"
    done = hook(builder, silently, tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = notices(done.stderr)
    assert "torch was not found while building" in line and "16 times" in line
    (wheel,) = tmp_path.glob("*.whl")
    assert tag(wheel.name) == "py3-none-any"
    done = hook(builder, HOOK, tmp_path, TWILIGHT_NATIVE="required", **environment)
    assert done.returncode != 0 and "TWILIGHT_NATIVE=required: torch was not found" in done.stderr


def flags_of(command: list[str]) -> list[str]:
    """What a compiler is told, without paths, the module's name and the order of dependencies."""
    kept = []
    words = iter(command)
    for word in words:
        if word in ("-c", "-o", "-MF", "--dependency-output", "-isystem", "-ccbin"):
            next(words)
        elif not word.startswith(("-I", "-MD", "-MMD", "--generate-dependencies")) and not word.endswith(".cu"):
            kept.append(word)
    return sorted(set(kept))


def test_an_install_and_make_test_compile_cuda_with_the_same_flags(builder, tmp_path):
    def flags() -> dict[str, list[str]]:
        compiled = [words for words in builder.commands("nvcc") if "-c" in words]
        return {next(Path(word).name for word in words if word.endswith(".cu")): flags_of(words) for words in compiled}

    builder.wheel(AS_CUDA_BUILD, builder.cuda_home)
    installed = flags()
    done = builder.run(RUN, "csrc/toolchain.py", tmp_path / "objects")
    assert done.returncode == 0, done.stderr
    assert set(cpp_extension.COMMON_NVCC_FLAGS) <= set(installed["decode_attention.cu"])
    assert flags() == installed and len(installed) == len(list((ROOT / "csrc").rglob("*.cu")))


def test_make_test_compiles_cuda_sources_by_the_toolchain_file():
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    done = subprocess.run([make, "-n", "-W", "setup.py", "test"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "csrc/toolchain.py build/cu" in done.stdout and "nvcc" not in done.stdout


def test_only_sources_that_changed_are_compiled_again(builder, tmp_path, monkeypatch):
    csrc = tmp_path / "csrc"
    shutil.copytree(builder.source / "csrc", csrc)
    for name, value in builder.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(toolchain, "CUDA_SOURCES", (csrc,))

    def compiled(code: int = 0) -> int:
        builder.log.write_text("")
        assert toolchain.main([str(tmp_path / "objects")]) == code
        return len(builder.commands("nvcc"))

    everything = compiled()
    assert everything == len(list(csrc.rglob("*.cu"))) and compiled() == 0
    header = csrc / "sm90" / "launch.cuh"
    header.write_text(header.read_text() + "// changed\n")
    monkeypatch.setenv("STUB_FAILS", "append_kv.cu")
    assert compiled(code=1) >= 1
    monkeypatch.delenv("STUB_FAILS")
    assert compiled() >= 1 and compiled() == 0
    monkeypatch.setenv("STUB_NVCC", "13.1")
    assert compiled() == everything


def test_no_other_file_spells_how_cuda_is_compiled():
    spelled = re.compile(r"-gencode|compute_\d|-DUSE_CUDA|TORCH_TARGET_VERSION|__CUDA_NO_|Py_LIMITED_API|-Xcompiler|-std=c\+\+.*nvcc|-mavx")
    here = Path(__file__).relative_to(ROOT)
    folders = [ROOT / name for name in ("csrc", "bench", "tests", "twilight_ops", "integration", "examples", "tools", ".ci")]
    files = [path for path in (*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))) if path.is_file()]
    read = [path for path in files if path.suffix in (".py", ".sh", ".toml") or path.name in ("Makefile", "run")]
    found = [str(name) for path in read if (name := path.relative_to(ROOT)) != here and spelled.search(path.read_text())]
    assert found == ["csrc/toolchain.py"]


def test_the_sources_that_are_distributed_hold_what_a_build_reads(builder, tmp_path):
    shutil.copytree(ROOT / "bench", builder.source / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copytree(ROOT / "tests", builder.source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    done = builder.run(RUN, "setup.py", "-q", "sdist", "--dist-dir", tmp_path / "dist", TWILIGHT_NATIVE="0")
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = (tmp_path / "dist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    present = {path.relative_to(unpacked) for path in unpacked.rglob("*")}
    for folder in ("csrc", "integration", "twilight_ops", "bench", "tests"):
        files = [path for path in (builder.source / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")]
        assert files and {path.relative_to(builder.source) for path in files} <= present


# What runs in a process of its own: backends are chosen once, at import.
CALLS = """
import json, os, sys, warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as at_import:
    import torch, twilight_ops
    from twilight_ops import Budget, Candidates, PageBounds, Paging, Pruning, backends
calls = dict(weights=torch.rand(1, 1, 1, 4), counts=torch.tensor([4], dtype=torch.int32))
def call(weights, counts):
    return twilight_ops.prune_top_p(weights, counts, Candidates(), 1, Pruning(0.85))[1]
with warnings.catch_warnings(record=True) as called:
    if "compiled" in sys.argv:
        torch.compile(call, fullgraph=True, backend="eager")(**calls)
    call(**calls)
    paging = Paging(torch.zeros(1, 2, dtype=torch.int32), torch.tensor([20], dtype=torch.int32))
    twilight_ops.select_pages(torch.rand(1, 1, 2, 64), PageBounds(torch.rand(2, 1, 2, 64)), paging, 16, Budget(16), 0.1)
ours = lambda found: [str(w.message) for w in found if "twilight_ops" in str(w.message)]
print(json.dumps({"at_import": ours(at_import), "called": ours(called), "name": backends.CPU.name, "detail": backends.CPU.detail,
                  "serving": {op: backends.serving(op, "cpu") for op in backends.OPS}}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package's Python files alone."""
    return sources(tmp_path_factory.mktemp("package") / "source")


@pytest.fixture
def in_process(server):
    def run(folder: Path, script: str, *arguments: str, **environment: str) -> dict:
        done = server.run(script, *arguments, folder=folder, environment=own_environment() | environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_first_call_on_the_cpu_reference_warns_once_and_an_import_never(in_process, package):
    found = in_process(package, CALLS, "compiled")
    assert found["at_import"] == [] and found["name"] == "reference" and set(found["serving"].values()) == {"reference"}
    (text,) = found["called"]
    assert re.search(r"_C_\w+: was not built", text) and "16 times a token" in text and "TWILIGHT_NATIVE=required pip install" in text
    assert in_process(package, CALLS, TWILIGHT_CPU_BACKEND="reference")["called"] == []


def test_a_reason_recorded_by_the_build_is_what_a_user_is_told(in_process, package, tmp_path):
    shutil.copytree(package, tmp_path / "copy")
    (tmp_path / "copy" / "twilight_ops" / "native_build.json").write_text('{"every module": "torch was not found while building"}')
    found = in_process(tmp_path / "copy", CALLS)
    for told in (found["detail"], found["called"][0]):
        assert "was not built (torch was not found while building)" in told


def test_a_native_module_that_does_not_load_is_no_error_and_its_reason_is_told(in_process, package, tmp_path):
    shutil.copytree(package, tmp_path / "copy")
    for name in ("avx512", "avx2", "default"):
        (tmp_path / "copy" / "twilight_ops" / f"_C_{name}.abi3.so").write_bytes(b"not a library")
    found = in_process(tmp_path / "copy", CALLS, ATEN_CPU_CAPABILITY="default")
    assert found["at_import"] == [] and found["name"] == "reference" and len(found["called"]) == 1
    assert (
        "_C_default does not load: " in found["detail"] and "_C_avx512 was built for avx512, this processor runs default" in found["detail"]
    )


def test_a_module_of_other_sources_leaves_what_it_lacks_to_the_reference(in_process, package, tmp_path):
    shutil.copytree(package, tmp_path / "copy")
    (tmp_path / "copy" / "twilight_ops" / "_C_default.py").write_text("")  # loads, and registers nothing
    found = in_process(tmp_path / "copy", CALLS)
    assert found["name"] == "reference" and set(found["serving"].values()) == {"reference"}
    assert "_C_default: has no kernel for append_kv, select_pages" in found["called"][0]


# PyTorch's CPU build as if it were one for CUDA with one GPU; no kernel runs.
ON_GPU = """
import json, sys, warnings
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *a: tuple(map(int, sys.argv[1].split(".")))
from twilight_ops import backends
from twilight_ops.kernels import native
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    native.warn_if_missing()
    native.warn_if_missing()
print(json.dumps({"name": backends.CUDA.name, "detail": backends.CUDA.detail, "called": [str(w.message) for w in found],
                  "serving": {op: backends.serving(op, "cuda") for op in backends.OPS}}))
"""


@pytest.mark.parametrize(
    "module, capability, environment, name, detail, warns",
    [
        ("", "9.0", {}, "native", "fused kernels", False),
        ("", "8.0", {}, "triton", "_C_cuda was built for sm_90, this GPU is sm_80", False),
        (None, "9.0", {}, "triton", "_C_cuda was not built", True),
        (None, "8.0", {}, "triton", "_C_cuda was not built", False),
        ("raise ImportError('libcudart.so.13: cannot open')", "9.0", {}, "triton", "_C_cuda does not load: libcudart.so.13", True),
        ("", "9.0", {"TWILIGHT_CUDA_BACKEND": "triton"}, "triton", "TWILIGHT_CUDA_BACKEND", False),
    ],
)
def test_what_serves_cuda_calls_is_what_info_says(in_process, package, tmp_path, module, capability, environment, name, detail, warns):
    pytest.importorskip("triton")
    shutil.copytree(package, tmp_path / "copy")
    if module is not None:
        (tmp_path / "copy" / "twilight_ops" / "_C_cuda.py").write_text(module)
    found = in_process(tmp_path / "copy", ON_GPU, capability, TWILIGHT_CPU_BACKEND="reference", **environment)
    assert found["name"] == name and detail in found["detail"]
    fused = {"append_kv", "decode_attention"} if name == "native" else set()
    for op, serves in found["serving"].items():
        assert serves.startswith("native (") and serves.endswith("else triton") if op in fused else serves == "triton", op
    if warns:
        (text,) = found["called"]
        assert "_C_cuda" in text and "1.2 to 2.4 times a layer call" in text
    elif "TWILIGHT_CUDA_BACKEND" not in environment:
        assert found["called"] == []


WITHOUT_EXTRAS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rich", "transformers", "accelerate", "safetensors", "gguf", "matplotlib", "tokenizers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from twilight_ops.__main__ import commands, main
for arguments in ([], *([name] for name in commands())):
    try:
        main([*arguments, "--help"])
    except SystemExit as stop:
        assert stop.code == 0, arguments
assert {"info", "generate", "chat", "calibrate", "eval", "demo", "demo-tp"} == set(commands())
assert main(["info"]) == 0
sys.exit(main(["calibrate", "--random-tiny", "--text", sys.argv[1], "--out", sys.argv[2]]))
"""


def test_info_and_every_help_need_torch_alone_and_what_needs_more_says_which_extra(server, tmp_path):
    done = server.run(WITHOUT_EXTRAS, ROOT / "LICENSE", tmp_path / "out.safetensors", folder=ROOT, environment=own_environment())
    assert "cpu kernels: " in done.stdout and done.stdout.count("usage: ") == 8, done.stderr
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'twilight_ops[" in done.stderr


def test_torch_is_nowhere_a_requirement_of_the_build():
    """Or pip would bring another one than the environment's into an isolated build."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "torch" not in text.split("requires = ", 1)[1].split("\n", 1)[0]
