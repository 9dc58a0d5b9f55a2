// Estimated weights of the fused decode kernel from all 4-bit channels, the bins of them that reach p, and the
// survivors.
#pragma once

#include "query.cuh"

namespace twilight {
namespace {

// Logits of this block's candidates, and their softmax sums.
template <class C>
struct Estimator {
  static constexpr int D = C::D, RP = C::RP;
  const C& c;
  const Candidates<C>& candidates;
  const Shadow<C> shadow;
  const Queries<D, RP>& q;
  const View<float> estimates;
  Sums<RP>& sums;

  static constexpr int kEstimateTiles = 4;
  static constexpr int kChunks = D / 32;  // words of codes a row that one thread reads
  static constexpr int kScales = RP == 1 ? 4 : 2;
  static constexpr int kEstimateColumns = C::kCopies < kEstimateTiles ? C::kCopies : kEstimateTiles;
  static constexpr int kEstimateSets = kEstimateTiles / kEstimateColumns;  // of tiles that share one accumulator
  // Candidates come by pages of whole tiles, or one by one.
  static constexpr bool kByTile = !C::kByToken;
  // Of `at` items behind a tile of candidate slots, one of this block's; of the last one's behind that.
  __device__ __forceinline__ uint2 candidate(int tile, int at) const {
    if (!kByTile) return candidates.resolve(min(tile + at, candidates.count - 1));
    const uint2 first_of_tile = candidates.resolve(min(tile, (candidates.count - 1) & -kTileTokens));
    return make_uint2(first_of_tile.x + at, first_of_tile.y + at);
  }
  // Of a column of the products: the tile of four, the candidate in it.
  __device__ __forceinline__ int estimate_tile(int set, int k) const {
    return set * kEstimateColumns + (RP == 1 ? 2 * (c.t & 1) + k : 2 * c.t / RP);
  }
  // Codes of 64 candidate slots, of four tiles rows g and g + 8, and the scales of the slots whose products this thread
  // receives. With leading codes in whole quarters of a row a thread reads one quarter of each, else every fourth word.
  struct CandidateCodes {
    uint32_t words[kEstimateTiles][2][kChunks];
    uint32_t scale[kEstimateSets][kScales];
  };
  template <bool kQuarters>
  __device__ __forceinline__ void load_candidates(CandidateCodes& codes, int base) const {
    // A thread's first word is `begin` + slot in page * `stride` words behind the page's first.
    const bool leads = kChunks * c.t < shadow.lead_words;
    const int stride = leads ? shadow.lead_words : C::kWords - shadow.lead_words;
    const int begin = kChunks * c.t + (leads ? 0 : (c.page_size() - 1) * shadow.lead_words);
#pragma unroll
    for (int u = 0; u < kEstimateTiles; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = candidate(base + u * kTileTokens, c.g + 8 * half).x, slot = c.slot_in_page(row);
        uint32_t (&words)[kChunks] = codes.words[u][half];
        if (kQuarters) {
          const uint32_t* from = shadow.codes() + (shadow.page_word(row) + slot * stride + begin);
          if (kChunks == 4) {
            const uint4 v = load_stream(from);
            words[0] = v.x, words[1] = v.y;
            words[kChunks - 2] = v.z, words[kChunks - 1] = v.w;
          } else {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
            words[0] = v.x, words[1] = v.y;
          }
        } else {
          const uint32_t lead = shadow.lead_word(row), rest = shadow.rest_word(row) - shadow.lead_words;
#pragma unroll
          for (int j = 0; j < kChunks; ++j) {
            const int word = 4 * j + c.t;
            words[j] = __ldg(shadow.codes() + ((word < shadow.lead_words ? lead : rest) + word));
          }
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
      for (int e = 0; e < kScales; ++e) {
        const uint32_t row = candidate(base + estimate_tile(set, e >> 1) * kTileTokens, c.g + 8 * (e & 1)).x;
        codes.scale[set][e] = __ldg(shadow.scales() + shadow.scale_word(row));
      }
    }
  }

  // Base-2 logits of this block's candidate slots from all channels; a warp takes 64 slots at a time, four tiles of 16,
  // and loads the next 64 before it adds up these.
  template <bool kQuarters>
  __device__ void estimate() const {
    constexpr int kEstimateSums = RP == 1 ? kEstimateTiles : kEstimateSets;
    constexpr int kStep = kWarps * kEstimateTiles * kTileTokens;
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2];
    int horizon[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = c.row_of_column(k);
      gain[k] = q.gain[row];
      zero_gain[k] = q.sum[row];
      horizon[k] = q.horizon[row];
    }
    const bool column = RP > 1 || c.t < 2;
    CandidateCodes codes;
    int base = c.warp * kEstimateTiles * kTileTokens;
    if (base < candidates.count) load_candidates<kQuarters>(codes, base);
#pragma unroll 1
    for (; base < candidates.count; base += kStep) {
      float acc[kEstimateSums][4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 query = q.codes[kQuarters ? kChunks * c.t + j : 4 * j + c.t][c.g % RP];
#pragma unroll
        for (int u = 0; u < kEstimateTiles; ++u) {
          const bool mine = c.g / RP == u % kEstimateColumns;
          mma_codes4(acc[u * kEstimateSums / kEstimateTiles], codes.words[u][0][j], codes.words[u][1][j],
                     make_uint4(mine ? query.x : 0, mine ? query.y : 0, mine ? query.z : 0, mine ? query.w : 0));
        }
      }
      uint32_t packed[kEstimateSets][kScales];
#pragma unroll
      for (int i = 0; i < kEstimateSets * kScales; ++i) {
        packed[i / kScales][i % kScales] = codes.scale[i / kScales][i % kScales];
      }
      if (base + kStep < candidates.count) load_candidates<kQuarters>(codes, base + kStep);
      if (RP == 1) fold(acc);
      float value[2][2 * kEstimateSets];
#pragma unroll
      for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int tile = base + estimate_tile(set, k) * kTileTokens, at = c.g + 8 * half;
            const float2 scale = scale_and_zero(packed[set][RP == 1 ? 2 * k + half : half]);
            const bool there = column && tile + at < candidates.count;
            float logit = fmaf(scale.x, acc[set][2 * half + k] * gain[k], scale.y * zero_gain[k]);
            if (!there || static_cast<int>(candidate(tile, at).y) > horizon[k]) logit = -infinity();
            if (column && tile + at < round_up(candidates.count, 4)) {  // they are read by fours
              estimates[c.row_of_column(k) * c.p.slot_capacity + tile + at] = logit;
            }
            value[k][2 * set + half] = logit;
          }
        }
      }
      sum[0].add(value[0]);
      sum[1].add(value[1]);
    }
    publish_sums(c, sum, sums);
  }
};

