// Draws of tokens from logits, as kernels/sampling/host.py describes and computes them: temperature, min-p, top-k, top-p,
// then a race of logit / temperature + Gumbel noise. A row is drawn by one thread, so its token depends on the row alone.
#pragma once
#include <limits>
#include <vector>
#include "vectors.h"

namespace {

// A row as ops.py packs it.
struct Draw {
  int64_t row;
  double sharpness;  // 1 / temperature; 0: the largest logit wins, the first of equals
  int64_t top_k;     // 0: all
  double top_p, span;
  uint64_t seed;
  int64_t generated;
  int64_t mask;      // which of the masks says what tokens may come; -1: all may
};

constexpr int COUNTERS = 16;             // of Philox at once
constexpr int TOKENS = 4 * COUNTERS;     // that have their words
constexpr double REACH = 27;             // more than the largest noise is above the smallest
constexpr double LEAST_NOISE = -3.2;     // below the smallest, -log(log(2^33))
constexpr int BUCKETS = 1024;            // of distances from the largest score, 1/32 wide; the last one has all the rest
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr int64_t NO_TOKEN = -1;         // of a row whose mask leaves no token with a logit above NONE

typedef double vd __attribute__((vector_size(64)));
typedef int64_t vl __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));

inline bool any(vi lanes) { return sum(__builtin_convertvector(lanes, vf)) != 0; }

// e^x for x <= 0, in double: 2^n times Taylor's polynomial on [-ln2/2, ln2/2], relative error below 1e-14.
inline vd exp8(vd x) {
  const vd low = vd{} - 700.0, magic = vd{} + 6755399441055744.0;
  x = x < low ? low : x;
  vd n = (x * 1.4426950408889634 + magic) - magic;
  vd r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  vd p = vd{} + 1.0 / 6227020800.0;
  double factorial = 6227020800.0;
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    p = p * r + 1.0 / factorial;
  }
  vl e = (__builtin_convertvector(n, vl) + 1023) << 52;
  return p * as<vd>(e);
}

// Philox-4x32 of COUNTERS counters from the first on: the words of the tokens, in their order.
inline void philox(uint32_t first, uint32_t generated, uint64_t seed, uint32_t* words) {
  uint32_t c0[COUNTERS], c1[COUNTERS], c2[COUNTERS], c3[COUNTERS];
  for (int i = 0; i < COUNTERS; ++i) c0[i] = first + i, c1[i] = generated, c2[i] = c3[i] = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < COUNTERS; ++i) {
      const uint64_t a = uint64_t(c0[i]) * 0xD2511F53u, b = uint64_t(c2[i]) * 0xCD9E8D57u;
      c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
      c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
      c1[i] = uint32_t(b);
      c3[i] = uint32_t(a);
    }
  for (int i = 0; i < COUNTERS; ++i)
    words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
}

// The winner among tokens whose value is not below a cut; values are padded with NONE to whole TOKENS. A token can only win
// if its word is small enough, since -log(-log(1 - u)) <= -log(u): nearly all are ruled out without a logarithm.
inline int64_t race(const float* values, int64_t padded, float best, float cut, const Draw& draw) {
  const float sharpness = float(draw.sharpness);
  double score = -std::numeric_limits<double>::infinity(), least = double(best * sharpness) + LEAST_NOISE;
  int64_t token = 0;
  uint32_t words[TOKENS];
  for (int64_t at = 0; at < padded; at += TOKENS) {
    vi some = {};
    for (int i = 0; i < TOKENS; i += LANES) some |= load<vf>(values + at + i) >= cut;
    if (!any(some)) continue;
    philox(uint32_t(at / 4), uint32_t(draw.generated), draw.seed, words);
    for (int i = 0; i < TOKENS; i += LANES) {
      const float below = float(least) - 1e-3f - 1e-6f * std::fabs(float(least));  // for what float32 rounds
      vf x = (load<vf>(values + at + i) * sharpness - below) * 1.44269504f;
      x = x < -126.0f ? splat(-126.0f) : x > 1.0f ? splat(1.0f) : x;
      const vf bound = floats(vu(__builtin_convertvector((x + 127.0f) * 8388608.0f, vi)));  // at least 2^x
      const vf u = __builtin_convertvector(load<vu>(words + i), vf) * 0x1p-32f;
      vi may = (u <= bound) & (load<vf>(values + at + i) >= cut);
      if (!any(may)) continue;
      for (int lane = 0; lane < LANES; ++lane) {
        if (!may[lane]) continue;
        const double noise = -std::log(-std::log((4294967295.5 - words[i + lane]) * 0x1p-32));
        const double own = double(values[at + i + lane] * sharpness) + noise;
        if (own > score) score = own, token = at + i + lane;
      }
      least = std::max(least, score);
    }
  }
  return token;
}

// The tokens of a row that top-k or top-p leaves: the others become NONE. Values are padded with NONE to whole TOKENS.
struct Support {
  float* values;
  int64_t size;
  float best;
  const Draw& draw;
  std::vector<float>& some;

  vi buckets(vf value) const {
    vf distance = (best - value) * float(draw.sharpness) * 32.0f;
    return __builtin_convertvector(distance < float(BUCKETS - 1) ? distance : splat(BUCKETS - 1), vi);
  }

