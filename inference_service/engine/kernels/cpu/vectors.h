// Vectors of 16 floats or units, in float32 and bfloat16, and what all operations need beside them; sums are float32.
//
// A "unit" is 4 bytes: one float, or two bfloat16 that are multiplied together (vdpbf16ps where there is one).
// A "lane vector" is 16 units. P is the values of a unit: 1 (float32) or 2 (bfloat16).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

extern "C" int64_t widened_from;  // rows from which on bfloat16 is multiplied as float32

namespace {

constexpr int LANES = 16;

// The part of a lane vector in a register of this processor: products keep their sums in registers, and a compiler that has to
// make several of one vector moves them to memory and back.
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int SPLIT = 64 / REGISTER;
typedef float rf __attribute__((vector_size(REGISTER)));
typedef int32_t ri __attribute__((vector_size(REGISTER)));
typedef uint32_t ru __attribute__((vector_size(REGISTER)));
typedef uint16_t rh __attribute__((vector_size(REGISTER / 2)));

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return vf{} + x; }
inline vf floats(vu u) { vf f; std::memcpy(&f, &u, sizeof f); return f; }
inline vu bits(vf f) { vu u; std::memcpy(&u, &f, sizeof u); return u; }
template <class To, class From> inline To as(From from) { static_assert(sizeof(To) == sizeof from); To to; std::memcpy(&to, &from, sizeof to); return to; }

// Comparisons and choices are made in registers: of larger vectors, a compiler makes them value by value.
inline rf register_of(const vf& x, int i) { return load<rf>(reinterpret_cast<const char*>(&x) + i * REGISTER); }
template <class F, class... V> inline vf by_register(F f, const V&... x) {
  rf parts[SPLIT];
  for (int i = 0; i < SPLIT; ++i) parts[i] = f(register_of(x, i)...);
  return load<vf>(parts);
}

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
#ifndef __AVX512F__
inline rf multiply_add(rf acc, rf a, rf b) {
#if defined(__FMA__)
  return rf(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(acc)));
#elif defined(__ARM_NEON)
  return rf(vfmaq_f32(float32x4_t(acc), float32x4_t(a), float32x4_t(b)));
#else
  return acc + a * b;
#endif
}
#endif

struct bf16 { uint16_t raw; };

inline float widen(float x) { return x; }
inline float widen(bf16 x) { uint32_t u = uint32_t(x.raw) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline void narrow(float& to, float x) { to = x; }
inline void narrow(bf16& to, float x) {
  uint32_t u; std::memcpy(&u, &x, 4);
  to.raw = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline rf load_part(const float* p) { return load<rf>(p); }
inline rf load_part(const bf16* p) { return as<rf>(__builtin_convertvector(load<rh>(p), ru) << 16); }
inline vf load16(const float* p) { return load<vf>(p); }
inline vf load16(const bf16* p) { return floats(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline void store16(float* p, vf x) { store(p, x); }
inline void store16(bf16* p, vf x) {
#ifdef __AVX512BF16__
  __m512 all; std::memcpy(&all, &x, sizeof all);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(all));
#else
  for (int i = 0; i < SPLIT; ++i) {
    const rf part = register_of(x, i);
    const ru u = as<ru>(part), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, nan = ru(part != part);
    store(p + i * REGISTER / 4, __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), rh));
  }
#endif
}

// Two bfloat16 as float32; their products are added the second one first, as vdpbf16ps does.
struct Two { vf second, first; };
inline Two both(vu units) { return {floats(units & 0xffff0000u), floats(units << 16)}; }
inline vf multiply_add(vf acc, Two a, Two b) {
  return multiply_add(multiply_add(acc, a.second, b.second), a.first, b.first);
}

template <class T> struct Unit;
template <> struct Unit<float> {
  typedef float Value;
  static constexpr int P = 1;
  static constexpr bool multiplied = true;  // as they are, and not widened to float32 first
  static inline vf fma(vf acc, vu a, vu b) { return multiply_add(acc, floats(a), floats(b)); }
};
template <> struct Unit<bf16> {
  typedef bf16 Value;
  static constexpr int P = 2;
#ifdef __AVX512BF16__
  static constexpr bool multiplied = true;
#else
  static constexpr bool multiplied = false;
#endif
  static inline vf fma(vf acc, vu a, vu b) {
#ifdef __AVX512BF16__
    __m512 r; std::memcpy(&r, &acc, 64);
    __m512bh x, y; std::memcpy(&x, &a, 64); std::memcpy(&y, &b, 64);
    r = _mm512_dpbf16_ps(r, x, y);
    std::memcpy(&acc, &r, 64);
    return acc;
#else
    return multiply_add(acc, both(a), both(b));
#endif
  }
};

// Two bfloat16 as float32, the second one first.
inline uint64_t widened(uint32_t unit) { return (unit & 0xffff0000u) | uint64_t(unit) << 48; }

// While it lives, float32 takes subnormals for zeros, as vdpbf16ps does: sums have the same bits.
struct Flushing {
#ifdef __AVX512BF16__
  const unsigned before = _mm_getcsr();
  explicit Flushing(bool on = true) { _mm_setcsr(on ? before | 0x8040 : before); }
  ~Flushing() { _mm_setcsr(before); }
#else
  explicit Flushing(bool = true) {}
#endif
};
inline vu broadcast(const void* unit) { uint32_t u; std::memcpy(&u, unit, 4); return vu{} + u; }
inline ru repeated(const void* unit) { uint32_t u; std::memcpy(&u, unit, 4); return ru{} + u; }  // the same in a register

// How a unit of a row is multiplied with vectors of units: as it is, or both as float32.
template <class T> struct Units {
  typedef uint32_t Unit;
  typedef vu Vector;
  struct Scope {};
  static inline Unit of(uint32_t unit) { return unit; }
  static inline vu repeated(const Unit& unit) { return broadcast(&unit); }
  static inline vu vector(vu units) { return units; }
  static inline vf fma(vf acc, vu unit, vu w) { return ::Unit<T>::fma(acc, unit, w); }
};
struct WidenedUnits {
  typedef uint64_t Unit;
  typedef Flushing Scope;
  typedef Two Vector;
  static inline Unit of(uint32_t unit) { return widened(unit); }
  static inline Two repeated(const Unit& unit) {
    const char* values = reinterpret_cast<const char*>(&unit);
    return {floats(broadcast(values)), floats(broadcast(values + 4))};
  }
  static inline Two vector(vu units) { return both(units); }
  static inline vf fma(vf acc, Two unit, vu w) { return multiply_add(acc, unit, both(w)); }
};

// In a register: not read from memory again for every row, nor computed in another way.
inline ru held(ru units) {
#if defined(__AVX__)
  asm("" : "+v"(units));
#endif
  return units;
}
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
  x = by_register([](rf part) { return part < -87.0f ? rf{} - 87.0f : part; }, x);
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

inline vf sigmoid16(vf x) {
  const vf e = exp16(floats(bits(x) | 0x80000000u));  // e^-|x|
  return by_register([](rf part, rf e) { return part < 0 ? e : rf{} + 1.0f; }, x, e) / (e + 1.0f);
}

// Runs task(i) for i in [0, count) on up to threads threads.
template <class F> inline void each(int64_t count, int threads, F task) {
  if (threads < 2 || count < 2) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) task(i);
}

}  // namespace
