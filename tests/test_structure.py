"""The structure that a newcomer relies on: no import cycles, one list of arguments a language, no function that hides its module."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import twilight_ops
from twilight_ops.ops import OPS, operator

PACKAGE = Path(twilight_ops.__file__).parent
INTEGRATION = Path(importlib.import_module("twilight_ops.integration").__file__).parent
ROOT = Path(__file__).parent.parent


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in (("twilight_ops", PACKAGE), ("twilight_ops.integration", INTEGRATION)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[0] != "integration":  # where an installed package has it
                found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports anywhere, for type checkers too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {other for other in found if other in known and other != name}


def test_no_module_imports_itself_in_a_circle():
    known = modules()
    assert len(known) > 80
    edges = {name: imported(name, path, known) for name, path in known.items()}
    # Names that import nothing any more are taken away until only circles are left.
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        for name in leaves:
            del edges[name]
    assert not edges, f"circles among {sorted(edges)}"


@pytest.mark.parametrize("package", ["twilight_ops", "twilight_ops.ops", "twilight_ops.reference", "twilight_ops.kernels"])
def test_no_function_hides_a_module(package):
    found = importlib.import_module(package)
    names = [module.name for module in pkgutil.iter_modules(found.__path__)]
    hidden = [name for name in names if hasattr(found, name) and not hasattr(getattr(found, name), "__spec__")]
    assert not hidden


@pytest.mark.parametrize("op", ["append_kv", "decode_attention"])
def test_the_list_of_arguments_in_cpp_is_that_of_the_schema(op):
    text = (ROOT / "csrc" / "arguments.h").read_text()
    macro = re.search(rf"#define TWILIGHT_{op.upper()}_ARGUMENTS(.*?)(?=\n\n|\Z)", text, re.S)
    names = re.findall(r"(\w+)(?=,|$)", macro[1].replace("\\\n", " ").strip())
    assert [name.removesuffix("_name") for name in names] == [leaf.name for leaf in operator(op).leaves]


def test_no_other_place_spells_out_the_arguments_of_decode_attention():
    """Nobody passes by position what has a name: only the groups, the list of C++ and the operators that read it have all the names."""
    names = {leaf.name for leaf in operator("decode_attention").leaves} - {"selector"}
    sources = [*PACKAGE.rglob("*.py"), *INTEGRATION.rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    spelled = [path.name for path in sources if names <= set(re.findall(r"\w+", path.read_text("utf-8", errors="ignore")))]
    assert "arguments.h" in spelled
    assert set(spelled) <= {"arguments.h", "arguments.py", "decode_attention.cpp", "decode_attention.cu", "schemas.cpp"}, spelled


@pytest.mark.parametrize("op", OPS)
def test_the_stem_of_an_operator_finds_all_of_it(op):
    """CONTRIBUTING.md tells to copy one stem: signature, reference, Triton kernel, CPU kernel, tests."""
    assert (PACKAGE / "ops" / f"{op}.py").is_file() and (PACKAGE / "reference" / f"{op}.py").is_file()
    assert (PACKAGE / "kernels" / f"{op}.py").is_file()
    assert list((ROOT / "csrc").rglob(f"{op}.cpp")) and (ROOT / "tests" / f"test_{op}.py").is_file()
    function = getattr(twilight_ops, op)
    assert function.__name__ == op and "Args:" in function.__doc__
