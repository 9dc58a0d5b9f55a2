"""How many candidates a call may return: the static capacity of an index list. `csrc/capacity.h` is the C++ twin."""

import math


def candidate_tokens_capacity(max_tokens: int, token_budget: int, budget_fraction: float) -> int:
    """Largest token budget any live length can reach: max(token_budget, ceil(budget_fraction * max_tokens))."""
    return min(max_tokens, max(token_budget, math.ceil(budget_fraction * max_tokens)))


def token_capacity(
    max_pages: int, page_size: int, query_tokens: int, token_budget: int, budget_fraction: float, sink_tokens: int, recent_tokens: int
) -> int:
    """Slots of a token-granular candidate list; sinks and the newest tokens always have a place."""
    max_tokens = max_pages * page_size
    forced = sink_tokens + max(recent_tokens, query_tokens)
    return min(max_tokens, max(candidate_tokens_capacity(max_tokens, token_budget, budget_fraction), forced))


def page_capacity(
    max_pages: int, page_size: int, query_tokens: int, token_budget: int, budget_fraction: float, sink_tokens: int, recent_tokens: int
) -> int:
    """Slots of a page-granular candidate list; the pages of sinks and of the newest tokens always have a place."""
    tokens = candidate_tokens_capacity(max_pages * page_size, token_budget, budget_fraction)
    recent = max(recent_tokens, query_tokens)
    forced = -(-sink_tokens // page_size) + -(-recent // page_size) + 1
    return min(max_pages, max(-(-tokens // page_size), forced))


# Layout of one row of `budget_counters` [Hkv, COUNTER_COLUMNS] int64.
COUNTER_ROWS = 0  # calls counted: one a sequence with seq_len > 0
COUNTER_LIVE = 1  # sum of live tokens
COUNTER_CANDIDATES = 2  # sum of I0, tokens
COUNTER_KEPT = 3  # sum of I1, tokens
COUNTER_MASS = 4  # sum of the captured mass, mean over the group's rows, in units of 2**-20
COUNTER_DENSE = 5  # of COUNTER_ROWS, those that took the dense path: seq_len <= dense_below, or selector "dense"
COUNTER_HEADER = 8
HISTOGRAM_BINS = 160  # exact below 16, then 8 bins an octave: 16 + 8 * 18 covers 2**22 tokens
COUNTER_COLUMNS = COUNTER_HEADER + 2 * HISTOGRAM_BINS  # header, histogram of I0, histogram of I1


def histogram_bin(tokens: int) -> int:
    """Bin of a token count: itself below 16, then eight bins an octave."""
    if tokens < 16:
        return tokens
    octave = tokens.bit_length() - 1
    return min(HISTOGRAM_BINS - 1, 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7))


def histogram_bin_start(index: int) -> int:
    """Smallest token count of a bin; the inverse of `histogram_bin`."""
    if index < 16:
        return index
    octave, part = divmod(index - 16, 8)
    return (8 + part) << (octave + 1)
