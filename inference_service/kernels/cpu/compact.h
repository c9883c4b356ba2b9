// Whole bfloat16 weights in 12 bits: 16 exponents are enough for nearly all weights of a trained matrix.
//
// Four vectors of a tile, 8 values of K of 16 columns, are a granule of three vectors. Two hold a byte of each weight, the
// mantissa and then the sign; each part of 16 bytes has 8 weights of one vector and 8 of the next. The third holds the exponents as
// places in a table, of the first vector's bytes in the lower 4 bits and of the second's in the upper ones. Weights with other
// exponents are exceptions: in a list of each tile's, in order, as their place in the tile times 2^16 and their bits.
//
// Beside the tiles lie int64: how many of them there are, the table, where each tile's exceptions begin, and these.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "packed.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes of weights that are fetched before they are used
constexpr int COMPACT = 12;      // bits
constexpr int64_t GRANULE = 3 * sizeof(vu), OF_GRANULE = 8, WEIGHTS_OF_GRANULE = OF_GRANULE * LANES;
constexpr int64_t TABLE_AT = 1, FIRSTS_AT = 3;   // in what lies beside
constexpr uint64_t NO_EXCEPTION = ~uint64_t(0);  // ends a tile's
constexpr int64_t SPARSE = 512;                  // weights for each exception; with more of them, reading is no faster

#ifdef __AVX512BF16__
constexpr bool COMPACTS = true;  // others widen weights, and lose more by decoding 8 rows' than they gain

// The vectors of WIDE tiles, decoded granule by granule.
template <int WIDE> class Compact {
  const uint8_t* w;
  int64_t of_tile, left, granule = 0;  // bytes of a tile, and those behind w
  __m512i exponents;
  const uint64_t* exceptions[WIDE];
  int64_t soonest;  // granule with an exception
  uint8_t* to;
  int64_t step;

 public:
  static constexpr int VECTORS = 4;
  int64_t apart = 0;  // bytes from one tile's vectors to the next tile's

  Compact(const uint8_t* tiles, const int64_t* beside, int64_t tile, int64_t K)
      : w(tiles + tile * K / OF_GRANULE * GRANULE), of_tile(K / OF_GRANULE * GRANULE), left(of_tile),
        exponents(_mm512_broadcast_i32x4(load<__m128i>(beside + TABLE_AT))) {
    for (int c = 0; c < WIDE; ++c) exceptions[c] = reinterpret_cast<const uint64_t*>(beside + beside[FIRSTS_AT + tile + c]);
    find_soonest();
  }
  // Where the next values of K go: all of them, for others to read, or each granule to where the last one was.
  void write(uint8_t* there, int64_t values, bool all) {
    to = there, step = all ? VECTORS * sizeof(vu) : 0;
    apart = (all ? values / OF_GRANULE : 1) * VECTORS * sizeof(vu);
  }
  inline const uint8_t* next() {
    const int64_t ahead = AHEAD + (left > AHEAD ? 0 : (WIDE - 1) * of_tile);
    for (int c = 0; c < WIDE; ++c)
      for (int line = 0; line < 3; ++line) __builtin_prefetch(w + c * of_tile + ahead + line * sizeof(vu));
#pragma GCC unroll 8
    for (int c = 0; c < WIDE; ++c) decode(w + c * of_tile, to + c * apart);
    if (__builtin_expect(granule == soonest, 0)) write_exceptions();
    w += GRANULE, left -= GRANULE, ++granule;
    const uint8_t* decoded = to;
    to += step;
    return decoded;
  }

 private:
  inline void decode(const uint8_t* from, uint8_t* into) const {
    const vu places = load<vu>(from + 2 * sizeof(vu));
#pragma GCC unroll 2
    for (int pair = 0; pair < 2; ++pair, from += sizeof(vu), into += 2 * sizeof(vu)) {
      const __m512i high = _mm512_shuffle_epi8(exponents, __m512i(places >> 4 * pair & 0x0f0f0f0fu)), low = load<__m512i>(from);
      store(into, in_order(_mm512_unpacklo_epi8(low, high)));
      store(into + sizeof(vu), in_order(_mm512_unpackhi_epi8(low, high)));
    }
  }
  // The sign before the exponent and the mantissa.
  static __m512i in_order(__m512i words) { return _mm512_or_si512(_mm512_srli_epi16(words, 1), _mm512_slli_epi16(words, 15)); }
  static int64_t granule_of(uint64_t exception) { return int64_t((exception >> 16) / WEIGHTS_OF_GRANULE); }
  void find_soonest() {
    soonest = granule_of(*exceptions[0]);
    for (int c = 1; c < WIDE; ++c) soonest = std::min(soonest, granule_of(*exceptions[c]));
  }
  __attribute__((noinline)) void write_exceptions() {
    for (int c = 0; c < WIDE; ++c)
      for (; granule_of(*exceptions[c]) == granule; ++exceptions[c]) {
        const uint16_t bits = uint16_t(*exceptions[c]);
        std::memcpy(to + c * apart + (*exceptions[c] >> 16) % WEIGHTS_OF_GRANULE * 2, &bits, 2);
      }
    find_soonest();
  }
};
#else
constexpr bool COMPACTS = false;
#endif

