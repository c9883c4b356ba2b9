// bfloat16 values in 12 bits: sign and upper seven bits of the exponent, a value's upper byte, are one of 16 for nearly all
// weights of a trained matrix.
//
// Four vectors of 32 values, in the order in which they are multiplied, are a granule of three vectors. Two hold the lower bytes;
// each part of 16 bytes has 8 values of one vector and 8 of the next. The third holds the upper bytes as places in a table, of
// the first vector's values in the lower 4 bits and of the second's in the upper ones. Values with other upper bytes are
// exceptions: in one list, granule by granule, as their place times 2^16 and their bits.
//
// Beside the granules lie int64: how many of them there are, the table, and the exceptions with NO_EXCEPTION behind the last one.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "packed.h"

namespace {

constexpr int64_t AHEAD = 2048;  // bytes of weights that are fetched before they are used
constexpr int COMPACT = 12;      // bits
constexpr int64_t GRANULE = 3 * sizeof(vu), OF_GRANULE = 128;  // bytes and values
constexpr int64_t TABLE_AT = 1, EXCEPTIONS_AT = 3;             // in what lies beside
constexpr uint64_t NO_EXCEPTION = ~uint64_t(0);
constexpr int64_t SPARSE = 512;  // values for each exception; with more of them, reading is no faster

#ifdef __AVX512BF16__
constexpr bool COMPACTS = true;  // others widen weights, and lose more by decoding 8 rows' than they gain

inline void decode(const uint8_t* granule, __m512i uppers, uint8_t* to) {
  const vu places = load<vu>(granule + 2 * sizeof(vu));
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; ++pair, granule += sizeof(vu), to += 2 * sizeof(vu)) {
    const __m512i upper = _mm512_shuffle_epi8(uppers, __m512i(places >> 4 * pair & 0x0f0f0f0fu)), lower = load<__m512i>(granule);
    store(to, _mm512_unpacklo_epi8(lower, upper));
    store(to + sizeof(vu), _mm512_unpackhi_epi8(lower, upper));
  }
}

// The vectors of WIDE tiles, decoded granule by granule.
template <int WIDE> class Compact {
  const uint8_t* w;
  int64_t of_tile, left, granule;  // granules of a tile, those behind w, and the number of the next one
  __m512i uppers;
  const uint64_t* exceptions[WIDE];
  int64_t soonest;  // granule with an exception
  uint8_t* to;
  int64_t step;

 public:
  static constexpr int VECTORS = 4;
  int64_t apart = 0;  // bytes from one tile's vectors to the next tile's

  Compact(const void* granules, const int64_t* beside, int64_t first, int64_t of_tile)
      : w(static_cast<const uint8_t*>(granules) + first * GRANULE), of_tile(of_tile), left(of_tile), granule(first),
        uppers(_mm512_broadcast_i32x4(load<__m128i>(beside + TABLE_AT))) {
    const uint64_t *next = reinterpret_cast<const uint64_t*>(beside + EXCEPTIONS_AT), *end = next + (beside[0] - EXCEPTIONS_AT - 1);
    for (int c = 0; c < WIDE; ++c)
      exceptions[c] = next = std::lower_bound(next, end, uint64_t(first + c * of_tile) * OF_GRANULE << 16);
    find_soonest();
  }
  // Where the next values of K go: all of them, for others to read, or each granule to where the last one was.
  void write(uint8_t* there, int64_t values, bool all) {
    to = there, step = all ? VECTORS * sizeof(vu) : 0;
    apart = (all ? values * LANES / OF_GRANULE : 1) * VECTORS * sizeof(vu);
  }
  inline const uint8_t* next() {
    const int64_t tile = of_tile * GRANULE, ahead = AHEAD + (left * GRANULE > AHEAD ? 0 : (WIDE - 1) * tile);
    for (int c = 0; c < WIDE; ++c)
      for (int line = 0; line < 3; ++line) __builtin_prefetch(w + c * tile + ahead + line * sizeof(vu));
#pragma GCC unroll 8
    for (int c = 0; c < WIDE; ++c) decode(w + c * tile, uppers, to + c * apart);
    if (__builtin_expect(granule == soonest, 0)) write_exceptions();
    w += GRANULE, --left, ++granule;
    const uint8_t* decoded = to;
    to += step;
    return decoded;
  }

 private:
  int64_t next_exception(int c) const { return int64_t((*exceptions[c] >> 16) / OF_GRANULE) - c * of_tile; }
  void find_soonest() {
    soonest = next_exception(0);
    for (int c = 1; c < WIDE; ++c) soonest = std::min(soonest, next_exception(c));
  }
  __attribute__((noinline)) void write_exceptions() {
    for (int c = 0; c < WIDE; ++c)
      for (; next_exception(c) == granule; ++exceptions[c]) {
        const uint16_t bits = uint16_t(*exceptions[c]);
        std::memcpy(to + c * apart + (*exceptions[c] >> 16) % OF_GRANULE * 2, &bits, 2);
      }
    find_soonest();
  }
};

