"""A decode step exported with its cache as buffers, and packaged: the same tokens, without transformers or this package's Python."""

import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import twilight_ops
from twilight_ops import native_modules
from twilight_ops.ops import OPS, operator
from twilight_ops.ops._library import define

ROOT = Path(__file__).resolve().parents[1]
NATIVE = twilight_ops.backends.CPU.name == "native"
needs_native = pytest.mark.skipif(not NATIVE, reason=f"no native CPU kernels in use: {twilight_ops.backends.CPU.detail}")


def schemas() -> list[str]:
    return [f"{operator(name).name}({operator(name).arguments}) -> {operator(name).returns}" for name in OPS]


def test_the_schemas_of_cpp_are_those_that_the_signatures_give():
    text = (ROOT / "csrc" / "schemas.cpp").read_text()
    listed = re.search(r"kSchemas\[\] = \{(.*?)\n\};", text, re.S)[1]
    found = ["".join(re.findall(r'"([^"]*)"', part)) for part in re.split(r",\n", listed)]
    assert [schema for schema in found if schema] == [*schemas(), "_first_requiring_grad(Tensor[] tensors) -> int"]


def test_a_schema_of_another_version_is_refused():
    define(schemas()[0])  # the same: nothing happens
    with pytest.raises(
        RuntimeError, match=r"schema: expected twilight::append_kv\(Tensor k\) -> \(\), got twilight::append_kv\(Tensor k, "
    ):
        define("append_kv(Tensor k) -> ()")


def in_a_process(program: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program), *arguments], capture_output=True, text=True, timeout=300)


@needs_native
def test_the_native_library_alone_defines_and_serves_the_operators_and_python_keeps_what_it_defined():
    program = """
        import ctypes, sys, torch
        torch.ops.load_library(sys.argv[1])
        library = ctypes.CDLL(sys.argv[1])
        assert library.twilight_define_schemas() & 1 and library.twilight_define_schemas() & 1
        k = torch.randn(1, 3, 1, 64)
        cache = [torch.zeros(2, 1, 16, 64) for _ in range(2)]
        where = torch.arange(2, dtype=torch.int32)[None], torch.tensor([3], dtype=torch.int32)
        with torch.no_grad():
            torch.ops.twilight.append_kv(k, k, *cache, *where)
        assert torch.equal(cache[0][0, 0, :3], k[0, :, 0])
        try:
            torch.ops.twilight.append_kv(k, k, *cache, *where)
            raise AssertionError("nobody was asked for gradients")
        except RuntimeError as error:
            assert "append_kv: gradients: expected none enabled in a process without twilight_ops" in str(error), error
        assert "twilight_ops" not in sys.modules
        import twilight_ops
        torch.ops.twilight.append_kv(k, k, *cache, *where)
        twilight_ops.append_kv(k, k, twilight_ops.KV(*cache), twilight_ops.Paging(*where))
    """
    done = in_a_process(program, native_modules.library())
    assert done.returncode == 0, done.stderr


@needs_native
def test_schemas_that_python_has_defined_are_not_defined_again():
    program = """
        import ctypes, sys, twilight_ops
        print(ctypes.CDLL(twilight_ops.native_modules.library()).twilight_define_schemas() & 1)
    """
    done = in_a_process(program)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
    assert "twilight_define_schemas: " in done.stderr


def example():
    spec = importlib.util.spec_from_file_location("export_example", ROOT / "examples" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_native
@pytest.mark.slow
def test_a_package_gives_the_tokens_of_eager_decoding_in_a_process_with_torch_and_the_library(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "export.py"), str(tmp_path / "step.pt2")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    eager, package = (line.partition(" ")[2].strip() for line in done.stdout.splitlines())
    assert eager == package and len(eager.split(",")) == 12


def test_an_exported_step_is_two_operators_a_layer_and_moves_its_own_buffers():
    pytest.importorskip("transformers")
    module = example()
    (step, first), (other, _) = module.make_step(), module.make_step()
    with torch.no_grad():
        program = torch.export.export(step, (first, torch.tensor([[module.PROMPT]])), strict=False)
        exported = program.module()
        before = [tensor.clone() for tensor in other.tensors]
        assert module.tokens_of(exported, first) == module.tokens_of(other, first)
    calls = [str(node.target) for node in program.graph.nodes if "twilight" in str(node.target)]
    assert calls == ["twilight.append_kv.default", "twilight.decode_attention.default"] * 2
    assert all(torch.equal(getattr(exported, f"cache_{i}").view(tensor.shape), tensor) for i, tensor in enumerate(other.tensors))
    assert any(not torch.equal(old, new) for old, new in zip(before, other.tensors, strict=True))
    assert all(name.endswith("inv_freq") for name in program.constants)
