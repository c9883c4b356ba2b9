// Element-wise steps between products.
#pragma once
#include "vectors.h"

namespace {

// hidden += delta where there is one; out = hidden / rms(hidden) * (offset + weight), plus biases where there are some. CENTRED:
// of hidden without its mean. So many rows as there are weights [weights][width] lie side by side, and the next ones ld values
// behind; out may be hidden.
template <class T, bool CENTRED>
void norm(T* hidden, const T* delta, const T* first, const T* biases, int64_t weights, T* out, int64_t rows, int64_t width,
          int64_t ld, float eps, float offset, int64_t threads) {
  each(rows, rows < 16 ? 1 : int(threads), [=](int64_t row) {
    const T* weight = first + row % weights * width;
    const int64_t at = row / weights * ld + row % weights * width;
    T* h = hidden + at;
    T* to = out + at;
    vf sums = {};
    float rest = 0, mean = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      vf x = load16(h + i);
      if (delta) { store16(h + i, x + load16(delta + at + i)); x = load16(h + i); }
      sums = CENTRED ? sums + x : multiply_add(sums, x, x);
    }
    for (; i < width; ++i) {
      if (delta) narrow(h[i], widen(h[i]) + widen(delta[at + i]));
      rest += CENTRED ? widen(h[i]) : widen(h[i]) * widen(h[i]);
    }
    if (CENTRED) {
      mean = (sum(sums) + rest) / width, sums = vf{}, rest = 0;
      for (i = 0; i + LANES <= width; i += LANES) {
        const vf x = load16(h + i) - mean;
        sums = multiply_add(sums, x, x);
      }
      for (; i < width; ++i) rest += (widen(h[i]) - mean) * (widen(h[i]) - mean);
    }
    const float scale = 1.0f / std::sqrt((sum(sums) + rest) / width + eps);
    for (i = 0; i + LANES <= width; i += LANES) {
      const vf x = (load16(h + i) - mean) * scale * (load16(weight + i) + offset);
      store16(to + i, biases ? x + load16(biases + i) : x);
    }
    for (; i < width; ++i) {
      const float x = (widen(h[i]) - mean) * scale * (widen(weight[i]) + offset);
      narrow(to[i], biases ? x + widen(biases[i]) : x);
    }
  });
}

// to = (to + x) * scale, without x where there is none.
template <class T> void add(T* to, const T* x, int64_t rows, int64_t width, float scale, int64_t threads) {
  each(rows, rows < 16 ? 1 : int(threads), [=](int64_t row) {
    T* own = to + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES)
      store16(own + i, (x ? load16(own + i) + load16(x + row * width + i) : load16(own + i)) * scale);
    for (; i < width; ++i) narrow(own[i], (widen(own[i]) + (x ? widen(x[row * width + i]) : 0)) * scale);
  });
}

// Activations: x times a part between 0 and 1.
struct Silu {
  static inline vf of(vf x) { return x * sigmoid16(x); }
};
struct GeluTanh {
  static inline vf of(vf x) { return x * sigmoid16((x + x * x * x * 0.044715f) * 1.5957691216f); }  // sqrt(8 / pi)
};
struct Gelu {  // x times the part of a normal distribution below x: Abramowitz and Stegun 7.1.26, error below 1e-7
  static inline vf of(vf x) {
    const vf t = 1.0f / (floats(bits(x) & 0x7fffffffu) * 0.23164190f + 1.0f);
    vf p = splat(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = multiply_add(splat(c), p, t);
    const vf beyond = p * t * exp16(x * x * -0.5f) * 0.5f;  // |x|
    return x * by_register([](rf part, rf beyond) { return part < 0 ? beyond : 1.0f - beyond; }, x, beyond);
  }
};

// out[row] = act(x) of in[row] = x, and times up where that is x then up (gated 1), each of width columns.
template <class T, class A>
void activate(const T* in, T* out, int64_t rows, int64_t width, int64_t gated, int64_t threads) {
  const auto some = [gated](const T* x, const T* up, T* to) {
    store16(to, A::of(load16(x)));
    if (gated) store16(to, load16(to) * load16(up));
  };
  each(rows, rows < 8 ? 1 : int(threads), [=](int64_t row) {
    const T* x = in + row * (1 + gated) * width;
    T* to = out + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) some(x + i, x + width + i, to + i);
    if (i == width) return;
    T last[2][LANES] = {};
    for (int64_t part = 0; part <= gated; ++part) std::memcpy(last[part], x + part * width + i, (width - i) * sizeof(T));
    some(last[0], last[1], last[0]);
    std::memcpy(to + i, last[0], (width - i) * sizeof(T));
  });
}

}  // namespace
