// What the fused decode kernel writes: the output merged over a cluster, and what a call reports.
#pragma once

#include "attend.cuh"

namespace twilight {
namespace {

// Adds up the blocks' partial results for this block's part of the output. From here on no block needs another's
// shared memory. `factors` holds [RP][kMaxClusterSize].
template <class C>
__device__ void write_output(const C& c, const Queries<C::D, C::RP>& q, const Sums<C::RP>& sums,
                             const OutputState<C::D, C::RP>& output, View<float> factors) {
  if (writes_alone(c)) return;
  for_own_rows(c, [&](int row) {
    const float2 own = part_of(c, sums.of_blocks, row, c.cluster.size);
    const SoftmaxSum all = merge_parts<kMaxClusterSize>(own);
    const float top = __shfl_sync(~0u, all.peak, 0), z = __shfl_sync(~0u, all.z, 0);
    if (c.lane < c.cluster.size)
      factors[row * kMaxClusterSize + c.lane] = z == 0.0f ? 0.0f : exp2_fast(own.x - top) / z;
    if (c.cluster.rank == 0) {
      const float missing = missing_logit(c, q, row);
      if (c.lane == 0) write_lse(c, row, top, z, missing);
    }
  });
  sync_block("factors of blocks known");
  const int slice = C::RP * C::D / c.cluster.size;
#pragma unroll 1
  for (int i = c.tid(); i < slice; i += kThreads) {
    const int at = c.cluster.rank * slice + i, row = at / C::D;
    if (row >= c.rows) break;
    float sum = 0.0f;
#pragma unroll 4
    for (int peer = 0; peer < c.cluster.size; ++peer) {
      sum += factors[row * kMaxClusterSize + peer] * output.parts[peer * slice + i];
    }
    store(static_cast<typename C::T*>(c.p.out) + c.out_row(row) * C::D + at % C::D, sum);
  }
}

// Positions of this block's `count` entries at their place in the list of all; the cluster pads the rest.
template <class C, class Position>
__device__ void write_kept(const C& c, int count, int list_start, int total, const Position& position_of) {
  const int capacity = c.p.max_pages << c.p.log2_page_size;
  int* list = c.p.kept_indices + (static_cast<int64_t>(c.sequence) * c.p.kv_heads + c.head) * capacity;
#pragma unroll 1
  for (int i = c.tid(); i < count; i += kThreads) {
    const int position = position_of(i);
    if (position < c.live) list[list_start + i] = position;
  }
#pragma unroll 1
  for (int i = total + c.cluster.rank * kThreads + c.tid(); i < capacity; i += c.cluster.size * kThreads) list[i] = -1;
  if (c.cluster.rank == 0 && c.tid() == 0) c.p.kept_counts[c.sequence * c.p.kv_heads + c.head] = total;
}

template <class C>
__device__ void count_budget(const C& c, bool prunes, const float* captured, int candidate_tokens, int kept_tokens) {
  double mass = 1.0;
  if (prunes) {
    mass = 0.0;
#pragma unroll 1
    for (int r = 0; r < c.rows; ++r) mass += static_cast<double>(captured[r]);
    mass /= c.rows;
  }
  unsigned long long* row = c.p.budget_counters + c.head * kCounterColumns;
  atomicAdd(row + kCounterRows, 1ull);
  atomicAdd(row + kCounterLive, static_cast<unsigned long long>(c.live));
  atomicAdd(row + kCounterCandidates, static_cast<unsigned long long>(candidate_tokens));
  atomicAdd(row + kCounterKept, static_cast<unsigned long long>(kept_tokens));
  if (C::kOnlyDense || c.live <= c.p.dense_below) atomicAdd(row + kCounterDense, 1ull);
  atomicAdd(row + kCounterMass, static_cast<unsigned long long>(rint(mass * 1048576.0)));
  atomicAdd(row + kCounterHeader + histogram_bin(candidate_tokens), 1ull);
  atomicAdd(row + kCounterHeader + kHistogramBins + histogram_bin(kept_tokens), 1ull);
}

template <class C>
__device__ void write_empty(const C& c) {
  if (c.p.kept_indices != nullptr) write_kept(c, 0, 0, 0, [](int) { return 0; });
  if (c.cluster.rank != 0) return;
#pragma unroll 1
  for (int i = c.tid(); i < c.rows * C::D; i += kThreads) {
    store(static_cast<typename C::T*>(c.p.out) + c.out_row(i / C::D) * C::D + i % C::D, 0.0f);
  }
  if (c.tid() < c.rows) c.p.lse[c.out_row(c.tid())] = -infinity();
}

}  // namespace
}  // namespace twilight
