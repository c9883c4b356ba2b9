// Weights of 8 and 4 bits: integers, of which so many values of K have one scale in each column. A tile of 16 columns is in
// vectors of 64 bytes, each of which holds several lane vectors of units.
//
//   8 bits:  [K / P][16 columns][P] of 8 bits
//   4 bits:  [K / 8][16 columns] of 32 bits that hold 8 values of K, P of a unit in so many equal parts, from the lowest bits on
//
// float32 multiplies them as float32 (P = 1, integers with a sign). bfloat16 has its own values rounded to 8 bits first, and
// multiplies four integers at once (P = 4, integers with 2^(bits - 1) added): products and their sums are exact.
#pragma once
#include <vector>

#include "vectors.h"

namespace {

typedef int8_t vb16 __attribute__((vector_size(16)));

constexpr int64_t ROUNDED = 32;  // values of x with one step

// A unit of four integers of 8 bits: of x with a sign, of weights without.
struct Quads {
  static constexpr int P = 4;
  static inline vi fma(vi acc, vu x, vu w) {
#ifdef __AVX512VNNI__
    __m512i r, a, b; std::memcpy(&r, &acc, 64); std::memcpy(&a, &w, 64); std::memcpy(&b, &x, 64);
    r = _mm512_dpbusd_epi32(r, a, b);
    std::memcpy(&acc, &r, 64);
    return acc;
#else
    for (int at = 0; at < 32; at += 8) acc += vi(w >> at & 255) * (vi(x) << (24 - at) >> 24);
    return acc;
#endif
  }
};

// Weights as they are multiplied.
struct Whole {
  static constexpr int UNITS = 1;  // in a vector
  static inline vu unit(const uint8_t* vector, int) { return load<vu>(vector); }
};

// Integers of so many bits: by float32, and by x of 8 bits.
template <int BITS> struct Integers {
  static constexpr int UNITS = 32 / BITS;
  static inline vu unit(const uint8_t* vector, int index) {
    if constexpr (BITS == 4) return bits(__builtin_convertvector(vi(load<vu>(vector)) << (28 - 4 * index) >> 28, vf));
#ifdef __AVX512BW__  // the compiler would make halves of it
    vu u;
    const __m512 all = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(vector + index * LANES)));
    std::memcpy(&u, &all, sizeof u);
    return u;
#else
    return bits(__builtin_convertvector(load<vb16>(vector + index * LANES), vf));
#endif
  }
};
template <int BITS> struct Quartets {
  static constexpr int UNITS = 8 / BITS, VECTORS = ROUNDED / Quads::P / UNITS;  // in a vector; for values with one step
  static constexpr bool GROUPED = BITS == 4;  // whether a column has several scales, one at most for values with one step
  static inline vu unit(const uint8_t* vector, int index) {
    if constexpr (BITS == 8) return load<vu>(vector);
    return load<vu>(vector) >> 4 * index & 0x0f0f0f0fu;
  }
};

// Rows as integers of 8 bits times a step, which ROUNDED values share: the largest of them is 127 steps.
class RoundedRows {
  std::vector<int8_t> values;
  std::vector<float> steps;
  std::vector<int32_t> starts;
  int64_t width = 0, parts = 0;

 public:
  void round(const bf16* x, int64_t ldx, int64_t rows, int64_t K, int64_t bits) {
    width = K, parts = (K + ROUNDED - 1) / ROUNDED;
    values.resize(rows * K), steps.resize(rows * parts), starts.resize(rows * parts);
    for (int64_t i = 0; i < rows * parts; ++i) {
      const int64_t row = i / parts, at = i % parts * ROUNDED;
      int sum = 0;
      steps[i] = round_part(x + row * ldx + at, values.data() + row * K + at, int(std::min(ROUNDED, K - at)), sum);
      starts[i] = -sum * (1 << (bits - 1));
    }
  }
  void round(const float*, int64_t, int64_t, int64_t, int64_t) {}
  int64_t parts_of_row() const { return parts; }
  const int8_t* row(int64_t row) const { return values.data() + row * width; }
  const float* steps_of(int64_t row) const { return steps.data() + row * parts; }
  const int32_t* starts_of(int64_t row) const { return starts.data() + row * parts; }  // of sums, for what weights have too much

 private:
  static float round_part(const bf16* x, int8_t* to, int count, int& sum) {
    uint16_t most = 0;
    for (int i = 0; i < count; ++i) most = std::max<uint16_t>(most, x[i].raw & 0x7fff);
    const float largest = widen(bf16{most});
    const bool usable = largest > 1e-30f && most < 0x7f80;
    const float times = usable ? 127.0f / largest : 0.0f, magic = 12582912.0f;  // 1.5 * 2^23: sums with it are whole numbers
    for (int i = 0; i < count; ++i) {
      const float whole = std::fma(usable ? widen(x[i]) : 0.0f, times, magic);
      int32_t all; std::memcpy(&all, &whole, 4);
      sum += to[i] = int8_t(all);
    }
    return most < 0x7f80 ? usable ? largest / 127.0f : 0.0f : NAN;
  }
};

}  // namespace
