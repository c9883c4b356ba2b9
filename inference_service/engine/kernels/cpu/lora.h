// Adapters of exact ranks: a segment's rows times A, and that times B; where a slice has vectors, all of the output so far
// times c, and d added.
//
//   LoRA A:             [rows][K padded to 16 P]
//   LoRA B of a slice:  [columns / 16, rounded up][ceil(rank / P)][16 columns][P]
//   vectors of a slice: float c [columns rounded up to 16], then d
#pragma once
#include <vector>

#include "vectors.h"

namespace {

struct Slice { int64_t rank; const void* b; int64_t column; int64_t columns; const float* vectors; };
struct Adapter { const void* a; int64_t rows; int64_t slices; Slice slice[4]; };
struct Segment { int64_t adapter; int64_t first; int64_t length; };
// A segment's part in a blend: the column of y where its ranks begin, how many segments from here on have the same rows (0
// behind the first of them), and the factor of its ranks.
struct Part { int64_t column; int64_t count; double scale; };

// Tokens at a time, and rows of A or tiles of B, whose sums fill the registers.
#if defined(__AVX512F__)
constexpr int TALL_SHRINK = 4, WIDE_SHRINK = 4, TALL_EXPAND = 8;
#else
constexpr int TALL_SHRINK = 4, WIDE_SHRINK = 2, TALL_EXPAND = 4;
#endif
constexpr int WIDE_EXPAND = 2;
constexpr int PAGE_AHEAD = 64;  // lane vectors in a page: the processor does not fetch beyond the end of one by itself

// Tokens in groups of nearly the same size, of at most so many.
template <int MOST, class F> inline void by_groups(int64_t tokens, F task) {
  const int64_t groups = (tokens + MOST - 1) / MOST;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = tokens * g / groups;
    task(first, int(tokens * (g + 1) / groups - first));
  }
}

// y[t][row] = x[t] . a[row] for TOKENS tokens, in vectors of units, and ROWS rows.
template <class T, class M, int TOKENS, int ROWS>
inline void shrink_tile(const typename M::Vector* x, const T* a, int64_t vectors, float* y, int64_t ldy) {
  constexpr int STEP = LANES * Unit<T>::P;
  vf acc[TOKENS][ROWS] = {};
  for (int64_t i = 0; i < vectors; ++i) {
    vu w[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      w[r] = load<vu>(a + (r * vectors + i) * STEP);
      if (ROWS > 1) __builtin_prefetch(a + ((r + ROWS) * vectors + i) * STEP);  // the next rows
      else __builtin_prefetch(a + (r * vectors + i + PAGE_AHEAD) * STEP, 0, 2);
    }
    for (int t = 0; t < TOKENS; ++t)
      for (int r = 0; r < ROWS; ++r) acc[t][r] = M::fma(acc[t][r], x[t * vectors + i], w[r]);
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < ROWS; ++r) y[t * ldy + r] = sum(acc[t][r]);
}

template <class T, class M, int TOKENS>
void shrink_tokens(int tokens, const typename M::Vector* x, int64_t vectors, const T* a, int rows, float* y, int64_t ldy, bool once) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return shrink_tokens<T, M, TOKENS - 1>(tokens, x, vectors, a, rows, y, ldy, once);
  const int64_t stride = vectors * LANES * Unit<T>::P;
  int r = 0;
  for (; r + WIDE_SHRINK <= rows && !once; r += WIDE_SHRINK) shrink_tile<T, M, TOKENS, WIDE_SHRINK>(x, a + r * stride, vectors, y + r, ldy);
  for (; r < rows; ++r) shrink_tile<T, M, TOKENS, 1>(x, a + r * stride, vectors, y + r, ldy);
}

// The vectors c and d of a tile's columns, or null.
struct Vectors {
  const float *c, *d;
  inline vf of(vf x, int column) const { return c ? multiply_add(load16(d + column), x, load16(c + column)) : x; }
};

