// The exact top-k of the fused decode kernel over the scores of a cluster, and the candidates handed out.
#pragma once

#include "score.cuh"

namespace twilight {
namespace {

using ScoreBins = FloatBins<79, kScoreBins - 1>;  // full resolution down to 2^-48 of the largest possible score

// The best items of the cluster by the keys that `scorer` keeps of every block's.
template <class C, class Scorer>
struct TopK {
  static constexpr int RP = C::RP;
  static constexpr bool kLevels = Scores<C>::kLevels;
  const C& c;
  const Share share;
  const Scorer& scorer;
  const Scores<C>& scores;
  const TopKStorage<RP> s;
  const View<uint2> candidates;

  // Histogram of this block's keys, of which `makes_keys` makes those; all, or those in [low_key, low_key +
  // 2^log2_width).
  __device__ void count_keys(bool makes_keys, uint32_t low_key, int log2_width, int shift) const {
    constexpr int kBatch =
        C::kByPage || kLevels ? 4 : 8;  // in flight before the first atomic, which no load moves across
    const int2 competing = scores.competing_items();
    float lowered[RP];  // what turns a logit into a log-weight
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      lowered[r] =
          (kLevels ? Scores<C>::kLowestLevel - 12582912.0f / Scores<C>::kLevelsPerUnit : 0.0f) - scores.norm[r];
    }
    const auto count = [&](int base, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (whole || item < share.owned)
          key[u] = makes_keys ? scores.score_key(item, competing, lowered) : scores.stored_key(item);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (!whole && item >= share.owned) continue;
        if (makes_keys) scores.stored_key(item) = key[u];
        if (log2_width == 32) {
          atomicAdd(&s.histogram[ScoreBins::of(key[u])], 1u);
        } else if ((key[u] - low_key) >> log2_width == 0) {
          atomicAdd(&s.histogram[(key[u] - low_key) >> shift], 1u);
        }
      }
    };
    int base = c.tid();
#pragma unroll 1
    for (; base - c.tid() + kBatch * kThreads <= share.owned; base += kBatch * kThreads) count(base, true);
    if (base - c.tid() < share.owned) count(base, false);
  }

