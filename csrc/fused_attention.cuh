// Exact attention of the fused decode kernel over survivors, or over whole pages as they stream in; the merge over a
// cluster, and what a call reports.
#pragma once

#include "fused_pruner.cuh"

namespace twilight {
namespace {

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedAttention : FusedPruner<T, D, RP, kSelector> {
  using Base = FusedPruner<T, D, RP, kSelector>;
  using Base::candidates, Base::cluster, Base::entry_of, Base::first, Base::g, Base::head, Base::kOnlyDense, Base::kept,
      Base::lane, Base::live, Base::log2_scale, Base::part_of, Base::publish_row_sum, Base::out_row, Base::owned,
      Base::p, Base::page_block, Base::resolve, Base::rows, Base::s, Base::sequence, Base::slot_in_page,
      Base::streamed_tiles, Base::t, Base::tid, Base::unit_shift, Base::warp, Base::warp_rows;

  __device__ explicit FusedAttention(const FusedParams& params) : Base(params) {}

  // What a block attends to: a run of its candidates or of the cluster's survivors, or whole pages as they stream in.
  enum class Entries { kCandidates, kOwnSurvivors, kSharedSurvivors, kStream };
  // (row, position) of one.
  __device__ __forceinline__ uint2 entry(Entries entries, int at) const {
    if (entries == Entries::kCandidates) return resolve(at);
    if (entries == Entries::kOwnSurvivors) return resolve(kept()[at]);
    int owner = 0;
#pragma unroll 1
    while (s.kept_first[owner + 1] <= at) ++owner;
    const int slot = cluster.read(kept() + (at - s.kept_first[owner]), owner);
    return entry_of(cluster.read(candidates() + (slot >> unit_shift), owner), slot);
  }

  // The tokens of a dense row come in tiles of 16, one after another to each warp: their keys, then their values, the
  // next two on their way while one is used.
  struct Stream {
    uint32_t rows;  // first rows of 32 of the warp's tiles, a lane each
    int started;    // tiles of keys and of values
    int slot;       // of the one that comes next
  };
  // 16 bytes of a tile. Their place in a row is permuted by row, so that no two of the eight threads that read at a
  // time meet in a bank, whether they read two rows of keys or four of values.
  __device__ __forceinline__ T* stream_place(int slot, int row, int chunk) const {
    const int place = chunk ^ (row & 6) ^ (row & 1) << 2;
    return streamed_tiles() + ((slot * kWarps + warp) * kTileTokens + row) * D + place * 8;
  }
  __device__ __forceinline__ void start_next_tile(Stream& stream, int slot) {
    constexpr int kStep = kWarps * kTileTokens, kRowChunks = D / 8;
    const int tile = stream.started / 2, token = warp * kTileTokens + tile * kStep;  // of this block's
    if (token < owned) {
      if (stream.started % 64 == 0) {
        const int ahead = first + min(token + lane * kStep, owned - 1);
        stream.rows = (page_block(ahead >> p.log2_page_size) << p.log2_page_size) + slot_in_page(ahead & -kTileTokens);
      }
      const int row = lane / kRowChunks, chunk = lane % kRowChunks;
      const T* from = static_cast<const T*>(stream.started % 2 == 0 ? p.k_cache : p.v_cache) +
                      static_cast<int64_t>(__shfl_sync(~0u, stream.rows, tile % 32) + row) * D + chunk * 8;
#pragma unroll
      for (int i = 0; i < kTileTokens; i += 32 / kRowChunks) {
        start_copy(stream_place(slot, row + i, chunk), from + i * D, first + token + row + i < live);
      }
    }
    end_copies();
    ++stream.started;
  }
  __device__ __forceinline__ Stream begin_stream() {
    Stream stream = {};
#pragma unroll
    for (int slot = 0; slot < kStreamSlots; ++slot) start_next_tile(stream, slot);
    return stream;
  }
  // Once every lane has read what it needs of a tile, another takes its place.
  __device__ __forceinline__ void pass_tile(Stream& stream) {
    __syncwarp();
    start_next_tile(stream, stream.slot);
    stream.slot = stream.slot + 1 == kStreamSlots ? 0 : stream.slot + 1;
  }
  __device__ __forceinline__ void wait_for_tile() const {
    wait_copies<kStreamSlots - 1>();
    __syncwarp();
  }

  // Exact attention over `count` entries from `start`, or over what `stream` brings, by tiles of 16 a warp; hands every
  // block of the cluster its part of this one's result. Both products are of tokens or channels by query rows: a
  // thread's two columns are rows 2t and 2t + 1.
  template <bool kStreams>
  __device__ void attend(Entries entries, int start, int count, Stream stream) {
    constexpr int kQuarters = D / 32;  // loads of 8 channels a thread makes of a key
    constexpr int kHalves = D / 64;    // and of a value
    constexpr int kProducts = D / 16;
    float peak[2] = {kEmptyPeak, kEmptyPeak}, z[2] = {};
    float o[kProducts][4] = {};
#pragma unroll 1
    for (int base = warp * kTileTokens; base < count; base += kWarps * kTileTokens) {
      // Keys of tokens g and g + 8, values of 2t, 2t + 1, 2t + 8 and 2t + 9.
      uint4 keys[2][kQuarters], values[4][kHalves];
      int position[2];
      uint2 mine = make_uint2(0, INT32_MAX);  // (row, position) of the tile's token `lane`
      if (kStreams) {
        wait_for_tile();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          position[i] = first + base + g + 8 * i;
#pragma unroll
          for (int j = 0; j < kQuarters; ++j) {
            keys[i][j] = *reinterpret_cast<const uint4*>(stream_place(stream.slot, g + 8 * i, 4 * j + t));
          }
        }
        pass_tile(stream);
      } else {
        if (lane < kTileTokens && base + lane < count) mine = entry(entries, start + base + lane);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          position[i] = static_cast<int>(__shfl_sync(~0u, mine.y, g + 8 * i));
          const T* key =
              static_cast<const T*>(p.k_cache) + static_cast<int64_t>(__shfl_sync(~0u, mine.x, g + 8 * i)) * D;
#pragma unroll
          for (int j = 0; j < kQuarters; ++j) keys[i][j] = load_stream(key + 32 * j + 8 * t);
        }
      }
      float acc[4] = {};
#pragma unroll
      for (int j = 0; j < kQuarters; ++j) {
        const uint4 q = g < RP ? s.q_rows[g % RP][4 * j + t] : make_uint4(0, 0, 0, 0);
        mma(acc, keys[0][j].x, keys[1][j].x, keys[0][j].y, keys[1][j].y, q.x, q.y, T());
        mma(acc, keys[0][j].z, keys[1][j].z, keys[0][j].w, keys[1][j].w, q.z, q.w, T());
      }
      // There are no registers for keys and values at a time.
      if (!kStreams) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 2 * t + (i & 1) + 4 * (i & 2);
          const T* value = static_cast<const T*>(p.v_cache) + static_cast<int64_t>(__shfl_sync(~0u, mine.x, token)) * D;
          const bool there = static_cast<int>(__shfl_sync(~0u, mine.y, token)) < live;
#pragma unroll
          for (int j = 0; j < kHalves; ++j) {
            values[i][j] = there ? load_stream(value + 64 * j + 8 * g) : make_uint4(0, 0, 0, 0);
          }
        }
      }
      float weights[2][2], scale[2];  // of token g + 8 i and row 2t + k
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 2 * t + k;
        const int horizon = row < RP ? s.horizon[row % RP] : -1;
        float logit[2], top = peak[k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          logit[i] = position[i] <= horizon ? acc[2 * i + k] * log2_scale() : -infinity();
          top = fmaxf(top, logit[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
        scale[k] = exp2_fast(peak[k] - top);
        weights[0][k] = exp2_fast(logit[0] - top);
        weights[1][k] = exp2_fast(logit[1] - top);
        z[k] = z[k] * scale[k] + weights[0][k] + weights[1][k];
        peak[k] = top;
      }
      // Each weight as the sum of two of T, which keeps what rounding to one would lose.
      uint32_t upper[2], lower[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t packed = pack2(weights[i][0], weights[i][1], T());
        const float2 rounded = unpack2(packed, T());
        upper[i] = transpose8(packed);
        lower[i] = transpose8(pack2(weights[i][0] - rounded.x, weights[i][1] - rounded.y, T()));
      }
      if (kStreams) {
        wait_for_tile();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < kHalves; ++j) {
            const int token = 2 * t + (i & 1) + 4 * (i & 2);
            values[i][j] = *reinterpret_cast<const uint4*>(stream_place(stream.slot, token, 8 * j + g));
          }
        }
        pass_tile(stream);
      }
#pragma unroll
      for (int j = 0; j < kProducts; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[j][c] *= scale[c & 1];
        // Row g of product j is channel 8g + j; row g + 8 the same of the other half, or four channels further.
        const int e = kHalves == 2 ? j : j + 4, h = kHalves - 1;
        const uint32_t a0 = channel_pair(values[0][0], values[1][0], j),
                       a2 = channel_pair(values[2][0], values[3][0], j);
        const uint32_t a1 = channel_pair(values[0][h], values[1][h], e),
                       a3 = channel_pair(values[2][h], values[3][h], e);
        mma(o[j], a0, a1, a2, a3, upper[0], upper[1], T());
        mma(o[j], a0, a1, a2, a3, lower[0], lower[1], T());
      }
    }
    if (kStreams) __syncthreads();  // partial results take the place of the tiles
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = 2 * t + k;
      if (row < RP) {
        float4* to = reinterpret_cast<float4*>(&warp_rows()[(warp * RP + row) * D + 8 * g]);
        if (kHalves == 2) {
          to[0] = make_float4(o[0][k], o[1][k], o[2][k], o[3][k]);
          to[1] = make_float4(o[4 % kProducts][k], o[5 % kProducts][k], o[6 % kProducts][k], o[7 % kProducts][k]);
          to[16] = make_float4(o[0][2 + k], o[1][2 + k], o[2][2 + k], o[3][2 + k]);
          to[17] = make_float4(o[4 % kProducts][2 + k], o[5 % kProducts][2 + k], o[6 % kProducts][2 + k],
                               o[7 % kProducts][2 + k]);
        } else {
          to[0] = make_float4(o[0][k], o[1][k], o[2][k], o[3][k]);
          to[1] = make_float4(o[0][2 + k], o[1][2 + k], o[2][2 + k], o[3][2 + k]);
        }
      }
      z[k] += __shfl_xor_sync(~0u, z[k], 4);
      z[k] += __shfl_xor_sync(~0u, z[k], 8);
      z[k] += __shfl_xor_sync(~0u, z[k], 16);
      if (g == 0 && row < RP) s.warp_stat[warp][row] = make_float2(peak[k], z[k]);
    }
    __syncthreads();
    if (kStreams) cluster.started();
    if (warp < RP) {
      const float2 own = part_of(s.warp_stat, kWarps);
      const SoftmaxSum all = publish_row_sum(own);
      const float share = !writes_alone() ? 1.0f : all.z == 0.0f ? 0.0f : 1.0f / all.z;
      if (lane < kWarps) s.rescale[lane][warp] = exp2_fast(own.x - all.peak) * share;
      if (writes_alone() && lane == 0) write_lse(warp, all.peak, all.z);
    }
    __syncthreads();
    const int slice = RP * D / cluster.size;
