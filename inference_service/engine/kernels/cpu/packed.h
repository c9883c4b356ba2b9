// Weights with fewer bits than their products, and rows of x in the order of the products. A tile of 16 columns is in vectors
// of 64 bytes, each of which holds several lane vectors of units.
//
//   bfloat16:  [K / 2][16 columns][2]
//   8 bits:    [K / P][16 columns][P] of 8 bits
//   4 bits:    [K / 8][16 columns] of 32 bits that hold 8 values of K, P of a unit in so many equal parts, from the lowest bits on
//
// float32 multiplies them as float32 (P = 1, integers with a sign), and so does bfloat16 its own where the processor cannot
// multiply those. bfloat16 has its values rounded to 8 bits for integers, and multiplies four at once (P = 4, integers with
// 2^(bits - 1) added): products and their sums are exact.
#pragma once
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

typedef int8_t rb __attribute__((vector_size(REGISTER / 4)));

constexpr int64_t ROUNDED = 32;             // values of x with one step
constexpr int64_t ROWS_OF_ONE_THREAD = 16;  // fewer are prepared before a second thread has woken up

// Weights as they are multiplied: part of a lane vector of units, of which a vector has so many.
struct Whole {
  static constexpr int UNITS = 1;
  static inline ru unit(const uint8_t* vector, int, int part) { return load<ru>(vector + part * REGISTER); }
};

// bfloat16, in float32: the second value of a pair first, as vdpbf16ps adds them.
struct Pairs {
  static constexpr int UNITS = 2;
  static inline ru unit(const uint8_t* vector, int index, int part) {
    const ru both = load<ru>(vector + part * REGISTER);
    if (index == 1) return both << 16;
#if defined(__AVX__) && !defined(__AVX512F__)  // which have no register left for a mask
    return held(both >> 16) << 16;
#else
    return both & 0xffff0000u;
#endif
  }
};

// Integers of so many bits, in float32.
template <int BITS> struct Integers {
  static constexpr int UNITS = 32 / BITS;
  static inline ru unit(const uint8_t* vector, int index, int part) {
    if constexpr (BITS == 4) {
      const ri all = ri(load<ru>(vector + part * REGISTER));
      return as<ru>(__builtin_convertvector(all << (28 - 4 * index) >> 28, rf));
    }
    const uint8_t* from = vector + index * LANES + part * (REGISTER / 4);
#if defined(__AVX512BW__)  // the compiler would make halves of it
    return as<ru>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from))));
#elif defined(__AVX2__)
    return as<ru>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
    return as<ru>(__builtin_convertvector(load<rb>(from), rf));
#endif
  }
};

// Integers of so many bits, four to a unit.
template <int BITS> struct Quartets {
  static constexpr int P = 4, UNITS = 8 / BITS, VECTORS = ROUNDED / P / UNITS;  // in a vector; for values with one step
  static constexpr bool GROUPED = BITS == 4;  // whether a column has several scales, one at most for values with one step
  static inline ru unit(const uint8_t* vector, int index, int part) {
    const ru all = load<ru>(vector + part * REGISTER);
    return BITS == 8 ? all : all >> 4 * index & 0x0f0f0f0fu;
  }
};

// Sums of products of at most ROUNDED values: those of x have a sign, and those of weights none.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || !defined(__AVX2__)
template <int BITS> struct Exact {
  ri sums;
  void begin(int32_t with) { sums = ri{} + with; }
  void add(ru x, ru w) {
#if defined(__AVX512VNNI__)
    sums = ri(_mm512_dpbusd_epi32(__m512i(sums), __m512i(w), __m512i(x)));
#elif defined(__AVXVNNI__)
    sums = ri(_mm256_dpbusd_avx_epi32(__m256i(sums), __m256i(w), __m256i(x)));
#else
    for (int at = 0; at < 32; at += 8) sums += ri(w >> at & 255) * (ri(x) << (24 - at) >> 24);
#endif
  }
  ri total() const { return sums; }
};
#else
// In 16 bits, 4 bits of weights at a time: 32 products of 127 and 15 in two sums are 30,480 each.
template <int BITS> struct Exact {
  typedef int16_t rs __attribute__((vector_size(REGISTER)));
  rs low, high;
  int32_t first;
#ifdef __AVX512BW__
  static rs pairs(ru w, ru x) { return rs(_mm512_maddubs_epi16(__m512i(w), __m512i(x))); }
  static ri fours(rs sums, int16_t by) { return ri(_mm512_madd_epi16(__m512i(sums), _mm512_set1_epi16(by))); }
#else
  static rs pairs(ru w, ru x) { return rs(_mm256_maddubs_epi16(__m256i(w), __m256i(x))); }
  static ri fours(rs sums, int16_t by) { return ri(_mm256_madd_epi16(__m256i(sums), _mm256_set1_epi16(by))); }
#endif
  void begin(int32_t with) { low = high = rs{}, first = with; }
  void add(ru x, ru w) {
    low += pairs(BITS == 8 ? w & 0x0f0f0f0fu : w, x);
    if (BITS == 8) high += pairs(w >> 4 & 0x0f0f0f0fu, x);
  }
  ri total() const { return fours(low, 1) + first + (BITS == 8 ? fours(high, 16) : ri{}); }
};
#endif

