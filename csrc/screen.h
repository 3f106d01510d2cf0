// Screening: which entries of a tile of bf16 products may belong to the k largest of the exact ones.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "reduce.h"
#include "select.h"

namespace transcoder {
namespace {

// bf16 is the upper half of fp32.
inline Vector<float>::Type widened(const uint16_t* p) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  typedef uint32_t Whole __attribute__((vector_size(64)));
  Half half;
  memcpy(&half, p, sizeof half);
  const Whole whole = __builtin_convertvector(half, Whole) << 16;
  Vector<float>::Type v;
  memcpy(&v, &whole, sizeof v);
  return v;
}
inline float widened_one(uint16_t half) {
  const uint32_t whole = static_cast<uint32_t>(half) << 16;
  float v;
  memcpy(&v, &whole, sizeof v);
  return v;
}

// The k-th largest of n >= k values; they are copied, the list stays in order.
template <typename T>
inline T kth_largest(const T* values, int64_t n, int64_t k, T* spare) {
  using Int = typename Bits<T>::Int;
  // Integer keys in the order of the floats: the bits of negative numbers are flipped.
  Int* keys = reinterpret_cast<Int*>(spare);
  constexpr Int LARGEST = static_cast<Int>(~(static_cast<Int>(1) << (8 * sizeof(Int) - 1)));
  memcpy(spare, values, static_cast<size_t>(n) * sizeof(T));
  Int low = LARGEST, high = -LARGEST;
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = keys[i] < 0 ? keys[i] ^ LARGEST : keys[i];
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  // At least k keys reach `low`.
  while (low < high) {
    const Int middle = low + static_cast<Int>((static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1) / 2);
    if (count_at_least<Int>(keys, n, middle) >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Int found = low < 0 ? low ^ LARGEST : low;
  T value;
  memcpy(&value, &found, sizeof value);
  return value;
}

inline void filter_near(const uint16_t* tile, int64_t rows, int64_t columns, const float* bias, int64_t first_id, int64_t k,
                        int64_t limit, int64_t room, const float* twice, float relative, float* values, int32_t* ids,
                        int64_t* count, float* gate, float* spare) {
  for (int64_t r = 0; r < rows; ++r) {
    int64_t n = count[r];
    const uint16_t* t = tile + r * columns;
    float* own_values = values + r * room;
    int32_t* own_ids = ids + r * room;
    float bound = gate[r];
    for (int64_t j = 0; j < columns && n >= 0; j += CHUNK) {
      const int64_t width = columns - j < CHUNK ? columns - j : CHUNK;
      float v[CHUNK];
      if (width == CHUNK) {
        for (int64_t i = 0; i < CHUNK; i += Vector<float>::LANES) store<float>(v + i, widened(t + j + i));
        n = append_chunk<float, false>(v, bias + j, first_id + j, bound, nullptr, own_values, own_ids, n);
      } else {
        for (int64_t i = 0; i < width; ++i) v[i] = widened_one(t[j + i]);
        n = append<float, false>(v, bias + j, width, first_id + j, bound, nullptr, own_values, own_ids, n);
      }
      if (n < limit) continue;
      const float m = kth_largest<float>(own_values, n, k, spare), raised = m - twice[r] - relative * (m < 0 ? -m : m);
      bound = raised > bound ? raised : bound;
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        own_values[kept] = own_values[i];
        own_ids[kept] = own_ids[i];
        kept += !(own_values[kept] < bound);
      }
      n = kept < limit ? kept : -1;
    }
    count[r] = n;
    gate[r] = bound;
  }
}

inline void rounded_norms(const float* x, const uint16_t* rounded, int64_t n, double* kept, double* lost) {
  constexpr int64_t L = Vector<float>::LANES;
  Vector<float>::Type of_kept = {}, of_lost = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vector<float>::Type near = widened(rounded + i), off = load<float>(x + i) - near;
    of_kept += near * near;
    of_lost += off * off;
  }
  float rest_kept = 0, rest_lost = 0;
  for (; i < n; ++i) {
    const float near = widened_one(rounded[i]), off = x[i] - near;
    rest_kept += near * near;
    rest_lost += off * off;
  }
  *kept = __builtin_sqrt(static_cast<double>(sum_of<float>(of_kept) + rest_kept));
  *lost = __builtin_sqrt(static_cast<double>(sum_of<float>(of_lost) + rest_lost));
}

constexpr Screen screen = {filter_near, rounded_norms};

}  // namespace
}  // namespace transcoder
