"""Device side of the budget counters; `capacity.py` holds their layout."""

import triton
import triton.language as tl

from .. import capacity

ROWS = tl.constexpr(capacity.COUNTER_ROWS)
LIVE = tl.constexpr(capacity.COUNTER_LIVE)
CANDIDATES = tl.constexpr(capacity.COUNTER_CANDIDATES)
KEPT = tl.constexpr(capacity.COUNTER_KEPT)
MASS = tl.constexpr(capacity.COUNTER_MASS)
MASS_UNIT = tl.constexpr(float(capacity.COUNTER_MASS_UNIT))
DENSE = tl.constexpr(capacity.COUNTER_DENSE)
HEADER = tl.constexpr(capacity.COUNTER_HEADER)
BINS = tl.constexpr(capacity.HISTOGRAM_BINS)
COLUMNS = tl.constexpr(capacity.COUNTER_COLUMNS)


@triton.jit
def _histogram_bin(tokens):
    """Itself below 16, then eight bins an octave."""
    octave = tl.sum(((tokens >> tl.arange(0, 32)) > 0).to(tl.int32), 0) - 1
    wide = 16 + (octave - 4) * 8 + ((tokens >> tl.maximum(octave - 3, 0)) & 7)
    return tl.minimum(tl.where(tokens < 16, tokens, wide), BINS - 1)


@triton.jit
def mean_mass(mass, batch, head, KV_HEADS: tl.constexpr, QUERY_TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS_PAD: tl.constexpr):
    """Mean of mass [B, T, Hq] over the rows of one KV head's group, fp64."""
    r = tl.arange(0, ROWS_PAD)
    at = (batch * QUERY_TOKENS + r // GROUP) * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
    share = tl.load(mass + at, mask=r < QUERY_TOKENS * GROUP, other=0.0).to(tl.float64)
    return tl.sum(share, 0) / (QUERY_TOKENS * GROUP)


@triton.jit
def count_row(budget_counters, head, length, candidates, kept, mass, dense):
    """Adds one (sequence, KV head) to its head's counters; integers add up alike in any order."""
    row = budget_counters + head * COLUMNS
    one = tl.full([], 1, tl.int64)
    # Adding 1.5 * 2**52 rounds a double to an integer, ties to even.
    units = (mass * MASS_UNIT + 6755399441055744.0) - 6755399441055744.0
    tl.atomic_add(row + ROWS, one, sem="relaxed")
    tl.atomic_add(row + LIVE, length.to(tl.int64), sem="relaxed")
    tl.atomic_add(row + CANDIDATES, candidates.to(tl.int64), sem="relaxed")
    tl.atomic_add(row + KEPT, kept.to(tl.int64), sem="relaxed")
    tl.atomic_add(row + MASS, units.to(tl.int64), sem="relaxed")
    if dense:
        tl.atomic_add(row + DENSE, one, sem="relaxed")
    tl.atomic_add(row + HEADER + _histogram_bin(candidates), one, sem="relaxed")
    tl.atomic_add(row + HEADER + BINS + _histogram_bin(kept), one, sem="relaxed")
