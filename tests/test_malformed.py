"""Every malformed argument is refused with one line that names operator, argument, expected and got; nothing is written."""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from comparisons import assert_same_state
from inputs import BY_MEANS, CACHE_TENSORS, Shape, make_inputs, random_candidates
from torch._subclasses import FakeTensorMode

from twilight_ops import backends
from twilight_ops.capacity import COUNTER_COLUMNS

SHAPE = Shape((40, 17), 4, 2, 64, 16, 1, torch.float32)
MAX_TOKENS = 64  # M * S of these inputs
BEHIND = "contiguous dimensions behind pages and heads"
INF, NAN = math.inf, math.nan
MEANS = (torch.zeros(8, 2, 32, dtype=torch.uint8), torch.zeros(8, 2, 2, dtype=torch.bfloat16))


@functools.cache
def inputs(bounds_dtype: str = "model"):
    return make_inputs(SHAPE, bounds_dtype=bounds_dtype)


def valid(op: str, x) -> dict:
    """Well-formed arguments of one operator, every optional tensor given."""
    tokens, counts = random_candidates(x, 1)
    budgets = {"head_token_budget": torch.full((2,), 16, dtype=torch.int32)}
    extra = {
        "append_kv": {"k": x.keys[:, :1], "v": x.values[:, :1], "positions": torch.tensor([[3], [-1]], dtype=torch.int32)},
        "select_pages": budgets,
        "select_tokens": budgets,
        "estimate_weights": {"indices": tokens, "counts": counts},
        "prune_top_p": {
            "weights": torch.full((2, 1, 4, tokens.shape[2]), 0.01),
            "indices": tokens,
            "counts": counts,
            "head_top_p": torch.full((1, 4), 0.9),
        },
        "attend_sparse": {"indices": tokens, "counts": counts},
        "decode_attention": {
            **budgets,
            "selector": "quest",
            "head_top_p": torch.full((2, 1), 0.9),
            "budget_counters": torch.zeros(2, COUNTER_COLUMNS, dtype=torch.int64),
            "kept_indices": torch.zeros(2, 2, MAX_TOKENS, dtype=torch.int32),
            "kept_counts": torch.zeros(2, 2, dtype=torch.int32),
            "out": torch.empty(2, 1, 4, 64, dtype=x.q.dtype),
        },
    }
    return x.arguments(op, **extra[op])


@dataclass(frozen=True)
class Case:
    """One malformed call: `change` makes the wrong value from the right one; `also` replaces further arguments."""

    op: str
    argument: str
    change: Callable
    expected: str
    got: str
    also: tuple = ()
    blames: str = ""  # the argument the message names, where it is not the one changed
    bounds_dtype: str = "model"

    def __str__(self) -> str:
        return re.sub(r"[^\w.<>=/-]+", "-", f"{self.op}-{self.argument}-{self.got}")

    def arguments(self) -> dict:
        x = inputs(self.bounds_dtype)
        arguments = valid(self.op, x)
        return arguments | dict(self.also) | {self.argument: self.change(arguments.get(self.argument))}


def dtype(wrong: torch.dtype) -> Callable:
    return lambda t: t.to(wrong)


def value(wrong) -> Callable:
    return lambda _: wrong


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def columns(n: int) -> Callable:
    """The tensor with its last dimension cut to n."""
    return lambda t: t[..., :n].contiguous()


def rows(n: int) -> Callable:
    """The tensor with its first dimension repeated or cut to n."""
    return lambda t: torch.cat([t, t])[:n].contiguous()


def on_meta(t):
    return t.to("meta")


NOTHING = value(None)
CAP = "None or a number from 1e-30 to 1e30"


def everywhere(ops: str, argument: str, change: Callable, expected: str, got: str) -> list[Case]:
    return [Case(op, argument, change, expected, got) for op in ops.split()]


QUERY_OPS = "select_pages select_tokens estimate_weights attend_sparse decode_attention"
SHADOW_OPS = "append_kv select_tokens estimate_weights decode_attention"

