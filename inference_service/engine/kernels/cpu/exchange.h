// Rows that processes of one machine add up, or take from the first, in memory that all of them share.
#pragma once
#include "vectors.h"
#include <atomic>
#include <chrono>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace {

constexpr int SPINS = 1000;  // looks at a counter before a process sleeps: some 20 us

// A line of its own, which one process writes: its exchanges, modulo 2^32, and how many others sleep until there are more.
struct alignas(64) Counter { std::atomic<uint32_t> count, sleeping; };

inline bool is_behind(const Counter& counter, uint32_t number) { return int32_t(counter.count.load() - number) < 0; }

// Sleeps while the counter is as it was, a hundredth of a second at most.
inline void sleep(Counter& counter, uint32_t found) {
#if defined(__linux__)
  const timespec most = {0, 10000000};
  syscall(SYS_futex, &counter.count, FUTEX_WAIT, found, &most, nullptr, 0);
#else
  std::this_thread::sleep_for(std::chrono::microseconds(50));
#endif
}

inline void advance(Counter& counter, uint32_t number) {
  counter.count.store(number);
#if defined(__linux__)
  if (counter.sleeping.load()) syscall(SYS_futex, &counter.count, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// Returns false where a process has failed meanwhile.
inline bool wait_for(Counter& counter, uint32_t number, const Counter& failed) {
  for (int tries = 0; is_behind(counter, number); ++tries) {
    if (failed.count.load()) return false;
    if (tries < SPINS) {
#if defined(__AVX__)
      _mm_pause();
#endif
      continue;
    }
    ++counter.sleeping;
    const uint32_t found = counter.count.load();
    if (int32_t(found - number) < 0) sleep(counter, found);
    --counter.sleeping;
  }
  return true;
}

// Counters, the first of which is not 0 once a process has failed; then, for even and for odd exchanges, a place of
// room values for each process. A place is written again only after all have begun the exchange between, and so have
// read it. Sums are float32, in the order of the processes, and every value is rounded alike, wherever it stands.
// Returns at once where a process has failed.
template <class T>
void exchange(T* rows, int64_t count, void* shared, int64_t rank, int64_t world, int64_t sources, int64_t room) {
  Counter *failed = (Counter*)shared, *counters = failed + 1;
  for (int64_t at = 0; at < count; at += room) {
    const int64_t size = std::min(room, count - at);
    const uint32_t number = counters[rank].count.load() + 1;
    T* places = (T*)(counters + world) + number % 2 * world * room;
    T* mine = rows + at;
    if (rank < sources) std::memcpy(places + rank * room, mine, size * sizeof(T));
    advance(counters[rank], number);
    for (int64_t other = 0; other < world; ++other)
      if (!wait_for(counters[other], number, *failed)) return;
    for (int64_t i = 0; i < size; i += LANES) {  // a room has whole vectors
      vf sum = load16(places + i);
      for (int64_t source = 1; source < sources; ++source) sum += load16(places + source * room + i);
      T last[LANES];
      const bool whole = i + LANES <= size;
      store16(whole ? mine + i : last, sum);
      if (!whole) std::memcpy(mine + i, last, (size - i) * sizeof(T));
    }
  }
}

}  // namespace
