// Products with weights in tiles: [columns / 16, rounded up][K / P][16 columns][P], integers (packed.h), compact ones, or blocks.
#pragma once
#include "compact.h"
#include "blocks.h"

namespace {

constexpr int ROWS_KEPT = 64;             // of a product, whose sums wait between two blocks of K
constexpr int64_t UNITS_OF_BLOCK = 2048;  // of K: three tiles of them stay in a core's second cache
// Rows and tiles of columns at a time, whose sums fill the registers; and rows of integers, which have sums of integers too.
#if defined(__AVX512F__)
constexpr int TALL_PRODUCT = 8, WIDE_PRODUCT = 3, TALL_ROUNDED = 4;
#else
constexpr int TALL_PRODUCT = 6, WIDE_PRODUCT = 1, TALL_ROUNDED = 2;
#endif

// y[T][N] = x[T][K] w^T + bias. Integers of 8 or 4 bits have scales [tiles][K / group][16 columns]; 0 bits are whole values, and
// 12 are whole ones too (compact.h), whose scales are what lies beside the tiles. BLOCKS have BlockTile [tiles] for w (blocks.h).
template <class T> struct Product {
  const T* x; int64_t ldx, rows, K;
  const uint8_t* w; const T* bias;
  int64_t bits; const bf16* scales; int64_t group;
  T* out; int64_t ldo, N;
  const float* widened;  // x [T][K] in the order of Pairs, where bfloat16 is multiplied so
  const RoundedRows* rounded;
};

// How a unit is multiplied.
struct Floats {
  typedef float Value;
  static constexpr int P = 1;
  static inline rf fma(rf acc, ru a, ru b) { return multiply_add(acc, as<rf>(a), as<rf>(b)); }
  static inline const float* row(const Product<float>& p, int64_t t) { return p.x + t * p.ldx; }
  static inline const float* row(const Product<bf16>& p, int64_t t) { return p.widened + t * p.K; }
};
#ifdef __AVX512BF16__
struct Bfloats {
  typedef bf16 Value;
  static constexpr int P = 2;
  static inline rf fma(rf acc, ru a, ru b) { return Unit<bf16>::fma(acc, a, b); }
  static inline const bf16* row(const Product<bf16>& p, int64_t t) { return p.x + t * p.ldx; }
};
#endif

// The vectors of WIDE tiles as they lie.
template <int WIDE> struct Stored {
  static constexpr int VECTORS = 1;
  const uint8_t* w; int64_t apart, left;  // bytes from tile to tile, and to the end of one
  inline const uint8_t* next() {
    const int64_t ahead = AHEAD + (left > AHEAD ? 0 : (WIDE - 1) * apart);  // at last of the next tiles
    for (int c = 0; c < WIDE; ++c) __builtin_prefetch(w + c * apart + ahead, 0, 2);
    const uint8_t* here = w;
    w += sizeof(vu), left -= sizeof(vu);
    return here;
  }
};

// sums[t][c] (+)= x[t] . w of TALL rows and WIDE tiles of 16 columns, over units of K in order: a row's result does not depend
// on the rows beside it.
template <class U, class W, int TALL, int WIDE, class From>
__attribute__((noinline)) void sum_tiles(const typename U::Value* x, int64_t ldx, From& weights, int units, float* sums, bool fresh) {
  constexpr int PARTS = WIDE * SPLIT, OF_PART = LANES / SPLIT, UNITS = From::VECTORS * W::UNITS;
  From from = weights;
  rf acc[TALL][PARTS];
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < PARTS; ++c) acc[t][c] = fresh ? rf{} : load<rf>(sums + (t * PARTS + c) * OF_PART);
  for (int u = 0; u < units; u += UNITS) {
    const uint8_t* w = from.next();
#pragma GCC unroll 8
    for (int i = 0; i < UNITS; ++i) {
      const uint8_t* vector = w + i / W::UNITS * sizeof(vu);
      ru each[PARTS];
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; ++c) each[c] = W::unit(vector + c / SPLIT * from.apart, i % W::UNITS, c % SPLIT);
#pragma GCC unroll 8
      for (int t = 0; t < TALL; ++t) {
        const ru value = repeated(x + t * ldx + (u + i) * U::P);
#pragma GCC unroll 8
        for (int c = 0; c < PARTS; ++c) acc[t][c] = U::fma(acc[t][c], value, each[c]);
      }
    }
  }
  for (int t = 0; t < TALL; ++t)
    for (int c = 0; c < PARTS; ++c) store(sums + (t * PARTS + c) * OF_PART, acc[t][c]);
  weights = from;
}

