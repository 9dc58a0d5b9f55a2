"""csrc/simd.h gives the same bits for every instruction set, on an emulated aarch64 too, for which all CPU sources compile."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "csrc"))
import toolchain  # noqa: E402

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INCLUDES = [f"-I{folder}" for folder in (ROOT / "csrc", Path(torch.__file__).parent / "include", sysconfig.get_path("include"))]
# The processor's, whatever ATEN_CPU_CAPABILITY asks of PyTorch.
FLAGS = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
needs_cross = pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")


def run(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def bits_of(folder, compiler, flags, *runner):
    program = folder / "simd_bits"
    run(compiler, *flags, "-w", *INCLUDES, ROOT / "tests" / "emulator" / "simd_bits.cpp", "-o", program)
    return run(*runner, program)


@pytest.fixture(scope="module")
def avx2_bits(tmp_path_factory):
    if not {"avx2", "fma", "f16c", "bmi2"} <= FLAGS:
        pytest.skip("this processor has no AVX2")
    return bits_of(tmp_path_factory.mktemp("avx2"), "g++", toolchain.cpu_flags("avx2"))


def test_instruction_sets_convert_alike(tmp_path, avx2_bits):
    # Without fused multiply-add the last bit of exp may be another; the program itself holds it to 2 ulp.
    assert bits_of(tmp_path, "g++", toolchain.cpu_flags("default")).splitlines()[:-1] == avx2_bits.splitlines()[:-1]


@pytest.mark.skipif(not {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= FLAGS, reason="this processor has no AVX-512")
def test_avx512_gives_the_bits_of_avx2(tmp_path, avx2_bits):
    assert bits_of(tmp_path, "g++", toolchain.cpu_flags("avx512")) == avx2_bits


@needs_cross
@pytest.mark.skipif(shutil.which(EMULATOR) is None, reason=f"{EMULATOR} is not installed")
def test_aarch64_gives_the_bits_of_avx2(tmp_path, avx2_bits):
    assert bits_of(tmp_path, CROSS, [*toolchain.cpu_flags("default"), "-static"], EMULATOR) == avx2_bits


@needs_cross
@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cpp")), ids=lambda path: path.stem)
def test_every_source_compiles_for_aarch64(source):
    run(CROSS, *toolchain.cpu_flags("default"), "-Wno-attributes", "-Werror", *INCLUDES, "-fsyntax-only", source)
