"""Random calls of the fused decode kernel, and what its results must be; shared by the emulated and the GPU tests."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from flat import reference
from inputs import DecodeInputs, Shape, in_fp8, make_inputs, on_device
from torch import Tensor

from twilight_ops import backends, capacity, launch_plan
from twilight_ops.ops.decode_attention import OPERATOR as DECODE_ATTENTION

MAX_ROWS, MAX_DENSE_ROWS = 8, 32  # query rows of a KV head that the kernel takes

needs_plan = pytest.mark.skipif(
    "native" not in (backends.CPU.name, backends.CUDA.name), reason="the launch plan is in the native modules, and none is loaded"
)


def observed(inputs: DecodeInputs) -> dict[str, Tensor]:
    """Poisoned buffers for what a call reports beside its result."""
    batch, kv_heads, device = len(inputs.seq_lens), inputs.num_kv_heads, inputs.q.device
    return {
        "kept_indices": torch.full((batch, kv_heads, inputs.max_tokens), 12345, dtype=torch.int32, device=device),
        "kept_counts": torch.full((batch, kv_heads), 777, dtype=torch.int32, device=device),
        "budget_counters": torch.zeros(kv_heads, capacity.COUNTER_COLUMNS, dtype=torch.int64, device=device),
    }


def request_of(arguments: dict) -> launch_plan.Request:
    """What the launch plan of decode_attention's arguments is asked, on an H200."""
    q, kv, paging, policy, _, shadow, bounds, *_, softcap = DECODE_ATTENTION.groups(DECODE_ATTENTION.values((), dict(arguments)))
    return launch_plan.Request.of_call(q, kv, paging, policy, shadow, bounds, softcap, launch_plan.H200)


