// Weighted sums and dot products over compressed lists of rows. Each output row has one owner and one order of additions,
// so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstring>

namespace transcoder {
namespace {

// Vectors of 64 bytes; the compiler splits them where registers are narrower. BLOCK of them stay in registers.
template <typename T>
struct Vector {
  typedef T Type __attribute__((vector_size(64)));
  static constexpr int64_t LANES = 64 / sizeof(T);
};
#if defined(__AVX512F__)
constexpr int BLOCK = 16;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int BLOCK = 4;
#else
constexpr int BLOCK = 2;
#endif

template <typename T>
inline typename Vector<T>::Type load(const T* p) {
  typename Vector<T>::Type v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(T* p, typename Vector<T>::Type v) {
  memcpy(p, &v, sizeof v);
}
template <typename T>
inline T sum_of(typename Vector<T>::Type v) {
  T lanes[Vector<T>::LANES];
  memcpy(lanes, &v, sizeof v);
  for (int64_t half = Vector<T>::LANES / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The entries of one sum.
template <typename T>
struct List {
  const int64_t* ids;
  const int64_t* order;
  const T* weights;
  int64_t first, last;
  T weight(int64_t j) const { return weights[order ? order[j] : j]; }
};

// out[0 .. WIDTH vectors) = start + sum of the list's rows of `table`, both already moved to the first column.
template <typename T, int WIDTH>
inline void sum_columns(const List<T>& list, const T* table, int64_t d, const T* start, T* out) {
  constexpr int64_t L = Vector<T>::LANES;
  typename Vector<T>::Type sum[WIDTH];
  for (int i = 0; i < WIDTH; ++i) {
    if (start) {
      sum[i] = load<T>(start + i * L);
    } else {
      sum[i] = typename Vector<T>::Type{};
    }
  }
  for (int64_t j = list.first; j < list.last; ++j) {
    const T* row = table + list.ids[j] * d;
    if (j + 1 < list.last) {
      const T* next = table + list.ids[j + 1] * d;
      for (int i = 0; i < WIDTH; ++i) __builtin_prefetch(next + i * L);
    }
    const T w = list.weight(j);
    for (int i = 0; i < WIDTH; ++i) sum[i] += w * load<T>(row + i * L);
  }
  for (int i = 0; i < WIDTH; ++i) store<T>(out + i * L, sum[i]);
}

template <typename T>
inline void sum_row(const List<T>& list, const T* table, int64_t d, const T* start, T* out) {
  constexpr int64_t L = Vector<T>::LANES;
  int64_t c = 0;
  const auto from = [&](int64_t column) { return start ? start + column : nullptr; };
  for (; c + BLOCK * L <= d; c += BLOCK * L) sum_columns<T, BLOCK>(list, table + c, d, from(c), out + c);
  for (; BLOCK > 4 && c + 4 * L <= d; c += 4 * L) sum_columns<T, 4>(list, table + c, d, from(c), out + c);
  for (; c + L <= d; c += L) sum_columns<T, 1>(list, table + c, d, from(c), out + c);
  for (; c < d; ++c) {
    T sum = start ? start[c] : T(0);
    for (int64_t j = list.first; j < list.last; ++j) sum += list.weight(j) * table[list.ids[j] * d + c];
    out[c] = sum;
  }
}

template <typename T>
inline T dot(const T* a, const T* b, int64_t d) {
  constexpr int64_t L = Vector<T>::LANES;
  typename Vector<T>::Type sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) {
    for (int i = 0; i < 4; ++i) sum[i] += load<T>(a + c + i * L) * load<T>(b + c + i * L);
  }
  for (; c + L <= d; c += L) sum[0] += load<T>(a + c) * load<T>(b + c);
  T rest = 0;
  for (; c < d; ++c) rest += a[c] * b[c];
  return sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

// Returns <a, row> and takes w * row from r, reading the row once.
template <typename T>
inline T dot_and_subtract(const T* a, const T* row, T w, T* r, int64_t d) {
  constexpr int64_t L = Vector<T>::LANES;
  typename Vector<T>::Type sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) {
    for (int i = 0; i < 4; ++i) {
      const typename Vector<T>::Type v = load<T>(row + c + i * L);
      sum[i] += load<T>(a + c + i * L) * v;
      store<T>(r + c + i * L, load<T>(r + c + i * L) - w * v);
    }
  }
  for (; c + L <= d; c += L) {
    const typename Vector<T>::Type v = load<T>(row + c);
    sum[0] += load<T>(a + c) * v;
    store<T>(r + c, load<T>(r + c) - w * v);
  }
  T rest = 0;
  for (; c < d; ++c) {
    rest += a[c] * row[c];
    r[c] -= w * row[c];
  }
  return sum_of<T>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

template <typename T>
inline void prefetch_row(const T* row, int64_t d) {
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
  for (int64_t b = 0; b < bytes && b < 2048; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(row) + b);
}

template <typename T>
void rows_sum(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const int64_t* order,
              const T* weights, const T* table, int64_t d, const T* start, T* out, T* totals) {
  for (int64_t m = first; m < last; ++m) {
    const List<T> list = {ids, order, weights, ptr[m], ptr[m + 1]};
    if (out) sum_row<T>(list, table, d, start, out + m * d);
    if (totals) {
      T total = 0;
      for (int64_t j = list.first; j < list.last; ++j) total += list.weight(j);
      totals[m] = total;
    }
  }
}

template <typename T>
void rows_dot(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* left, const T* table,
              int64_t d, T* out) {
  for (int64_t m = first; m < last; ++m) {
    for (int64_t j = ptr[m]; j < ptr[m + 1]; ++j) {
      if (j + 1 < ptr[m + 1]) prefetch_row<T>(table + ids[j + 1] * d, d);
      out[j] = dot<T>(left + m * d, table + ids[j] * d, d);
    }
  }
}

template <typename T>
void prefixes_up(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* values,
                 int64_t prefixes, const int64_t* widths, const T* W, const T* b, const T* y, int64_t d, T* residual,
                 double* errors) {
  for (int64_t m = first; m < last; ++m) {
    T* r = residual + m * d;
    for (int64_t c = 0; c < d; ++c) r[c] = b[c] - y[m * d + c];
    int64_t j = ptr[m];
    for (int64_t p = 0; p < prefixes; ++p) {
      int64_t end = j;
      while (end < ptr[m + 1] && ids[end] < widths[p]) ++end;
      if (end > j) sum_row<T>({ids, nullptr, values, j, end}, W, d, r, r);
      errors[m * prefixes + p] = static_cast<double>(dot<T>(r, r, d));
      j = end;
    }
  }
}

template <typename T>
void prefixes_down(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* values, int64_t low,
                   const T* W, int64_t d, T scale, const T* token_weights, bool fresh, const T* source, T* residual,
                   T* running, int64_t* cursor, T* grad_values) {
  for (int64_t m = first; m < last; ++m) {
    const T* from = source + m * d;
    T* run = running + m * d;
    const T s = token_weights ? scale * token_weights[m] : scale;
    if (fresh) {
      for (int64_t c = 0; c < d; ++c) run[c] = s * from[c];
    } else {
      for (int64_t c = 0; c < d; ++c) run[c] += s * from[c];
    }
    T* r = residual ? residual + m * d : nullptr;
    if (r && r != from) memcpy(r, from, static_cast<size_t>(d) * sizeof(T));
    int64_t j = cursor[m];
    for (; j > ptr[m] && ids[j - 1] >= low; --j) {
      const T* row = W + ids[j - 1] * d;
      if (j - 1 > ptr[m]) prefetch_row<T>(W + ids[j - 2] * d, d);
      grad_values[j - 1] = r ? dot_and_subtract<T>(run, row, values[j - 1], r, d) : dot<T>(run, row, d);
    }
    cursor[m] = j;
  }
}

}  // namespace
}  // namespace transcoder
