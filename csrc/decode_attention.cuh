// One launch a layer: candidate scores, exact top-k, 4-bit estimate, exact top-p, attention on the survivors, merge.
//
// Grid: a cluster of C blocks a (sequence, KV head). Each block owns an even share of the sequence while scoring. Of
// the candidates while estimating and of the survivors while attending it owns an even share too, handed over through
// distributed shared memory, or what its own tokens gave (FusedParams::evens_out).
//
// Comments name the phase that ends there: bench/phases.py reads the clock at each.
#pragma once

#include "fused_attention.cuh"

namespace twilight {
namespace {

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedDecode : FusedAttention<T, D, RP, kSelector> {
  using Base = FusedAttention<T, D, RP, kSelector>;
  using Entries = typename Base::Entries;
  using Stream = typename Base::Stream;
  using Base::begin_stream, Base::choose_candidates, Base::cluster, Base::count_budget, Base::count_survivors,
      Base::find_thresholds, Base::first, Base::head, Base::kByPage, Base::kOnlyDense, Base::kSelects, Base::lead_words,
      Base::list_pages, Base::list_survivors, Base::live, Base::load_query, Base::owned, Base::p, Base::page_size,
      Base::prefetch_page_table, Base::s, Base::sequence, Base::slot_count, Base::tid, Base::unit_shift,
      Base::wanted_items, Base::write_empty, Base::write_kept, Base::write_output;

  __device__ explicit FusedDecode(const FusedParams& params) : Base(params) {}

  __device__ void run() {
    // phase: start
    cluster.start();
    prefetch_page_table();
    await_earlier_kernels();
    live = min(max(p.seq_lens[sequence], 0), p.max_pages << p.log2_page_size);
    if (live == 0) {
      write_empty();
      if (p.kept_indices != nullptr) write_kept(Entries::kCandidates, 0, 0, 0, 0);
      return;
    }
    const bool dense = kOnlyDense || live <= p.dense_below || (!kSelects && !p.prunes);
    const bool selects = kSelects && !dense;
    const bool by_page = selects && kByPage;
    const int prefix = p.prefix_channels == nullptr ? D : min(max(p.prefix_channels[head], 0), D) & ~7;
    lead_words = prefix / 8;
    const int items = by_page ? blocks_of(page_size(), live) : live;
    const int share = by_page ? share_of_pages(items, cluster.size) : share_of_tokens(items, cluster.size);
    first = cluster.rank * share;
    owned = min(max(items - first, 0), share);
    const int wanted = selects ? wanted_items(items) : items;
    const bool scores_items = wanted < items;
    unit_shift = p.log2_page_size;
    slot_count = owned;
    int first_slot = first, total_slots = items;
    Stream stream = {};
    if (dense) {
      stream = begin_stream();
    } else if (!selects) {
      list_pages(first >> p.log2_page_size, blocks_of(page_size(), owned));
    }
    load_query(!dense, scores_items, prefix);
    if (!dense) cluster.started();
    // phase: query read
    if (selects) {
      if (!kByPage) unit_shift = 0;
      const int2 own = choose_candidates(wanted, items);
      first_slot = own.x << unit_shift;
      slot_count = own.y << unit_shift;
      total_slots = wanted << unit_shift;
      // phase: candidates dealt
    }
    if (tid() == 0) s.published_slots = slot_count;
    // The page of the newest token is always a candidate: the tokens it lacks are not.
    const int missing = by_page ? items * page_size() - live : 0;
    const int candidate_tokens = total_slots - missing;

    int kept_tokens = candidate_tokens;
    const bool estimated = p.prunes && !dense;
    int start = 0, count = slot_count, list_start = first_slot;
    Entries entries = dense ? Entries::kStream : Entries::kCandidates;
    if (estimated) {
      find_thresholds(total_slots);
      const int own_survivors = list_survivors();
      // phase: survivors listed
      if (cluster.size > 1 && p.evens_out && p.slot_capacity > kUnsharedSlots) {
        entries = Entries::kSharedSurvivors;
        cluster.sync();
        kept_tokens = count_survivors();
        const int even = blocks_of(cluster.size, kept_tokens);
        start = list_start = cluster.rank * even;
        count = min(max(kept_tokens - start, 0), even);
        // phase: survivors shared out
      } else {
        entries = Entries::kOwnSurvivors;
        count = own_survivors;
      }
    }
    if (dense) {
      this->template attend<true>(entries, 0, owned, stream);
    } else {
      this->template attend<false>(entries, start, count, stream);
    }
    // phase: attended
    write_output();
    // phase: written
    if (entries == Entries::kOwnSurvivors) {
      kept_tokens = count_survivors();
      list_start = s.kept_first[cluster.rank];
    }
    if (p.kept_indices != nullptr) write_kept(entries, start, count, list_start, kept_tokens);
    if (p.budget_counters != nullptr && cluster.rank == 0 && tid() == 0) {
      count_budget(candidate_tokens, kept_tokens, estimated);
    }
    // Only this list is made of what another block holds.
    if (p.kept_indices != nullptr && entries == Entries::kSharedSurvivors) cluster.sync();
  }
};

// Blocks a multiprocessor, which caps the registers.
template <int RP, FusedSelector kSelector>
constexpr int kMinBlocks = RP == 8 ? 1 : 2;

template <typename T, int D, int RP, FusedSelector kSelector>
__global__ void __launch_bounds__(kThreads, (kMinBlocks<RP, kSelector>))
    fused_decode_kernel(const __grid_constant__ FusedParams p) {
  FusedDecode<T, D, RP, kSelector>(p).run();
}

}  // namespace
}  // namespace twilight
