// Estimated weights of the fused decode kernel from all 4-bit channels, the exact top-p, and the survivors.
#pragma once

#include "fused_selection.cuh"

namespace twilight {
namespace {

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedPruner : FusedSelection<T, D, RP, kSelector> {
  using Base = FusedSelection<T, D, RP, kSelector>;
  using Base::accumulate, Base::clear_histograms, Base::cluster, Base::estimates, Base::fold, Base::g, Base::head,
      Base::histogram, Base::kCopies, Base::kScales, Base::kWords, Base::kept, Base::lane, Base::last_weights,
      Base::lead_word, Base::lead_words, Base::live, Base::load_codes, Base::load_scale, Base::mass_histogram, Base::p,
      Base::page_size, Base::publish_sums, Base::read_norms, Base::resolve, Base::rest_word, Base::row_of_column,
      Base::rows, Base::s, Base::sequence, Base::slot_count, Base::slot_in_page, Base::t, Base::tid, Base::warp,
      Base::weight_list;

  __device__ explicit FusedPruner(const FusedParams& params) : Base(params) {}

  static constexpr int kEstimateTiles = 4;
  static constexpr int kChunks = D / 32;  // words of codes a row that one thread reads
  static constexpr int kEstimateColumns = kCopies < kEstimateTiles ? kCopies : kEstimateTiles;
  static constexpr int kEstimateSets = kEstimateTiles / kEstimateColumns;  // of tiles that share one accumulator
  // Candidates come by pages of whole tiles, or one by one.
  static constexpr bool kByTile = kSelector != FusedSelector::kShadowPrefix;
  // Of `at` items behind a tile of candidate slots, one of this block's; of the last one's behind that.
  __device__ __forceinline__ uint2 candidate(int tile, int at) const {
    if (!kByTile) return resolve(min(tile + at, slot_count - 1));
    const uint2 first_of_tile = resolve(min(tile, (slot_count - 1) & -kTileTokens));
    return make_uint2(first_of_tile.x + at, first_of_tile.y + at);
  }
  // Of a column of the products: the tile of four, the candidate in it.
  __device__ __forceinline__ int estimate_tile(int set, int k) const {
    return set * kEstimateColumns + (RP == 1 ? 2 * (t & 1) + k : 2 * t / RP);
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
    const bool leads = kChunks * t < lead_words;
    const int stride = leads ? lead_words : kWords - lead_words;
    const int begin = kChunks * t + (leads ? 0 : (page_size() - 1) * lead_words);
#pragma unroll
    for (int u = 0; u < kEstimateTiles; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = candidate(base + u * kTileTokens, g + 8 * half).x, slot = slot_in_page(row);
        uint32_t (&words)[kChunks] = codes.words[u][half];
        if (kQuarters) {
          const uint32_t* from =
              reinterpret_cast<const uint32_t*>(p.k_quant) + ((row - slot) * kWords + slot * stride + begin);
          if (kChunks == 4) {
            const uint4 v = load_stream(from);
            words[0] = v.x, words[1] = v.y;
            words[kChunks - 2] = v.z, words[kChunks - 1] = v.w;
          } else {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from));
            words[0] = v.x, words[1] = v.y;
          }
        } else {
          const uint32_t lead = lead_word(row), rest = rest_word(row) - lead_words;
#pragma unroll
          for (int j = 0; j < kChunks; ++j) {
            const int word = 4 * j + t;
            words[j] = load_codes((word < lead_words ? lead : rest) + word);
          }
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
      for (int e = 0; e < kScales; ++e) {
        codes.scale[set][e] = load_scale(candidate(base + estimate_tile(set, e >> 1) * kTileTokens, g + 8 * (e & 1)).x);
      }
    }
  }

