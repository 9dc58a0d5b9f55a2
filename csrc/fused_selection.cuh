// The exact top-k of the fused decode kernel over the scores of a cluster, and the candidates handed out.
#pragma once

#include "fused_scores.cuh"

namespace twilight {
namespace {

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedSelection : FusedScores<T, D, RP, kSelector> {
  using Base = FusedScores<T, D, RP, kSelector>;
  using Base::boundary_keys, Base::candidates, Base::clear_histograms, Base::cluster, Base::competing_items,
      Base::exact_score, Base::first, Base::head, Base::histogram, Base::kByPage, Base::kLevels, Base::kLevelsPerUnit,
      Base::kLowestLevel, Base::lane, Base::list_pages, Base::live, Base::marks, Base::norms_usable, Base::owned,
      Base::p, Base::page_block, Base::page_size, Base::pages, Base::rank_key, Base::read_norms, Base::s,
      Base::score_key, Base::score_pages, Base::score_tokens, Base::score_tokens_twice, Base::slot_in_page,
      Base::stored_key, Base::sum_kept_logits, Base::t, Base::tid, Base::token_row, Base::warp;

  __device__ explicit FusedSelection(const FusedParams& params) : Base(params) {}

  // Histogram of this block's keys, of which `makes_keys` makes those; all, or those in [low_key, low_key +
  // 2^log2_width).
  __device__ void count_keys(bool makes_keys, uint32_t low_key, int log2_width, int shift) {
    constexpr int kBatch = kByPage || kLevels ? 4 : 8;  // in flight before the first atomic, which no load moves across
    const int2 competing = competing_items();
    float lowered[RP];  // what turns a logit into a log-weight
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      lowered[r] = (kLevels ? kLowestLevel - 12582912.0f / kLevelsPerUnit : 0.0f) - s.score_norm[r];
    }
    const auto count = [&](int base, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (whole || item < owned) key[u] = makes_keys ? score_key(item, competing, lowered) : stored_key(item);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (!whole && item >= owned) continue;
        if (makes_keys) stored_key(item) = key[u];
        if (log2_width == 32) {
          atomicAdd(&histogram()[ScoreBins::of(key[u])], 1u);
        } else if ((key[u] - low_key) >> log2_width == 0) {
          atomicAdd(&histogram()[(key[u] - low_key) >> shift], 1u);
        }
      }
    };
    int base = tid();
#pragma unroll 1
    for (; base - tid() + kBatch * kThreads <= owned; base += kBatch * kThreads) count(base, true);
    if (base - tid() < owned) count(base, false);
  }

  // Bitmaps (above, inside) and numbers of this block's items above the boundary [low_key, low_key + width) and inside
  // it; a `ranked` boundary is listed item by item.
  __device__ void mark_items(uint32_t low_key, uint32_t width, bool ranked) {
    constexpr int kBatch = kByPage || kLevels ? 4 : 8;
    const uint32_t end_key = low_key + width;
    int above = 0, inside = 0;
    const auto mark = [&](int start, bool whole) {
      uint32_t key[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = (start + u * kWarps) * 32 + lane;
        key[u] = whole || item < owned ? stored_key(item) : 0u;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int word = start + u * kWarps, item = word * 32 + lane;
        const bool is_above = key[u] >= end_key, is_inside = key[u] - low_key < width && (whole || item < owned);
        const uint32_t above_bits = __ballot_sync(~0u, is_above), inside_bits = __ballot_sync(~0u, is_inside);
        above += is_above;
        inside += is_inside;
        if (lane == 0 && (whole || word * 32 < owned)) marks()[word] = make_uint2(above_bits, inside_bits);
        if (ranked && inside_bits != 0) {
          const uint32_t at = is_inside ? atomicAdd(&s.local_boundary, 1u) : kBoundaryList;
          if (at < kBoundaryList) boundary_keys()[at] = item;
        }
      }
    };
    int start = warp;
#pragma unroll 1
    for (; (start + (kBatch - 1) * kWarps + 1) * 32 <= owned; start += kBatch * kWarps) mark(start, true);
    if (start * 32 < owned) mark(start, false);
    above = warp_sum(above);
    inside = warp_sum(inside);
    if (lane == 0) {
      atomicAdd(&s.own_above, static_cast<uint32_t>(above));
      atomicAdd(&s.own_inside, static_cast<uint32_t>(inside));
    }
    __syncthreads();
  }

