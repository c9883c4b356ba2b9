// The matrix unit as its manual has it, so that products by it run where no processor has one.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, LDTILECFG to TDPBF16PS; subnormals are zeros.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#define WITH_AMX __attribute__((noinline))
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_model::configure
#define _tile_storeconfig(to) std::memcpy(to, amx_model::unit.config, 64)
#define _tile_release() std::memset(&amx_model::unit, 0, sizeof amx_model::unit)
#define _tile_zero(tile) std::memset(amx_model::unit.tiles[tile], 0, 1024)
#define _tile_loadd(tile, from, apart) amx_model::load(tile, from, apart)
#define _tile_stored(tile, to, apart) amx_model::store(tile, to, apart)
#define _tile_dpbf16ps amx_model::multiply

namespace amx_model {

inline thread_local struct { uint8_t config[64], tiles[8][16][64]; } unit;

inline std::atomic<int> products{0};

inline int rows(int tile) { return unit.config[48 + tile]; }
inline int bytes(int tile) { return unit.config[16 + 2 * tile]; }
inline void configure(const void* from) {
  std::memcpy(unit.config, from, 64);
  std::memset(unit.tiles, 0, sizeof unit.tiles);
}
inline void load(int tile, const void* from, long apart) {
  std::memset(unit.tiles[tile], 0, 1024);
  for (int r = 0; r < rows(tile); ++r) std::memcpy(unit.tiles[tile][r], static_cast<const char*>(from) + r * apart, bytes(tile));
}
inline void store(int tile, void* to, long apart) {
  for (int r = 0; r < rows(tile); ++r) std::memcpy(static_cast<char*>(to) + r * apart, unit.tiles[tile][r], bytes(tile));
}
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float value(int tile, int row, int at) {
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 2, &unit.tiles[tile][row][2 * at], 2);
  float x;
  std::memcpy(&x, &bits, 4);
  return flushed(x);
}
inline void multiply(int to, int a, int b) {
  ++products;
  for (int m = 0; m < rows(to); ++m)
    for (int n = 0; n < bytes(to) / 4; ++n) {
      float sums[2] = {}, sum;
      for (int k = 0; k < bytes(a) / 4; ++k)
        for (int i = 0; i < 2; ++i) sums[i] = flushed(std::fma(value(a, m, 2 * k + i), value(b, k, 2 * n + i), sums[i]));
      std::memcpy(&sum, &unit.tiles[to][m][4 * n], 4);
      sum = flushed(sum + flushed(sums[0] + sums[1]));
      std::memcpy(&unit.tiles[to][m][4 * n], &sum, 4);
    }
}

}  // namespace amx_model

extern "C" inline __attribute__((used)) void amx_configure(const void* from) { amx_model::configure(from); }
extern "C" inline __attribute__((used)) int amx_products() { return amx_model::products.exchange(0); }
extern "C" inline __attribute__((used)) void amx_configured(void* to) { _tile_storeconfig(to); }
