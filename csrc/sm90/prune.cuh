// Estimated weights of the fused decode kernel from all 4-bit channels, the exact top-p, and the survivors.
#pragma once

#include "query.cuh"

namespace twilight {
namespace {

using WeightBins = FloatBins<100, kMassBins - 1>;  // down to 2^-27; 1.0 lands in bin 964

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
          const uint32_t* from =
              reinterpret_cast<const uint32_t*>(c.p.k_quant) + ((row - slot) * C::kWords + slot * stride + begin);
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
            words[j] = shadow.load_codes((word < shadow.lead_words ? lead : rest) + word);
          }
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
      for (int e = 0; e < kScales; ++e) {
        codes.scale[set][e] =
            shadow.load_scale(candidate(base + estimate_tile(set, e >> 1) * kTileTokens, c.g + 8 * (e & 1)).x);
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

// Weights below (1 - p) / N of the total add up to less than what may be left out, so none of them is the threshold.
__device__ __forceinline__ float floor_weight(double top_p, int total_slots) {
  const float floor = static_cast<float>((1.0 - top_p) * 0.99) / total_slots;
  return floor < 0x1p-30f ? 0.0f : floor;
}

// The mass of a weight, floor(w * 2^40), as its upper and its lower 20 bits: integers add up to the same in any
// order.
__device__ __forceinline__ uint2 split_mass(float w) {
  const float high = fma_rz(w, 0x1p20f, 0x1p23f);
  const float low = fma_rz(fmaf(w, 0x1p20f, 0x1p23f - high), 0x1p20f, 0x1p23f);
  return make_uint2(__float_as_uint(high) - 0x4b000000u, __float_as_uint(low) - 0x4b000000u);
}
__device__ __forceinline__ unsigned long long joined_mass(uint2 mass) {
  return (static_cast<unsigned long long>(mass.x) << 20) + mass.y;
}
__device__ __forceinline__ unsigned long long mass_of(float w) { return joined_mass(split_mass(w)); }
__device__ __forceinline__ float captured_share(unsigned long long mass, unsigned long long total) {
  return static_cast<float>(static_cast<double>(mass) / static_cast<double>(total));
}

// The thresholds of all rows: of each the largest weight whose mass, with everything above, reaches p. The cluster's
// blocks divide the rows; every block learns every row's.
template <class C>
struct Thresholds {
  static constexpr int RP = C::RP;
  const C& c;
  const View<float> estimates;   // of `slots` candidates
  const int slots, total_slots;  // this block's, the cluster's
  const ThresholdStorage<RP> s;

  // Row r is solved by block r % cluster.size, as the (r / cluster.size)-th of its rows; kRowWarps warps of every block
  // list weights for it.
  static constexpr int kRowWarps = kWarps / RP;
  __device__ __forceinline__ int row_parts() const { return c.cluster.size * kRowWarps; }
  __device__ __forceinline__ int solved_rows() const { return blocks_of(c.cluster.size, RP); }
  __device__ __forceinline__ int part_capacity() const { return c.p.list_capacity / (solved_rows() * row_parts()); }

  // Bins of a row: down from 2, at least an eighth of an octave each in the first round. The rows that a block solves
  // divide kRowBins, and each holds the upper and the lower halves of its mass.
  static_assert(kRowBins / RP >= 32, "a bin for every lane that looks for the threshold's");
  static constexpr uint32_t kLowRowKey = 96u << 23;  // 2^-31
  static constexpr int kLog2RowKeys = 28;            // from there to 2
  __device__ __forceinline__ int log2_row_bins() const { return 31 - __clz(kRowBins / solved_rows()); }
  __device__ __forceinline__ uint32_t* row_bins(int row) const {
    return s.bins + ((row / c.cluster.size) << (log2_row_bins() + 1));
  }
  __device__ __forceinline__ unsigned long long bin_mass(const uint32_t* bins, int bin) const {
    return joined_mass(*reinterpret_cast<const uint2*>(bins + 2 * bin));
  }

  // Adds up this block's masses, a warp one row, and sends the weights that can be thresholds to the row's solver. The
  // lists start at four times the floor, which leaves them short; should they not reach p, or not fit, the row is
  // solved from all estimates.
  __device__ void list_weights() const {
    const int row = c.warp % RP, part = c.warp / RP, solver = row % c.cluster.size;
    const int index = (row / c.cluster.size * c.cluster.size + c.cluster.rank) * kRowWarps + part;
    const int capacity = part_capacity();
    const float norm = s.state.norm[row];
    const float listed_from =
        row < c.rows ? 4.0f * floor_weight(row_top_p(c, row), total_slots) : 2.0f;  // above any weight
    const float4* estimate = reinterpret_cast<const float4*>(estimates + row * c.p.slot_capacity);
    const ClusterArray<float> list(s.lists + index * capacity, solver);
    uint2 total = make_uint2(0, 0);
    int listed = 0;
    constexpr int kVectors = 2, kStep = 32 * kRowWarps;  // of four slots
    const int vectors = blocks_of(4, slots);
#pragma unroll 1
    for (int base = part * 32; base < vectors; base += kVectors * kStep) {
      float w[kVectors][4];
      int own = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = base + v * kStep + c.lane;
        float4 four = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
        if (at < vectors) four = estimate[at];
        w[v][0] = weight(four.x, norm), w[v][1] = weight(four.y, norm);
        w[v][2] = weight(four.z, norm), w[v][3] = weight(four.w, norm);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          own += w[v][u] >= listed_from;
          const uint2 mass = split_mass(w[v][u]);
          total.x += mass.x;
          total.y += mass.y;
        }
      }
      const int through = warp_inclusive_scan(own);
      int at = listed + through - own;
      listed += __shfl_sync(~0u, through, 31);
      if (listed > capacity) continue;  // no use for the list
#pragma unroll
      for (int u = 0; u < kVectors * 4; ++u) {
        if (w[u / 4][u % 4] >= listed_from) list.write(at++, w[u / 4][u % 4]);
      }
    }
    const unsigned long long mass = warp_sum(joined_mass(total));
    if (c.lane == 0) {
      c.cluster.write(&s.state.part_mass[index], solver, mass);
      c.cluster.write(&s.state.part_size[index], solver, listed);
    }
  }

