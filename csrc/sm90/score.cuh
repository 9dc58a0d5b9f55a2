// Candidate scores of the fused decode kernel: of tokens from the leading channels of the 4-bit shadow, of pages from
// their 8-bit bounds or 4-bit means.
#pragma once

#include "query.cuh"

namespace twilight {
namespace {

// What a block keeps of its items: base-2 logits of every row, rounded to levels, and, once the norms of all rows are
// known, the bin of the item's score in the place of the first.
template <class C>
struct Scores {
  static constexpr int RP = C::RP;
  // Tokens scored by several rows keep each row's level in 16 bits until the rows' softmax norms are known.
  static constexpr bool kLevels = !C::kByPage && RP > 1;
  static constexpr int kStride = kLevels ? RP / 2 : RP;
  static constexpr float kLevelZero = 12582912.0f;  // 1.5 * 2^23: a float to which levels are added as integers
  static constexpr uint32_t kLevelBits = 0x4b400000u;
  static constexpr float kLowestLevel = -256.0f;
  static constexpr uint32_t kForcedBin = kScoreBins - 1;  // above every score's

  const C& c;
  const Share share;
  const View<float> logits;  // [items][kStride]
  const float* const norm;   // [RP], what logits are lowered by
  const int left_out = 0;    // tokens of pages that are not kept

  __device__ __forceinline__ View<uint32_t> levels() const { return logits.as<uint32_t>(); }

  // Owned items in [begin, end) compete; those before are sinks, those behind the newest, and both are always taken.
  __device__ __forceinline__ int2 competing_items() const {
    const int newest = max(c.live - c.p.recent_tokens, 0) - left_out;
    const int begin = C::kByPage ? (c.p.sink_tokens + c.page_size() - 1) >> c.p.log2_page_size : c.p.sink_tokens;
    const int end = C::kByPage ? newest >> c.p.log2_page_size : newest;
    return make_int2(begin - share.first, end - share.first);
  }

  __device__ static __forceinline__ float rounded(float logit) {
    return (fmaf(logit, kLogitLevels, kLevelZero) - kLevelZero) * (1.0f / kLogitLevels);
  }

  __device__ __forceinline__ uint32_t bin_of(float score, int item, int2 competing) const {
    const uint32_t bits = min(__float_as_uint(score), 0x7f800000u);  // NaNs too
    const uint32_t bin = max(bits >> kScoreBinShift, static_cast<uint32_t>(kLowestScoreBin));
    const uint32_t distance = item - competing.x, span = max(competing.y - competing.x, 0);
    return distance < span ? bin : kForcedBin;
  }

  // Of one owned item; its score is the sum over the rows of its softmax.
  __device__ __forceinline__ uint32_t make_bin(int item, int2 competing, const float (&norms)[RP]) const {
    float score = 0.0f;
    if (kLevels) {
      const uint32_t* words = levels() + item * kStride;
#pragma unroll
      for (int i = 0; i < kStride; i += 2) {
        const uint2 four = *reinterpret_cast<const uint2*>(words + i);
        const uint32_t pair[2] = {four.x, four.y};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float level = __uint_as_float(__byte_perm(pair[r / 2], kLevelBits, r & 1 ? 0x7632 : 0x7610));
          score +=
              exp2_fast(fmaf(level, 1.0f / kLogitLevels, kLowestLevel - kLevelZero / kLogitLevels) - norms[2 * i + r]);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < RP; ++r) score += exp2_fast(logits[item * RP + r] - norms[r]);
    }
    return bin_of(score, item, competing);
  }

  __device__ __forceinline__ uint32_t& stored_bin(int item) const { return levels()[item * kStride]; }
};

// Scores of this block's tokens.
template <class C>
struct TokenScorer {
  static constexpr int RP = C::RP;
  static constexpr bool kLevels = Scores<C>::kLevels;
  const C& c;
  const Share share;
  const Shadow<C> shadow;
  const Queries<C::D, RP>& q;
  const View<uint32_t> tiles;   // first rows
  const View<int> tile_tokens;  // first positions, of two levels
  const Scores<C> scores;
  Sums<RP>& sums;

  // Row of one of this block's tokens; of the last tile's for tokens behind it.
  __device__ __forceinline__ uint32_t row_of(int token) const {
    return tiles[token / kTileTokens] + token % kTileTokens;
  }
  __device__ __forceinline__ int position_of(int token) const {
    return C::kTwoLevels ? tile_tokens[token / kTileTokens] + token % kTileTokens : share.first + token;
  }

