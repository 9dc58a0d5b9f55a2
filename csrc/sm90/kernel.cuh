// One launch a layer: candidate scores, their choice, 4-bit estimates, top-p, attention on the survivors, merge.
//
// In two levels (kTwoLevels) pages are scored and chosen first, and what a block then owns of the sequence is an even
// share of their tokens.
//
// Grid: a cluster of C blocks a (sequence, KV head). Each block owns an even share of the sequence while scoring. Of
// the candidates while estimating and, unless they are few, of the survivors while attending it owns an even share too,
// handed over through distributed shared memory: where a real model looks, one block's tokens give most of them.
#pragma once

#include "prune.cuh"
#include "topk.cuh"
#include "write.cuh"

namespace twilight {
namespace {

// Blocks a multiprocessor, which caps the registers.
template <int RP>
constexpr int kMinBlocks = RP >= kMaxRows ? 1 : 2;

// Makes the first tokens and the newest `wanted` in all candidates, of which no score is needed; returns this block's
// run of slots.
template <class C>
__device__ Run list_window(const C& c, int wanted, View<uint2> candidates) {
  const int even = blocks_of(c.cluster.size, wanted), first = c.cluster.rank * even;
  const Run own = {first, min(max(wanted - first, 0), even)};
#pragma unroll 1
  for (int i = c.tid(); i < own.count; i += kThreads) {
    const int slot = own.first + i, token = slot < c.p.sink_tokens ? slot : c.live - wanted + slot;
    candidates[i] = make_uint2(c.page_row(token) + c.slot_in_page(token), token);
  }
  sync_block("window listed");
  return own;
}

template <typename T, typename E, int D, int RP, Selector kSelector, bool kTwoLevels = false>
__global__ void __launch_bounds__(kThreads, kMinBlocks<RP>) fused_decode_kernel(const __grid_constant__ FusedParams p) {
  using C = Context<T, D, RP, kSelector, kTwoLevels, E>;
  static_assert(sizeof(FusedShared<D, RP>) == fused_shared_bytes(D, RP), "what the host plans with");
  TWILIGHT_PHASE("start");
  const Cluster cluster = Cluster::current();
  const int unit = blockIdx.x / cluster.size, sequence = unit / p.kv_heads;
  cluster.start();
  prefetch_page_table(p, cluster, sequence);
  await_earlier_kernels();
  const C c(p, cluster, sequence, unit - sequence * p.kv_heads);
  if (c.live == 0) {
    write_empty(c);
    return;
  }

  const Storage<T, D, RP> shared{p};
  FusedShared<D, RP>& fixed = shared.fixed();
  const bool dense = C::kOnlyDense || c.live <= p.dense_below || (!C::kSelects && !p.prunes);
  const bool selects = C::kSelects && !dense, by_page = C::kByPage && !dense, prunes = p.prunes && !dense;
  const Shadow<C> shadow{c, lead_words(c)};
  const int items = by_page ? blocks_of(c.page_size(), c.live) : c.live;
  const Share share = share_of(c, items, by_page);
  int wanted = selects ? wanted_items(c, items, p.capacity) : items;

  TileStream<C> stream{c, share, shared.streamed_tiles(), share.owned};
  if (dense) {
    stream.begin();
  } else if (!C::kSelects) {
    list_pages(c, share.first >> p.log2_page_size, blocks_of(c.page_size(), share.owned), shared.candidates());
  }
  const auto& pages_of = first_level(c);
  const int pages = blocks_of(c.page_size(), c.live);
  const Share scored = kTwoLevels ? share_of(pages_of, pages, true) : share;
  const bool scores = kTwoLevels ? selects : wanted < items && !C::kByWindow;
  load_queries(pages_of, scored, !dense, scores, 8 * shadow.lead_words, fixed.queries, shared.pages());
  if (!dense) cluster.started();
  TWILIGHT_PHASE("query read");

  Run run = {share.first, share.owned};  // of slots
  if constexpr (C::kSelects) {
    if (selects) {
      if constexpr (C::kByWindow) {
        run = list_window(c, wanted, shared.candidates());
      } else {
        Share own = share;
        int left_out = 0;
        if constexpr (kTwoLevels) {
          const int kept = wanted_pages(pages_of, pages);
          left_out = (pages - kept) << p.log2_page_size;
          wanted = min(wanted, c.live - left_out);
          own = keep_pages(pages_of, scored, shadow.lead_words, kept, c.live - left_out, shared);
        }
        const int words = C::kByMean ? C::kWords : shadow.lead_words;
        run = choose_candidates(c, scorer_of(c, own, words, left_out, shared), wanted, items, shared.top_k(),
                                shared.candidates());
      }
      TWILIGHT_PHASE("candidates dealt");
    }
  }
  const Candidates<C> candidates{c, shared.candidates(), run.count};
  const int total_slots = selects ? wanted << candidates.unit_shift() : items;
  // The page of the newest token is always a candidate: the tokens it lacks are not.
  const int candidate_tokens = total_slots - (by_page ? items * c.page_size() - c.live : 0);

  const Survivors survivors{fixed.survivors, shared.survivors()};
  Entries<C> entries{candidates, survivors, Listed::kCandidates, 0, run.count};
  int kept_tokens = candidate_tokens, list_start = run.first;
  if constexpr (!C::kOnlyDense) {
    if (prunes) {
      find_thresholds(c, candidates, total_slots, shadow, fixed.queries, shared.estimates(), fixed.sums,
                      shared.thresholds());
      entries.list = Listed::kOwnSurvivors;
      entries.count = list_survivors(c, candidates, shared.estimates(), fixed.thresholds, fixed.scan_totals, survivors);
      TWILIGHT_PHASE("survivors listed");
      if (cluster.size > 1 && p.slot_capacity > kUnsharedSlots) {
        cluster.sync("survivors listed");
        kept_tokens = count_survivors(c, survivors);
        const int even = blocks_of(cluster.size, kept_tokens);
        list_start = cluster.rank * even;
        entries.list = Listed::kSharedSurvivors;
        entries.start = list_start;
        entries.count = min(max(kept_tokens - list_start, 0), even);
        TWILIGHT_PHASE("survivors shared out");
      }
    }
  }

  if (dense) {
    attend(c, stream, fixed.queries, shared.warp_rows(), fixed.sums, fixed.output);
  } else if constexpr (!C::kOnlyDense) {
    if (p.in_host_memory) {
      attend(c, HostEntries<C>{entries}, fixed.queries, shared.warp_rows(), fixed.sums, fixed.output);
    } else {
      attend(c, entries, fixed.queries, shared.warp_rows(), fixed.sums, fixed.output);
    }
  }
  TWILIGHT_PHASE("attended");
  write_output(c, fixed.queries, fixed.sums, fixed.output, shared.warp_rows());
  TWILIGHT_PHASE("written");

  if (entries.list == Listed::kOwnSurvivors) {
    kept_tokens = count_survivors(c, survivors);
    list_start = fixed.survivors.first[cluster.rank];
  }
  if (p.kept_indices != nullptr) {
    write_kept(c, entries.count, list_start, kept_tokens,
               [&](int i) { return dense ? list_start + i : static_cast<int>(entries.at(i).y); });
  }
  if (p.budget_counters != nullptr && cluster.rank == 0 && c.tid() == 0) {
    count_budget(c, prunes, fixed.thresholds.captured, candidate_tokens, kept_tokens);
  }
  // Only this list is made of what another block holds.
  if (p.kept_indices != nullptr && entries.list == Listed::kSharedSurvivors) cluster.sync("kept rows written");
}

}  // namespace
}  // namespace twilight
