// The table of vectorised loops. kernels.cpp fills it once for each instruction set; common.h picks one when it is loaded.
#pragma once

#include <cstdint>

namespace transcoder {

// Survivors of one row: values (positive, or the canonical NaN) and latent ids, in ascending order of id.
// Lists must have room for SLACK entries beyond their limit: survivors are stored a vector at a time.
constexpr int64_t SLACK = 96;

// What one Adam update needs: g is clipped by `clip`; m += first (g - m); v = keep v + second g g;
// p -= step m / (scale sqrt(v) + eps). `tiny` is the smallest length that a row is divided by.
template <typename T>
struct Adam {
  T clip, first, keep, second, step, scale, eps, tiny;
};

template <typename T>
struct Kernels {
  // Appends the entries of a tile of pre-activations (tile + bias) that may belong to the k largest of their row.
  // Row r: list values + r * room, ids + r * room, of count[r] entries; gate[r] is a lower bound of its final k-th value.
  // A list that reaches `limit` is cut to its k largest, which raises the gate. Ties go to the lowest id.
  void (*filter_top)(const T* tile, int64_t rows, int64_t columns, const T* bias, int64_t first_id, int64_t k,
                     int64_t limit, int64_t room, T* values, int32_t* ids, int64_t* count, T* gate);

  // Writes the entries above `gate` (a NaN passes), or above limits[column] where that is given (a NaN fails).
  // passed[r] is the number found in row r. Returns the total.
  int64_t (*filter_above)(const T* tile, int64_t rows, int64_t columns, const T* bias, int64_t first_id, T gate,
                          const T* limits, T* values, int32_t* ids, int32_t* passed);

  // Cuts a list to its k largest in place, in order, ties to the earliest; count >= k. Returns the smallest kept, with
  // infinity for a NaN. `rows` is an optional companion that moves along.
  T (*keep_top)(T* values, int32_t* ids, int32_t* rows, int64_t count, int64_t k);

  // out[m] = start + sum over j in ptr[m] .. ptr[m + 1] of w_j * table[ids[j]], w_j = weights[order ? order[j] : j], for
  // m in [first, last); totals[m] = sum of w_j where asked for. `start` [d] may be null.
  void (*rows_sum)(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const int64_t* order,
                   const T* weights, const T* table, int64_t d, const T* start, T* out, T* totals);

  // out[j] = <left[m], table[ids[j]]> for the j of the rows m in [first, last).
  void (*rows_dot)(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* left, const T* table,
                   int64_t d, T* out);

  // Walks the prefixes of rows [first, last) up: residual = b - y, then each group added; errors[row * prefixes + p] is the
  // squared norm at the end of group p.
  void (*prefixes_up)(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* values,
                      int64_t prefixes, const int64_t* widths, const T* W, const T* b, const T* y, int64_t d,
                      T* residual, double* errors);

  // One group [low, ...) of latents, walking down, for rows [first, last). cursor[row] is the end of the group's entries
  // and becomes their start. running += scale * token_weight * source; grad_values = <running, W[id]>; where `residual`
  // is given it becomes source less the group's own part (source may be the same memory).
  void (*prefixes_down)(int64_t first, int64_t last, const int64_t* ptr, const int64_t* ids, const T* values,
                        int64_t low, const T* W, int64_t d, T scale, const T* token_weights, bool fresh,
                        const T* source, T* residual, T* running, int64_t* cursor, T* grad_values);

  // Sum of squares of n numbers.
  double (*squares)(const T* g, int64_t n);

  // along[m] = <g[m], w[m]>; returns the sum of squares of g[m] - along[m] * w[m] over rows [first, last) of length d.
  double (*tangent_squares)(int64_t first, int64_t last, int64_t d, const T* g, const T* w, T* along);

  // One Adam update of n numbers.
  void (*adam)(int64_t n, const Adam<T>& by, const T* g, T* p, T* m, T* v);

  // The same of rows [first, last), from g[m] - along[m] * p[m], each row then scaled to unit length.
  void (*adam_rows)(int64_t first, int64_t last, int64_t d, const Adam<T>& by, const T* along, const T* g, T* p, T* m,
                    T* v);
};

// Screening in bf16 (screen.h), fp32 only.
struct Screen {
  // Appends the entries v = tile + bias of a tile of bf16 products with v > gate[r] (a NaN passes), ids ascending. A list that
  // reaches `limit` (above k) is cut: with m its k-th largest value, entries below m - twice[r] - relative * |m| go and the gate
  // rises to that. One that stays as long is given up: count[r] = -1, and stays so. `spare` has room for a list.
  void (*filter_near)(const uint16_t* tile, int64_t rows, int64_t columns, const float* bias, int64_t first_id, int64_t k,
                      int64_t limit, int64_t room, const float* twice, float relative, float* values, int32_t* ids,
                      int64_t* count, float* gate, float* spare);

  // Lengths of a vector rounded to bf16 and of the rounding error.
  void (*rounded_norms)(const float* x, const uint16_t* rounded, int64_t n, double* kept, double* lost);
};

// A weight that a token's signs apply to (sketch.h).
struct Signed {
  float weight;
  int32_t token;
};

struct Sketching {
  // to[c] += weight * sign(token, c) for each of the entries in order; bit c of a token's words is set where its sign is +1.
  void (*add_signed)(const Signed* entries, int64_t count, const uint32_t* words, int64_t words_a_token, int64_t columns,
                     float* to);
};

}  // namespace transcoder
