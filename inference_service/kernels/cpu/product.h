// Products with weights in tiles: [columns / 16, rounded up][K / P][16 columns][P].
#pragma once
#include "vectors.h"

namespace {

constexpr int ROWS_KEPT = 64;                 // of a product, whose sums wait between two blocks of K
constexpr int64_t UNITS_OF_BLOCK = 2048;      // of K: three tiles of them stay in a core's second cache
constexpr int AHEAD = 32;                     // units of weights that are fetched before they are used
#ifdef __AVX512F__
constexpr int TALL_PRODUCT = 8, WIDE_PRODUCT = 3;  // rows and tiles of columns at a time: their sums fill the registers
#else
constexpr int TALL_PRODUCT = 4, WIDE_PRODUCT = 1;
#endif

// y[T][N] = x[T][K] w^T + bias, where w is in tiles as B is, of K instead of ranks.
template <class T> struct Product {
  const T* x; int64_t ldx, rows, K;
  const T *w, *bias;
  T* out; int64_t ldo, N;
};

// TALL rows and WIDE tiles of 16 columns, over a block of K. A row's sums run over K in order: what it gives does not depend
// on the rows beside it.
template <class T, int TALL, int WIDE>
inline void product_tile(const T* x, int64_t ldx, const T* w, int64_t tile, int units, const T* bias, float* kept, bool first,
                         bool last, T* out, int64_t ldo, int valid) {
  constexpr int P = Unit<T>::P;
  vf acc[TALL][WIDE];
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < WIDE; ++c) acc[t][c] = first ? vf{} : load<vf>(kept + (t * WIDE + c) * LANES);
  for (int u = 0; u < units; ++u) {
    vu each[WIDE];
    for (int c = 0; c < WIDE; ++c) {
      each[c] = load<vu>(w + c * tile + u * LANES * P);
      __builtin_prefetch(w + c * tile + (u + AHEAD) * LANES * P, 0, 2);
    }
    for (int t = 0; t < TALL; ++t) {
      const vu value = broadcast(x + t * ldx + u * P);
      for (int c = 0; c < WIDE; ++c) acc[t][c] = Unit<T>::fma(acc[t][c], value, each[c]);
    }
  }
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < WIDE; ++c) {
      const int here = std::min(LANES, valid - c * LANES);
      T* to = out + t * ldo + c * LANES;
      if (!last) {
        store(kept + (t * WIDE + c) * LANES, acc[t][c]);
      } else if (here == LANES) {
        store16(to, bias ? acc[t][c] + load16(bias + c * LANES) : acc[t][c]);
      } else if (here > 0) {
        T edge[LANES] = {};
        if (bias) std::memcpy(edge, bias + c * LANES, here * sizeof(T));
        store16(edge, acc[t][c] + load16(edge));
        std::memcpy(to, edge, here * sizeof(T));
      }
    }
}

template <class T, int TALL, int WIDE>
inline void product_rest(int rows, const T* x, int64_t ldx, const T* w, int64_t tile, int units, const T* bias, float* kept,
                         bool first, bool last, T* out, int64_t ldo, int valid) {
  if (rows == TALL) return product_tile<T, TALL, WIDE>(x, ldx, w, tile, units, bias, kept, first, last, out, ldo, valid);
  if constexpr (TALL > 1) product_rest<T, TALL - 1, WIDE>(rows, x, ldx, w, tile, units, bias, kept, first, last, out, ldo, valid);
}

// WIDE tiles of columns from `column` on, of all rows.
template <class T, int WIDE> void product_panel(const Product<T>& p, int64_t column) {
  constexpr int P = Unit<T>::P;
  const int64_t units = p.K / P, tile = units * LANES * P;
  const T* w = p.w + column / LANES * tile;
  const T* bias = p.bias ? p.bias + column : nullptr;
  const int valid = int(p.N - column);
  float kept[ROWS_KEPT * WIDE * LANES];
  for (int64_t begin = 0; begin < p.rows; begin += ROWS_KEPT)
    for (int64_t u = 0; u < units; u += UNITS_OF_BLOCK) {
      const int some = int(std::min(UNITS_OF_BLOCK, units - u));
      const bool first = u == 0, last = u + some == units;
      const int64_t end = std::min(p.rows, begin + ROWS_KEPT);
      for (int64_t t = begin; t < end; t += TALL_PRODUCT)
        product_rest<T, TALL_PRODUCT, WIDE>(int(std::min<int64_t>(TALL_PRODUCT, end - t)), p.x + t * p.ldx + u * P, p.ldx,
                                            w + u * LANES * P, tile, some, bias, kept + (t - begin) * WIDE * LANES, first, last,
                                            p.out + t * p.ldo + column, p.ldo, valid);
    }
}

}  // namespace