CASES = [
    *everywhere(QUERY_OPS, "q", dtype(torch.float64), "dtype float32 or bfloat16 or float16", "float64"),
    *everywhere(QUERY_OPS, "q", lambda q: q[0], "shape [B, T, Hq, D]", "[1, 4, 64]"),
    *everywhere(QUERY_OPS, "page_table", dtype(torch.int64), "dtype int32", "int64"),
    *everywhere(QUERY_OPS, "seq_lens", rows(3), "shape [B] with B = 2", "[3]"),
    *everywhere(QUERY_OPS, "sm_scale", value(0.0), "a positive finite number", "0"),
    *(
        case
        for wrong, got in ((0.0, "0.0"), (-30.0, "-30.0"), (NAN, "nan"), (INF, "inf"), (1e-31, "1e-31"))
        for case in everywhere("estimate_weights attend_sparse decode_attention", "softcap", value(wrong), CAP, got)
    ),
    *everywhere(SHADOW_OPS, "k_scale", dtype(torch.float32), "dtype bfloat16", "float32"),
    *everywhere(SHADOW_OPS, "k_quant", columns(100), "shape [P, Hkv, 512]", "[8, 2, 100]"),
    Case("attend_sparse", "q", lambda q: q.expand(2, 9, 4, 64), "1 to 8 query tokens", "9"),
    Case("attend_sparse", "q", lambda q: q[:, :0], "1 to 8 query tokens", "0"),
    Case("attend_sparse", "q", transposed, "stride 1 in the last dimension", "strides"),
    Case("attend_sparse", "q", lambda q: q[:, :, :3], "num_qo_heads a multiple of num_kv_heads = 2", "3"),
    Case("attend_sparse", "k_cache", dtype(torch.bfloat16), "dtype float32 or float8_e4m3fn", "bfloat16"),
    Case("attend_sparse", "v_cache", rows(5), "shape [P, Hkv, S, D] with P = 8", "[5, 2, 16, 64]"),
    Case("attend_sparse", "v_cache", transposed, BEHIND, "strides"),
    Case("attend_sparse", "k_cache", on_meta, "device cpu", "meta"),
    Case("attend_sparse", "seq_lens", dtype(torch.int64), "dtype int32", "int64"),
    Case("attend_sparse", "page_table", rows(1), "shape [B, M] with B = 2", "[1, 4]"),
    Case("attend_sparse", "page_table", lambda t: torch.cat([t, t], 1)[:, ::2], "a contiguous tensor", "strides [8, 2]"),
    Case("attend_sparse", "indices", NOTHING, "given exactly when indices is given", "one without the other", blames="counts"),
    Case("attend_sparse", "counts", NOTHING, "given exactly when indices is given", "one without the other"),
    Case("attend_sparse", "indices", dtype(torch.int64), "dtype int32", "int64"),
    Case("attend_sparse", "counts", lambda t: t[:, :1].contiguous(), "shape [B, Hkv] with Hkv = 2", "[2, 1]"),
    Case("attend_sparse", "tokens_per_index", value(32), "one of 1, 16", "32"),
    Case("attend_sparse", "sm_scale", value(NAN), "a positive finite number", "nan"),
    Case("attend_sparse", "sm_scale", value(INF), "a positive finite number", "inf"),
    Case("estimate_weights", "channel_order", rows(3), "shape [Hkv, D] with Hkv = 2", "[3, 64]"),
    Case("estimate_weights", "channel_order", dtype(torch.int64), "dtype int32", "int64"),
    Case("estimate_weights", "prefix_channels", dtype(torch.int16), "dtype int32", "int16"),
    Case("estimate_weights", "k_center", rows(1), "shape [Hkv, D] with Hkv = 2", "[1, 64]"),
    Case("estimate_weights", "k_quant", dtype(torch.int8), "dtype uint8", "int8"),
    Case("estimate_weights", "k_scale", lambda t: t[..., :1].contiguous(), "shape [P, Hkv, S, 2]", "[8, 2, 16, 1]"),
    Case("estimate_weights", "tokens_per_index", value(0), "one of 1, 16", "0"),
    Case("estimate_weights", "indices", lambda t: t[:, :1].contiguous(), "shape [B, Hkv, C] with Hkv = 2", "[2, 1, "),
    Case("prune_top_p", "weights", dtype(torch.bfloat16), "dtype float32", "bfloat16"),
    Case("prune_top_p", "weights", lambda t: t[0], "shape [B, T, Hq, N]", "[1, 4, "),
    Case("prune_top_p", "weights", columns(7), "C * tokens_per_index = ", "7"),
    Case("prune_top_p", "weights", lambda t: t[:, :0], "at least 1 query token", "0"),
    Case("prune_top_p", "num_kv_heads", value(3), "a divisor of num_qo_heads = 4", "3"),
    Case("prune_top_p", "num_kv_heads", value(0), ">= 1", "0"),
    Case("prune_top_p", "top_p", value(0.0), "0 < top_p <= 1", "0"),
    Case("prune_top_p", "top_p", value(1.5), "0 < top_p <= 1", "1.5"),
    Case("prune_top_p", "top_p", value(NAN), "0 < top_p <= 1", "nan"),
    Case("prune_top_p", "head_top_p", dtype(torch.float64), "dtype float32", "float64"),
    Case("prune_top_p", "head_top_p", lambda t: t[:, :3], "shape [B or 1, Hq or 1] with B = 2, Hq = 4", "[1, 3]"),
    Case("prune_top_p", "head_top_p", lambda t: t[0], "shape [B or 1, Hq or 1] with B = 2, Hq = 4", "[4]"),
    Case("prune_top_p", "tokens_per_index", value(8), "one of 1, 16, 32, 64", "8"),
    Case("prune_top_p", "sink_tokens", value(-1), ">= 0", "-1"),
    Case("prune_top_p", "recent_tokens", value(-2), ">= 0", "-2"),
    Case("prune_top_p", "seq_lens", rows(1), "shape [B] with B = 2", "[1]"),
    Case("prune_top_p", "counts", dtype(torch.int64), "dtype int32", "int64"),
    Case("select_pages", "page_bounds", dtype(torch.float16), "dtype float32 or uint8", "float16"),
    Case("select_pages", "page_bounds", lambda t: t[:, :, :1].contiguous(), "shape [P, Hkv, 2, D]", "[8, 2, 1, 64]"),
    Case("select_pages", "bounds_scale", NOTHING, "a tensor, because page_bounds is uint8", "None", bounds_dtype="uint8"),
    Case("select_pages", "bounds_scale", dtype(torch.float32), "dtype bfloat16", "float32", bounds_dtype="uint8"),
    Case(
        "select_pages",
        "bounds_scale",
        lambda _: torch.ones(8, 2, 2, dtype=torch.bfloat16),
        "None, because page_bounds is float32",
        "a tensor",
    ),
    Case("select_pages", "page_size", value(48), "one of 16, 32, 64", "48", blames="page_size"),
    Case("select_pages", "page_size", value(-16), "one of 16, 32, 64", "-16"),
    Case("select_pages", "q", columns(63), "shape [P, Hkv, 2, D] with D = 63", "[8, 2, 2, 64]", blames="page_bounds"),
    Case("select_pages", "token_budget", value(0), ">= 1", "0"),
    Case("select_pages", "budget_fraction", value(1.5), "0 <= budget_fraction <= 1", "1.5"),
    Case("select_pages", "sink_tokens", value(-1), ">= 0", "-1"),
    Case("select_pages", "head_token_budget", rows(1), "shape [Hkv] with Hkv = 2", "[1]"),
    Case("select_tokens", "budget_fraction", value(-0.1), "0 <= budget_fraction <= 1", "-0.1"),
    Case("select_tokens", "budget_fraction", value(NAN), "0 <= budget_fraction <= 1", "nan"),
    Case("select_tokens", "token_budget", value(-5), ">= 1", "-5"),
    Case("select_tokens", "recent_tokens", value(-1), ">= 0", "-1"),
    Case("select_tokens", "head_token_budget", dtype(torch.int64), "dtype int32", "int64"),
    Case("select_tokens", "page_fraction", value(0.0), "0 < page_fraction <= 1", "0"),
    Case("select_tokens", "page_fraction", value(1.5), "0 < page_fraction <= 1", "1.5"),
    Case("select_tokens", "page_fraction", value(NAN), "0 < page_fraction <= 1", "nan"),
    Case("select_tokens", "min_scored_tokens", value(-1), ">= 0", "-1"),
    Case(
        "select_tokens",
        "page_means",
        NOTHING,
        "a tensor, because page_fraction is below 1",
        "None",
        also=(("means_scale", None), ("page_fraction", 0.5)),
    ),
    Case("select_tokens", "page_means", columns(16), "shape [P, Hkv, 32]", "[8, 2, 16]"),
    Case("select_tokens", "means_scale", NOTHING, "given exactly when page_means is given", "one without the other"),
    Case("append_kv", "k", dtype(torch.float64), "dtype float32 or bfloat16 or float16", "float64"),
    Case("append_kv", "k", lambda t: t[0], "shape [B, T, Hkv, D]", "[1, 2, 64]"),
    Case("append_kv", "k", lambda t: t[:, :0], "at least 1 token", "0", also=(("v", torch.zeros(2, 0, 2, 64)),)),
    Case("append_kv", "v", dtype(torch.bfloat16), "dtype float32", "bfloat16"),
    Case("append_kv", "v", lambda t: t.expand(2, 3, 2, 64), "shape [B, T, Hkv, D] with T = 1", "[2, 3, 2, 64]"),
    Case("append_kv", "v", transposed, "stride 1 in the last dimension", "strides"),
    Case("append_kv", "k_cache", dtype(torch.float16), "dtype float32 or float8_e4m3fn", "float16"),
    Case("append_kv", "v_cache", columns(32), "shape [P, Hkv, S, D] with D = 64", "[8, 2, 16, 32]"),
    Case("append_kv", "k_quant", NOTHING, "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)", "None"),
    Case("append_kv", "channel_order", NOTHING, "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)", "None"),
    Case("append_kv", "prefix_channels", rows(1), "shape [Hkv] with Hkv = 2", "[1]"),
    Case("append_kv", "k_center", dtype(torch.bfloat16), "dtype float32", "bfloat16"),
    Case("append_kv", "k_center", columns(32), "shape [Hkv, D] with D = 64", "[2, 32]"),
    Case("append_kv", "page_bounds", dtype(torch.bfloat16), "dtype float32 or uint8", "bfloat16"),
    Case("append_kv", "page_bounds", NOTHING, "None, because page_bounds is None", "a tensor", blames="bounds_scale", bounds_dtype="uint8"),
    Case("append_kv", "positions", dtype(torch.int64), "dtype int32", "int64"),
    Case("append_kv", "positions", lambda t: t[:1], "shape [B, T] with B = 2", "[1, 1]"),
    Case("append_kv", "page_table", lambda t: t.flatten(), "shape [B, M]", "[8]"),
    Case("append_kv", "seq_lens", rows(1), "shape [B] with B = 2", "[1]"),
    Case("append_kv", "seq_lens", on_meta, "device cpu", "meta"),
    Case("decode_attention", "selector", value("best"), "one of dense, full, quest, page_mean, shadow_prefix, streaming, given", "best"),
    Case("decode_attention", "top_p", value(-0.5), "0 < top_p <= 1", "-0.5"),
    Case("decode_attention", "dense_below", value(-1), ">= 0", "-1"),
    Case("decode_attention", "page_fraction", value(-0.5), "0 < page_fraction <= 1", "-0.5"),
    Case("decode_attention", "min_scored_tokens", value(-16), ">= 0", "-16"),
    Case("decode_attention", "page_fraction", value(0.5), '1, unless selector is "shadow_prefix"', "0.5"),
    Case(
        "decode_attention",
        "page_means",
        NOTHING,
        "a tensor, because page_fraction is below 1",
        "None",
        also=(("selector", "shadow_prefix"), ("means_scale", None), ("page_fraction", 0.5)),
    ),
    Case("decode_attention", "page_bounds", NOTHING, 'a tensor, because selector is "quest"', "None"),
    Case(
        "decode_attention",
        "page_means",
        NOTHING,
        'a tensor, because selector is "page_mean"',
        "None",
        also=(("selector", "page_mean"), ("means_scale", None)),
    ),
    Case("decode_attention", "means_scale", NOTHING, "given exactly when page_means is given", "one without the other"),
    Case("decode_attention", "page_means", columns(16), "shape [P, Hkv, 32]", "[8, 2, 16]"),
    Case("select_pages", "page_bounds", NOTHING, "a tensor", "None"),
    Case(
        "select_pages",
        "page_means",
        value(MEANS[0]),
        "None, because page_means is given",
        "a tensor",
        also=(("means_scale", MEANS[1]),),
        blames="page_bounds",
    ),
    Case("select_pages", "k_quant", NOTHING, "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)", "None"),
    Case(
        "select_pages",
        "means_scale",
        value(MEANS[1].float()),
        "dtype bfloat16",
        "float32",
        also=(*BY_MEANS.items(), ("page_means", MEANS[0])),
    ),
    Case("decode_attention", "selector", value("given"), 'a tensor, because selector is "given"', "None", blames="indices"),
    Case(
        "decode_attention",
        "indices",
        lambda _: torch.zeros(2, 2, 8, dtype=torch.int32),
        'None, unless selector is "given"',
        "a tensor",
    ),
    Case(
        "decode_attention",
        "indices",
        lambda _: torch.zeros(2, 2, 8, dtype=torch.int32),
        "given exactly when indices is given",
        "one without the other",
        also=(("selector", "given"),),
        blames="counts",
    ),
    Case("decode_attention", "tokens_per_index", value(64), "one of 1, 16", "64"),
    Case("decode_attention", "budget_counters", dtype(torch.int32), "dtype int64", "int32"),
    Case("decode_attention", "budget_counters", columns(8), f"shape [Hkv, {COUNTER_COLUMNS}]", "[2, 8]"),
    Case(
        "decode_attention",
        "kept_indices",
        NOTHING,
        "given exactly when kept_indices is given",
        "one without the other",
        blames="kept_counts",
    ),
    Case("decode_attention", "kept_indices", columns(16), f"shape [B, Hkv, {MAX_TOKENS}]", "[2, 2, 16]"),
    Case("decode_attention", "kept_counts", dtype(torch.int64), "dtype int32", "int64"),
    Case("decode_attention", "k_quant", NOTHING, "a tensor (k_quant, k_scale, channel_order and prefix_channels come together)", "None"),
    Case("decode_attention", "head_token_budget", lambda t: t[:1], "shape [Hkv] with Hkv = 2", "[1]"),
    Case("decode_attention", "head_top_p", lambda t: torch.cat([t, t]), "shape [B or 1, Hq or 1] with B = 2, Hq = 4", "[4, 1]"),
    Case("decode_attention", "v_cache", dtype(torch.float16), "dtype float32", "float16"),
    Case(
        "decode_attention",
        "k_cache",
        lambda t: t[:, :, :8].contiguous(),
        "shape [P, Hkv, S, D] with S = 8",
        "[8, 2, 16, 64]",
        blames="v_cache",
    ),
]


