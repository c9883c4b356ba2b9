// The parts of a decoder step, for CPUs: products with LoRA of exact ranks, paged attention in place, and the
// element-wise steps between. float32 and bfloat16; sums are float32.
//
// A "unit" is 4 bytes: one float, or two bfloat16 that are multiplied together (vdpbf16ps where there is one).
// A "lane vector" is 16 units. Layouts, with P = 1 (float32) or 2 (bfloat16) values per unit:
//   K cache block of 16 positions:  [head_dim / P][16 positions][P]
//   V cache block of 16 positions:  [16 / P][head_dim padded to 16][P]
//   LoRA A:                         [rows][K padded to 16 P]
//   LoRA B of a slice:              [columns / 16, rounded up][ceil(rank / P)][16 columns][P]
//   weights of a linear:            the same, with K / P in place of ceil(rank / P)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#include <omp.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

namespace {

constexpr int LANES = 16;
constexpr int BLOCK = 16;  // positions of a cache block
constexpr int TILE = 8;    // query rows that are computed together
constexpr int SPAN = 64;   // positions between two rescalings of the softmax

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
inline vf floats(vu u) { vf f; std::memcpy(&f, &u, sizeof f); return f; }
inline vu bits(vf f) { vu u; std::memcpy(&u, &f, sizeof u); return u; }

// acc + a * b, said aloud: left to the compiler (-ffp-contract), it is one rounding in one loop and two in another, and
// what a row gives would depend on how many rows are computed together.
inline vf multiply_add(vf acc, vf a, vf b) {
#if defined(__AVX512F__)
  __m512 r, x, y; std::memcpy(&r, &acc, 64); std::memcpy(&x, &a, 64); std::memcpy(&y, &b, 64);
  r = _mm512_fmadd_ps(x, y, r);
  std::memcpy(&acc, &r, 64);
  return acc;
#else
  return acc + a * b;
#endif
}

struct bf16 { uint16_t raw; };

inline float widen(float x) { return x; }
inline float widen(bf16 x) { uint32_t u = uint32_t(x.raw) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {
  uint32_t u; std::memcpy(&u, &x, 4);
  to.raw = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline vf load16(const float* p) { return load<vf>(p); }
inline vf load16(const bf16* p) { return floats(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline void store16(float* p, vf x) { store(p, x); }
inline void store16(bf16* p, vf x) {
#ifdef __AVX512BF16__
  __m512 all; std::memcpy(&all, &x, sizeof all);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(all));
#else
  vu u = bits(x);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vi nan = x != x;
  vu result = (vu(nan) & 0x7fc0) | (~vu(nan) & rounded);
  store(p, __builtin_convertvector(result, vh));
#endif
}

template <class T> struct Unit;
template <> struct Unit<float> {
  static constexpr int P = 1;
#ifdef __AVX512F__
  static constexpr bool multiplies = true;  // products have the vectors that they were written for
#else
  static constexpr bool multiplies = false;
#endif
  static inline vf fma(vf acc, vu a, vu b) { return multiply_add(acc, floats(a), floats(b)); }
};
template <> struct Unit<bf16> {
  static constexpr int P = 2;
#ifdef __AVX512BF16__
  static constexpr bool multiplies = true;
#else
  static constexpr bool multiplies = false;
#endif
  static inline vf fma(vf acc, vu a, vu b) {
#ifdef __AVX512BF16__
    __m512 r; std::memcpy(&r, &acc, 64);
    __m512bh x, y; std::memcpy(&x, &a, 64); std::memcpy(&y, &b, 64);
    r = _mm512_dpbf16_ps(r, x, y);
    std::memcpy(&acc, &r, 64);
    return acc;
#else
    acc = multiply_add(acc, floats(a << 16), floats(b << 16));
    return multiply_add(acc, floats(a & 0xffff0000u), floats(b & 0xffff0000u));
#endif
  }
};
inline vu broadcast(const void* unit) { uint32_t u; std::memcpy(&u, unit, 4); return vu{} + u; }
inline float sum(vf v) {  // of halves, of their halves, and so on
#ifdef __AVX512F__
  __m512 all; std::memcpy(&all, &v, sizeof all);
  return _mm512_reduce_add_ps(all);
#else
  float s[LANES]; store(s, v);
  for (int w = LANES / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) s[i] += s[i + w];
  return s[0];
#endif
}
inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// e^x for x <= 0, relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2].
inline vf exp16(vf x) {
  vf low = splat(-87.0f);
  x = x < low ? low : x;
  vf magic = splat(12582912.0f);
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = multiply_add(x, n, splat(-0.693359375f));
  r = multiply_add(r, n, splat(2.12194440e-4f));
  vf p = splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(splat(c), p, r);
  p = multiply_add(r + 1.0f, p * r, r);
  vi e = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale; std::memcpy(&scale, &e, 64);
  return p * scale;
}

struct Slice { int64_t rank; const void* b; int64_t column; int64_t columns; };
struct Adapter { const void* a; int64_t rows; int64_t slices; Slice slice[3]; };
struct Segment { int64_t adapter; int64_t first; int64_t length; };

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

// out[t][c .. c + 16 * WIDE) += sum over units of y[t] * b.
template <class T, int TOKENS, int WIDE>
inline void expand_tile(const uint32_t* y, int64_t ldy, int units, const T* b, T* out, int64_t ldo, int valid) {
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
        store16(to, load16(to) + acc[t][c]);
      } else if (here > 0) {
        T edge[LANES] = {};
        std::memcpy(edge, to, here * sizeof(T));
        store16(edge, load16(edge) + acc[t][c]);
        std::memcpy(to, edge, here * sizeof(T));
      }
    }
}

template <class T, int WIDE>
void expand_columns(const uint32_t* y, int64_t ldy, int units, const T* b, T* out, int64_t ldo, int tokens, int valid) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4)
    expand_tile<T, 4, WIDE>(y + t * ldy, ldy, units, b, out + t * ldo, ldo, valid);
  for (; t < tokens; ++t)
    expand_tile<T, 1, WIDE>(y + t * ldy, ldy, units, b, out + t * ldo, ldo, valid);
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
constexpr double WORK_OF_ONE_THREAD = 60000;  // products; less is done before a second thread has woken up
constexpr int ROWS_KEPT = 64;                 // of a product, whose sums wait between two blocks of K
constexpr int64_t UNITS_OF_BLOCK = 2048;      // of K: three tiles of them stay in a core's second cache
constexpr int AHEAD = 32;                     // units of weights that are fetched before they are used
#ifdef __AVX512F__
constexpr int TALL_PRODUCT = 8, WIDE_PRODUCT = 3;  // rows and tiles of columns at a time: their sums fill the registers
#else
constexpr int TALL_PRODUCT = 4, WIDE_PRODUCT = 1;
#endif

// Runs task(i) for i in [0, count) on up to threads threads.
template <class F> inline void each(int64_t count, int threads, F task) {
  if (threads < 2 || count < 2) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) task(i);
}

