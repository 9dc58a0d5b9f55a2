// The rules of plan.h, each with the measurement it comes from: an H200, bf16, D 128, microseconds a layer by cluster
// size; 32/8 heads are groups of four, 32/32 of one.
#include "plan.h"

#include <cstdio>
#include <string>

namespace twilight {
namespace {

// The kernel numbers rows of the cache, and 32-bit words of their codes, in 32 bits.
constexpr int64_t kMaxCacheWords = int64_t{1} << 32;
// With fewer blocks some multiprocessors idle.
constexpr int kFillBlocks = 128;
// Reading everything takes no more blocks than this, and clusters lie within groups of 14 to 18 multiprocessors, where
// some then hold two blocks and others none. Pairs always fit. 32/8 L 32k, dense: B 1 four 67, eight 39, sixteen 49;
// B 2 four 70, eight 78; B 4 two 131, four 156; B 8 one 253, two 241, four 254.
constexpr int kDenseFillBlocks = 64;
// A cluster of sixteen waits for a whole group of multiprocessors. 32/8 L 32k, of eight and of sixteen: Quest B 1 33
// and 34, B 2 37 and 64; with four KV heads dense 37 and 28, Quest 33 and 31, shadow prefix 38 and 35.
constexpr int kLargestFill = 8;
constexpr int kFewUnits = 4;
// Unless its shares are long. A real model's data, 32/8 B 1, of eight and of sixteen: L 128k, two levels 78 and 62,
// page means 78 and 57; L 32k 40 and 43, 35 and 35.
constexpr int kLongShare = 2048;
// Or it scores the means of many pages, counted by their tokens. 128k: an eighth of the pages, n/32, 48 and 45, page
// means, n/12, 40 and 36; 32k: 35 and 40, 25 and 28.
constexpr int kLongScan = 9216;
// Of the tokens that two levels score no share is longer. The same data, 32/8 L 32k, B 64: one block 492, two 423, four
// 577; B 25: one 237, two 200, four 243; B 8: two 86, four 113. L 128k, B 8: four 345, eight 278, sixteen 338.
constexpr int kKeptShare = 4608;
// Of one query row, as long as that leaves two blocks a multiprocessor: 32/32 L 32k, B 64: one 946, two 1098; B 8: one
// 192, two 196; B 4: one 148, two 111.
constexpr int kKeptShareOfOneRow = 9216;

struct ClusterRule {
  Selector selector;
  bool grouped;          // several query rows a KV head
  int64_t share_tokens;  // no share of the tokens (of Quest: of the candidates) stays longer than this
  int64_t least_tokens;  // no share is made shorter than this to fill the chip
};

// An eighth above powers of two, so that a context and what is generated after it share alike.
constexpr ClusterRule kClusterRules[] = {
    // 32/32 L 32k, B 16: one block 453, two 360; B 2: one 110, two 70, four 92; B 1: two 66, four 54.
    {Selector::kShadowPrefix, false, 18432, 2048},
    // 32/8 L 32k, B 64: two 614, four 565; B 16: two 159, four 176; B 8: two 82, four 113; B 4: two 78, four 67, eight
    // 80; B 2: four 54, eight 45; B 1: eight 39, sixteen 38. L 128k, eight and sixteen, B 16: 787 and 723; B 8: 429 and
    // 379; B 4: 258 and 217; B 1: 86 and 77. L 8k, B 4: two 37, four 34, eight 58; B 2: two 36, four 30, eight 30.
    {Selector::kShadowPrefix, true, 9216, 2048},
    // 32/32 L 32k, B 16: one block 196, two 241; B 2: one 68, two 50, four 74; B 1: two 48, four 44, eight 66.
    {Selector::kQuest, false, 9216, 2048},
    // 32/8 L 32k, 8192 candidates, B 64: one 503, two 310, four 403; B 16: one 144, two 93, four 132; B 8: two 62, four
    // 82; B 4: two 57, four 46, eight 64; B 2: four 40, eight 37. L 128k with as many, B 64: one 739, two 540, four
    // 597; B 8: two 91, four 117, eight 132; B 4: two 82, four 63, eight 83. L 8k with 2048, B 64: one 93, two 138;
    // B 8: one 37, two 33, four 52; B 4: two 32, four 31; B 2: two 31, four 27, eight 28.
    {Selector::kQuest, true, 4608, 2048},
    // As Quest: its estimates are what Full makes of every token.
    {Selector::kFull, false, 18432, 4096},
    // The same data, 32/8 L 32k, of four and eight: B 64: 1577 and 1270; B 25: 687 and 544; B 8: 251 and 183.
    {Selector::kFull, true, 4608, 4096},
    // 32/32 L 1k, B 16: one 66.9, two 70.5; B 8: one 34.8, two 37.8; B 1: one 11.8, two 9.6.
    {Selector::kDense, false, kMaxTableTokens, 128},
    // B 64 L 1k: one 70.3, two 75.6; L 32k: one 1878, two 1904. B 1 L 8k: eight 14.8, sixteen 16.7; L 1k: eight 6.4.
    {Selector::kDense, true, kMaxTableTokens, 128},
};

// A request as the kernel runs it.
struct FusedCall {
  const PlanRequest& request;
  Limits limits;
  Selector selector;
  bool prunes;
  int capacity, most_pages, rows;  // most_pages: whose tokens are scored