  static constexpr int kTiles = kBlockTokens / kTileTokens;
  static constexpr int kScales = RP == 1 ? 4 : 2;
  // Eight tiles of tokens share RP accumulators; this thread's columns are of tile tile_of(st, k) of accumulator st.
  __device__ __forceinline__ int tile_of(int st, int k) const {
    return st * C::kCopies + (RP == 1 ? 2 * c.t + k : 2 * c.t / RP);
  }

  // Four words a row of the leading codes of 128 tokens. A thread behind a row's last word reads that: its queries are
  // 0.
  __device__ __forceinline__ void load_tiles(uint32_t (&x)[kTiles], uint32_t (&y)[kTiles], int base, int w0) const {
    const uint32_t* codes = shadow.codes() + c.g * shadow.lead_words + min(w0 + c.t, max(shadow.lead_words, 1) - 1);
    const uint32_t* later = codes + 8 * shadow.lead_words;
    const uint32_t* tile = tiles + base / kTileTokens;
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const uint32_t word = shadow.lead_word(tile[u]);
      x[u] = __ldg(codes + word);
      y[u] = __ldg(later + word);
    }
  }
  __device__ __forceinline__ void load_tile_scales(uint32_t (&packed)[RP][kScales], int base) const {
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int e = 0; e < kScales; e += 2) {
        const uint32_t row = tiles[base / kTileTokens + tile_of(st, e >> 1)];
        const uint32_t* scale = shadow.scales() + c.g + shadow.scale_word(row);
        packed[st][e] = __ldg(scale);
        packed[st][e + 1] = __ldg(scale + 8);
      }
    }
  }
  __device__ __forceinline__ uint4 queries_of(int w0) const {
    return w0 + c.t < shadow.lead_words ? q.codes[w0 + c.t][c.g % RP] : make_uint4(0, 0, 0, 0);
  }
  // Tiles whose columns end up in one accumulator are added in several: a chain of products waits for each other.
  static constexpr int kSums = RP == 1 ? 4 : RP;
  __device__ __forceinline__ void multiply_tiles(float (&acc)[kSums][4], const uint32_t (&x)[kTiles],
                                                 const uint32_t (&y)[kTiles], uint4 q) const {
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const bool mine = c.g / RP == u % C::kCopies;
      mma_codes4(acc[RP == 1 ? u % kSums : u / C::kCopies], x[u], y[u],
                 make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
    }
  }
  // Logits are summed up relative to a fixed power, which spares the search for their maximum. Sums too large or too
  // small for that are found out, and made again.
  static constexpr float kReference = 56.0f;
  __device__ __forceinline__ bool norms_usable() const {
    bool usable = true;
#pragma unroll 1
    for (int r = 0; r < c.rows; ++r) {
      const float norm = scores.norm[r];
      usable &= norm > kReference - 80.0f && norm < infinity() && norm != 0.0f;
    }
    return usable;
  }

  // Keeps the logits of 128 tokens, and adds them to the sums.
  template <bool kWhole>
  __device__ __forceinline__ void keep_logits(const float (&acc)[kSums][4], const uint32_t (&packed)[RP][kScales],
                                              int base, const float (&gain)[2], const float (&zero_gain)[2],
                                              float (&z)[2], uint32_t& outside) const {
    constexpr float kOffset =
        Scores<C>::kLevelZero + (kLevels ? (kReference - Scores<C>::kLowestLevel) * kLogitLevels : 0.0f);
    const int first_token = base + tile_of(0, 0) * kTileTokens + c.g;
    uint32_t* level_words = scores.levels() + first_token * Scores<C>::kStride + c.row_of_column(0) / 2;
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t level[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int token = base + tile_of(st, k) * kTileTokens + c.g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][RP == 1 ? 2 * k + half : half]);
          float x = fmaf(acc[st][2 * half + k], scale.x * gain[k], fmaf(scale.y, zero_gain[k], -kReference));
          if (kLevels) x = max_nan(x, Scores<C>::kLowestLevel - kReference);  // nothing of it is left in any sum
          if (!kWhole && token >= share.owned) x = Scores<C>::kLowestLevel - kReference;
          const float shifted = fmaf(x, kLogitLevels, kOffset);
          x = fmaf(shifted, 1.0f / kLogitLevels, -kOffset / kLogitLevels);
          z[k] += exp2_fast(x);
          if (kLevels) {
            level[k] = __float_as_uint(shifted);
            outside |= level[k] ^ Scores<C>::kLevelBits;
          } else if (kWhole || token < share.owned) {
            scores.logits[token] = x + kReference;
          }
        }
        const int behind = st * C::kCopies * kTileTokens + 8 * half;  // the first token
        if (kLevels && (kWhole || first_token + behind < share.owned)) {
          level_words[behind * Scores<C>::kStride] = __byte_perm(level[0], level[1], 0x5410);
        }
      }
    }
  }

  // Logits of this block's tokens from the leading channels, and their softmax sums. A warp takes 128 tokens at a time,
  // eight tiles of 16, four words of a row a step; the loads of a step precede the sums of the step before it.
  __device__ void score() const {
    float gain[2], zero_gain[2], z[2] = {};
    uint32_t outside = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = q.gain[c.row_of_column(k)];
      zero_gain[k] = q.prefix_sum[c.row_of_column(k)];
    }
    uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
    float acc[kSums][4];
    int base = 0, words = -1;  // of the step whose codes are in x and y; none yet
    int next = c.warp * kBlockTokens, next_words = 0;