def planned(selector: str, batch: int, tokens: int, query_heads: int, kv_heads: int, **settings) -> launch_plan.Plan:
    """Of one query token on an H200, bf16, head_dim 128, pages of 16."""
    call = {"selector": selector, "prunes": selector != "dense", "dtype_bits": 16, "bounds_bits": 8, "head_dim": 128, "query_tokens": 1}
    call |= {"group_size": query_heads // kv_heads, "kv_heads": kv_heads, "batch": batch, "page_size": 16}
    call |= {
        "max_pages": -(-tokens // 16),
        "num_pages": batch * -(-tokens // 16),
        "page_words": kv_heads * 256,
        "device": launch_plan.H200,
        "budget_fraction": 0.0,
    }
    call |= {"page_fraction": 1.0, "min_scored_tokens": 0, "softcap": 0.0}
    call |= dict.fromkeys(("token_budget", "sink_tokens", "recent_tokens", "dense_below"), 0)
    return launch_plan.plan_of(launch_plan.Request(**(call | settings)))


# Of caches in float8 the emulator has but one dtype of queries a head dimension.
FP8_DTYPES = {64: torch.float16, 128: torch.bfloat16}


def random_call(seed: int, longest: int = 1500, device: str = "cpu", fp8: bool = False) -> tuple[DecodeInputs, dict, int]:
    """A ragged call of random geometry, selector and pruner: (inputs, overrides, cluster size)."""
    rng = random.Random(seed)
    page_size = rng.choice([16, 16, 32, 64])
    kv_heads, query_tokens = rng.choice([1, 2]), rng.choice([1, 1, 1, 2, 4])
    group = rng.choice([g for g in (1, 2, 3, 4, 8) if g * query_tokens <= MAX_ROWS])
    longest = rng.choice([100, 700, longest])
    lengths = tuple(
        rng.choice([0, 1, page_size - 1, page_size, page_size + 1, rng.randint(1, longest), longest]) for _ in range(rng.choice([1, 2]))
    )
    shape = Shape(
        lengths if max(lengths) else (5,),
        kv_heads * group,
        kv_heads,
        rng.choice([64, 128]),
        page_size,
        query_tokens,
        rng.choice([torch.bfloat16, torch.float16]),
    )
    shape = replace(shape, dtype=FP8_DTYPES[shape.head_dim]) if fp8 else shape
    inputs = make_inputs(shape, seed=seed, spread=rng.choice([3.7, 1.0, 8.0, 40.0]), bounds_dtype="uint8")
    inputs = in_fp8(inputs) if fp8 else inputs
    if device != "cpu":
        inputs = on_device(inputs, device)
    overrides = {
        "selector": rng.choice(["shadow_prefix", "shadow_prefix", "quest", "page_mean", "page_mean", "streaming", "full", "dense"]),
        "token_budget": rng.choice([1, 17, 64, 300]),
        "budget_fraction": rng.choice([0.0, 0.125, 0.25]),
        "top_p": rng.choice([0.85, 0.95, 0.5, 0.999, 1.0]),
        "dense_below": rng.choice([0, 0, 64, 1000]),
        "sink_tokens": rng.choice([0, 0, 4, 40]),
        "recent_tokens": rng.choice([0, 0, 8, 70]),
    }
    if overrides["selector"] == "shadow_prefix":
        overrides |= {"page_fraction": rng.choice([1.0, 0.5, 0.5, 0.2]), "min_scored_tokens": rng.choice([0, 0, 100, 700])}
    if rng.random() < 0.2:
        overrides["head_token_budget"] = torch.tensor(
            [rng.choice([0, 5, 100, 2000]) for _ in range(kv_heads)], dtype=torch.int32, device=device
        )
    if rng.random() < 0.2:
        levels = [[rng.uniform(0.5, 1.0) for _ in range(kv_heads * group)] for _ in shape.seq_lens]
        overrides["head_top_p"] = torch.tensor(levels, device=device)
    return inputs, overrides, rng.choice([1, 2, 4])


def many_rows_call(seed: int, longest: int = 1500, device: str = "cpu", fp8: bool = False) -> tuple[DecodeInputs, dict, int]:
    """A ragged dense call of more rows than a sparse one may have, as the check of drafted tokens is: (inputs, overrides, cluster size)."""
    rng = random.Random(seed)
    rows = [(group, tokens) for group in (1, 3, 4, 5, 8, 16, 32) for tokens in range(1, 9) if MAX_ROWS < group * tokens <= MAX_DENSE_ROWS]
    (group, query_tokens), kv_heads, page_size = rng.choice(rows), rng.choice([1, 2]), rng.choice([16, 32, 64])
    head_dim = rng.choice([64, 128])
    dtype = FP8_DTYPES[head_dim] if fp8 else rng.choice([torch.bfloat16, torch.float16])
    lengths = tuple(rng.choice([0, 1, query_tokens, page_size + 1, rng.randint(1, longest), longest]) for _ in range(rng.choice([1, 2])))
    shape = Shape(lengths if max(lengths) else (5,), kv_heads * group, kv_heads, head_dim, page_size, query_tokens, dtype)
    inputs = make_inputs(shape, seed=seed, spread=rng.choice([3.7, 1.0, 8.0, 40.0]), bounds_dtype="uint8")
    inputs = in_fp8(inputs) if fp8 else inputs
    if device != "cpu":
        inputs = on_device(inputs, device)
    by_length = {"selector": "quest", "token_budget": 64, "dense_below": inputs.max_tokens}
    return inputs, rng.choice([{"selector": "dense"}, {"selector": "dense"}, by_length]), rng.choice([1, 2, 4])


def far_below_zero(inputs: DecodeInputs) -> DecodeInputs:
    """Every logit is far below zero: what starts a softmax sum must not be larger."""
    inputs.q.abs_()
    inputs.k_cache.copy_(inputs.k_cache.float().abs().neg().to(inputs.k_cache.dtype))
    return inputs


def extreme_call(seed: int, device: str = "cpu") -> tuple[DecodeInputs, dict, int]:
    """`random_call` of a short table whose integers are as large, or as negative, as their types allow."""
    rng = random.Random(seed)
    shape = Shape((rng.randint(1, 90), rng.randint(1, 40)), 4, 2, 64, rng.choice([16, 32]), rng.choice([1, 2, 4]), torch.float16)
    inputs = make_inputs(shape, seed=seed, bounds_dtype="uint8", extra_pages=rng.choice([0, 1]))
    for tensor in (inputs.k_cache, inputs.v_cache, inputs.k_scale, inputs.bounds_scale, inputs.means_scale):
        tensor.nan_to_num_(0.25)
    inputs.seq_lens.copy_(torch.tensor([rng.choice([-(2**31), -1, 0, n, 2**31 - 1]) for n in shape.seq_lens]))
    if device != "cpu":
        inputs = on_device(inputs, device)
    large = (2**30, 2**31 - 1, 2**31, 2**62, 2**63 - 1)
    overrides = {
        "selector": rng.choice(["shadow_prefix", "quest", "page_mean", "streaming", "full", "dense"]),
        "token_budget": rng.choice([1, 20, *large]),
        "budget_fraction": rng.choice([0.0, 1 / 3, 1.0]),
        "top_p": rng.choice([0.5, 1.0]),
        "dense_below": rng.choice([0, 0, 0, 20, *large]),
        "sink_tokens": rng.choice([0, 4, *large]),
        "recent_tokens": rng.choice([0, 8, *large]),
    }
    if overrides["selector"] == "shadow_prefix":
        overrides |= {"page_fraction": rng.choice([1.0, 0.5, 1e-9]), "min_scored_tokens": rng.choice([0, 30, *large])}
    if rng.random() < 0.3:
        heads = torch.tensor([rng.choice([-(2**31), -1, 17, 2**31 - 1]) for _ in range(2)], dtype=torch.int32, device=device)
        overrides["head_token_budget"] = heads
    return inputs, overrides, rng.choice([1, 2, 4])


def members(lists: dict[str, Tensor]) -> Tensor:
    """Kept positions as booleans; checks that counts and pads agree with them."""
    indices, counts = lists["kept_indices"], lists["kept_counts"]
    used = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    assert torch.equal(used, indices >= 0), "positions first, then -1"
    assert (indices[..., 1:] > indices[..., :-1])[used[..., 1:]].all(), "positions ascend"
    member = torch.zeros(*indices.shape[:-1], indices.shape[-1] + 1, dtype=torch.bool, device=indices.device)
    return member.scatter_(-1, indices.long().where(used, indices.shape[-1]), True)[..., :-1]


def assert_as_reference(inputs: DecodeInputs, overrides: dict, run) -> None:
    """`run(arguments)` gives the reference's sets, values and counters.

    A set may differ where the reference itself differs between fp32 and fp64, by as many positions or by one that two roundings swap.
    """
    got, want = {**overrides, **observed(inputs)}, {**overrides, **observed(inputs)}
    out, lse = run(inputs.arguments("decode_attention", **got))
    want_out, want_lse = reference.decode_attention(**inputs.arguments("decode_attention", **want))
    different = members(got) ^ members(want)
    same = ~different.any(-1)
    if not same.all():
        wide = {**overrides, **observed(inputs)}
        reference.decode_attention(**inputs.upcast().arguments("decode_attention", **wide))
        assert different.sum() <= (members(wide) ^ members(want)).sum() + 2
    same_rows = same.repeat_interleave(inputs.group_size, dim=1)[:, None].expand(lse.shape)
    torch.testing.assert_close(lse[same_rows], want_lse[same_rows], rtol=1e-4, atol=1e-3, equal_nan=True)
    rounding = torch.finfo(out.dtype).eps
    got_rows, want_rows = out[same_rows].float(), want_out[same_rows].float()
    torch.testing.assert_close(got_rows, want_rows, rtol=4 * rounding, atol=2 * rounding, equal_nan=True)
    if same.all():
        difference = (got["budget_counters"] - want["budget_counters"])[:, : capacity.COUNTER_HEADER].abs()
        assert difference[:, capacity.COUNTER_MASS].max() <= 8 * len(inputs.seq_lens)  # units of 2**-20 a sequence
        difference[:, capacity.COUNTER_MASS] = 0
        assert difference.max() == 0
        assert torch.equal(
            got["budget_counters"][:, capacity.COUNTER_HEADER :].sum(1), want["budget_counters"][:, capacity.COUNTER_HEADER :].sum(1)
        )
