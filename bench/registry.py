"""Every measurement by name: operators, their methods and their shapes, each declared once. `python -m bench list` prints this file."""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from twilight_ops import DoubleSparsity, Full, PagedKVLayer, PageMean, Quest, ShadowPrefix, Streaming, TwilightConfig, decode_step
from twilight_ops.evaluation.methods import parse_method

from . import heads, peers, rows, speed_of_light, timing, workload
from .checks import captured_mass, exact_check, sparse_check
from .peers import FA2
from .run import DEVICES, Entry, Op, tokens_of
from .settings import add_settings, parsed_settings
from .timing import Method, Timing
from .workload import Sizes, Workload, call_arguments, operator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# (batch, length, heads)
Shape = tuple[int, int, str]
# What the targets are about comes first, so that a run cut short has it.
TARGETS: list[Shape] = [
    (64, 32768, "32/32"),
    (64, 32768, "32/8"),
    (8, 32768, "32/8"),
    (1, 131072, "32/8"),
    (1, 32768, "32/8"),
    (8, 131072, "32/8"),
]
GRID: list[Shape] = [(b, n, heads) for heads in ("32/8", "32/32") for n in (1024, 8192, 32768, 131072) for b in (1, 8, 16, 64)]
GRIDS: dict[str, list[Shape]] = {
    "tiny": [(2, 256, "8/2")],
    "one": [(1, 32768, "32/8")],
    "short-long": [(1, 1024, "32/8"), (1, 32768, "32/8")],
    "two-batches": [(64, 32768, "32/8"), (1, 32768, "32/8")],
    "phases": [(64, 32768, "32/8"), (16, 32768, "32/32"), (1, 32768, "32/8")],
    "targets": TARGETS,
    "all": [*TARGETS, *(shape for shape in GRID if shape not in TARGETS)],
}


def shape_of(text: str) -> Shape:
    """ "64:32k:32/8" -> (64, 32768, "32/8")."""
    try:
        batch, length, heads = text.split(":")
        query_heads, kv_heads = map(int, heads.split("/"))
        if min(int(batch), tokens_of(length), query_heads, kv_heads) < 1 or query_heads % kv_heads:
            raise ValueError(text)
    except (ValueError, IndexError):
        expected = f"batch:length:heads such as 64:32k:32/8, or {', '.join(GRIDS)}"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
    return int(batch), tokens_of(length), heads


