// Candidate scores of the fused decode kernel: of tokens from the leading channels of the 4-bit shadow, of pages from
// their 8-bit bounds.
#pragma once

#include "fused_block.cuh"

namespace twilight {
namespace {

template <typename T, int D, int RP, FusedSelector kSelector>
struct FusedScores : FusedBlock<T, D, RP, kSelector> {
  using Base = FusedBlock<T, D, RP, kSelector>;
  using Base::accumulate, Base::bounds_place, Base::finite_or_masked, Base::first, Base::g, Base::kByPage,
      Base::kCopies, Base::kLevels, Base::kScoreStride, Base::lead_word, Base::lead_words, Base::levels, Base::live,
      Base::load_codes, Base::load_scale, Base::owned, Base::p, Base::page_size, Base::pages, Base::publish_sums,
      Base::row_of_column, Base::rows, Base::s, Base::scores, Base::t, Base::tid, Base::tiles, Base::warp;

  __device__ explicit FusedScores(const FusedParams& params) : Base(params) {}

  // Owned items in [begin, end) compete; those before are sinks, those behind the newest, and both are always taken.
  __device__ __forceinline__ int2 competing_items() const {
    const int newest = max(live - p.recent_tokens, 0);
    const int begin = kByPage ? (p.sink_tokens + page_size() - 1) >> p.log2_page_size : p.sink_tokens;
    const int end = kByPage ? newest >> p.log2_page_size : newest;
    return make_int2(begin - first, end - first);
  }

  __device__ __forceinline__ uint32_t rank_key(float score, int item, int2 competing) const {
    const uint32_t key = min(__float_as_uint(score), kInfinityKey);  // NaNs too
    const uint32_t distance = item - competing.x, span = max(competing.y - competing.x, 0);
    return distance < span ? key : kForcedKey;
  }

  // Sortable score of one owned item: the sum over the rows of its softmax. It replaces the first of the item's logits.
  __device__ __forceinline__ uint32_t score_key(int item, int2 competing, const float (&lowered)[RP]) const {
    float score = 0.0f;
    if (kLevels) {
      const uint32_t* words = levels() + item * kScoreStride;
#pragma unroll
      for (int i = 0; i < kScoreStride; i += 2) {
        const uint2 four = *reinterpret_cast<const uint2*>(words + i);
        const uint32_t pair[2] = {four.x, four.y};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float level = __uint_as_float(__byte_perm(pair[r / 2], kLevelBits, r & 1 ? 0x7632 : 0x7610));
          score += exp2_fast(fmaf(level, 1.0f / kLevelsPerUnit, lowered[2 * i + r]));
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < RP; ++r) score += exp2_fast(scores()[item * RP + r] + lowered[r]);
    }
    return rank_key(score, item, competing);
  }

  __device__ __forceinline__ uint32_t& stored_key(int item) const {
    return reinterpret_cast<uint32_t*>(scores())[item * kScoreStride];
  }

  // Row of one of this block's tokens; of the last tile's for tokens behind it.
  __device__ __forceinline__ uint32_t token_row(int token) const {
    return tiles()[token / kTileTokens] + token % kTileTokens;
  }

  static constexpr int kTiles = kBlockTokens / kTileTokens;
  static constexpr int kScales = RP == 1 ? 4 : 2;
  // Eight tiles of tokens share RP accumulators; this thread's columns are of tile tile_of(st, k) of accumulator st.
  __device__ __forceinline__ int tile_of(int st, int k) const {
    return st * kCopies + (RP == 1 ? 2 * t + k : 2 * t / RP);
  }

