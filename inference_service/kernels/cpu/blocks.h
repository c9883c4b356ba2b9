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
  // Four numbers of each column, values of K from 4 * unit on.
  static inline ru unit(const uint8_t* numbers, int unit, int part) {
    const uint8_t* from = numbers + part * REGISTER;
    if constexpr (BITS == 8) return load<ru>(from + unit * 64);
    const ru low = load<ru>(from + unit / 2 * 64) >> 4 * (unit % 2) & 0x0f0f0f0fu;
    if constexpr (BITS == 5 || BITS == 6) {
      constexpr int MORE = BITS - 4, HELD = 8 / MORE;  // bits of a number, and numbers of a byte
      const ru high = load<ru>(from + (4 + unit / HELD) * 64);
      const int shift = MORE * (unit % HELD) - 4;
      return low | ((shift < 0 ? high << -shift : high >> shift) & (BITS == 5 ? 0x10101010u : 0x30303030u));
    }
    return low;
  }
  static int32_t zero(const BlockTile& tile) { return tile.kind & OFFSET ? 0 : 1 << (BITS - 1); }
};

// What a block's numbers of the columns of a register share.
template <int BITS> struct BlockScales {
  rf scale[BlockOf<BITS>::SCALES], offset;
  BlockScales(const BlockTile& tile, int64_t block, int part) {
    constexpr int OF_PART = LANES / SPLIT, COUNT = BlockOf<BITS>::SCALES;
    const int parts = tile.kind & OFFSET ? 2 : 1;
    const uint8_t *from = tile.scales + 2 * part * OF_PART, *small = nullptr;
    if (tile.kind & IN_PARTS) {
      const int64_t bytes = LANES * (COUNT + parts - 1), head = 2 * LANES * parts;
      const int64_t super = block / OF_SUPER * (head + OF_SUPER * bytes);
      small = tile.scales + super + head + block % OF_SUPER * bytes, from += super;
    } else {
      from += block * 2 * LANES * parts;
    }
    const auto of = [&](int place, int whole) {
      const rf all = load_half(from + whole * 2 * LANES);
      return small ? all * as<rf>(Integers<8>::unit(small + place * LANES, 0, part)) : all;
    };
    for (int i = 0; i < COUNT; ++i) scale[i] = of(i, 0);
    offset = parts == 2 ? of(COUNT, 1) : rf{};
  }
};

// Blocks of WIDE tiles as weights in float32.
template <int BITS, int WIDE> class Blocks {
  const BlockTile* tiles;
  int64_t block;
  float* to;
  int64_t step;

 public:
  static constexpr int VECTORS = OF_BLOCK;
  int64_t apart;

  // They go where the last block went, or one behind the other for others to read.
  Blocks(const BlockTile* tiles, int64_t k, float* to, int64_t values, bool all)
      : tiles(tiles), block(k / OF_BLOCK), to(to), step(all ? OF_BLOCK * LANES : 0),
        apart((all ? values : OF_BLOCK) * sizeof(vf)) {}
  inline const uint8_t* next() {
    constexpr int OF_PART = LANES / SPLIT;
    const int32_t zero = BlockOf<BITS>::zero(*tiles);
    for (int c = 0; c < WIDE * SPLIT; ++c) {
      const BlockTile& tile = tiles[c / SPLIT];
      const BlockScales<BITS> shared(tile, block, c % SPLIT);
      float* out = to + c / SPLIT * (apart / sizeof(float)) + c % SPLIT * OF_PART;
      const uint8_t* numbers = tile.numbers + block * BlockOf<BITS>::BYTES;
      __builtin_prefetch(numbers + AHEAD), __builtin_prefetch(numbers + AHEAD + 64), __builtin_prefetch(numbers + AHEAD + 128);
#pragma GCC unroll 8
      for (int u = 0; u < 8; ++u) {
        const ru four = BlockOf<BITS>::unit(numbers, u, c % SPLIT);
        const rf scale = shared.scale[BlockOf<BITS>::SCALES == 2 ? u / 4 : 0];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, out += LANES)
          store(out, multiply_add(shared.offset, __builtin_convertvector(ri(four >> 8 * i & 0xffu) - zero, rf), scale));
      }
    }
    const float* decoded = to;
    to += step, ++block;
    return reinterpret_cast<const uint8_t*>(decoded);
  }
};

}  // namespace