@dataclass
class LayerOp(Op):
    """Calls of one layer on a `Workload`."""

    name: str
    about: str
    make: Callable[[argparse.Namespace], list[Entry]]
    grids: dict[str, str]
    notes: str = ""
    devices: tuple[str, ...] = DEVICES
    time_limits: dict = field(default_factory=dict)
    extra: Callable[[argparse._ArgumentGroup], None] = lambda parser: None
    columns = (
        "method median_us spread bytes gb_per_s share_of_read_bandwidth ratio_to_best_dense ratio_to_fa2 share_of_speed_of_light "
        "candidates kept_tokens captured_mass estimated_mass kl_31k accuracy served_by error"
    )

    def add_options(self, p: argparse._ArgumentGroup) -> None:
        p.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16, and fp32 on a CPU")
        p.add_argument("--head-dim", type=int, default=128, metavar="D", help="default: 128")
        p.add_argument("--page-size", type=int, default=16, metavar="S", help="default: 16")
        p.add_argument("--query-tokens", type=int, default=1, metavar="T", help="of a sequence; dense peers take 1")
        p.add_argument("--top-p", type=float, default=0.85, metavar="P", help="default: 0.85")
        p.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of our paged K and V; peers read --dtype")
        p.add_argument("--page-order", choices=workload.PAGE_ORDERS, default="shuffled", help="where a sequence's pages lie in the pool")
        p.add_argument("--data", choices=workload.DATA, help="default: qwen, the statistics of its heads, which have 128 channels")
        p.add_argument("--spread", type=float, metavar="STD", help="of the logits of Gaussian data; default: 3.7")
        p.add_argument(
            "--sets", type=int, metavar="N", help="buffer sets in turn; default: 1 GiB of K and V, or 512 MiB of what a GPU call reads"
        )
        self.extra(p)

    def shapes(self, text: str) -> list[Shape]:
        return GRIDS[text] if text in GRIDS else [shape_of(text)]

    def default_shapes(self, device: str) -> str:
        return self.grids[device]

    def entries(self, options: argparse.Namespace) -> list[Entry]:
        return self.make(options)

    def cells(self, options: argparse.Namespace) -> list[Sizes]:
        dtypes = options.dtype or {"cpu": ["bf16", "fp32"], "cuda": ["bf16"]}[options.device]
        return [sizes_of(options, *shape, dtype) for shape in options.shapes for dtype in dtypes]

    def open(self, sizes: Sizes, options: argparse.Namespace, sets: int | None = None, memory_share: float = 1.0) -> Workload:
        sets = options.sets if sets is None else sets
        given = {"data": options.data, "page_order": options.page_order, "memory_share": memory_share}
        if options.spread is not None:
            given["spread"] = options.spread
        return workload.build(sizes, options.device, sets, **given)

    def head(self, sizes: Sizes, options: argparse.Namespace) -> dict:
        head = {"device": options.device, "shape": sizes.describe(), "dtype": str(sizes.dtype).removeprefix("torch.")}
        return head | ({} if sizes.kv_cache_dtype == "auto" else {"kv_cache_dtype": sizes.kv_cache_dtype})

    def environment(self, options: argparse.Namespace) -> dict:
        data = workload.data_of(options.data, options.head_dim)
        spread = {"logit_std": options.spread or workload.SPREAD} if data == "gaussian" else {}
        return super().environment(options) | {"data": data, **spread, "page_order": options.page_order}

    def start(self, options: argparse.Namespace) -> None:
        data = workload.data_of(options.data, options.head_dim)
        if data == "qwen" and options.head_dim != heads.HEAD_DIM:
            options.error(f"--data: expected gaussian for {options.head_dim} channels, got qwen, whose heads have {heads.HEAD_DIM}")
        if data == "qwen" and options.spread is not None:
            options.error("--spread: expected --data gaussian, because the logits of qwen are as recorded")

    def assumptions(self, options: argparse.Namespace) -> str:
        data = workload.data_of(options.data, options.head_dim)
        told = workload.assumptions(data, options.spread or workload.SPREAD, options.page_order)
        return f"data: {told}; spread = (p90 - p10) / median"

    def row(self, sizes: Sizes, options: argparse.Namespace, method: Method, timing: Timing, medians: dict[str, float]) -> dict:
        us = timing.median_us
        row = {"median_us": round(us, 2), "spread": round(timing.spread, 4)}
        row |= {"p10_us": round(timing.p10_us, 2), "p90_us": round(timing.p90_us, 2), "runs": timing.runs}
        row |= method.report() | method.settings
        if "bytes" in row:
            row["gb_per_s"] = round(row["bytes"] / us / 1e3, 3)
        if "read_gb_per_s" in row:
            row["share_of_read_bandwidth"] = round(row["gb_per_s"] / row["read_gb_per_s"], 4)
        return row | ratios(method.name, row, medians)


def sizes_of(options: argparse.Namespace, batch: int, length: int, heads: str, dtype: str) -> Sizes:
    num_qo_heads, num_kv_heads = map(int, heads.split("/"))
    call = (batch, options.query_tokens, num_qo_heads, num_kv_heads, options.head_dim, options.page_size, length, DTYPES[dtype])
    return Sizes(*call, options.kv_cache_dtype)


def ratios(name: str, row: dict, medians: dict[str, float]) -> dict:
    """How a method stands beside what the same shape measured before it."""
    us, found = medians[name], {}
    dense = {peer.name: medians[peer.name] for peer in peers.PEERS if peer.name in medians}
    if dense and name not in dense:
        found["ratio_to_best_dense"] = round(min(dense.values()) / us, 3)
    if FA2 in medians:
        found["ratio_to_fa2"] = round(medians[FA2] / us, 3)
    family, _, plan = name.partition("_")
    light = medians.get("speed_of_light_dense" if row.get("takes_dense_path") else f"speed_of_light_{plan}")
    if family in ("twilight", "stages") and light is not None:
        found["share_of_speed_of_light"] = round(light / us, 4)
    return found


# decode_attention: peers, a kernel that only reads, ours in one call, the Triton stages behind it.


