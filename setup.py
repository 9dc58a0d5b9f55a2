"""Native extensions; everything declarative is in pyproject.toml, and the compilers' flags are in csrc/toolchain.py.

An isolated build (`pip install .`) has no torch of its own: it compiles against the one of the environment that it installs for.

Environment:
    TWILIGHT_NATIVE: "required" makes a failed native build an error, "0" builds none, "try" (the default) installs without what fails.
    TWILIGHT_CPU_CAPABILITIES: comma-separated subset of default,avx2,avx512; by default the best that this machine runs.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import site
import stat
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

import setuptools
from setuptools import Command, find_namespace_packages, find_packages, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # an older one, which only --no-build-isolation brings here
    got = f"got {setuptools.__version__} (python -m pip install -U setuptools)"
    raise SystemExit(f"setup.py: setuptools: expected 77 or newer, {got}") from None

ROOT = Path(__file__).resolve().parent
LEAST_TORCH = (2, 11)


def load(path: Path):
    """A module by its file: the package itself needs torch, and csrc is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load(ROOT / "csrc" / "toolchain.py")
native_modules = load(ROOT / "twilight_ops" / "native_modules.py")

NATIVE = os.environ.get("TWILIGHT_NATIVE", "try")
if NATIVE not in ("try", "required", "0"):
    raise SystemExit(f"TWILIGHT_NATIVE: expected try, required or 0, got {NATIVE!r}")
REQUIRED = NATIVE == "required"

not_built: dict[str, str] = {}  # why, by module: recorded in the package
not_asked: dict[str, str] = {}  # the same, where nothing is lost that was asked for


class Elsewhere:
    """Imports what is found nowhere else from the folders of another environment, whose setuptools plug-ins stay out of this build."""

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, self.folders) if path is None else None


