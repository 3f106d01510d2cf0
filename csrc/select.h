// Exact selection: a gate on the tile in the cache, lists of candidates, and the k-th largest by bisection over the bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace transcoder {
namespace {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t __attribute__((may_alias)) Int;
  static constexpr Int NOT_A_NUMBER = 0x7fc00000;
};
template <>
struct Bits<double> {
  typedef int64_t __attribute__((may_alias)) Int;
  static constexpr Int NOT_A_NUMBER = 0x7ff8000000000000;
};

constexpr int64_t CHUNK = 64;

template <typename T>
inline T canonical(T v) {
  if (v == v) return v;
  const typename Bits<T>::Int bits = Bits<T>::NOT_A_NUMBER;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Appends the entries of up to CHUNK columns that pass. PER_COLUMN: above limits[j], a NaN fails; else above `gate`, a NaN
// passes. Positive entries and the canonical NaN compare as integers exactly as they compare as numbers.
template <typename T, bool PER_COLUMN>
inline int64_t append(const T* t, const T* bias, int64_t columns, int64_t id, T gate, const T* limits, T* values,
                      int32_t* ids, int64_t n) {
  for (int64_t j = 0; j < columns; ++j) {
    const T v = t[j] + bias[j];
    values[n] = canonical(v);
    ids[n] = static_cast<int32_t>(id + j);
    n += PER_COLUMN ? v > limits[j] : !(v <= gate);
  }
  return n;
}

template <typename T, bool PER_COLUMN>
inline bool any_passes(const T* t, const T* bias, T gate, const T* limits) {
  int found = 0;
  for (int64_t j = 0; j < CHUNK; ++j) {
    const T v = t[j] + bias[j];
    found |= PER_COLUMN ? v > limits[j] : !(v <= gate);
  }
  return found != 0;
}

template <typename T, bool PER_COLUMN>
inline int64_t append_chunk(const T* t, const T* bias, int64_t id, T gate, const T* limits, T* values, int32_t* ids,
                            int64_t n) {
  if (!any_passes<T, PER_COLUMN>(t, bias, gate, limits)) return n;
  return append<T, PER_COLUMN>(t, bias, CHUNK, id, gate, limits, values, ids, n);
}

#if defined(__AVX512F__)
template <bool PER_COLUMN>
inline int64_t append_chunk_512(const float* t, const float* bias, int64_t id, float gate, const float* limits,
                                float* values, int32_t* ids, int64_t n) {
  const __m512 bound = _mm512_set1_ps(gate);
  __m512 v[4];
  __mmask16 pass[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_add_ps(_mm512_loadu_ps(t + 16 * i), _mm512_loadu_ps(bias + 16 * i));
    pass[i] = PER_COLUMN ? _mm512_cmp_ps_mask(v[i], _mm512_loadu_ps(limits + 16 * i), _CMP_GT_OQ)
                         : _mm512_cmp_ps_mask(v[i], bound, _CMP_NLE_UQ);
  }
  if (!(pass[0] | pass[1] | pass[2] | pass[3])) return n;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(Bits<float>::NOT_A_NUMBER));
  for (int i = 0; i < 4; ++i) {
    const __m512 clean = _mm512_mask_mov_ps(v[i], _mm512_cmp_ps_mask(v[i], v[i], _CMP_UNORD_Q), nan);
    const __m512i id_of = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(id + 16 * i)));
    _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(pass[i], clean));
    _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(pass[i], id_of));
    n += __builtin_popcount(pass[i]);
  }
  return n;
}
template <>
inline int64_t append_chunk<float, false>(const float* t, const float* bias, int64_t id, float gate,
                                          const float* limits, float* values, int32_t* ids, int64_t n) {
  return append_chunk_512<false>(t, bias, id, gate, limits, values, ids, n);
}
template <>
inline int64_t append_chunk<float, true>(const float* t, const float* bias, int64_t id, float gate,
                                         const float* limits, float* values, int32_t* ids, int64_t n) {
  return append_chunk_512<true>(t, bias, id, gate, limits, values, ids, n);
}
#endif