  // Four words a row of the leading codes of 128 tokens. A thread behind a row's last word reads that: its queries are
  // 0.
  __device__ __forceinline__ void load_tiles(uint32_t (&x)[kTiles], uint32_t (&y)[kTiles], int base, int w0) const {
    const uint32_t* codes =
        reinterpret_cast<const uint32_t*>(p.k_quant) + g * lead_words + min(w0 + t, max(lead_words, 1) - 1);
    const uint32_t* later = codes + 8 * lead_words;
    const uint32_t* tile = tiles() + base / kTileTokens;
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const uint32_t word = lead_word(tile[u]);
      x[u] = __ldg(codes + word);
      y[u] = __ldg(later + word);
    }
  }
  __device__ __forceinline__ void load_tile_scales(uint32_t (&packed)[RP][kScales], int base) const {
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int e = 0; e < kScales; e += 2) {
        const uint32_t row = tiles()[base / kTileTokens + tile_of(st, e >> 1)];
        const uint32_t* scale = reinterpret_cast<const uint32_t*>(p.k_scale) + g + row;
        packed[st][e] = __ldg(scale);
        packed[st][e + 1] = __ldg(scale + 8);
      }
    }
  }
  __device__ __forceinline__ uint4 queries_of(int w0) const {
    return w0 + t < lead_words ? s.q_codes[w0 + t][g % RP] : make_uint4(0, 0, 0, 0);
  }
  // Tiles whose columns end up in one accumulator are added in several: a chain of products waits for each other.
  static constexpr int kSums = RP == 1 ? 4 : RP;
  __device__ __forceinline__ void multiply_tiles(float (&acc)[kSums][4], const uint32_t (&x)[kTiles],
                                                 const uint32_t (&y)[kTiles], uint4 q) const {
#pragma unroll
    for (int u = 0; u < kTiles; ++u) {
      const bool mine = g / RP == u % kCopies;
      mma_codes4(acc[RP == 1 ? u % kSums : u / kCopies], x[u], y[u],
                 make_uint4(mine ? q.x : 0, mine ? q.y : 0, mine ? q.z : 0, mine ? q.w : 0));
    }
  }
  // Of a tile's columns only its own are not zero, so that sums of tiles add up.
  template <int kCount>
  __device__ __forceinline__ void fold(float (&acc)[kCount][4]) const {
#pragma unroll
    for (int i = 1; i < kCount; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[0][c] += acc[i][c];
    }
  }

  // Logits are summed up relative to a fixed power, which spares the search for their maximum. Sums too large or too
  // small for that are found out, and made again.
  static constexpr float kReference = 32.0f;
  static constexpr float kLevelsPerUnit = 256.0f;
  static constexpr uint32_t kLevelBits = 0x4b400000u;  // 1.5 * 2^23, to which levels of 16 bits are added
  static constexpr float kLowestLevel = -128.0f;
  __device__ __forceinline__ bool norms_usable() const {
    bool usable = true;
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const float norm = s.score_norm[r];
      usable &= norm > kReference - 60.0f && norm < infinity() && norm != 0.0f;
    }
    return usable;
  }

  // Keeps the logits of 128 tokens, and adds them to the sums.
  template <bool kWhole>
  __device__ __forceinline__ void keep_logits(const float (&acc)[kSums][4], const uint32_t (&packed)[RP][kScales],
                                              int base, const float (&gain)[2], const float (&zero_gain)[2],
                                              float (&z)[2], uint32_t& outside) {
    constexpr float kLevelOffset = 12582912.0f + (kReference - kLowestLevel) * kLevelsPerUnit;
    const int first_token = base + tile_of(0, 0) * kTileTokens + g;
    uint32_t* level_words = levels() + first_token * kScoreStride + row_of_column(0) / 2;
#pragma unroll
    for (int st = 0; st < RP; ++st) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t level[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int token = base + tile_of(st, k) * kTileTokens + g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][RP == 1 ? 2 * k + half : half]);
          const float zero = kLevels ? fmaf(scale.y, zero_gain[k], -kReference) : scale.y * zero_gain[k];
          const float logit = fmaf(acc[st][2 * half + k], scale.x * gain[k], zero);
          float x = kLevels ? logit : logit - kReference;
          if (!kWhole && token >= owned) x = kLowestLevel - kReference;
          z[k] += exp2_fast(x);
          if (kLevels) {
            level[k] = __float_as_uint(fmaf(x, kLevelsPerUnit, kLevelOffset));
            outside |= level[k] ^ kLevelBits;
          } else if (kWhole || token < owned) {
            scores()[token] = logit;
          }
        }
        const int behind = st * kCopies * kTileTokens + 8 * half;  // the first token
        if (kLevels && (kWhole || first_token + behind < owned)) {
          level_words[behind * kScoreStride] = __byte_perm(level[0], level[1], 0x5410);
        }
      }
    }
  }

  // Logits of this block's tokens from the leading channels, and their softmax sums. A warp takes 128 tokens at a time,
  // eight tiles of 16, four words of a row a step; the loads of a step precede the sums of the step before it.
  __device__ void score_tokens() {
    float gain[2], zero_gain[2], z[2] = {};
    uint32_t outside = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum_prefix[row_of_column(k)];
    }
    uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
    float acc[kSums][4];
    int base = 0, words = -1;  // of the step whose codes are in x and y; none yet
    int next = warp * kBlockTokens, next_words = 0;