def head_dim_cases() -> list[Case]:
    """Sizes that several arguments agree on, and that no kernel serves."""
    small = torch.zeros(8, 2, 16, 48)
    odd_page = torch.zeros(8, 2, 24, 64)
    return [
        Case(
            "attend_sparse",
            "q",
            columns(48),
            "one of 64, 96, 128, 256",
            "48",
            also=(("k_cache", small), ("v_cache", small)),
            blames="head_dim",
        ),
        Case("attend_sparse", "k_cache", value(odd_page), "one of 16, 32, 64", "24", also=(("v_cache", odd_page),), blames="page_size"),
        Case(
            "append_kv",
            "k",
            columns(48),
            "one of 64, 96, 128, 256",
            "48",
            also=(("v", torch.zeros(2, 1, 2, 48)), ("k_cache", small), ("v_cache", small)),
            blames="head_dim",
        ),
    ]


def oversized_tables() -> list[Case]:
    """Page tables of more tokens than positions are counted in, and of counts that overflow 64 bits."""
    ops = "append_kv select_pages select_tokens estimate_weights attend_sparse decode_attention"
    too_many = everywhere(
        ops, "page_table", lambda _: torch.empty(2, 2**25 + 1, dtype=torch.int32), f"at most {2**25} pages", str(2**25 + 1)
    )
    no_rows = (("q", torch.empty(0, 1, 4, 64)), ("seq_lens", torch.empty(0, dtype=torch.int32)))
    absurd = Case("attend_sparse", "page_table", lambda _: torch.empty(0, 2**60, dtype=torch.int32), "at most", str(2**60), also=no_rows)
    return [*too_many, absurd]