  // Base-2 logits of this block's candidate slots from all channels; a warp takes 64 slots at a time, four tiles of 16,
  // and loads the next 64 before it adds up these.
  template <bool kQuarters>
  __device__ void estimate() {
    constexpr int kEstimateSums = RP == 1 ? kEstimateTiles : kEstimateSets;
    constexpr int kStep = kWarps * kEstimateTiles * kTileTokens;
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2];
    int horizon[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int row = row_of_column(k);
      gain[k] = s.gain[row];
      zero_gain[k] = s.q_sum[row];
      horizon[k] = s.horizon[row];
    }
    const bool column = RP > 1 || t < 2;
    CandidateCodes codes;
    int base = warp * kEstimateTiles * kTileTokens;
    if (base < slot_count) load_candidates<kQuarters>(codes, base);
#pragma unroll 1
    for (; base < slot_count; base += kStep) {
      float acc[kEstimateSums][4] = {};
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        const uint4 q = s.q_codes[kQuarters ? kChunks * t + j : 4 * j + t][g % RP];
#pragma unroll
        for (int u = 0; u < kEstimateTiles; ++u) {
          const bool mine = g / RP == u % kEstimateColumns;
          mma_codes4(acc[u * kEstimateSums / kEstimateTiles], codes.words[u][0][j], codes.words[u][1][j],
                     make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
        }
      }
      uint32_t packed[kEstimateSets][kScales];
#pragma unroll
      for (int i = 0; i < kEstimateSets * kScales; ++i) {
        packed[i / kScales][i % kScales] = codes.scale[i / kScales][i % kScales];
      }
      if (base + kStep < slot_count) load_candidates<kQuarters>(codes, base + kStep);
      if (RP == 1) fold(acc);
      float value[2][2 * kEstimateSets];
#pragma unroll
      for (int set = 0; set < kEstimateSets; ++set) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int tile = base + estimate_tile(set, k) * kTileTokens, at = g + 8 * half;
            const float2 scale = scale_and_zero(packed[set][RP == 1 ? 2 * k + half : half]);
            const bool there = column && tile + at < slot_count;
            float logit = fmaf(scale.x, acc[set][2 * half + k] * gain[k], scale.y * zero_gain[k]);
            if (!there || static_cast<int>(candidate(tile, at).y) > horizon[k]) logit = -infinity();
            if (column && tile + at < round_up(slot_count, 4)) {  // they are read by fours
              estimates()[row_of_column(k) * p.slot_capacity + tile + at] = logit;
            }
            value[k][2 * set + half] = logit;
          }
        }
      }
      accumulate(sum[0], value[0]);
      accumulate(sum[1], value[1]);
    }
    publish_sums(sum);
  }

  __device__ __forceinline__ float weight(float logit, float norm) const {
    return fminf(exp2_fast(logit - norm), 1.0f);
  }

  // p of one query row, at least 0; 1 keeps everything.
  __device__ __forceinline__ double row_top_p(int row) const {
    if (p.head_top_p == nullptr) return p.top_p;
    const int query_head = head * p.group_size + row % p.group_size;
    const float given = p.head_top_p[sequence * p.top_p_stride_batch + query_head * p.top_p_stride_head];
    return isnan(given) ? 1.0 : fmin(fmax(static_cast<double>(given), 0.0), 1.0);
  }

  // Weights below (1 - p) / N of the total add up to less than what may be left out, so none of them is the threshold.
  __device__ __forceinline__ float floor_weight(double top_p, int total_slots) const {
    const float floor = static_cast<float>((1.0 - top_p) * 0.99) / total_slots;
    return floor < 0x1p-30f ? 0.0f : floor;
  }

  // The mass of a weight, floor(w * 2^40), as its upper and its lower 20 bits: integers add up to the same in any
  // order.
  __device__ __forceinline__ uint2 split_mass(float w) const {
    const float high = fma_rz(w, 0x1p20f, 0x1p23f);
    const float low = fma_rz(fmaf(w, 0x1p20f, 0x1p23f - high), 0x1p20f, 0x1p23f);
    return make_uint2(__float_as_uint(high) - 0x4b000000u, __float_as_uint(low) - 0x4b000000u);
  }
  __device__ __forceinline__ unsigned long long joined_mass(uint2 mass) const {
    return (static_cast<unsigned long long>(mass.x) << 20) + mass.y;
  }
  __device__ __forceinline__ unsigned long long mass_of(float w) const { return joined_mass(split_mass(w)); }

  // Row r is solved by block r % cluster.size, as the (r / cluster.size)-th of its rows; kRowWarps warps of every block
  // list weights for it.
  static constexpr int kRowWarps = kWarps / RP;
  __device__ __forceinline__ int row_parts() const { return cluster.size * kRowWarps; }
  __device__ __forceinline__ int solved_rows() const { return blocks_of(cluster.size, RP); }
  __device__ __forceinline__ int part_capacity() const { return p.list_capacity / (solved_rows() * row_parts()); }

  // Bins of a row: down from 2, at least an eighth of an octave each in the first round. The rows that a block solves
  // divide kRowBins, and each holds the upper and the lower halves of its mass.
  static_assert(kRowBins / RP >= 32, "a bin for every lane that looks for the threshold's");
  static constexpr uint32_t kLowRowKey = 96u << 23;  // 2^-31
  static constexpr int kLog2RowKeys = 28;            // from there to 2
  __device__ __forceinline__ int log2_row_bins() const { return 31 - __clz(kRowBins / solved_rows()); }
  __device__ __forceinline__ uint32_t* row_bins(int row) const {
    return histogram() + ((row / cluster.size) << (log2_row_bins() + 1));
  }
  __device__ __forceinline__ unsigned long long bin_mass(const uint32_t* bins, int bin) const {
    return joined_mass(*reinterpret_cast<const uint2*>(bins + 2 * bin));
  }

  // Adds up this block's masses, a warp one row, and sends the weights that can be thresholds to the row's solver. The
  // lists start at four times the floor, which leaves them short; should they not reach p, or not fit, the row is
  // solved from all estimates.
  __device__ void list_weights(int total_slots) {
    const int row = warp % RP, part = warp / RP, solver = row % cluster.size;
    const int index = (row / cluster.size * cluster.size + cluster.rank) * kRowWarps + part;
    const int capacity = part_capacity();
    const float norm = s.weight_norm[row];
    const float listed_from = row < rows ? 4.0f * floor_weight(row_top_p(row), total_slots) : 2.0f;  // above any weight
    const float4* estimate = reinterpret_cast<const float4*>(estimates() + row * p.slot_capacity);
    const ClusterArray<float> list(weight_list() + index * capacity, solver);
    uint2 total = make_uint2(0, 0);
    int listed = 0;
    constexpr int kVectors = 2, kStep = 32 * kRowWarps;  // of four slots
    const int vectors = blocks_of(4, slot_count);
#pragma unroll 1
    for (int base = part * 32; base < vectors; base += kVectors * kStep) {
      float w[kVectors][4];
      int own = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int at = base + v * kStep + lane;
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
    if (lane == 0) {
      cluster.write(&s.part_mass[index], solver, mass);
      cluster.write(&s.part_size[index], solver, listed);
    }
  }

  // Shows `place` the listed weights of every `stride`-th part from `part`.
  template <typename Place>
  __device__ __forceinline__ void each_listed(int part, int end, int stride, const Place& place) const {
    const int capacity = part_capacity();
#pragma unroll 1
    for (; part < end; part += stride) {
      const int size = s.part_size[part];
#pragma unroll 1
      for (int i = lane; i < size; i += 32) place((weight_list() + part * capacity)[i]);
    }
  }

  // The bin where a row's mass reaches `need`, or -1, and the mass above it, by one warp: the lanes' shares of the
  // bins, each read from a place of its own so that they meet in no bank, then the bins of one share.
  __device__ int find_row_bin(const uint32_t* bins, unsigned long long& above, unsigned long long need) const {
    const int share = 1 << (log2_row_bins() - 5), top = 32 * share - 1;
    unsigned long long part = 0;
#pragma unroll 4
    for (int i = 0; i < share; ++i) part += bin_mass(bins, top - share * lane - ((i + lane) & (share - 1)));
    unsigned long long before = above + warp_inclusive_scan(part) - part;
    uint32_t reaches = __ballot_sync(~0u, before < need && before + part >= need);
    if (reaches == 0) return -1;
    const int owner = __ffs(reaches) - 1, bin = top - share * owner - min(lane, share - 1);
    part = lane < share ? bin_mass(bins, bin) : 0;
    before = __shfl_sync(~0u, before, owner) + warp_inclusive_scan(part) - part;
    reaches = __ballot_sync(~0u, before < need && before + part >= need);
    above = __shfl_sync(~0u, before, __ffs(reaches) - 1);
    return __shfl_sync(~0u, bin, __ffs(reaches) - 1);
  }

  // The bins of all rows and the numbers of weights found, clear before the cluster meets and between rounds.
  __device__ __forceinline__ void clear_row_bins() {
    clear_histograms();
    if (tid() < RP) s.found_size[tid()] = 0;
  }

  // Thresholds of this block's rows: the largest weight whose mass, with everything above, reaches p. The block's warps
  // divide among its rows. Each round narrows a row down to one of its bins, until 32 lanes hold what is left, or it is
  // all the same.
  __device__ void solve_rows(int total_slots) {
    const int team = kWarps / solved_rows(), local = warp / team, member = warp - local * team;
    const int row = local * cluster.size + cluster.rank;
    const int first_part = local * row_parts(), end_part = first_part + row_parts();
    uint32_t* bins = row_bins(row);
    uint32_t* found = last_weights() + local * 32;
    unsigned long long total = 0;
    bool fits = true;
#pragma unroll 1
    for (int i = first_part + lane; i < end_part; i += 32) {
      total += s.part_mass[i];
      fits &= s.part_size[i] <= part_capacity();
    }
    total = warp_sum(total);
    fits = __all_sync(~0u, fits);
    unsigned long long need = 0;
    bool open = row < rows && total != 0 && !isnan(s.weight_norm[row % RP]);
    if (open) {
      const double top_p = row_top_p(row);
      open = top_p < 1.0;
      need = max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    }
    if (row < rows && member == 0) {
      if (!open) publish_threshold(row, 0.0f, 1.0f);
      if (lane == 0) s.from_all[row] = open && !fits;
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
      __syncthreads();
      if (open) {
        const int bin = find_row_bin(bins, above, need);
        open = bin >= 0;
        if (!open && member == 0 && lane == 0) s.from_all[row] = true;
        if (open) {
          const uint32_t start = first_round ? kLowRowKey : low_key;
          const bool lowest = first_round && bin == 0;
          low_key = lowest ? 0 : start + (static_cast<uint32_t>(bin) << shift);
          width = lowest ? start + (1u << shift) : 1u << shift;
          shift = max(0, 32 - log2_row_bins() - __clz(width - 1));
          each_listed(first_part + member, end_part, team, [&](float w) {
            if (__float_as_uint(w) - low_key >= width) return;
            const uint32_t at = atomicAdd(&s.found_size[local], 1u);
            if (at < 32) found[at] = __float_as_uint(w);
          });
        }
      }
      __syncthreads();
      if (open) {
        const int count = s.found_size[local];
        open = count > 32 && width > 1;
        if (!open && member == 0) finish_row(row, low_key, count, found, above, need, total);
      }
      if (!__syncthreads_or(open)) break;
      clear_row_bins();
      __syncthreads();
    }
#pragma unroll 1
    for (int r = cluster.rank; r < rows; r += cluster.size) {
      if (s.from_all[r]) solve_row_from_all(r, total_slots);
    }
  }

  // One warp picks a row's threshold among `count` weights of which 32 are listed: more are all the same.
  __device__ void finish_row(int row, uint32_t low_key, int count, const uint32_t* found, unsigned long long above,
                             unsigned long long need, unsigned long long total) {
    if (count > 32) {
      above += count * mass_of(__uint_as_float(low_key));
    } else {
      const uint32_t key = lane < count ? found[lane] : 0;
      const unsigned long long mass = lane < count ? mass_of(__uint_as_float(key)) : 0;
      unsigned long long reached = above;
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const unsigned long long other = __shfl_sync(~0u, mass, i);
        reached += __shfl_sync(~0u, key, i) >= key ? other : 0;
      }
      low_key = lane < count && reached >= need ? key : 0;
#pragma unroll
      for (int mask = 16; mask > 0; mask >>= 1) low_key = max(low_key, __shfl_xor_sync(~0u, low_key, mask));
      above = __shfl_sync(~0u, reached, __ffs(__ballot_sync(~0u, lane < count && key == low_key)) - 1);
    }
    publish_threshold(row, __uint_as_float(low_key),
                      static_cast<float>(static_cast<double>(above) / static_cast<double>(total)));
  }

  // The same from all estimates of the cluster, by the whole block.
  __device__ void solve_row_from_all(int row, int total_slots) {
    const float norm = s.weight_norm[row];
    const double top_p = row_top_p(row);
    const float floor = floor_weight(top_p, total_slots);
    const int parts = row_parts(), first_part = row / cluster.size * parts;
    unsigned long long total = 0;
    for (int i = 0; i < parts; ++i) total += s.part_mass[first_part + i];
    const unsigned long long need =
        max(static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))), 1ull);
    uint32_t low_key = 0;
    int log2_width = 32;
    unsigned long long above = 0;
    for (;;) {
      clear_histograms();
      if (tid() == 0) s.local_boundary = 0;
      __syncthreads();
      const bool first_round = log2_width == 32;
      const int shift = max(0, log2_width - 10);
      // Of the first round every weight that can matter by its bin, then those of one bin, which are listed too.
#pragma unroll 1
      for (int owner = 0; owner < cluster.size; ++owner) {
        const int slots = cluster.read(&s.published_slots, owner);
#pragma unroll 1
        for (int i = tid(); i < slots; i += kThreads) {
          const float w = weight(cluster.read(estimates() + row * p.slot_capacity + i, owner), norm);
          const uint32_t key = __float_as_uint(w);
          if (first_round) {
            if (w >= floor) atomicAdd(&mass_histogram()[WeightBins::of(key)], mass_of(w));
          } else if (key >= low_key && (key - low_key) >> log2_width == 0) {
            const uint32_t at = atomicAdd(&s.local_boundary, 1u);
            if (at < kBoundaryList) boundary_list()[at] = w;
            atomicAdd(&mass_histogram()[(key - low_key) >> shift], mass_of(w));
          }
        }
      }
      __syncthreads();
      if (!first_round && (s.local_boundary <= kBoundaryList || log2_width == 0)) break;
      // Thread i adds up bins 1023 - 4i .. 1020 - 4i and finds the one where the mass passes `need`.
      unsigned long long bin_mass[4], part = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) part += bin_mass[i] = mass_histogram()[kMassBins - 1 - 4 * tid() - i];
      unsigned long long all;
      unsigned long long before = above + block_exclusive_scan(part, s.scan_totals, all);
      if (before < need && before + part >= need) {
        int i = 0;
        while (before + bin_mass[i] < need) before += bin_mass[i++];
        s.bin = kMassBins - 1 - 4 * tid() - i;
        s.mass_above = before;
      }
      __syncthreads();
      const int bin = s.bin;
      above = s.mass_above;
      low_key = first_round ? WeightBins::first_key(bin) : low_key + (static_cast<uint32_t>(bin) << shift);
      log2_width = first_round ? WeightBins::log2_width(bin) : shift;
      __syncthreads();
    }
    finish_row_from_all(row, low_key, above, need, total);
  }

  // Shares space with the bitmaps, which are idle while thresholds are sought.
  __device__ __forceinline__ float* boundary_list() { return reinterpret_cast<float*>(last_weights()); }

  // All candidates for the threshold lie in one short list, or share one key.
  __device__ void finish_row_from_all(int row, uint32_t low_key, unsigned long long above, unsigned long long need,
                                      unsigned long long total) {
    const int count = s.local_boundary;
    if (tid() == 0) s.mass_key = 0;
    __syncthreads();
    if (count > kBoundaryList) {
      const unsigned long long mass =
          above + static_cast<unsigned long long>(count) * mass_of(__uint_as_float(low_key));
      if (warp == 0)
        publish_threshold(row, __uint_as_float(low_key),
                          static_cast<float>(static_cast<double>(mass) / static_cast<double>(total)));
      return;
    }
    const float* list = boundary_list();
    unsigned long long reached = above;
    if (tid() < count) {
#pragma unroll 1
      for (int i = 0; i < count; ++i) reached += list[i] >= list[tid()] ? mass_of(list[i]) : 0;
      if (reached >= need) atomicMax(&s.mass_key, __float_as_uint(list[tid()]));
    }
    __syncthreads();
    if (tid() < count && __float_as_uint(list[tid()]) == s.mass_key) atomicExch(&s.mass_captured, reached);
    __syncthreads();
    if (warp == 0)
      publish_threshold(row, __uint_as_float(s.mass_key),
                        static_cast<float>(static_cast<double>(s.mass_captured) / static_cast<double>(total)));
    __syncthreads();
  }

  __device__ __forceinline__ void publish_threshold(int row, float threshold, float captured) {
    if (lane < cluster.size) {
      cluster.write(&s.threshold[row], lane, threshold);
      cluster.write(&s.captured[row], lane, captured);
    }
  }

  // Estimates this block's candidates; every block learns every row's threshold.
  __device__ void find_thresholds(int total_slots) {
    clear_row_bins();
    if (lead_words % kChunks == 0) {
      estimate<true>();
    } else {
      estimate<false>();
    }
    // phase: weights estimated
    cluster.sync();
    read_norms(s.weight_norm);
    // phase: weights normalized
    list_weights(total_slots);
    cluster.sync();
    // phase: weights listed
    solve_rows(total_slots);
    cluster.sync();
    // phase: thresholds found
  }

  // Starts to bring the key and the value of a candidate slot to the L2 cache.
  __device__ __forceinline__ void prefetch_row(int slot) const {
    const int64_t row = static_cast<int64_t>(resolve(slot).x) * D;
#pragma unroll
    for (int d = 0; d < D; d += 64) {
      prefetch_line(static_cast<const T*>(p.k_cache) + row + d);
      prefetch_line(static_cast<const T*>(p.v_cache) + row + d);
    }
  }

  // Lists this block's survivors, slots whose weight reaches any row's threshold, sinks and recent tokens, and returns
  // how many they are.
  __device__ int list_survivors() {
    const int word_count = blocks_of(32, slot_count);
    // A logit tells what its weight is: at least the threshold, below it, or so near that the weight itself must say.
    bool keeps_all = false;
    float low[RP], high[RP];
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      const float norm = s.weight_norm[r], threshold = r < rows ? s.threshold[r] : 2.0f;  // no weight reaches 2
      const float logit = norm + __log2f(threshold), margin = 1e-4f + fabsf(norm) * 0x1p-21f;
      keeps_all |= threshold == 0.0f;
      low[r] = r < rows ? logit - margin : infinity();
      high[r] = r < rows ? logit + margin : infinity();
    }
    // A warp takes up to 32 words of slots in a row, and each of its lanes one of these words.
    int count = 0;
