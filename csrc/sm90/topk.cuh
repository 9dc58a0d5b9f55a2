// The candidates of the fused decode kernel: a histogram of the cluster's scores says in which bin the budget ends, and
// what is chosen is handed out.
#pragma once

#include "score.cuh"

namespace twilight {
namespace {

// Of the cluster's candidates, or of its candidate slots, a block's.
struct Run {
  int first, count;
};

// The items of the cluster in the highest bins of the scores that every block keeps.
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

  // Histogram of this block's bins, which are made from the logits, or stored already.
  __device__ void count_scores(bool makes_bins) const {
    constexpr int kBatch =
        C::kByPage || kLevels ? 4 : 8;  // in flight before the first atomic, which no load moves across
    const int2 competing = scores.competing_items();
    float norms[RP];
#pragma unroll
    for (int r = 0; r < RP; ++r) norms[r] = scores.norm[r];
    const auto count = [&](int base, bool whole) {
      uint32_t bin[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (whole || item < share.owned)
          bin[u] = makes_bins ? scores.make_bin(item, competing, norms) : scores.stored_bin(item);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int item = base + u * kThreads;
        if (!whole && item >= share.owned) continue;
        if (makes_bins) scores.stored_bin(item) = bin[u];
        atomicAdd(&s.histogram[bin[u]], 1u);
      }
    };
    int base = c.tid();
#pragma unroll 1
    for (; base - c.tid() + kBatch * kThreads <= share.owned; base += kBatch * kThreads) count(base, true);
    if (base - c.tid() < share.owned) count(base, false);
    sync_block("scores counted");
  }

  // Finds the bin of the cluster's histogram in which the `need` best items end, and of every block how many items it
  // has above it and in it.
  __device__ void find_cut(int need) const {
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
      if (c.lane == 0) {
        s.state.bin = group * 32 + 31 - pick;
        s.state.need = left;
      }
    }
    sync_block("bin found");
    const int group = s.state.bin / 32, bin = s.state.bin % 32;
#pragma unroll 1
    for (int peer = c.warp; peer < c.cluster.size; peer += kWarps) {
      const int low = c.cluster.read(&s.state.group_counts[c.lane], peer);
      const int high = c.cluster.read(&s.state.group_counts[32 + c.lane], peer);
      const int count = c.cluster.read(&s.histogram[group * 32 + c.lane], peer);
      const int above =
          warp_sum((c.lane > group ? low : 0) + (32 + c.lane > group ? high : 0) + (c.lane > bin ? count : 0));
      if (c.lane == bin) {
        s.state.above[peer] = above;
        s.state.in_bin[peer] = count;
      }
    }
    sync_block("blocks' items counted");
  }

  // Deals the `wanted` best items of the cluster out evenly into `candidates`. Of the bin in which they end the lowest
  // items are taken. The histogram is clear.
  __device__ void select(int wanted, bool makes_bins) const {
    count_scores(makes_bins);
    TWILIGHT_PHASE("scores counted");
    find_cut(wanted);
    TWILIGHT_PHASE("bin found");
    const int above = c.lane < c.cluster.size ? s.state.above[c.lane] : 0;
    const int in_bin = c.lane < c.cluster.size ? s.state.in_bin[c.lane] : 0;
    const int quota = min(max(s.state.need - (warp_inclusive_scan(in_bin) - in_bin), 0), in_bin);
    const int first = warp_inclusive_scan(above + quota) - above - quota;
    deal_candidates(__shfl_sync(~0u, quota, c.cluster.rank), __shfl_sync(~0u, first, c.cluster.rank), wanted);
  }

  // Sends this block's items above the bin, and the first `quota` of those in it, in order, to the block whose even
  // share they fall into.
  __device__ void deal_candidates(int quota, int to_first, int wanted) const {
    const int even = blocks_of(c.cluster.size, wanted), word_count = blocks_of(32, share.owned);
    const uint32_t cut = s.state.bin;
    int above = 0, in_bin = 0;  // items seen
    // A warp takes up to 32 words of items in a row, and each of its lanes one of these words.
#pragma unroll 1
    for (int start = 0; start < word_count; start += 32 * kWarps) {
      const int words = min(blocks_of(kWarps, word_count - start), 32), first_word = start + c.warp * words;
      uint32_t bits = 0, ties = 0;
#pragma unroll 4
      for (int word = 0; word < words; ++word) {
        const int item = (first_word + word) * 32 + c.lane;
        const uint32_t bin = item < share.owned ? scores.stored_bin(item) : 0;  // below every bin
        const uint32_t above_bits = __ballot_sync(~0u, bin > cut), bin_bits = __ballot_sync(~0u, bin == cut);
        if (c.lane == word) {
          bits = above_bits;
          ties = bin_bits;
        }
      }
      uint32_t total;
      const uint32_t before = block_exclusive_scan(__popc(bits) | __popc(ties) << 16, s.scan_totals, total);
      const int to = to_first + above + (before & 0xffff) + min(in_bin + static_cast<int>(before >> 16), quota);
      int left = quota - in_bin - static_cast<int>(before >> 16);
      above += total & 0xffff;
      in_bin += total >> 16;
      if (left >= __popc(ties)) {
        bits |= ties;
      } else {
#pragma unroll 1
        for (; left > 0; --left, ties &= ties - 1) bits |= ties & -ties;
      }
      // Word by word, so that a lane writes one item of each. Quotients of numbers below 2^20 are exact.
      const float per_item = 1.0f / even;
#pragma unroll 2
      for (int word = 0; word < words; ++word) {
        const uint32_t chosen = __shfl_sync(~0u, bits, word);
        const int at = __shfl_sync(~0u, to, word) + __popc(chosen & ((1u << c.lane) - 1));
        if ((chosen >> c.lane & 1) == 0) continue;
        const int item = (first_word + word) * 32 + c.lane, owner = static_cast<int>((at + 0.5f) * per_item);
        c.cluster.write(&candidates[at - owner * even], owner,
                        make_uint2(scorer.row_of(item), scorer.position_of(item)));
      }
    }
  }
};

