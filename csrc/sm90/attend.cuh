// Exact attention of the fused decode kernel over survivors, or over whole pages as they stream in.
#pragma once

#include "context.cuh"

namespace twilight {
namespace {

// The tokens of a dense row come in tiles of 16, one after another to each warp: their keys, then their values, the
// next kSlots - 1 on their way while one is used.
template <class C>
struct TileStream {
  using E = typename C::E;
  static constexpr bool kStreams = true, kFromHost = false;
  static constexpr int D = C::D, kPiece = 16 / sizeof(E), kRowChunks = D / kPiece;  // of 16 bytes
  static constexpr int kSlots = stream_slots(C::RP) * 2 / sizeof(E);                // in the same memory
  const C& c;
  const Share share;
  const View<uint4> tiles;
  const int count;          // tokens
  uint32_t first_rows = 0;  // of 32 of the warp's tiles, a lane each
  int started = 0;          // tiles of keys and of values
  int slot = 0;             // of the one that comes next

  // 16 bytes of a tile. Their place in a row is permuted by row, so that no two of the eight threads that read at a
  // time meet in a bank, whether they read two rows of keys or four of values; of Float8, 16 threads and twice the
  // rows.
  __device__ __forceinline__ uint4* place(int slot, int row, int chunk) const {
    const int swizzled = (row * kRowChunks & ~7) + (chunk ^ (row & 6) ^ (row & 1) << 2);
    return tiles + (slot * kWarps + c.warp) * kTileTokens * kRowChunks + swizzled;
  }
  // Channels 8 i to 8 i + 7 of a row of the tile in use.
  __device__ __forceinline__ Channels<E> at(int row, int i) const {
    using Loaded = Channels<E>;
    constexpr int kParts = 16 / sizeof(Loaded);
    return reinterpret_cast<const Loaded*>(place(slot, row, i / kParts))[i % kParts];
  }
  __device__ __forceinline__ void start_next(int into) {
    constexpr int kStep = kWarps * kTileTokens;
    const int tile = started / 2, token = c.warp * kTileTokens + tile * kStep;  // of this block's
    if (token < share.owned) {
      if (started % 64 == 0) {
        const int ahead = share.first + min(token + c.lane * kStep, share.owned - 1);
        first_rows = c.page_row(ahead) + c.slot_in_page(ahead & -kTileTokens);
      }
      const int row = c.lane / kRowChunks, chunk = c.lane % kRowChunks;
      const ReadRegion& cache = started % 2 == 0 ? c.p.k_cache : c.p.v_cache;
      const uint32_t first = c.chunk_of(cache, __shfl_sync(~0u, first_rows, tile % 32));
      const E* from = c.row_at(cache, first) + row * D + chunk * kPiece;
#pragma unroll
      for (int i = 0; i < kTileTokens; i += 32 / kRowChunks) {
        start_copy(place(into, row + i, chunk), from + i * D, share.first + token + row + i < c.live);
      }
    }
    end_copies();
    ++started;
  }
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) start_next(i);
  }
  // Once every lane has read what it needs of a tile, another takes its place.
  __device__ __forceinline__ void pass() {
    __syncwarp();
    start_next(slot);
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }
  __device__ __forceinline__ void wait() const {
    wait_copies<kSlots - 1>();
    __syncwarp();
  }
};

// What every logit of a row lacks, because keys are stored less a shift.
template <class C>
__device__ __forceinline__ float missing_logit(const C& c, const Queries<C::D, C::RP>& q, int row) {
  if (!C::kIsFloat8 || c.p.k_shift == nullptr) return 0.0f;
  const auto* channels = reinterpret_cast<const typename C::T*>(q.rows[row]);
  float sum = 0.0f;
  for (int d = c.lane; d < C::D; d += 32) sum += to_float(channels[d]) * c.p.k_shift[c.head * C::D + d];
  return warp_sum(sum) * c.p.sm_scale;
}

template <class C>
__device__ __forceinline__ void write_lse(const C& c, int row, float top, float z, float missing) {
  const float lse = top == infinity() ? top : (top + log2f(z)) * kLn2 + missing;
  if (row < c.rows) c.p.lse[c.out_row(row)] = z == 0.0f ? -infinity() : lse;
}

// Whether this block's result is the whole, and is written without an exchange.
template <class C>
__device__ __forceinline__ bool writes_alone(const C& c) {
  return C::kOnlyDense && c.cluster.size == 1;
}

