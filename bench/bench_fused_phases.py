"""Where one block of the fused kernel spends its time, by its multiprocessor's clock.

    python bench/bench_fused_phases.py --cells 64:32k:32/8 1:32k:32/8 --json phases.json

TWILIGHT_PHASE("candidates scored") in csrc names a phase that ends there. The sources are compiled so that they read the clock at each,
which takes minutes (--library keeps it), and serve in this process in place of the package's kernels. The times are block 0's, those of
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
import zlib
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
START = "start"
DEFINES = ("TWILIGHT_READS_PHASES",)
PHASE_SLOTS = 1024
FLUSH_BYTES = 1 << 30  # written before each call, so that nothing it reads is cached
CALLS = 9


def compile_library(folder: Path, library: Path) -> None:
    """Compiles the CUDA sources, with clocks, into an extension module, by way of a folder of objects."""
    nvcc = toolchain.find_nvcc()
    if problem := toolchain.nvcc_problem(nvcc, torch.version.cuda):
        raise RuntimeError(problem)
    objects = toolchain.compile_objects(nvcc, toolchain.cuda_sources(), folder, DEFINES)
    subprocess.run(toolchain.link_command(nvcc, objects, library), check=True)


def phases_of(source: Path) -> dict[str, int]:
    """The phases that the sources name, and the number of each one's clock in csrc/sm90/phases.cuh."""
    texts = [path.read_text() for path in sorted(source.rglob("*.cuh"))]
    names = [name for text in texts for name in re.findall(r'TWILIGHT_PHASE\("(.+)"\);', text)]
    phases = {name: zlib.crc32(name.encode()) % PHASE_SLOTS for name in names}
    if len(set(phases.values())) != len(names) or START not in phases:
        raise ValueError(f"{source}: expected every phase named once, `{START}` among them, got {', '.join(sorted(names))}")
    return phases


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


def measure(
    data: workload.Workload, selector: str, budget: int, top_p: float, library: ctypes.CDLL, phases: dict[str, int]
) -> tuple[dict, int]:
    """(median microseconds by phase, blocks a KV head) of calls of the fused kernel on one buffer set."""
    from twilight_ops.kernels import native

    arguments = workload.decode_arguments(data.queries[0], data.cache.layers[0], data.paging, data.sm_scale)
    asked = {"selector": selector, "token_budget": budget, "budget_fraction": 0.0, "top_p": top_p, "dense_below": 0}
    call = native.bind_decode_attention((), arguments | asked)
    plan = native.fused_plan(call)
    if not plan.serves:
        raise ValueError(f"{selector}: {data.sizes}: {plan.reason}")
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=call["q"].device)
    clock = ((ctypes.c_longlong * 2) * PHASE_SLOTS)()
    found: list[dict[str, float]] = []
    for _ in range(CALLS):
        flush.zero_()
        native.run_fused(call)
        torch.cuda.synchronize()
        if library.read_phase_clock(clock):
            raise RuntimeError("read_phase_clock: the clocks could not be read")
        found.append(durations([clock[slot] for slot in phases.values()], list(phases)))
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
        path = options.library or Path(folder) / "phases.abi3.so"
        if not path.exists():
            with console.status("compiling"):
                compile_library(Path(folder), path)
        if options.compile_only:
            return 0
        library = serve_from(path.resolve())
        phases = phases_of(ROOT / "csrc")
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