// How many of a sequence's items are chosen: the budget, and at least those that are always taken and `least`.
template <class C>
__device__ int wanted_items(const C& c, int items, int capacity, int least = 0) {
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
  budget = max(max(budget, forced), static_cast<int64_t>(least));
  return static_cast<int>(min(budget, static_cast<int64_t>(min(items, capacity))));
}

template <class C>
__device__ __forceinline__ void exchange_norms(const C& c, const Sums<C::RP>& sums, float* norms) {
  TWILIGHT_PHASE("candidates scored");
  c.cluster.sync("sums of scores handed out");
  read_norms(c, sums, norms);
  TWILIGHT_PHASE("scores normalized");
}

// Logits beyond the range of the sums, or of a level, are rare, and made up for.
template <class C>
__device__ void choose_tokens(const TokenScorer<C>& scorer, int wanted, const TopKStorage<C::RP>& storage,
                              View<uint2> candidates) {
  const C& c = scorer.c;
  constexpr bool kLevels = Scores<C>::kLevels;
  scorer.score();
  exchange_norms(c, scorer.sums, storage.state.norm);
  const bool usable = scorer.norms_usable();
  if (!usable) {
    c.cluster.sync("all read what is written again");
    kLevels ? scorer.score_twice(false) : scorer.sum_kept_logits();
    exchange_norms(c, scorer.sums, storage.state.norm);
    if (kLevels) {
      scorer.score_twice(true);
      sync_block("bins stored");
    }
  }
  const TopK<C, TokenScorer<C>> top_k{c, scorer.share, scorer, scorer.scores, storage, candidates};
  top_k.select(wanted, usable || !kLevels);
}

template <class C>
__device__ void choose_pages(const PageScorer<C>& scorer, int wanted, const TopKStorage<C::RP>& storage,
                             View<uint2> candidates) {
  scorer.score();
  exchange_norms(scorer.c, scorer.sums, storage.state.norm);
  const TopK<C, PageScorer<C>> top_k{scorer.c, scorer.share, scorer, scorer.scores, storage, candidates};
  top_k.select(wanted, true);
}

// The pages whose tokens are scored, of a sequence's `pages`.
template <class P>
__device__ int wanted_pages(const P& c, int pages) {
  const int share = static_cast<int>(ceil(pages * c.p.page_fraction));
  return wanted_items(c, pages, c.p.page_capacity, max(share, c.p.least_pages));
}

// Keeps the `wanted` best of the pages by the leading `words` of their means, and deals them out evenly as tiles of
// tokens; returns the block's share of the `tokens` that they hold.
template <class P, class Storage>
__device__ Share keep_pages(const P& c, Share share, int words, int wanted, int tokens, const Storage& shared) {
  clear_histogram<kScoreBins>(c, shared.top_k().histogram);
  choose_pages(scorer_of(c, share, words, 0, shared), wanted, shared.top_k(), shared.candidates());
  c.cluster.sync("kept pages dealt");
  const int even = blocks_of(c.cluster.size, wanted) << c.p.log2_page_size, first = c.cluster.rank * even;
  const Share kept = {first, min(max(tokens - first, 0), even)};
  const View<uint2> pages = shared.candidates();
  const View<uint32_t> rows = shared.pages();
  const View<int> positions = shared.tile_tokens();
  // Tiles behind the last repeat it, so that whole steps of a warp can be read.
#pragma unroll 1
  for (int i = c.tid(); i < round_up(kept.owned, kBlockTokens) / kTileTokens; i += kThreads) {
    const int token = min(i * kTileTokens, kept.owned - 1) & -kTileTokens;
    const uint2 page = pages[token >> c.p.log2_page_size];
    const int offset = token & (c.page_size() - 1);
    rows[i] = page.x + offset;
    positions[i] = page.y + offset;
  }
  sync_block("tiles listed");
  TWILIGHT_PHASE("pages kept");
  return kept;
}

// Makes the `wanted` best of `items` candidates, or all; returns this block's run of slots.
template <class C, class Scorer>
__device__ Run choose_candidates(const C& c, const Scorer& scorer, int wanted, int items,
                                 const TopKStorage<C::RP>& storage, View<uint2> candidates) {
  const int even = blocks_of(c.cluster.size, wanted);
  const Run own = {c.cluster.rank * even, min(max(wanted - c.cluster.rank * even, 0), even)};
  if (C::kTwoLevels || wanted < items) {
    clear_histogram<kScoreBins>(c, storage.histogram);
    if constexpr (C::kByPage) {
      choose_pages(scorer, wanted, storage, candidates);
    } else {
      choose_tokens(scorer, wanted, storage, candidates);
    }
    c.cluster.sync("candidates dealt");
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