// Exact attention over Entries, or over what a TileStream brings, by tiles of 16 a warp; hands every block of the
// cluster its part of this one's result. Both products are of tokens or channels by eight query rows: a thread's two
// columns of the n-th are rows 8n + 2t and 8n + 2t + 1.
template <class C, class From>
__device__ void attend(const C& c, From from, const Queries<C::D, C::RP>& q, View<float> warp_rows, Sums<C::RP>& sums,
                       OutputState<C::D, C::RP>& output) {
  using T = typename C::T;
  using E = typename C::E;
  constexpr bool kStreams = From::kStreams;
  constexpr int D = C::D, RP = C::RP, kColumns = C::kColumns;
  static_assert(kStreams || kColumns == 1, "more rows than eight are dense");
  constexpr int kQuarters = D / 32;  // loads of 8 channels a thread makes of a key
  constexpr int kHalves = D / 64;    // and of a value
  constexpr int kProducts = D / 16;
  using KeyShare = RowShare<E, From::kFromHost, 4, kQuarters>;
  using ValueShare = RowShare<E, From::kFromHost, 8, kHalves>;
  // Which eight of its channels a thread reads as its j-th. What a stream reads lies in shared memory by 8 bytes.
  const auto key_eight = [&](int j) { return kStreams ? 4 * j + c.t : KeyShare::eight(j, c.t); };
  const auto value_eight = [&](int j) { return kStreams ? 8 * j + c.g : ValueShare::eight(j, c.g); };
  const float log2_scale = c.log2_scale() * c.k_descale();
  float peak[kColumns][2], z[kColumns][2], o[kColumns][kProducts][4];
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    peak[n][0] = peak[n][1] = kEmptyPeak;
    z[n][0] = z[n][1] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * kProducts; ++i) o[n][i / 4][i % 4] = 0.0f;
  }
  constexpr int kStep = kWarps * kTileTokens;
  // (row, position) of a tile's token `lane`; of those it lacks row 0, which nobody sees.
  const auto look_up = [&](int base) {
    uint2 entry = make_uint2(0, INT32_MAX);
    if constexpr (!kStreams) {
      if (c.lane < kTileTokens && base + c.lane < from.count) entry = from.at(base + c.lane);
    }
    return entry;
  };
  uint2 mine = look_up(c.warp * kTileTokens), next = mine;
#pragma unroll 1
  for (int base = c.warp * kTileTokens; base < from.count; base += kStep, mine = next) {
    // Keys of tokens g and g + 8, values of 2t, 2t + 1, 2t + 8 and 2t + 9.
    Channels<E> keys[2][kQuarters], stored[4][kHalves];
    int position[2];
    if constexpr (kStreams) {
      from.wait();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        position[i] = from.share.first + base + c.g + 8 * i;
#pragma unroll
        for (int j = 0; j < kQuarters; ++j) {
          keys[i][j] = from.at(c.g + 8 * i, key_eight(j));
        }
      }
      if (kColumns == 1) from.pass();
    } else {
      const uint32_t key_at = c.chunk_of(c.p.k_cache, mine.x);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        position[i] = static_cast<int>(__shfl_sync(~0u, mine.y, c.g + 8 * i));
        KeyShare::load(keys[i], c.row_at(c.p.k_cache, __shfl_sync(~0u, key_at, c.g + 8 * i)), c.t);
      }
      next = look_up(base + kStep);  // while the keys are on their way
    }
    float acc[kColumns][4];
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) acc[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int j = 0; j < kQuarters; ++j) {
      const uint4 one = keys[0][j].widen(T()), other = keys[1][j].widen(T());
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const uint4 queries = c.g < RP ? q.rows[(8 * n + c.g) % RP][key_eight(j)] : make_uint4(0, 0, 0, 0);
        mma(acc[n], one.x, other.x, one.y, other.y, queries.x, queries.y, T());
        mma(acc[n], one.z, other.z, one.w, other.w, queries.z, queries.w, T());
      }
    }
    // There are no registers for more keys than the products are at.
    if constexpr (kStreams && kColumns > 1) from.pass();
    const auto value_token = [&](int i) { return 2 * c.t + (i & 1) + 4 * (i & 2); };
    // There are no registers for keys and values at a time.
    if constexpr (!kStreams) {
      const uint32_t value_at = c.chunk_of(c.p.v_cache, mine.x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ValueShare::load(stored[i], c.row_at(c.p.v_cache, __shfl_sync(~0u, value_at, value_token(i))), c.g);
      }
    }
    float scale[kColumns][2];
    uint32_t upper[kColumns][2], lower[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float weights[2][2];  // of token g + 8 i and row 8 n + 2 t + k
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int row = 8 * n + 2 * c.t + k;
        const int horizon = row < RP ? q.horizon[row % RP] : -1;
        float logit[2], top = peak[n][k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          logit[i] = position[i] <= horizon ? acc[n][2 * i + k] * log2_scale : -infinity();
          top = fmaxf(top, logit[i]);
        }
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
        scale[n][k] = exp2_fast(peak[n][k] - top);
        weights[0][k] = exp2_fast(logit[0] - top);
        weights[1][k] = exp2_fast(logit[1] - top);
        z[n][k] = z[n][k] * scale[n][k] + weights[0][k] + weights[1][k];
        peak[n][k] = top;
      }
      // Each weight as the sum of two of T, which keeps what rounding to one would lose.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t packed = pack2(weights[i][0], weights[i][1], T());
        const float2 rounded = unpack2(packed, T());
        upper[n][i] = transpose8(packed);
        lower[n][i] = transpose8(pack2(weights[i][0] - rounded.x, weights[i][1] - rounded.y, T()));
      }
    }
    if constexpr (kStreams) {
      from.wait();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < kHalves; ++j) stored[i][j] = from.at(value_token(i), value_eight(j));
      }
      from.pass();
    } else if (__ballot_sync(~0u, c.lane < kTileTokens && static_cast<int>(mine.y) >= c.live) != 0) {
      // A row of no token may hold anything, and NaN times a weight of 0 is NaN. Cleared here, behind the softmax: a
      // register that is loaded or cleared waits for the load.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = static_cast<int>(__shfl_sync(~0u, mine.y, value_token(i))) < c.live;
#pragma unroll
        for (int j = 0; j < kHalves && !there; ++j) stored[i][j] = {};
      }
    }
    uint4 values[4][kHalves];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < kHalves; ++j) values[i][j] = stored[i][j].widen(T());
    }
