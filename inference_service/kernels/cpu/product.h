// Products with weights in tiles: [columns / 16, rounded up][K / P][16 columns][P], or integers (packed.h).
#pragma once
#include "packed.h"

namespace {

constexpr int ROWS_KEPT = 64;                 // of a product, whose sums wait between two blocks of K
constexpr int64_t UNITS_OF_BLOCK = 2048;      // of K: three tiles of them stay in a core's second cache
constexpr int AHEAD = 32;                     // vectors of weights that are fetched before they are used
#ifdef __AVX512F__
constexpr int TALL_PRODUCT = 8, WIDE_PRODUCT = 3;  // rows and tiles of columns at a time: their sums fill the registers
#else
constexpr int TALL_PRODUCT = 4, WIDE_PRODUCT = 1;
#endif
constexpr int TALL_ROUNDED = 4;  // rows of integers, which have sums of integers too

// y[T][N] = x[T][K] w^T + bias. Integers of 8 or 4 bits have scales [tiles][K / group][16 columns]; 0 bits are whole values.
template <class T> struct Product {
  const T* x; int64_t ldx, rows, K;
  const uint8_t* w; const T* bias;
  int64_t bits; const bf16* scales; int64_t group;
  T* out; int64_t ldo, N;
  const RoundedRows* rounded;
};

// sums[t][c] (+)= x[t] . w of TALL rows and WIDE tiles of 16 columns, over units of K in order, with so many left to the
// end of the tiles: what a row gives does not depend on the rows beside it.
template <class U, class W, int TALL, int WIDE>
__attribute__((noinline)) void sum_tiles(const typename U::Value* x, int64_t ldx, const uint8_t* w, int64_t tile, int units,
                                         int left, float* sums, bool fresh) {
  typedef typename U::Sum Sum;
  Sum acc[TALL][WIDE];
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < WIDE; ++c) acc[t][c] = fresh ? Sum{} : load<Sum>(sums + (t * WIDE + c) * LANES);
  for (int u = 0; u < units; u += W::UNITS, w += sizeof(vu)) {
    const int64_t ahead = AHEAD * sizeof(vu) + (u + AHEAD * W::UNITS < left ? 0 : (WIDE - 1) * tile);  // at last of the next tiles
    for (int c = 0; c < WIDE; ++c) __builtin_prefetch(w + c * tile + ahead, 0, 2);
    for (int i = 0; i < W::UNITS; ++i) {
      vu each[WIDE];
      for (int c = 0; c < WIDE; ++c) each[c] = W::unit(w + c * tile, i);
      for (int t = 0; t < TALL; ++t) {
        const vu value = broadcast(x + t * ldx + (u + i) * U::P);
        for (int c = 0; c < WIDE; ++c) acc[t][c] = U::fma(acc[t][c], value, each[c]);
      }
    }
  }
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < WIDE; ++c) store(sums + (t * WIDE + c) * LANES, acc[t][c]);
}

template <class U, class W, int TALL, int WIDE>
inline void sum_rows(int rows, const typename U::Value* x, int64_t ldx, const uint8_t* w, int64_t tile, int units, int left,
                     float* sums, bool fresh) {
  if (rows == TALL) return sum_tiles<U, W, TALL, WIDE>(x, ldx, w, tile, units, left, sums, fresh);
  if constexpr (TALL > 1) sum_rows<U, W, TALL - 1, WIDE>(rows, x, ldx, w, tile, units, left, sums, fresh);
}

// The same of whole weights of a panel, from unit u on.
template <class T, int WIDE> struct WholePanel {
  const Product<T>& p; int64_t column;
  void add(int64_t t, int rows, int64_t u, int some, float* sums) const {
    constexpr int P = Unit<T>::P;
    const int64_t tile = p.K / P * sizeof(vu);
    sum_rows<Unit<T>, Whole, TALL_PRODUCT, WIDE>(rows, p.x + t * p.ldx + u * P, p.ldx, p.w + column / LANES * tile + u * sizeof(vu),
                                                 tile, some, int(p.K / P - u), sums, u == 0);
  }
};

