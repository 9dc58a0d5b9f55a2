// Products of query rows with the 4-bit shadow of K.
#pragma once

#include "paged_kv.h"
#include "parallel.h"

namespace twilight {

struct Shadow {
  ReadRegion codes;       // [P, Hkv, S * D / 8] words of eight codes
  ReadRegion scale;       // [P, Hkv, S] words, scale in the low half, zero in the high one
  const int32_t* order;   // [Hkv, D]; null: K's own
  const int32_t* prefix;  // [Hkv]; null: whole rows
  int64_t num_pages, kv_heads, page_size, head_dim;
  const float* center = nullptr;  // [Hkv, D], by channel of K, what every key lacks; null: nothing, or nobody asks

  static Shadow of_keys(const Tensor& k_quant, const Tensor& k_scale, const Tensor& channel_order,
                        const Tensor& prefix_channels, const OptionalTensor& k_center = std::nullopt) {
    return {region_of(k_quant),
            region_of(k_scale),
            channel_order.const_data_ptr<int32_t>(),
            prefix_channels.const_data_ptr<int32_t>(),
            k_scale.size(0),
            k_scale.size(1),
            k_scale.size(2),
            channel_order.size(1),
            data_or_null<float>(k_center)};
  }

  // Page means are rows of a shadow whose pages hold one token each: select_tokens's scan scores them, all of them or
  // their leading channels.
  static Shadow of_means(const Tensor& page_means, const Tensor& means_scale, const OptionalTensor& channel_order,
                         const OptionalTensor& prefix_channels) {
    const auto numbers = [](const OptionalTensor& of) { return of ? of->const_data_ptr<int32_t>() : nullptr; };
    return {region_of(page_means),    region_of(means_scale), numbers(channel_order),
            numbers(prefix_channels), page_means.size(0),     page_means.size(1),
            /*page_size=*/1,          2 * page_means.size(2)};
  }

  int64_t prefix_words(int64_t h) const {
    if (prefix == nullptr) return head_dim / 8;
    return std::min<int64_t>(std::max(prefix[h], 0), head_dim) / 8;
  }
  int64_t channel(int64_t h, int64_t j) const {
    if (order == nullptr) return j;
    return std::min<int64_t>(std::max(order[h * head_dim + j], 0), head_dim - 1);
  }
};

// The query rows of one KV head against its shadow. A logit is the sum of what the leading channels give and what the
// others give, each `scale * (q . codes) + zero * sum(q)`, so that a selector's score is the first half of a
// candidate's estimate.
class ShadowQuery {
 public:
  void prepare(const Shadow& shadow, const Query& query, int64_t b, int64_t h, Arena& arena);

  enum Half { kPrefix, kTail, kBoth };

  // out[r, i] = sm_scale * q_r . dequantised key of token i, or one half of it; kTail adds to what is there. `Refs` is
  // TokenRefs or RunRefs; it, pairs and the rows of out are padded to kPad. `pairs` holds the tokens' (scale, zero):
  // read with kTail, written otherwise.
  template <class Refs>
  void logits(Half half, const Refs& refs, int64_t count, uint32_t* pairs, float* out, int64_t out_stride) const;

  static constexpr int64_t kPad = 4 * kLanes;

  // sm_scale * q_r . the centre: what every logit of row r lacks.
  float center_logit(int64_t r) const;

  // Turns products with codes into logits and puts them where they belong.
  struct Epilogue {
    const uint32_t* pairs;
    const float* totals;
    float* out;
    int64_t stride;
    bool add;

    void write(int64_t r, int64_t i, VecF product) const {
      const VecU pair = load<VecU>(pairs + i);
      const VecF scale = (VecF)(pair << 16), zero = (VecF)(pair & 0xffff0000u);
      const VecF logit = scale * product + zero * totals[r];
      float* to = out + r * stride + i;
      store(to, add ? load(to) + logit : logit);
    }
  };

 private:
  static constexpr int64_t kStage = 2 * kPad;  // tokens whose words are brought together before anything is computed

  // The leading and the other words of kStage tokens, token-major.
  struct Stage {
    uint32_t prefix[kStage * 32 + kLanes], tail[kStage * 32 + kLanes];
  };

  // Lines that the next stage reads: prefetched a few at a time between the multiplications of this one, because a full
  // queue of misses would stop them.
  struct Ahead {
    const uint32_t* lines[kStage * 8];  // 256 channels of a token lie in five at most, its scale in one
    int64_t count, issued;

    void prefetch(int64_t most) {
      for (const int64_t stop = std::min(count, issued + most); issued < stop; ++issued)
        __builtin_prefetch(lines[issued], /*for writing=*/0, /*locality=*/2);
    }
  };

  template <class Refs>
  void list_lines(Half half, const Refs& refs, int64_t count, Ahead& ahead) const;
  template <class Refs>
  void fill(Half half, Stage& stage, const Refs& refs, int64_t count, uint32_t* pairs) const;
  void multiply(Half half, const Stage& stage, const uint32_t* pairs, int64_t count, float* out, int64_t out_stride,
                Ahead& ahead) const;
  template <int kRows, int kBlocks>
  void multiply_rows(Half half, const Stage& stage, int64_t count, int64_t row, const Epilogue& epilogue,
                     Ahead& ahead) const;
  template <class Refs>
  void one_by_one(Half half, const Refs& refs, int64_t count, uint32_t* pairs, float* out, int64_t out_stride) const;

  const Shadow* shadow_;
  int64_t h_, rows_, prefix_words_, tail_words_;
  float* q_;          // [rows, D] in channel order
  float* totals_[2];  // [rows], sums of the leading and of the other channels
  // Queries with Inf or NaN need each product on its own, since 0 * Inf must not arise from a code of 0.
  bool one_by_one_;
};

}  // namespace twilight