  // Shows `place` the listed weights of every `stride`-th part from `part`.
  template <typename Place>
  __device__ __forceinline__ void each_listed(int part, int end, int stride, const Place& place) const {
    const int capacity = part_capacity();
#pragma unroll 1
    for (; part < end; part += stride) {
      const int size = s.state.part_size[part];
#pragma unroll 1
      for (int i = c.lane; i < size; i += 32) place((s.lists + part * capacity)[i]);
    }
  }

  // The bin where a row's mass reaches `need`, or -1, and the mass above it, by one warp: the lanes' shares of the
  // bins, each read from a place of its own so that they meet in no bank, then the bins of one share.
  __device__ int find_row_bin(const uint32_t* bins, unsigned long long& above, unsigned long long need) const {
    const int share = 1 << (log2_row_bins() - 5), top = 32 * share - 1;
    unsigned long long part = 0;
#pragma unroll 4
    for (int i = 0; i < share; ++i) part += bin_mass(bins, top - share * c.lane - ((i + c.lane) & (share - 1)));
    unsigned long long before = above + warp_inclusive_scan(part) - part;
    uint32_t reaches = __ballot_sync(~0u, before < need && before + part >= need);
    if (reaches == 0) return -1;
    const int owner = __ffs(reaches) - 1, bin = top - share * owner - min(c.lane, share - 1);
    part = c.lane < share ? bin_mass(bins, bin) : 0;
    before = __shfl_sync(~0u, before, owner) + warp_inclusive_scan(part) - part;
    reaches = __ballot_sync(~0u, before < need && before + part >= need);
    above = __shfl_sync(~0u, before, __ffs(reaches) - 1);
    return __shfl_sync(~0u, bin, __ffs(reaches) - 1);
  }