template <class U, class W, int TALL, int WIDE, class From>
inline void sum_rows(int rows, const typename U::Value* x, int64_t ldx, From& from, int units, float* sums, bool fresh) {
  if (rows == TALL) return sum_tiles<U, W, TALL, WIDE>(x, ldx, from, units, sums, fresh);
  if constexpr (TALL > 1) sum_rows<U, W, TALL - 1, WIDE>(rows, x, ldx, from, units, sums, fresh);
}

// The same of WIDE tiles of weights W as U multiplies them, from value k of K on; integers group by group, times their scales.
template <class T, class U, class W, int WIDE> struct Panel {
  static constexpr int OF_VECTOR = W::UNITS * U::P;  // values of K
  static constexpr int64_t BLOCK = UNITS_OF_BLOCK * U::P, TALL = TALL_PRODUCT;
  const Product<T>& p; int64_t column;

  void sum(int64_t t, int rows, int64_t k, int some, float* sums, bool fresh) const {
    const int64_t tile = p.K / OF_VECTOR * sizeof(vu), ldx = U::row(p, 1) - U::row(p, 0);
    const int64_t before = k / OF_VECTOR * sizeof(vu);
    Stored<WIDE> from{p.w + column / LANES * tile + before, tile, tile - before};
    sum_rows<U, W, TALL, WIDE>(rows, U::row(p, t) + k, ldx, from, some / U::P, sums, fresh);
  }

  void add(int64_t t, int rows, int64_t k, int some, float* sums) const {
    if (!p.bits) return sum(t, rows, k, some, sums, k == 0);
    const int64_t scales = p.K / p.group * LANES;
    alignas(64) float part[TALL * WIDE * LANES];
    for (const int64_t end = k + some; k < end; k += some) {
      some = int(std::min(p.group - k % p.group, end - k));
      sum(t, rows, k, some, part, true);
      for (int i = 0; i < rows; ++i)
        for (int c = 0; c < WIDE; ++c) {
          float* to = sums + (i * WIDE + c) * LANES;
          const vf scale = load16(p.scales + (column / LANES + c) * scales + k / p.group * LANES);
          store(to, multiply_add(k ? load<vf>(to) : vf{}, load<vf>(part + (i * WIDE + c) * LANES), scale));
        }
    }
  }
};

#ifdef __AVX512BF16__
// The same of compact ones, as U multiplies W: the first rows decode them, for those that come after.
template <class U, class W, int WIDE> struct CompactPanel {
  static constexpr int64_t BLOCK = UNITS_OF_BLOCK * 2, TALL = TALL_PRODUCT;
  const Product<bf16>& p; int64_t column;
  Compact<WIDE> from = begin();

  Compact<WIDE> begin() const {
    return {p.w, reinterpret_cast<const int64_t*>(p.scales), column * p.K / OF_GRANULE, p.K * LANES / OF_GRANULE};
  }
  void add(int64_t t, int rows, int64_t k, int some, float* sums) {
    static thread_local std::vector<vu> room;
    room.resize(WIDE * std::min(BLOCK, p.K) / 2);
    uint8_t* decoded = reinterpret_cast<uint8_t*>(room.data());
    const auto x = U::row(p, t) + k;
    const int64_t ldx = U::row(p, 1) - U::row(p, 0);
    if (t == 0 || (t % ROWS_KEPT == 0 && p.K > BLOCK)) {
      if (k == 0) from = begin();
      from.write(decoded, some, t + rows < p.rows);
      return sum_rows<U, W, TALL, WIDE>(rows, x, ldx, from, some / U::P, sums, k == 0);
    }
    const int64_t apart = some / 2 * sizeof(vu);
    Stored<WIDE> all{decoded, apart, apart};
    sum_rows<U, W, TALL, WIDE>(rows, x, ldx, all, some / U::P, sums, k == 0);
  }
};
#endif