def mutated_arguments() -> list[Case]:
    """Wrong dtype, size, layout and device of every argument that an operator writes."""
    sizes = {
        "k_cache": "shape [P, Hkv, S, D]",
        "v_cache": "shape [P, Hkv, S, D] with P = 8",
        "k_quant": "shape [P, Hkv, 512] with P = 8",
        "k_scale": "shape [P, Hkv, S, 2] with P = 8",
        "page_bounds": "shape [P, Hkv, 2, D] with P = 8",
        "bounds_scale": "shape [P, Hkv, 2] with P = 8",
        "page_means": "shape [P, Hkv, 32] with P = 8",
        "means_scale": "shape [P, Hkv, 2] with P = 8",
        "budget_counters": f"shape [Hkv, {COUNTER_COLUMNS}] with Hkv = 2",
        "kept_indices": f"shape [B, Hkv, {MAX_TOKENS}] with B = 2",
        "kept_counts": "shape [B, Hkv] with B = 2",
        "out": "shape [B, T, Hq, D] with B = 2",
    }
    cases = []
    for op in ("append_kv", "decode_attention"):
        for argument in getattr(torch.ops.twilight, op).default._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            name, shape = argument.name, sizes[argument.name]
            for change, expected, got in (
                (dtype(torch.bool), "dtype", "bool"),
                (lambda t: t[None], shape.split(" with")[0], "[1, "),
                (lambda t: t.repeat_interleave(2, -1)[..., ::2], BEHIND if name in CACHE_TENSORS else "a contiguous tensor", "strides"),
                (on_meta, "device cpu", "meta"),
            ):
                cases.append(Case(op, name, change, expected, got, bounds_dtype="uint8"))
            if " with" in shape:
                cases.append(Case(op, name, rows(1), shape, "[1, ", bounds_dtype="uint8"))
    return cases


