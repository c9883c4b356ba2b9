// Weights of 4, 5, 6 or 8 bits that are (number - zero) * scale + offset, as llama.cpp keeps them (kernels/blocks.py).
//
// Each tile of 16 columns has a kind of its own. For 32 values of K, a block, its numbers are vectors of 64 bytes, [16 columns][4
// values of K] each: eight vectors of 8 bits, or four whose halves of a byte are the lower 4 bits of two, then one vector with a
// fifth bit of all eight, or two with two bits of four. Scales of columns lie apart: float16 [16] for each block, and the offsets
// likewise; or, where they are products of two parts, float16 for eight blocks, then integers of 8 bits for each of them.
//
// float32 multiplies with the very weights, and equals their product in float32. bfloat16 rounds its values to 8 bits (packed.h).
#pragma once
#include <vector>

#include "compact.h"

namespace {

constexpr int BLOCKS = 16;                    // stands for their bits in a product
constexpr int OFFSET = 16, IN_PARTS = 32;     // in a kind, beside the bits
constexpr int64_t OF_BLOCK = 32, OF_SUPER = 8;  // values of K, and blocks that share a part of a scale

struct BlockTile { int64_t kind; const uint8_t *numbers, *scales; };

inline rf load_half(const uint8_t* p) {
#if defined(__AVX512F__)
  return rf(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__F16C__)
  return rf(_mm256_cvtph_ps(load<__m128i>(p)));
#else
  const ru raw = __builtin_convertvector(load<rh>(p), ru);
  return as<rf>(as<ru>(as<rf>((raw & 0x7fff) << 13) * 0x1p112f) | (raw & 0x8000) << 16);
#endif
}

template <int BITS> struct BlockOf {
  static constexpr int SCALES = BITS == 6 ? 2 : 1;  // of a block's column
  static constexpr int64_t BYTES = BITS * 64;       // of its numbers
  // Four numbers of each column, those of a unit of half a block.
  static inline ru unit(const uint8_t* numbers, int half, int unit, int part) {
    const uint8_t* from = numbers + part * REGISTER;
    if constexpr (BITS == 8) return load<ru>(from + (half * 4 + unit) * 64);
    const ru low = load<ru>(from + (half * 2 + unit / 2) * 64) >> 4 * (unit % 2) & 0x0f0f0f0fu;
    if constexpr (BITS == 5) return low | (load<ru>(from + 4 * 64) >> 4 * half << (4 - unit) & 0x10101010u);
    if constexpr (BITS == 6) {
      const ru high = load<ru>(from + (4 + half) * 64);
      return low | ((unit < 2 ? high << (4 - 2 * unit) : high >> (2 * unit - 4)) & 0x30303030u);
    }
    return low;
  }
  // Bytes of a block's scales, without those that it shares.
  static int64_t scale_bytes(const BlockTile& tile) {
    const int64_t parts = tile.kind & OFFSET ? 2 : 1;
    return tile.kind & IN_PARTS ? LANES * (SCALES + parts - 1) : 2 * LANES * parts;
  }
  static int32_t zero(const BlockTile& tile) { return tile.kind & OFFSET ? 0 : 1 << (BITS - 1); }
};

// A scale or an offset of a block: the one at a place among the integers, and among the float16.
template <int BITS> inline rf block_shared(const BlockTile& tile, int64_t block, int place, int whole, int part) {
  constexpr int OF_PART = LANES / SPLIT;
  const int64_t head = 2 * LANES * (tile.kind & OFFSET ? 2 : 1), bytes = BlockOf<BITS>::scale_bytes(tile);
  const uint8_t* from = tile.scales + 2 * (whole * LANES + part * OF_PART);
  if (!(tile.kind & IN_PARTS)) return load_half(from + block * bytes);
  const int64_t super = block / OF_SUPER * (head + OF_SUPER * bytes);
  const uint8_t* small = tile.scales + super + head + block % OF_SUPER * bytes + place * LANES;
  return load_half(from + super) * as<rf>(Integers<8>::unit(small, 0, part));
}
template <int BITS> inline rf block_scale(const BlockTile& tile, int64_t block, int half, int part) {
  return block_shared<BITS>(tile, block, BlockOf<BITS>::SCALES == 1 ? 0 : half, 0, part);
}
template <int BITS> inline rf block_offset(const BlockTile& tile, int64_t block, int part) {
  return tile.kind & OFFSET ? block_shared<BITS>(tile, block, BlockOf<BITS>::SCALES, 1, part) : rf{};
}

// Writes numbers [rows][K], a byte each, as tiles, with 0 for rows that the last one lacks.
inline void pack_numbers(const uint8_t* numbers, int64_t rows, int64_t K, int64_t bits, uint8_t* to, int64_t threads) {
  const int64_t blocks = K / OF_BLOCK, bytes = bits * 64;
  each((rows + LANES - 1) / LANES, int(threads), [=](int64_t tile) {
    for (int64_t block = 0; block < blocks; ++block) {
      uint32_t fours[8][LANES] = {}, out[8][LANES] = {};
      for (int64_t row = tile * LANES; row < std::min(rows, (tile + 1) * LANES); ++row)
        for (int u = 0; u < 8; ++u) std::memcpy(&fours[u][row % LANES], numbers + row * K + block * OF_BLOCK + u * 4, 4);
      for (int u = 0; u < 8; ++u)
        for (int c = 0; c < LANES; ++c) {
          const uint32_t four = fours[u][c];
          if (bits == 8) { out[u][c] = four; continue; }
          out[u / 2][c] |= (four & 0x0f0f0f0fu) << 4 * (u % 2);
          if (bits == 5) out[4][c] |= (four >> 4 & 0x01010101u) << u;
          if (bits == 6) out[4 + u / 4][c] |= (four >> 4 & 0x03030303u) << 2 * (u % 4);
        }
      std::memcpy(to + (tile * blocks + block) * bytes, out, bytes);
    }
  });
}

// Decodes a block of tiles to weights in float32, those of a tile `apart` bytes behind those of the one before.
template <int BITS, int WIDE> void decode_block(const BlockTile* tiles, int64_t block, float* to, int64_t apart) {
  constexpr int OF_PART = LANES / SPLIT;
  const int32_t zero = BlockOf<BITS>::zero(*tiles);
  for (int c = 0; c < WIDE * SPLIT; ++c) {
    const BlockTile& tile = tiles[c / SPLIT];
    const rf scales[] = {block_scale<BITS>(tile, block, 0, c % SPLIT), block_scale<BITS>(tile, block, 1, c % SPLIT)};
    const rf offset = block_offset<BITS>(tile, block, c % SPLIT);
    float* out = to + c / SPLIT * (apart / sizeof(float)) + c % SPLIT * OF_PART;
    const uint8_t* numbers = tile.numbers + block * BlockOf<BITS>::BYTES;
    for (int line = 0; line < BITS; ++line) __builtin_prefetch(numbers + AHEAD + line * 64);
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) {
      const ru four = BlockOf<BITS>::unit(numbers, u / 4, u % 4, c % SPLIT);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, out += LANES)
        store(out, multiply_add(offset, __builtin_convertvector(ri(four >> 8 * i & 0xffu) - zero, rf), scales[u / 4]));
    }
  }
}

// Blocks of WIDE tiles as weights in float32.
template <int WIDE> class Blocks {
  void (*decode)(const BlockTile*, int64_t, float*, int64_t);
  const BlockTile* tiles;
  int64_t block;
  float* to;
  int64_t step;

 public:
  static constexpr int VECTORS = OF_BLOCK;
  int64_t apart;

  // They go where the last block went, or one behind the other for others to read.
  Blocks(decltype(decode) decode, const BlockTile* tiles, int64_t k, float* to, int64_t values, bool all)
      : decode(decode), tiles(tiles), block(k / OF_BLOCK), to(to), step(all ? OF_BLOCK * LANES : 0),
        apart((all ? values : OF_BLOCK) * sizeof(vf)) {}
  inline const uint8_t* next() {
    decode(tiles, block++, to, apart);
    const float* decoded = to;
    to += step;
    return reinterpret_cast<const uint8_t*>(decoded);
  }
};

}  // namespace
