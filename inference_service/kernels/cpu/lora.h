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

constexpr int PAGE_AHEAD = 64;  // lane vectors in a page: the processor does not fetch beyond the end of one by itself

// y[t][row] = x[t] . a[row] for TOKENS tokens and ROWS rows; units is K / P, a multiple of 16 in a.
template <class T, int TOKENS, int ROWS>
inline void shrink_tile(const T* const* x, const T* a, int64_t stride, int full, const T (*tail)[32], bool has_tail,
                        float* y, int64_t ldy) {
  constexpr int STEP = LANES * Unit<T>::P;
  vf acc[TOKENS][ROWS] = {};
  for (int i = 0; i < full; ++i) {
    vu w[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      w[r] = load<vu>(a + r * stride + i * STEP);
      if (ROWS > 1) __builtin_prefetch(a + (r + ROWS) * stride + i * STEP);  // the next rows
      else __builtin_prefetch(a + r * stride + (i + PAGE_AHEAD) * STEP, 0, 2);
    }
    for (int t = 0; t < TOKENS; ++t) {
      vu v = load<vu>(x[t] + i * STEP);
      for (int r = 0; r < ROWS; ++r) acc[t][r] = Unit<T>::fma(acc[t][r], v, w[r]);
    }
  }
  if (has_tail)
    for (int t = 0; t < TOKENS; ++t)
      for (int r = 0; r < ROWS; ++r)
        acc[t][r] = Unit<T>::fma(acc[t][r], load<vu>(tail[t]), load<vu>(a + r * stride + full * STEP));
  for (int t = 0; t < TOKENS; ++t)
    for (int r = 0; r < ROWS; ++r) y[t * ldy + r] = sum(acc[t][r]);
}

template <class T, int TOKENS>
void shrink_tokens(const T* x, int64_t ldx, int64_t K, const T* a, int rows, float* y, int64_t ldy, bool once) {
  constexpr int STEP = LANES * Unit<T>::P;
  const int full = int(K / STEP), rest = int(K % STEP);
  const int64_t stride = round_up(int(K), STEP);
  const T* from[TOKENS];
  T tail[TOKENS][32] = {};
  for (int t = 0; t < TOKENS; ++t) {
    from[t] = x + t * ldx;
    std::memcpy(tail[t], from[t] + int64_t(full) * STEP, rest * sizeof(T));
  }
  int r = 0;
  for (; r + 4 <= rows && !once; r += 4)
    shrink_tile<T, TOKENS, 4>(from, a + r * stride, stride, full, tail, rest > 0, y + r, ldy);
  for (; r < rows; ++r)
    shrink_tile<T, TOKENS, 1>(from, a + r * stride, stride, full, tail, rest > 0, y + r, ldy);
}

// The vectors c and d of a tile's columns, or null.
struct Vectors {
  const float *c, *d;
  inline vf of(vf x, int column) const { return c ? multiply_add(load16(d + column), x, load16(c + column)) : x; }
};

// out[t][c .. c + 16 * WIDE) += sum over units of y[t] * b, and then what vectors make of it.
template <class T, int TOKENS, int WIDE>
inline void expand_tile(const uint32_t* y, int64_t ldy, int units, const T* b, Vectors vectors, T* out, int64_t ldo, int valid) {
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
      vu v = vu{} + y[t * ldy + u];
      for (int c = 0; c < WIDE; ++c) acc[t][c] = Unit<T>::fma(acc[t][c], v, w[c]);
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

template <class T, int WIDE>
void expand_columns(const uint32_t* y, int64_t ldy, int units, const T* b, Vectors vectors, T* out, int64_t ldo, int tokens,
                    int valid) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4)
    expand_tile<T, 4, WIDE>(y + t * ldy, ldy, units, b, vectors, out + t * ldo, ldo, valid);
  for (; t < tokens; ++t)
    expand_tile<T, 1, WIDE>(y + t * ldy, ldy, units, b, vectors, out + t * ldo, ldo, valid);
}

// Units of y for a slice: float as it is, bfloat16 rounded in pairs; an odd rank gets a zero.
inline void to_units(const float* y, int rank, uint32_t* to, float*) { std::memcpy(to, y, rank * 4); }
inline void to_units(const float* y, int rank, uint32_t* to, bf16*) {
  for (int u = 0; u < (rank + 1) / 2; ++u) {
    bf16 pair[2] = {};
    narrow(pair[0], y[2 * u]);
    if (2 * u + 1 < rank) narrow(pair[1], y[2 * u + 1]);
    std::memcpy(to + u, pair, 4);
  }
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

template <class T>
void shrink_task(const LoraTask& task, const Segment& seg, const Adapter& adapter, const T* x, int64_t ldx, int64_t K,
                 float* y, int64_t ldy, float scale) {
  const int64_t row = seg.first + task.first;
  const T* a = static_cast<const T*>(adapter.a) + task.begin * round_up(int(K), LANES * Unit<T>::P);
  x += row * ldx;
  y += row * ldy + task.begin;
  int64_t t = 0;
  for (; t + 4 <= task.tokens; t += 4) shrink_tokens<T, 4>(x + t * ldx, ldx, K, a, int(task.size), y + t * ldy, ldy, task.once());
  for (; t < task.tokens; ++t) shrink_tokens<T, 1>(x + t * ldx, ldx, K, a, int(task.size), y + t * ldy, ldy, task.once());
  if (scale != 1)
    for (t = 0; t < task.tokens; ++t)
      for (int64_t r = 0; r < task.size; ++r) y[t * ldy + r] *= scale;
}

template <class T>
void expand_task(const LoraTask& task, const Segment& seg, const Adapter& adapter, const float* y, int64_t ldy, T* out,
                 int64_t ldo) {
  constexpr int P = Unit<T>::P;
  const Slice& slice = adapter.slice[task.slice];
  int64_t first = 0;
  for (int64_t s = 0; s < task.slice; ++s) first += adapter.slice[s].rank;
  const int units = int((slice.rank + P - 1) / P), tokens = int(task.tokens);
  const int64_t row = seg.first + task.first;
  static thread_local std::vector<uint32_t> scratch;
  scratch.resize(size_t(tokens) * units);
  uint32_t* scaled = scratch.data();
  for (int t = 0; t < tokens; ++t)
    to_units(y + (row + t) * ldy + first, int(slice.rank), scaled + t * units, static_cast<T*>(nullptr));
  const T* b = static_cast<const T*>(slice.b);
  const int step = task.once() ? LANES : 2 * LANES;
  for (int64_t at = task.begin; at < task.begin + task.size; at += step) {
    const int valid = int(slice.columns - at);
    T* to = out + row * ldo + slice.column + at;
    const float* c = slice.vectors ? slice.vectors + at : nullptr;
    const Vectors vectors = {c, c + (c ? round_up(int(slice.columns), LANES) : 0)};
    const T* tile = b + at * units * P;
    if (valid > LANES && !task.once()) expand_columns<T, 2>(scaled, units, units, tile, vectors, to, ldo, tokens, valid);
    else expand_columns<T, 1>(scaled, units, units, tile, vectors, to, ldo, tokens, valid);
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
