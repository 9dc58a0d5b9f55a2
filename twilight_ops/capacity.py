"""A call's token counts and the capacity of its lists. `csrc/capacity.h` is the C++ twin."""

from __future__ import annotations

import math
from typing import NamedTuple

from .arguments import Always, Budget, PageLevel

# Tokens that the page table of one sequence may hold. Sums of two token counts then fit an int32.
MAX_TABLE_TOKENS = 2**29
# What an int32 position can be: the limit where there is no page table.
MAX_TOKENS = 2**31 - 1
# Logits of a selection are multiples of 2 ** (1 / LOGIT_LEVELS), so that 16 bits hold one and every backend has the same.
LOGIT_LEVELS = 128
# Positive fp32 patterns without this many of their last bits are bins: of candidate scores eight an octave, of weights 32.
SCORE_BIN_SHIFT = 20
LOWEST_SCORE_BIN = ((127 - 96) << 3) - 1  # of all scores below 2**-96, where exponentials of several rows begin to underflow
WEIGHT_BIN_SHIFT = 18
# Estimated weights are added up as integers of this unit, so that every backend gets the same sums in any order.
WEIGHT_UNIT = 2**31


class Limits(NamedTuple):
    """Token counts of one call, none beyond what its page table holds, so that no sum or product of them overflows."""

    max_tokens: int
    token_budget: int
    budget_fraction: float
    sink_tokens: int
    recent_tokens: int  # at least the query tokens, which are the newest
    dense_below: int

    @classmethod
    def of(cls, max_tokens: int, query_tokens: int, budget: Budget, always: Always, dense_below: int = 0) -> Limits:
        """What a caller asks for, as far as it can matter. Every backend does this once, where a call comes in."""
        recent_tokens = max(always.recent_tokens, query_tokens)
        asked = (budget.token_budget, always.sink_tokens, recent_tokens, dense_below)
        token_budget, *rest = (min(tokens, max_tokens) for tokens in asked)
        return cls(max_tokens, token_budget, budget.budget_fraction, *rest)

    @property
    def candidate_tokens(self) -> int:
        """Largest token budget any live length can reach: max(token_budget, ceil(budget_fraction * max_tokens))."""
        return min(self.max_tokens, max(self.token_budget, math.ceil(self.budget_fraction * self.max_tokens)))

    @property
    def token_capacity(self) -> int:
        """Slots of a token-granular candidate list; sinks and the newest tokens always have a place."""
        return min(self.max_tokens, max(self.candidate_tokens, self.sink_tokens + self.recent_tokens))

    def page_capacity(self, page_size: int) -> int:
        """Slots of a page-granular candidate list; the pages of sinks and of the newest tokens always have a place."""
        forced = -(-self.sink_tokens // page_size) + -(-self.recent_tokens // page_size) + 1
        return min(self.max_tokens // page_size, max(-(-self.candidate_tokens // page_size), forced))

    def kept_pages_capacity(self, page_size: int, level: PageLevel) -> int:
        """Slots of the list of pages whose tokens are scored."""
        pages = self.max_tokens // page_size
        least = min(pages, -(-level.min_scored_tokens // page_size))
        return max(self.page_capacity(page_size), math.ceil(level.page_fraction * pages), least)


# What a place of `HotRows` is claimed by where its row is read; tokens, which claim the others, are below.
HELD = 2**30

# Layout of one row of `budget_counters` [Hkv, COUNTER_COLUMNS] int64.
COUNTER_ROWS = 0  # calls counted: one a sequence with seq_len > 0
COUNTER_LIVE = 1  # sum of live tokens
COUNTER_CANDIDATES = 2  # sum of I0, tokens
COUNTER_KEPT = 3  # sum of I1, tokens
COUNTER_MASS = 4  # sum of the captured mass, mean over the group's rows, in units of 1 / COUNTER_MASS_UNIT
COUNTER_DENSE = 5  # of COUNTER_ROWS, those that took the dense path: seq_len <= dense_below, or selector "dense"
COUNTER_MASS_UNIT = 2**20
COUNTER_HEADER = 8
HISTOGRAM_BINS = 160  # exact below 16, then 8 bins an octave: 16 + 8 * 18 covers 2**22 tokens
COUNTER_COLUMNS = COUNTER_HEADER + 2 * HISTOGRAM_BINS  # header, histogram of I0, histogram of I1


def histogram_bin_start(index: int) -> int:
    """Smallest token count of a bin: itself below 16, then eight bins an octave."""
    if index < 16:
        return index
    octave, part = divmod(index - 16, 8)
    return (8 + part) << (octave + 1)