// Sums of TALL rows and WIDE tiles, of values of K from k to end: exact for those that have one step of x, and then in order.
template <int BITS, int TALL, int WIDE>
__attribute__((noinline)) void sum_rounded(const Product<bf16>& p, int64_t column, int64_t t, int64_t k, int64_t end, float* sums) {
  typedef Quartets<BITS> W;
  constexpr int PARTS = WIDE * SPLIT, OF_PART = LANES / SPLIT;
  constexpr int64_t OF_VECTOR = W::P * W::UNITS;  // values of K
  const int64_t K = p.K, group = p.group, tile = K / OF_VECTOR * sizeof(vu), groups = K / group * LANES;
  const int64_t parts = p.rounded->parts_of_row();
  const uint8_t* w = p.w + column / LANES * tile + k / OF_VECTOR * sizeof(vu);
  const bf16* scales = p.scales + column / LANES * groups;
  const int8_t* x = p.rounded->row(t) + k;
  const int32_t* starts = p.rounded->starts_of(t) + k / ROUNDED;
  const float* steps = p.rounded->steps_of(t) + k / ROUNDED;
  auto scale_of = [&](int c, int64_t at) { return load_part(scales + c / SPLIT * groups + at + c % SPLIT * OF_PART); };
  rf acc[TALL][PARTS];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < PARTS; ++c) acc[i][c] = k ? load<rf>(sums + (i * PARTS + c) * OF_PART) : rf{};
  const bool fetch = !t;  // later rows find them in a core's cache
  auto part = [&](int vectors) __attribute__((always_inline)) {
    Exact<BITS> sum[TALL][PARTS];
    const int64_t ahead = AHEAD + (k + AHEAD / int64_t(sizeof(vu)) * OF_VECTOR < K ? 0 : (WIDE - 1) * tile);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; ++c) sum[i][c].begin(starts[i * parts]);
#pragma GCC unroll 1
    for (int v = 0; v < vectors; ++v, w += sizeof(vu)) {
      if (fetch)
        for (int c = 0; c < WIDE; ++c) __builtin_prefetch(w + c * tile + ahead, 0, 2);
#pragma GCC unroll 8
      for (int u = 0; u < W::UNITS; ++u, x += W::P) {
        ru each[PARTS];
        for (int c = 0; c < PARTS; ++c) each[c] = held(W::unit(w + c / SPLIT * tile, u, c % SPLIT));
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
          const ru value = repeated(x + i * K);
#pragma GCC unroll 8
          for (int c = 0; c < PARTS; ++c) sum[i][c].add(value, each[c]);
        }
      }
    }
    rf scale[PARTS];
    if (W::GROUPED)
      for (int c = 0; c < PARTS; ++c) scale[c] = scale_of(c, k / group * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i) {
      const rf step = rf{} + steps[i * parts];
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; ++c)
        acc[i][c] = multiply_add(acc[i][c], __builtin_convertvector(sum[i][c].total(), rf), W::GROUPED ? step * scale[c] : step);
    }
    ++starts, ++steps;
  };
  for (; k + ROUNDED <= end; k += ROUNDED) part(W::VECTORS);
  if (k < end) part(int((end - k) / OF_VECTOR));
#pragma GCC unroll 8
  for (int c = 0; c < PARTS; ++c) {
    const rf scale = W::GROUPED || end < K ? rf{} + 1.0f : scale_of(c, 0);
#pragma GCC unroll 8
    for (int i = 0; i < TALL; ++i) store(sums + (i * PARTS + c) * OF_PART, acc[i][c] * scale);
  }
}

template <int BITS, int TALL, int WIDE>
inline void sum_rounded_rows(int rows, const Product<bf16>& p, int64_t column, int64_t t, int64_t k, int64_t end, float* sums) {
  if (rows == TALL) return sum_rounded<BITS, TALL, WIDE>(p, column, t, k, end, sums);
  if constexpr (TALL > 1) sum_rounded_rows<BITS, TALL - 1, WIDE>(rows, p, column, t, k, end, sums);
}

template <int BITS, int WIDE> struct RoundedPanel {
  static constexpr int64_t BLOCK = UNITS_OF_BLOCK * Unit<bf16>::P, TALL = TALL_ROUNDED;
  const Product<bf16>& p; int64_t column;
  void add(int64_t t, int rows, int64_t k, int some, float* sums) const {
    sum_rounded_rows<BITS, TALL, WIDE>(rows, p, column, t, k, k + some, sums);
  }
};