def missing_tensors() -> list[Case]:
    """None for every tensor that an operator must be given, which the dispatcher lets through."""
    arguments = [(op, a) for op in backends.OPS for a in getattr(torch.ops.twilight, op).default._schema.arguments]
    return [Case(op, a.name, NOTHING, "a tensor", "None") for op, a in arguments if str(a.type) == "Tensor"]


ALL_CASES = CASES + head_dim_cases() + oversized_tables() + mutated_arguments() + missing_tensors()


def refusal(case: Case, call: Callable) -> str:
    """The one line that the call raises."""
    with pytest.raises(RuntimeError) as raised:
        call()
    found = re.search(rf"twilight::{case.op}: \w+: expected .*", str(raised.value))
    assert found, f"no line of the agreed form in: {raised.value}"
    return found.group(0)


def assert_names_everything(case: Case, line: str) -> None:
    prefix = f"twilight::{case.op}: {case.blames or case.argument}: expected {case.expected}"
    assert line.startswith(prefix), f"{line!r} does not start with {prefix!r}"
    got = line.rsplit(", got ", 1)
    assert len(got) == 2 and case.got in got[1], f"{line!r} does not end with what was got: {case.got!r}"


def written_arguments(op: str, arguments: dict) -> dict[str, torch.Tensor]:
    """Copies of what a call may write, the malformed one as well."""
    schema = getattr(torch.ops.twilight, op).default._schema
    names = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return {name: arguments[name].clone() for name in names if arguments.get(name) is not None}


