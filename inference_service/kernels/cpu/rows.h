// Element-wise steps between products.
#pragma once
#include "vectors.h"

namespace {

// hidden += delta where there is one; out = hidden / rms(hidden) * (offset + weight). So many rows as there are
// weights [weights][width] lie side by side, and the next ones ld values behind; out may be hidden.
template <class T>
void rms_norm(T* hidden, const T* delta, const T* first, int64_t weights, T* out, int64_t rows, int64_t width,
              int64_t ld, float eps, float offset, int64_t threads) {
  each(rows, rows < 16 ? 1 : int(threads), [=](int64_t row) {
    const T* weight = first + row % weights * width;
    const int64_t at = row / weights * ld + row % weights * width;
    T* h = hidden + at;
    T* to = out + at;
    vf squares = {};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      vf x = load16(h + i);
      if (delta) { store16(h + i, x + load16(delta + at + i)); x = load16(h + i); }
      squares = multiply_add(squares, x, x);
    }
    for (; i < width; ++i) {
      if (delta) narrow(h[i], widen(h[i]) + widen(delta[at + i]));
      rest += widen(h[i]) * widen(h[i]);
    }
    const float scale = 1.0f / std::sqrt((sum(squares) + rest) / width + eps);
    for (i = 0; i + LANES <= width; i += LANES)
      store16(to + i, load16(h + i) * scale * (load16(weight + i) + offset));
    for (; i < width; ++i) narrow(to[i], widen(h[i]) * scale * (widen(weight[i]) + offset));
  });
}

// out[row] = act(gate) * up for in[row] = gate then up, each of width columns; act(x) = x * sigmoid(a(x)), with
// a(x) = x for SiLU, and for GELU by tanh sqrt(8 / pi) * (x + 0.044715 x^3).
template <class T, bool GELU> void gated(const T* in, T* out, int64_t rows, int64_t width, int64_t threads) {
  each(rows, rows < 8 ? 1 : int(threads), [=](int64_t row) {
    const T *gate = in + row * 2 * width, *up = gate + width;
    T* to = out + row * width;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      vf g = load16(gate + i);
      vf a = GELU ? (g + g * g * g * 0.044715f) * 1.5957691216f : g;
      T rounded[LANES];
      store16(rounded, g * sigmoid16(a));
      store16(to + i, load16(rounded) * load16(up + i));
    }
    for (; i < width; ++i) {
      T rounded;
      const float g = widen(gate[i]), a = GELU ? (g + g * g * g * 0.044715f) * 1.5957691216f : g;
      narrow(rounded, g / (1.0f + std::exp(-a)));
      narrow(to[i], widen(rounded) * widen(up[i]));
    }
  });
}

}  // namespace
