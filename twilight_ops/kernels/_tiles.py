"""Device functions shared by the Triton kernels: where a slot's token lives, what its codes are, what it weighs."""

import math

import triton
import triton.language as tl

from .. import capacity

# The interpreter has no inline assembly; it takes the portable line of `unpack_codes`.
NATIVE = tl.constexpr(not triton.knobs.runtime.interpret)

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# A visible logit of -inf is stored as this, so that -inf alone can mean "not visible".
LOWEST = tl.constexpr(-3.4028234663852886e38)

LEVEL = tl.constexpr(math.log(2) / capacity.LOGIT_LEVELS)

# Two NaN with all bits set, which no rounding produces.
DEAD = tl.constexpr(-1)

# An integer n in the low bits of an fp16 is the subnormal n * 2**-24, which matrix instructions multiply exactly: masks alone unpack
# codes, five instructions for four bytes instead of 28 with conversions. Nibbles stay where they are, so high ones count 16 fold.
UNPACK_NIBBLES = tl.constexpr(
    "{ .reg .b32 odd; shr.b32 odd, $4, 8;"
    "and.b32 $0, $4, 0x000F000F; and.b32 $1, odd, 0x000F000F; and.b32 $2, $4, 0x00F000F0; and.b32 $3, odd, 0x00F000F0; }"
)
UNPACK_BYTES = tl.constexpr("prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;")