  // The bins of all rows and the numbers of weights found, clear before the cluster meets and between rounds.
  __device__ __forceinline__ void clear_row_bins() const {
    clear_histograms(c, s.bins);
    if (c.tid() < RP) s.state.found_size[c.tid()] = 0;
  }

  // Thresholds of this block's rows: the largest weight whose mass, with everything above, reaches p. The block's warps
  // divide among its rows. Each round narrows a row down to one of its bins, until 32 lanes hold what is left, or it is
  // all the same.
  __device__ void solve_rows() const {
    const int team = kWarps / solved_rows(), local = c.warp / team, member = c.warp - local * team;
    const int row = local * c.cluster.size + c.cluster.rank;
    const int first_part = local * row_parts(), end_part = first_part + row_parts();
    uint32_t* bins = row_bins(row);
    uint32_t* found = s.last_weights + local * 32;
    unsigned long long total = 0;
    bool fits = true;
#pragma unroll 1
    for (int i = first_part + c.lane; i < end_part; i += 32) {
      total += s.state.part_mass[i];
      fits &= s.state.part_size[i] <= part_capacity();
    }
    total = warp_sum(total);
    fits = __all_sync(~0u, fits);
    unsigned long long need = 0;
    bool open = row < c.rows && total != 0 && !isnan(s.state.norm[row % RP]);
    if (open) {
      const double top_p = row_top_p(c, row);
      open = top_p < 1.0;
      need = max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    }
    if (row < c.rows && member == 0) {
      if (!open) publish_threshold(row, 0.0f, 1.0f);
      if (c.lane == 0) s.state.from_all[row] = open && !fits;
    }
    open = open && fits;

    uint32_t low_key = 0, width = 0;  // of what is left
    int shift = kLog2RowKeys - log2_row_bins();
    unsigned long long above = 0;
#pragma unroll 1
    for (bool first_round = true;; first_round = false) {
      if (open) {
        each_listed(first_part + member, end_part, team, [&](float w) {
          const uint32_t key = __float_as_uint(w);
          if (!first_round && key - low_key >= width) return;
          const uint2 mass = split_mass(w);
          const uint32_t bin = (first_round ? max(key, kLowRowKey) - kLowRowKey : key - low_key) >> shift;
          atomicAdd(&bins[2 * bin], mass.x);
          atomicAdd(&bins[2 * bin + 1], mass.y);
        });
      }
      sync_block("masses added to bins");
      if (open) {
        const int bin = find_row_bin(bins, above, need);
        open = bin >= 0;
        if (!open && member == 0 && c.lane == 0) s.state.from_all[row] = true;
        if (open) {
          const uint32_t start = first_round ? kLowRowKey : low_key;
          const bool lowest = first_round && bin == 0;
          low_key = lowest ? 0 : start + (static_cast<uint32_t>(bin) << shift);
          width = lowest ? start + (1u << shift) : 1u << shift;
          shift = max(0, 32 - log2_row_bins() - __clz(width - 1));
          each_listed(first_part + member, end_part, team, [&](float w) {
            if (__float_as_uint(w) - low_key >= width) return;
            const uint32_t at = atomicAdd(&s.state.found_size[local], 1u);
            if (at < 32) found[at] = __float_as_uint(w);
          });
        }
      }
      sync_block("weights of the bin found");
      if (open) {
        const int count = s.state.found_size[local];
        open = count > 32 && width > 1;
        if (!open && member == 0) finish_row(row, low_key, count, found, above, need, total);
      }
      if (!__syncthreads_or(open)) break;
      clear_row_bins();
      sync_block("bins clear again");
    }
#pragma unroll 1
    for (int r = c.cluster.rank; r < c.rows; r += c.cluster.size) {
      if (s.state.from_all[r]) solve_row_from_all(r);
    }
  }

