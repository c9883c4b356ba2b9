// The gated delta rule over states in slots: a short convolution of each sequence's rows, a state that decays and is
// corrected row by row, and the norm and gate of the values read from it. Sums are float32, each over its index in order:
// a row's result depends on the rows of its sequence alone, not on the chunks.
#pragma once
#include <vector>

#include "vectors.h"

namespace {

constexpr int MOST_WIDTH = 8;          // rows that the convolution sees
constexpr int CHANNELS_PER_TASK = 512;
constexpr int ROWS_PREPARED = 64;      // of a chunk, whose queries and keys are made ready together
constexpr int STRIP = 4;               // lane vectors of a state's columns that are held in the first cache
constexpr double DELTA_WORK = 60000;   // products; less is done before a second thread has woken up

struct DeltaChunk { int64_t row, length, slot, fresh; };

template <class T> struct DeltaLayer {
  const T* qkv; int64_t ld_qkv;  // [rows][channels]: queries and keys [key_heads][K] each, values [heads][V]
  const T* z; int64_t ld_z;      // [rows][heads][V]
  const T* b; int64_t ld_b;      // [rows][heads]
  const T* a; int64_t ld_a;
  const T* conv;                 // [width][channels]
  const float *decay, *dt_bias;  // [heads]
  const T* norm;                 // [V]
  T* rows;                       // [slots][width - 1][channels], read and written
  float* states;                 // [slots][heads][K][V], read and written
  T* x;                          // [rows][channels]: what was convolved
  T* out;                        // [rows][heads][V]
  int64_t channels, width, key_heads, heads, K, V;
  float eps;
};

template <class T> inline float rounded(float x) { T r; narrow(r, x); return widen(r); }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }
template <class T> inline vf load_part(const T* from, int64_t count) {
  if (count >= LANES) return load16(from);
  T part[LANES] = {};
  std::memcpy(part, from, count * sizeof(T));
  return load16(part);
}
template <class T> inline void store_part(T* to, vf x, int64_t count) {
  if (count >= LANES) return store16(to, x);
  T part[LANES];
  store16(part, x);
  std::memcpy(to, part, count * sizeof(T));
}

// Convolves the rows of a chunk, for channels from begin on, and keeps its last ones.
template <class T> void convolve(const DeltaLayer<T>& at, const DeltaChunk& chunk, int64_t begin, int64_t end) {
  const int before = int(at.width) - 1;
  T* kept = at.rows + chunk.slot * before * at.channels;
  for (int64_t c = begin; c < end; c += LANES) {
    const int64_t count = end - c;
    vf past[MOST_WIDTH] = {}, taps[MOST_WIDTH];
    for (int w = 0; w <= before; ++w) taps[w] = load_part(at.conv + w * at.channels + c, count);
    for (int w = 0; w < before && !chunk.fresh; ++w) past[w] = load_part(kept + w * at.channels + c, count);
    for (int64_t t = 0; t < chunk.length; ++t) {
      past[before] = load_part(at.qkv + (chunk.row + t) * at.ld_qkv + c, count);
      vf total = {};
      for (int w = 0; w <= before; ++w) total = multiply_add(total, past[w], taps[w]);
      T seen[LANES];
      store16(seen, total);
      total = load16(seen);
      store_part(at.x + (chunk.row + t) * at.channels + c, total * sigmoid16(total), count);
      for (int w = 0; w < before; ++w) past[w] = past[w + 1];
    }
    for (int w = 0; w < before; ++w) store_part(kept + w * at.channels + c, past[w], count);
  }
}

// Writes a query or key of length scale.
template <class T> inline void normalize(const T* from, int64_t K, float scale, float* to) {
  vf squares = {};
  for (int64_t k = 0; k < K; k += LANES) {
    const vf x = load_part(from + k, K - k);
    squares = multiply_add(squares, x, x);
  }
  const float factor = scale / std::sqrt(sum(squares) + 1e-6f);
  for (int64_t k = 0; k < K; k += LANES) store_part(to + k, load_part(from + k, K - k) * factor, K - k);
}

// One row: S = left * S + key (beta (v - left * S^T key))^T, and returns S^T query in out; S is [K][STRIP * LANES], its
// rows ld apart.
inline void advance(float* S, int64_t ld, int64_t K, const float* query, const float* key, float left, float beta, const vf* v, vf* out) {
  vf found[STRIP] = {}, added[STRIP];
  for (int64_t k = 0; k < K; ++k)
    for (int c = 0; c < STRIP; ++c) found[c] = multiply_add(found[c], load<vf>(S + k * ld + c * LANES), splat(key[k]));
  for (int c = 0; c < STRIP; ++c) { added[c] = (v[c] - found[c] * left) * beta; out[c] = vf{}; }
  for (int64_t k = 0; k < K; ++k)
    for (int c = 0; c < STRIP; ++c) {
      float* place = S + k * ld + c * LANES;
      const vf state = multiply_add(load<vf>(place) * left, added[c], splat(key[k]));
      store(place, state);
      out[c] = multiply_add(out[c], state, splat(query[k]));
    }
}

