"""Time per output token and per prompt of whole Llama-shaped models: random weights, real shapes, real graphs.

bf16; weights are drawn on the device. K and V of the context are written straight into the caches, which needs no prompt. The queries'
size is measured with a few random tokens, and K scaled by it so that logits have the standard deviation --spread (3.7 keeps about 128 of
32768 tokens a query head at p = 0.85, as in the paper), with coherent pages and decay over channels, whose order the shadow prefix is
told. Layers share one draw of random numbers; their memory differs. Every method decodes the same steps from the same length.

`lossless` times whole rounds of --drafts sparse steps and the dense step that checks them, and says how many tokens a second that is where
a draft is right with probability --acceptance if all before it were; what random weights accept says nothing.

`prefill` times prompts of random tokens through the first layers only: layers are alike, so their ratio is the model's.

Under torchrun (`torchrun --nproc-per-node 2 -m bench run --op llama ...`) transformers shards the model over the processes, each keeps
the cache of its own KV heads, and the first one writes its rows; bytes and floors are then a GPU's.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.distributed import DistributedConfig

from twilight_ops import Full, Quest, ShadowPrefix, TwilightConfig
from twilight_ops.decode_step import append, decode_step
from twilight_ops.evaluation import methods
from twilight_ops.integration import CapturedStep, Decoder, LosslessDecoder, Speculation, TwilightCache, cache_argument, join_linears

from .rows import WORLD_SIZE, accuracy_of, setting_of, speed_up
from .run import Entry, Op, tokens_of
from .settings import add_settings, parsed_settings
from .timing import Method, Timing, read_bandwidth, step_us
from .workload import ENERGY_DECAY, PAGE_COHERENCE, SPREAD, candidate_budget


def shape(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, **more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1 << 18,
        **more,
    )


SHAPES = {
    "llama31-8b": shape(128256, 4096, 14336, 32, 32, 8, 128, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "longchat-7b": shape(32000, 4096, 11008, 32, 32, 32, 128),
    "tiny": shape(512, 256, 512, 4, 4, 2, 64),
}
HF_STATIC, HF_DYNAMIC = "hf_static", "hf_dynamic"
OURS = ("dense", "quest", "full+twilight", "quest+twilight", "shadow_prefix+twilight")
PAGE_SIZE = 16
FILL_TOKENS = 4096  # tokens of one sequence drawn at a time, which bounds the memory of the random numbers
PROBE_TOKENS = 64  # whose queries are measured
EXTRA_OVER_KV = 0.17  # beside K and V, what the largest batch leaves room for
RESERVE_BYTES = 6 << 30  # left free for workspaces, logits and graph pools when the largest batch is computed
PREFILL_REPEATS = 5
FILLED = ("full", "quest", "page_mean", "shadow_prefix", "streaming")  # selectors whose data can be written without a prompt


def twilight_config(method: str, context: int, head_dim: int, options: argparse.Namespace, prompt: bool = False) -> TwilightConfig:
    """A method's configuration; budgets are the paper's for Quest and an eighth of the context for the shadow prefix.

    A prompt of the first layers alone leaves none of them dense, and calibrates the prefix itself. Other methods are of --settings.
    """
    if method in options.settings:
        chosen = methods.parse_method(method)
    else:
        selectors = {
            "dense": Full(),
            "quest": Quest(token_budget=candidate_budget("quest", context)),
            "full": Full(),
            "shadow_prefix": ShadowPrefix(),
        }
        name, pruned = method.removesuffix("+twilight"), method.endswith("+twilight")
        chosen = methods.Method(selectors[name], options.top_p if pruned else 1.0)
    selector = chosen.selector
    if isinstance(selector, ShadowPrefix) and selector.prefix_channels is None and not prompt:
        selector = replace(selector, prefix_channels=max(8, head_dim // 4))
    return TwilightConfig(
        selector=selector,
        top_p=chosen.top_p,
        page_size=PAGE_SIZE,
        dense_layers=1 << 20 if method == "dense" else 0 if prompt else options.dense_layers,
        dense_below=options.dense_below,
        kv_cache_dtype=options.kv_cache_dtype,
    )


@dataclass
class Context:
    """What every method finds cached: K and V of random numbers with the wanted spread of logits.

    Args:
        query_rms: [layers, Hq, D], measured.
        key_std: [layers, Hkv, D].
        channel_order: [Hkv, D] int32, by falling contribution to a logit.
    """

    length: int
    query_rms: Tensor
    key_std: Tensor
    channel_order: Tensor
    seed: int = 0

    @staticmethod
    def of(query_rms: Tensor, kv_heads: int, length: int, spread: float) -> Context:
        """`kv_heads` of this process, as many as `query_rms` has query heads for."""
        layers, heads, dim = query_rms.shape
        rng = torch.Generator(query_rms.device).manual_seed(1)
        ranks = torch.stack([torch.randperm(dim, generator=rng, device=query_rms.device) for _ in range(kv_heads)])  # [Hkv, D]
        part = torch.exp(-ranks / (ENERGY_DECAY * dim))  # a channel's part of a logit's standard deviation
        part = part * spread * dim**0.5 / part.square().sum(-1, keepdim=True).sqrt()
        group_rms = query_rms.view(layers, kv_heads, heads // kv_heads, dim).square().mean(2).sqrt()
        return Context(length, query_rms, part / group_rms, ranks.argsort(-1).int())

    def chunks(self, batch: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(sequence, start, k, v) for every sequence, [1, n, Hkv, D] in fp32, k of unit size; the same for every method."""
        device, (kv_heads, dim) = self.key_std.device, self.key_std.shape[1:]
        rng = torch.Generator(device).manual_seed(self.seed)

        def normal(tokens: int) -> Tensor:
            return torch.randn((1, tokens, kv_heads, dim), generator=rng, device=device)

        for b in range(batch):
            for start in range(0, self.length, FILL_TOKENS):
                tokens = min(FILL_TOKENS, self.length - start)
                pages = normal(-(-tokens // PAGE_SIZE)).repeat_interleave(PAGE_SIZE, dim=1)[:, :tokens]
                yield b, start, pages.mul_(PAGE_COHERENCE**0.5).add_(normal(tokens).mul_((1 - PAGE_COHERENCE) ** 0.5)), normal(tokens)

    def fill_twilight(self, cache: TwilightCache, batch: int) -> None:
        """Writes the context through append_kv, as a prefill would."""
        device = self.key_std.device
        for layer in cache.layers:
            if layer.paged.shadow is not None:
                layer.paged.shadow.channel_order.copy_(self.channel_order)
        cache.sequences.begin(batch, self.length)
        for b, start, k, v in self.chunks(batch):
            lens = torch.tensor([start + k.shape[1]], dtype=torch.int32, device=device)
            v = v.to(cache.layers[0].dtype)
            for layer, key_std in zip(cache.layers, self.key_std, strict=True):
                append((k * key_std).to(layer.dtype), v, layer.paged, cache.live_page_table[b : b + 1], lens)
        cache.sequences.commit()
        cache.sequences.begin_decoding()

    def fill_static(self, cache: StaticCache, batch: int) -> None:
        for b, start, k, v in self.chunks(batch):
            part = slice(start, start + k.shape[1])
            for layer, key_std in zip(cache.layers, self.key_std, strict=True):
                layer.keys[b, :, part] = (k[0] * key_std).transpose(0, 1)
                layer.values[b, :, part] = v[0].transpose(0, 1)
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.length)


@torch.no_grad()
def measured_query_rms(model: PreTrainedModel) -> Tensor:
    """Root mean square of the queries after their position encoding, [layers, Hq, D]."""
    squares: list[Tensor] = []

    def probe(module, query, key, value, attention_mask, **kwargs):
        squares.append(query.float().square().mean((0, 2)))
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("query_probe", probe)
    model.set_attn_implementation("query_probe")
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=rng)
    model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    return torch.stack(squares).sqrt()