  // Bitmaps (above, inside) and numbers of this block's items above the boundary [low_key, low_key + width) and inside
  // it; a `ranked` boundary is listed item by item.
  __device__ void mark_items(uint32_t low_key, uint32_t width, bool ranked) const {
    constexpr int kBatch = C::kByPage || kLevels ? 4 : 8;
    const uint32_t end_key = low_key + width;
    int above = 0, inside = 0;
    const auto mark = [&](int start, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = (start + u * kWarps) * 32 + c.lane;
        key[u] = whole || item < share.owned ? scores.stored_key(item) : 0u;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int word = start + u * kWarps, item = word * 32 + c.lane;
        const bool is_above = key[u] >= end_key, is_inside = key[u] - low_key < width && (whole || item < share.owned);
        const uint32_t above_bits = __ballot_sync(~0u, is_above), inside_bits = __ballot_sync(~0u, is_inside);
        above += is_above;
        inside += is_inside;
        if (c.lane == 0 && (whole || word * 32 < share.owned)) s.marks[word] = make_uint2(above_bits, inside_bits);
        if (ranked && inside_bits != 0) {
          const uint32_t at = is_inside ? atomicAdd(&s.state.local_boundary, 1u) : kBoundaryList;
          if (at < kBoundaryList) s.boundary_keys[at] = item;
        }
      }
    };
    int start = c.warp;
#pragma unroll 1
    for (; (start + (kBatch - 1) * kWarps + 1) * 32 <= share.owned; start += kBatch * kWarps) mark(start, true);
    if (start * 32 < share.owned) mark(start, false);
    above = warp_sum(above);
    inside = warp_sum(inside);
    if (c.lane == 0) {
      atomicAdd(&s.state.own_above, static_cast<uint32_t>(above));
      atomicAdd(&s.state.own_inside, static_cast<uint32_t>(inside));
    }
    sync_block("items marked");
  }

  // Scores of the listed items: those kept, or, where these are only near, made again.
  __device__ void key_boundary(bool near) const {
    const int count = min(static_cast<int>(s.state.local_boundary), kBoundaryList);
    const int2 competing = scores.competing_items();
#pragma unroll 1
    for (int start = 0; start < count; start += kThreads / 4) {
      const int i = start + c.tid() / 4;
      const int item = i < count ? s.boundary_keys[i] : 0;
      uint32_t key = 0;
      if constexpr (kLevels) {
        if (near) key = scores.rank_key(scorer.exact_score(item), item, competing);
      }
      if (!kLevels || !near) key = scores.stored_key(item);
      __syncwarp();
      if (i < count && c.t == 0) s.boundary_keys[i] = scores.stored_key(item) = key;
    }
    sync_block("boundary keyed");
  }

  // The bin of the cluster's histogram in which the `need` best items end: (bin, items in it, of which wanted).
  __device__ int3 find_bin(int need) const {
    {
      const uint4* mine = reinterpret_cast<const uint4*>(s.histogram + 8 * c.tid());
      const uint4 a = mine[0], b = mine[1];
      uint32_t count = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (c.t == 0) s.state.group_counts[c.tid() >> 2] = count;
    }
    c.cluster.sync("groups of bins counted");
    {
      // Four threads a group of bins, four blocks apart.
      uint32_t count = 0;
#pragma unroll 4
      for (int peer = c.t; peer < c.cluster.size; peer += 4) {
        count += c.cluster.read(&s.state.group_counts[c.tid() >> 2], peer);
      }
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (c.t == 0) s.state.group_total[c.tid() >> 2] = count;
    }
    sync_block("groups of bins added up");
    if (c.warp == 0) {
      // Lane l looks at groups 63 - 2l and 62 - 2l, then at bin 31 - l of the group where the count passes `need`.
      const int high = s.state.group_total[63 - 2 * c.lane], low = s.state.group_total[62 - 2 * c.lane];
      int through = warp_inclusive_scan(high + low);
      const int owner = __ffs(__ballot_sync(~0u, through >= need)) - 1;
      const int before = __shfl_sync(~0u, through - high - low, owner);
      const int in_high = __shfl_sync(~0u, high, owner);
      const bool is_high = before + in_high >= need;
      const int group = 63 - 2 * owner - (is_high ? 0 : 1);
      int left = need - before - (is_high ? 0 : in_high), count = 0;
#pragma unroll 4
      for (int peer = 0; peer < c.cluster.size; ++peer) {
        count += c.cluster.read(&s.histogram[group * 32 + 31 - c.lane], peer);
      }
      through = warp_inclusive_scan(count);
      const int pick = __ffs(__ballot_sync(~0u, through >= left)) - 1;
      left -= __shfl_sync(~0u, through - count, pick);
      if (c.lane == pick) s.state.in_bin = count;
      if (c.lane == 0) {
        s.state.bin = group * 32 + 31 - pick;
        s.state.need = left;
        s.state.local_boundary = s.state.own_above = s.state.own_inside = 0;
      }
    }
    sync_block("bin found");
    return make_int3(s.state.bin, s.state.in_bin, s.state.need);
  }

  // The `wanted` best items of the cluster, ties to the lower index, dealt out evenly into `candidates`. The keys of
  // the first round, for which the histogram is clear, are made from the logits, or stored already. Scores made from
  // levels are only near the exact ones: those that may end on either side of the boundary are made again; false where
  // they are too many.
  __device__ bool select(int wanted, bool makes_keys, bool near) const {
    uint32_t low_key = 0;
    int log2_width = 32, need = wanted, in_bin;
    for (;;) {
      const int shift = max(0, log2_width - 11);
      count_keys(makes_keys && log2_width == 32, low_key, log2_width, shift);
      sync_block("keys counted");
      TWILIGHT_PHASE("scores counted");
      const int3 found = find_bin(need);
      TWILIGHT_PHASE("bin found");
      const bool first_round = log2_width == 32;
      in_bin = found.y;
      need = found.z;
      low_key = first_round ? ScoreBins::first_key(found.x) : low_key + (static_cast<uint32_t>(found.x) << shift);
      log2_width = first_round ? ScoreBins::log2_width(found.x) : shift;
      if (in_bin <= (near ? kBoundaryList / 2 : kBoundaryList) || need == in_bin || log2_width == 0) break;
      c.cluster.sync("histogram read");
      clear_histograms(c, s.histogram);
      sync_block("histogram clear");
    }
    bool ranked = need < in_bin && in_bin <= kBoundaryList;
    uint32_t width = 1u << log2_width;
    if (near) {
      // A score is a level off at most, half for its logit's rounding and half for its norm's; twice that between two
      // scores, and some air.
      constexpr float kSlack = 2.6f * kLn2 / Scores<C>::kLevelsPerUnit;
      ranked = low_key < kInfinityKey;  // forced items are all taken, and fill the last bin
      if (ranked) {
        const float low = __uint_as_float(low_key), end = __uint_as_float(low_key + width);
        low_key = __float_as_uint(low * (1.0f - kSlack));
        width = min(__float_as_uint(end * (1.0f + kSlack)) + 1, kInfinityKey) - low_key;
      }
    }
    mark_items(low_key, width, ranked);
    if (c.tid() < c.cluster.size) {
      c.cluster.write(&s.state.above_inside[c.cluster.rank], c.tid(),
                      make_uint2(s.state.own_above, s.state.own_inside));
    }
    if (ranked) key_boundary(near);
    TWILIGHT_PHASE("boundary marked");
    c.cluster.sync("boundary listed");
    if (!settle_boundary(ranked, low_key, wanted)) return false;
    TWILIGHT_PHASE("boundary settled");
    deal_candidates(ranked, !ranked && (near || need == in_bin), wanted);
    return true;
  }

  // Turns the boundary lists of all blocks into one key, and into how many ties and how many items each block
  // contributes. False where the lists do not fit.
  __device__ bool settle_boundary(bool ranked, uint32_t low_key, int wanted) const {
    uint32_t* all_keys = s.boundary_keys + kBoundaryList;
    if (c.warp == 0) {
      const bool there = c.lane < c.cluster.size;
      const uint2 counts = there ? s.state.above_inside[c.lane] : make_uint2(0, 0);
      const int above = counts.x, boundary = counts.y;
      const int through = warp_inclusive_scan(boundary);
      if (c.lane < kMaxClusterSize) {
        s.state.rank_offset[c.lane] = through - boundary;
        s.state.rank_greater[c.lane] = above;
        s.state.rank_equal[c.lane] = ranked ? 0 : boundary;
      }
      if (c.lane == kMaxClusterSize - 1) s.state.rank_offset[kMaxClusterSize] = through;
      const int need = wanted - warp_sum(above);
      if (c.lane == 0) {
        s.state.boundary_key = low_key;
        s.state.need = need;
        s.state.ties_needed = need;
      }
    }
    sync_block("blocks' counts read");
    const int need = s.state.need;
    if (ranked) {
      const int count = s.state.rank_offset[kMaxClusterSize];
      if (count > kBoundaryList) return false;
      uint32_t key = 0;
      int owner = 0;
      if (c.tid() < count) {
#pragma unroll 1
        while (s.state.rank_offset[owner + 1] <= c.tid()) ++owner;
        key = c.cluster.read(&s.boundary_keys[c.tid() - s.state.rank_offset[owner]], owner);
        all_keys[c.tid()] = key;
      }
      if (c.tid() >= count && c.tid() < round_up(count, 4))
        all_keys[c.tid()] = 0;  // no key of the bin: sorts last, never drawn
      sync_block("boundary keys read");
      // A key's rank by two threads, or by one.
      const int parts = 2 * count <= kThreads ? 2 : 1, own = c.tid() / parts;
      int greater = 0, equal = 0;
      if (own < count) {
        const uint32_t ranked_key = all_keys[own];
#pragma unroll 2
        for (int i = c.tid() % parts * 4; i < count; i += 4 * parts) {
          const uint4 other = *reinterpret_cast<const uint4*>(all_keys + i);
          greater += (other.x > ranked_key) + (other.y > ranked_key) + (other.z > ranked_key) + (other.w > ranked_key);
          equal +=
              (other.x == ranked_key) + (other.y == ranked_key) + (other.z == ranked_key) + (other.w == ranked_key);
        }
      }
      if (parts == 2) {
        greater += __shfl_xor_sync(~0u, greater, 1);
        equal += __shfl_xor_sync(~0u, equal, 1);
      }
      // Ties all write the same.
      if (own < count && greater < need && need <= greater + equal) {
        atomicExch(&s.state.boundary_key, all_keys[own]);
        atomicExch(&s.state.ties_needed, static_cast<uint32_t>(need - greater));
      }
      sync_block("boundary key found");
      if (c.tid() < count) {
        if (key > s.state.boundary_key) atomicAdd(&s.state.rank_greater[owner], 1u);
        if (key == s.state.boundary_key) atomicAdd(&s.state.rank_equal[owner], 1u);
      }
      sync_block("ties counted");
    }
    if (c.warp == 0) {
      const bool there = c.lane < kMaxClusterSize;
      const int equal = there ? s.state.rank_equal[c.lane] : 0;
      const int earlier = warp_inclusive_scan(equal) - equal;
      const int ties = min(max(static_cast<int>(s.state.ties_needed) - earlier, 0), equal);
      const int taken = (there ? static_cast<int>(s.state.rank_greater[c.lane]) : 0) + ties;
      const int through = warp_inclusive_scan(taken);
      if (there) {
        s.state.rank_ties[c.lane] = ties;
        s.state.rank_first[c.lane] = through - taken;
      }
    }
    sync_block("shares known");
    return true;
  }

  // Sends the chosen items, in order, to the block whose even share they fall into, or keeps them. Of the items in the
  // boundary bin, those above the boundary key are chosen, and as many of its ties as this block's share; or all of
  // them.
  __device__ void deal_candidates(bool ranked, bool whole_bin, int wanted) const {
    const int even = c.p.evens_out ? blocks_of(c.cluster.size, wanted) : INT32_MAX,
              word_count = blocks_of(32, share.owned);
    const uint32_t boundary = s.state.boundary_key;
    const bool takes_all_ties =
        s.state.rank_ties[c.cluster.rank] == static_cast<int>(s.state.rank_equal[c.cluster.rank]);
    int ties_left = s.state.rank_ties[c.cluster.rank],
        position = c.p.evens_out ? s.state.rank_first[c.cluster.rank] : 0;
#pragma unroll 1
    for (int start = 0; start < word_count; start += kThreads) {
      const int word = start + c.tid();
      const uint2 marked = word < word_count ? s.marks[word] : make_uint2(0, 0);
      uint32_t bits = marked.x, ties = marked.y;
      if (whole_bin) {
        bits |= ties;
        ties = 0;
      } else if (ranked) {
#pragma unroll 1
        for (uint32_t left = ties; left != 0; left &= left - 1) {
          const uint32_t bit = left & -left, key = scores.stored_key(word * 32 + __ffs(left) - 1);
          if (key > boundary) bits |= bit;
          if (key != boundary) ties ^= bit;
        }
      }
      uint32_t total;
      if (takes_all_ties) {
        bits |= ties;
      } else {
        const int ties_before = block_exclusive_scan<uint32_t>(__popc(ties), s.scan_totals, total);
#pragma unroll 1
        for (int quota = ties_left - ties_before; quota > 0 && ties != 0; --quota) {
          bits |= ties & -ties;
          ties &= ties - 1;
        }
        ties_left -= total;
      }
      int to = position + block_exclusive_scan<uint32_t>(__popc(bits), s.scan_totals, total);
      position += total;
      int owner = c.p.evens_out ? to / even : c.cluster.rank;
      if (c.p.evens_out) to -= owner * even;
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        const int item = word * 32 + __ffs(bits) - 1;
        const uint32_t row = scorer.row_of(item);
        const int token = C::kByPage ? (share.first + item) << c.p.log2_page_size : share.first + item;
        c.cluster.write(&candidates[to], owner, make_uint2(row, token));
        if (++to == even) {
          to = 0;
          ++owner;
        }
      }
    }
  }
};