// out = out / rms(out) * norm * silu(z) of one row and head, rounded where torch rounds.
template <class T> void gate(const DeltaLayer<T>& at, T* out, const T* z) {
  vf squares = {};
  for (int64_t v = 0; v < at.V; v += LANES) {
    const vf x = load_part(out + v, at.V - v);
    squares = multiply_add(squares, x, x);
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / float(at.V) + at.eps);
  for (int64_t v = 0; v < at.V; v += LANES) {
    const int64_t count = at.V - v;
    T each[LANES];
    store16(each, load_part(out + v, count) * factor);
    store16(each, load16(each) * load_part(at.norm + v, count));
    const vf x = load_part(z + v, count);
    store_part(out + v, load16(each) * (x * sigmoid16(x)), count);
  }
}

// All rows of a chunk for one head, strip by strip of the state's columns.
template <class T> void advance_head(const DeltaLayer<T>& at, const DeltaChunk& chunk, int64_t head) {
  constexpr int WIDE = STRIP * LANES;
  const int64_t K = at.K, V = at.V, keys = at.key_heads * K, shared = head / (at.heads / at.key_heads) * K;
  float* state = at.states + (chunk.slot * at.heads + head) * K * V;
  static thread_local std::vector<float> scratch;
  scratch.resize(K * WIDE + ROWS_PREPARED * (2 * K + 2) + LANES);
  float *S = scratch.data(), *queries = S + K * WIDE, *leave = queries + ROWS_PREPARED * 2 * K;
  for (int64_t first = 0; first < chunk.length; first += ROWS_PREPARED) {
    const int64_t rows = std::min<int64_t>(ROWS_PREPARED, chunk.length - first), at_row = chunk.row + first;
    for (int64_t t = 0; t < rows; ++t) {
      const T* x = at.x + (at_row + t) * at.channels + shared;
      normalize(x, K, 1.0f / std::sqrt(float(K)), queries + t * 2 * K);
      normalize(x + keys, K, 1.0f, queries + t * 2 * K + K);
      leave[2 * t] = std::exp(at.decay[head] * softplus(widen(at.a[(at_row + t) * at.ld_a + head]) + at.dt_bias[head]));
      leave[2 * t + 1] = rounded<T>(sigmoid(widen(at.b[(at_row + t) * at.ld_b + head])));
    }
    const bool fresh = chunk.fresh && first == 0;
    for (int64_t column = 0; column < V; column += WIDE) {
      const bool in_place = rows == 1 && !fresh && V - column >= WIDE;  // what is used once is not copied
      float* strip = in_place ? state + column : S;
      for (int64_t k = 0; k < K && !in_place; ++k)
        for (int c = 0; c < STRIP; ++c) {
          const int64_t left = V - column - c * LANES;
          store(S + k * WIDE + c * LANES, fresh || left <= 0 ? vf{} : load_part(state + k * V + column + c * LANES, left));
        }
      for (int64_t t = 0; t < rows; ++t) {
        const int64_t own = head * V + column;
        vf v[STRIP], out[STRIP];
        for (int c = 0; c < STRIP; ++c) {
          const int64_t left = V - column - c * LANES;
          v[c] = left <= 0 ? vf{} : load_part(at.x + (at_row + t) * at.channels + 2 * keys + own + c * LANES, left);
        }
        advance(strip, in_place ? V : WIDE, K, queries + t * 2 * K, queries + t * 2 * K + K, leave[2 * t], leave[2 * t + 1], v, out);
        for (int c = 0; c < STRIP && V - column > c * LANES; ++c)
          store_part(at.out + (at_row + t) * at.heads * V + own + c * LANES, out[c], V - column - c * LANES);
      }
      for (int64_t k = 0; k < K && !in_place; ++k)
        for (int c = 0; c < STRIP && V - column > c * LANES; ++c)
          store_part(state + k * V + column + c * LANES, load<vf>(S + k * WIDE + c * LANES), V - column - c * LANES);
    }
    for (int64_t t = 0; t < rows; ++t)
      gate(at, at.out + ((at_row + t) * at.heads + head) * V, at.z + (at_row + t) * at.ld_z + head * V);
  }
}

// Rows of no chunk are not written; each chunk has a slot of its own.
template <class T> void delta_rule(const DeltaLayer<T>& at, const DeltaChunk* chunks, int64_t count, int64_t threads) {
  const int64_t parts = (at.channels + CHANNELS_PER_TASK - 1) / CHANNELS_PER_TASK;
  double rows = 0;
  for (int64_t c = 0; c < count; ++c) rows += double(chunks[c].length);
  const bool wide = rows * at.channels * at.width > DELTA_WORK, deep = rows * at.heads * at.K * at.V > DELTA_WORK;
  each(count * parts, wide ? int(threads) : 1, [=](int64_t task) {
    const int64_t begin = task % parts * CHANNELS_PER_TASK;
    convolve(at, chunks[task / parts], begin, std::min<int64_t>(at.channels, begin + CHANNELS_PER_TASK));
  });
  each(count * at.heads, deep ? int(threads) : 1, [=](int64_t task) {
    advance_head(at, chunks[task / at.heads], task % at.heads);
  });
}

}  // namespace