  explicit FusedCall(const PlanRequest& r)
      : request(r),
        limits(r.limits()),
        selector(r.running_selector()),
        prunes(r.prunes && selector != Selector::kDense),
        capacity(by_page() ? page_capacity(limits, r.page_size, r.budget_fraction)
                           : token_capacity(limits, r.budget_fraction)),
        most_pages(r.kept_pages()),
        rows(padded_rows(r.rows())) {}

  bool by_page() const { return selects_pages(selector); }
  bool by_token() const { return selector == Selector::kShadowPrefix || lists_window(); }
  bool two_levels() const { return selector == Selector::kShadowPrefix && request.two_levels(); }
  bool lists_window() const { return selector == Selector::kStreaming; }
  int tokens() const { return static_cast<int>(limits.max_tokens); }
  int candidate_tokens() const { return by_page() ? capacity * request.page_size : by_token() ? capacity : tokens(); }
};

// Why the kernel does not serve a call, in the words of an argument check; "" where it does.
std::string refusal(const PlanRequest& r) {
  const auto got = [](const char* expected, int64_t value) { return expected + (", got " + std::to_string(value)); };
  if (r.selector == Selector::kGiven)
    return "selector: expected dense, full, quest, page_mean, shadow_prefix or streaming, got given";
  if (r.dtype_bits != 16) return got("q: expected a dtype of 16 bits", r.dtype_bits);
  if (r.head_dim != 64 && r.head_dim != 128) return got("head_dim: expected 64 or 128", r.head_dim);
  const Selector selector = r.running_selector();
  const bool dense = selector == Selector::kDense;
  if (r.rows() > (dense ? kMaxDenseRows : kMaxRows)) {
    return got(dense ? "q: expected at most 32 query rows a KV head" : "q: expected at most 8 query rows a KV head",
               r.rows());
  }
  if (selector == Selector::kQuest && r.bounds_bits != 8) return got("page_bounds: expected 8 bits", r.bounds_bits);
  if (r.softcap != 0) {
    char text[64];
    std::snprintf(text, sizeof(text), "softcap: expected None, got %g", r.softcap);
    return text;
  }
  if (r.max_pages == 0) return got("page_table: expected at least one page", r.max_pages);
  const int64_t words = r.num_pages * r.page_words;
  if (words >= kMaxCacheWords)
    return got("k_cache: expected fewer than 2**32 words of 16 bytes, of 4 in the shadow", words);
  return "";
}

// Lays out the dynamic shared memory behind FusedShared and returns its size in bytes, however large.
int64_t lay_out(const FusedCall& call, int cluster_size, SharedLayout& at) {
  const int head_dim = call.request.head_dim, page_size = call.request.page_size, rows = call.rows;
  const bool by_page = call.by_page(), by_token = call.by_token();
  const int own_tokens = share_of_tokens(call.tokens(), cluster_size);
  const int own_pages = share_of_pages(call.request.max_pages, cluster_size);
  const int kept_pages = call.two_levels() ? blocks_of(cluster_size, call.most_pages) : 0;
  const int own_items = by_page               ? own_pages  // scored
                        : kept_pages > 0      ? kept_pages * page_size
                        : !by_token           ? 0
                        : call.lists_window() ? 0
                                              : own_tokens;
  const int own_candidates = by_page || by_token ? blocks_of(cluster_size, call.capacity) : 0;
  const int slots = by_page ? own_candidates * page_size : by_token ? own_candidates : own_tokens;
  at.slot_capacity = call.prunes ? round_up(slots, 4) : 0;

  // Streamed tiles: lines of global memory become whole lines here.
  int64_t end = round_up(fused_shared_bytes(head_dim, rows), 128);
  const auto take = [&end](int64_t bytes) {
    const int64_t start = round_up(end, 16);
    end = start + bytes;
    return static_cast<int>(start);
  };
  at.scratch_at = take(std::max({kScoreBins, rows * kWeightBins, kWarps * rows * head_dim}) * 4);
  at.pages_at = take(kept_pages > 0 ? std::max(own_pages * 4, tiles_of_pages(kept_pages, page_size) * 8)
                     : by_page      ? own_pages * 4
                     : by_token     ? own_items / kTileTokens * 4
                                    : 0);
  const bool lists_pages = call.selector == Selector::kFull;
  at.candidates_at = take((lists_pages ? own_tokens / page_size : std::max(own_candidates, kept_pages)) * int64_t{8});
  const int64_t score_stride = by_token ? blocks_of(2, rows) : rows;
  const int64_t scored = std::max<int64_t>(own_items * score_stride, kept_pages > 0 ? int64_t{own_pages} * rows : 0);
  at.state_at = take(std::max(scored, at.slot_capacity * int64_t{rows}) * 4);

  // A dense row streams its pages through all of this.
  if (call.limits.dense_below > 0 || (!by_page && !by_token && !call.prunes)) {
    end = std::max<int64_t>(end, at.scratch_at + stream_slots(rows) * kWarps * kTileTokens * head_dim * 2);
  }
  return end;
}

int64_t shared_bytes(const FusedCall& call, int cluster_size) {
  SharedLayout unused;
  return lay_out(call, cluster_size, unused);
}

// Blocks a (sequence, KV head): as many as fill the chip and shared memory asks for, then so many that no share is too
// long. 0 where the largest cluster's shared memory does not hold the selection.
int choose_cluster_size(const FusedCall& call) {
  const int64_t units = call.request.units(), tokens = call.lists_window() ? call.capacity : call.tokens();
  const int64_t kept_tokens = int64_t{call.most_pages} * call.request.page_size;
  const int64_t shared_tokens = call.by_page() ? call.candidate_tokens() : call.two_levels() ? kept_tokens : tokens;
  // Means are a quarter of the bounds' bytes; a window is estimated as Full estimates every token.
  const Selector alike = call.by_page() ? Selector::kQuest : call.lists_window() ? Selector::kFull : call.selector;
  const ClusterRule& rule = *std::find_if(std::begin(kClusterRules), std::end(kClusterRules), [&](const auto& one) {
    return one.selector == alike && one.grouped == (call.rows > 1);
  });
  const bool reads_means = call.two_levels() || call.selector == Selector::kPageMean;
  const auto leaves_idle = [&](int size) {
    if (call.selector == Selector::kDense) {
      return units * size < kDenseFillBlocks || (size == 1 && 2 * units <= kFillBlocks);
    }
    const bool fills_groups = size < kLargestFill || units <= kFewUnits || shared_tokens / size > kLongShare ||
                              (reads_means && tokens / size > kLongScan);
    return units * size < kFillBlocks && fills_groups;
  };
  int size = 1;
  while (size < kMaxClusterSize && leaves_idle(size) && tokens / size > rule.least_tokens) size *= 2;
  while (shared_bytes(call, size) > call.request.device.shared_per_block) {
    if (size == kMaxClusterSize) return 0;
    size *= 2;
  }
  // One wave of pairs that fills the chip, or two, take longer shares rather than more waves.
  const auto fills = [&](int64_t waves) {
    return waves * kFillBlocks <= 2 * units && 2 * units <= waves * call.request.device.multiprocessors;
  };
  if (size == 2 && (fills(1) || fills(2))) return size;
  const int64_t kept_share = call.rows == 1 && units >= 2 * kFillBlocks ? kKeptShareOfOneRow : kKeptShare;
  const int64_t share_tokens = call.two_levels() ? kept_share : rule.share_tokens;
  while (size < kMaxClusterSize && ceil_div(shared_tokens, size) > share_tokens) size *= 2;
  return size;
}

}  // namespace

Plan plan_fused_decode(const PlanRequest& request) {
  Plan plan{};
  std::string reason = refusal(request);
  if (reason.empty()) {
    const FusedCall call(request);
    const int chosen = request.cluster_size > 0 ? request.cluster_size : choose_cluster_size(call);
    const int size = chosen > 0 ? chosen : kMaxClusterSize;
    const int64_t bytes = lay_out(call, size, plan.layout);
    if (bytes > request.device.shared_per_block) {
      reason = "page_table: expected at most " + std::to_string(request.device.shared_per_block) +
               " bytes of shared memory a block, got " + std::to_string(bytes);
    }
    plan.selector = call.selector;
    plan.prunes = call.prunes;
    plan.capacity = call.capacity;
    plan.cluster_size = size;
    plan.grid = static_cast<int>(request.units()) * size;
    plan.shared_bytes = static_cast<int>(bytes);
  }
  if (!reason.empty()) plan = {};
  std::snprintf(plan.reason, sizeof(plan.reason), "%s", reason.c_str());
  return plan;
}

}  // namespace twilight

// For Python, twilight_ops/launch_plan.py. Sizes tell a mirror that is not these structs: nothing is written then.
#define TWILIGHT_EXPORT extern "C" __attribute__((visibility("default")))

TWILIGHT_EXPORT bool twilight_plan_fused_decode(const twilight::PlanRequest* request, size_t request_bytes,
                                                twilight::Plan* plan, size_t plan_bytes) {
  if (request_bytes != sizeof(*request) || plan_bytes != sizeof(*plan)) return false;
  *plan = twilight::plan_fused_decode(*request);
  return true;
}

// Null behind the last.
TWILIGHT_EXPORT const char* twilight_selector_name(int selector) {
  return selector < static_cast<int>(twilight::kSelectorNames.size()) ? twilight::kSelectorNames[selector] : nullptr;
}
