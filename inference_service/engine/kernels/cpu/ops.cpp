// The parts of a decoder step, for CPUs: products with LoRA of exact ranks, paged attention in place, and the
// element-wise steps between; each header has one kind of them.
#include "attention.h"
#include "delta.h"
#include "exchange.h"
#include "linear.h"
#include "program.h"
#include "rows.h"
#include "sampling.h"

// glibc 2.29 gave these two of double precision a new version, which differs in errno alone; the one before is in
// every glibc that a wheel for manylinux_2_28 may meet.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver log,log@GLIBC_2.17");
#endif

#define ACTIVATION(T, SUFFIX, NAME, KIND)                                                                             \
  extern "C" void NAME##_##SUFFIX(const void* in, void* out, int64_t rows, int64_t width, int64_t gated,              \
                                  int64_t threads) {                                                                  \
    activate<T, KIND>((const T*)in, (T*)out, rows, width, gated, threads);                                            \
  }

#define EXPORT(T, SUFFIX)                                                                                             \
  extern "C" void linear_##SUFFIX(const void* x, int64_t ldx, int64_t rows, int64_t K, const void* w, const void* bias,\
                                  int64_t bits, const void* scales, int64_t group, void* out, int64_t ldo, int64_t N, \
                                  const void* adapters, int64_t apart, const void* segments, int64_t count, void* y,  \
                                  int64_t ldy, const void* parts, int64_t threads) {                                  \
    linear<T>({(const T*)x, ldx, rows, K, (const uint8_t*)w, (const T*)bias, bits, (const bf16*)scales, group,        \
               (T*)out, ldo, N, nullptr, nullptr}, (const Adapter*)adapters, apart, (const Segment*)segments, count, (float*)y, ldy,    \
              (const Part*)parts, threads);                                                                           \
  }                                                                                                                   \
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
                                    int64_t rows, int64_t width, int64_t ld, float eps, float offset,                 \
                                    int64_t threads) {                                                                \
    norm<T, false>((T*)hidden, (const T*)delta, (const T*)weight, nullptr, weights, (T*)out, rows, width, ld, eps,    \
                   offset, threads);                                                                                  \
  }                                                                                                                   \
  extern "C" void layer_norm_##SUFFIX(void* hidden, const void* delta, const void* weight, const void* biases,        \
                                      void* out, int64_t rows, int64_t width, float eps, int64_t threads) {           \
    norm<T, true>((T*)hidden, (const T*)delta, (const T*)weight, (const T*)biases, 1, (T*)out, rows, width, width, eps,\
                  0, threads);                                                                                        \
  }                                                                                                                   \
  extern "C" void add_##SUFFIX(void* to, const void* x, int64_t rows, int64_t width, float scale, int64_t threads) {  \
    add<T>((T*)to, (const T*)x, rows, width, scale, threads);                                                         \
  }                                                                                                                   \
  ACTIVATION(T, SUFFIX, silu, Silu)                                                                                   \
  ACTIVATION(T, SUFFIX, gelu_tanh, GeluTanh)                                                                          \
  ACTIVATION(T, SUFFIX, gelu, Gelu)                                                                                   \
  extern "C" void delta_rule_##SUFFIX(const void* qkv, int64_t ld_qkv, const void* z, int64_t ld_z, const void* b,    \
                                      int64_t ld_b, const void* a, int64_t ld_a, const void* conv, const void* decay, \
                                      const void* dt_bias, const void* norm, void* rows, void* states, void* x,       \
                                      void* out, int64_t channels, int64_t width, int64_t key_heads, int64_t heads,   \
                                      int64_t K, int64_t V, float eps, const void* chunks, int64_t count,             \
                                      int64_t threads) {                                                              \
    delta_rule<T>({(const T*)qkv, ld_qkv, (const T*)z, ld_z, (const T*)b, ld_b, (const T*)a, ld_a, (const T*)conv,    \
                   (const float*)decay, (const float*)dt_bias, (const T*)norm, (T*)rows, (float*)states, (T*)x,       \
                   (T*)out, channels, width, key_heads, heads, K, V, eps}, (const DeltaChunk*)chunks, count, threads);\
  }                                                                                                                   \
  extern "C" void draw_##SUFFIX(const void* logits, int64_t ld, int64_t vocab, const void* rows, int64_t count,        \
                                const void* masks, void* ids, void* tops, int64_t threads) {                          \
    draw<T>((const T*)logits, ld, vocab, (const Draw*)rows, count, (const uint16_t*)masks, (int64_t*)ids,             \
            (float*)tops, threads);                                                                                   \
  }                                                                                                                   \
  extern "C" void scores_##SUFFIX(const void* logits, int64_t ld, int64_t vocab, int64_t count, const void* ids,      \
                                  int64_t most, void* own, void* ranks, void* tokens, void* values, int64_t threads) {\
    scores<T>((const T*)logits, ld, vocab, count, (const int64_t*)ids, most, (float*)own, (int64_t*)ranks,            \
              (int64_t*)tokens, (float*)values, threads);                                                             \
  }                                                                                                                   \
  extern "C" void exchange_##SUFFIX(void* rows, int64_t count, void* shared, int64_t rank, int64_t world,             \
                                    int64_t sources, int64_t room) {                                                  \
    exchange<T>((T*)rows, count, shared, rank, world, sources, room);                                                 \
  }                                                                                                                   \
  extern "C" void run_##SUFFIX(const void* words, int64_t count) {                                                    \
    run_program((const int64_t*)words, count, linear_##SUFFIX, attention_##SUFFIX, rope_write_##SUFFIX,               \
                rms_norm_##SUFFIX, layer_norm_##SUFFIX, add_##SUFFIX, silu_##SUFFIX, gelu_tanh_##SUFFIX, gelu_##SUFFIX,\
                exchange_##SUFFIX);                                                                                   \
  }

// compiling.py compiles each type by itself, and both at the same time.
#ifndef ONLY_BFLOAT16
EXPORT(float, float32)

extern "C" void pack_blocks(const void* numbers, int64_t rows, int64_t K, int64_t bits, void* to, int64_t threads) {
  pack_numbers((const uint8_t*)numbers, rows, K, bits, (uint8_t*)to, threads);
}

#endif
#ifndef ONLY_FLOAT32
// The instruction set of this build, as text.
extern "C" const char* instructions() {
#if defined(__AVX512BF16__)
  return "AVX-512 with bfloat16";
#elif defined(__AVX512VNNI__)
  return "AVX-512 with VNNI";
#elif defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#elif defined(__ARM_NEON)
  return "NEON";
#else
  return "no vectors";
#endif
}

int64_t widened_from = Unit<bf16>::multiplied ? INT64_MAX : 1;
EXPORT(bf16, bfloat16)

extern "C" int64_t compact(const void* values, int64_t count, void* to, void* beside, int64_t threads) {
  return compact((const uint16_t*)values, count, (uint8_t*)to, (int64_t*)beside, threads);
}
#endif
