// Weights of 8 and 4 bits: integers, of which so many values of K have one scale in each column. A tile of 16 columns is in
// vectors of 64 bytes, each of which holds several lane vectors of units.
//
//   8 bits:  [K / P][16 columns][P] of int8
//   4 bits:  [K / 8][16 columns] of 32 bits that hold 8 values of K; bfloat16: the even ones in the low half, from the lowest
//            bits on, the odd ones in the high half; float32: all in order
//
// float32 multiplies them as float32. bfloat16 has its own values rounded to 16 bits first, so that products and their sums
// are exact: widening integers to bfloat16 takes four times the instructions of widening them to 16 bits.
#pragma once
#include <vector>

#include "vectors.h"

namespace {

typedef int16_t vs __attribute__((vector_size(64)));
typedef int8_t vb16 __attribute__((vector_size(16)));
typedef int8_t vb32 __attribute__((vector_size(32)));

constexpr int64_t ROUNDED = 512;  // values of x with one step: 512 * 127 * 2^15 < 2^31

// A unit of two integers of 16 bits.
struct Pairs {
  static constexpr int P = 2;
  typedef int16_t Value;
  typedef vi Sum;
  static inline vi fma(vi acc, vu a, vu b) {
#ifdef __AVX512VNNI__
    __m512i r, x, y; std::memcpy(&r, &acc, 64); std::memcpy(&x, &a, 64); std::memcpy(&y, &b, 64);
    r = _mm512_dpwssd_epi32(r, x, y);
    std::memcpy(&acc, &r, 64);
    return acc;
#else
    return acc + (vi(a) << 16 >> 16) * (vi(b) << 16 >> 16) + (vi(a) >> 16) * (vi(b) >> 16);
#endif
  }
};

template <class T> struct Integers;  // by what x is, what it and the weights are multiplied as
template <> struct Integers<float> { typedef Unit<float> Units; };
template <> struct Integers<bf16> { typedef Pairs Units; };

// Weights as they are multiplied.
struct Whole {
  static constexpr int UNITS = 1;  // in a vector
  static inline vu unit(const uint8_t* vector, int) { return load<vu>(vector); }
};

template <class U> struct Bits8 {
  static constexpr int UNITS = 4 / U::P;
  static inline vu unit(const uint8_t* vector, int index) { return wide(vector + index * LANES * U::P, U()); }

 private:
#ifdef __AVX512BW__  // the compiler would make halves of it
  static inline vu wide(const uint8_t* q, Unit<float>) { return as_units(_mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(q))))); }
  static inline vu wide(const uint8_t* q, Pairs) { return as_units(_mm512_cvtepi8_epi16(load<__m256i>(q))); }
  static inline vu as_units(__m512i all) { vu u; std::memcpy(&u, &all, sizeof u); return u; }
#else
  static inline vu wide(const uint8_t* q, Unit<float>) { return bits(__builtin_convertvector(load<vb16>(q), vf)); }
  static inline vu wide(const uint8_t* q, Pairs) { return vu(__builtin_convertvector(load<vb32>(q), vs)); }
#endif
};

template <class U> struct Bits4 {
  static constexpr int UNITS = 8 / U::P;
  static inline vu unit(const uint8_t* vector, int index) { return wide(load<vu>(vector), 4 * index, U()); }

 private:
  static inline vu wide(vu q, int at, Unit<float>) { return bits(__builtin_convertvector(vi(q) << (28 - at) >> 28, vf)); }
  static inline vu wide(vu q, int at, Pairs) { return vu(vs(q) << (12 - at) >> 12); }
};

// Rows as integers times a step, of every ROUNDED values the power of two with which the largest has 15 bits: those that are a
// 128th of it or more lose nothing.
class RoundedRows {
  std::vector<int16_t> values;
  std::vector<float> steps;
  int64_t width = 0, parts = 0;

 public:
  void round(const bf16* x, int64_t ldx, int64_t rows, int64_t K) {
    width = K, parts = (K + ROUNDED - 1) / ROUNDED;
    values.resize(rows * K), steps.resize(rows * parts);
    for (int64_t i = 0; i < rows * parts; ++i) {
      const int64_t row = i / parts, at = i % parts * ROUNDED;
      steps[i] = round_part(x + row * ldx + at, values.data() + row * K + at, int(std::min(ROUNDED, K - at)));
    }
  }
  void round(const float*, int64_t, int64_t, int64_t) {}
  const int16_t* row(int64_t row) const { return values.data() + row * width; }
  const float* steps_of(int64_t row) const { return steps.data() + row * parts; }

 private:
  static float power(int exponent) { const uint32_t u = uint32_t(exponent + 127) << 23; float f; std::memcpy(&f, &u, 4); return f; }
  static float round_part(const bf16* x, int16_t* to, int count) {
    uint16_t most = 0;
    for (int i = 0; i < count; ++i) most = std::max<uint16_t>(most, x[i].raw & 0x7fff);
    const int largest = most >> 7;  // its exponent and 127
    const int up = 141 - std::max(largest, 15);
    const vf times = splat(power(up)), magic = splat(12582912.0f);  // 1.5 * 2^23: sums with it are whole numbers
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, __builtin_convertvector(bits(load16(x + i) * times + magic), vh));
    for (; i < count; ++i) {
      const float sum = widen(x[i]) * power(up) + 12582912.0f;
      std::memcpy(to + i, &sum, 2);
    }
    return largest < 255 ? power(-up) : NAN;
  }
};

}  // namespace