def assert_unwritten(arguments: dict, written: dict[str, torch.Tensor]) -> None:
    for name, before in written.items():
        if not before.is_meta:
            torch.testing.assert_close(arguments[name], before, rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")


def call_operator(op: str, arguments: dict):
    return getattr(torch.ops.twilight, op).default(**arguments)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_malformed_arguments_are_refused_in_eager_and_nothing_is_written(case):
    x = inputs(case.bounds_dtype)
    before, arguments = x.clone(), case.arguments()
    written = written_arguments(case.op, arguments)
    line = refusal(case, lambda: call_operator(case.op, arguments))
    assert_names_everything(case, line)
    assert_same_state(x, before)
    assert_unwritten(arguments, written)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_malformed_arguments_are_refused_by_the_fake_in_the_same_words(case):
    arguments = case.arguments()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
        line = refusal(case, lambda: call_operator(case.op, fakes))
    assert_names_everything(case, line)
    assert line == refusal(case, lambda: call_operator(case.op, arguments)), "eager and trace read differently"


# One case an operator is enough here: tracing runs the very fake of the test above.
AT_TRACE = [next(case for case in ALL_CASES if case.op == op) for op in backends.OPS]


@pytest.mark.parametrize("case", AT_TRACE, ids=str)
def test_malformed_arguments_are_refused_at_trace_time(case):
    before, arguments = inputs().clone(), case.arguments()
    compiled = torch.compile(lambda a: call_operator(case.op, a), fullgraph=True, backend="eager")
    assert_names_everything(case, refusal(case, lambda: compiled(arguments)))
    assert_same_state(inputs(), before)
    torch._dynamo.reset()


@pytest.mark.parametrize("op", backends.OPS)
def test_the_unchanged_arguments_are_accepted(op):
    for bounds_dtype in ("model", "uint8"):
        call_operator(op, valid(op, inputs(bounds_dtype).clone()))


def test_the_table_covers_every_operator_and_most_arguments():
    assert len(ALL_CASES) >= 60 and {case.op for case in ALL_CASES} == set(backends.OPS)
    for op in backends.OPS:
        named = {case.blames or case.argument for case in ALL_CASES if case.op == op}
        assert len(named) >= 5, f"{op}: only {sorted(named)}"