// out[t][c .. c + 16 * WIDE) += sum over units of y[t] * b, and then what vectors make of it.
template <class T, class M, int TOKENS, int WIDE>
inline void expand_tile(const typename M::Unit* y, int units, const T* b, Vectors vectors, T* out, int64_t ldo, int valid) {
  constexpr int P = Unit<T>::P;
  vf acc[TOKENS][WIDE] = {};
  for (int u = 0; u < units; ++u) {
    vu w[WIDE];
    for (int c = 0; c < WIDE; ++c) {
      w[c] = load<vu>(b + (c * units + u) * LANES * P);
      if (WIDE > 1) __builtin_prefetch(b + ((c + 2 * WIDE) * units + u) * LANES * P);
      else __builtin_prefetch(b + (c * units + u + PAGE_AHEAD) * LANES * P, 0, 2);
    }
    for (int t = 0; t < TOKENS; ++t) {
      const auto v = M::repeated(y[t * units + u]);
      for (int c = 0; c < WIDE; ++c) acc[t][c] = M::fma(acc[t][c], v, w[c]);
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int c = 0; c < WIDE; ++c) {
      T* to = out + t * ldo + c * LANES;
      const int here = std::min(LANES, valid - c * LANES);
      if (here == LANES) {
        store16(to, vectors.of(load16(to) + acc[t][c], c * LANES));
      } else if (here > 0) {
        T edge[LANES] = {};
        std::memcpy(edge, to, here * sizeof(T));
        store16(edge, vectors.of(load16(edge) + acc[t][c], c * LANES));
        std::memcpy(to, edge, here * sizeof(T));
      }
    }
}

template <class T, class M, int WIDE, int TOKENS = TALL_EXPAND>
void expand_columns(int tokens, const typename M::Unit* y, int units, const T* b, Vectors vectors, T* out, int64_t ldo, int valid) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return expand_columns<T, M, WIDE, TOKENS - 1>(tokens, y, units, b, vectors, out, ldo, valid);
  expand_tile<T, M, TOKENS, WIDE>(y, units, b, vectors, out, ldo, valid);
}

// A unit of y for a slice: float as it is, bfloat16 rounded in pairs; an odd rank gets a zero.
template <class T> inline uint32_t unit_of(const float* y, int64_t left) {
  T values[Unit<T>::P] = {};
  for (int i = 0; i < Unit<T>::P && i < left; ++i) narrow(values[i], y[i]);
  return load<uint32_t>(values);
}

constexpr int TOKENS_PER_TASK = 16;
constexpr int COLUMNS_PER_TASK = 256;

// Whether an adapter does anything to its segment's rows.
inline bool acts(const Adapter& adapter) {
  bool vectors = false;
  for (int64_t i = 0; i < adapter.slices; ++i) vectors |= adapter.slice[i].vectors != nullptr;
  return adapter.rows || vectors;
}

struct LoraTask {
  int64_t segment, first, tokens, slice, begin, size;
  // Whether matrices are read for one group of tokens alone. Adapters come from memory, not from a cache, and what is read
  // front to back, a row or a tile of columns after the other, comes twice as fast as four rows side by side.
  bool once() const { return tokens <= 4; }
};

template <class T, class M>
void shrink_task(const LoraTask& task, const Segment& seg, const Adapter& adapter, const T* x, int64_t ldx, int64_t K,
                 float* y, int64_t ldy, float scale) {
  constexpr int STEP = LANES * Unit<T>::P;
  const int64_t row = seg.first + task.first, vectors = round_up(int(K), STEP) / STEP;
  const T* a = static_cast<const T*>(adapter.a) + task.begin * vectors * STEP;
  x += row * ldx;
  y += row * ldy + task.begin;
  static thread_local std::vector<typename M::Vector> room;
  room.resize(task.tokens * vectors);
  for (int64_t t = 0; t < task.tokens; ++t)
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t left = K - i * STEP;
      T last[STEP] = {};
      if (left < STEP) std::memcpy(last, x + t * ldx + i * STEP, left * sizeof(T));
      room[t * vectors + i] = M::vector(load<vu>(left < STEP ? last : x + t * ldx + i * STEP));
    }
  by_groups<TALL_SHRINK>(task.tokens, [&](int64_t t, int tokens) {
    shrink_tokens<T, M, TALL_SHRINK>(tokens, room.data() + t * vectors, vectors, a, int(task.size), y + t * ldy, ldy, task.once());
  });
  if (scale != 1)
    for (int64_t t = 0; t < task.tokens; ++t)
      for (int64_t r = 0; r < task.size; ++r) y[t * ldy + r] *= scale;
}

