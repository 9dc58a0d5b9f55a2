// One row's selection as phases: exponentials of the logits, their sums, scores, choice; of pages first where tokens
// are taken from the best of them.
#pragma once

#include <numeric>
#include <optional>

#include "select_pages.h"
#include "select_tokens.h"

namespace twilight {

// The choice among one kind of items.
class SelectionLevel {
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

  void use_pages(const PageBounds& bounds, const Paging& paging, const Query& query, int64_t b, int64_t h,
                 Arena& arena) {
    by_page_ = true;
    pages_.prepare(bounds, paging, query, b, h, arena);
  }

  // Or tokens, at `positions` where there are some, or pages by their means.
  void use_tokens(const ShadowQuery& query, const Paging& paging, int64_t b, const int32_t* positions, Arena& arena) {
    by_page_ = false;
    tokens_ = &query;
    paging_ = &paging;
    b_ = b;
    positions_ = positions;
    pairs_ = arena.take<uint32_t>(softmax_.stride());
  }

  // With `keep_logits`: what the choice was made from.
  PrefixLogits prefix_logits() const { return {softmax_.logits(0), softmax_.stride(), pairs_, list_}; }

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
          twilight::prefix_logits(*tokens_, *paging_, b_, positions_, part, softmax_, pairs_);
        }
        return softmax_.exponentiate(part);
      }
      case 1:
        return softmax_.settle();
      case 2:
        return TopK::add_rows(softmax_, part, scores_);
      default:
        return top_k_.choose(scores_, list_, Arena::mine());
    }
  }

 private:
  TopK top_k_;
  SoftmaxRows softmax_;
  float* scores_ = nullptr;
  int32_t* list_ = nullptr;
  bool by_page_ = true;
  PageScorer pages_;
  const ShadowQuery* tokens_ = nullptr;
  uint32_t* pairs_ = nullptr;
  const int32_t* positions_ = nullptr;
  const Paging* paging_ = nullptr;
  int64_t b_ = 0;
};

// Pages whose tokens are scored: the share of them, and where their means are.
struct PageLevel {
  const std::optional<Shadow>& means;
  const Paging& paging;  // of the means
  double fraction;       // 1: all pages
  int64_t least;         // pages
  int64_t capacity;

  // For tokens paged by `tokens`.
  PageLevel(const std::optional<Shadow>& means, const Paging& paging, const Paging& tokens, const Limits& limits,
            double budget_fraction, double page_fraction, int64_t min_scored_tokens)
      : means(means),
        paging(paging),
        fraction(page_fraction),
        least(ceil_div(std::min(min_scored_tokens, limits.max_tokens), tokens.page_size)),
        capacity(kept_pages_capacity(limits, tokens.page_size, budget_fraction, page_fraction, min_scored_tokens)) {}
};

class SelectionRow {
 public:
  static constexpr int kPhases = 2 * SelectionLevel::kPhases;

  void start(const TopK& top_k, int64_t rows, bool keep_logits, Arena& arena) {
    items_.start(top_k, rows, keep_logits, arena);
  }

  // Of a row's tokens.
  void start_tokens(const TopK& tokens, const Budget& budget, const PageLevel& level, const Query& query,
                    const Paging& paging, int64_t b, int64_t h, bool keep_logits, Arena& arena) {
    const int64_t length = paging.length(b), size = paging.page_size, pages = ceil_div(length, size);
    if (level.fraction < 1.0) {
      const int64_t share = static_cast<int64_t>(std::ceil(static_cast<double>(pages) * level.fraction));
      const TopK kept(budget, h, length, size, level.capacity, std::max(share, level.least));
      by_level_ = !kept.takes_all();
      if (by_level_) {
        page_size_ = size;
        left_ = length - (pages - kept.count) * size;  // the page of the newest token is always kept
        pages_.start(kept, query.rows, /*keep_logits=*/false, arena);
        means_query_.prepare(*level.means, query, b, h, arena);
        pages_.use_tokens(means_query_, level.paging, b, nullptr, arena);
        positions_ = arena.take<int32_t>(kept.count * size + kLanes);
        chosen_ = arena.take<int32_t>(tokens.count);
      }
    }
    items_.start(by_level_ ? tokens.of(left_) : tokens, query.rows, keep_logits, arena);
  }

  // Where the caller wants the list, padded with -1; by default it is only kept.
  void write_to(int32_t* indices, int32_t* counts, int64_t capacity) {
    indices_ = indices;
    counts_ = counts;
    capacity_ = capacity;
  }

  void use_pages(const PageBounds& bounds, const Paging& paging, const Query& query, int64_t b, int64_t h,
                 Arena& arena) {
    items_.use_pages(bounds, paging, query, b, h, arena);
  }

  // Or tokens, or pages by their means.
  void use_tokens(const ShadowQuery& query, const Paging& paging, int64_t b, Arena& arena) {
    items_.use_tokens(query, paging, b, positions_, arena);
  }

  // With `keep_logits`: what the choice was made from, if anything.
  PrefixLogits prefix_logits() const { return scores_items() ? items_.prefix_logits() : PrefixLogits{}; }

  bool takes_all() const { return !by_level_ && items_.takes_all(); }
  bool scores_items() const { return !items_.takes_all(); }
  const int32_t* list() const { return by_level_ ? chosen_ : items_.list(); }
  int64_t count() const { return items_.count(); }

  int64_t parts(int phase) const {
    if (phase >= SelectionLevel::kPhases) return items_.parts(phase - SelectionLevel::kPhases);
    return by_level_ ? pages_.parts(phase) : 0;
  }

  void run(int phase, int64_t part) {
    if (phase < SelectionLevel::kPhases) {
      pages_.run(phase, part);
      if (phase == SelectionLevel::kPhases - 1) list_tokens();
      return;
    }
    items_.run(phase - SelectionLevel::kPhases, part);
    if (phase < kPhases - 1) return;
    if (by_level_)
      for (int64_t i = 0; i < count(); ++i) chosen_[i] = positions_[items_.list()[i]];
    if (indices_ == nullptr) return;
    std::copy(list(), list() + count(), indices_);
    std::fill(indices_ + count(), indices_ + capacity_, -1);
    *counts_ = static_cast<int32_t>(count());
  }

 private:
  void list_tokens() {
    int32_t* out = positions_;
    for (int64_t i = 0; i < pages_.count(); ++i, out += page_size_)
      std::iota(out, out + page_size_, static_cast<int32_t>(pages_.list()[i] * page_size_));
  }

  SelectionLevel pages_, items_;
  ShadowQuery means_query_;
  bool by_level_ = false;  // items_ are the tokens of the chosen of pages_
  int64_t page_size_ = 0, left_ = 0;
  int32_t *positions_ = nullptr, *chosen_ = nullptr;  // of the tokens to score, and to take
  int32_t *indices_ = nullptr, *counts_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace twilight