#pragma unroll 1
    while (words < 0 || base < share.owned) {
      if (words == 0) {
#pragma unroll
        for (int i = 0; i < 4 * kSums; ++i) acc[i / 4][i % 4] = 0.0f;
      }
      if (words >= 0) multiply_tiles(acc, x, y, queries_of(words));
      if (next < share.owned) load_tiles(x, y, next, next_words);
      const bool done = words >= 0 && next_words == 0;
      if (done) {
        if (RP == 1) fold(acc);
        if (base + kBlockTokens <= share.owned) {
          keep_logits<true>(acc, packed, base, gain, zero_gain, z, outside);
        } else {
          keep_logits<false>(acc, packed, base, gain, zero_gain, z, outside);
        }
      }
      if (next < share.owned && next_words == 0) load_tile_scales(packed, next);
      base = next;
      words = next_words;
      next_words += 4;
      if (next_words >= shadow.lead_words) {
        next_words = 0;
        next += kWarps * kBlockTokens;
      }
    }
    SoftmaxSum sum[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      sum[k].peak = kReference;
      sum[k].z = kLevels && outside >> 16 != 0 ? __int_as_float(0x7fffffff) : z[k];
    }
    publish_sums(c, sum, sums);
  }

  // The same for logits of any size, from those kept of one row.
  __device__ void sum_kept_logits() const {
    SoftmaxSum sum[2];
#pragma unroll 1
    for (int i = c.tid(); i < share.owned; i += kThreads) {
      const float value[1] = {finite_or_masked(scores.logits[i], true)};
      sum[0].add(value);
    }
    publish_sums(c, sum, sums);
  }

  // The same for several rows in two passes over the leading codes: their sums, then the tokens' bins.
  __device__ void score_twice(bool makes_bins) const {
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2], norm[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = q.gain[c.row_of_column(k)];
      zero_gain[k] = q.prefix_sum[c.row_of_column(k)];
      norm[k] = scores.norm[c.row_of_column(k)];
    }
    const int2 competing = scores.competing_items();
#pragma unroll 1
    for (int base = c.warp * kBlockTokens; base < share.owned; base += kWarps * kBlockTokens) {
      uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
      float acc[kSums][4] = {};
      load_tile_scales(packed, base);
#pragma unroll 1
      for (int w0 = 0; w0 < shadow.lead_words; w0 += 4) {
        load_tiles(x, y, base, w0);
        multiply_tiles(acc, x, y, queries_of(w0));
      }
#pragma unroll
      for (int st = 0; st < RP; ++st) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = base + tile_of(st, 0) * kTileTokens + c.g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][half]);
          float logit[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            logit[k] = Scores<C>::rounded(fmaf(acc[st][2 * half + k], scale.x * gain[k], scale.y * zero_gain[k]));
            const float value[1] = {finite_or_masked(logit[k], token < share.owned)};
            if (!makes_bins) sum[k].add(value);
          }
          if (!makes_bins) continue;
          float score = exp2_fast(logit[0] - norm[0]) + exp2_fast(logit[1] - norm[1]);
#pragma unroll
          for (int mask = 1; mask < RP / 2; mask <<= 1) score += __shfl_xor_sync(~0u, score, mask);
          if (c.row_of_column(0) == 0 && token < share.owned)
            scores.stored_bin(token) = scores.bin_of(score, token, competing);
        }
      }
    }
    if (!makes_bins) publish_sums(c, sum, sums);
  }
};

// Scores of this block's pages.
template <class C>
struct PageScorer {
  static constexpr int D = C::D, RP = C::RP;
  const C& c;
  const Share share;
  const Queries<D, RP>& q;
  const View<uint32_t> pages;
  const Scores<C> scores;
  Sums<RP>& sums;
  const int mean_words;  // of each mean's codes that decide

