// Paged attention over the cache in place, and the writes to the cache.
//
//   K cache block of 16 positions:  [head_dim / P][16 positions][P]
//   V cache block of 16 positions:  [16 / P][head_dim padded to 16][P]
#pragma once
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int MAX_DIM = 512;  // of a head
constexpr int BLOCK = 16;     // positions of a cache block
constexpr int TILE = 8;       // query rows that are computed together
constexpr int SPAN = 64;      // positions between two rescalings of the softmax

struct Chunk { int64_t row, length, end; const int32_t* blocks; };

// The block that is fetched line by line while block b is read: the one that is read a span later, or itself near the end of
// `left` blocks. Blocks lie anywhere, and are too short for the processor to see by itself what comes; all lines at once would
// be more than it fetches at a time.
inline int64_t later(const int32_t* blocks, int64_t b, int64_t left) {
  return blocks[b + SPAN / BLOCK < left ? b + SPAN / BLOCK : b];
}

// s[row][position] = q[.][row] . k[position] of WIDE blocks of `left`, for the TALL rows of a tile.
template <class T, class M, int TALL, int WIDE>
inline void score(const typename M::Unit (*q)[TALL], const T* keys, const int32_t* blocks, int64_t left, int64_t k_block,
                  int units, float (*s)[SPAN]) {
  constexpr int P = Unit<T>::P;
  const T *k[WIDE], *next[WIDE];
  vf sums[WIDE][TALL] = {};
  [[maybe_unused]] const typename M::Scope scope;
  for (int b = 0; b < WIDE; ++b) k[b] = keys + blocks[b] * k_block, next[b] = keys + later(blocks, b, left) * k_block;
  for (int d = 0; d < units; ++d) {
    vu w[WIDE];
    for (int b = 0; b < WIDE; ++b) w[b] = load<vu>(k[b] + d * LANES * P), __builtin_prefetch(next[b] + d * LANES * P);
    for (int i = 0; i < TALL; ++i) {
      const auto each = M::repeated(q[d][i]);
      for (int b = 0; b < WIDE; ++b) sums[b][i] = M::fma(sums[b][i], each, w[b]);
    }
  }
  for (int b = 0; b < WIDE; ++b)
    for (int i = 0; i < TALL; ++i) store(s[i] + b * BLOCK, sums[b][i]);
}

// Turns the scores of a row at `count` positions, of which it may see [low, high), into weights that are e^(score - best),
// in units; returns what the row's sums so far are to be multiplied by. A row that sees none of them gets zeros.
template <class T>
inline float weigh(float* s, int count, int low, int high, float scale, float softcap, float& best, float& total, uint32_t* p) {
  for (int j = 0; j < count; j += LANES) store(s + j, load<vf>(s + j) * scale);
  if (softcap > 0)
    for (int j = low; j < high; ++j) s[j] = softcap * std::tanh(s[j] / softcap);
  for (int j = 0; j < std::min(low, count); ++j) s[j] = -INFINITY;
  for (int j = std::max(high, 0); j < count; ++j) s[j] = -INFINITY;
  vf tops = load<vf>(s);
  for (int j = LANES; j < count; j += LANES) {
    tops = by_register([](rf raw, rf top) { return raw > top ? raw : top; }, load<vf>(s + j), tops);
  }
  float each[LANES], top = best;
  store(each, tops);
  for (float one : each) top = std::max(top, one);
  if (top == -INFINITY) { std::memset(p, 0, count / Unit<T>::P * sizeof *p); return 1.0f; }
  const float shrink = best == top ? 1.0f : best == -INFINITY ? 0.0f : std::exp(best - top);
  best = top;
  vf added = {};
  T* to = reinterpret_cast<T*>(p);
  for (int j = 0; j < count; j += LANES) {
    const vf raw = load<vf>(s + j);
    const auto seen = [](rf part, rf weight) { return part != -INFINITY ? weight : rf{}; };
    const vf value = by_register(seen, raw, exp16(raw - splat(top)));
    added += value;
    store16(to + j, value);
  }
  total = total * shrink + sum(added);
  return shrink;
}