// Of integers in float32, group by group, times their scales.
template <int BITS, int WIDE> struct IntegerPanel {
  typedef Integers<BITS> W;
  const Product<float>& p; int64_t column;
  void add(int64_t t, int rows, int64_t u, int some, float* sums) const {
    const int64_t tile = p.K / W::UNITS * sizeof(vu), scales = p.K / p.group * LANES;
    const uint8_t* w = p.w + column / LANES * tile + u / W::UNITS * sizeof(vu);
    alignas(64) float part[TALL_PRODUCT * WIDE * LANES];
    for (int g = 0, here; g < some; g += here) {
      const int64_t k = u + g;
      here = int(std::min<int64_t>(p.group - k % p.group, some - g));
      sum_rows<Unit<float>, W, TALL_PRODUCT, WIDE>(rows, p.x + t * p.ldx + k, p.ldx, w + g / W::UNITS * sizeof(vu), tile, here,
                                                   int(p.K - k), part, true);
      for (int i = 0; i < rows; ++i)
        for (int c = 0; c < WIDE; ++c) {
          float* to = sums + (i * WIDE + c) * LANES;
          const vf scale = load16(p.scales + (column / LANES + c) * scales + k / p.group * LANES);
          store(to, multiply_add(k ? load<vf>(to) : vf{}, load<vf>(part + (i * WIDE + c) * LANES), scale));
        }
    }
  }
};

// In a register, from which the compiler would read it from memory again for every row.
inline vu held(vu units) {
#ifdef __AVX512F__
  asm("" : "+v"(units));
#endif
  return units;
}

// Sums of TALL rows and WIDE tiles, of values of K from k to end: exact for those that have one step of x, and then in order.
template <class W, int TALL, int WIDE>
__attribute__((noinline)) void sum_rounded(const Product<bf16>& p, int64_t column, int64_t t, int64_t k, int64_t end, float* sums) {
  constexpr int64_t OF_VECTOR = Quads::P * W::UNITS;  // values of K
  const int64_t K = p.K, group = p.group, tile = K / OF_VECTOR * sizeof(vu), groups = K / group * LANES;
  const int64_t parts = p.rounded->parts_of_row();
  const uint8_t* w = p.w + column / LANES * tile + k / OF_VECTOR * sizeof(vu);
  const bf16* scales = p.scales + column / LANES * groups;
  const int8_t* x = p.rounded->row(t) + k;
  const int32_t* starts = p.rounded->starts_of(t) + k / ROUNDED;
  const float* steps = p.rounded->steps_of(t) + k / ROUNDED;
  vf acc[TALL][WIDE];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < WIDE; ++c) acc[i][c] = k ? load<vf>(sums + (i * WIDE + c) * LANES) : vf{};
  const bool fetch = !t;  // later rows find them in a core's cache
  auto part = [&](int vectors) __attribute__((always_inline)) {
    vi sum[TALL][WIDE];
    const int64_t ahead = AHEAD * sizeof(vu) + (k + AHEAD * OF_VECTOR < K ? 0 : (WIDE - 1) * tile);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < WIDE; ++c) sum[i][c] = vi{} + starts[i * parts];
#pragma GCC unroll 1
    for (int v = 0; v < vectors; ++v, w += sizeof(vu)) {
      if (fetch)
        for (int c = 0; c < WIDE; ++c) __builtin_prefetch(w + c * tile + ahead, 0, 2);
#pragma GCC unroll 8
      for (int u = 0; u < W::UNITS; ++u, x += Quads::P) {
        vu each[WIDE];
        for (int c = 0; c < WIDE; ++c) each[c] = held(W::unit(w + c * tile, u));
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
          const vu value = broadcast(x + i * K);
#pragma GCC unroll 8
          for (int c = 0; c < WIDE; ++c) sum[i][c] = Quads::fma(sum[i][c], value, each[c]);
        }
      }
    }
    vf scale[WIDE];
    if (W::GROUPED)
      for (int c = 0; c < WIDE; ++c) scale[c] = load16(scales + c * groups + k / group * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i) {
      const vf step = vf{} + steps[i * parts];
#pragma GCC unroll 8
      for (int c = 0; c < WIDE; ++c)
        acc[i][c] = multiply_add(acc[i][c], __builtin_convertvector(sum[i][c], vf), W::GROUPED ? step * scale[c] : step);
    }
    ++starts, ++steps;
  };
  for (; k + ROUNDED <= end; k += ROUNDED) part(W::VECTORS);
  if (k < end) part(int((end - k) / OF_VECTOR));
