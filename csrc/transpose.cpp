// A matrix transposed and scaled in one pass: encoders whose latents are columns, and gradients on their way back to them.
#include "ops.h"

#if defined(TRANSCODER_X86)
#include <xmmintrin.h>
#endif

namespace transcoder {
namespace {

// Four rows and columns: to[j * to_stride + i] = from[i * from_stride + j].
template <typename T>
void transpose_four(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}
#if defined(TRANSCODER_X86)
template <>
void transpose_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + from_stride), c = _mm_loadu_ps(from + 2 * from_stride),
         d = _mm_loadu_ps(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
}
#endif

}  // namespace

// W.T with each latent's factor on it: a latent is a column of W [d, latents] and a row of the result, or with `back` a row of W
// [latents, d] and a column of the result. Square blocks go through a buffer in the first-level cache, since lines of a matrix
// whose width is a power of two map to the same cache sets. No sums: bitwise what multiplying the transposed matrix gives.
Tensor transposed(const Tensor& W, const optional<Tensor>& factors, bool back) {
  constexpr int64_t SIDE = 64;
  TORCH_CHECK_VALUE(W.dim() == 2, "transposed: expected a matrix, got ", W.dim(), " dimensions");
  const int64_t rows = W.size(0), columns = W.size(1);
  if (factors) {
    check_shape("factors", *factors, {back ? rows : columns});
    TORCH_CHECK_TYPE(factors->scalar_type() == W.scalar_type(), "transposed: factors: expected ", W.scalar_type(), ", got ",
                     factors->scalar_type());
  }
  Tensor result = empty({columns, rows}, W.scalar_type());
  with_type(W, [&](auto type) {
    using T = decltype(type);
    const T *from = in<T>(W), *factor = factors ? in<T>(*factors) : nullptr;
    T* to = out<T>(result);
    const int64_t across = (rows + SIDE - 1) / SIDE, blocks = across * ((columns + SIDE - 1) / SIDE);
    at::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
      T buffer[SIDE * SIDE];
      for (int64_t block = begin; block < end; ++block) {
        const int64_t row = block % across * SIDE, column = block / across * SIDE;
        const int64_t n = std::min(SIDE, rows - row), m = std::min(SIDE, columns - column);
        const T* corner = from + row * columns + column;
        const int64_t whole_n = n / 4 * 4, whole_m = m / 4 * 4;
        for (int64_t i = 0; i < whole_n; i += 4) {
          for (int64_t j = 0; j < whole_m; j += 4) {
            transpose_four(corner + i * columns + j, columns, buffer + j * SIDE + i, SIDE);
          }
        }
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t j = i < whole_n ? whole_m : 0; j < m; ++j) buffer[j * SIDE + i] = corner[i * columns + j];
        }
        for (int64_t j = 0; j < m; ++j) {
          T* line = to + (column + j) * rows + row;
          const T* turn = buffer + j * SIDE;
          if (!factor) {
            std::copy_n(turn, n, line);
          } else if (back) {
            for (int64_t i = 0; i < n; ++i) line[i] = turn[i] * factor[row + i];
          } else {
            for (int64_t i = 0; i < n; ++i) line[i] = turn[i] * factor[column + j];
          }
        }
      }
    });
  });
  return result;
}

}  // namespace transcoder
