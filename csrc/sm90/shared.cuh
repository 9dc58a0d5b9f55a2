// Shared memory of the fused decode kernel: a fixed struct, and regions behind it that one stage leaves to the next.
// Stages get the views that they use. FusedParams says where the regions lie. A star: any block of the cluster does.
//
// region     | holds                     | written by              | read by                  | until
// -----------+---------------------------+-------------------------+--------------------------+----------------------
// queries    | query rows, operands      | load_queries            | every stage              | the end
// sums       | softmax sums of blocks    | publish_row_sum *       | read_norms, write_output | 2 cluster barriers on
// scratch    | histogram of scores       | TopK::count_scores      | find_cut *               | "candidates dealt"
//            | masses by bins of weights | count_weights           | solve_rows *             | "thresholds sent"
//            | tiles of keys and values  | TileStream              | their warp               | "tiles read"
//            | output rows of warps      | attend                  | attend                   | "partial rows sent"
//            | factors of blocks         | write_output            | write_output             | the end
// pages      | pages, tiles of the share | load_queries            | score, TopK              | "candidates dealt"
//            | tiles of the kept pages   | keep_pages              | score, TopK              | "candidates dealt"
// candidates | kept pages                | TopK *                  | keep_pages               | "tiles listed"
//            | (row, position) of units  | TopK *, list_pages      | prune                    | "survivors listed"
//            |                           | list_window             | attend *, write_kept *   | "kept rows written"
// state      | item logits, then bins    | score, count_scores     | TopK                     | "candidates dealt"
//            | logits of candidates      | Estimator               | Thresholds               | "thresholds sent"
//            |                           |                         | list_survivors           | "survivors listed"
//            | slots of survivors        | list_survivors          | attend *, write_kept *   | "kept rows written"
//
// Streamed tiles run on through every region behind scratch: a dense row uses none of them.
#pragma once

#include "params.cuh"

namespace twilight {

#ifdef __CUDACC__
extern __shared__ __align__(16) char dynamic_shared[];
#endif

template <int D, int RP, bool kReadsCodes = RP <= kMaxRows>
struct Queries {
  static constexpr int kRowChunks = D / 8;  // from a row to the next
  uint4 codes[D / 8][RP];                   // ordered channels 8w..8w+7 as fp16, in the order mma_codes4 unpacks them
  // Channels 4w..4w+3: negative part against the minima, then positive part against the maxima.
  uint2 bounds[D / 2][RP];
  uint4 rows[RP][kRowChunks];  // as the model made them
  float gain[RP], sum[RP], prefix_sum[RP];
  int horizon[RP];  // the last position a row sees
  int order[D];
};

// Half a line between rows: eight threads then read two rows from other banks.
template <int D, int RP>
struct Queries<D, RP, false> {
  static constexpr int kRowChunks = D / 8 + 4;
  uint4 rows[RP][kRowChunks];
  int horizon[RP];
};

// (peak, z) of softmax sums: of scores, of weights, of the output.
template <int RP>
struct Sums {
  float2 of_blocks[kMaxClusterSize][RP];  // each writes its own here, in every block
  float2 of_warps[kWarps][RP];
};

template <int RP>
struct TopKState {
  uint32_t group_counts[64];  // this block's histogram by groups of 32 bins; read by the cluster
  uint32_t group_total[64];
  float norm[RP];
  int bin, need;               // where the wanted items end, and how many of that bin are wanted
  int above[kMaxClusterSize];  // items of every block above the bin
  int in_bin[kMaxClusterSize];
};

template <int RP>
struct ThresholdState {
  unsigned long long part_mass[kMaxParts];  // what every counting warp of the cluster has of the rows solved here
  float norm[RP];
  float threshold[RP], captured[RP];
};

struct SurvivorState {
  int count[kMaxClusterSize];  // of every block
  int first[kMaxClusterSize + 1];
};

template <int D, int RP>
struct OutputState {
  // Partial results that the cluster's blocks leave for the outputs written here: [blocks][RP * D / blocks].
  float parts[RP * D];
  alignas(16) float rescale[kWarps][RP];
};

template <int D, int RP>
struct FusedShared {
  Queries<D, RP> queries;
  OutputState<D, RP> output;
  uint32_t scan_totals[kWarps];  // of block_exclusive_scan, which leaves it free
  Sums<RP> sums;
  TopKState<RP> top_k;
  ThresholdState<RP> thresholds;
  SurvivorState survivors;
};

// A region as an array of V. Its address is made at every use: that is cheaper than to keep it in a register.
template <typename V>
struct View {
  const int& offset;
  const int behind = 0;  // bytes
  __device__ __forceinline__ operator V*() const { return reinterpret_cast<V*>(dynamic_shared + offset + behind); }
  template <typename U>
  __device__ __forceinline__ View<U> as() const {
    return {offset, behind};
  }
};

// What the top-k works in.
template <int RP>
struct TopKStorage {
  TopKState<RP>& state;
  uint32_t* const scan_totals;
  const View<uint32_t> histogram;  // [kScoreBins]
};

// What the thresholds are found in.
template <int RP>
struct ThresholdStorage {
  ThresholdState<RP>& state;
  const View<uint32_t> bins;  // [RP][kWeightBins] masses
};

// Most tiles of kept pages that a block scores.
__device__ __forceinline__ int kept_tiles(int blocks, const FusedParams& p) {
  return tiles_of_pages(blocks_of(blocks, p.page_capacity), 1 << p.log2_page_size);
}

// Views of a block's shared memory.
template <typename T, int D, int RP>
struct Storage {
  const FusedParams& p;

  __device__ static __forceinline__ FusedShared<D, RP>& fixed() {
    return *reinterpret_cast<FusedShared<D, RP>*>(dynamic_shared);
  }
  // First rows of every 16 tokens of this block's share, or page * kv_heads + head of every page.
  __device__ __forceinline__ View<uint32_t> pages() const { return {p.pages_at}; }
  // Behind the first rows of tiles of kept pages: their first positions.
  __device__ __forceinline__ View<int> tile_tokens() const {
    return {p.pages_at, static_cast<int>(sizeof(uint32_t)) * kept_tiles(Cluster::current().size, p)};
  }
  // (first row, first position) of pages or tokens.
  __device__ __forceinline__ View<uint2> candidates() const { return {p.candidates_at}; }
  // [items][Scores::kStride] base-2 logits, then bins.
  __device__ __forceinline__ View<float> scores() const { return {p.state_at}; }
  __device__ __forceinline__ View<float> estimates() const { return {p.state_at}; }  // [RP][slot_capacity] logits
  __device__ __forceinline__ View<int> survivors() const { return {p.state_at}; }    // slots
  __device__ __forceinline__ View<uint4> streamed_tiles() const { return {p.scratch_at}; }
  __device__ __forceinline__ View<float> warp_rows() const { return {p.scratch_at}; }  // [kWarps][RP][D]
  __device__ __forceinline__ TopKStorage<RP> top_k() const {
    return {fixed().top_k, fixed().scan_totals, {p.scratch_at}};
  }
  __device__ __forceinline__ ThresholdStorage<RP> thresholds() const { return {fixed().thresholds, {p.scratch_at}}; }
};

}  // namespace twilight