template <typename Int>
inline int64_t count_at_least(const Int* keys, int64_t count, Int bound) {
  int64_t found = 0;
  constexpr int64_t PART = 1 << 20;  // 32-bit tallies vectorise better
  for (int64_t a = 0; a < count; a += PART) {
    const int64_t b = a + PART < count ? a + PART : count;
    int32_t part = 0;
    for (int64_t i = a; i < b; ++i) part += keys[i] >= bound;
    found += part;
  }
  return found;
}

template <typename T>
T keep_top(T* values, int32_t* ids, int32_t* rows, int64_t count, int64_t k) {
  using Int = typename Bits<T>::Int;
  const Int* keys = reinterpret_cast<const Int*>(values);
  Int low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  ++high;
  // Invariant: `reach` >= k keys are at least `low`, fewer than k are at least `high`.
  int64_t reach = count;
  while (reach != k && high - low > 1) {
    const Int middle = low + (high - low) / 2;
    const int64_t found = count_at_least<Int>(keys, count, middle);
    if (found >= k) {
      low = middle;
      reach = found;
    } else {
      high = middle;
    }
  }
  // Either exactly k keys reach `low`, or `low` is the k-th value itself, and tied: the earliest of the tied have room.
  int64_t room = reach == k ? k : k - count_at_least<Int>(keys, count, low + 1);
  const bool tied = reach != k;
  int64_t n = 0;
  Int smallest = high;
  for (int64_t i = 0; i < count; ++i) {
    const Int key = keys[i];
    const bool equal = tied && key == low;
    const bool keep = equal ? room > 0 : key >= low;
    room -= equal;
    smallest = keep && key < smallest ? key : smallest;
    values[n] = values[i];
    ids[n] = ids[i];
    if (rows) rows[n] = rows[i];
    n += keep;
  }
  T gate;
  memcpy(&gate, &smallest, sizeof gate);
  return gate == gate ? gate : static_cast<T>(__builtin_inf());
}

template <typename T>
void filter_top(const T* tile, int64_t rows, int64_t columns, const T* bias, int64_t first_id, int64_t k,
                int64_t limit, int64_t room, T* values, int32_t* ids, int64_t* count, T* gate) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* t = tile + r * columns;
    T* own_values = values + r * room;
    int32_t* own_ids = ids + r * room;
    int64_t n = count[r];
    T bound = gate[r];
    for (int64_t j = 0; j < columns; j += CHUNK) {
      n = columns - j >= CHUNK
              ? append_chunk<T, false>(t + j, bias + j, first_id + j, bound, nullptr, own_values, own_ids, n)
              : append<T, false>(t + j, bias + j, columns - j, first_id + j, bound, nullptr, own_values, own_ids, n);
      if (n >= limit) {
        // Later entries have higher ids, so they lose every tie with this gate: strictly above it is right.
        bound = keep_top<T>(own_values, own_ids, nullptr, n, k);
        n = k;
      }
    }
    count[r] = n;
    gate[r] = bound;
  }
}

template <typename T>
int64_t filter_above(const T* tile, int64_t rows, int64_t columns, const T* bias, int64_t first_id, T gate,
                     const T* limits, T* values, int32_t* ids, int32_t* passed) {
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* t = tile + r * columns;
    const int64_t before = n;
    for (int64_t j = 0; j < columns; j += CHUNK) {
      const int64_t width = columns - j < CHUNK ? columns - j : CHUNK;
      if (limits) {
        n = width == CHUNK
                ? append_chunk<T, true>(t + j, bias + j, first_id + j, gate, limits + j, values, ids, n)
                : append<T, true>(t + j, bias + j, width, first_id + j, gate, limits + j, values, ids, n);
      } else {
        n = width == CHUNK
                ? append_chunk<T, false>(t + j, bias + j, first_id + j, gate, nullptr, values, ids, n)
                : append<T, false>(t + j, bias + j, width, first_id + j, gate, nullptr, values, ids, n);
      }
    }
    passed[r] = static_cast<int32_t>(n - before);
  }
  return n;
}

}  // namespace
}  // namespace transcoder