#pragma unroll 1
    for (int i = tid(); i < RP * D; i += kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum = fmaf(s.rescale[w][i / D], warp_rows()[w * RP * D + i], sum);
      if (writes_alone()) {
        if (i / D < rows) store(static_cast<T*>(p.out) + out_row(i / D) * D + i % D, sum);
      } else {
        const int writer = i / slice;
        cluster.write(&s.out_parts[cluster.rank * slice + i - writer * slice], writer, sum);
      }
    }
    if (!writes_alone()) cluster.sync();
  }

  __device__ __forceinline__ void write_lse(int row, float top, float z) const {
    const float lse = top == infinity() ? top : (top + log2f(z)) * kLn2;
    if (row < rows) p.lse[out_row(row)] = z == 0.0f ? -infinity() : lse;
  }

  // Whether this block's result is the whole, and is written without an exchange.
  __device__ __forceinline__ bool writes_alone() const { return kOnlyDense && cluster.size == 1; }

  // Adds up the blocks' partial results for this block's part of the output. From here on no block needs another's
  // shared memory.
  __device__ void write_output() {
    if (writes_alone()) return;
    float* factors = warp_rows();  // [RP][kMaxClusterSize]
    if (warp < RP) {
      const float2 own = part_of(s.stat_parts, cluster.size);
      const SoftmaxSum all = this->template merge_parts<kMaxClusterSize>(own);
      const float top = __shfl_sync(~0u, all.peak, 0), z = __shfl_sync(~0u, all.z, 0);
      if (lane < cluster.size) factors[warp * kMaxClusterSize + lane] = z == 0.0f ? 0.0f : exp2_fast(own.x - top) / z;
      if (lane == 0 && cluster.rank == 0) write_lse(warp, top, z);
    }
    __syncthreads();
    const int slice = RP * D / cluster.size;
#pragma unroll 1
    for (int i = tid(); i < slice; i += kThreads) {
      const int at = cluster.rank * slice + i, row = at / D;
      if (row >= rows) break;
      float sum = 0.0f;
#pragma unroll 4
      for (int c = 0; c < cluster.size; ++c) sum += factors[row * kMaxClusterSize + c] * s.out_parts[c * slice + i];
      store(static_cast<T*>(p.out) + out_row(row) * D + at % D, sum);
    }
  }

  // Positions of this block's entries at their place in the list of all; the cluster pads the rest.
  __device__ void write_kept(Entries entries, int start, int count, int list_start, int total) {
    const int capacity = p.max_pages << p.log2_page_size;
    int* list = p.kept_indices + (static_cast<int64_t>(sequence) * p.kv_heads + head) * capacity;
#pragma unroll 1
    for (int i = tid(); i < count; i += kThreads) {
      const int position = entries == Entries::kStream ? list_start + i : entry(entries, start + i).y;
      if (position < live) list[list_start + i] = position;
    }
#pragma unroll 1
    for (int i = total + cluster.rank * kThreads + tid(); i < capacity; i += cluster.size * kThreads) list[i] = -1;
    if (cluster.rank == 0 && tid() == 0) p.kept_counts[sequence * p.kv_heads + head] = total;
  }

  // capacity.h's histogram_bin, on the device.
  __device__ static int budget_bin(int tokens) {
    if (tokens < 16) return tokens;
    const int octave = 31 - __clz(tokens);
    return min(static_cast<int>(kHistogramBins) - 1, 16 + (octave - 4) * 8 + ((tokens >> (octave - 3)) & 7));
  }

  __device__ void count_budget(int candidate_tokens, int kept_tokens, bool estimated) {
    double mass = 1.0;
    if (estimated) {
      mass = 0.0;
#pragma unroll 1
      for (int r = 0; r < rows; ++r) mass += static_cast<double>(s.captured[r]);
      mass /= rows;
    }
    unsigned long long* row = p.budget_counters + head * kCounterColumns;
    atomicAdd(row + kCounterRows, 1ull);
    atomicAdd(row + kCounterLive, static_cast<unsigned long long>(live));
    atomicAdd(row + kCounterCandidates, static_cast<unsigned long long>(candidate_tokens));
    atomicAdd(row + kCounterKept, static_cast<unsigned long long>(kept_tokens));
    if (kOnlyDense || live <= p.dense_below) atomicAdd(row + kCounterDense, 1ull);
    atomicAdd(row + kCounterMass, static_cast<unsigned long long>(rint(mass * 1048576.0)));
    atomicAdd(row + kCounterHeader + budget_bin(candidate_tokens), 1ull);
    atomicAdd(row + kCounterHeader + kHistogramBins + budget_bin(kept_tokens), 1ull);
  }

  __device__ void write_empty() {
    if (cluster.rank != 0) return;
#pragma unroll 1
    for (int i = tid(); i < rows * D; i += kThreads) {
      store(static_cast<T*>(p.out) + out_row(i / D) * D + i % D, 0.0f);
    }
    if (tid() < rows) p.lse[out_row(tid())] = -infinity();
  }
};

}  // namespace
}  // namespace twilight