// Rows of x in float32, one after the other, each pair in the order of Pairs.
class WidenedRows {
  std::vector<uint64_t> pairs;

 public:
  const float* widen(const bf16* x, int64_t ldx, int64_t rows, int64_t K, int64_t threads) {
    if (int64_t(pairs.size()) < rows * K / 2) pairs.resize(rows * K / 2);
    each(rows, rows < ROWS_OF_ONE_THREAD ? 1 : int(threads), [&](int64_t row) {
      for (int64_t i = 0; i < K / 2; ++i) {
        uint32_t both;
        std::memcpy(&both, x + row * ldx + 2 * i, sizeof both);
        pairs[row * (K / 2) + i] = widened(both);
      }
    });
    return reinterpret_cast<const float*>(pairs.data());
  }
};

// Rows as integers of 8 bits times a step, which ROUNDED values share: the largest of them is 127 steps.
class RoundedRows {
  std::vector<int8_t> values;
  std::vector<float> steps;
  std::vector<int32_t> starts, halves;
  int64_t width = 0, parts = 0;

 public:
  // Weights of 0 bits have other zeros, and need the sums of x.
  void round(const bf16* x, int64_t ldx, int64_t rows, int64_t K, int64_t bits, int64_t threads) {
    width = K, parts = (K + ROUNDED - 1) / ROUNDED;
    if (int64_t(values.size()) < rows * K) values.resize(rows * K);
    if (int64_t(steps.size()) < rows * parts)
      steps.resize(rows * parts), starts.resize(rows * parts), halves.resize(rows * parts);
    each(rows, rows < ROWS_OF_ONE_THREAD ? 1 : int(threads), [&](int64_t row) {
      for (int64_t i = row * parts, at = 0; at < K; ++i, at += ROUNDED) {
        const bf16* from = x + row * ldx + at;
        int8_t* to = values.data() + row * K + at;
        int sum = 0;
        steps[i] = K - at < ROUNDED ? round_part(from, to, int(K - at), sum) : round_part(from, to, int(ROUNDED), sum);
        starts[i] = bits ? -sum * (1 << (bits - 1)) : sum;
        if (!bits) halves[i] = std::accumulate(to, to + ROUNDED / 2, 0);
      }
    });
  }
  int64_t parts_of_row() const { return parts; }
  const int8_t* row(int64_t row) const { return values.data() + row * width; }
  const float* steps_of(int64_t row) const { return steps.data() + row * parts; }
  const int32_t* starts_of(int64_t row) const { return starts.data() + row * parts; }  // of sums, for what weights have too much
  int32_t half_of(int64_t row, int64_t part, int half) const {  // sum of the first or last values of a part
    const int32_t first = halves[row * parts + part];
    return half ? starts[row * parts + part] - first : first;
  }

 private:
  // Inlined for a constant count, in loops that become vectors.
  static inline __attribute__((always_inline)) float round_part(const bf16* x, int8_t* to, int count, int& sum) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: sums with it are whole numbers
    uint16_t most = 0;
    for (int i = 0; i < count; ++i) most = std::max<uint16_t>(most, x[i].raw & 0x7fff);
    const float largest = widen(bf16{most});
    const bool usable = largest > 1e-30f && most < 0x7f80;
    const float times = usable ? 127.0f / largest : 0.0f;
    float whole[ROUNDED];
    for (int i = 0; i < count; ++i) whole[i] = std::fma(usable ? widen(x[i]) : 0.0f, times, MAGIC);
    for (int i = 0; i < count; ++i) {
      const int value = int(as<uint32_t>(whole[i]) - as<uint32_t>(MAGIC));
      to[i] = int8_t(value), sum += value;
    }
    return most < 0x7f80 ? usable ? largest / 127.0f : 0.0f : NAN;
  }
};

}  // namespace