__device__ __forceinline__ float weight(float logit, float norm) { return fminf(exp2_fast(logit - norm), 1.0f); }

// p of one query row, at least 0; 1 keeps everything.
template <class C>
__device__ __forceinline__ double row_top_p(const C& c, int row) {
  if (c.p.head_top_p == nullptr) return c.p.top_p;
  const int query_head = c.head * c.p.group_size + row % c.p.group_size;
  const float given = c.p.head_top_p[c.sequence * c.p.top_p_stride_batch + query_head * c.p.top_p_stride_head];
  return isnan(given) ? 1.0 : fmin(fmax(static_cast<double>(given), 0.0), 1.0);
}

// The lowest weight of a bin, none of whose weights lies below (1 - p) / N of the total: all lighter ones together may
// be left out, so p is reached in this bin or above it. Not below 2^-31, which has a mass.
__device__ __forceinline__ float lowest_counted(double top_p, int total_slots) {
  const float floor = static_cast<float>((1.0 - top_p) * 0.99) / total_slots;
  const uint32_t bin = floor < 0x1p-30f ? 0 : __float_as_uint(floor) >> kWeightBinShift;
  return __uint_as_float(max(bin, static_cast<uint32_t>(kLowestWeightBin)) << kWeightBinShift);
}

// The mass of a weight, floor(w * 2^31), as its upper 20 bits and its lower 11.
__device__ __forceinline__ uint2 split_mass(float w) {
  const float high = fma_rz(w, 0x1p20f, 0x1p23f);
  const float low = fma_rz(fmaf(w, 0x1p20f, 0x1p23f - high), 0x1p11f, 0x1p23f);
  return make_uint2(__float_as_uint(high) - 0x4b000000u, __float_as_uint(low) - 0x4b000000u);
}