  // One warp picks a row's threshold among `count` weights of which 32 are listed: more are all the same.
  __device__ void finish_row(int row, uint32_t low_key, int count, const uint32_t* found, unsigned long long above,
                             unsigned long long need, unsigned long long total) const {
    if (count > 32) {
      above += count * mass_of(__uint_as_float(low_key));
    } else {
      const uint32_t key = c.lane < count ? found[c.lane] : 0;
      const unsigned long long mass = c.lane < count ? mass_of(__uint_as_float(key)) : 0;
      unsigned long long reached = above;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const unsigned long long other = __shfl_sync(~0u, mass, i);
        reached += __shfl_sync(~0u, key, i) >= key ? other : 0;
      }
      low_key = c.lane < count && reached >= need ? key : 0;
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) low_key = max(low_key, __shfl_xor_sync(~0u, low_key, mask));
      above = __shfl_sync(~0u, reached, __ffs(__ballot_sync(~0u, c.lane < count && key == low_key)) - 1);
    }
    publish_threshold(row, __uint_as_float(low_key), captured_share(above, total));
  }

  // The same from all estimates of the cluster, by the whole block.
  __device__ void solve_row_from_all(int row) const {
    const float norm = s.state.norm[row];
    const double top_p = row_top_p(c, row);
    const float floor = floor_weight(top_p, total_slots);
    const int parts = row_parts(), first_part = row / c.cluster.size * parts;
    unsigned long long total = 0;
    for (int i = 0; i < parts; ++i) total += s.state.part_mass[first_part + i];
    const unsigned long long need =
        max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    uint32_t low_key = 0;
    int log2_width = 32;
    unsigned long long above = 0;
    for (;;) {
      clear_histograms(c, s.bins);
      if (c.tid() == 0) s.state.listed = 0;
      sync_block("bins clear");
      const bool first_round = log2_width == 32;
      const int shift = max(0, log2_width - 10);
      // Of the first round every weight that can matter by its bin, then those of one bin, which are listed too.
#pragma unroll 1
      for (int owner = 0; owner < c.cluster.size; ++owner) {
        const int count = c.cluster.read(&s.state.published_slots, owner);
#pragma unroll 1
        for (int i = c.tid(); i < count; i += kThreads) {
          const float w = weight(c.cluster.read(estimates + row * c.p.slot_capacity + i, owner), norm);
          const uint32_t key = __float_as_uint(w);
          if (first_round) {
            if (w >= floor) atomicAdd(&mass_bins()[WeightBins::of(key)], mass_of(w));
          } else if (key >= low_key && (key - low_key) >> log2_width == 0) {
            const uint32_t at = atomicAdd(&s.state.listed, 1u);
            if (at < kBoundaryList) boundary_list()[at] = w;
            atomicAdd(&mass_bins()[(key - low_key) >> shift], mass_of(w));
          }
        }
      }
      sync_block("masses counted");
      if (!first_round && (s.state.listed <= kBoundaryList || log2_width == 0)) break;
      // Thread i adds up bins 1023 - 4i .. 1020 - 4i and finds the one where the mass passes `need`.
      unsigned long long bin_mass[4], part = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) part += bin_mass[i] = mass_bins()[kMassBins - 1 - 4 * c.tid() - i];
      unsigned long long all;
      unsigned long long before = above + block_exclusive_scan(part, s.scan_totals, all);
      if (before < need && before + part >= need) {
        int i = 0;
        while (before + bin_mass[i] < need) before += bin_mass[i++];
        s.state.bin = kMassBins - 1 - 4 * c.tid() - i;
        s.state.mass_above = before;
      }
      sync_block("bin of the mass found");
      const int bin = s.state.bin;
      above = s.state.mass_above;
      low_key = first_round ? WeightBins::first_key(bin) : low_key + (static_cast<uint32_t>(bin) << shift);
      log2_width = first_round ? WeightBins::log2_width(bin) : shift;
      sync_block("bin read");
    }
    finish_row_from_all(row, low_key, above, need, total);
  }

  // Of a row that is solved from all estimates.
  __device__ __forceinline__ View<float> boundary_list() const { return s.last_weights.template as<float>(); }
  __device__ __forceinline__ View<unsigned long long> mass_bins() const {
    return s.bins.template as<unsigned long long>();
  }

  // All candidates for the threshold lie in one short list, or share one key.
  __device__ void finish_row_from_all(int row, uint32_t low_key, unsigned long long above, unsigned long long need,
                                      unsigned long long total) const {
    const int count = s.state.listed;
    if (c.tid() == 0) s.state.mass_key = 0;
    sync_block("key clear");
    if (count > kBoundaryList) {
      const unsigned long long mass =
          above + static_cast<unsigned long long>(count) * mass_of(__uint_as_float(low_key));
      if (c.warp == 0) publish_threshold(row, __uint_as_float(low_key), captured_share(mass, total));
      return;
    }
    const float* list = boundary_list();
    unsigned long long reached = above;
    if (c.tid() < count) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) reached += list[i] >= list[c.tid()] ? mass_of(list[i]) : 0;
      if (reached >= need) atomicMax(&s.state.mass_key, __float_as_uint(list[c.tid()]));
    }
    sync_block("key found");
    if (c.tid() < count && __float_as_uint(list[c.tid()]) == s.state.mass_key)
      atomicExch(&s.state.mass_captured, reached);
    sync_block("mass found");
    if (c.warp == 0)
      publish_threshold(row, __uint_as_float(s.state.mass_key), captured_share(s.state.mass_captured, total));
    sync_block("row done");
  }

  __device__ __forceinline__ void publish_threshold(int row, float threshold, float captured) const {
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
  thresholds.clear_row_bins();
  if (c.tid() == 0) storage.state.published_slots = candidates.count;
  if (shadow.lead_words % Estimator<C>::kChunks == 0) {
    estimator.template estimate<true>();
  } else {
    estimator.template estimate<false>();
  }
  TWILIGHT_PHASE("weights estimated");
  c.cluster.sync("sums of weights handed out");
  read_norms(c, sums, storage.state.norm);
  TWILIGHT_PHASE("weights normalized");
  thresholds.list_weights();
  c.cluster.sync("weights listed");
  TWILIGHT_PHASE("weights listed");
  thresholds.solve_rows();
  c.cluster.sync("thresholds sent");
  TWILIGHT_PHASE("thresholds found");
}