def site_folders() -> list[str]:
    """Folders of packages of the environment that this build is for, the likeliest first.

    pip builds with the interpreter of that environment and hides its packages. uv and build make an interpreter of their own: the
    environment is then an active one, the folder's .venv, or the one that the interpreter came from.
    """
    active = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")]
    on_path = [Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    active += [str(prefix) for prefix in (*on_path, ROOT / ".venv") if (prefix / "pyvenv.cfg").exists()]
    others = [prefix for prefix in (*active, sys.base_prefix) if prefix]
    return [*site.getsitepackages([sys.prefix]), site.getusersitepackages(), *site.getsitepackages(others)]


def import_torch() -> str:
    """Makes torch importable; returns why it is not, or cannot be built against, and "" where it can."""
    if importlib.util.find_spec("torch") is None:
        folder = next((folder for folder in site_folders() if Path(folder, "torch", "__init__.py").exists()), None)
        if folder is None:
            return "torch was not found while building"
        sys.meta_path.append(Elsewhere([folder]))
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch cannot be imported: {error}"
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < LEAST_TORCH:
        return f"torch {torch.__version__} was found, 2.11 or newer is needed"
    return ""


def announce(line: str) -> None:
    """Tells the user: on stderr, and, because pip shows no output of a build that succeeds, on the terminal or pipe of the program
    that runs the build."""
    print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # no /proc, or not ours to write to
        path = f"/proc/{os.getppid()}/fd/2"
        theirs, ours = os.stat(path), os.fstat(2)
        if not os.path.samestat(theirs, ours) and (stat.S_ISCHR(theirs.st_mode) or stat.S_ISFIFO(theirs.st_mode)):
            with open(path, "w") as out:
                out.write(f"\n{line}\n")


def capabilities(torch) -> list[str]:
    """CPU extensions to build."""
    asked = os.environ.get("TWILIGHT_CPU_CAPABILITIES")
    if asked is None:
        best = torch.backends.cpu.get_cpu_capability().lower()
        return [best if best in toolchain.CAPABILITY_FLAGS else "default"]
    names = [name.strip() for name in asked.split(",") if name.strip()]
    unknown = sorted(set(names) - set(toolchain.CAPABILITY_FLAGS))
    if unknown or not names:
        raise SystemExit(f"TWILIGHT_CPU_CAPABILITIES: expected a subset of {','.join(toolchain.CAPABILITY_FLAGS)}, got {asked!r}")
    return names


def sources(*suffixes: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


def cuda_problem(torch) -> str:
    """Why the CUDA extension cannot be built although this PyTorch has CUDA; "" if it can."""
    from torch.utils.cpp_extension import CUDA_HOME

    problem = toolchain.nvcc_problem(toolchain.find_nvcc(CUDA_HOME) if CUDA_HOME else None, torch.version.cuda)
    if problem and REQUIRED and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        raise SystemExit(f"TWILIGHT_NATIVE=required on an sm_90 GPU: {problem}")
    return problem


def native_extensions() -> list:
    """Extensions to build; what cannot be is in `not_built` with the reason."""
    if problem := "a free-threaded Python has no stable ABI" if sysconfig.get_config_var("Py_GIL_DISABLED") else import_torch():
        not_built[native_modules.EVERY] = problem
        return []
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    extensions = [
        CppExtension(
            f"twilight_ops._C_{capability}",
            sources(".cpp"),
            depends=sources(".h"),
            py_limited_api=True,
            extra_compile_args={"cxx": toolchain.cpu_flags(capability)},
        )
        for capability in capabilities(torch)
    ]
    if torch.version.cuda is None:
        not_asked[native_modules.CUDA_MODULE] = "the PyTorch of the build has no CUDA"
    elif problem := cuda_problem(torch):
        not_built[native_modules.CUDA_MODULE] = problem
    else:
        extensions.append(
            CUDAExtension(
                f"twilight_ops.{native_modules.CUDA_MODULE}",
                sources(".cu"),
                depends=sources(".h", ".cuh"),
                py_limited_api=True,
                extra_compile_args={"cxx": toolchain.CUDA_HOST_FLAGS, "nvcc": toolchain.NVCC_FLAGS},
            )
        )
    return extensions


def build_native() -> type[Command]:
    """The command that builds the extensions, on PyTorch's, which is importable only where there is something to build."""
    from torch.utils.cpp_extension import BuildExtension

    # The ninja of an environment is used without activating it.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])

    class BuildNative(BuildExtension):
        """Builds each extension by itself: in a directory of its own, because they share sources, and whatever becomes of the others."""

        def run(self) -> None:
            asked, compiler, inplace, shared = self.extensions, self.compiler, self.inplace, self.build_temp
            built = []
            for ext in asked:
                self.extensions, self.compiler, self.inplace = [ext], compiler, inplace
                self.build_temp = os.path.join(shared, ext.name)
                try:
                    super().run()
                except Exception as error:
                    if REQUIRED:
                        raise
                    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                    not_built[ext.name.rpartition(".")[2]] = f"{reason} (pip install -v shows what the compiler says)"
                    for self.inplace in {False, inplace}:  # an older one must not stay behind
                        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                else:
                    built.append(ext)
            self.inplace, self.build_temp = inplace, shared
            self.extensions = self.distribution.ext_modules = built

    return BuildNative.with_options(use_ninja=shutil.which("ninja") is not None)


class RecordNative(Command):
    """Writes down why modules were not built, for the package to say when it runs, and says it now."""

    description = "record which native modules were not built"
    user_options = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        if REQUIRED and native_modules.EVERY in not_built:
            raise SystemExit(f"TWILIGHT_NATIVE=required: {not_built[native_modules.EVERY]}")
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / "twilight_ops"
        folder.mkdir(parents=True, exist_ok=True)
        if not self.editable_mode:  # modules of an earlier build of this folder are not this wheel's
            built = {ext.name.rpartition(".")[2] for ext in self.distribution.ext_modules or []}
            for path in folder.glob("_C_*"):
                if path.name.split(".")[0] not in built:
                    path.unlink()
        (folder / native_modules.RECORD).write_text(json.dumps(not_asked | not_built, indent=1) + "\n")
        if not_built:
            announce(native_modules.notice(not_built))

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("record_native", None)]


class Wheel(bdist_wheel):
    def run(self) -> None:
        """Builds before the tag is decided: a wheel without native modules serves every machine, and one with them does not."""
        if not self.skip_build:
            self.run_command("build")
            self.skip_build = True  # setuptools would compile it all a second time, to install it into the wheel
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def index_page() -> str:
    """README for a package index, which has no other file of this folder: no pictures, and paths where links were."""
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n+", "", (ROOT / "README.md").read_text("utf-8"))
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (`\2`)", text)


if NATIVE == "0":
    not_asked[native_modules.EVERY] = "TWILIGHT_NATIVE=0 was set"
extensions = [] if NATIVE == "0" else native_extensions()
commands = {"build": Build, "record_native": RecordNative, "bdist_wheel": Wheel}
integration = ["", *(f".{name}" for name in find_packages("integration"))]
setup(
    long_description=index_page(),
    long_description_content_type="text/markdown",
    packages=find_namespace_packages(include=["twilight_ops", "twilight_ops.*"], exclude=["*.__pycache__"])
    + [f"twilight_ops.integration{name}" for name in integration],
    package_dir={"twilight_ops.integration": "integration"},
    ext_modules=extensions,
    cmdclass=commands | ({"build_ext": build_native()} if extensions else {}),
    options={"bdist_wheel": {"py_limited_api": toolchain.PYTHON_ABI}} if extensions else {},
)