  // Scores of the listed items: those kept, or, where these are only near, made again.
  __device__ void key_boundary(bool near) {
    const int count = min(static_cast<int>(s.local_boundary), kBoundaryList);
    const int2 competing = competing_items();
#pragma unroll 1
    for (int start = 0; start < count; start += kThreads / 4) {
      const int i = start + tid() / 4;
      const int item = i < count ? boundary_keys()[i] : 0;
      const uint32_t key = kLevels && near ? rank_key(exact_score(item), item, competing) : stored_key(item);
      __syncwarp();
      if (i < count && t == 0) boundary_keys()[i] = stored_key(item) = key;
    }
    __syncthreads();
  }

  // The bin of the cluster's histogram in which the `need` best items end: (bin, items in it, of which wanted).
  __device__ int3 find_bin(int need) {
    {
      const uint4* mine = reinterpret_cast<const uint4*>(histogram() + 8 * tid());
      const uint4 a = mine[0], b = mine[1];
      uint32_t count = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w;
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (t == 0) s.group_counts[tid() >> 2] = count;
    }
    cluster.sync();
    {
      // Four threads a group of bins, four blocks apart.
      uint32_t count = 0;
#pragma unroll 4
      for (int c = t; c < cluster.size; c += 4) count += cluster.read(&s.group_counts[tid() >> 2], c);
      count += __shfl_xor_sync(~0u, count, 1);
      count += __shfl_xor_sync(~0u, count, 2);
      if (t == 0) s.group_total[tid() >> 2] = count;
    }
    __syncthreads();
    if (warp == 0) {
      // Lane l looks at groups 63 - 2l and 62 - 2l, then at bin 31 - l of the group where the count passes `need`.
      const int high = s.group_total[63 - 2 * lane], low = s.group_total[62 - 2 * lane];
      int through = warp_inclusive_scan(high + low);
      const int owner = __ffs(__ballot_sync(~0u, through >= need)) - 1;
      const int before = __shfl_sync(~0u, through - high - low, owner);
      const int in_high = __shfl_sync(~0u, high, owner);
      const bool is_high = before + in_high >= need;
      const int group = 63 - 2 * owner - (is_high ? 0 : 1);
      int left = need - before - (is_high ? 0 : in_high), count = 0;
#pragma unroll 4
      for (int c = 0; c < cluster.size; ++c) count += cluster.read(&histogram()[group * 32 + 31 - lane], c);
      through = warp_inclusive_scan(count);
      const int pick = __ffs(__ballot_sync(~0u, through >= left)) - 1;
      left -= __shfl_sync(~0u, through - count, pick);
      if (lane == pick) s.in_bin = count;
      if (lane == 0) {
        s.bin = group * 32 + 31 - pick;
        s.need = left;
        s.local_boundary = s.own_above = s.own_inside = 0;
      }
    }
    __syncthreads();
    return make_int3(s.bin, s.in_bin, s.need);
  }

  // The `wanted` best items of the cluster, ties to the lower index, dealt out evenly into `candidates`. The keys of
  // the first round, for which the histogram is clear, are made from the logits, or stored already. Scores made from
  // levels are only near the exact ones: those that may end on either side of the boundary are made again; false where
  // they are too many.
  __device__ bool select(int wanted, bool makes_keys, bool near) {
    uint32_t low_key = 0;
    int log2_width = 32, need = wanted, in_bin;
    for (;;) {
      const int shift = max(0, log2_width - 11);
      count_keys(makes_keys && log2_width == 32, low_key, log2_width, shift);
      __syncthreads();
      // phase: scores counted
      const int3 found = find_bin(need);
      // phase: bin found
      const bool first_round = log2_width == 32;
      in_bin = found.y;
      need = found.z;
      low_key = first_round ? ScoreBins::first_key(found.x) : low_key + (static_cast<uint32_t>(found.x) << shift);
      log2_width = first_round ? ScoreBins::log2_width(found.x) : shift;
      if (in_bin <= (near ? kBoundaryList / 2 : kBoundaryList) || need == in_bin || log2_width == 0) break;
      cluster.sync();  // the others still read this histogram
      clear_histograms();
      __syncthreads();
    }
    bool ranked = need < in_bin && in_bin <= kBoundaryList;
    uint32_t width = 1u << log2_width;
    if (near) {
      // A score is a level off at most, half for its logit's rounding and half for its norm's; twice that between two
      // scores, and some air.
      constexpr float kSlack = 2.6f * kLn2 / kLevelsPerUnit;
      ranked = low_key < kInfinityKey;  // forced items are all taken, and fill the last bin
      if (ranked) {
        const float low = __uint_as_float(low_key), end = __uint_as_float(low_key + width);
        low_key = __float_as_uint(low * (1.0f - kSlack));
        width = min(__float_as_uint(end * (1.0f + kSlack)) + 1, kInfinityKey) - low_key;
      }
    }
    mark_items(low_key, width, ranked);
    if (tid() < cluster.size) {
      cluster.write(&s.above_inside[cluster.rank], tid(), make_uint2(s.own_above, s.own_inside));
    }
    if (ranked) key_boundary(near);
    // phase: boundary marked
    cluster.sync();
    if (!settle_boundary(ranked, low_key, wanted)) return false;
    // phase: boundary settled
    deal_candidates(ranked, !ranked && (near || need == in_bin), wanted);
    return true;
  }