def config_of(name: str, data: Workload, options: argparse.Namespace) -> TwilightConfig:
    """Twilight's contenders, or one by its setting; `dense_below` as shipped unless asked otherwise."""
    common = {"page_size": data.sizes.page_size, "dense_below": options.dense_below, "kv_cache_dtype": data.sizes.kv_cache_dtype}
    if name in options.settings:
        method = parse_method(name)
        return TwilightConfig(selector=method.selector, top_p=method.top_p, **common | dict(method.settings))
    budget = min(options.token_budget, data.sizes.length // 4) if options.device == "cuda" else options.token_budget
    selectors = {
        "dense": lambda: Full(),
        "quest": lambda: Quest(token_budget=budget),
        "shadow_prefix": lambda: ShadowPrefix(options.token_budget, 0.0, page_fraction=1.0, prefix_channels=data.fixed_prefix),
        "shadow_prefix_eighth": lambda: ShadowPrefix(page_fraction=1.0, prefix_channels=data.fixed_prefix),
        "shadow_prefix_levels": lambda: ShadowPrefix(prefix_channels=data.fixed_prefix),
        "page_mean": lambda: PageMean(),
        "full": lambda: Full(),
    }
    layers = len(data.queries) if name == "dense" else 0
    return TwilightConfig(selector=selectors[name](), dense_layers=layers, top_p=options.top_p, **common)


def prunes(name: str, data: Workload, options: argparse.Namespace) -> bool:
    return not takes_dense_path(data, config_of(name, data, options))


def takes_dense_path(data: Workload, config: TwilightConfig) -> bool:
    plan = config.layer_plan(0, data.keys.device.type, data.sizes.lists)
    return plan.selector is None or data.sizes.length <= plan.dense_below


def served_by(arguments: dict) -> str:
    """Which CUDA kernels `decode_attention` runs for these arguments."""
    plan = workload.explained(arguments).plan
    return "stages" if plan is None else f"fused, {plan.cluster_size} a KV head"


def triton_stages() -> Callable:
    from twilight_ops import kernels

    return kernels.stage("decode_attention")


def decode_arguments(data: Workload, index: int, layer: PagedKVLayer) -> dict[str, object]:
    """Of `decode_attention`, with the sinks and the newest tokens that the layer's configuration keeps."""
    return call_arguments("decode_attention", data, index, layer, **layer.policy.always._asdict())


def twilight_method(family: str, name: str, data: Workload, options: argparse.Namespace) -> Method:
    """The operator, or with family "stages" the Triton stages that serve it where no fused kernel does."""
    attend = triton_stages() if family == "stages" else operator("decode_attention")
    config = config_of(name, data, options)
    layers, sizes = data.layers(config), data.sizes
    plan = layers[0].plan
    arguments = [decode_arguments(data, i, layer) for i, layer in enumerate(layers)]
    calls = [partial(attend, **a) for a in arguments]
    dense = takes_dense_path(data, config)

    def report() -> dict:
        candidates, kept = workload.budget_means(layers)
        _, lse = calls[0]()
        columns = {
            "bytes": sizes.stored_bytes if dense else workload.decode_bytes(sizes, layers[0], candidates, kept),
            "candidates": round(candidates, 1),
            "kept_tokens": round(kept, 1),
            "captured_mass": round(captured_mass(lse, data.expected[1]), 5),
            "takes_dense_path": dense,
        }
        if not dense:
            columns |= rows.accuracy_of(rows.setting_of(config))
        if family == "twilight" and options.device == "cuda":
            columns["served_by"] = served_by(arguments[0])
        return columns

    settings = {"dense_below": plan.dense_below, "top_p": plan.top_p}
    if plan.selector is not None:
        settings |= {"token_budget": plan.selector.token_budget, "budget_fraction": plan.selector.budget_fraction}
    # These two choose candidates that may lack any mass: their rows say how much.
    asked = 0.0 if isinstance(config.selector, DoubleSparsity | Streaming) else plan.top_p
    check = exact_check(data.expected[0]) if dense else sparse_check(data.expected[1], asked)
    return Method(f"{family}_{name}", calls, report, settings, check)


def light_chunks(data: Workload, index: int, layer: PagedKVLayer) -> list[speed_of_light.Chunks]:
    """What one call must read, with the candidates and kept tokens that it chooses."""
    arguments = decode_arguments(data, index, layer)
    if arguments["selector"] == "dense":
        return speed_of_light.decode_chunks(arguments)
    sizes = data.sizes
    chosen = {name: arguments[name] for name in ("token_budget", "budget_fraction", "sink_tokens", "recent_tokens")}
    op = workload.SELECT_OPS[arguments["selector"]]
    candidates = operator(op)(**call_arguments(op, data, index, layer, **chosen))
    max_tokens = data.paging.page_table.shape[1] * sizes.page_size
    positions = torch.empty((sizes.batch, sizes.num_kv_heads, max_tokens), dtype=torch.int32, device=data.keys.device)
    counts = positions.new_empty((sizes.batch, sizes.num_kv_heads))
    operator("decode_attention")(**arguments | {"budget_counters": None, "kept_indices": positions, "kept_counts": counts})
    # Clamped, so that a wrong list cannot lead the reader out of bounds before its own method is found wrong.
    counts.clamp_(0, max_tokens)
    kept = positions[..., : int(counts.max())].clamp(0, sizes.length - 1)
    return speed_of_light.decode_chunks(arguments, candidates, (kept, counts))


def has_light(name: str, options: argparse.Namespace) -> bool:
    """Whether the reading kernel knows what a contender selects by: it knows neither means of pages nor windows."""
    if name not in options.settings:
        return name not in ("shadow_prefix_levels", "page_mean")
    selector = parse_method(name).selector
    return not isinstance(selector, PageMean | Streaming) and getattr(selector, "page_fraction", 1.0) == 1.0


def light_method(name: str, data: Workload, options: argparse.Namespace) -> Method:
    """The reading kernel with the cluster size that serves it best."""
    layers = data.layers(config_of(name, data, options))
    chunks = [light_chunks(data, i, layer) for i, layer in enumerate(layers)]
    by_cluster: dict[int, float] = {}
    units = data.sizes.lists
    for size in (c for c in speed_of_light.CLUSTER_SIZES if c == 1 or units * c <= speed_of_light.MAX_BLOCKS):
        by_cluster[size] = statistics.median(timing.Replay([speed_of_light.reader(c, size) for c in chunks]).sample(3))
    best = min(by_cluster, key=by_cluster.get)
    columns = {
        "bytes": sum(part.nbytes for c in chunks for part in c) // len(chunks),
        "cluster_size": best,
        "us_by_cluster_size": {str(size): round(us, 2) for size, us in by_cluster.items()},
    }
    return Method(f"speed_of_light_{name}", [speed_of_light.reader(c, best) for c in chunks], lambda: columns)


def decode_entries(options: argparse.Namespace) -> list[Entry]:
    if options.query_tokens != 1:
        options.error(f"--query-tokens: dense peers attend with one query token a sequence, expected 1, got {options.query_tokens}")
    for text, method in parsed_settings(options).items():
        if method.selector.kernel == "given":
            kept = "full, quest, page_mean, shadow_prefix, double_sparsity, streaming"
            options.error(f"--settings: expected a selector whose data the bench keeps ({kept}), got {text}")
        if isinstance(method.selector, DoubleSparsity) and options.kv_cache_dtype != "auto":
            options.error(f"--settings: expected K and V in the model's dtype with double_sparsity, got {options.kv_cache_dtype}")
    gpu, both = ("cuda",), DEVICES
    configurations = {"dense": both, "quest": both, "shadow_prefix": ("cpu",), "shadow_prefix_eighth": both, "full": ("cpu",)}
    configurations |= {"shadow_prefix_levels": both, "page_mean": both}
    configurations |= {text: both for text in options.settings}
    on_gpu = [name for name, devices in configurations.items() if "cuda" in devices]
    sparse = {name: partial(prunes, name) for name in on_gpu if name != "dense"}
    found = [*peers.PEERS]
    for name in (name for name in on_gpu if has_light(name, options)):
        wanted = {"wanted": sparse[name]} if name in sparse else {}
        found.append(Entry(f"speed_of_light_{name}", partial(light_method, name), gpu, "bound", **wanted))
    found += [Entry(f"twilight_{name}", partial(twilight_method, "twilight", name), devices) for name, devices in configurations.items()]
    found += [Entry(f"stages_{name}", partial(twilight_method, "stages", name), gpu, wanted=wanted) for name, wanted in sparse.items()]
    return found


def decode_options(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--token-budget",
        type=int,
        default=8192,
        metavar="N",
        help="candidates; of Quest on a GPU at most a quarter of the length; default: 8192",
    )
    add_settings(p)
    shipped = "default: as shipped, the break-even in twilight_ops/config.py"
    p.add_argument("--dense-below", type=int, metavar="N", help=f"tokens up to which Twilight attends to everything; {shipped}")


# Stages: each operator on what the one before it gave.


def stage_calls(stage: str, data: Workload, selector: str, budget: int, options: argparse.Namespace) -> list[Callable]:
    """One call a buffer set."""
    found = workload.pipeline(data, selector, budget, options.top_p)
    asked = {"selector": selector, "token_budget": max(1, budget), "budget_fraction": 0.0, "top_p": options.top_p, "dense_below": 0}
    calls = {
        "select": lambda i: workload.select_call(data, selector, budget, i),
        "estimate": lambda i: workload.call("estimate_weights", data, i, **found.listed[i]),
        "prune": lambda i: workload.call("prune_top_p", data, i, weights=found.weights[i], top_p=options.top_p, **found.listed[i]),
        "attend": lambda i: workload.call("attend_sparse", data, i, **found.pruned[i]),
        "attend to all": lambda i: workload.call("attend_sparse", data, i, **workload.EVERYTHING),
        "decode_attention": lambda i: partial(
            triton_stages() if options.device == "cuda" else operator("decode_attention"),
            **call_arguments("decode_attention", data, i, budget_counters=None, **asked),
        ),
    }
    return [calls[stage](i) for i in range(len(data.queries))]


def stage_bytes(stage: str, data: Workload, selector: str, found: workload.Pipeline) -> int:
    """Least bytes that a call reads; what it writes does not count."""
    sizes = data.sizes
    read = {
        "select": {"quest": sizes.bounds_bytes(), "shadow_prefix": sizes.prefix_bytes(data.prefix_channels), "full": 0}[selector],
        "estimate": sizes.lists * found.candidates * sizes.shadow_token_bytes,
        "prune": sizes.lists * found.candidates * sizes.num_qo_heads // sizes.num_kv_heads * torch.float32.itemsize,
        "attend": sizes.lists * found.kept * sizes.token_bytes,
    }
    return round(sizes.stored_bytes if stage == "attend to all" else read.get(stage, sum(read.values())))


@functools.cache
def bandwidth(device: str) -> float:
    return timing.read_bandwidth(device)


def stage_method(name: str, stage: str, setting: str, data: Workload, options: argparse.Namespace) -> Method:
    selector, _, budget = setting.partition(":")
    tokens = min(int(budget or 0), data.sizes.length)
    calls = stage_calls(stage, data, selector, tokens, options)
    found = workload.pipeline(data, selector, tokens, options.top_p)
    report = {"bytes": stage_bytes(stage, data, selector, found), "candidates": round(found.candidates, 1)}
    report |= {"kept_tokens": round(found.kept, 1), "estimated_mass": round(found.mass, 5)}
    settings = {"stage": stage, "selector": setting, "top_p": options.top_p, "read_gb_per_s": round(bandwidth(options.device) / 1e9, 1)}
    return Method(name, calls, lambda: report, settings)


def setting_of(text: str) -> str:
    selector, colon, budget = text.partition(":")
    if not (text == "full" or (selector in ("quest", "shadow_prefix") and budget.isdecimal() and int(budget) > 0)):
        raise argparse.ArgumentTypeError(f"expected full, quest:TOKENS or shadow_prefix:TOKENS, got {text!r}")
    return text


BUDGETS = ["full", "quest:8192", "shadow_prefix:8192", "shadow_prefix:4096"]


def stage_options(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--budgets", nargs="+", type=setting_of, default=BUDGETS, metavar="SELECTOR:TOKENS", help=f"default: {' '.join(BUDGETS)}"
    )


def stage_entries(op: str, stages: Sequence[str], options: argparse.Namespace) -> list[Entry]:
    found = [*peers.PEERS] if op == "stages" else []
    for setting in options.budgets:
        selector = setting.partition(":")[0]
        left_out = "select" if selector == "full" else "attend to all"
        if op not in ("select_pages", "select_tokens") or op == workload.SELECT_OPS.get(selector):
            names = {f"{stage} {setting}": stage for stage in stages if stage != left_out}
            found += [Entry(name, partial(stage_method, name, stage, setting)) for name, stage in names.items()]
    return found


def append_entries(options: argparse.Namespace) -> list[Entry]:
    def prepare(asked: int, name: str, data: Workload, options: argparse.Namespace) -> Method:
        """The newest tokens again into every buffer set: same pages, same work, nothing changes."""
        sizes = data.sizes
        tokens = min(asked, sizes.length)
        k, v = (t[:, sizes.length - tokens :] for t in (data.keys, data.values))
        rows, pages = sizes.lists * tokens, sizes.lists * (-(-tokens // sizes.page_size))
        key_page = sizes.page_size * sizes.token_bytes // 2  # keys that a page's bounds are taken from
        moved = rows * (2 * sizes.token_bytes + sizes.shadow_token_bytes) + pages * (key_page + 2 * sizes.head_dim + 4)
        calls = [partial(decode_step.append, k, v, layer, *data.paging) for layer in data.cache.layers]
        return Method(name, calls, lambda: {"bytes": moved})

    names = {tokens: f"append_kv T={tokens}" for tokens in (1, options.chunk)}
    return [Entry(name, partial(prepare, tokens, name)) for tokens, name in names.items()]


def append_options(p: argparse._ArgumentGroup) -> None:
    p.add_argument("--chunk", type=int, default=2048, metavar="N", help="tokens of the prompt chunk; default: 2048")


LONG = {"cpu": "one", "cuda": "two-batches"}
DECODE_NOTES = (
    "x best dense, x FA2: how many times as fast as the fastest dense peer, and as torch's FlashAttention 2, of this run. MB: the least "
    "the method must read; of light: speed of a kernel that only reads those bytes, in one launch. I0, I1: candidates and kept tokens a "
    "KV head (the union of its group's query heads); mass: true attention mass of the kept tokens, mean over query heads. kl 31k, "
    "accuracy: of that setting on a real model at 31k tokens (bench/results/accuracy_qwen*.jsonl); at another accuracy it is no speed-up."
)
DECODE_ABOUT = """twilight::decode_attention against the dense attention that others offer, in one run.

On a GPU: CUDA-graph replay over buffers that have left the L2, beside the Triton stages and a kernel that only reads the bytes. The
shapes of most interest come first; a method that has used its share of the time is left out of the remaining ones."""
STAGE_NOTES = "MB: the least that a call must read; I0, I1: candidates and kept tokens a KV head"
APPEND_NOTES = "MB: rows read and written, shadow, bounds, and the keys of the touched pages"
DECODE = LayerOp("decode_attention", DECODE_ABOUT, decode_entries, {"cpu": "short-long", "cuda": "all"}, DECODE_NOTES, extra=decode_options)
DECODE.time_limits = {"cuda": (345, 60)}
EVERY_STAGE = ("select", "estimate", "prune", "attend", "attend to all", "decode_attention")
# What they are, and which stages of a step they time; "stages" also times dense peers.
STAGE_OPS_OF = {
    "stages": ("Every stage of a decode step on what the stage before it gave, beside dense peers.", EVERY_STAGE),
    "select_pages": ("twilight::select_pages: Quest's scan of 8-bit page bounds.", ("select",)),
    "select_tokens": ("twilight::select_tokens: the scan of the shadow's leading channels, a quarter of them.", ("select",)),
    "estimate_weights": ("twilight::estimate_weights: 4-bit estimates of every token and of selected ones.", ("estimate",)),
    "prune_top_p": ("twilight::prune_top_p: top-p of the estimated weights.", ("prune",)),
    "attend_sparse": ("twilight::attend_sparse: exact attention on the pruned list, and on everything.", ("attend", "attend to all")),
}
LAYER_OPS = (
    DECODE,
    *(LayerOp(name, about, partial(stage_entries, name, stages), LONG, STAGE_NOTES, extra=stage_options)
      for name, (about, stages) in STAGE_OPS_OF.items()),
    LayerOp("append_kv", "twilight::append_kv: one decode step's token, and a prompt chunk.", append_entries, LONG, APPEND_NOTES,
            extra=append_options),
)  # fmt: skip
# Operators with a module of their own, imported where they are asked for: they need transformers, or have to be first.
MODULES = {
    "llama": "llama:DECODE",
    "lossless": "llama:LOSSLESS",
    "prefill": "llama:PREFILL",
    "phases": "phases:PHASES",
    "offload": "offload:OFFLOAD",
}
NAMES = (*(op.name for op in LAYER_OPS), *MODULES)


def find(name: str) -> Op:
    if name in MODULES:
        module, _, attribute = MODULES[name].partition(":")
        return getattr(importlib.import_module(f"bench.{module}"), attribute)
    return next(op for op in LAYER_OPS if op.name == name)