#pragma unroll 1
    while (words < 0 || base < owned) {
      if (words == 0) {
#pragma unroll
        for (int i = 0; i < 4 * kSums; ++i) acc[i / 4][i % 4] = 0.0f;
      }
      if (words >= 0) multiply_tiles(acc, x, y, queries_of(words));
      if (next < owned) load_tiles(x, y, next, next_words);
      const bool done = words >= 0 && next_words == 0;
      if (done) {
        if (RP == 1) fold(acc);
        if (base + kBlockTokens <= owned) {
          keep_logits<true>(acc, packed, base, gain, zero_gain, z, outside);
        } else {
          keep_logits<false>(acc, packed, base, gain, zero_gain, z, outside);
        }
      }
      if (next < owned && next_words == 0) load_tile_scales(packed, next);
      base = next;
      words = next_words;
      next_words += 4;
      if (next_words >= lead_words) {
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
    publish_sums(sum);
  }

  // The same for logits of any size, from those kept of one row.
  __device__ void sum_kept_logits() {
    SoftmaxSum sum[2];
#pragma unroll 1
    for (int i = tid(); i < owned; i += kThreads) {
      const float value[1] = {finite_or_masked(scores()[i], true)};
      accumulate(sum[0], value);
    }
    publish_sums(sum);
  }

  // The same for several rows in two passes over the leading codes: their sums, then the tokens' keys.
  __device__ void score_tokens_twice(bool makes_keys) {
    SoftmaxSum sum[2];
    float gain[2], zero_gain[2], norm[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum_prefix[row_of_column(k)];
      norm[k] = s.score_norm[row_of_column(k)];
    }
    const int2 competing = competing_items();
#pragma unroll 1
    for (int base = warp * kBlockTokens; base < owned; base += kWarps * kBlockTokens) {
      uint32_t x[kTiles], y[kTiles], packed[RP][kScales];
      float acc[kSums][4] = {};
      load_tile_scales(packed, base);
#pragma unroll 1
      for (int w0 = 0; w0 < lead_words; w0 += 4) {
        load_tiles(x, y, base, w0);
        multiply_tiles(acc, x, y, queries_of(w0));
      }
#pragma unroll
      for (int st = 0; st < RP; ++st) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = base + tile_of(st, 0) * kTileTokens + g + 8 * half;
          const float2 scale = scale_and_zero(packed[st][half]);
          float logit[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            logit[k] = fmaf(acc[st][2 * half + k], scale.x * gain[k], scale.y * zero_gain[k]);
            const float value[1] = {finite_or_masked(logit[k], token < owned)};
            if (!makes_keys) accumulate(sum[k], value);
          }
          if (!makes_keys) continue;
          float score = exp2_fast(logit[0] - norm[0]) + exp2_fast(logit[1] - norm[1]);
#pragma unroll
          for (int mask = 1; mask < RP / 2; mask <<= 1) score += __shfl_xor_sync(~0u, score, mask);
          if (row_of_column(0) == 0 && token < owned) stored_key(token) = rank_key(score, token, competing);
        }
      }
    }
    if (!makes_keys) publish_sums(sum);
  }

  // Score of one owned token, from its codes; four threads share it.
  __device__ float exact_score(int token) const {
    const uint32_t row = token_row(token), lead = lead_word(row);
    const uint32_t packed = load_scale(row);
    float acc[RP] = {};
#pragma unroll 1
    for (int w = t; w < lead_words; w += 4) {
      const uint32_t codes = load_codes(lead + w);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        // As mma_codes4 sees a code: odd ones 16-fold, which their queries make up for.
        const float code = static_cast<float>(codes >> (4 * n - (n & 1) * 4) & (n & 1 ? 0xf0u : 0xfu)) * 0x1p-24f;
#pragma unroll
        for (int r = 0; r < RP; ++r) {
          const __half* q = reinterpret_cast<const __half*>(&s.q_codes[w][r]);
          acc[r] = fmaf(code, __half2float(q[(n & 3) * 2 + n / 4]), acc[r]);
        }
      }
    }
    const float2 scale = scale_and_zero(packed);
    float score = 0.0f;
