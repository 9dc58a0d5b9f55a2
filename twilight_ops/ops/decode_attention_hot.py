"""twilight::decode_attention_hot: decode_attention on K and V outside the device, with copies of what was read lately on it."""

import torch
from torch import Tensor

from ..arguments import KV, Candidates, HotRows, Observation, PageBounds, PageMeans, Paging, Policy, Shadow
from . import decode_attention as plain
from ._checks import Checker
from ._library import Operator


def decode_attention_hot(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    hot: HotRows,
    shadow: Shadow | None = None,
    bounds: PageBounds | None = None,
    candidates: Candidates = Candidates(),
    observe: Observation = Observation(),
    means: PageMeans | None = None,
    out: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention`, which reads the row of a kept token from `hot` where that holds it, and leaves rows there that it fetched.

    The kept sets are the same. A place of `hot` whose row this call does not read goes to a kept token that has its place there, of
    several to the newest. Nothing enters in a sequence that attends to everything. Whoever writes K or V of a token again takes it out
    of `hot_tokens` first.

    Args:
        hot: copies; all others as of `decode_attention`.

    Returns:
        As `decode_attention`.

    Raises:
        RuntimeError: a malformed argument; or gradients are enabled and an input requires them. Nothing was written.
    """
    attended, lse = OPERATOR(q, kv, paging, policy, sm_scale, hot, shadow, bounds, candidates, observe, means, out, softcap)
    return attended if out is None else out, lse


def check(
    q: Tensor,
    kv: KV,
    paging: Paging,
    policy: Policy,
    sm_scale: float,
    hot: HotRows,
    *others: object,
) -> None:
    *groups, softcap = others
    plain.check(q, kv, paging, policy, sm_scale, *groups, None, softcap)  # type: ignore[arg-type, call-arg]
    c = Checker("decode_attention_hot", q)
    c.paged("k_cache", kv.k_cache, ("P", "Hkv", "S", "D"), q.dtype)  # copies are not dequantised
    _, c.sizes["Hkv"], _, c.sizes["D"] = kv.k_cache.shape
    c.tensor("hot_keys", hot.hot_keys, ("N", "Hkv", "R", "D"), q.dtype)
    c.tensor("hot_values", hot.hot_values, ("N", "Hkv", "R", "D"), q.dtype)
    c.tensor("hot_tokens", hot.hot_tokens, ("N", "Hkv", "R"), torch.int32)
    c.tensor("hot_claims", hot.hot_claims, ("N", "Hkv", "R"), torch.int32)
    c.require(hot.hot_keys.shape[0] >= q.shape[0], "hot_keys", f"rows of at least {q.shape[0]} sequences", hot.hot_keys.shape[0])
    c.at_least("hot_keys: R", hot.hot_keys.shape[2], 1)
    c.no_gradients()


OPERATOR = Operator(
    decode_attention_hot,
    "(Tensor attended, Tensor lse)",
    check,
    lambda q, *others: plain.outputs(q, others[-2]),
    mutates=("budget_counters", "kept_indices", "kept_counts", "out", *HotRows._fields),
)