template <class T, class M>
void expand_task(const LoraTask& task, const Segment& seg, const Adapter& adapter, const float* y, int64_t ldy, T* out,
                 int64_t ldo) {
  constexpr int P = Unit<T>::P;
  const Slice& slice = adapter.slice[task.slice];
  int64_t first = 0;
  for (int64_t s = 0; s < task.slice; ++s) first += adapter.slice[s].rank;
  const int units = int((slice.rank + P - 1) / P), tokens = int(task.tokens);
  const int64_t row = seg.first + task.first;
  static thread_local std::vector<typename M::Unit> scratch;
  scratch.resize(size_t(tokens) * units);
  typename M::Unit* scaled = scratch.data();
  for (int t = 0; t < tokens; ++t)
    for (int u = 0; u < units; ++u)
      scaled[t * units + u] = M::of(unit_of<T>(y + (row + t) * ldy + first + u * P, slice.rank - u * P));
  const T* b = static_cast<const T*>(slice.b);
  const int step = task.once() ? LANES : WIDE_EXPAND * LANES;
  for (int64_t at = task.begin; at < task.begin + task.size; at += step) {
    const int valid = int(slice.columns - at);
    T* to = out + row * ldo + slice.column + at;
    const float* c = slice.vectors ? slice.vectors + at : nullptr;
    const Vectors vectors = {c, c + (c ? round_up(int(slice.columns), LANES) : 0)};
    const T* tile = b + at * units * P;
    by_groups<TALL_EXPAND>(tokens, [&](int64_t t, int some) {
      if (valid > LANES && !task.once()) expand_columns<T, M, WIDE_EXPAND>(some, scaled + t * units, units, tile, vectors, to + t * ldo, ldo, valid);
      else expand_columns<T, M, 1>(some, scaled + t * units, units, tile, vectors, to + t * ldo, ldo, valid);
    });
  }
}

// A matrix [rows, columns] wherever it lies, its steps from row to row and from column to column in values, and
// where it goes: as rows of A, or in tiles as B.
struct Piece { const void* from; int64_t row, column, rows, columns, tiled; void* to; };

template <class T> void pack_rows(const Piece& piece) {
  const int64_t width = round_up(int(piece.columns), LANES * Unit<T>::P);
  for (int64_t r = 0; r < piece.rows; ++r) {
    const T* from = static_cast<const T*>(piece.from) + r * piece.row;
    T* to = static_cast<T*>(piece.to) + r * width;
    if (piece.column == 1) std::memcpy(to, from, piece.columns * sizeof(T));
    else for (int64_t c = 0; c < piece.columns; ++c) to[c] = from[c * piece.column];
    std::memset(static_cast<void*>(to + piece.columns), 0, (width - piece.columns) * sizeof(T));
  }
}

template <class T> void pack_tiles(const Piece& piece) {
  constexpr int P = Unit<T>::P;
  const int64_t units = (piece.rows + P - 1) / P, whole = piece.row == 1 ? piece.rows / P : 0;
  int64_t done = 0;
  if (whole == units)  // tiles that are full: written as they lie, a line of units at a time
    for (; done + LANES <= piece.columns; done += LANES) {
      const T* from = static_cast<const T*>(piece.from) + done * piece.column;
      T* to = static_cast<T*>(piece.to) + done * units * P;
      for (int64_t u = 0; u < units; ++u) {
        T line[LANES * P];
        for (int l = 0; l < LANES; ++l) std::memcpy(line + l * P, from + l * piece.column + u * P, P * sizeof(T));
        std::memcpy(to + u * LANES * P, line, sizeof(line));
      }
    }
  for (int64_t c = done; c < round_up(int(piece.columns), LANES); ++c) {
    const T* from = static_cast<const T*>(piece.from) + c * piece.column;
    T* to = static_cast<T*>(piece.to) + (c / LANES * units * LANES + c % LANES) * P;
    if (c >= piece.columns) {
      for (int64_t u = 0; u < units; ++u) std::memset(static_cast<void*>(to + u * LANES * P), 0, P * sizeof(T));
      continue;
    }
    for (int64_t u = 0; u < whole; ++u) std::memcpy(to + u * LANES * P, from + u * P, P * sizeof(T));
    for (int64_t u = whole; u < units; ++u)
      for (int64_t r = u * P; r < (u + 1) * P; ++r) to[u * LANES * P + r % P] = r < piece.rows ? from[r * piece.row] : T{};
  }
}

template <class T> void pack(const Piece* pieces, int64_t count) {
  for (int64_t i = 0; i < count; ++i) pieces[i].tiled ? pack_tiles<T>(pieces[i]) : pack_rows<T>(pieces[i]);
}

}  // namespace
