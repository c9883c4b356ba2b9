// A linear and its adapters in one call, shared among threads.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "lora.h"
#include "product.h"

namespace {

constexpr double WORK_OF_ONE_THREAD = 60000;  // products; less is done before a second thread has woken up

// Tasks [0, count) of a team: each thread does its own share from front to back, then helps with the others', so that a thread
// that loses its core does not delay the others.
class Shares {
  struct alignas(64) Share { std::atomic<int64_t> next; int64_t end; };
  std::unique_ptr<Share[]> shares;
  int64_t room = 0, threads = 0;

 public:
  void part(int64_t count, int64_t among) {
    if (among > room) shares.reset(new Share[room = among]);
    threads = among;
    for (int64_t i = 0; i < among; ++i) {
      shares[i].next.store(count * i / among, std::memory_order_relaxed);
      shares[i].end = count * (i + 1) / among;
    }
  }
  template <class F> void take(F task) {
    const int64_t own = threads > 1 ? omp_get_thread_num() : 0;
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares[(own + i) % threads];
      for (int64_t at; (at = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(at);
    }
  }
};

// A task on rows of bfloat16 that are multiplied as they are, or, where that is faster, as float32.
template <class T, class F> inline void by_tokens(const LoraTask& task, F run) {
  if constexpr (Unit<T>::P > 1)
    if (task.tokens >= widened_from && !task.once()) return run(WidenedUnits());
  run(Units<T>());
}

// Computes a linear and its adapters of x, or, without w, adds the adapters' part to out. A slot's adapters of all linears are
// side by side: from one slot's to the next are apart of them. Threads take turns at rows of A, at columns of w, and, when all
// of those are done, at columns of B. Where rows have several segments, parts say so, and one thread adds all segments of a row,
// one after the other: no two threads write a row, and the order is that of the segments.
template <class T>
void linear(Product<T> base, const Adapter* adapters, int64_t apart, const Segment* segments, int64_t count, float* y,
            int64_t ldy, const Part* parts, int64_t threads) {
  static thread_local std::vector<LoraTask> tasks, shrinks, expands;
  tasks.clear(); shrinks.clear(); expands.clear();
  double work = base.w ? double(base.rows) * base.K * base.N : 0;
  const auto part_of = [=](int64_t s) { return parts ? parts[s] : Part{0, 1, 1}; };
  const auto ranks_of = [=](int64_t s, int64_t slice) {  // of all parts of a segment's rows
    int64_t ranks = 0;
    for (int64_t p = s; p < s + part_of(s).count; ++p) ranks += adapters[segments[p].adapter * apart].slice[slice].rank;
    return ranks;
  };
  for (int64_t s = 0; s < count; ++s) {
    const Segment& seg = segments[s];
    const Adapter& adapter = adapters[seg.adapter * apart];
    bool adds = acts(adapter);
    for (int64_t i = 0; parts && i < adapter.slices; ++i) adds |= ranks_of(s, i) > 0;
    if (!adds) continue;
    work += double(seg.length) * adapter.rows * base.K;
    for (int64_t f = 0; f < seg.length; f += TOKENS_PER_TASK)
      tasks.push_back({s, f, std::min<int64_t>(TOKENS_PER_TASK, seg.length - f), 0, 0, 0});
  }
  if (work < WORK_OF_ONE_THREAD) threads = 1;
  const bool shared = int64_t(tasks.size()) < threads;  // fewer runs of tokens than threads: share the rows of A, and columns of B
  for (const LoraTask& whole : tasks) {
    const Adapter& adapter = adapters[segments[whole.segment].adapter * apart];
    const int64_t rows = shared ? round_up(int((adapter.rows + threads - 1) / threads), 4) : adapter.rows;
    for (int64_t r = 0; r < adapter.rows; r += rows)
      shrinks.push_back({whole.segment, whole.first, whole.tokens, 0, r, std::min(rows, adapter.rows - r)});
    for (int64_t i = 0; i < adapter.slices; ++i) {
      const Slice& slice = adapter.slice[i];
      const int64_t columns = slice.vectors || ranks_of(whole.segment, i) ? slice.columns : 0;
      const int64_t some = shared ? COLUMNS_PER_TASK : columns;
      for (int64_t c = 0; c < columns; c += some)
        expands.push_back({whole.segment, whole.first, whole.tokens, i, c, std::min(some, columns - c)});
    }
  }
  static thread_local RoundedRows rounding;
  static thread_local WidenedRows widening;
  if constexpr (Unit<T>::P > 1) {
    if (base.bits && base.bits != COMPACT)
      rounding.round(base.x, base.ldx, base.rows, base.K, base.bits == BLOCKS ? 0 : base.bits, threads), base.rounded = &rounding;
    else if (base.w && base.rows >= widened_from)
      base.widened = widening.widen(base.x, base.ldx, base.rows, base.K, threads);
  }
  const int64_t tiles = base.w ? (base.N + LANES - 1) / LANES : 0;
  const int64_t wide = tiles / WIDE_PRODUCT >= 2 * threads ? WIDE_PRODUCT : 1;
  const int64_t panels = tiles / wide, all = panels + tiles % wide;
  const LoraTask *first = shrinks.data(), *second = expands.data();
  const int64_t firsts = shrinks.size(), seconds = expands.size();
  static thread_local Shares shrinking, multiplying, expanding;
  shrinking.part(firsts, threads), multiplying.part(all, threads), expanding.part(seconds, threads);
  Shares *one = &shrinking, *two = &multiplying, *three = &expanding;  // of this thread, for all of them
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
  {
    const Flushing as_pairs(Unit<T>::P > 1);
    one->take([=](int64_t i) {
      const Segment& seg = segments[first[i].segment];
      const Part part = part_of(first[i].segment);
      by_tokens<T>(first[i], [=](auto how) {
        shrink_task<T, decltype(how)>(first[i], seg, adapters[seg.adapter * apart], base.x, base.ldx, base.K, y + part.column, ldy, float(part.scale));
      });
    });
    two->take([=](int64_t i) {
      if (i < panels && wide > 1) product_panel<WIDE_PRODUCT>(base, i * wide * LANES);
      else product_panel<1>(base, (i < panels ? i : panels * wide + i - panels) * LANES);
    });
    if (seconds) {
#pragma omp barrier
      three->take([=](int64_t i) {
        const int64_t s = second[i].segment;
        for (int64_t p = s; p < s + part_of(s).count; ++p) {
          const Adapter& adapter = adapters[segments[p].adapter * apart];
          const Slice& slice = adapter.slice[second[i].slice];
          if (slice.rank || slice.vectors)
            by_tokens<T>(second[i], [=, &adapter](auto how) {
              expand_task<T, decltype(how)>(second[i], segments[p], adapter, y + part_of(p).column, ldy, base.out, base.ldo);
            });
        }
      });
    }
  }
}

}  // namespace