// How many of a sequence's items are chosen: the budget, and at least those that are always taken.
template <class C>
__device__ int wanted_items(const C& c, int items) {
  int64_t budget = c.p.head_token_budget ? max(c.p.head_token_budget[c.head], 0)
                                         : max(static_cast<int64_t>(c.p.token_budget),
                                               static_cast<int64_t>(ceil(c.live * c.p.budget_fraction)));
  const int newest = max(c.live - c.p.recent_tokens, 0);
  int64_t forced;
  if (C::kByPage) {
    budget = (budget + c.page_size() - 1) >> c.p.log2_page_size;
    const int64_t sinks = (static_cast<int64_t>(c.p.sink_tokens) + c.page_size() - 1) >> c.p.log2_page_size;
    forced = sinks + items - (newest >> c.p.log2_page_size);
  } else {
    forced = static_cast<int64_t>(c.p.sink_tokens) + c.live - newest;
  }
  return static_cast<int>(
      min(min(max(budget, forced), static_cast<int64_t>(items)), static_cast<int64_t>(c.p.capacity)));
}

template <class C>
__device__ __forceinline__ void exchange_norms(const C& c, const Sums<C::RP>& sums, float* norms) {
  TWILIGHT_PHASE("candidates scored");
  c.cluster.sync("sums of scores handed out");
  read_norms(c, sums, norms);
  TWILIGHT_PHASE("scores normalized");
}

