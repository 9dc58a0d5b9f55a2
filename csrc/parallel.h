// Threads and scratch memory.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace twilight {

// Calls f(i) for i in 0..n-1 on all threads, in order of demand, because tasks differ in length.
template <class F>
void run_tasks(int64_t n, const F& f) {
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < n; i = next++) f(i);
  });
}

// Scratch memory of one thread: it grows to the largest call and is used again by the next, because mapping fresh pages
// in each call costs more than the kernels that use them. More than kKeepBytes is given back at the end of a call.
class Arena {
 public:
  static constexpr size_t kKeepBytes = size_t{64} << 20;
  static constexpr size_t kAlign = 64;

  // Everything taken within a scope is free again at its end.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ~Scope() {
      arena_.block_ = block_;
      arena_.used_ = used_;
      if (block_ == 0 && used_ == 0) arena_.settle();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    size_t block_, used_;
  };

  static Arena& mine() {
    static thread_local Arena arena;
    return arena;
  }

  ~Arena() { release(); }

  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (std::max<int64_t>(count, 0) * sizeof(T) + 2 * kAlign - 1) / kAlign * kAlign;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const size_t size = std::max(bytes, size_t{1} << 20);
      blocks_.push_back({allocate(size), size});
      used_ = 0;
    }
    char* out = blocks_[block_].data + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(out);
  }

 private:
  struct Block {
    char* data;
    size_t bytes;
  };

  static char* allocate(size_t bytes) {
    void* data = std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign);
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<char*>(data);
  }

  // Several blocks become one, so that the next call finds its memory in one piece.
  void settle() {
    size_t total = 0;
    for (const Block& block : blocks_) total += block.bytes;
    if (blocks_.size() <= 1 && total <= kKeepBytes) return;
    release();
    if (total <= kKeepBytes) blocks_.push_back({allocate(total), total});
  }

  void release() {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    block_ = used_ = 0;
  }

  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

// Rows are pairs of a sequence and a KV head. The parts of a row's phase p may run once all parts of its phase p - 1
// are done; their number depends on the row's sizes alone, so that results do not depend on the number of threads.
//
//   struct Row {
//     void prepare(const Call& call, int64_t row, Arena& arena);
//     static constexpr int kPhases;
//     int64_t parts(int phase) const;
//     void run(int phase, int64_t part);
//   };
//
// Rows are handed out one by one, and each stays in one core's cache, unless threads would stand idle for longer than
// it takes them to meet after every phase; then all threads share each phase. `work` is that of the longest row, in
// units of a token scored by a selector.
template <class Row, class Call>
void run_rows(const Call& call, int64_t rows, int64_t work) {
  // About twelve meetings of 3 us against 8 ns a token, measured with 2 threads.
  constexpr int64_t kShareFrom = 4000;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t idle = (threads - rows % threads) % threads;  // threads without a row in the last round
  if (rows >= 4 * threads || idle * work <= kShareFrom * threads) {
    run_tasks(rows, [&](int64_t i) {
      Arena& arena = Arena::mine();
      Arena::Scope scope(arena);
      Row row;
      row.prepare(call, i, arena);
      for (int phase = 0; phase < Row::kPhases; ++phase)
        for (int64_t part = 0, parts = row.parts(phase); part < parts; ++part) row.run(phase, part);
    });
    return;
  }
  Arena& arena = Arena::mine();
  Arena::Scope scope(arena);
  std::vector<Row> states(rows);
  for (int64_t i = 0; i < rows; ++i) states[i].prepare(call, i, arena);
  std::vector<int64_t> first(rows + 1);
  for (int phase = 0; phase < Row::kPhases; ++phase) {
    for (int64_t i = 0; i < rows; ++i) first[i + 1] = first[i] + states[i].parts(phase);
    run_tasks(first[rows], [&](int64_t task) {
      const int64_t i = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
      states[i].run(phase, task - first[i]);
    });
  }
}

// Part `part` of 0..n where every part but the last has `size` items.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t n, int64_t part, int64_t size) {
  return {std::min(n, part * size), std::min(n, (part + 1) * size)};
}

}  // namespace twilight