// All bits of the values of a unit whose weights are not 0. A position that a row does not see has the weight 0 and holds
// whatever was written there, by another sequence too: 0 times infinity or NaN would be NaN.
inline uint32_t weighted(uint32_t weight, float*) { return weight ? ~0u : 0u; }
inline uint32_t weighted(uint32_t weight, bf16*) { return (weight & 0xffffu ? 0xffffu : 0u) | (weight >> 16 ? 0xffff0000u : 0u); }
inline uint32_t weighted(uint64_t weight, bf16*) { return (weight >> 32 ? 0xffffu : 0u) | (uint32_t(weight) ? 0xffff0000u : 0u); }

// Units of positions that some row of a tile sees, and among them those that all rows see whole.
struct Seen { int first, whole, rest, last; };

// acc[row][WIDE * LANES] += weights . values of the first of `left` blocks, for the TALL rows of a tile.
template <class T, class M, int TALL, int WIDE>
inline void gather(const typename M::Unit (*p)[SPAN], const T* values, const int32_t* blocks, int64_t left, const Seen& seen,
                   int64_t v_block, int padded, float (*acc)[MAX_DIM], int column) {
  constexpr int P = Unit<T>::P, UNITS = BLOCK / P;
  vf part[TALL][WIDE];
  [[maybe_unused]] const typename M::Scope scope;
  for (int i = 0; i < TALL; ++i)
    for (int c = 0; c < WIDE; ++c) part[i][c] = load<vf>(acc[i] + column + c * LANES);
  auto add = [&](int first, int last, auto whole) __attribute__((always_inline)) {
    for (int u = first; u < last;) {
      const int64_t at = (int64_t(u % UNITS) * padded + column) * P, unit = int64_t(padded) * P;
      const T *v = values + blocks[u / UNITS] * v_block + at, *next = values + later(blocks, u / UNITS, left) * v_block + at;
      for (const int end = std::min(last, (u / UNITS + 1) * UNITS); u < end; ++u, v += unit, next += unit) {
        vu w[WIDE];
        for (int c = 0; c < WIDE; ++c) w[c] = load<vu>(v + c * LANES * P), __builtin_prefetch(next + c * LANES * P);
        for (int i = 0; i < TALL; ++i) {
          const vu mask = whole ? ~vu{} : vu{} + weighted(p[i][u], static_cast<T*>(nullptr));
          const auto weight = M::repeated(p[i][u]);
          for (int c = 0; c < WIDE; ++c) part[i][c] = M::fma(part[i][c], weight, w[c] & mask);
        }
      }
    }
  };
  add(seen.first, seen.whole, std::false_type{});
  add(seen.whole, seen.rest, std::true_type{});
  add(seen.rest, seen.last, std::false_type{});
  for (int i = 0; i < TALL; ++i)
    for (int c = 0; c < WIDE; ++c) store(acc[i] + column + c * LANES, part[i][c]);
}

// Fetches the first lines of blocks: the processor finds the others by itself.
template <class T> inline void announce(const T* data, const int32_t* blocks, int64_t count, int64_t size) {
  for (int64_t b = 0; b < count; ++b)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(reinterpret_cast<const char*>(data + blocks[b] * size) + 64 * line);
}

