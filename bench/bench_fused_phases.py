"""Where one block of the fused kernel spends its time, by its multiprocessor's clock.

    python bench/bench_fused_phases.py --cells 64:32k:32/8 1:32k:32/8 --json phases.json

Comments in csrc name the phases (`// phase: candidates scored`). A copy of the sources that reads the clock at each of them is compiled,
which takes minutes (--library keeps it), and serves in this process in place of the package's kernels. The times are block 0's, those of
waiting for other blocks included, in a call that finds nothing in the L2; medians of several calls.
"""

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
from pathlib import Path

import runner
import torch
import workload
from rich.table import Table
from timing import ROOT, append_rows, candidate_budget, environment

sys.path.append(str(ROOT / "csrc"))
import toolchain  # noqa: E402

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
    texts[OPERATOR] = texts[OPERATOR].replace(
        KERNEL_HEADER, "#include <cuda_runtime.h>\n" + CLOCK.format(count=len(phases)) + KERNEL_HEADER
    )
    for name, text in texts.items():
        (target / name).write_text(text)
    return phases


def compile_library(source: Path, library: Path) -> None:
    """Compiles all CUDA sources of a folder into an extension module."""
    nvcc = toolchain.find_nvcc()
    if problem := toolchain.nvcc_problem(nvcc, torch.version.cuda):
        raise RuntimeError(problem)
    objects = toolchain.compile_objects(nvcc, sorted(source.glob("*.cu")), source)
    subprocess.run(toolchain.link_command(nvcc, objects, library), check=True)


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


def measure(data: workload.Workload, selector: str, budget: int, top_p: float, library: ctypes.CDLL, phases: list[str]) -> tuple[dict, int]:
    """(median microseconds by phase, blocks a KV head) of calls of the fused kernel on one buffer set."""
    from twilight_ops.kernels import native

    arguments = workload.decode_arguments(data.queries[0], data.cache.layers[0], data.paging, data.sm_scale)
    asked = {"selector": selector, "token_budget": budget, "budget_fraction": 0.0, "top_p": top_p, "dense_below": 0}
    call = native.bind_decode_attention((), arguments | asked)
    plan = native.fused_plan(call)
    if not plan.serves:
        raise ValueError(f"{selector}: {data.sizes}: {plan.reason}")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=call["q"].device)
    clock = ((ctypes.c_longlong * 2) * len(phases))()
    found: list[dict[str, float]] = []
    for _ in range(CALLS):
        flush.zero_()
        native.run_fused(call)
        torch.cuda.synchronize()
        if library.read_phase_clock(clock):
            raise RuntimeError("read_phase_clock: the clocks could not be read")
        found.append(durations(clock, phases))
    return {name: statistics.median(times[name] for times in found) for name in found[-1]}, plan.cluster_size


def parser() -> argparse.ArgumentParser:
    from bench_decode_attention import cell_of

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--cells", nargs="+", type=cell_of, default=[(64, 32768, "32/8"), (16, 32768, "32/32"), (1, 32768, "32/8")], metavar="B:L:HEADS"
    )
    p.add_argument("--selectors", nargs="+", choices=("quest", "shadow_prefix", "full"), default=["quest", "shadow_prefix"])
    p.add_argument("--head-dim", type=int, choices=(64, 128), default=128)
    p.add_argument("--top-p", type=float, default=0.85)
    p.add_argument("--spread", type=float, default=workload.SPREAD, help="standard deviation of the logits")
    p.add_argument("--library", type=Path, help="the compiled copy: used where it exists, else kept there")
    p.add_argument("--compile-only", action="store_true", help="make --library, for which no GPU is needed")
    p.set_defaults(query_tokens=1, page_size=16)
    p.add_argument("--json", type=Path, help="append the rows to this file, one JSON object a line")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    cli = parser()
    options = cli.parse_args(arguments)
    if options.compile_only and options.library is None:
        cli.error("--compile-only: expected --library FILE")
    if not options.compile_only and (not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)):
        cli.error("expected an sm_90 GPU, got none")
    console = runner.console_of(160)
    with tempfile.TemporaryDirectory() as folder:
        phases = instrumented(ROOT / "csrc", Path(folder))
        path = options.library or Path(folder) / "phases.abi3.so"
        if not path.exists():
            with console.status("compiling"):
                compile_library(Path(folder), path)
        if options.compile_only:
            return 0
        library = serve_from(path.resolve())
        for cell in options.cells:
            sizes = runner.sizes_of(options, *cell, "bf16")
            data = workload.build(sizes, "cuda", 1, spread=options.spread)
            for selector in options.selectors:
                budget = candidate_budget(selector, sizes.length)
                times, blocks = measure(data, selector, budget, options.top_p, library, phases)
                table = Table("phase", "us", title=f"{selector}, {sizes}, {blocks} blocks a KV head", title_justify="left")
                for name, microseconds in times.items():
                    table.add_row(name, f"{microseconds:.1f}")
                table.add_row("all", f"{sum(times.values()):.1f}")
                console.print(table)
                if options.json is not None:
                    row = runner.row_head(sizes, "cuda", "clock64 of block 0 in a cold call")
                    row |= {"stage": "fused phases", "selector": selector, "token_budget": budget, "top_p": options.top_p}
                    row |= {"cluster_size": blocks, "phase_us": {name: round(us, 2) for name, us in times.items()}}
                    append_rows(options.json, [row], environment("cuda"))
            del data
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