#pragma unroll 1
    for (int start = 0; start < word_count; start += 32 * kWarps) {
      const int words = min(blocks_of(kWarps, word_count - start), 32), first_word = start + warp * words;
      uint32_t own = 0, total;
#pragma unroll 1
      for (int word = 0; word < words; ++word) {
        const int at = (first_word + word) * 32 + lane, slot = min(at, slot_count - 1);
        const int position = resolve(slot).y;
        bool keep = keeps_all || position < p.sink_tokens || position >= live - p.recent_tokens, near = false;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          const float logit = estimates()[r * p.slot_capacity + slot];
          near |= logit >= low[r];
          keep |= logit >= high[r];
        }
        if (near && !keep) {
#pragma unroll 1
          for (int r = 0; r < rows; ++r) {
            keep |= weight(estimates()[r * p.slot_capacity + slot], s.weight_norm[r]) >= s.threshold[r];
          }
        }
        keep &= position < live && at < slot_count;
        if (keep) prefetch_row(slot);  // it is read as soon as the list is complete
        const uint32_t bits = __ballot_sync(~0u, keep);
        if (lane == word) own = bits;
      }
      // The list takes the place of estimates that were looked at before.
      int to = count + block_exclusive_scan<uint32_t>(__popc(own), s.scan_totals_small, total);
      count += total;
#pragma unroll 1
      for (; own != 0; own &= own - 1) kept()[to++] = (first_word + lane) * 32 + __ffs(own) - 1;
    }
    if (tid() < cluster.size) cluster.write(&s.kept_count[cluster.rank], tid(), count);
    __syncthreads();
    return count;
  }

  // Survivors before each block; returns how many there are in all.
  __device__ int count_survivors() {
    if (warp == 0) {
      const int count = lane < cluster.size ? s.kept_count[lane] : 0;
      const int through = warp_inclusive_scan(count);
      if (lane <= kMaxClusterSize) s.kept_first[lane] = through - count;
    }
    __syncthreads();
    return s.kept_first[kMaxClusterSize];
  }
};

}  // namespace
}  // namespace twilight