// The thresholds of all rows: of each the lowest weight of the highest bin whose mass, with everything above, reaches
// p. The cluster's blocks divide the rows; every block learns every row's.
template <class C>
struct Thresholds {
  static constexpr int RP = C::RP;
  const C& c;
  const View<float> estimates;   // of `slots` candidates
  const int slots, total_slots;  // this block's, the cluster's
  const ThresholdStorage<RP> s;

  // Row r is solved by block r % cluster.size, as the (r / cluster.size)-th of its rows; kRowWarps warps of every block
  // count its masses.
  static constexpr int kRowWarps = kWarps / RP;
  __device__ __forceinline__ int row_parts() const { return c.cluster.size * kRowWarps; }

  // Adds up this block's masses, a warp one row, and by bins those of the weights that can decide.
  __device__ void count_weights() const {
    const int row = c.warp % RP, part = c.warp / RP, solver = row % c.cluster.size;
    const float norm = s.state.norm[row];
    const float counted_from =
        row < c.rows ? lowest_counted(row_top_p(c, row), total_slots) : 2.0f;  // above any weight
    const float4* estimate = reinterpret_cast<const float4*>(estimates + row * c.p.slot_capacity);
    uint32_t* bins = s.bins + row * kWeightBins;
    uint2 total = make_uint2(0, 0);
    constexpr int kVectors = 2, kStep = 32 * kRowWarps;  // of four slots
    const int vectors = blocks_of(4, slots);
#pragma unroll 1
    for (int base = part * 32; base < vectors; base += kVectors * kStep) {
      float4 four[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = base + v * kStep + c.lane;
        four[v] = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
        if (at < vectors) four[v] = estimate[at];
      }
#pragma unroll
      for (int u = 0; u < 4 * kVectors; ++u) {
        const float4 all = four[u / 4];
        const float w = weight(u % 4 == 0 ? all.x : u % 4 == 1 ? all.y : u % 4 == 2 ? all.z : all.w, norm);
        const uint2 mass = split_mass(w);
        total.x += mass.x;
        total.y += mass.y;
        if (w >= counted_from)
          atomicAdd(&bins[(__float_as_uint(w) >> kWeightBinShift) - kLowestWeightBin], (mass.x << 11) + mass.y);
      }
    }
    const unsigned long long mass = warp_sum((static_cast<unsigned long long>(total.x) << 11) + total.y);
    const int index = (row / c.cluster.size * c.cluster.size + c.cluster.rank) * kRowWarps + part;
    if (c.lane == 0) c.cluster.write(&s.state.part_mass[index], solver, mass);
  }

  // Thresholds of this block's rows, a warp one of them.
  __device__ void solve_rows() const {
    static_assert(kWeightBins == 4 * kThreads, "a vector of every thread");
#pragma unroll 1
    for (int row = c.cluster.rank; row < c.rows; row += c.cluster.size) {
      uint4* mine = reinterpret_cast<uint4*>(s.bins + row * kWeightBins) + c.tid();
      uint4 sum = make_uint4(0, 0, 0, 0);
#pragma unroll 4
      for (int peer = 0; peer < c.cluster.size; ++peer) {
        const uint4 other = c.cluster.read(mine, peer);
        sum = make_uint4(sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w);
      }
      *mine = sum;  // no other block reads this row here
    }
    sync_block("blocks' masses added up");
    const int row = c.warp * c.cluster.size + c.cluster.rank;
    if (row < c.rows) solve_row(row, c.warp * row_parts());
  }

