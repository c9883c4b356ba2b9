// Draws of tokens from logits, as kernels/sampling/host.py describes and computes them: edits and a mask, temperature, min-p,
// top-k, top-p, then a race of logit / temperature + Gumbel noise; and log probabilities. A row is computed by one thread, so
// its token and its log probabilities depend on the row alone.
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
  int64_t edited;    // 0: the logits are drawn from as they are
  const int32_t* seen;
  const float* counts;
  int64_t num_seen;
  double repetition, presence, frequency;
  const int32_t* added_to;
  const float* added;
  int64_t num_added;
};

constexpr int COUNTERS = 16;             // of Philox at once
constexpr int TOKENS = 4 * COUNTERS;     // that have their words
constexpr int MASKED = 16;               // tokens of a word of a mask
constexpr double REACH = 27;             // more than the largest noise is above the smallest
constexpr double LEAST_NOISE = -3.2;     // below the smallest, -log(log(2^33))
constexpr int BUCKETS = 1024;            // of distances from the largest score, 1/32 wide; the last one has all the rest
constexpr int NEAR = 320;                // of them, in which the cut of top-p is looked for first
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr uint64_t STEPS[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr int64_t NO_TOKEN = -1;         // of a row whose mask leaves no token with a logit above NONE

constexpr int WIDTH = REGISTER / 4;      // floats of a register
constexpr int HALF = WIDTH / 2;          // doubles of one
typedef double rd __attribute__((vector_size(REGISTER)));
typedef int64_t rl __attribute__((vector_size(REGISTER)));
typedef uint64_t rq __attribute__((vector_size(REGISTER)));
typedef float half_rf __attribute__((vector_size(REGISTER / 2)));

inline rf all(float x) { return rf{} + x; }
inline bool any(ri lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(lanes), __m512i(lanes)) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256(__m256i(lanes), __m256i(lanes));
#elif defined(__ARM_NEON)
  return vmaxvq_u32(uint32x4_t(lanes)) != 0;
#else
  int32_t some = 0;
  for (int lane = 0; lane < WIDTH; ++lane) some |= lanes[lane];
  return some != 0;
#endif
}

// e^x for x <= 0, in double: 2^n times Taylor's polynomial on [-ln2/2, ln2/2], relative error below 1e-14; 2e-10 of degree 8.
template <int DEGREE = 13> inline rd exponential(rd x) {
  const rd low = rd{} - 700.0, magic = rd{} + 6755399441055744.0;
  x = x < low ? low : x;
  const rd shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
  rd r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  double factorial = 1;
  for (int k = 2; k <= DEGREE; ++k) factorial *= k;
  rd p = rd{} + 1.0 / factorial;
  for (int k = DEGREE; k > 0; --k) {
    factorial /= k;
    p = p * r + 1.0 / factorial;
  }
  return p * as<rd>((as<rl>(shifted) - as<rl>(magic) + 1023) << 52);
}

