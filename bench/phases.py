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
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from twilight_ops.evaluation.methods import parse_method

from . import workload
from .registry import LayerOp, config_of, decode_arguments
from .rows import ROOT
from .run import Entry
from .settings import add_settings, parsed_settings
from .speed_of_light import toolchain
from .timing import Method

MODULE = "twilight_ops._C_cuda"
START = "start"
DEFINES = ("TWILIGHT_READS_PHASES",)
PHASE_SLOTS = 1024
FLUSH_BYTES = 1 << 30  # written before each call, so that nothing it reads is cached
CALLS = 9
# Arguments of decode_attention beside the selector's budget.
SELECTORS: dict[str, dict[str, object]] = {
    "quest": {},
    "shadow_prefix": {},
    "two_levels": {"selector": "shadow_prefix", "page_fraction": 0.25, "min_scored_tokens": 8192},
    "page_mean": {},
    "full": {},
}


def phases_of(source: Path) -> dict[str, int]:
    """The phases that the sources name, and the number of each one's clock in csrc/sm90/phases.cuh."""
    texts = [path.read_text() for path in sorted(source.rglob("*.cuh"))]
    names = [name for text in texts for name in re.findall(r'TWILIGHT_PHASE\("(.+)"\);', text)]
    phases = {name: zlib.crc32(name.encode()) % PHASE_SLOTS for name in names}
    if len(set(phases.values())) != len(names) or START not in phases:
        raise ValueError(f"{source}: expected every phase named once, `{START}` among them, got {', '.join(sorted(names))}")
    return phases


def compiled(library: Path | None) -> tuple[dict[str, int], Path]:
    """(phases, extension module that reads the clock at each): all that knows how phases are marked. An existing `library` is used."""
    folder = Path(tempfile.mkdtemp())
    path = library or folder / "phases.abi3.so"
    if not path.exists():
        tools = toolchain()
        nvcc = tools.find_nvcc()
        if problem := tools.nvcc_problem(nvcc, torch.version.cuda):
            raise RuntimeError(problem)
        objects = tools.compile_objects(nvcc, tools.cuda_sources(), folder, DEFINES)
        subprocess.run(tools.link_command(nvcc, objects, path), check=True)
    return phases_of(ROOT / "csrc"), path.resolve()


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
        if selector in options.settings:
            arguments = decode_arguments(data, 0, data.layers(config_of(selector, data, options))[0])
            settings = {"setting": parse_method(selector).setting, "top_p": arguments["top_p"]}
        else:
            budget = workload.candidate_budget(selector, data.sizes.length)
            settings = {"selector": selector, "token_budget": budget, "top_p": options.top_p}
            asked = settings | {"budget_fraction": 0.0, "dense_below": 0} | SELECTORS[selector]
            arguments = workload.call_arguments("decode_attention", data, 0, **asked)
        served = workload.explained(arguments)
        if served.plan is None:
            raise ValueError(f"{selector}: {data.sizes}: {served.reason}")
        blocks = served.plan.cluster_size
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=data.keys.device)
        clock = ((ctypes.c_longlong * 2) * PHASE_SLOTS)()
        found: list[dict[str, float]] = []

        def sample(seconds: float) -> list[float]:
            for _ in range(CALLS):
                flush.zero_()
                torch.ops.twilight.decode_attention(**arguments)
                torch.cuda.synchronize()
                if self.library.read_phase_clock(clock):
                    raise RuntimeError("read_phase_clock: the clocks could not be read")
                found.append(durations([clock[slot] for slot in self.phases.values()], list(self.phases)))
            return [sum(times.values()) for times in found]

        def report() -> dict:
            return {"phase_us": {name: round(statistics.median(times[name] for times in found), 2) for name in found[-1]}}

        return Method(f"fused {selector}", [], report, {"stage": "fused phases"} | settings | {"cluster_size": blocks}, sampled=sample)

    def compared(self, rows: Sequence[dict]) -> list[dict]:
        return [row | {"phases": ", ".join(f"{name} {us:.1f}" for name, us in row.get("phase_us", {}).items())} for row in rows]


def options(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--library", type=Path, help="the compiled copy: used where it exists, else kept there")
    p.add_argument("--compile-only", action="store_true", help="make --library, for which no GPU is needed")
    add_settings(p)
    p.set_defaults(dense_below=0)


def entries(options: argparse.Namespace) -> list[Entry]:
    return [Entry(f"fused {name}", partial(PHASES.prepare, name)) for name in (*SELECTORS, *parsed_settings(options))]


PHASES = Phases(
    "phases",
    f"{__doc__}\n\nThe sources are compiled so that they read the clock at each phase, which takes minutes, and serve in place of the\n"
    "package's kernels. Times are block 0's, those of waiting for other blocks included, in calls that find nothing in the L2.",
    entries,
    {"cuda": "phases"},
    devices=("cuda",),
    extra=options,
)