  // By one warp. Weights that add up to 2 come from logits too large to tell them apart: all are kept.
  __device__ void solve_row(int row, int first_part) const {
    unsigned long long total = 0;
#pragma unroll 1
    for (int i = c.lane; i < row_parts(); i += 32) total += s.state.part_mass[first_part + i];
    total = warp_sum(total);
    const double top_p = row_top_p(c, row);
    float threshold = 0.0f, captured = 1.0f;
    if (top_p < 1.0 && total != 0 && total >> 32 == 0 && !isnan(s.state.norm[row])) {
      const uint32_t* bins = s.bins + row * kWeightBins;
      const uint32_t need = max(static_cast<uint32_t>(ceil(top_p * static_cast<double>(total))), 1u);
      // 32 bins a lane, each read from a place of its own so that lanes meet in no bank; then a bin a lane.
      const int top = kWeightBins - 1;
      uint32_t mass = 0;
#pragma unroll 8
      for (int i = 0; i < 32; ++i) mass += bins[top - 32 * c.lane - ((i + c.lane) & 31)];
      uint32_t through = warp_inclusive_scan(mass);
      uint32_t reaches = __ballot_sync(~0u, through >= need);
      if (reaches != 0) {
        const int owner = __ffs(reaches) - 1;
        const uint32_t before = __shfl_sync(~0u, through - mass, owner);
        through = before + warp_inclusive_scan(bins[top - 32 * owner - c.lane]);
        reaches = __ballot_sync(~0u, through >= need);
        const int lane = __ffs(reaches) - 1;
        const uint32_t bin = kLowestWeightBin + top - 32 * owner - lane;
        threshold = __uint_as_float(bin << kWeightBinShift);
        captured =
            static_cast<float>(static_cast<double>(__shfl_sync(~0u, through, lane)) / static_cast<double>(total));
      }
    }
    if (c.lane < c.cluster.size) {
      c.cluster.write(&s.state.threshold[row], c.lane, threshold);
      c.cluster.write(&s.state.captured[row], c.lane, captured);
    }
  }
};

// Estimates this block's candidates; every block learns every row's threshold.
template <class C>
__device__ void find_thresholds(const C& c, const Candidates<C>& candidates, int total_slots, const Shadow<C>& shadow,
                                const Queries<C::D, C::RP>& q, View<float> estimates, Sums<C::RP>& sums,
                                const ThresholdStorage<C::RP>& storage) {
  const Estimator<C> estimator{c, candidates, shadow, q, estimates, sums};
  const Thresholds<C> thresholds{c, estimates, candidates.count, total_slots, storage};
  clear_histogram<C::RP * kWeightBins>(c, storage.bins);
  if (shadow.lead_words % Estimator<C>::kChunks == 0) {
    estimator.template estimate<true>();
  } else {
    estimator.template estimate<false>();
  }
  TWILIGHT_PHASE("weights estimated");
  c.cluster.sync("sums of weights handed out");
  read_norms(c, sums, storage.state.norm);
  TWILIGHT_PHASE("weights normalized");
  thresholds.count_weights();
  c.cluster.sync("weights counted");
  TWILIGHT_PHASE("weights counted");
  thresholds.solve_rows();
  c.cluster.sync("thresholds sent");
  TWILIGHT_PHASE("thresholds found");
}

// Starts to bring the key and the value of a row to the L2 cache.
template <class C>
__device__ __forceinline__ void prefetch_row(const C& c, uint32_t row) {
#pragma unroll
  for (int d = 0; d < C::D; d += 128 / sizeof(typename C::E)) {
    prefetch_line(c.row_at(c.p.k_cache, c.chunk_of(c.p.k_cache, row)) + d);
    prefetch_line(c.row_at(c.p.v_cache, c.chunk_of(c.p.v_cache, row)) + d);
  }
}