  __device__ __forceinline__ uint32_t row_of(int page) const { return pages[page] << c.p.log2_page_size; }
  __device__ __forceinline__ int position_of(int page) const { return (share.first + page) << c.p.log2_page_size; }

  // Bounds are read in whole lines of 128 bytes, eight threads a line: half as many requests as of 64 bytes, which the
  // L2 cache serves no faster. So threads g and g ^ 1 share pages, each has the chunks of 16 bytes 8 l + 4 (g & 1) + t,
  // and the products of the two are added up. A tile of 16 pages is two products of 16 such halves of pages.
  static constexpr int kLines = D / 64;  // of a page
  struct Bounds {
    uint4 chunks[2][2][kLines];  // of pages 8 m + 4 i + g / 2
    uint32_t scale[2];           // of pages 8 (g & 1) + 4 i + g / 2
  };
  __device__ __forceinline__ void load_bounds(Bounds& page, int base) const {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t from = pages[base + 8 * m + 4 * i + c.g / 2];
        const uint4* bounds = c.template at<uint4>(c.p.page_bounds, from) + 4 * (c.g & 1) + c.t;
#pragma unroll
        for (int l = 0; l < kLines; ++l) page.chunks[m][i][l] = load_stream(bounds + 8 * l);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t from = pages[base + 8 * (c.g & 1) + 4 * i + c.g / 2];
      page.scale[i] = __ldg(c.template at<uint32_t>(c.p.bounds_scale, from));
    }
  }

  __device__ void score() const {
    if constexpr (C::kByMean) {
      score_means();
    } else {
      score_bounds();
    }
  }

  // Of pages base + 16 m + 8 i + g, 16 or, of 64 channels, 8 bytes of each of four threads, which together read all of
  // it.
  static constexpr int kMeanTiles = 2, kMeanWords = D / 32;
  struct Means {
    uint32_t words[kMeanTiles][2][kMeanWords];
    uint32_t scale[kMeanTiles][2];
  };
  __device__ __forceinline__ int page_of(int base, int m, int i) const { return base + kTileTokens * m + 8 * i + c.g; }
  __device__ __forceinline__ void load_means(Means& page, int base) const {
#pragma unroll
    for (int m = 0; m < kMeanTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Behind the last page that one again.
        const uint32_t from = pages[min(page_of(base, m, i), share.owned - 1)];
        const uint32_t* codes = c.template at<uint32_t>(c.p.page_means, from) + kMeanWords * c.t;
        if (kMeanWords * c.t >= mean_words) {
#pragma unroll
          for (int w = 0; w < kMeanWords; ++w) page.words[m][i][w] = 0;
        } else if constexpr (kMeanWords == 4) {
          const uint4 four = load_stream(reinterpret_cast<const uint4*>(codes));
          page.words[m][i][0] = four.x, page.words[m][i][1] = four.y;
          page.words[m][i][2] = four.z, page.words[m][i][3] = four.w;
        } else {
          const uint2 two = __ldg(reinterpret_cast<const uint2*>(codes));
          page.words[m][i][0] = two.x, page.words[m][i][1] = two.y;
        }
        page.scale[m][i] = __ldg(c.template at<uint32_t>(c.p.means_scale, from));
      }
    }
  }

  // Scores of this block's pages from their 4-bit means, the products of ShadowPrefix with a page for a token; a warp
  // takes 32 pages at a time, and loads the next before it adds up these.
  __device__ void score_means() const {
    constexpr int kStep = kMeanTiles * kTileTokens;
    SoftmaxSum sum[2];
    Means page;
    uint4 queries[kMeanWords];
    float gain[2], zero_gain[2];
#pragma unroll
    for (int i = 0; i < kMeanWords; ++i) {
      const bool read = c.g < RP && kMeanWords * c.t + i < mean_words;
      queries[i] = read ? q.codes[kMeanWords * c.t + i][c.g % RP] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = q.gain[c.row_of_column(k)];
      zero_gain[k] = mean_words < C::kWords ? q.prefix_sum[c.row_of_column(k)] : q.sum[c.row_of_column(k)];
    }
    int base = c.warp * kStep;
    if (base < share.owned) load_means(page, base);
#pragma unroll 1
    for (; base < share.owned; base += kWarps * kStep) {
      float acc[kMeanTiles][4] = {};
      float2 scale[kMeanTiles][2];
#pragma unroll
      for (int m = 0; m < kMeanTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kMeanWords; ++i) mma_codes4(acc[m], page.words[m][0][i], page.words[m][1][i], queries[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) scale[m][i] = scale_and_zero(page.scale[m][i]);
      }
      if (base + kWarps * kStep < share.owned) load_means(page, base + kWarps * kStep);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float value[2 * kMeanTiles];
#pragma unroll
        for (int n = 0; n < 2 * kMeanTiles; ++n) {
          const int m = n / 2, i = n % 2, item = page_of(base, m, i);
          const bool valid = item < share.owned && 2 * c.t + k < RP;
          const float logit =
              Scores<C>::rounded(fmaf(scale[m][i].x, acc[m][2 * i + k] * gain[k], scale[m][i].y * zero_gain[k]));
          value[n] = finite_or_masked(logit, valid);
          if (valid) scores.logits[item * RP + c.row_of_column(k)] = logit;
        }
        sum[k].add(value);
      }
    }
    publish_sums(c, sum, sums);
  }

  // Scores of this block's pages from their 8-bit bounds; a warp takes 16 pages at a time, and loads the next 16 before
  // it adds up these. Eight columns hold the queries of both halves of a page, or one half of eight rows at a time.
  __device__ void score_bounds() const {
    constexpr int kPasses = RP == 8 ? 2 : 1;
    SoftmaxSum sum[2];
    Bounds page;
    uint2 queries[kPasses][kLines][4];
    float gain[2], zero_gain[2];
#pragma unroll
    for (int h = 0; h < kPasses; ++h) {
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = RP == 8 ? h : c.g / 4, word = 4 * (8 * l + 4 * half + c.t) + i;
          queries[h][l][i] = RP == 8 || c.g % 4 < RP ? q.bounds[bounds_place(word)][c.g % RP] : make_uint2(0, 0);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = q.gain[c.row_of_column(k)];
      zero_gain[k] = q.sum[c.row_of_column(k)];
    }
    const bool second = c.g & 1;
    const bool mine = RP == 8 || c.t / 2 == (c.g & 1);  // columns of this thread's half
    int base = c.warp * kTileTokens;
    if (base < share.owned) load_bounds(page, base);
#pragma unroll 1
    for (; base < share.owned; base += kWarps * kTileTokens) {
      float acc[2][kPasses][4] = {};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int l = 0; l < kLines; ++l) {
          const uint4 x = page.chunks[m][0][l], y = page.chunks[m][1][l];
          const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int h = 0; h < kPasses; ++h) mma_codes8(acc[m][h], xs[i], ys[i], queries[h][l][i]);
          }
        }
      }
      const uint32_t packed[2] = {page.scale[0], page.scale[1]};
      if (base + kWarps * kTileTokens < share.owned) load_bounds(page, base + kWarps * kTileTokens);
      float value[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 scale = scale_and_zero(packed[i]);
        const int item = base + 8 * (c.g & 1) + 4 * i + c.g / 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          // Of this thread's pages the half it has, of the other's that it has too.
          const int at = 2 * i + k;
          const float first_pages = RP == 8 && second ? acc[0][kPasses - 1][at] : acc[0][0][at];
          const float other_pages = RP == 8 && second ? acc[1][kPasses - 1][at] : acc[1][0][at];
          const float own = second ? other_pages : first_pages, others = second ? first_pages : other_pages;
          const float product = own + __shfl_xor_sync(~0u, others, RP == 8 ? 4 : 6);
          const bool valid = item < share.owned && mine && (2 * c.t + k) % (RP == 8 ? 8 : 4) < RP;
          const float logit = Scores<C>::rounded(fmaf(scale.x, product * gain[k], scale.y * zero_gain[k]));
          value[k][i] = finite_or_masked(logit, valid);
          if (valid) scores.logits[item * RP + c.row_of_column(k)] = logit;
        }
      }
      sum[0].add(value[0]);
      sum[1].add(value[1]);
    }
    publish_sums(c, sum, sums);
  }
};

// `words` of codes decide; tokens of pages that are not kept are `left_out`.
template <class C, class Storage>
__device__ __forceinline__ auto scorer_of(const C& c, Share share, int words, int left_out, const Storage& shared) {
  auto& fixed = shared.fixed();
  const Scores<C> scores{c, share, shared.scores(), fixed.top_k.norm, left_out};
  if constexpr (C::kByPage) {
    return PageScorer<C>{c, share, fixed.queries, shared.pages(), scores, fixed.sums, words};
  } else {
    const Shadow<C> shadow{c, words};
    return TokenScorer<C>{c, share, shadow, fixed.queries, shared.pages(), shared.tile_tokens(), scores, fixed.sums};
  }
}

}  // namespace
}  // namespace twilight