  // Keep the tokens before the bucket, and as many of the bucket as `more` takes, the largest first; at least one.
  template <class F> void cut(int wanted, F more) {
    some.clear();
    for (int64_t i = 0; i < size; i += LANES) {
      const vf value = load<vf>(values + i);
      const vi here = (buckets(value) == wanted) & (value > NONE);
      if (any(here))
        for (int lane = 0; lane < LANES; ++lane)
          if (here[lane]) some.push_back(value[lane]);
    }
    std::sort(some.begin(), some.end(), std::greater<float>());
    int64_t count = 0;
    while (count < int64_t(some.size()) && more(some[count])) ++count;
    count = std::max<int64_t>(count, 1);
    const float last = some[count - 1];
    int64_t equals = some.begin() + count - std::lower_bound(some.begin(), some.end(), last, std::greater<float>());
    for (int64_t i = 0; i < size; i += LANES) {
      vf value = load<vf>(values + i);
      if (any(value == last))
        for (int lane = 0; lane < LANES; ++lane)
          if (value[lane] == last && equals-- <= 0) value[lane] = NONE;
      store(values + i, value >= last ? value : splat(NONE));
    }
  }

  void top_k() {
    int64_t counts[BUCKETS] = {}, all = 0;
    for (int64_t i = 0; i < size; i += LANES) {
      const vf value = load<vf>(values + i);
      const vi bucket = buckets(value);
      for (int lane = 0; lane < LANES; ++lane)
        if (value[lane] > NONE) ++counts[bucket[lane]], ++all;
    }
    if (draw.top_k >= all) return;
    int64_t left = draw.top_k;
    int at = 0;
    while (counts[at] < left) left -= counts[at++];
    cut(at, [&](float) { return left-- > 0; });
  }

  void top_p() {
    double masses[BUCKETS] = {}, total = 0;
    for (int64_t i = 0; i < size; i += LANES) {
      const vf value = load<vf>(values + i);
      const vi bucket = buckets(value);
      double mass[LANES];
      for (int half = 0; half < LANES; half += 8) {
        const vd eight = __builtin_convertvector(load<v8>(values + i + half), vd);
        store(mass + half, exp8((eight - double(best)) * draw.sharpness));
      }
      for (int lane = 0; lane < LANES; ++lane)
        if (value[lane] > NONE) masses[bucket[lane]] += mass[lane];
    }
    for (double each : masses) total += each;
    const double wanted = draw.top_p * total;
    double before = 0;
    int at = 0;
    while (at < BUCKETS - 1 && before + masses[at] < wanted) before += masses[at++];
    cut(at, [&](float value) {
      const bool more = before < wanted;
      before += std::exp((double(value) - double(best)) * draw.sharpness);
      return more;
    });
  }
};

// Makes NONE of the values that a mask does not let pass, and returns the largest of the others.
inline float keep(float* values, const uint16_t* mask, int64_t vocab) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vf top = splat(NONE);
  for (int64_t at = 0; at < vocab; at += LANES) {
    const vi passes = (((vi{} + int32_t(mask[at / LANES])) >> lane) & 1) != 0;
    const vf x = passes ? load<vf>(values + at) : splat(NONE);
    top = x > top ? x : top;
    store(values + at, x);
  }
  float best = NONE;
  for (int lane = 0; lane < LANES; ++lane) best = std::max(best, top[lane]);
  return best;
}

// ids[i] and tops[i] of rows[i]: its token, and its largest logit, NaN where it has any. A mask has 16 bits for each 16 tokens.
template <class T>
void draw(const T* logits, int64_t ld, int64_t vocab, const Draw* rows, int64_t count, const uint16_t* masks, int64_t* ids,
          float* tops, int64_t threads) {
  each(count, int(threads), [=](int64_t i) {
    thread_local std::vector<float> values, some;
    const Draw& row = rows[i];
    const T* from = logits + row.row * ld;
    const int64_t padded = (vocab + TOKENS - 1) / TOKENS * TOKENS;
    values.resize(padded);
    float* v = values.data();
    vf top = splat(NONE);
    vi nan = {};
    int64_t at = 0;
    for (; at + LANES <= vocab; at += LANES) {
      vf x = load16(from + at);
      nan |= x != x;
      x = x == x ? x : splat(NONE);
      top = x > top ? x : top;
      store(v + at, x);
    }
    float best = NONE;
    bool missing = any(nan);
    for (int lane = 0; lane < LANES; ++lane) best = std::max(best, top[lane]);
    for (; at < vocab; ++at) {
      const float x = widen(from[at]);
      missing |= x != x;
      v[at] = x == x ? x : NONE;
      best = std::max(best, v[at]);
    }
    for (; at < padded; ++at) v[at] = NONE;
    tops[i] = missing ? std::numeric_limits<float>::quiet_NaN() : best;
    ids[i] = 0;
    if (row.mask >= 0) {
      best = keep(v, masks + row.mask * ((vocab + LANES - 1) / LANES), vocab);
      if (!(best > NONE)) ids[i] = NO_TOKEN;
    }
    if (!(best > NONE)) return;
    if (!row.sharpness) {
      ids[i] = std::find(v, v + vocab, best) - v;
      return;
    }
    if (row.span < std::numeric_limits<double>::infinity()) {
      const float least = best - float(row.span);
      for (int64_t j = 0; j < padded; ++j) v[j] = v[j] >= least ? v[j] : NONE;
    }
    Support support{v, padded, best, row, some};
    if (row.top_k) support.top_k();
    if (row.top_p < 1.0) support.top_p();
    ids[i] = race(v, padded, best, best - float(REACH / row.sharpness), row);
  });
}

}  // namespace