// The same of blocks that are of one kind.
template <int BITS, int TALL, int WIDE>
__attribute__((noinline)) void sum_blocks(const Product<bf16>& p, const BlockTile* tiles, int64_t t, int64_t k, int64_t end, float* sums) {
  constexpr int PARTS = WIDE * SPLIT, OF_PART = LANES / SPLIT, SCALES = BlockOf<BITS>::SCALES;
  const int64_t K = p.K, parts = p.rounded->parts_of_row();
  const int8_t* x = p.rounded->row(t) + k;
  const float* steps = p.rounded->steps_of(t);
  const int32_t* totals = p.rounded->starts_of(t);
  const bool offset = tiles->kind & OFFSET, fetch = !t;
  const int32_t zero = BlockOf<BITS>::zero(*tiles);
  const int64_t blocks = K / OF_BLOCK, of_block = BlockOf<BITS>::scale_bytes(*tiles);
  rf acc[TALL][PARTS];
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < PARTS; ++c) acc[i][c] = k ? load<rf>(sums + (i * PARTS + c) * OF_PART) : rf{};
  for (int64_t block = k / OF_BLOCK; block < end / OF_BLOCK; ++block) {
    const uint8_t* numbers[WIDE];
    for (int c = 0; c < WIDE; ++c) {
      numbers[c] = tiles[c].numbers + block * BlockOf<BITS>::BYTES;
      if (fetch) {
        const bool last = (blocks - block) * BlockOf<BITS>::BYTES <= AHEAD;  // then those of the next tiles
        const uint8_t* ahead = numbers[c] + AHEAD + (last ? (WIDE - 1) * blocks * BlockOf<BITS>::BYTES : 0);
        for (int line = 0; line < BITS; ++line) __builtin_prefetch(ahead + line * 64, 0, 2);
        __builtin_prefetch(tiles[c].scales + block * of_block + 512 + (last ? (WIDE - 1) * blocks * of_block : 0), 0, 2);
      }
    }
    Exact<BITS == 4 ? 4 : 8> sum[TALL][PARTS];
    const auto begin = [&](int half) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = 0; i < TALL; ++i) {
        const int32_t total = SCALES == 1 ? totals[i * parts + block] : p.rounded->half_of(t + i, block, half);
#pragma GCC unroll 8
        for (int c = 0; c < PARTS; ++c) sum[i][c].begin(-zero * total);
      }
    };
    const auto multiply = [&](int half) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int u = 0; u < 4; ++u, x += 4) {
        ru each[PARTS];
        for (int c = 0; c < PARTS; ++c) each[c] = held(BlockOf<BITS>::unit(numbers[c / SPLIT], half, u, c % SPLIT));
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
          const ru value = repeated(x + i * K);
#pragma GCC unroll 8
          for (int c = 0; c < PARTS; ++c) sum[i][c].add(value, each[c]);
        }
      }
    };
    const auto add = [&](int half) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; ++c) {
        const rf scale = block_scale<BITS>(tiles[c / SPLIT], block, half, c % SPLIT);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i) {
          const rf step = rf{} + steps[i * parts + block];
          acc[i][c] = multiply_add(acc[i][c], __builtin_convertvector(sum[i][c].total(), rf), step * scale);
        }
      }
    };
    if (SCALES == 1) begin(0);
#pragma GCC unroll 1
    for (int half = 0; half < 2; ++half) {
      asm("" : "+r"(half));  // a loop: unrolled, it keeps sums in memory
      if (SCALES == 2) begin(half);
      multiply(half);
      if (SCALES == 2) add(half);
    }
    if (SCALES == 1) add(0);
    if (offset)
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; ++c) {
        const rf shared = block_offset<BITS>(tiles[c / SPLIT], block, c % SPLIT);
#pragma GCC unroll 8
        for (int i = 0; i < TALL; ++i)
          acc[i][c] = multiply_add(acc[i][c], rf{} + steps[i * parts + block] * float(totals[i * parts + block]), shared);
      }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < PARTS; ++c) store(sums + (i * PARTS + c) * OF_PART, acc[i][c]);
}

template <int BITS, int TALL, int WIDE>
inline void sum_block_rows(int rows, const Product<bf16>& p, const BlockTile* tiles, int64_t t, int64_t k, int64_t end, float* sums) {
  if (rows == TALL) return sum_blocks<BITS, TALL, WIDE>(p, tiles, t, k, end, sums);
  if constexpr (TALL > 1) sum_block_rows<BITS, TALL - 1, WIDE>(rows, p, tiles, t, k, end, sums);
}

template <class T, int BITS, int WIDE> struct BlocksPanel {
  static constexpr int64_t BLOCK = UNITS_OF_BLOCK * 4, TALL = TALL_ROUNDED;
  const Product<bf16>& p; const BlockTile* tiles;
  void add(int64_t t, int rows, int64_t k, int some, float* sums) const {
    sum_block_rows<BITS, TALL, WIDE>(rows, p, tiles, t, k, k + some, sums);
  }
};