// Writes weights [N][K] in tiles, and what lies beside them: 3 int64, 2 for each tile, and one for each exception. Where they are
// too many, or this processor does not decode, the number of int64 is 0.
inline void compact(const uint16_t* weights, int64_t N, int64_t K, uint8_t* tiles, int64_t* beside, int64_t threads) {
  beside[0] = 0;
  if (!COMPACTS) return;
  const int64_t count = (N + LANES - 1) / LANES;
  int64_t often[256] = {};
#pragma omp parallel for num_threads(int(threads)) reduction(+ : often[:256])
  for (int64_t i = 0; i < N * K; ++i) ++often[weights[i] >> 7 & 255];
  uint8_t order[256], place[256];
  std::iota(order, order + 256, 0);
  std::stable_sort(order, order + 256, [&](uint8_t a, uint8_t b) { return often[a] > often[b]; });
  int64_t others = 0;
  for (int i = 16; i < 256; ++i) others += often[order[i]];
  if (others > N * K / SPARSE) return;
  for (int i = 0; i < 256; ++i) place[order[i]] = uint8_t(std::min(i, 16));
  std::memcpy(beside + TABLE_AT, order, 16);
  std::vector<std::vector<uint64_t>> exceptions(count);
  each(count, int(threads), [&](int64_t tile) {
    for (int64_t at = 0; at < K * LANES; ++at) {
      const int64_t granule = at / WEIGHTS_OF_GRANULE, vector = at / 32 % 4, half = at % 32, column = tile * LANES + half / 2;
      const uint16_t bits = weights[std::min(column, N - 1) * K + granule * OF_GRANULE + vector * 2 + half % 2];
      uint8_t* to = tiles + (tile * K / OF_GRANULE + granule) * GRANULE;
      const int64_t byte = half / 8 * 16 + vector % 2 * 8 + half % 8;
      const uint8_t found = place[bits >> 7 & 255];
      if (found == 16 && column < N) exceptions[tile].push_back(uint64_t(at) << 16 | bits);
      to[vector / 2 * 64 + byte] = uint8_t(bits << 1 | bits >> 15);
      to[128 + byte] = uint8_t((vector < 2 ? 0 : to[128 + byte]) | (found & 15) << (vector < 2 ? 0 : 4));
    }
    exceptions[tile].push_back(NO_EXCEPTION);
  });
  int64_t at = FIRSTS_AT + count;
  for (int64_t tile = 0; tile < count; ++tile) {
    beside[FIRSTS_AT + tile] = at;
    at = std::copy(exceptions[tile].begin(), exceptions[tile].end(), beside + at) - beside;
  }
  beside[0] = at;
}

}  // namespace
