"""twilight::decode_attention against the dense attention that others offer, in one run.

On a GPU: every cell of batch 1 to 64 and 1k to 128k tokens that memory holds, by CUDA-graph replay over buffers that have left the L2,
beside our Triton stages and a kernel that only reads the bytes. Rows reach the file as they are measured; --resume continues a run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial

import runner
import speed_of_light
import torch
import workload
from peers import FA2, Peer, peers_on
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from runner import Method
from timing import Sizes, Timing, append_rows, decode_bytes, measure, output_of, read_rows, replay_us, tensors_of
from torch import Tensor
from workload import Workload, budget_means, decode_arguments

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig, ops

NOTES = (
    "x best dense, x FA2: how many times as fast as the fastest dense peer, and as torch's FlashAttention 2, of this run. MB: the least "
    "the method must read; of light: speed of a kernel that only reads those bytes, in one launch. I0, I1: candidates and kept tokens a "
    "KV head (the union of its group's query heads); mass: true attention mass of the kept tokens, mean over query heads."
)

# Batch, length, heads. What the targets are about comes first, so that a run cut short has it.
GPU_FIRST = (
    (64, 32768, "32/32"),
    (64, 32768, "32/8"),
    (8, 32768, "32/8"),
    (1, 131072, "32/8"),
    (1, 32768, "32/8"),
    (8, 131072, "32/8"),
)
GPU_GRID = [(b, n, heads) for heads in ("32/8", "32/32") for n in (1024, 8192, 32768, 131072) for b in (1, 8, 16, 64)]
GPU_CELLS = [*GPU_FIRST, *(cell for cell in GPU_GRID if cell not in GPU_FIRST)]

# Wall time over the whole run, compilation and checks included. A method that has used its share is left out of the remaining cells.
GPU_SECONDS = 345
GPU_METHOD_SECONDS = 60
# Largest error of an exact method, as a share of the largest output: outputs are rounded to bf16.
EXACT_TOLERANCE = 0.02
# A sparse method that captures this much less than it was asked for is broken, not approximate.
# Quest with 8192 of 131072 tokens and concentrated logits (--spread 4) has been seen to miss 0.27.
MASS_TOLERANCE = 0.4
LSE_TOLERANCE = 0.05  # natural-log units by which bf16 keys may raise the lse above the exact one


class DeviceLost(Exception):
    """The CUDA context is unusable after a failed method."""


@dataclass
class Contender:
    """A method by name; what it allocates or compiles is built when its turn comes."""

    name: str
    prepare: Callable[[], Method]


@dataclass
class Cell:
    """What is known of one shape so far."""

    sizes: Sizes
    medians: dict[str, float] = field(default_factory=dict)  # microseconds by method
    rows: list[dict] = field(default_factory=list)
    dense_peers: tuple[str, ...] = ()

    @property
    def best_dense(self) -> float | None:
        return min((self.medians[name] for name in self.dense_peers if name in self.medians), default=None)


def configurations(data: Workload, options: argparse.Namespace) -> dict[str, TwilightConfig]:
    """Twilight's contenders; `dense_below` as shipped unless asked otherwise."""
    common = {"top_p": options.top_p, "page_size": data.sizes.page_size, "dense_layers": 0, "dense_below": options.dense_below}
    prefix = data.prefix_channels
    eighth = ShadowPrefix(token_budget=512, budget_fraction=0.125, prefix_channels=prefix)
    found = {"dense": TwilightConfig(**(common | {"dense_layers": len(data.queries)}))}
    if options.device == "cuda":
        found["quest"] = TwilightConfig(selector=Quest(token_budget=min(options.token_budget, data.sizes.length // 4)), **common)
    else:
        fixed = ShadowPrefix(token_budget=options.token_budget, budget_fraction=0.0, prefix_channels=prefix)
        found["quest"] = TwilightConfig(selector=Quest(token_budget=options.token_budget), **common)
        found["shadow_prefix"] = TwilightConfig(selector=fixed, **common)
    found["shadow_prefix_eighth"] = TwilightConfig(selector=eighth, **common)
    if options.device == "cpu":
        found["full"] = TwilightConfig(selector=Full(), **common)
    return found


def served_by(arguments: dict) -> str:
    """Which CUDA kernels `decode_attention` runs for these arguments."""
    from twilight_ops import explain

    plan = explain(**arguments).plan
    return "stages" if plan is None else f"fused, {plan.cluster_size} a KV head"


def exact_check(expected: Tensor) -> Callable[[object], str | None]:
    """Refuses an output that is not exact attention."""

    def check(output: object) -> str | None:
        out = tensors_of(output)[0].float()
        error, limit = (out - expected).abs().max().item(), EXACT_TOLERANCE * expected.abs().max().item()
        return None if error <= limit else f"differs from exact attention by {error:.3g}, allowed are {limit:.3g}"

    return check


def captured_mass(lse: Tensor, exact_lse: Tensor) -> float:
    return (lse - exact_lse).exp().mean().item()


def sparse_check(exact_lse: Tensor, top_p: float) -> Callable[[object], str | None]:
    """Refuses an output that attention over a set of about `top_p` of the mass cannot have."""

    def check(output: object) -> str | None:
        out, lse = tensors_of(output)
        if not out.isfinite().all():
            return "its output is not finite"
        if not (lse <= exact_lse + LSE_TOLERANCE).all():
            return f"its lse exceeds the exact one by {(lse - exact_lse).max().item():.3g}"
        mass = captured_mass(lse, exact_lse)
        return None if mass >= top_p - MASS_TOLERANCE else f"it captures only {mass:.3f} of the attention mass"

    return check


def peer_method(data: Workload, peer: Peer, expected: Tensor) -> Method:
    return Method(
        peer.name,
        peer.calls(data),
        lambda: (data.sizes.kv_bytes, {"kept_tokens": float(data.sizes.length), "captured_mass": 1.0}),
        dense_peer=True,
        check=exact_check(expected),
    )


def twilight_method(
    data: Workload,
    name: str,
    attend: Callable,
    config: TwilightConfig,
    exact: tuple[Tensor, Tensor],
    served: Callable[[dict], str] | None = None,
) -> Method:
    """`attend` takes decode_attention's arguments: the operator or the stages behind it."""
    layers, sizes = data.layers(config), data.sizes
    plan = layers[0].plan
    arguments = [decode_arguments(q, layer, data.paging, data.sm_scale) for q, layer in zip(data.queries, layers, strict=True)]
    calls = [partial(attend, **a) for a in arguments]
    dense = takes_dense_path(data, config)

    def report() -> tuple[int, dict]:
        candidates, kept = budget_means(layers)
        _, lse = calls[0]()
        columns = {
            "candidates": round(candidates, 1),
            "kept_tokens": round(kept, 1),
            "captured_mass": round(captured_mass(lse, exact[1]), 5),
            "takes_dense_path": dense,
        }
        if served is not None:
            columns["served_by"] = served(arguments[0])
        selector = "dense" if dense else plan.selector.kernel
        return decode_bytes(sizes, selector, candidates, kept, data.prefix_channels, plan.prunes), columns

    settings = {"dense_below": plan.dense_below, "top_p": plan.top_p}
    if plan.selector is not None:
        settings |= {"token_budget": plan.selector.token_budget, "budget_fraction": plan.selector.budget_fraction}
    check = exact_check(exact[0]) if dense else sparse_check(exact[1], plan.top_p)
    return Method(name, calls, report, settings=settings, check=check)


def takes_dense_path(data: Workload, config: TwilightConfig) -> bool:
    plan = config.layer_plan(0, data.keys.device.type, data.sizes.lists)
    return plan.selector is None or data.sizes.length <= plan.dense_below


def light_chunks(data: Workload, arguments: dict) -> list[speed_of_light.Chunks]:
    """What one call must read, with the candidates and kept tokens that it chooses."""
    if arguments["selector"] == "dense":
        return speed_of_light.decode_chunks(arguments)
    q, sizes = arguments["q"], data.sizes
    budget = (arguments["token_budget"], arguments["budget_fraction"], data.sm_scale)
    if arguments["selector"] == "quest":
        candidates = ops.select_pages(q, arguments["page_bounds"], arguments["bounds_scale"], *data.paging, sizes.page_size, *budget)
    else:
        shadow = [arguments[name] for name in ("k_quant", "k_scale", "channel_order", "prefix_channels")]
        candidates = ops.select_tokens(q, *shadow, *data.paging, *budget)
    max_tokens = data.paging[0].shape[1] * sizes.page_size
    positions = torch.empty((sizes.batch, sizes.num_kv_heads, max_tokens), dtype=torch.int32, device=q.device)
    counts = positions.new_empty((sizes.batch, sizes.num_kv_heads))
    ops.decode_attention(**(arguments | {"budget_counters": None, "kept_indices": positions, "kept_counts": counts}))
    # Clamped, so that a wrong list cannot lead the reader out of bounds before its own method is found wrong.
    counts.clamp_(0, max_tokens)
    kept = positions[..., : int(counts.max())].clamp(0, sizes.length - 1)
    return speed_of_light.decode_chunks(arguments, candidates, (kept, counts))


def light_method(data: Workload, name: str, config: TwilightConfig) -> Method:
    """The reading kernel with the cluster size that serves it best."""
    layers = data.layers(config)
    chunks = [
        light_chunks(data, decode_arguments(q, layer, data.paging, data.sm_scale)) for q, layer in zip(data.queries, layers, strict=True)
    ]
    by_cluster: dict[int, float] = {}
    for size in speed_of_light.cluster_sizes(data.sizes.lists):
        by_cluster[size] = statistics.median(replay_us([speed_of_light.reader(c, size) for c in chunks], 3))
    best = min(by_cluster, key=by_cluster.get)
    moved = sum(part.nbytes for c in chunks for part in c) // len(chunks)
    columns = {"cluster_size": best, "us_by_cluster_size": {str(size): round(us, 2) for size, us in by_cluster.items()}}
    return Method(name, [speed_of_light.reader(c, best) for c in chunks], lambda: (moved, columns))


def peer_contenders(data: Workload, options: argparse.Namespace, exact: tuple[Tensor, Tensor]) -> list[Contender]:
    return [Contender(peer.name, partial(peer_method, data, peer, exact[0])) for peer in peers_on(options.device) if peer.missing() is None]


def contenders(data: Workload, options: argparse.Namespace) -> Iterator[list[Contender]]:
    """Groups that are timed together, dense peers first. On a CPU all take turns; on a GPU each runs alone, which needs less memory."""
    exact = data.exact(0)
    peers = peer_contenders(data, options, exact)
    plans = configurations(data, options)
    gpu = options.device == "cuda"
    ours = [
        Contender(
            f"twilight_{name}",
            partial(twilight_method, data, f"twilight_{name}", ops.decode_attention, config, exact, served_by if gpu else None),
        )
        for name, config in plans.items()
    ]
    if not gpu:
        yield peers + ours
        return
    from twilight_ops.kernels import STAGES

    sparse = {name: config for name, config in plans.items() if not takes_dense_path(data, config)}
    light = [Contender(f"speed_of_light_{n}", partial(light_method, data, f"speed_of_light_{n}", plans[n])) for n in ("dense", *sparse)]
    stages = [
        Contender(f"stages_{n}", partial(twilight_method, data, f"stages_{n}", STAGES["decode_attention"], config, exact))
        for n, config in sparse.items()
    ]
    for contender in [*peers, *light, *ours, *stages]:
        yield [contender]


def compare(cell: Cell, row: dict) -> None:
    """Adds the ratios to what was measured before it in this cell."""
    us, name = cell.medians[row["method"]], row["method"]
    if FA2 in cell.medians:
        row["ratio_to_fa2"] = round(cell.medians[FA2] / us, 3)
    family, _, plan = name.partition("_")
    if family in ("twilight", "stages"):
        light = cell.medians.get("speed_of_light_dense" if row.get("takes_dense_path") else f"speed_of_light_{plan}")
        if light is not None:
            row["share_of_speed_of_light"] = round(light / us, 4)


@dataclass
class Run:
    """State of the whole run."""

    options: argparse.Namespace
    console: Console
    where: dict[str, object]
    progress: Progress
    earlier: list[dict] = field(default_factory=list)  # rows of the run that this one continues
    spent: Counter = field(default_factory=Counter)  # seconds by method
    started: float = field(default_factory=time.monotonic)
    failed: bool = False

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.options.time_limit

    def done(self, sizes: Sizes) -> list[dict]:
        head = runner.row_head(sizes, self.options.device, "")
        return [row for row in self.earlier if all(row[key] == head[key] for key in ("device", "shape", "dtype"))]

    def wants(self, name: str, done: Sequence[dict]) -> bool:
        """Whether a method is asked for, still to be measured and within its time."""
        if not any(fnmatch(name, pattern) for pattern in self.options.methods) or any(row["method"] == name for row in done):
            return False
        if self.spent[name] > self.options.method_time_limit:
            self.console.print(f"{name}: left out, it has used {self.spent[name]:.0f} s of this run")
            return False
        return True

    def write(self, rows: Sequence[dict]) -> None:
        if self.options.json is not None:
            append_rows(self.options.json, rows, self.where)

    def attempt(self, cell: Cell, names: Sequence[str], work: Callable[[], object]) -> object:
        """`work()`, or None and a row that says why not; its wall time counts for the methods it is about."""
        start = time.monotonic()
        try:
            return work()
        except Exception as error:  # a peer may fail in any way of its own; the row and the exit status say so
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]
        finally:
            for name in names:
                self.spent[name] += (time.monotonic() - start) / len(names)
        rows = [runner.row_head(cell.sizes, self.options.device, name) | {"error": reason} for name in names]
        self.failed = True
        cell.rows += rows
        self.write(rows)
        self.console.print(f"[red]{', '.join(names)}: {reason}", highlight=False)
        if self.options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as lost:
                raise DeviceLost(reason) from lost
        return None

    def checked(self, contender: Contender) -> Method:
        method = contender.prepare()
        wrong = method.check(output_of(method.calls, self.options.device))
        if wrong is not None:
            raise ValueError(wrong)
        return method

    def measure_group(self, cell: Cell, group: Sequence[Contender]) -> list[tuple[Method, Timing]]:
        methods = [m for c in group if (m := self.attempt(cell, [c.name], partial(self.checked, c))) is not None]
        if not methods:
            return []
        calls = {m.name: m.calls for m in methods}
        timings = self.attempt(cell, list(calls), partial(measure, calls, self.options.device, self.options.seconds))
        return [] if timings is None else [(m, timings[m.name]) for m in methods]

    def measure_cell(self, sizes: Sizes) -> Cell:
        done = self.done(sizes)
        cell = Cell(sizes, {row["method"]: row["median_us"] for row in done if "median_us" in row})
        cell.dense_peers = tuple(peer.name for peer in peers_on(self.options.device))
        start = time.monotonic()
        options = self.options
        data = workload.build(sizes, options.device, options.sets, spread=options.spread, page_order=options.page_order)
        if self.options.device == "cuda":
            torch.cuda.synchronize()
        self.console.print(f"{sizes}: {runner.describe_sets(data)}; built in {time.monotonic() - start:.1f} s", highlight=False)
        waiting: list[tuple[Method, Timing]] = []  # dense peers, until the best of them is known
        try:
            for group in contenders(data, self.options):
                group = [c for c in group if self.wants(c.name, done)]
                if self.out_of_time or not group:
                    continue
                self.progress.update(0, description=f"{sizes}: {group[0].name if len(group) == 1 else 'all methods'}")
                for method, timing in self.measure_group(cell, group):
                    cell.medians[method.name] = timing.median_us
                    waiting.append((method, timing))
                if not all(method.dense_peer for method, _ in waiting):
                    self.finish(cell, waiting)
        finally:
            self.finish(cell, waiting)
        return cell

    def finish(self, cell: Cell, waiting: list[tuple[Method, Timing]]) -> None:
        """Rows of what was timed."""
        for method, timing in waiting:
            work = partial(runner.row_of, cell.sizes, self.options.device, method, timing, cell.best_dense)
            row = self.attempt(cell, [method.name], work)
            if row is not None:
                compare(cell, row)
                cell.rows.append(row)
                self.write([row])
        waiting.clear()


def cell_of(text: str) -> tuple[int, int, str]:
    """ "64:32k:32/8" -> (64, 32768, "32/8")."""
    try:
        batch, length, heads = text.split(":")
        tokens = int(length[:-1]) * 1024 if length[-1] in "kK" else int(length)
        query_heads, kv_heads = map(int, heads.split("/"))
        if min(int(batch), tokens, query_heads, kv_heads) < 1 or query_heads % kv_heads:
            raise ValueError(text)
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"expected batch:length:heads such as 64:32k:32/8, got {text!r}") from None
    return int(batch), tokens, heads


def parser() -> argparse.ArgumentParser:
    cli = runner.parser(__doc__, lengths=(1024, 32768))
    cli.add_argument(
        "--dense-below",
        type=int,
        default=None,
        help="tokens up to which Twilight attends to everything; default: as shipped, the break-even in twilight_ops/config.py",
    )
    cli.add_argument(
        "--cells",
        nargs="+",
        type=cell_of,
        default=None,
        metavar="B:L:HEADS",
        help="shapes instead of --batch, --length and --heads, such as 64:32k:32/8; on a GPU the default is every cell that memory holds",
    )
    cli.add_argument("--methods", nargs="+", default=["*"], metavar="NAME", help="methods, by name or pattern such as 'twilight_*'")
    cli.add_argument(
        "--time-limit", type=float, default=None, help=f"seconds for the whole run; default: {GPU_SECONDS} on a GPU, else none"
    )
    cli.add_argument(
        "--method-time-limit",
        type=float,
        default=None,
        help=f"seconds for one method over all cells, compilation included; default: {GPU_METHOD_SECONDS} on a GPU, else none",
    )
    cli.add_argument("--resume", action="store_true", help="keep the rows of --json and measure what is missing")
    return cli


def cells_of(options: argparse.Namespace) -> list[Sizes]:
    if options.cells is None and options.device == "cpu":
        return runner.shapes(options)
    cells = GPU_CELLS if options.cells is None else options.cells
    return [runner.sizes_of(options, *cell, dtype) for cell in cells for dtype in options.dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where a method failed, 3 where the device was lost and --resume is to continue."""
    cli = parser()
    options = cli.parse_args(arguments)
    if options.query_tokens != 1:
        cli.error("--query-tokens: dense peers attend with one query token a sequence, expected 1")
    if options.resume and options.json is None:
        cli.error("--resume: expected --json FILE")
    runner.resolve(options)
    limits = (GPU_SECONDS, GPU_METHOD_SECONDS) if options.device == "cuda" else (float("inf"), float("inf"))
    options.time_limit = limits[0] if options.time_limit is None else options.time_limit
    options.method_time_limit = limits[1] if options.method_time_limit is None else options.method_time_limit
    console, where = runner.announce(options, NOTES)
    where |= {"logit_std": options.spread, "page_order": options.page_order}
    for peer in peers_on(options.device):
        if (why := peer.missing()) is not None:
            console.print(f"{peer.name}: left out, {why}")
    earlier: list[dict] = []
    if options.json is not None and options.json.exists():
        if options.resume:
            earlier = read_rows(options.json)
        else:
            options.json.unlink()
    cells = cells_of(options)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, torch.inference_mode():
        progress.add_task("cells", total=len(cells))
        run = Run(options, console, where, progress, earlier)
        for sizes in cells:
            if run.out_of_time:
                console.print(f"{sizes}: left out, the time limit of {options.time_limit:.0f} s has passed")
            else:
                try:
                    cell = run.measure_cell(sizes)
                except MemoryError as error:
                    console.print(f"left out: {error}")
                except DeviceLost as error:
                    console.print(f"[red]the device is lost after {error}; repeat with --resume to go on without that method")
                    return 3
                else:
                    if cell.rows:
                        runner.show(console, sizes, cell.rows)
                    del cell
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            progress.advance(0)
    took = time.monotonic() - run.started
    console.print(f"{took:.0f} s; by method: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in run.spent.most_common()))
    return 1 if run.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