// In float32, the first rows decode them for those that come after.
template <int BITS, int WIDE> struct BlocksPanel<float, BITS, WIDE> {
  static constexpr int64_t BLOCK = UNITS_OF_BLOCK, TALL = TALL_PRODUCT;
  const Product<float>& p; const BlockTile* tiles;
  void add(int64_t t, int rows, int64_t k, int some, float* sums) const {
    static thread_local std::vector<vf> room;
    room.resize(WIDE * std::min(BLOCK, p.K));
    float* decoded = reinterpret_cast<float*>(room.data());
    const float* x = p.x + t * p.ldx + k;
    if (t == 0 || (t % ROWS_KEPT == 0 && p.K > BLOCK)) {
      Blocks<WIDE> from(decode_block<BITS, WIDE>, tiles, k, decoded, some, t + rows < p.rows);
      return sum_rows<Floats, Whole, TALL, WIDE>(rows, x, p.ldx, from, some, sums, k == 0);
    }
    const int64_t apart = some * sizeof(vf);
    Stored<WIDE> all{reinterpret_cast<const uint8_t*>(decoded), apart, apart};
    sum_rows<Floats, Whole, TALL, WIDE>(rows, x, p.ldx, all, some, sums, k == 0);
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
template <int WIDE, class T, class Panel> void product_panel(const Product<T>& p, int64_t column, Panel panel) {
  const T* bias = p.bias ? p.bias + column : nullptr;
  float kept[ROWS_KEPT * WIDE * LANES];
  for (int64_t begin = 0; begin < p.rows; begin += ROWS_KEPT)
    for (int64_t k = 0; k < p.K; k += Panel::BLOCK) {
      const int some = int(std::min<int64_t>(Panel::BLOCK, p.K - k));
      const int64_t end = std::min(p.rows, begin + ROWS_KEPT);
      const int64_t times = (end - begin + Panel::TALL - 1) / Panel::TALL, tall = (end - begin + times - 1) / times;
      for (int64_t t = begin; t < end; t += tall) {
        const int rows = int(std::min(tall, end - t));
        float* sums = kept + (t - begin) * WIDE * LANES;
        panel.add(t, rows, k, some, sums);
        if (k + some == p.K) write_sums(rows, WIDE, sums, bias, p.out + t * p.ldo + column, p.ldo, int(p.N - column));
      }
    }
}

// Tiles of several kinds are multiplied one by one.
template <int WIDE, class T> void blocks_panel(const Product<T>& p, int64_t column) {
  const BlockTile* tiles = reinterpret_cast<const BlockTile*>(p.w) + column / LANES;
  for (int c = 1; c < WIDE; ++c)
    if (tiles[c].kind != tiles->kind) {
      for (int each = 0; each < WIDE; ++each) blocks_panel<1>(p, column + each * LANES);
      return;
    }
  const int bits = tiles->kind & 15;
  if (bits == 4) product_panel<WIDE>(p, column, BlocksPanel<T, 4, WIDE>{p, tiles});
  else if (bits == 5) product_panel<WIDE>(p, column, BlocksPanel<T, 5, WIDE>{p, tiles});
  else if (bits == 6) product_panel<WIDE>(p, column, BlocksPanel<T, 6, WIDE>{p, tiles});
  else product_panel<WIDE>(p, column, BlocksPanel<T, 8, WIDE>{p, tiles});
}

template <int WIDE> void product_panel(const Product<float>& p, int64_t column) {
  if (p.bits == BLOCKS) blocks_panel<WIDE>(p, column);
  else if (p.bits == 8) product_panel<WIDE>(p, column, Panel<float, Floats, Integers<8>, WIDE>{p, column});
  else if (p.bits) product_panel<WIDE>(p, column, Panel<float, Floats, Integers<4>, WIDE>{p, column});
  else product_panel<WIDE>(p, column, Panel<float, Floats, Whole, WIDE>{p, column});
}
template <int WIDE> void product_panel(const Product<bf16>& p, int64_t column) {
  if (p.bits == BLOCKS) blocks_panel<WIDE>(p, column);
  else if (p.bits == 8) product_panel<WIDE>(p, column, RoundedPanel<8, WIDE>{p, column});
  else if (p.bits == 4) product_panel<WIDE>(p, column, RoundedPanel<4, WIDE>{p, column});
#ifdef __AVX512BF16__
  else if (p.widened) {
    if (p.bits) product_panel<WIDE>(p, column, CompactPanel<Floats, Pairs, WIDE>{p, column});
    else product_panel<WIDE>(p, column, Panel<bf16, Floats, Pairs, WIDE>{p, column});
  } else if (p.bits) product_panel<WIDE>(p, column, CompactPanel<Bfloats, Whole, WIDE>{p, column});
  else product_panel<WIDE>(p, column, Panel<bf16, Bfloats, Whole, WIDE>{p, column});
#else
  else product_panel<WIDE>(p, column, Panel<bf16, Floats, Pairs, WIDE>{p, column});
#endif
}

}  // namespace