@triton.jit
def unpack_nibbles(packed, DTYPE: tl.constexpr):
    """Low and high 4-bit codes of a uint8 tile as DTYPE in `nibble_order`; from masks alone they come times 2**-24 and 2**-20."""
    # Written out in each function: what a call returns is no constant, so that both branches would be compiled.
    if NATIVE and DTYPE == tl.float16:
        low, high = tl.inline_asm_elementwise(
            UNPACK_NIBBLES, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    else:
        low = (packed & 15).to(DTYPE)
        high = (packed >> 4).to(DTYPE)
    return low, high


@triton.jit
def nibble_order(byte, DTYPE: tl.constexpr):
    """The byte of which `unpack_nibbles` puts the codes at each place of a row."""
    if NATIVE and DTYPE == tl.float16:
        return (byte & -4) | ((byte & 1) << 1) | ((byte & 2) >> 1)
    else:
        return byte


@triton.jit
def unpack_bytes(packed, DTYPE: tl.constexpr):
    """A uint8 tile as DTYPE, times 2**-24 where masks alone do it."""
    if NATIVE and DTYPE == tl.float16:
        return tl.inline_asm_elementwise(UNPACK_BYTES, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return packed.to(DTYPE)


@triton.jit
def from_e4m3(code, DTYPE: tl.constexpr):
    """Numbers of float8_e4m3fn, given as uint8, in DTYPE; with masks and an exact product, because GPUs before sm_89 convert none."""
    wide = code.to(tl.int16)
    half = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half).to(DTYPE)


@triton.jit
def to_e4m3(x):
    """The nearest numbers of float8_e4m3fn as uint8, ties to even; what is too large becomes the largest, NaN stays NaN."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    # Below the smallest normal number adding 2**14 leaves units of 2**-9.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (bits - (120 << 23) + 0x7FFFF + (bits >> 20 & 1)) >> 20
    code = tl.where(x == x, tl.where(size < 0.015625, small, normal), 0x7F)
    return (code | (x.to(tl.int32, bitcast=True) >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def factor(descale, head):
    """Of a head; 1 where there is none."""
    if descale is None:
        return 1.0
    else:
        return tl.load(descale + head)


@triton.jit
def soft_capped(logit, softcap):
    """softcap * tanh(logit / softcap); the logit where there is no cap. A polynomial where 1 - exp would lose what is small."""
    if softcap is None:
        return logit
    else:
        x = logit / softcap
        square = x * x
        series = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
        series = (series * square - 3.33332819422e-1) * square * x + x
        fade = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        size = (1.0 - fade) / (1.0 + fade)
        return softcap * tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0.0, -size, size))


@triton.jit
def code_scales(DTYPE: tl.constexpr):
    """Factors on queries that meet low and high codes, and on their product: the largest query becomes 2**12 to 2**13."""
    if NATIVE and DTYPE == tl.float16:
        return 4096.0, 256.0, 4096.0
    else:
        return 1.0, 1.0, 1.0


@triton.jit
def power_of_two(largest):
    """2**-e and 2**e with e the exponent of each entry: scaled by it, every row fits fp16, whatever the range of q."""
    exponent = (largest.to(tl.float32).to(tl.int32, bitcast=True) >> 23 & 255) - 127
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True), ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_word(at, live):
    """The scale and zero of quantised rows as one word, DEAD where a row is not live: one word to hand to the product's layout."""
    return tl.where(live, tl.load(at, mask=live, other=0), DEAD)


@triton.jit
def scale_and_zero(word):
    """The two bf16 of a word."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded_to_level(logit):
    """A selection's logits are multiples of LEVEL; adding 1.5 * 2**23 rounds to an integer."""
    return ((logit * (1.0 / LEVEL) + 12582912.0) - 12582912.0) * LEVEL


@triton.jit
def softmax_step(weighed, reference, peak, total, is_first):
    """Folds a tile [items, columns] into elementwise maxima, and sums relative to the first tile's entries (in units of ln 2).

    One exponential an element and no reduction; `softmax_finish` says when a reference was too low.
    """
    scaled = weighed * LOG2E
    reference = tl.where(is_first, tl.where(tl.abs(scaled) == INF, 0.0, scaled), reference)
    return reference, tl.maximum(peak, weighed), total + tl.exp2(scaled - reference)


@triton.jit
def softmax_finish(reference, peak, total):
    """Column maxima, sums relative to them, and whether a sum may have left the range of fp32 and has to be taken again."""
    top = tl.max(peak, 0)
    safe = tl.where(tl.abs(top) == INF, 0.0, top)
    rise = tl.where(peak == -INF, 0.0, peak * LOG2E - reference)
    again = tl.max(tl.max((rise > 60.0).to(tl.int32), 1), 0) > 0
    return top, tl.sum(total * tl.exp2(reference - (safe * LOG2E)[None, :]), 0), again


@triton.jit
def in_order(COLUMNS: tl.constexpr):
    """0 .. 32 * COLUMNS - 1 as a tile [32, COLUMNS], ascending down the columns: a warp scans 32 in a row, in the layout of its stores."""
    entry = tl.arange(0, 32)[:, None] + tl.arange(0, COLUMNS)[None, :] * 32
    # Hidden from the compiler: vector loads would bring a layout of their own, and whole tiles of 64-bit addresses would change layout.
    return tl.max_contiguous(entry, [1, 1])


@triton.jit
def count_tile(values):
    """Sum of an `in_order` tile: along the rows first, which a thread holds."""
    return tl.sum(tl.sum(values, 1), 0)


@triton.jit
def rank_in_order(flag):
    """How many entries of an `in_order` tile before each one are set, and how many are set in all."""
    column = tl.sum(flag, 0)
    before = tl.cumsum(column, 0) - column
    return before[None, :] + tl.cumsum(flag, 0) - flag, tl.sum(column, 0)


@triton.jit
def store_compacted(out, value, taken, base, limit):
    """Writes the taken values of an `in_order` tile from slot `base` on, none at `limit` or beyond; returns how many."""
    rank, count = rank_in_order(taken.to(tl.int32))
    place = base + rank
    tl.store(out + place, value, mask=taken & (place < limit))
    return count


@triton.jit
def live_length(seq_lens, batch, max_pages, PAGE: tl.constexpr):
    """Valid tokens of a sequence, never more than its page table can hold."""
    return tl.minimum(tl.maximum(tl.load(seq_lens + batch), 0), max_pages * PAGE)


@triton.jit
def listed_slots(counts, row, length, capacity, UNIT: tl.constexpr, LISTED: tl.constexpr):
    """Slots of one (sequence, KV head) that can hold a token."""
    if LISTED:
        # Clamped before it is multiplied: a count may be anything.
        slots = tl.minimum(tl.maximum(tl.load(counts + row), 0), capacity // UNIT) * UNIT
    else:
        slots = tl.minimum(length, capacity)
    return slots


@triton.jit
def slot_tokens(indices, row, slot, inside, capacity, UNIT: tl.constexpr, LISTED: tl.constexpr):
    """Positions that slots stand for, -1 outside the list."""
    if LISTED:
        index = tl.load(indices + row.to(tl.int64) * (capacity // UNIT) + slot // UNIT, mask=inside, other=-1)
        # An index beyond every position would wrap around to a live one.
        known = (index >= 0) & (index <= 0x7FFFFFFF // UNIT)
        token = tl.where(known, index * UNIT + slot % UNIT, -1)
    else:
        token = tl.where(inside, slot, -1)
    return token


@triton.jit
def physical_page(page_table, batch, logical, live, num_pages, max_pages):
    """Physical pages, int64; a bad page table entry reads some valid page."""
    page = tl.load(page_table + batch.to(tl.int64) * max_pages + logical, mask=live, other=0)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64)


@triton.jit
def softmax_row(peaks, sums, row, used, splits, SPLITS_PAD: tl.constexpr):
    """Merges the partial maxima and sums of one row: its maximum (0 where nothing is finite), and 1 / sum (1 where it is 0)."""
    split = tl.arange(0, SPLITS_PAD)
    at = row.to(tl.int64) * splits + split
    peak = tl.load(peaks + at, mask=split < used, other=-INF)
    partial = tl.load(sums + at, mask=split < used, other=0.0)
    top = tl.max(peak, 0)
    safe = tl.where(top == -INF, 0.0, top)
    total = tl.sum(tl.where(peak == -INF, 0.0, partial * tl.exp2((peak - safe) * LOG2E)), 0)
    return top, safe, tl.where(total > 0.0, 1.0 / total, 1.0)


@triton.jit
def weight_row(softmax):
    """The same with what becomes of a whole row in its scale: 0 where no logit exceeds LOWEST, NaN where one is +inf."""
    top, safe, scale = softmax
    return top, safe, tl.where(top <= LOWEST, 0.0, tl.where(top == INF, float("nan"), scale))


@triton.jit
def estimated_weight(logit, safe, scale):
    """A weight from a stored logit and its row's statistics; -inf logits are not visible."""
    return tl.where(logit == -INF, 0.0, tl.exp2((logit - safe) * LOG2E) * scale)
