// The optimizer step: gradient norms, and Adam in one sweep over each parameter; rows of unit length stay so.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "reduce.h"

namespace transcoder {
namespace {

inline float root(float v) { return __builtin_sqrtf(v); }
inline double root(double v) { return __builtin_sqrt(v); }

// Sum of squares of 0-based runs of 1024: short enough for fp32, the runs are added in fp64.
template <typename T, typename Value>
inline double squares_of(int64_t n, const Value& value) {
  constexpr int64_t RUN = 1024, L = Vector<T>::LANES;
  double sum = 0;
  for (int64_t from = 0; from < n; from += RUN) {
    const int64_t to = n - from < RUN ? n : from + RUN;
    typename Vector<T>::Type lanes[4] = {};
    int64_t i = from;
    for (; i + 4 * L <= to; i += 4 * L) {
      for (int j = 0; j < 4; ++j) {
        const typename Vector<T>::Type v = value.vector(i + j * L);
        lanes[j] += v * v;
      }
    }
    T rest = 0;
    for (; i < to; ++i) rest += value.one(i) * value.one(i);
    sum += static_cast<double>(sum_of<T>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest);
  }
  return sum;
}

template <typename T>
struct Plain {
  const T* g;
  typename Vector<T>::Type vector(int64_t i) const { return load<T>(g + i); }
  T one(int64_t i) const { return g[i]; }
};
// The gradient minus its component along a row.
template <typename T>
struct Tangent {
  const T *g, *w;
  T along;
  typename Vector<T>::Type vector(int64_t i) const { return load<T>(g + i) - along * load<T>(w + i); }
  T one(int64_t i) const { return g[i] - along * w[i]; }
};

template <typename T>
double squares(const T* g, int64_t n) {
  return squares_of<T>(n, Plain<T>{g});
}

template <typename T>
double tangent_squares(int64_t first, int64_t last, int64_t d, const T* g, const T* w, T* along) {
  double sum = 0;
  for (int64_t m = first; m < last; ++m) {
    along[m] = dot<T>(g + m * d, w + m * d, d);
    sum += squares_of<T>(d, Tangent<T>{g + m * d, w + m * d, along[m]});
  }
  return sum;
}

// One element; the compiler makes vectors of it.
template <typename T>
inline T adam_one(const Adam<T>& by, T g, T p, T* m, T* v) {
  *m += by.first * (g - *m);
  *v = by.keep * *v + by.second * g * g;
  return p - by.step * *m / (root(*v) * by.scale + by.eps);
}

template <typename T>
void adam(int64_t n, const Adam<T>& by, const T* __restrict g, T* __restrict p, T* __restrict m, T* __restrict v) {
  for (int64_t i = 0; i < n; ++i) p[i] = adam_one<T>(by, by.clip * g[i], p[i], m + i, v + i);
}

template <typename T>
void adam_rows(int64_t first, int64_t last, int64_t d, const Adam<T>& by, const T* along, const T* __restrict g,
               T* __restrict p, T* __restrict m, T* __restrict v) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t at = row * d;
    const T parallel = along[row];
    for (int64_t i = at; i < at + d; ++i) {
      p[i] = adam_one<T>(by, by.clip * (g[i] - parallel * p[i]), p[i], m + i, v + i);
    }
    // A zero row has no direction: it stays zero.
    const T length = root(dot<T>(p + at, p + at, d));
    const T factor = 1 / (length < by.tiny ? by.tiny : length);
    for (int64_t i = at; i < at + d; ++i) p[i] *= factor;
  }
}

}  // namespace
}  // namespace transcoder