struct LoraTask {
  int64_t segment, first, tokens, slice, begin, size;
  // Whether matrices are read for one group of tokens alone. Adapters come from memory, not from a cache, and what is read
  // front to back, a row or a tile of columns after the other, comes twice as fast as four rows side by side.
  bool once() const { return tokens <= 4; }
};

template <class T>
void shrink_task(const LoraTask& task, const Segment& seg, const Adapter& adapter, const T* x, int64_t ldx, int64_t K,
                 float* y, int64_t ldy) {
  const int64_t row = seg.first + task.first;
  const T* a = static_cast<const T*>(adapter.a) + task.begin * round_up(int(K), LANES * Unit<T>::P);
  x += row * ldx;
  y += row * ldy + task.begin;
  int64_t t = 0;
  for (; t + 4 <= task.tokens; t += 4) shrink_tokens<T, 4>(x + t * ldx, ldx, K, a, int(task.size), y + t * ldy, ldy, task.once());
  for (; t < task.tokens; ++t) shrink_tokens<T, 1>(x + t * ldx, ldx, K, a, int(task.size), y + t * ldy, ldy, task.once());
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
    if (valid > LANES && !task.once()) expand_columns<T, 2>(scaled, units, units, b + at * units * P, to, ldo, tokens, valid);
    else expand_columns<T, 1>(scaled, units, units, b + at * units * P, to, ldo, tokens, valid);
  }
}

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

