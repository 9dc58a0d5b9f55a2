// One row's selection as phases: exponentials of the logits, their sums, scores, choice.
#pragma once

#include "select_pages.h"
#include "select_tokens.h"

namespace twilight {

class SelectionRow {
 public:
  static constexpr int kPhases = 4;

  void start(const TopK& top_k, int64_t rows, bool keep_logits, Arena& arena) {
    top_k_ = top_k;
    list_ = arena.take<int32_t>(top_k.count + kLanes);
    if (takes_all()) return;
    softmax_.prepare(rows, top_k.items, keep_logits, /*by_level=*/true, arena);
    softmax_.set_items(top_k.items);
    scores_ = arena.take<float>(round_up(top_k.items, kLanes));
  }

  // Where the caller wants the list, padded with -1; by default it is only kept.
  void write_to(int32_t* indices, int32_t* counts, int64_t capacity) {
    indices_ = indices;
    counts_ = counts;
    capacity_ = capacity;
  }

  void use_pages(const PageBounds& bounds, const Paging& paging, const Query& query, int64_t b, int64_t h,
                 Arena& arena) {
    by_page_ = true;
    pages_.prepare(bounds, paging, query, b, h, arena);
  }

  // Or pages by their means.
  void use_tokens(const ShadowQuery& query, const Paging& paging, int64_t b, Arena& arena) {
    by_page_ = false;
    tokens_ = &query;
    paging_ = &paging;
    b_ = b;
    pairs_ = arena.take<uint32_t>(softmax_.stride());
  }

  // With `keep_logits`: what the choice was made from.
  PrefixLogits prefix_logits() const { return {softmax_.logits(0), softmax_.stride(), pairs_}; }

  bool takes_all() const { return top_k_.takes_all(); }
  const int32_t* list() const { return list_; }
  int64_t count() const { return top_k_.count; }

  int64_t parts(int phase) const {
    if (phase == kPhases - 1) return 1;
    if (takes_all()) return 0;
    return phase == 1 ? 1 : softmax_.parts();
  }

  void run(int phase, int64_t part) {
    switch (phase) {
      case 0: {
        if (by_page_) {
          pages_.score(part, softmax_);
        } else {
          twilight::prefix_logits(*tokens_, *paging_, b_, part, softmax_, pairs_);
        }
        return softmax_.exponentiate(part);
      }
      case 1:
        return softmax_.settle();
      case 2:
        return TopK::add_rows(softmax_, part, scores_);
      default:
        top_k_.choose(scores_, list_, Arena::mine());
        if (indices_ == nullptr) return;
        std::copy(list_, list_ + count(), indices_);
        std::fill(indices_ + count(), indices_ + capacity_, -1);
        *counts_ = static_cast<int32_t>(count());
    }
  }

 private:
  TopK top_k_;
  SoftmaxRows softmax_;
  float* scores_ = nullptr;
  int32_t* list_ = nullptr;
  int32_t *indices_ = nullptr, *counts_ = nullptr;
  int64_t capacity_ = 0;
  bool by_page_ = true;
  PageScorer pages_;
  const ShadowQuery* tokens_ = nullptr;
  uint32_t* pairs_ = nullptr;
  const Paging* paging_ = nullptr;
  int64_t b_ = 0;
};

}  // namespace twilight
