"""How results are compared with the fp64 oracle: tolerances are measured, never guessed."""

from __future__ import annotations

import math

import torch
from inputs import CACHE_TENSORS, DecodeInputs, mean_keys, paged_rows, shadow_keys
from torch import Tensor

from twilight_ops.arguments import FP8
from twilight_ops.capacity import HISTOGRAM_BINS, LOGIT_LEVELS

# A kernel may be this many times worse than the straightforward PyTorch computation in the same dtype: both errors are maxima of a few
# thousand roundings, and two correct orders of summation were seen to differ by 2.3.
WORSE_THAN_PLAIN = 4.0
# Largest error plain PyTorch may have itself, as a share of the largest value; in half precision the logits are rounded to that precision.
PLAIN_LIMIT = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.15}


def assert_close_to_oracle(got: Tensor, oracle: Tensor, plain: Tensor, what: str = "result", slack: float = 0.0) -> None:
    """`max |got - oracle| <= 4 max |plain - oracle| + one rounding + slack`; NaN and infinities must sit in the same places.

    `plain` is a straightforward PyTorch computation in the kernel's dtype: its error is what that dtype costs. One rounding is the spacing
    of the result's dtype at the largest value.
    """
    rounding, plain_dtype = torch.finfo(got.dtype).eps, plain.dtype
    assert got.shape == oracle.shape, f"{what}: shape {list(got.shape)}, expected {list(oracle.shape)}"
    got, oracle, plain = (t.detach().double().cpu() for t in (got, oracle, plain))
    special = ~oracle.isfinite()
    torch.testing.assert_close(got[special], oracle[special], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    assert got[~special].isfinite().all(), f"{what}: {int((~got[~special].isfinite()).sum())} values are not finite"
    if special.all():
        return
    error = (got - oracle)[~special].abs()
    largest = oracle[~special].abs().max()
    yardstick = (plain - oracle)[~special].abs().max().nan_to_num(0.0)
    # Two independent computations of the same thing: were they further apart than this, one of them would be wrong.
    assert yardstick <= PLAIN_LIMIT[plain_dtype] * largest + slack, f"{what}: the oracle and plain PyTorch differ by {yardstick:.3e}"
    allowed = WORSE_THAN_PLAIN * yardstick + rounding * largest + slack
    assert error.max() <= allowed, f"{what}: error {error.max():.3e}, allowed {allowed:.3e}"


def assert_same_state(got: DecodeInputs, want: DecodeInputs) -> None:
    """Every cache tensor is equal, bit for bit but for the payload of a NaN."""
    for name in CACHE_TENSORS:
        g, w = (
            tensor.float() if tensor is not None and tensor.dtype == FP8 else tensor for tensor in (getattr(got, name), getattr(want, name))
        )
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def dot_rounding(x: DecodeInputs) -> float:
    """What fp32 may lose in a logit: four units of the last place of `sm_scale * sum_d |q_d k_d|`, the standard bound's condition.

    Four, because the shadow may be expanded as `scale * q . code + zero * sum q`, whose terms are larger than those of q . k.
    """
    keys = x.keys.float().nan_to_num(0.0, 0.0, 0.0).abs().amax(dim=1)  # [B, Hkv, D]
    q = x.q.float().nan_to_num(0.0).abs().unflatten(2, keys.shape[1:2] + (-1,))
    condition = torch.einsum("bthgd,bhd->bthg", q, keys).max() * x.sm_scale
    return float(4 * torch.finfo(torch.float32).eps * condition)


def assert_attention_close(x: DecodeInputs, got, want, plain) -> None:
    """(out, lse) against the oracle's: a logit's rounding is additive in lse and relative in out."""
    slack = dot_rounding(x)
    largest = want[0].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    assert_close_to_oracle(got[0], want[0], plain[0], "out", slack * largest)
    assert_close_to_oracle(got[1], want[1], plain[1], "lse", slack)


def listed_set(indices: Tensor, counts: Tensor, size: int) -> Tensor:
    """Checks the form of a list (ascending, unique, in range, -1 pads) and returns it as booleans [..., size]."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    used = slots < counts[..., None]
    assert counts.min() >= 0 and counts.max() <= indices.shape[-1], f"counts out of range: {counts.tolist()}"
    assert (indices[~used] == -1).all(), "slots beyond counts must hold -1"
    assert ((indices >= 0) & (indices < size))[used].all(), f"an index is outside 0..{size - 1}"
    if indices.shape[-1] > 1:
        ascending = indices[..., 1:] > indices[..., :-1]
        assert ascending[used[..., 1:]].all(), "indices must ascend without repeats"
    member = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    member.scatter_(-1, indices.long().where(used, size), used)
    member[..., size] = False
    return member[..., :size]


def assert_same_sets(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], size: int, borderline: Tensor | None = None) -> None:
    """The two lists name the same items, except where `borderline` [..., size] says that rounding alone decides."""
    got_set, want_set = listed_set(*got, size), listed_set(*want, size)
    different = got_set ^ want_set
    if borderline is not None:
        different &= ~borderline
    assert not different.any(), f"{int(different.sum())} items differ, e.g. {different.nonzero()[:5].tolist()}"


def score_rounding(scores: Tensor, scores_fp32: Tensor) -> float:
    """Largest relative error of a straightforward fp32 computation of the scores, doubled."""
    known = scores.isfinite() & (scores > 0)
    error = ((scores_fp32.double() - scores).abs() / scores.clamp(min=torch.finfo(torch.float64).tiny))[known]
    return 2 * float(error.max()) + torch.finfo(torch.float32).eps if error.numel() else 0.0


def fp32_bins(values: Tensor, an_octave: int, lowest: int = -(1 << 20)) -> Tensor:
    """Bins that the leading bits of fp32 numbers stand for, in the order of the numbers; -1e9 where they are NaN."""
    mantissa, exponent = values.double().frexp()
    bins = exponent * an_octave + ((mantissa - 0.5) * 2 * an_octave).floor()
    return torch.where(values.isnan(), -1e9, torch.where(values > 0.0, bins, lowest).clamp(min=lowest))


def score_bins(scores: Tensor) -> Tensor:
    return fp32_bins(scores, 8, -96 * 8)


def assert_best_bins_chosen(scores: Tensor, chosen: Tensor) -> None:
    """Of all bins but the chosen items' lowest all items [..., N] are chosen, of that one the lowest positions; NaN take no part."""
    bins, position = score_bins(scores), torch.arange(scores.shape[-1], device=scores.device)
    cut = bins.masked_fill(~chosen, 1e9).amin(-1, keepdim=True)
    last = position.where(chosen & (bins == cut), -1).amax(-1, keepdim=True)
    assert torch.equal(chosen, (bins > cut) | ((bins == cut) & (position <= last)))


def top_k_borderline(scores: Tensor, scores_fp32: Tensor, chosen: Tensor) -> Tensor:
    """How many items [...] rounding may move into, or out of, the bin in which the budget ends: each may change two of the chosen.

    scores [..., N] fp64, NaN where not live; chosen [..., N] booleans without the items that are always taken.
    """
    rounding = score_rounding(scores, scores_fp32)
    cut = score_bins(scores).masked_fill(~chosen, 1e9).amin(-1, keepdim=True)
    low, high = score_bins(scores * (1 - rounding)), score_bins(scores * (1 + rounding))
    return ((low != high) & (low <= cut) & (high >= cut) & ~scores.isnan()).sum(-1)


def top_p_borderline(weights: Tensor, top_p: Tensor | float, num_kv_heads: int, rounding: float) -> Tensor:
    """Slots [B, Hkv, N] that rounding of the weights may move in or out of some query head's set.

    A slot is kept exactly when the mass of strictly higher bins is below p. So it is on the border unless that mass stays on one side of
    p when every weight, and with it the bins, moves by `rounding`.
    """
    batch, tokens, heads, slots = weights.shape
    ordered = weights.double().sort(dim=-1, descending=True)
    w = ordered.values
    mass = torch.cat([torch.zeros_like(w[..., :1]), w.cumsum(-1)], dim=-1)
    lower, upper = (-fp32_bins(w * (1 + moved), 32).contiguous() for moved in (-rounding, rounding))
    most = mass.gather(-1, torch.searchsorted(upper, lower))
    least = mass.gather(-1, torch.searchsorted(lower, upper))
    p = torch.as_tensor(top_p, dtype=torch.float64, device=w.device).expand(batch, heads)[:, None, :, None]
    near = (most >= p - rounding) & (least < p + rounding)
    near = torch.zeros_like(near).scatter_(-1, ordered.indices, near)
    return near.view(batch, tokens, num_kv_heads, -1, slots).any(3).any(1)


def visible_mask(x: DecodeInputs, member: Tensor | None = None) -> Tensor:
    """[B, T, Hq, N] what each query row may attend to: live, causal, and in `member` [B, Hkv, N] where given."""
    batch, tokens, heads, _ = x.q.shape
    position = torch.arange(x.max_tokens, device=x.q.device)
    horizon = x.seq_lens[:, None] - tokens + torch.arange(tokens, device=x.q.device)
    mask = (position <= horizon[..., None])[:, :, None].expand(-1, -1, heads, -1)
    if member is not None:
        mask = mask & member.repeat_interleave(x.group_size, dim=1)[:, None]
    return mask


def dense_rows(x: DecodeInputs, rows: Tensor) -> Tensor:
    """Left-aligned rows [B, n, Hkv, D] as [B, Hq, N, D] over all M * S positions, zeros where nothing is stored."""
    padded = rows.new_zeros(rows.shape[0], x.max_tokens, *rows.shape[2:])
    padded[:, : rows.shape[1]] = rows
    return padded.transpose(1, 2).repeat_interleave(x.group_size, dim=1)


def plain_logits(x: DecodeInputs, keys: Tensor, dtype: torch.dtype, softcap: float | None = None) -> Tensor:
    """[B, T, Hq, N] sm_scale * q . k, or softcap * tanh of it / softcap, computed the obvious way in `dtype`."""
    logits = torch.einsum("bthd,bhnd->bthn", x.q.to(dtype), dense_rows(x, keys).to(dtype)) * x.sm_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_attention(x: DecodeInputs, member: Tensor | None = None, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention with a mask, out in the inputs' own dtype, lse in fp32: the yardstick for `assert_close_to_oracle`."""
    mask = visible_mask(x, member)
    logits = plain_logits(x, x.keys, x.q.dtype, softcap).float().masked_fill(~mask, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0).to(x.q.dtype)
    lse = plain_logits(x, x.keys, torch.float32, softcap).masked_fill(~mask, -torch.inf).logsumexp(-1)
    return torch.einsum("bthn,bhnd->bthd", weights, dense_rows(x, x.values)), lse


def plain_weights(x: DecodeInputs, dtype: torch.dtype, member: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """Softmax [B, T, Hq, N] over the shadow's keys, whole ones where their logits are capped, computed the obvious way in `dtype`."""
    keys = paged_rows(x, shadow_keys(x, dtype))
    logits = plain_logits(x, keys if softcap is None else keys + x.k_center.to(dtype), dtype, softcap)
    return logits.masked_fill(~visible_mask(x, member), -torch.inf).softmax(-1).nan_to_num(0.0)


def group_sum_of_softmax(x: DecodeInputs, logits: Tensor, live: Tensor, rounded: bool = True) -> Tensor:
    """Score [B, Hkv, N] of the selectors: softmax over live items, summed over the group and the query tokens; NaN where not live."""
    level = math.log(2) / LOGIT_LEVELS
    logits = (logits / level).round() * level if rounded else logits
    weights = logits.masked_fill(~live[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    scores = weights.unflatten(2, (x.num_kv_heads, x.group_size)).sum(dim=(1, 3))
    return scores.masked_fill(~live[:, None], torch.nan)


def leading_channels(x: DecodeInputs) -> Tensor:
    """[Hkv, D], by channel of K: whether it belongs to the prefix."""
    rank = torch.empty_like(x.channel_order).scatter_(
        1, x.channel_order.long(), torch.arange(x.q.shape[-1]).int().to(x.q.device).expand_as(x.channel_order)
    )
    return rank < x.prefix_channels[:, None]


def token_scores(x: DecodeInputs, dtype: torch.dtype, rounded: bool = True) -> Tensor:
    """Scores [B, Hkv, M * S] that select_tokens ranks, the obvious way: channels outside the prefix are zero."""
    keys = paged_rows(x, shadow_keys(x, dtype)) * leading_channels(x)
    live = torch.arange(x.max_tokens, device=x.q.device) < x.seq_lens[:, None]
    return group_sum_of_softmax(x, plain_logits(x, keys, dtype), live, rounded)


def _owned_pages(x: DecodeInputs, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Which pages are live, [B, M], and what `pages` [P, Hkv, ...] holds for them and every query head, [B, M, Hq, ...]."""
    live = torch.arange(x.page_table.shape[1], device=x.q.device) * x.page_size < x.seq_lens[:, None]
    owned = pages[x.page_table.long().where(live, 0)].repeat_interleave(x.group_size, dim=2)
    return live, owned.where(live.view(*live.shape, *[1] * (owned.dim() - 2)), 0.0)


def page_scores(x: DecodeInputs, dtype: torch.dtype) -> Tensor:
    """Scores [B, Hkv, M] that select_pages ranks, the obvious way: sum over channels of the better corner."""
    bounds = x.page_bounds.to(dtype)
    if x.bounds_scale is not None:
        scale = x.bounds_scale.to(dtype)[..., None]
        bounds = bounds * scale[:, :, :1] + scale[:, :, 1:]
    live, owned = _owned_pages(x, bounds)  # [B, M, Hq, 2, D]
    q = x.q.to(dtype)[:, :, None]  # [B, T, 1, Hq, D]
    corners = torch.maximum(q * owned[:, None, :, :, 0], q * owned[:, None, :, :, 1])
    logits = corners.sum(-1).transpose(2, 3) * x.sm_scale  # [B, T, Hq, M]
    return group_sum_of_softmax(x, logits, live)


def page_mean_scores(x: DecodeInputs, dtype: torch.dtype, channels: Tensor | None = None) -> Tensor:
    """The same of the pages' means, or of some of their channels [Hkv, D], [B, Hkv, M]."""
    means = mean_keys(x, dtype)
    live, owned = _owned_pages(x, means if channels is None else torch.where(channels, means, 0.0))  # [B, M, Hq, D]
    logits = torch.einsum("bthd,bmhd->bthm", x.q.to(dtype), owned) * x.sm_scale
    return group_sum_of_softmax(x, logits, live)


def histogram_bin(tokens: int) -> int:
    """Bin of a token count in a budget counter: itself below 16, then eight bins an octave."""
    if tokens < 16:
        return tokens
    octave = tokens.bit_length() - 1
    return min(HISTOGRAM_BINS - 1, 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7))
