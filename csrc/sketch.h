// The sketch's inner loop: weights of random sign added to rows of fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "reduce.h"

namespace transcoder {
namespace {

// Columns [c, c + WIDTH vectors) of add_signed; c is a multiple of 16, so that a vector's signs are one half of a word.
template <int WIDTH>
inline void add_signed_columns(const Signed* entries, int64_t count, const uint32_t* words, int64_t words_a_token, int64_t c,
                               float* to) {
  typedef uint32_t Whole __attribute__((vector_size(64)));
  constexpr int64_t L = Vector<float>::LANES;
  const Whole lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Vector<float>::Type sum[WIDTH];
  for (int v = 0; v < WIDTH; ++v) sum[v] = load<float>(to + c + v * L);
  for (int64_t j = 0; j < count; ++j) {
    const uint32_t* own = words + entries[j].token * words_a_token;
    uint32_t weight;
    memcpy(&weight, &entries[j].weight, sizeof weight);
    for (int v = 0; v < WIDTH; ++v) {
      const uint32_t minus = ~own[(c + v * L) / 32] >> ((c + v * L) % 32);
      const Whole bits = (((Whole{} + minus) >> lane) << 31) ^ weight;
      Vector<float>::Type turned;
      memcpy(&turned, &bits, sizeof turned);
      sum[v] += turned;
    }
  }
  for (int v = 0; v < WIDTH; ++v) store<float>(to + c + v * L, sum[v]);
}

inline void add_signed(const Signed* entries, int64_t count, const uint32_t* words, int64_t words_a_token, int64_t columns,
                       float* to) {
  constexpr int64_t L = Vector<float>::LANES;
  constexpr int WIDTH = BLOCK < 8 ? BLOCK : 8;
  int64_t c = 0;
  for (; c + WIDTH * L <= columns; c += WIDTH * L) add_signed_columns<WIDTH>(entries, count, words, words_a_token, c, to);
  for (; c + L <= columns; c += L) add_signed_columns<1>(entries, count, words, words_a_token, c, to);
  for (; c < columns; ++c) {
    float sum = to[c];
    for (int64_t j = 0; j < count; ++j) {
      const uint32_t word = words[entries[j].token * words_a_token + c / 32];
      sum += word >> (c % 32) & 1 ? entries[j].weight : -entries[j].weight;
    }
    to[c] = sum;
  }
}

constexpr Sketching sketching = {add_signed};

}  // namespace
}  // namespace transcoder