// One kv head, up to TALL query rows that share it; row i of the tile may see positions [from[i], to[i]). Where there are
// fewer rows, q[i] of the others is any row, and their results are not read. Where there are sinks, sink[i] is the score
// of what row i sees besides, and which has no value.
template <class T, class M, int TALL>
void attend(const T* const* q_rows, int rows, const int64_t* from, const int64_t* to, const T* keys, const T* values,
            const int32_t* blocks, int dim, float scale, float softcap, const float* sink, T* const* out) {
  constexpr int P = Unit<T>::P;
  const int padded = round_up(dim, LANES);
  const int64_t k_block = int64_t(dim) * BLOCK, v_block = int64_t(padded) * BLOCK;
  float acc[TALL][MAX_DIM], s[TALL][SPAN], best[TALL], total[TALL];
  uint32_t weights[SPAN];
  typename M::Unit q[MAX_DIM][TALL], p[TALL][SPAN] = {};
  int64_t first = to[0], last = 0;
  for (int i = 0; i < TALL; ++i) {
    best[i] = sink ? sink[i] : -INFINITY; total[i] = sink ? 1 : 0;
    for (int d = 0; d < dim / P; ++d) q[d][i] = M::of(load<uint32_t>(q_rows[i] + d * P));
    std::memset(acc[i], 0, padded * sizeof(float));
    if (i < rows) { first = std::min(first, from[i]); last = std::max(last, to[i]); }
  }
  // From a multiple of SPAN, so that a row is rescaled at the same positions whichever rows share its tile.
  for (int64_t start = first / SPAN * SPAN; start < last; start += SPAN) {
    const int spans = int(std::min<int64_t>(SPAN, round_up(int(last - start), BLOCK))) / BLOCK;
    const int32_t* here = blocks + start / BLOCK;
    const int64_t left = round_up(int(last - start), BLOCK) / BLOCK;
    if (start <= first) announce(keys, here, spans, k_block), announce(values, here, spans, v_block);
    int b = 0;
    auto at = [&](int block) { return reinterpret_cast<float(*)[SPAN]>(s[0] + block * BLOCK); };
    for (; b + 2 <= spans; b += 2) score<T, M, TALL, 2>(q, keys, here + b, left - b, k_block, dim / P, at(b));
    if (b < spans) score<T, M, TALL, 1>(q, keys, here + b, left - b, k_block, dim / P, at(b));
    Seen seen = {SPAN, 0, SPAN, 0};
    for (int i = 0; i < rows; ++i) {
      const int low = int(std::max<int64_t>(0, from[i] - start)), high = int(std::min<int64_t>(spans * BLOCK, to[i] - start));
      if (low < high) seen.first = std::min(seen.first, low / P), seen.last = std::max(seen.last, (high + P - 1) / P);
      seen.whole = std::max(seen.whole, (low + P - 1) / P), seen.rest = std::min(seen.rest, std::max(high, 0) / P);
      const float shrink = weigh<T>(s[i], spans * BLOCK, low, high, scale, softcap, best[i], total[i], weights);
      for (int u = 0; u < spans * BLOCK / P; ++u) p[i][u] = M::of(weights[u]);
      if (shrink != 1.0f)
        for (int d = 0; d < padded; d += LANES) store(acc[i] + d, load<vf>(acc[i] + d) * shrink);
    }
    if (seen.whole >= seen.rest) seen.whole = seen.rest = seen.last;  // no unit that all see
    int d = 0;
    if (TALL < TILE)
      for (; d + 4 * LANES <= padded; d += 4 * LANES) gather<T, M, TALL, 4>(p, values, here, left, seen, v_block, padded, acc, d);
    for (; d + 2 * LANES <= padded; d += 2 * LANES) gather<T, M, TALL, 2>(p, values, here, left, seen, v_block, padded, acc, d);
    if (d < padded) gather<T, M, TALL, 1>(p, values, here, left, seen, v_block, padded, acc, d);
  }
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < dim; ++d) narrow(out[i][d], acc[i][d] / total[i]);
}