// What the common case leaves out is made up for where it shows: logits beyond the range of the sums, or of a level;
// more tokens around the boundary than a list holds.
template <class C>
__device__ void choose_tokens(const TokenScorer<C>& scorer, int wanted, const TopKStorage<C::RP>& storage,
                              View<uint2> candidates) {
  const C& c = scorer.c;
  constexpr bool kLevels = Scores<C>::kLevels;
  const TopK<C, TokenScorer<C>> top_k{c, scorer.share, scorer, scorer.scores, storage, candidates};
  scorer.score();
  exchange_norms(c, scorer.sums, storage.state.norm);
  bool usable = scorer.norms_usable(), near = kLevels;
#pragma unroll 1
  while (!usable || !top_k.select(wanted, !kLevels || near, near)) {
    near = false;
    c.cluster.sync("all read what is written again");
    clear_histograms(c, storage.histogram);
    sync_block("histogram clear again");
    if (!usable) {
      kLevels ? scorer.score_twice(false) : scorer.sum_kept_logits();
      exchange_norms(c, scorer.sums, storage.state.norm);
      usable = true;
    }
    if (kLevels) {
      scorer.score_twice(true);
      sync_block("exact keys stored");
    }
  }
}

template <class C>
__device__ void choose_pages(const PageScorer<C>& scorer, int wanted, const TopKStorage<C::RP>& storage,
                             View<uint2> candidates) {
  scorer.score();
  exchange_norms(scorer.c, scorer.sums, storage.state.norm);
  TopK<C, PageScorer<C>>{scorer.c, scorer.share, scorer, scorer.scores, storage, candidates}.select(wanted, true,
                                                                                                    false);
}