// Lists this block's survivors, slots whose weight reaches any row's threshold, sinks and recent tokens, and returns
// how many they are.
template <class C>
__device__ int list_survivors(const C& c, const Candidates<C>& candidates, View<float> estimates,
                              const ThresholdState<C::RP>& found, uint32_t* scan_totals, const Survivors& survivors) {
  constexpr int RP = C::RP;
  const int word_count = blocks_of(32, candidates.count);
  // A logit tells what its weight is: at least the threshold, below it, or so near that the weight itself must say.
  bool keeps_all = false;
  float low[RP], high[RP];
#pragma unroll
  for (int r = 0; r < RP; ++r) {
    const float norm = found.norm[r], threshold = r < c.rows ? found.threshold[r] : 2.0f;  // no weight reaches 2
    const float logit = norm + __log2f(threshold), margin = 1e-4f + fabsf(norm) * 0x1p-21f;
    keeps_all |= threshold == 0.0f;
    low[r] = r < c.rows ? logit - margin : infinity();
    high[r] = r < c.rows ? logit + margin : infinity();
  }
  // A warp takes up to 32 words of slots in a row, and each of its lanes one of these words.
  int count = 0;
#pragma unroll 1
  for (int start = 0; start < word_count; start += 32 * kWarps) {
    const int words = min(blocks_of(kWarps, word_count - start), 32), first_word = start + c.warp * words;
    uint32_t own = 0, total;
#pragma unroll 1
    for (int word = 0; word < words; ++word) {
      const int at = (first_word + word) * 32 + c.lane, slot = min(at, candidates.count - 1);
      const uint2 entry = candidates.resolve(slot);
      const int position = entry.y;
      bool keep = keeps_all || position < c.p.sink_tokens || position >= c.live - c.p.recent_tokens, near = false;
#pragma unroll
      for (int r = 0; r < RP; ++r) {
        const float logit = estimates[r * c.p.slot_capacity + slot];
        near |= logit >= low[r];
        keep |= logit >= high[r];
      }
      if (near && !keep) {
#pragma unroll 1
        for (int r = 0; r < c.rows; ++r) {
          keep |= weight(estimates[r * c.p.slot_capacity + slot], found.norm[r]) >= found.threshold[r];
        }
      }
      keep &= position < c.live && at < candidates.count;
      // It is read as soon as the list is complete. The L2 keeps nothing of host memory, which would be read twice.
      if (keep && !c.p.in_host_memory) prefetch_row(c, entry.x);
      const uint32_t bits = __ballot_sync(~0u, keep);
      if (c.lane == word) own = bits;
    }
    // The list takes the place of estimates that were looked at before.
    const int to = count + block_exclusive_scan(__popc(own), scan_totals, total);
    count += total;
#pragma unroll 1
    for (int word = 0; word < words; ++word) {
      const uint32_t kept = __shfl_sync(~0u, own, word);
      const int at = __shfl_sync(~0u, to, word) + __popc(kept & ((1u << c.lane) - 1));
      if (kept >> c.lane & 1) survivors.slots[at] = (first_word + word) * 32 + c.lane;
    }
  }
  if (c.tid() < c.cluster.size) c.cluster.write(&survivors.s.count[c.cluster.rank], c.tid(), count);
  sync_block("survivors written");
  return count;
}

// Survivors before each block; returns how many there are in all.
template <class C>
__device__ int count_survivors(const C& c, const Survivors& survivors) {
  if (c.warp == 0) {
    const int count = c.lane < c.cluster.size ? survivors.s.count[c.lane] : 0;
    const int through = warp_inclusive_scan(count);
    if (c.lane <= kMaxClusterSize) survivors.s.first[c.lane] = through - count;
  }
  sync_block("survivors counted");
  return survivors.s.first[kMaxClusterSize];
}

}  // namespace
}  // namespace twilight
