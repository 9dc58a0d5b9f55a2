"""Where one block of the fused kernel spends its time, by its multiprocessor's clock."""

from __future__ import annotations

import argparse
import ctypes
import importlib.machinery
import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from . import workload
from .registry import LayerOp
from .rows import ROOT
from .run import Entry
from .speed_of_light import toolchain
from .timing import Method

MODULE = "twilight_ops._C_cuda"
MARK = re.compile(r"^( *)// phase: (.+)$", re.MULTILINE)
START = "start"
CLOCK = """
// Cycles and nanoseconds at which block 0 last passed each mark.
__device__ long long phase_clock[{count}][2];
// Copies them and sets them to 0: the next call may pass fewer, on a multiprocessor with another clock.
extern "C" __attribute__((visibility("default"))) int read_phase_clock(void* to) {{
  static const long long none[{count}][2] = {{}};
  const cudaError_t error = cudaMemcpyFromSymbol(to, phase_clock, sizeof(phase_clock));
  return error != cudaSuccess ? error : cudaMemcpyToSymbol(phase_clock, none, sizeof(phase_clock));
}}
__device__ __forceinline__ void mark_phase(int phase) {{
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  phase_clock[phase][0] = clock64();
  phase_clock[phase][1] = time;
}}
"""
OPERATOR = "decode_attention.cu"
KERNEL_HEADER = '#include "decode_attention.cuh"\n'
FLUSH_BYTES = 1 << 30  # written before each call, so that nothing it reads is cached
CALLS = 9
SELECTORS = ("quest", "shadow_prefix", "full")


def instrumented(source: Path, target: Path) -> list[str]:
    """Copies the CUDA sources with a clock read at every mark, and returns the phases by number."""
    phases: list[str] = []

    def read_clock(match: re.Match) -> str:
        phases.append(match[2])
        return f"{match[1]}mark_phase({len(phases) - 1});"

    files = sorted(path for path in source.iterdir() if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
    texts = {path.name: MARK.sub(read_clock, path.read_text()) for path in files}
    repeated = sorted({name for name in phases if phases.count(name) > 1})
    if repeated or START not in phases or texts[OPERATOR].count(KERNEL_HEADER) != 1:
        raise ValueError(f"{source}: expected every phase marked once, `{START}` among them, got {', '.join(phases)}")
    clock = "#include <cuda_runtime.h>\n" + CLOCK.format(count=len(phases))
    texts[OPERATOR] = texts[OPERATOR].replace(KERNEL_HEADER, clock + KERNEL_HEADER)
    for name, text in texts.items():
        (target / name).write_text(text)
    return phases


def compiled(library: Path | None) -> tuple[list[str], Path]:
    """(phases, extension module that reads the clock at each): all that knows how phases are marked. An existing `library` is used."""
    folder = Path(tempfile.mkdtemp())
    phases = instrumented(ROOT / "csrc", folder)
    path = library or folder / "phases.abi3.so"
    if not path.exists():
        tools = toolchain()
        nvcc = tools.find_nvcc()
        if problem := tools.nvcc_problem(nvcc, torch.version.cuda):
            raise RuntimeError(problem)
        objects = tools.compile_objects(nvcc, sorted(folder.glob("*.cu")), folder)
        subprocess.run(tools.link_command(nvcc, objects, path), check=True)
    return phases, path.resolve()


def serve_from(library: Path) -> ctypes.CDLL:
    """Makes `library` the package's CUDA extension, which must not be loaded yet."""
    if MODULE in sys.modules:
        raise RuntimeError(f"{MODULE}: expected not to be loaded yet")
    loader = importlib.machinery.ExtensionFileLoader(MODULE, str(library))
    spec = importlib.util.spec_from_file_location(MODULE, library, loader=loader)
    sys.modules[MODULE] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[MODULE])
    return ctypes.CDLL(str(library))


def durations(clock: Sequence[Sequence[int]], phases: Sequence[str]) -> dict[str, float]:
    """Microseconds of each phase that a call passed, in the order in which it did; marks hold (cycles, nanoseconds), 0 where not passed."""
    passed = sorted((cycles, nanoseconds, name) for (cycles, nanoseconds), name in zip(clock, phases, strict=True) if cycles)
    (first, begin, name), (last, end, _) = passed[0], passed[-1]
    if name != START or last == first:
        raise ValueError(f"phases: expected `{START}` first and others after it, got {', '.join(name for *_, name in passed)}")
    microseconds = (end - begin) / 1e3 / (last - first)  # a cycle
    return {name: (now[0] - before[0]) * microseconds for before, now in zip(passed, passed[1:], strict=False) for name in [now[2]]}


class Phases(LayerOp):
    """Its copy of the kernels has to be loaded before the package's own."""

    needs_device = False  # to compile
    columns = "method median_us cluster_size phases error"

    def start(self, options: argparse.Namespace) -> None:
        if options.compile_only and options.library is None:
            options.error("--compile-only: expected --library FILE")
        if not options.compile_only and (not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)):
            options.error("expected an sm_90 GPU, got none")
        self.phases, path = compiled(options.library)
        if options.compile_only:
            raise SystemExit(0)
        self.library = serve_from(path)

    def prepare(self, selector: str, data: workload.Workload, options: argparse.Namespace) -> Method:
        """Calls of the fused kernel on one buffer set that find nothing in the L2."""
        from twilight_ops.kernels import native

        budget = workload.candidate_budget(selector, data.sizes.length)
        asked = {"selector": selector, "token_budget": budget, "budget_fraction": 0.0, "top_p": options.top_p, "dense_below": 0}
        arguments = workload.call_arguments("decode_attention", data, 0, **asked)
        blocks = workload.cluster_size(arguments)
        if blocks == 0:
            raise ValueError(f"{selector}: {data.sizes}: the fused kernel does not serve it")
        call = native.bind_decode_attention((), arguments)
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=data.keys.device)
        clock = ((ctypes.c_longlong * 2) * len(self.phases))()
        found: list[dict[str, float]] = []

        def sample(seconds: float) -> list[float]:
            for _ in range(CALLS):
                flush.zero_()
                native.run_fused(call, blocks)
                torch.cuda.synchronize()
                if self.library.read_phase_clock(clock):
                    raise RuntimeError("read_phase_clock: the clocks could not be read")
                found.append(durations(clock, self.phases))
            return [sum(times.values()) for times in found]

        def report() -> dict:
            return {"phase_us": {name: round(statistics.median(times[name] for times in found), 2) for name in found[-1]}}

        settings = {"stage": "fused phases", "selector": selector, "token_budget": budget, "top_p": options.top_p, "cluster_size": blocks}
        return Method(f"fused {selector}", [], report, settings, sampled=sample)

    def compared(self, rows: Sequence[dict]) -> list[dict]:
        return [row | {"phases": ", ".join(f"{name} {us:.1f}" for name, us in row.get("phase_us", {}).items())} for row in rows]


def options(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--library", type=Path, help="the compiled copy: used where it exists, else kept there")
    p.add_argument("--compile-only", action="store_true", help="make --library, for which no GPU is needed")


PHASES = Phases(
    "phases",
    f"{__doc__}\n\nA copy of the sources that reads the clock at each phase is compiled, which takes minutes, and serves in place of the\n"
    "package's kernels. Times are block 0's, those of waiting for other blocks included, in calls that find nothing in the L2.",
    lambda options: [Entry(f"fused {name}", partial(PHASES.prepare, name)) for name in SELECTORS],
    {"cuda": "phases"},
    devices=("cuda",),
    extra=options,
)