#pragma unroll
    for (int j = 0; j < kProducts; ++j) {
      // Row g of product j is channel j of the thread's first eight; row g + 8 the same of its second, or four further.
      const int e = kHalves == 2 ? j : j + 4, h = kHalves - 1;
      const uint32_t a0 = channel_pair(values[0][0], values[1][0], j), a2 = channel_pair(values[2][0], values[3][0], j);
      const uint32_t a1 = channel_pair(values[0][h], values[1][h], e), a3 = channel_pair(values[2][h], values[3][h], e);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) o[n][j][c] *= scale[n][c & 1];
        mma(o[n][j], a0, a1, a2, a3, upper[n][0], upper[n][1], T());
        mma(o[n][j], a0, a1, a2, a3, lower[n][0], lower[n][1], T());
      }
    }
  }
  if (kStreams) sync_block("tiles read");  // partial results take their place
#pragma unroll
  for (int i = 0; i < 2 * kColumns; ++i) {
    const int n = i / 2, k = i % 2, row = 8 * n + 2 * c.t + k;
    const auto& of = o[n];
    if (row < RP) {
      float4* rows = reinterpret_cast<float4*>(&warp_rows[(c.warp * RP + row) * D]);
      float4* to = rows + 2 * value_eight(0);
      if (kHalves == 2) {
        float4* other = rows + 2 * value_eight(1);
        to[0] = make_float4(of[0][k], of[1][k], of[2][k], of[3][k]);
        to[1] = make_float4(of[4 % kProducts][k], of[5 % kProducts][k], of[6 % kProducts][k], of[7 % kProducts][k]);
        other[0] = make_float4(of[0][2 + k], of[1][2 + k], of[2][2 + k], of[3][2 + k]);
        other[1] = make_float4(of[4 % kProducts][2 + k], of[5 % kProducts][2 + k], of[6 % kProducts][2 + k],
                               of[7 % kProducts][2 + k]);
      } else {
        to[0] = make_float4(of[0][k], of[1][k], of[2][k], of[3][k]);
        to[1] = make_float4(of[0][2 + k], of[1][2 + k], of[2][2 + k], of[3][2 + k]);
      }
    }
    z[n][k] += __shfl_xor_sync(~0u, z[n][k], 4);
    z[n][k] += __shfl_xor_sync(~0u, z[n][k], 8);
    z[n][k] += __shfl_xor_sync(~0u, z[n][k], 16);
    if (c.g == 0 && row < RP) sums.of_warps[c.warp][row] = make_float2(peak[n][k], z[n][k]);
  }
  sync_block("warps' rows written");
  if (kStreams) c.cluster.started();
  for_own_rows(c, [&](int row) {
    const float2 own = part_of(c, sums.of_warps, row, kWarps);
    const SoftmaxSum all = publish_row_sum(c, row, own, sums);
    const float share = c.v_descale() * (!writes_alone(c) ? 1.0f : all.z == 0.0f ? 0.0f : 1.0f / all.z);
    if (c.lane < kWarps) output.rescale[c.lane][row] = exp2_fast(own.x - all.peak) * share;
    if (writes_alone(c)) {
      const float missing = missing_logit(c, q, row);
      if (c.lane == 0) write_lse(c, row, all.peak, all.z, missing);
    }
  });
  sync_block("factors known");
  const int slice = RP * D / c.cluster.size;
#pragma unroll 1
  for (int i = c.tid(); i < RP * D; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum = fmaf(output.rescale[w][i / D], warp_rows[w * RP * D + i], sum);
    if (writes_alone(c)) {
      if (i / D < c.rows) store(static_cast<T*>(c.p.out) + c.out_row(i / D) * D + i % D, sum);
    } else {
      const int writer = i / slice;
      c.cluster.write(&output.parts[c.cluster.rank * slice + i - writer * slice], writer, sum);
    }
  }
  if (!writes_alone(c)) c.cluster.sync("partial rows sent");
}

}  // namespace
}  // namespace twilight