// Starts to bring the key and the value of a row to the L2 cache.
template <class C>
__device__ __forceinline__ void prefetch_row(const C& c, uint32_t row) {
  using T = typename C::T;
  const int64_t at = static_cast<int64_t>(row) * C::D;
#pragma unroll
  for (int d = 0; d < C::D; d += 64) {
    prefetch_line(static_cast<const T*>(c.p.k_cache) + at + d);
    prefetch_line(static_cast<const T*>(c.p.v_cache) + at + d);
  }
}

// Lists this block's survivors, slots whose weight reaches any row's threshold, sinks and recent tokens, and returns
// how many they are.
template <class C>
__device__ int list_survivors(const C& c, const Candidates<C>& candidates, View<float> estimates,
                              const ThresholdState<C::RP>& found, unsigned long long* scan_totals,
                              const Survivors& survivors) {
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
      if (keep) prefetch_row(c, entry.x);  // it is read as soon as the list is complete
      const uint32_t bits = __ballot_sync(~0u, keep);
      if (c.lane == word) own = bits;
    }
    // The list takes the place of estimates that were looked at before.
    int to = count + block_exclusive_scan<uint32_t>(__popc(own), scan_totals, total);
    count += total;
#pragma unroll 1
    for (; own != 0; own &= own - 1) survivors.slots[to++] = (first_word + c.lane) * 32 + __ffs(own) - 1;
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