// Of the cluster's candidate slots, a block's.
struct Run {
  int first, count;
};

// Makes the `wanted` best of `items` candidates, or all; returns this block's run of slots.
template <class C, class Scorer>
__device__ Run choose_candidates(const C& c, const Scorer& scorer, int wanted, int items,
                                 const TopKStorage<C::RP>& storage, View<uint2> candidates) {
  const int even = blocks_of(c.cluster.size, wanted);
  Run own = {c.cluster.rank * even, min(max(wanted - c.cluster.rank * even, 0), even)};
  if (wanted < items) {
    clear_histograms(c, storage.histogram);
    if constexpr (C::kByPage) {
      choose_pages(scorer, wanted, storage, candidates);
    } else {
      choose_tokens(scorer, wanted, storage, candidates);
    }
    if (!c.p.evens_out) {
      const int* first = storage.state.rank_first;
      own.first = first[c.cluster.rank];
      own.count = (c.cluster.rank + 1 < c.cluster.size ? first[c.cluster.rank + 1] : wanted) - own.first;
    }
    // Attention writes over boundary keys that other blocks may still read; thresholds wait for them before.
    if (c.p.evens_out || !c.p.prunes) {
      c.cluster.sync("candidates dealt");
    } else {
      sync_block("candidates kept");
    }
  } else if (C::kByPage) {
    list_pages(c, own.first, own.count, candidates);
    sync_block("all pages listed");
  } else {
#pragma unroll 1
    for (int i = own.first + c.tid(); i < own.first + own.count; i += kThreads) {
      candidates[i - own.first] = make_uint2(c.page_row(i) + c.slot_in_page(i), i);
    }
    sync_block("all tokens listed");
  }
  const int unit_shift = C::kByPage ? c.p.log2_page_size : 0;
  return {own.first << unit_shift, own.count << unit_shift};
}

}  // namespace
}  // namespace twilight
