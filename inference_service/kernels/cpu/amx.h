// The matrix unit of a processor (Intel's AMX): a tile of it is a tile of ours, 16 columns of 16 pairs of K, as it lies.
//
// A product adds, for each sum, those of the first and of the second values of 16 pairs in order, then both to the sum: the same
// for a row beside any others, and other bits than vdpbf16ps.
#pragma once
#include "compact.h"

extern "C" int64_t multiplies_tiles;  // 1: whole bfloat16 weights are multiplied so

namespace {

constexpr int64_t OF_TILE = 2 * LANES;  // values of K
constexpr int ROWS_OF_TILE = 16;

}  // namespace

#ifdef __AVX512BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef WITH_AMX  // a test has a model of it
#define WITH_AMX __attribute__((noinline, target("amx-tile,amx-bf16")))
#endif

namespace {

// What a tile of each number holds, as a processor reads it.
struct alignas(64) TileShapes {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// While it lives, a thread's tiles may have other shapes: those that a library left there come back.
class OwnTiles {
  TileShapes before;

 public:
  WITH_AMX OwnTiles() { _tile_storeconfig(&before); }
  WITH_AMX ~OwnTiles() {
    if (before.palette) _tile_loadconfig(&before);
    else _tile_release();
  }
};

// sums [rows][WIDE * 16] (+)= x [rows][units] . w of WIDE tiles of columns, which lie so many bytes apart, in tiles 0 to 2; x is
// in 3, and weights in 4 to 6. Of rows that come first, weights are fetched ahead.
template <int WIDE>
WITH_AMX void sum_by_amx(int rows, const bf16* x, int64_t ldx, const uint8_t* w, int64_t apart, int64_t units, float* sums, bool fresh, bool first) {
  static_assert(WIDE == 1 || WIDE == 3, "tiles have fixed numbers");
  constexpr int64_t LINE = WIDE * sizeof(vf);
  TileShapes shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64}, {}};
  for (int tile = 0; tile < 7; ++tile) shapes.rows[tile] = tile < 4 ? rows : LANES;
  _tile_loadconfig(&shapes);
  asm volatile("" ::: "memory");  // tiles are read from memory as it is written here
  if (fresh) _tile_zero(0);
  else _tile_loadd(0, sums, LINE);
  if constexpr (WIDE == 3) {
    if (fresh) {
      _tile_zero(1);
      _tile_zero(2);
    } else {
      _tile_loadd(1, sums + LANES, LINE);
      _tile_loadd(2, sums + 2 * LANES, LINE);
    }
  }
  const uint8_t* const end = w + units * int64_t(sizeof(vu));
  for (; w < end; w += LANES * sizeof(vu), x += OF_TILE) {
    if (first) {
      const int64_t ahead = AHEAD + (end - w > AHEAD ? 0 : (WIDE - 1) * apart);  // at last of the next tiles
      for (int c = 0; c < WIDE; ++c)
        for (int line = 0; line < LANES; ++line) __builtin_prefetch(w + c * apart + ahead + line * 64, 0, 2);
    }
    _tile_loadd(3, x, ldx * int64_t(sizeof(bf16)));
    _tile_loadd(4, w, sizeof(vu));
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (WIDE == 3) {
      _tile_loadd(5, w + apart, sizeof(vu));
      _tile_dpbf16ps(1, 3, 5);
      _tile_loadd(6, w + 2 * apart, sizeof(vu));
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, sums, LINE);
  if constexpr (WIDE == 3) {
    _tile_stored(1, sums + LANES, LINE);
    _tile_stored(2, sums + 2 * LANES, LINE);
  }
}

// Whether this processor has the unit, and the system lets this process use it, which has to be asked for.
inline bool may_use_amx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned UNIT = 1u << 24, BFLOAT16 = 1u << 22;
  constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM of arch_prctl(2), and the tiles' state
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & UNIT) && (edx & BFLOAT16) && !syscall(SYS_arch_prctl, REQUEST, TILES);
}

}  // namespace
#else
inline bool may_use_amx() { return false; }
#endif