// The products of the lower halves of a by b: with what compilers make of 64-bit products, Philox takes five times as long.
inline rq multiply32(rq a, uint32_t b) {
#if defined(__AVX512F__)
  return rq(_mm512_mul_epu32(__m512i(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return rq(_mm256_mul_epu32(__m256i(a), _mm256_set1_epi64x(b)));
#elif defined(__ARM_NEON)
  return rq(vmull_n_u32(vmovn_u64(uint64x2_t(a)), b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// Philox-4x32 of COUNTERS counters from the first on: the words of the tokens, in their order. Upper halves are not read.
inline void philox(uint32_t first, uint32_t generated, uint64_t seed, uint32_t* words) {
  for (int begin = 0; begin < COUNTERS; begin += HALF) {
    rq c0 = load<rq>(STEPS) + (first + begin), c1 = rq{} + generated, c2 = {}, c3 = {};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const rq a = multiply32(c0, 0xD2511F53u), b = multiply32(c2, 0xCD9E8D57u);
      c0 = (b >> 32) ^ c1 ^ k0;
      c2 = (a >> 32) ^ c3 ^ k1;
      c1 = b;
      c3 = a;
    }
    uint64_t even[HALF], odd[HALF], pairs[WIDTH];
    store(even, (c0 & 0xffffffffu) | c1 << 32);
    store(odd, (c2 & 0xffffffffu) | c3 << 32);
    for (int i = 0; i < HALF; ++i) pairs[2 * i] = even[i], pairs[2 * i + 1] = odd[i];
    std::memcpy(words + 4 * begin, pairs, sizeof pairs);
  }
}

// The winner among tokens whose value is not below a cut; values are padded with NONE to whole TOKENS. A token can only win
// if its word is small enough, since -log(-log(1 - u)) <= -log(u): nearly all are ruled out without a logarithm.
inline int64_t race(const float* values, int64_t padded, float best, float cut, const Draw& draw) {
  const float sharpness = float(draw.sharpness);
  double score = -std::numeric_limits<double>::infinity(), least = double(best * sharpness) + LEAST_NOISE;
  int64_t token = 0;
  uint32_t words[TOKENS];
  for (int64_t at = 0; at < padded; at += TOKENS) {
    ri some = {};
    for (int i = 0; i < TOKENS; i += WIDTH) some |= load<rf>(values + at + i) >= cut;
    if (!any(some)) continue;
    philox(uint32_t(at / 4), uint32_t(draw.generated), draw.seed, words);
    for (int i = 0; i < TOKENS; i += WIDTH) {
      const float below = float(least) - 1e-3f - 1e-6f * std::fabs(float(least));  // for what float32 rounds
      rf x = (load<rf>(values + at + i) * sharpness - below) * 1.44269504f;
      x = x < -126.0f ? all(-126.0f) : x > 1.0f ? all(1.0f) : x;
      const rf bound = as<rf>(__builtin_convertvector((x + 127.0f) * 8388608.0f, ri));  // at least 2^x
      const rf u = __builtin_convertvector(load<ru>(words + i), rf) * 0x1p-32f;
      ri may = (u <= bound) & (load<rf>(values + at + i) >= cut);
      if (!any(may)) continue;
      for (int lane = 0; lane < WIDTH; ++lane) {
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

  ri buckets(rf value) const {
    rf distance = (best - value) * float(draw.sharpness) * 32.0f;
    return __builtin_convertvector(distance < float(BUCKETS - 1) ? distance : all(BUCKETS - 1), ri);
  }

  // Keep the tokens before the bucket, and as many of the bucket as `more` takes, the largest first; at least one.
  template <class F> void cut(int wanted, F more) {
    some.clear();
    for (int64_t i = 0; i < size; i += WIDTH) {
      const rf value = load<rf>(values + i);
      const ri here = (buckets(value) == wanted) & (value > NONE);
      if (any(here))
        for (int lane = 0; lane < WIDTH; ++lane)
          if (here[lane]) some.push_back(value[lane]);
    }
    std::sort(some.begin(), some.end(), std::greater<float>());
    int64_t count = 0;
    while (count < int64_t(some.size()) && more(some[count])) ++count;
    count = std::max<int64_t>(count, 1);
    const float last = some[count - 1];
    int64_t equals = some.begin() + count - std::lower_bound(some.begin(), some.end(), last, std::greater<float>());
    for (int64_t i = 0; i < size; i += WIDTH) {
      rf value = load<rf>(values + i);
      if (any(value == last))
        for (int lane = 0; lane < WIDTH; ++lane)
          if (value[lane] == last && equals-- <= 0) value[lane] = NONE;
      store(values + i, value >= last ? value : all(NONE));
    }
  }

  // A value that at least so many are not below: the largest ones of groups tell, if there are so many groups.
  float lower_bound(int64_t count) const {
    constexpr int64_t GROUP = 64 * WIDTH;
    float groups[1024];
    int64_t found = 0;
    for (int64_t i = 0; i + GROUP <= size && found + WIDTH <= 1024; i += GROUP, found += WIDTH) {
      rf top = load<rf>(values + i);
      for (int64_t j = WIDTH; j < GROUP; j += WIDTH) {
        const rf value = load<rf>(values + i + j);
        top = value > top ? value : top;
      }
      store(groups + found, top);
    }
    if (found < count) return NONE;
    std::nth_element(groups, groups + count - 1, groups + found, std::greater<float>());
    return groups[count - 1];
  }

  void top_k() {
    const float bound = lower_bound(draw.top_k), least = std::max(bound, std::numeric_limits<float>::lowest());
    int64_t counts[BUCKETS] = {}, all = 0;
    for (int64_t i = 0; i < size; i += WIDTH) {
      const rf value = load<rf>(values + i);
      if (!any(value >= least)) continue;
      const ri bucket = buckets(value);
      for (int lane = 0; lane < WIDTH; ++lane)
        if (value[lane] >= least) ++counts[bucket[lane]], ++all;
    }
    if (draw.top_k >= all && !(bound > NONE)) return;
    int64_t left = draw.top_k;
    int at = 0;
    while (counts[at] < left) left -= counts[at++];
    cut(at, [&](float) { return left-- > 0; });
  }

  void top_p() {
    if (top_p(NEAR)) top_p(BUCKETS - 1);
  }

  // Of tokens beyond `near` buckets only the sum of masses is taken. Returns whether the cut lies there: nothing is cut then.
  bool top_p(int near) {
    double masses[BUCKETS] = {}, total = 0;
    rd far = {};
    for (int64_t i = 0; i < size; i += WIDTH) {
      const rf value = load<rf>(values + i);
      if (!any(value > NONE)) continue;
      const ri bucket = buckets(value);
      rd mass[2];
      for (int half = 0; half < 2; ++half) {
        const rd some = __builtin_convertvector(load<half_rf>(values + i + half * HALF), rd);
        mass[half] = exponential((some - double(best)) * draw.sharpness);
      }
      if (!any(bucket <= near)) {
        far += mass[0] + mass[1];
        continue;
      }
      for (int lane = 0; lane < WIDTH; ++lane)
        if (value[lane] > NONE) masses[bucket[lane]] += mass[lane / HALF][lane % HALF];
    }
    for (double each : masses) total += each;
    for (int lane = 0; lane < HALF; ++lane) total += far[lane];
    const double wanted = draw.top_p * total;
    double before = 0;
    int at = 0;
    while (at < near && before + masses[at] < wanted) before += masses[at++];
    if (at == near && near < BUCKETS - 1) return true;
    cut(at, [&](float value) {
      const bool more = before < wanted;
      before += std::exp((double(value) - double(best)) * draw.sharpness);
      return more;
    });
    return false;
  }
};

inline float largest(rf top) {
  float best = NONE;
  for (int lane = 0; lane < WIDTH; ++lane) best = std::max(best, top[lane]);
  return best;
}

// Widens a row to values, NONE where it has NaN and behind its end; returns the largest, and whether there was NaN.
template <class T> inline float widen_row(const T* from, int64_t vocab, int64_t padded, float* values, bool& missing) {
  rf top = all(NONE);
  ri nan = {};
  int64_t at = 0;
  for (; at + WIDTH <= vocab; at += WIDTH) {
    rf x = load_part(from + at);
    nan |= x != x;
    x = x == x ? x : all(NONE);
    top = x > top ? x : top;
    store(values + at, x);
  }
  float best = largest(top);
  missing = any(nan);
  for (; at < vocab; ++at) {
    const float x = widen(from[at]);
    missing |= x != x;
    values[at] = x == x ? x : NONE;
    best = std::max(best, values[at]);
  }
  for (; at < padded; ++at) values[at] = NONE;
  return best;
}

// Edits values as a row asks for it, makes NONE of those that a mask does not let pass, and returns the largest.
inline float shape(float* values, int64_t vocab, const Draw& row, const uint16_t* mask) {
  for (int64_t i = 0; i < row.num_seen; ++i) {
    if (row.seen[i] >= vocab) continue;
    float& x = values[row.seen[i]];
    x = x > 0 ? x / float(row.repetition) : x * float(row.repetition);
    x = x - float(row.presence) * float(row.counts[i] > 0) - float(row.frequency) * row.counts[i];
  }
  for (int64_t i = 0; i < row.num_added; ++i)
    if (row.added_to[i] < vocab) values[row.added_to[i]] += row.added[i];
  ri lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = i;
  rf top = all(NONE);
  for (int64_t at = 0; at < vocab; at += WIDTH) {
    rf x = load<rf>(values + at);
    if (mask) {
      const ri passes = (((ri{} + int32_t(mask[at / MASKED])) >> (lane + int32_t(at % MASKED))) & 1) != 0;
      store(values + at, x = passes ? x : all(NONE));
    }
    top = x > top ? x : top;
  }
  return largest(top);
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
    bool missing;
    float best = widen_row(from, vocab, padded, v, missing);
    tops[i] = missing ? std::numeric_limits<float>::quiet_NaN() : best;
    ids[i] = 0;
    if (row.mask >= 0 || row.edited) {
      best = shape(v, vocab, row, row.mask < 0 ? nullptr : masks + row.mask * ((vocab + MASKED - 1) / MASKED));
      if (!(best > NONE)) ids[i] = NO_TOKEN;
    }
    if (!(best > NONE)) return;
    if (!row.sharpness) {
      int64_t at = 0;
      while (!any(load<rf>(v + at) == best)) at += WIDTH;
      ids[i] = std::find(v + at, v + vocab, best) - v;
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

// own[i] and ranks[i] of token ids[i] in row i: its log probability, and 1 + the number of tokens that are more likely; tokens
// and values [count, most] of the most likely ones, of equals the lowest first. All are NaN where the row has NaN or infinity.
template <class T>
void scores(const T* logits, int64_t ld, int64_t vocab, int64_t count, const int64_t* ids, int64_t most, float* own,
            int64_t* ranks, int64_t* tokens, float* values, int64_t threads) {
  each(count, int(threads), [=](int64_t i) {
    thread_local std::vector<float> widened;
    const int64_t padded = (vocab + TOKENS - 1) / TOKENS * TOKENS;
    widened.resize(padded);
    float* v = widened.data();
    bool missing;
    const float best = widen_row(logits + i * ld, vocab, padded, v, missing);
    rd sums = {};
    for (int64_t at = 0; at < padded; at += HALF)
      sums += exponential<8>(__builtin_convertvector(load<half_rf>(v + at), rd) - double(best));
    double sum = 0;
    for (int lane = 0; lane < HALF; ++lane) sum += sums[lane];
    const float rest = missing || !std::isfinite(best) ? std::numeric_limits<float>::quiet_NaN() : float(std::log(sum));
    const float logit = v[ids[i]];
    own[i] = logit - best - rest;
    ri above = {};
    int64_t found = 0, *token = tokens + i * most;
    float *value = values + i * most, least = most ? NONE : std::numeric_limits<float>::infinity();
    for (int64_t at = 0; at < padded; at += WIDTH) {
      const rf x = load<rf>(v + at);
      above -= x > logit;
      if (found == most && !any(x > least)) continue;
      for (int64_t lane = 0; lane < std::min<int64_t>(WIDTH, vocab - at); ++lane) {
        if (found == most && !(x[lane] > least)) continue;
        int64_t to = found < most ? found++ : most - 1;
        for (; to > 0 && x[lane] > value[to - 1]; --to) value[to] = value[to - 1], token[to] = token[to - 1];
        value[to] = x[lane], token[to] = at + lane;
        least = value[found - 1];
      }
    }
    for (int64_t j = 0; j < most; ++j) value[j] = value[j] - best - rest;
    ranks[i] = 1;
    for (int lane = 0; lane < WIDTH; ++lane) ranks[i] += above[lane];
  });
}

}  // namespace