def local(weight: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def forget_peak(device: torch.device) -> None:
    """What filling a cache took is no part of decoding."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Decoding:
    """One cell: a batch of sequences with so many cached tokens each."""

    model: PreTrainedModel
    weight_bytes: int
    batch: int
    context: Context
    room: int  # positions to decode
    sets: int = 1

    def describe(self) -> str:
        return f"{self.batch} sequences of {self.context.length} tokens"

    @property
    def fingerprint(self) -> list[float]:
        return [self.context.query_rms.double().sum().item(), *(t.double().sum().item() for t in next(self.context.chunks(1))[2:])]

    @property
    def kv_bytes(self) -> int:
        return cached_bytes(self.model.config, self.context.length) * self.batch // WORLD_SIZE


def attention_ms(cache: TwilightCache, context: Context, batch: int, steps: int) -> float:
    """Median time of append_kv and decode_attention of all layers and nothing else, recorded as one graph, with queries of equal size."""
    device, dtype = context.query_rms.device, cache.layers[0].dtype
    kv_heads, head_dim = context.key_std.shape[1:]
    rng = torch.Generator(device).manual_seed(2)
    unit = torch.randn((batch, 1, *context.query_rms.shape[1:]), generator=rng, device=device)
    queries = [(unit * rms).to(dtype) for rms in context.query_rms]
    k = torch.randn((batch, 1, kv_heads, head_dim), generator=rng, device=device)
    keys = [(k * key_std).to(dtype) for key_std in context.key_std]
    v = k.to(dtype)

    def layers() -> None:
        for layer, q, key in zip(cache.layers, queries, keys, strict=True):
            decode_step(q, key, v, layer.paged, cache.live_page_table, cache.live_seq_lens, head_dim**-0.5)

    step = CapturedStep(layers, device) if device.type == "cuda" else layers
    for _ in range(5):
        step()
    return statistics.median(step_us(step, steps, device.type)) / 1e3


def hf_static_step(data: Decoding, options: argparse.Namespace) -> Callable[[], None]:
    """What a user has today: StaticCache, sdpa, torch.compile(mode="reduce-overhead"), greedy."""
    model, batch, context = data.model, data.batch, data.context
    device, config = model.device, model.config
    model.set_attn_implementation("sdpa")
    cache = StaticCache(config=config, max_cache_len=context.length + data.room)
    cache.early_initialization(batch, context.key_std.shape[1], config.head_dim, model.dtype, device)
    context.fill_static(cache, batch)
    forget_peak(device)
    forward, held = model.forward, cache_argument(model, cache)
    if not options.eager:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    position = torch.full((batch, 1), context.length, dtype=torch.int64, device=device)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        logits = forward(input_ids=token, position_ids=position, use_cache=True, **held).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)

    return step


def twilight_decoder(
    method: str, data: Decoding, options: argparse.Namespace, decoder_class: Callable[..., Decoder] = Decoder
) -> tuple[TwilightCache, Decoder]:
    """Our decoder: the compiled step recorded as one CUDA graph, sampling included."""
    model, batch, context = data.model, data.batch, data.context
    config = model.config
    model.set_attn_implementation("twilight")
    plan = twilight_config(method, context.length, config.head_dim, options)
    cache = TwilightCache(config, plan, max_batch_size=batch, max_cache_len=context.length + data.room)
    cache.early_initialization(batch, context.key_std.shape[1], config.head_dim, model.dtype, model.device)
    context.fill_twilight(cache, batch)
    forget_peak(model.device)
    decoder = decoder_class(model, cache, batch, eos_token_ids=(), capture="eager" if options.eager else None)
    decoder.position.fill_(context.length)
    return cache, decoder


def setting_asked(name: str, cache: TwilightCache, options: argparse.Namespace) -> str:
    """How `eval` spells a method, without the prefix that random keys are given."""
    config = cache.twilight
    return setting_of(replace(config, selector=methods.parse_method(name).selector) if name in options.settings else config)


def decode_method(name: str, data: Decoding, options: argparse.Namespace) -> Method:
    started = time.perf_counter()
    cache, decoder = (None, None) if name == HF_STATIC else twilight_decoder(name, data, options)
    step = hf_static_step(data, options) if decoder is None else decoder.step
    for _ in range(options.warmup):
        step()
    if cache is not None:
        cache.reset_budget()

    def report() -> dict:
        columns: dict[str, object] = {}
        if cache is not None:
            sizes, budget = cache.nbytes(), cache.budget_report().sparse  # None where every layer is dense
            columns |= {"graphs": decoder.graphs, "extra_over_kv": sizes["extra"] / sizes["kv"]}
            columns["attention_ms"] = attention_ms(cache, data.context, data.batch, options.steps)
            if budget is not None:
                columns |= {"live": budget.live, "candidates": budget.candidates.mean, "kept": budget.kept.mean}
                columns["captured_mass"] = budget.captured_mass
                columns |= accuracy_of(setting_asked(name, cache, options))
        if options.device == "cuda" and WORLD_SIZE == 1:  # shards of the random layers share one layer's memory
            columns["peak_over_kv"] = (torch.cuda.max_memory_allocated() - data.weight_bytes - data.kv_bytes) / data.kv_bytes
        return columns | {"setup_s": round(time.perf_counter() - started, 1)}

    return Method(name, [], report, sampled=lambda seconds: step_us(step, options.steps, options.device))


def lossless_method(name: str, data: Decoding, options: argparse.Namespace) -> Method:
    """A round of drafts and their check; "dense" is a step of plain decoding."""
    if name == "dense":
        return decode_method(name, data, options)
    started, drafts = time.perf_counter(), options.drafts
    speculation = Speculation(drafts, adapt=False)
    cache, decoder = twilight_decoder(name, data, options, partial(LosslessDecoder, speculation=speculation))
    decoder.limit.fill_(1 << 40)
    decoder.restart()

    def step() -> None:
        decoder.round(drafts)

    for _ in range(options.warmup):
        step()
    cache.reset_budget()

    def report() -> dict:
        check = statistics.median(step_us(decoder.step, options.steps, options.device)) / 1e3
        columns: dict[str, object] = {"graphs": decoder.graphs, "drafts": drafts, "acceptance": options.acceptance, "check_ms": check}
        if (budget := cache.budget_report().sparse) is not None:
            columns |= {"kept": budget.kept.mean, "captured_mass": budget.captured_mass}
            columns |= accuracy_of(setting_asked(name, cache, options))
        return columns | {"setup_s": round(time.perf_counter() - started, 1)}

    return Method(name, [], report, sampled=lambda seconds: step_us(step, options.steps, options.device))


def prefill_method(name: str, data: Decoding, options: argparse.Namespace) -> Method:
    """One prompt of random tokens through the first layers."""
    model, length = data.model, data.context.length
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    columns: dict[str, float] = {}
    model.set_attn_implementation("sdpa" if name == HF_DYNAMIC else "twilight")
    with first_layers(model, options.prefill_layers):
        cache = None
        if name != HF_DYNAMIC:
            plan = twilight_config(name, length, model.config.head_dim, options, prompt=True)
            cache = TwilightCache(model.config, plan, max_cache_len=length, device=model.device, dtype=model.dtype)
            sizes = cache.nbytes()
            columns["extra_over_kv"] = sizes["extra"] / sizes["kv"]

    def forward() -> None:
        if cache is not None:
            cache.reset()
        held = DynamicCache(config=model.config) if cache is None else cache
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache_argument(model, held))

    def sample(seconds: float) -> list[float]:
        with first_layers(model, options.prefill_layers):
            return step_us(forward, PREFILL_REPEATS + 1, options.device)[1:]

    return Method(name, [], lambda: columns, sampled=sample)


def cached_bytes(config: LlamaConfig, tokens: int, kv_cache_dtype: str = "auto") -> int:
    """K and V of `tokens` tokens, 16 or 8 bits each."""
    return 2 * (1 if kv_cache_dtype == "fp8" else 2) * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens


def largest_batch(config: LlamaConfig, context: int, weights: int, device: torch.device, kv_cache_dtype: str = "auto") -> int:
    """Sequences whose K, V and what lies beside them, 17% of 16 bits, fit what the device has left."""
    total = torch.cuda.get_device_properties(device).total_memory
    each = cached_bytes(config, context, kv_cache_dtype) + cached_bytes(config, context) * EXTRA_OVER_KV
    return max(1, int((total - weights - RESERVE_BYTES) / each))


@contextmanager
def first_layers(model: PreTrainedModel, count: int) -> Iterator[None]:
    """The model without its later layers."""
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    total = model.config.num_hidden_layers
    decoder.layers, model.config.num_hidden_layers = layers[:count], min(count, total)
    try:
        yield
    finally:
        decoder.layers, model.config.num_hidden_layers = layers, total


def make_model(options: argparse.Namespace) -> tuple[PreTrainedModel, str]:
    device = torch.device(options.device)
    if options.model not in SHAPES:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device)
        if getattr(model.config, "head_dim", None) is None:
            model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
        return model.eval(), Path(options.model).name
    config = copy.deepcopy(SHAPES[options.model])
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    torch.manual_seed(0)
    if WORLD_SIZE > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        plan = DistributedConfig(tp_plan="auto")
        model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=random_state(config, device), dtype=torch.bfloat16, distributed_config=plan
        )
    else:
        with device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval(), options.model


def random_state(config: LlamaConfig, device: torch.device) -> dict[str, Tensor]:
    """Weights by name to shard, the same in every process; layers share theirs, so that the unsharded model takes the room of one layer."""
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    made: dict[str, Tensor] = {}
    for name, meta in shapes.items():
        weight = torch.ones(meta.shape, dtype=torch.bfloat16, device=device)
        made.setdefault(re.sub(r"\.\d+\.", ".", name), weight if meta.dim() == 1 else weight.normal_(std=config.initializer_range))
    return {name: made[re.sub(r"\.\d+\.", ".", name)] for name in shapes}


def cell_of(text: str) -> tuple[str, int]:
    """ "max:32k" -> ("max", 32768)."""
    batch, colon, length = text.partition(":")
    try:
        if tokens_of(length) < 1 or (batch != "max" and int(batch) < 1):
            raise ValueError(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected batch:context such as 4:32k or max:32k, got {text!r}") from None
    return batch, tokens_of(length)


@dataclass
class ModelOp(Op):
    """A step, or a prompt, of a whole model."""

    name: str
    kind: str  # of the rows
    about: str
    peer: str
    method: Callable[[str, Decoding, argparse.Namespace], Method]
    columns: str
    ours: tuple[str, ...] = OURS
    alone = ("cpu", "cuda")
    devices = ("cuda", "cpu")
    grad_mode = torch.no_grad
    shape_help = "batch:context such as 4:32k, or max:32k for the largest batch that fits"

    def add_options(self, p: argparse._ArgumentGroup) -> None:
        p.add_argument("--model", default="llama31-8b", help=f"{', '.join(SHAPES)} (random weights), or the path of a model")
        p.add_argument("--layers", type=int, metavar="N", help="fewer layers than the model has, for a quick look")
        p.add_argument("--prefill-layers", type=int, default=4, metavar="N", help="first layers that a prompt goes through; default: 4")
        p.add_argument("--top-p", type=float, default=0.85, metavar="P", help="default: 0.85")
        add_settings(p)
        p.add_argument("--spread", type=float, default=SPREAD, metavar="STD", help="of the logits; default: 3.7")
        p.add_argument("--dense-layers", type=int, default=2, metavar="N", help="first layers that attend to everything; default: 2")
        p.add_argument("--dense-below", type=int, metavar="N", help="tokens up to which all attend to everything; default: as shipped")
        p.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help="of our K and V; default: auto, the model's")
        p.add_argument("--warmup", type=int, default=8, metavar="N", help="steps before the timed ones; default: 8")
        p.add_argument("--steps", type=int, default=64, metavar="N", help="default: 64")
        p.add_argument("--join-linears", action="store_true", help="query, key and value in one product, gate and up in one")
        p.add_argument("--drafts", type=int, default=5, metavar="K", help="of a lossless round, 1 to 7; default: 5")
        p.add_argument("--acceptance", type=float, default=0.95, metavar="A", help="that a draft is right, 0..1; default: 0.95")
        p.add_argument("--eager", action="store_true", help="compile and record nothing: for tests, not for figures")

    def shapes(self, text: str) -> list[tuple[str, int]]:
        return [cell_of(text)]

    def default_shapes(self, device: str) -> str:
        return "1:32k"

    def entries(self, options: argparse.Namespace) -> list[Entry]:
        for text, setting in parsed_settings(options).items():
            if setting.name not in FILLED or text in self.ours:
                options.error(f"--settings: expected one of {', '.join(FILLED)} with a budget, a field or p, got {text}")
            if setting.settings:
                named = ", ".join(f"--{name.replace('_', '-')}" for name, _ in setting.settings)
                options.error(f"--settings: expected fields of a selector, and {named} for all methods, got {text}")
        names = (self.peer, *self.ours, *options.settings)
        return [Entry(name, partial(self.prepare, name), kind="peer" if name == self.peer else "ours") for name in names]

    def prepare(self, name: str, data: Decoding, options: argparse.Namespace) -> Method:
        self.release(options.device)  # each method has the whole device
        return self.method(name, data, options)

    def start(self, options: argparse.Namespace) -> None:
        if WORLD_SIZE > 1 and (options.model not in SHAPES or self.kind == "prefill" or options.base is not None):
            options.error("torchrun: expected decode steps of a random model and no --base")
        self.model, self.shape = make_model(options)
        if options.join_linears:
            join_linears(self.model)
        self.bandwidth = read_bandwidth(options.device)  # bytes a second: the floor's denominator
        self.weight_bytes = sum(local(p).nbytes for p in self.model.parameters())
        # Of an embedding that is not the head too, a step reads only a row a sequence.
        unread = 0 if self.model.config.tie_word_embeddings else local(self.model.get_input_embeddings().weight).nbytes
        self.read_bytes = self.weight_bytes - unread
        self.query_rms = measured_query_rms(self.model)
        self.release(options.device)

    def cells(self, options: argparse.Namespace) -> list[tuple[int, int]]:
        room = (self.weight_bytes, self.model.device, options.kv_cache_dtype)
        return [(largest_batch(self.model.config, n, *room) if batch == "max" else int(batch), n) for batch, n in options.shapes]

    def open(self, cell: tuple[int, int], options: argparse.Namespace, sets: int | None = None, memory_share: float = 1.0) -> Decoding:
        heads = self.model.config.num_key_value_heads // WORLD_SIZE
        samples = 1 if options.base is None else 2 * options.rounds
        if self.kind == "lossless":
            samples = 2 * (options.drafts + 1)  # rounds, and checks alone
        context = Context.of(self.query_rms, heads, cell[1], options.spread)
        return Decoding(self.model, self.weight_bytes, cell[0], context, options.warmup + options.steps * samples + 8)

    def head(self, cell: tuple[int, int], options: argparse.Namespace) -> dict:
        layers = self.model.config.num_hidden_layers
        head = {"shape": self.shape, "gpus": WORLD_SIZE, "kind": self.kind, "context": cell[1], "batch": cell[0]}
        if self.kind == "prefill":
            return head | {"layers": min(layers, options.prefill_layers), "dense_layers": 0}
        head |= {"layers": layers, "dense_layers": options.dense_layers, "dense_below": options.dense_below}
        head |= {} if options.kv_cache_dtype == "auto" else {"kv_cache_dtype": options.kv_cache_dtype}
        return head | {"joined": options.join_linears, "top_p": options.top_p, "spread": options.spread}

    def environment(self, options: argparse.Namespace) -> dict:
        return super().environment(options) | {"read_bandwidth": self.bandwidth}

    def assumptions(self, options: argparse.Namespace) -> str:
        what = f"{self.shape}: {self.weight_bytes / 1e9:.1f} GB of weights, read bandwidth {self.bandwidth / 1e12:.2f} TB/s"
        return f"{what}, logits of standard deviation {options.spread}"

    def row(self, cell: tuple[int, int], options: argparse.Namespace, method: Method, timing: Timing, medians: dict[str, float]) -> dict:
        ms = timing.median_us / 1e3
        row: dict[str, object] = {"ms": ms, "p10_ms": timing.p10_us / 1e3, "p90_ms": timing.p90_us / 1e3}
        if self.kind == "decode":
            kind = "auto" if method.name == HF_STATIC else options.kv_cache_dtype
            cached = cached_bytes(self.model.config, cell[1], kind) * cell[0] // WORLD_SIZE
            row["tokens_per_s"] = cell[0] / ms * 1e3
            row["floor_ms"] = (self.read_bytes + cached) / self.bandwidth * 1e3
            row["weights_floor_ms"] = self.read_bytes / self.bandwidth * 1e3
        row |= method.report()
        if "drafts" in row:
            row["draft_ms"] = (ms - row["check_ms"]) / row["drafts"]
            row["tokens_a_round"] = sum(options.acceptance**i for i in range(row["drafts"] + 1))
            row["tokens_per_s"] = cell[0] * row["tokens_a_round"] / ms * 1e3
        elif self.kind == "lossless":
            row["tokens_per_s"] = cell[0] / ms * 1e3
        if "attention_ms" in row:
            row["attention_share"] = row["attention_ms"] / ms
        return row

    def compared(self, rows: Sequence[dict]) -> list[dict]:
        beside = [{"x_hf": speed_up(row, rows, self.peer), "x_dense": speed_up(row, rows, "dense")} for row in rows]
        if self.kind == "lossless":
            dense = {(row["context"], row["batch"]): row["tokens_per_s"] for row in rows if row["method"] == "dense" and "ms" in row}
            for row, ratios in zip(rows, beside, strict=True):
                ratio = row["tokens_per_s"] / dense[row["context"], row["batch"]] if "ms" in row and dense else None
                ratios.update(x_hf=None, x_dense=ratio)
        floors = [{"x_floor": row["ms"] / row["floor_ms"]} if "floor_ms" in row else {} for row in rows]
        return [row | ratios | floor for row, ratios, floor in zip(rows, beside, floors, strict=True)]

    def release(self, device: str) -> None:
        """Drops compiled graphs and their pools too."""
        torch.compiler.reset()
        if device == "cuda":
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        super().release(device)
        if WORLD_SIZE > 1:
            torch.distributed.barrier()


DECODE_COLUMNS = """method ms p10_ms p90_ms tokens_per_s x_hf x_dense x_floor attention_share
candidates kept captured_mass kl_31k accuracy extra_over_kv peak_over_kv error"""
DECODE = ModelOp("llama", "decode", __doc__, HF_STATIC, decode_method, DECODE_COLUMNS)
PREFILL = ModelOp("prefill", "prefill", __doc__, HF_DYNAMIC, prefill_method, "method ms p10_ms p90_ms x_hf x_dense extra_over_kv error")
LOSSLESS_COLUMNS = (
    "method drafts ms draft_ms check_ms acceptance tokens_a_round tokens_per_s x_dense kept captured_mass kl_31k accuracy error"
)
LOSSLESS = ModelOp(
    "lossless", "lossless", __doc__, "dense", lossless_method, LOSSLESS_COLUMNS, ("quest+twilight", "shadow_prefix+twilight")
)