#pragma GCC unroll 8
  for (int c = 0; c < WIDE; ++c) {
    const vf scale = W::GROUPED || end < K ? splat(1.0f) : load16(scales + c * groups);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i) store(sums + (i * WIDE + c) * LANES, acc[i][c] * scale);
  }
}

template <class W, int TALL, int WIDE>
inline void sum_rounded_rows(int rows, const Product<bf16>& p, int64_t column, int64_t t, int64_t k, int64_t end, float* sums) {
  if (rows >= TALL) return sum_rounded<W, TALL, WIDE>(p, column, t, k, end, sums);
  if constexpr (TALL > 1) sum_rounded_rows<W, TALL - 1, WIDE>(rows, p, column, t, k, end, sums);
}

template <class W, int WIDE> struct RoundedPanel {
  const Product<bf16>& p; int64_t column;
  void add(int64_t t, int rows, int64_t u, int some, float* sums) const {
    const int64_t k = u * Unit<bf16>::P, end = k + some * Unit<bf16>::P;
    for (int i = 0; i < rows; i += TALL_ROUNDED)
      sum_rounded_rows<W, TALL_ROUNDED, WIDE>(rows - i, p, column, t + i, k, end, sums + i * WIDE * LANES);
  }
};

template <class T>
inline void write_sums(int rows, int wide, const float* sums, const T* bias, T* out, int64_t ldo, int valid) {
  for (int t = 0; t < rows; ++t)
    for (int c = 0; c < wide; ++c, sums += LANES) {
      T* to = out + t * ldo + c * LANES;
      const vf sum = load<vf>(sums);
      const int here = std::min(LANES, valid - c * LANES);
      if (here == LANES) {
        store16(to, bias ? sum + load16(bias + c * LANES) : sum);
      } else if (here > 0) {
        T edge[LANES] = {};
        if (bias) std::memcpy(edge, bias + c * LANES, here * sizeof(T));
        store16(edge, sum + load16(edge));
        std::memcpy(to, edge, here * sizeof(T));
      }
    }
}

// WIDE tiles of columns from `column` on, of all rows.
template <class T, int WIDE, class Panel> void product_panel(const Product<T>& p, int64_t column, const Panel& panel) {
  const int64_t units = p.K / Unit<T>::P;
  const T* bias = p.bias ? p.bias + column : nullptr;
  float kept[ROWS_KEPT * WIDE * LANES];
  for (int64_t begin = 0; begin < p.rows; begin += ROWS_KEPT)
    for (int64_t u = 0; u < units; u += UNITS_OF_BLOCK) {
      const int some = int(std::min(UNITS_OF_BLOCK, units - u));
      const int64_t end = std::min(p.rows, begin + ROWS_KEPT);
      for (int64_t t = begin; t < end; t += TALL_PRODUCT) {
        const int rows = int(std::min<int64_t>(TALL_PRODUCT, end - t));
        float* sums = kept + (t - begin) * WIDE * LANES;
        panel.add(t, rows, u, some, sums);
        if (u + some == units) write_sums(rows, WIDE, sums, bias, p.out + t * p.ldo + column, p.ldo, int(p.N - column));
      }
    }
}

template <int WIDE> void integer_panel(const Product<float>& p, int64_t column) {
  if (p.bits == 8) product_panel<float, WIDE>(p, column, IntegerPanel<8, WIDE>{p, column});
  else product_panel<float, WIDE>(p, column, IntegerPanel<4, WIDE>{p, column});
}
template <int WIDE> void integer_panel(const Product<bf16>& p, int64_t column) {
  if (p.bits == 8) product_panel<bf16, WIDE>(p, column, RoundedPanel<Quartets<8>, WIDE>{p, column});
  else product_panel<bf16, WIDE>(p, column, RoundedPanel<Quartets<4>, WIDE>{p, column});
}
template <class T, int WIDE> void product_panel(const Product<T>& p, int64_t column) {
  if (p.bits) integer_panel<WIDE>(p, column);
  else product_panel<T, WIDE>(p, column, WholePanel<T, WIDE>{p, column});
}

}  // namespace