// Writes a granule of values whose upper bytes the table has, and others with its first one, which `unknown` returns.
inline void encode(const uint16_t* values, const uint8_t* table, uint8_t* to, uint64_t unknown[2]) {
  typedef uint8_t vb __attribute__((vector_size(64)));
  uint8_t uppers[OF_GRANULE], places[OF_GRANULE];
  for (int pair = 0; pair < 2; ++pair)
    for (int part = 0; part < 4; ++part)
      for (int vector = 0; vector < 2; ++vector)
        for (int i = 0; i < 8; ++i) {
          const uint16_t bits = values[(pair * 2 + vector) * 32 + part * 8 + i];
          const int at = pair * 64 + part * 16 + vector * 8 + i;
          uppers[at] = uint8_t(bits >> 8), to[at] = uint8_t(bits);
        }
  for (int half = 0; half < 2; ++half) {
    const vb found = load<vb>(uppers + half * 64);
    vb place = {};
    unknown[half] = ~uint64_t(0);
    for (int i = 0; i < 16; ++i) {
      const auto same = found == table[i];
      place |= vb(same) & uint8_t(i), unknown[half] &= ~_mm512_movepi8_mask(__m512i(same));
    }
    store(places + half * 64, place);
  }
  store(to + 128, vb(load<vb>(places) | load<vb>(places + 64) << 4));
}

// Writes values as granules, and what lies beside them, and returns how many int64 that are: at most 4 and one for SPARSE values.
// Where exceptions are too many, returns 0.
inline int64_t compact(const uint16_t* values, int64_t count, uint8_t* to, int64_t* beside, int64_t threads) {
  constexpr int64_t OF_PART = 512;  // granules
  int64_t often[256] = {}, others = 0;
#pragma omp parallel for num_threads(int(threads)) reduction(+ : often[:256]) if (threads > 1)
  for (int64_t i = 0; i < count; ++i) ++often[values[i] >> 8];
  uint8_t table[256];
  std::iota(table, table + 256, 0);
  std::stable_sort(table, table + 256, [&](uint8_t a, uint8_t b) { return often[a] > often[b]; });
  for (int i = 16; i < 256; ++i) others += often[table[i]];
  if (others > count / SPARSE) return 0;
  const int64_t granules = (count + OF_GRANULE - 1) / OF_GRANULE;
  std::vector<std::vector<uint64_t>> exceptions((granules + OF_PART - 1) / OF_PART);
  each(int64_t(exceptions.size()), int(threads), [&](int64_t part) {
    for (int64_t g = part * OF_PART; g < std::min(granules, (part + 1) * OF_PART); ++g) {
      const int64_t first = g * OF_GRANULE;
      uint16_t last[OF_GRANULE] = {};
      const bool whole = first + OF_GRANULE <= count;
      if (!whole) std::memcpy(last, values + first, (count - first) * 2);
      uint64_t unknown[2];
      encode(whole ? values + first : last, table, to + g * GRANULE, unknown);
      for (int half = 0; half < 2; ++half)
        for (uint64_t left = unknown[half]; left; left &= left - 1) {
          const int at = __builtin_ctzll(left);
          const int64_t place = first + (half * 2 + at / 8 % 2) * 32 + at / 16 * 8 + at % 8;
          if (place < count) exceptions[part].push_back(uint64_t(place) << 16 | values[place]);
        }
    }
  });
  std::memcpy(beside + TABLE_AT, table, 16);
  int64_t* at = beside + EXCEPTIONS_AT;
  for (const auto& some : exceptions) at = std::copy(some.begin(), some.end(), at);
  *at++ = int64_t(NO_EXCEPTION);
  return beside[0] = at - beside;
}
#else
constexpr bool COMPACTS = false;
inline int64_t compact(const uint16_t*, int64_t, uint8_t*, int64_t*, int64_t) { return 0; }
#endif

}  // namespace