  // Turns the boundary lists of all blocks into one key, and into how many ties and how many items each block
  // contributes. False where the lists do not fit.
  __device__ bool settle_boundary(bool ranked, uint32_t low_key, int wanted) {
    uint32_t* all_keys = boundary_keys() + kBoundaryList;
    if (warp == 0) {
      const bool there = lane < cluster.size;
      const uint2 counts = there ? s.above_inside[lane] : make_uint2(0, 0);
      const int above = counts.x, boundary = counts.y;
      const int through = warp_inclusive_scan(boundary);
      if (lane < kMaxClusterSize) {
        s.rank_offset[lane] = through - boundary;
        s.rank_greater[lane] = above;
        s.rank_equal[lane] = ranked ? 0 : boundary;
      }
      if (lane == kMaxClusterSize - 1) s.rank_offset[kMaxClusterSize] = through;
      const int need = wanted - warp_sum(above);
      if (lane == 0) {
        s.boundary_key = low_key;
        s.need = need;
        s.ties_needed = need;
      }
    }
    __syncthreads();
    const int need = s.need;
    if (ranked) {
      const int count = s.rank_offset[kMaxClusterSize];
      if (count > kBoundaryList) return false;
      uint32_t key = 0;
      int owner = 0;
      if (tid() < count) {
#pragma unroll 1
        while (s.rank_offset[owner + 1] <= tid()) ++owner;
        key = cluster.read(&boundary_keys()[tid() - s.rank_offset[owner]], owner);
        all_keys[tid()] = key;
      }
      if (tid() >= count && tid() < round_up(count, 4))
        all_keys[tid()] = 0;  // no key of the bin: sorts last, never drawn
      __syncthreads();
      // A key's rank by two threads, or by one.
      const int parts = 2 * count <= kThreads ? 2 : 1, own = tid() / parts;
      int greater = 0, equal = 0;
      if (own < count) {
        const uint32_t ranked_key = all_keys[own];
#pragma unroll 2
        for (int i = tid() % parts * 4; i < count; i += 4 * parts) {
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
        atomicExch(&s.boundary_key, all_keys[own]);
        atomicExch(&s.ties_needed, static_cast<uint32_t>(need - greater));
      }
      __syncthreads();
      if (tid() < count) {
        if (key > s.boundary_key) atomicAdd(&s.rank_greater[owner], 1u);
        if (key == s.boundary_key) atomicAdd(&s.rank_equal[owner], 1u);
      }
      __syncthreads();
    }
    if (warp == 0) {
      const bool there = lane < kMaxClusterSize;
      const int equal = there ? s.rank_equal[lane] : 0;
      const int earlier = warp_inclusive_scan(equal) - equal;
      const int ties = min(max(static_cast<int>(s.ties_needed) - earlier, 0), equal);
      const int taken = (there ? static_cast<int>(s.rank_greater[lane]) : 0) + ties;
      const int through = warp_inclusive_scan(taken);
      if (there) {
        s.rank_ties[lane] = ties;
        s.rank_first[lane] = through - taken;
      }
    }
    __syncthreads();
    return true;
  }

  // Sends the chosen items, in order, to the block whose even share they fall into, or keeps them. Of the items in the
  // boundary bin, those above the boundary key are chosen, and as many of its ties as this block's share; or all of
  // them.
  __device__ void deal_candidates(bool ranked, bool whole_bin, int wanted) {
    const int share = p.evens_out ? blocks_of(cluster.size, wanted) : INT32_MAX, word_count = blocks_of(32, owned);
    const uint32_t boundary = s.boundary_key;
    const bool takes_all_ties = s.rank_ties[cluster.rank] == static_cast<int>(s.rank_equal[cluster.rank]);
    int ties_left = s.rank_ties[cluster.rank], position = p.evens_out ? s.rank_first[cluster.rank] : 0;
#pragma unroll 1
    for (int start = 0; start < word_count; start += kThreads) {
      const int word = start + tid();
      const uint2 marked = word < word_count ? marks()[word] : make_uint2(0, 0);
      uint32_t bits = marked.x, ties = marked.y;
      if (whole_bin) {
        bits |= ties;
        ties = 0;
      } else if (ranked) {
#pragma unroll 1
        for (uint32_t left = ties; left != 0; left &= left - 1) {
          const uint32_t bit = left & -left, key = stored_key(word * 32 + __ffs(left) - 1);
          if (key > boundary) bits |= bit;
          if (key != boundary) ties ^= bit;
        }
      }
      uint32_t total;
      if (takes_all_ties) {
        bits |= ties;
      } else {
        const int ties_before = block_exclusive_scan<uint32_t>(__popc(ties), s.scan_totals_small, total);
#pragma unroll 1
        for (int quota = ties_left - ties_before; quota > 0 && ties != 0; --quota) {
          bits |= ties & -ties;
          ties &= ties - 1;
        }
        ties_left -= total;
      }
      int to = position + block_exclusive_scan<uint32_t>(__popc(bits), s.scan_totals_small, total);
      position += total;
      int owner = p.evens_out ? to / share : cluster.rank;
      if (p.evens_out) to -= owner * share;
#pragma unroll 1
      for (; bits != 0; bits &= bits - 1) {
        const int item = word * 32 + __ffs(bits) - 1;
        const uint32_t row = kByPage ? pages()[item] << p.log2_page_size : token_row(item);
        const int position = kByPage ? (first + item) << p.log2_page_size : first + item;
        cluster.write(&candidates()[to], owner, make_uint2(row, position));
        if (++to == share) {
          to = 0;
          ++owner;
        }
      }
    }
  }

  __device__ __forceinline__ void exchange_norms() {
    // phase: candidates scored
    cluster.sync();
    read_norms(s.score_norm);
    // phase: scores normalized
  }

  // What the common case leaves out is made up for where it shows: logits beyond the range of the sums, or of a level;
  // more tokens around the boundary than a list holds.
  __device__ void select_tokens(int wanted) {
    score_tokens();
    exchange_norms();
    bool usable = norms_usable(), near = kLevels;
#pragma unroll 1
    while (!usable || !select(wanted, !kLevels || near, near)) {
      near = false;
      cluster.sync();  // the others still read what is written again
      clear_histograms();
      __syncthreads();
      if (!usable) {
        kLevels ? score_tokens_twice(false) : sum_kept_logits();
        exchange_norms();
        usable = true;
      }
      if (kLevels) {
        score_tokens_twice(true);
        __syncthreads();
      }
    }
  }

  __device__ int wanted_items(int items) const {
    int64_t budget = p.head_token_budget ? max(p.head_token_budget[head], 0)
                                         : max(static_cast<int64_t>(p.token_budget),
                                               static_cast<int64_t>(ceil(live * p.budget_fraction)));
    const int newest = max(live - p.recent_tokens, 0);
    int64_t forced;
    if (kByPage) {
      budget = (budget + page_size() - 1) >> p.log2_page_size;
      const int64_t sinks = (static_cast<int64_t>(p.sink_tokens) + page_size() - 1) >> p.log2_page_size;
      forced = sinks + items - (newest >> p.log2_page_size);
    } else {
      forced = static_cast<int64_t>(p.sink_tokens) + live - newest;
    }
    return static_cast<int>(
        min(min(max(budget, forced), static_cast<int64_t>(items)), static_cast<int64_t>(p.capacity)));
  }

  // Makes the `wanted` best of `items` candidates, or all; returns the first of this block's among the cluster's, and
  // how many it has.
  __device__ int2 choose_candidates(int wanted, int items) {
    const int candidate_share = blocks_of(cluster.size, wanted);
    int begin = cluster.rank * candidate_share, mine = min(max(wanted - begin, 0), candidate_share);
    if (wanted < items) {
      clear_histograms();
      if (kByPage) {
        score_pages();
        exchange_norms();
        select(wanted, true, false);
      } else {
        select_tokens(wanted);
      }
      if (p.evens_out) {
        cluster.sync();
      } else {
        begin = s.rank_first[cluster.rank];
        mine = (cluster.rank + 1 < cluster.size ? s.rank_first[cluster.rank + 1] : wanted) - begin;
        __syncthreads();
      }
    } else if (kByPage) {
      list_pages(begin, mine);
      __syncthreads();
    } else {
#pragma unroll 1
      for (int i = begin + tid(); i < begin + mine; i += kThreads) {
        const uint32_t row = (page_block(i >> p.log2_page_size) << p.log2_page_size) + slot_in_page(i);
        candidates()[i - begin] = make_uint2(row, i);
      }
      __syncthreads();
    }
    return make_int2(begin, mine);
  }
};

}  // namespace
}  // namespace twilight