#pragma unroll
    for (int r = 0; r < RP; ++r) {
      acc[r] += __shfl_xor_sync(~0u, acc[r], 1);
      acc[r] += __shfl_xor_sync(~0u, acc[r], 2);
      const float logit = fmaf(acc[r], scale.x * s.gain[r], scale.y * s.q_sum_prefix[r]);
      score += exp2_fast(logit - s.score_norm[r]);
    }
    return score;
  }

  // Bounds are read in whole lines of 128 bytes, eight threads a line: half as many requests as of 64 bytes, which the
  // L2 cache serves no faster. So threads g and g ^ 1 share pages, each has the chunks of 16 bytes 8 l + 4 (g & 1) + t,
  // and the products of the two are added up. A tile of 16 pages is two products of 16 such halves of pages.
  static constexpr int kLines = D / 64;  // of a page
  struct PageBounds {
    uint4 chunks[2][2][kLines];  // of pages 8 m + 4 i + g / 2
    uint32_t scale[2];           // of pages 8 (g & 1) + 4 i + g / 2
  };
  __device__ __forceinline__ void load_bounds(PageBounds& page, int base) const {
    const uint4* bounds = reinterpret_cast<const uint4*>(p.page_bounds) + 4 * (g & 1) + t;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t block = pages()[base + 8 * m + 4 * i + g / 2];
#pragma unroll
        for (int l = 0; l < kLines; ++l) page.chunks[m][i][l] = load_stream(bounds + block * (D / 8) + 8 * l);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t block = pages()[base + 8 * (g & 1) + 4 * i + g / 2];
      page.scale[i] = __ldg(reinterpret_cast<const uint32_t*>(p.bounds_scale) + block);
    }
  }

  // Scores of this block's pages from their 8-bit bounds; a warp takes 16 pages at a time, and loads the next 16 before
  // it adds up these. Eight columns hold the queries of both halves of a page, or one half of eight rows at a time.
  __device__ void score_pages() {
    constexpr int kPasses = RP == 8 ? 2 : 1;
    SoftmaxSum sum[2];
    PageBounds page;
    uint2 q[kPasses][kLines][4];
    float gain[2], zero_gain[2];
#pragma unroll
    for (int h = 0; h < kPasses; ++h) {
#pragma unroll
      for (int l = 0; l < kLines; ++l) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = RP == 8 ? h : g / 4, word = 4 * (8 * l + 4 * half + t) + i;
          q[h][l][i] = RP == 8 || g % 4 < RP ? s.q_bounds[bounds_place(word)][g % RP] : make_uint2(0, 0);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      gain[k] = s.gain[row_of_column(k)];
      zero_gain[k] = s.q_sum[row_of_column(k)];
    }
    const bool second = g & 1;
    const bool mine = RP == 8 || t / 2 == (g & 1);  // columns of this thread's half
    int base = warp * kTileTokens;
    if (base < owned) load_bounds(page, base);
#pragma unroll 1
    for (; base < owned; base += kWarps * kTileTokens) {
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
            for (int h = 0; h < kPasses; ++h) mma_codes8(acc[m][h], xs[i], ys[i], q[h][l][i]);
          }
        }
      }
      const uint32_t packed[2] = {page.scale[0], page.scale[1]};
      if (base + kWarps * kTileTokens < owned) load_bounds(page, base + kWarps * kTileTokens);
      float value[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 scale = scale_and_zero(packed[i]);
        const int item = base + 8 * (g & 1) + 4 * i + g / 2;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          // Of this thread's pages the half it has, of the other's that it has too.
          const int c = 2 * i + k;
          const float first_pages = RP == 8 && second ? acc[0][kPasses - 1][c] : acc[0][0][c];
          const float other_pages = RP == 8 && second ? acc[1][kPasses - 1][c] : acc[1][0][c];
          const float own = second ? other_pages : first_pages, others = second ? first_pages : other_pages;
          const float product = own + __shfl_xor_sync(~0u, others, RP == 8 ? 4 : 6);
          const bool valid = item < owned && mine && (2 * t + k) % (RP == 8 ? 8 : 4) < RP;
          const float logit = fmaf(scale.x, product * gain[k], scale.y * zero_gain[k]);
          value[k][i] = finite_or_masked(logit, valid);
          if (valid) scores()[item * RP + row_of_column(k)] = logit;
        }
      }
      accumulate(sum[0], value[0]);
      accumulate(sum[1], value[1]);
    }
    publish_sums(sum);
  }
};

}  // namespace
}  // namespace twilight