// Tasks [0, count) of a team: each thread does its own share from front to back, then helps with the others', so that a thread
// whose core is taken away holds nobody up.
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

// What a linear and its adapters make of x, or, without w, what the adapters add to out. A slot's adapters of all linears are
// side by side: from one slot's to the next are apart of them. Threads take turns at rows of A, at columns of w, and, when all
// of those are done, at columns of B.
template <class T>
void linear(const Product<T>& base, const Adapter* adapters, int64_t apart, const Segment* segments, int64_t count, float* y,
            int64_t ldy, int64_t threads) {
  static thread_local std::vector<LoraTask> tasks, shrinks, expands;
  tasks.clear(); shrinks.clear(); expands.clear();
  double work = base.w ? double(base.rows) * base.K * base.N : 0;
  for (int64_t s = 0; s < count; ++s) {
    const Segment& seg = segments[s];
    if (!adapters[seg.adapter * apart].rows) continue;
    work += double(seg.length) * adapters[seg.adapter * apart].rows * base.K;
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
      const int64_t columns = adapter.slice[i].rank ? adapter.slice[i].columns : 0, some = shared ? COLUMNS_PER_TASK : columns;
      for (int64_t c = 0; c < columns; c += some)
        expands.push_back({whole.segment, whole.first, whole.tokens, i, c, std::min(some, columns - c)});
    }
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
    one->take([=](int64_t i) {
      const Segment& seg = segments[first[i].segment];
      shrink_task<T>(first[i], seg, adapters[seg.adapter * apart], base.x, base.ldx, base.K, y, ldy);
    });
    two->take([=](int64_t i) {
      if (i < panels && wide > 1) product_panel<T, WIDE_PRODUCT>(base, i * wide * LANES);
      else product_panel<T, 1>(base, (i < panels ? i : panels * wide + i - panels) * LANES);
    });
    if (seconds) {
#pragma omp barrier
      three->take([=](int64_t i) {
        const Segment& seg = segments[second[i].segment];
        expand_task<T>(second[i], seg, adapters[seg.adapter * apart], y, ldy, base.out, base.ldo);
      });
    }
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
  for (int64_t c = 0; c < round_up(int(piece.columns), LANES); ++c) {
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

struct Chunk { int64_t row, length, end; const int32_t* blocks; };

// s[row][position] = q[row] . k[position] of WIDE blocks, for the TALL rows of a tile.
template <class T, int TALL, int WIDE>
inline void score(const T* const* q, const T* keys, const int32_t* blocks, int64_t k_block, int units, float (*s)[SPAN]) {
  constexpr int P = Unit<T>::P;
  const T* k[WIDE];
  vf sums[WIDE][TALL] = {};
  for (int b = 0; b < WIDE; ++b) k[b] = keys + blocks[b] * k_block;
  for (int d = 0; d < units; ++d) {
    vu w[WIDE];
    for (int b = 0; b < WIDE; ++b) w[b] = load<vu>(k[b] + d * LANES * P);
    for (int i = 0; i < TALL; ++i) {
      const vu each = broadcast(q[i] + d * P);
      for (int b = 0; b < WIDE; ++b) sums[b][i] = Unit<T>::fma(sums[b][i], each, w[b]);
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
    const vf raw = load<vf>(s + j);
    tops = raw > tops ? raw : tops;
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
    const vi seen = raw != splat(-INFINITY);
    const vf value = floats(bits(exp16(raw - splat(top))) & vu(seen));
    added += value;
    store16(to + j, value);
  }
  total = total * shrink + sum(added);
  return shrink;
}

// acc[row][WIDE * LANES] += weights . values of the blocks, for the TALL rows of a tile.
template <class T, int TALL, int WIDE>
inline void gather(const uint32_t (*p)[SPAN], const T* values, const int32_t* blocks, int spans, int64_t v_block, int padded,
                   float (*acc)[512], int column) {
  constexpr int P = Unit<T>::P;
  vf part[TALL][WIDE];
  for (int i = 0; i < TALL; ++i)
    for (int c = 0; c < WIDE; ++c) part[i][c] = load<vf>(acc[i] + column + c * LANES);
  for (int b = 0; b < spans; ++b) {
    const T* v = values + blocks[b] * v_block + int64_t(column) * P;
    for (int u = 0; u < BLOCK / P; ++u) {
      vu w[WIDE];
      for (int c = 0; c < WIDE; ++c) w[c] = load<vu>(v + (int64_t(u) * padded + c * LANES) * P);
      for (int i = 0; i < TALL; ++i) {
        const vu weight = broadcast(&p[i][b * (BLOCK / P) + u]);
        for (int c = 0; c < WIDE; ++c) part[i][c] = Unit<T>::fma(part[i][c], weight, w[c]);
      }
    }
  }
  for (int i = 0; i < TALL; ++i)
    for (int c = 0; c < WIDE; ++c) store(acc[i] + column + c * LANES, part[i][c]);
}

// Fetches the first lines of blocks: the processor finds the others by itself, but not the next block.
template <class T> inline void announce(const T* data, const int32_t* blocks, int64_t count, int64_t size) {
  for (int64_t b = 0; b < count; ++b)
    for (int line = 0; line < 4; ++line) __builtin_prefetch(reinterpret_cast<const char*>(data + blocks[b] * size) + 64 * line);
}

// One kv head, up to TALL query rows that share it; row i of the tile may see positions [from[i], to[i]). Where there are
// fewer rows, q[i] of the others is any row: what they give is not looked at. Where there are sinks, sink[i] is the score
// of what row i sees besides, and which has no value.
template <class T, int TALL>
void attend(const T* const* q, int rows, const int64_t* from, const int64_t* to, const T* keys, const T* values,
            const int32_t* blocks, int dim, float scale, float softcap, const float* sink, T* const* out) {
  constexpr int P = Unit<T>::P;
  const int padded = round_up(dim, LANES);
  const int64_t k_block = int64_t(dim) * BLOCK, v_block = int64_t(padded) * BLOCK;
  float acc[TALL][512], s[TALL][SPAN], best[TALL], total[TALL];
  uint32_t p[TALL][SPAN] = {};
  int64_t first = to[0], last = 0;
  for (int i = 0; i < TALL; ++i) {
    best[i] = sink ? sink[i] : -INFINITY; total[i] = sink ? 1 : 0;
    std::memset(acc[i], 0, padded * sizeof(float));
    if (i < rows) { first = std::min(first, from[i]); last = std::max(last, to[i]); }
  }
  // From a multiple of SPAN, so that a row is rescaled at the same positions whichever rows share its tile.
  for (int64_t start = first / SPAN * SPAN; start < last; start += SPAN) {
    const int spans = int(std::min<int64_t>(SPAN, round_up(int(last - start), BLOCK))) / BLOCK;
    const int32_t* here = blocks + start / BLOCK;
    if (TALL < TILE) {  // few rows: what they read is read once, and comes from memory
      announce(values, here, spans, v_block);
      const int64_t left = round_up(int(last - start), BLOCK) / BLOCK - spans;
      announce(keys, here + spans, std::min<int64_t>(left, SPAN / BLOCK), k_block);
    }
    int b = 0;
    for (; b + 2 <= spans; b += 2) score<T, TALL, 2>(q, keys, here + b, k_block, dim / P, reinterpret_cast<float(*)[SPAN]>(s[0] + b * BLOCK));
    if (b < spans) score<T, TALL, 1>(q, keys, here + b, k_block, dim / P, reinterpret_cast<float(*)[SPAN]>(s[0] + b * BLOCK));
    for (int i = 0; i < rows; ++i) {
      const int low = int(std::max<int64_t>(0, from[i] - start)), high = int(std::min<int64_t>(spans * BLOCK, to[i] - start));
      const float shrink = weigh<T>(s[i], spans * BLOCK, low, high, scale, softcap, best[i], total[i], p[i]);
      if (shrink != 1.0f)
        for (int d = 0; d < padded; d += LANES) store(acc[i] + d, load<vf>(acc[i] + d) * shrink);
    }
    int d = 0;
    if (TALL < TILE)
      for (; d + 4 * LANES <= padded; d += 4 * LANES) gather<T, TALL, 4>(p, values, here, spans, v_block, padded, acc, d);
    for (; d + 2 * LANES <= padded; d += 2 * LANES) gather<T, TALL, 2>(p, values, here, spans, v_block, padded, acc, d);
    if (d < padded) gather<T, TALL, 1>(p, values, here, spans, v_block, padded, acc, d);
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
      from[i] = window > 0 ? std::max<int64_t>(0, to[i] - window) : 0;
      if (sinks) sink[i] = sinks[head];
    }
    const T *k = keys + task.head * k_head, *v = values + task.head * v_head;
    const float* own = sinks ? sink : nullptr;
    if (rows > 4) attend<T, 8>(from_q, rows, from, to, k, v, chunk.blocks, int(dim), scale, softcap, own, to_out);
    else attend<T, 4>(from_q, rows, from, to, k, v, chunk.blocks, int(dim), scale, softcap, own, to_out);
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

// hidden += delta where there is one; out = hidden / rms(hidden) * (offset + weight), where the rows take the
// weights [weights][width] in turn.
template <class T>
void rms_norm(T* hidden, const T* delta, const T* first, int64_t weights, T* out, int64_t rows, int64_t width,
              float eps, float offset, int64_t threads) {
  each(rows, rows < 16 ? 1 : int(threads), [=](int64_t row) {
    const T* weight = first + row % weights * width;
    T* h = hidden + row * width;
    T* to = out + row * width;
    vf squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      vf x = load16(h + i);
      if (delta) { store16(h + i, x + load16(delta + row * width + i)); x = load16(h + i); }
      squares = multiply_add(squares, x, x);
    }
    for (; i < width; ++i) {
      if (delta) narrow(h[i], widen(h[i]) + widen(delta[row * width + i]));
      rest += widen(h[i]) * widen(h[i]);
    }
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
      store16(to + i, load16(h + i) * scale * (load16(weight + i) + offset));
    for (; i < width; ++i) narrow(to[i], widen(h[i]) * scale * (widen(weight[i]) + offset));
  });
}

// out[row] = act(gate) * up for in[row] = gate then up, each of width columns; act(x) = x * sigmoid(a(x)), with
// a(x) = x for SiLU, and for GELU by tanh sqrt(8 / pi) * (x + 0.044715 x^3).
template <class T, bool GELU> void gated(const T* in, T* out, int64_t rows, int64_t width, int64_t threads) {
  each(rows, rows < 8 ? 1 : int(threads), [=](int64_t row) {
    const T *gate = in + row * 2 * width, *up = gate + width;
    T* to = out + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      vf g = load16(gate + i);
      vf a = GELU ? (g + g * g * g * 0.044715f) * 1.5957691216f : g;
      vf magnitude = a < 0 ? a : -a;
      vf e = exp16(magnitude);                               // e^-|a|
      vf sigmoid = (a < 0 ? e : splat(1.0f)) / (e + 1.0f);
      T rounded[LANES];
      store16(rounded, g * sigmoid);
      store16(to + i, load16(rounded) * load16(up + i));
    }
    for (; i < width; ++i) {
      T rounded;
      const float g = widen(gate[i]), a = GELU ? (g + g * g * g * 0.044715f) * 1.5957691216f : g;
      narrow(rounded, g / (1.0f + std::exp(-a)));
      narrow(to[i], widen(rounded) * widen(up[i]));
    }
  });
}

}  // namespace

#include "delta.h"

#define EXPORT(T, SUFFIX)                                                                                             \
  extern "C" void linear_##SUFFIX(const void* x, int64_t ldx, int64_t rows, int64_t K, const void* w, const void* bias,\
                                  void* out, int64_t ldo, int64_t N, const void* adapters, int64_t apart,             \
                                  const void* segments, int64_t count, void* y, int64_t ldy, int64_t threads) {       \
    linear<T>({(const T*)x, ldx, rows, K, (const T*)w, (const T*)bias, (T*)out, ldo, N}, (const Adapter*)adapters,    \
              apart, (const Segment*)segments, count, (float*)y, ldy, threads);                                       \
  }                                                                                                                   \
  extern "C" int64_t multiplies_##SUFFIX() { return Unit<T>::multiplies; }                                            \
  extern "C" void pack_##SUFFIX(const void* pieces, int64_t count) { pack<T>((const Piece*)pieces, count); }          \
  extern "C" void attention_##SUFFIX(const void* q, int64_t ldq, void* out, const void* chunks, int64_t count,        \
                                     const void* keys, const void* values, int64_t num_blocks, int64_t kv_heads,      \
                                     int64_t group, int64_t dim, float scale, float softcap, int64_t window,          \
                                     int64_t threads, const void* sinks) {                                            \
    attention<T>((const T*)q, ldq, (T*)out, (const Chunk*)chunks, count, (const T*)keys, (const T*)values,            \
                 num_blocks, kv_heads, group, dim, scale, softcap, window, threads, (const float*)sinks);             \
  }                                                                                                                   \
  extern "C" void rope_write_##SUFFIX(void* q, void* k, const void* v, int64_t ld, int64_t rows, int64_t heads,       \
                                      int64_t kv_heads, int64_t dim, int64_t rotary, const void* cos,                 \
                                      const void* sin, const void* cache_rows, void* keys, void* values,              \
                                      int64_t num_blocks, int64_t threads) {                                          \
    rope_write<T>((T*)q, (T*)k, (const T*)v, ld, rows, heads, kv_heads, dim, rotary, (const float*)cos,               \
                  (const float*)sin, (const int64_t*)cache_rows, (T*)keys, (T*)values, num_blocks, threads);          \
  }                                                                                                                   \
  extern "C" void rms_norm_##SUFFIX(void* hidden, const void* delta, const void* weight, int64_t weights, void* out,  \
                                    int64_t rows, int64_t width, float eps, float offset, int64_t threads) {          \
    rms_norm<T>((T*)hidden, (const T*)delta, (const T*)weight, weights, (T*)out, rows, width, eps, offset, threads);  \
  }                                                                                                                   \
  extern "C" void silu_##SUFFIX(const void* in, void* out, int64_t rows, int64_t width, int64_t threads) {            \
    gated<T, false>((const T*)in, (T*)out, rows, width, threads);                                                     \
  }                                                                                                                   \
  extern "C" void gelu_tanh_##SUFFIX(const void* in, void* out, int64_t rows, int64_t width, int64_t threads) {       \
    gated<T, true>((const T*)in, (T*)out, rows, width, threads);                                                      \
  }                                                                                                                   \
  extern "C" void delta_rule_##SUFFIX(const void* qkv, int64_t ld_qkv, const void* z, int64_t ld_z, const void* b,    \
                                      int64_t ld_b, const void* a, int64_t ld_a, const void* conv, const void* decay, \
                                      const void* dt_bias, const void* norm, void* rows, void* states, void* x,       \
                                      void* out, int64_t channels, int64_t width, int64_t key_heads, int64_t heads,   \
                                      int64_t K, int64_t V, float eps, const void* chunks, int64_t count,             \
                                      int64_t threads) {                                                              \
    delta_rule<T>({(const T*)qkv, ld_qkv, (const T*)z, ld_z, (const T*)b, ld_b, (const T*)a, ld_a, (const T*)conv,    \
                   (const float*)decay, (const float*)dt_bias, (const T*)norm, (T*)rows, (float*)states, (T*)x,       \
                   (T*)out, channels, width, key_heads, heads, K, V, eps}, (const DeltaChunk*)chunks, count, threads);\
  }

EXPORT(float, float32)
EXPORT(bf16, bfloat16)