template <class T>
void attention(const T* q, int64_t ldq, T* out, const Chunk* chunks, int64_t count, const T* keys, const T* values,
               int64_t num_blocks, int64_t kv_heads, int64_t group, int64_t dim, float scale, float softcap,
               int64_t window, int64_t threads, const float* sinks) {
  struct Task { int32_t chunk, head, first; };
  const int64_t padded = round_up(int(dim), LANES);
  const int64_t k_head = num_blocks * BLOCK * dim, v_head = num_blocks * BLOCK * padded;
  int64_t tasks = 0;
  for (int64_t c = 0; c < count; ++c) tasks += kv_heads * ((chunks[c].length * group + TILE - 1) / TILE);
  Task* list = new Task[tasks];
  int64_t made = 0;
  for (int64_t c = 0; c < count; ++c)
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t first = 0; first < chunks[c].length * group; first += TILE)
        list[made++] = {int32_t(c), int32_t(h), int32_t(first)};
  const int64_t heads = kv_heads * group;
  each(tasks, int(threads), [=](int64_t index) {
    const Task& task = list[index];
    const Chunk& chunk = chunks[task.chunk];
    const int rows = int(std::min<int64_t>(TILE, chunk.length * group - task.first));
    const T* from_q[TILE]; T* to_out[TILE];
    int64_t from[TILE], to[TILE];
    float sink[TILE] = {};
    for (int i = rows; i < TILE; ++i) from_q[i] = q + chunk.row * ldq + task.head * group * dim;
    for (int i = 0; i < rows; ++i) {  // neighbours in a tile are the heads of one token: they see the same keys
      const int64_t token = (task.first + i) / group, head = task.head * group + (task.first + i) % group;
      from_q[i] = q + (chunk.row + token) * ldq + head * dim;
      to_out[i] = out + ((chunk.row + token) * heads + head) * dim;
      to[i] = chunk.end - chunk.length + token + 1;
      from[i] = window > 0 ? std::max<int64_t>(0, to[i] - window) : window < 0 ? (to[i] - 1) / -window * -window : 0;
      if (sinks) sink[i] = sinks[head];
    }
    const T *k = keys + task.head * k_head, *v = values + task.head * v_head;
    const float* own = sinks ? sink : nullptr;
    const auto attend_as = [&](auto how) {
      typedef decltype(how) M;
      if (rows > 4) attend<T, M, 8>(from_q, rows, from, to, k, v, chunk.blocks, int(dim), scale, softcap, own, to_out);
      else attend<T, M, 4>(from_q, rows, from, to, k, v, chunk.blocks, int(dim), scale, softcap, own, to_out);
    };
    if constexpr (Unit<T>::P > 1 && SPLIT == 1)  // smaller registers are too few for it
      if (rows >= widened_from) return attend_as(WidenedUnits());
    attend_as(Units<T>());
  });
  delete[] list;
}

// Rotates q in place and writes rotated k, and v, to the cache rows; cos and sin are [rows][rotary], the first half
// of sin negated.
template <class T>
void rope_write(T* q, T* k, const T* v, int64_t ld, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
                int64_t rotary, const float* cos, const float* sin, const int64_t* cache_rows, T* keys, T* values,
                int64_t num_blocks, int64_t threads) {
  constexpr int P = Unit<T>::P;
  const int64_t padded = round_up(int(dim), LANES), half = rotary / 2;
  auto rotate = [=](T* x, int64_t row) {
    const float *c = cos + row * rotary, *s = sin + row * rotary;
    for (int64_t i = 0; i < half; ++i) {
      const float low = widen(x[i]), high = widen(x[i + half]);
      narrow(x[i], low * c[i] + high * s[i]);
      narrow(x[i + half], high * c[i + half] + low * s[i + half]);
    }
  };
  each(rows, rows < 8 ? 1 : int(threads), [=](int64_t row) {
    for (int64_t h = 0; h < heads; ++h) rotate(q + row * ld + h * dim, row);
    const int64_t block = cache_rows[row] / BLOCK, at = cache_rows[row] % BLOCK;
    for (int64_t h = 0; h < kv_heads; ++h) {
      T* key = k + row * ld + h * dim;
      rotate(key, row);
      T* to = keys + (h * num_blocks + block) * BLOCK * dim;
      for (int64_t d = 0; d < dim; ++d) to[(d / P * LANES + at) * P + d % P] = key[d];
      to = values + (h * num_blocks + block) * BLOCK * padded;
      const T* value = v + row * ld + h * dim;
      for (int64_t d = 0; d < dim; ++d) to[(at / P * padded + d) * P + at % P] = value[d];
    }
  });
}

}  // namespace
