// The decoder penalty's search: for some rows of a matrix the nearest other row by cosine, if it exceeds a bound.
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include "screened.h"

namespace transcoder {

// (cosine [R], partner [R], length [n]) of rows `own` of W [n, d]: the largest cosine with another row where it exceeds
// `least` (at least 0) and the lowest row that has it; elsewhere 0 and -1. Products in bf16 propose, fp32 dot products decide.
// All three are empty if W is not finite, or too large for an error bound.
tuple<Tensor, Tensor, Tensor> nearest_above(const Tensor& W, const Tensor& own, double least) {
  TORCH_CHECK_VALUE(W.dim() == 2 && W.scalar_type() == at::kFloat, "nearest_above: W: expected fp32 [n, d], got ",
                    W.scalar_type(), " ", W.sizes());
  TORCH_CHECK_VALUE(least >= 0, "nearest_above: least: expected at least 0, got ", least);
  const int64_t n = W.size(0), d = W.size(1), rows = own.numel();
  check_shape("own", own, {rows});
  check_ids(own, n);
  Tensor best = at::zeros({rows}, at::kFloat), partner = empty({rows}, at::kLong), length = empty({n}, at::kFloat);
  std::fill_n(out<int64_t>(partner), rows, -1);
  float* lengths = out<float>(length);
  at::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      lengths[i] = static_cast<float>(std::sqrt(kernels<float>().squares(in<float>(W) + i * d, d)));
    }
  });
  if (rows == 0) return {best, partner, length};
  // A row that is zero up to rounding has no direction.
  constexpr float SHORTEST = std::numeric_limits<float>::min();
  float shortest = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; ++i) shortest = lengths[i] >= SHORTEST ? std::min(shortest, lengths[i]) : shortest;
  const Tensor mine = at::index_select(W, 0, own), no_bias = at::zeros({n}, at::kFloat);
  const Screened screened(mine, W, no_bias);
  const Plan plan(rows, n);
  const int64_t* of = in<int64_t>(own);
  const auto nothing = [] { return at::zeros({0}, at::kFloat); };
  if (!bounds_every(screened, rows)) return {nothing(), nothing(), nothing()};
  std::vector<double> gate(rows);
  for (int64_t r = 0; r < rows; ++r) gate[r] = least * lengths[of[r]] * std::min(shortest, 1e30f);
  auto pools = *proposals(plan, screened, in<float>(no_bias), gate.data(), rows * n);
  struct Exact {
    std::vector<int64_t> ids, ptr;
    std::vector<float> dots;
  };
  // A task's ranges of one block come in ascending order of latents; blocks are disjoint rows.
  for_each_task<Exact>(plan.blocks, [&](int64_t block, Exact& own_memory) {
    for (int64_t task = block * plan.ranges; task < (block + 1) * plan.ranges; ++task) {
      const Pool<float>& pool = pools[task];
      const int64_t first = plan.first_row(task), height = plan.last_row(task) - first;
      own_memory.ids.assign(pool.ids.begin(), pool.ids.end());
      own_memory.ptr = starts_of(pool.rows.data(), pool.count(), height);
      own_memory.dots.resize(pool.count());
      kernels<float>().rows_dot(0, height, own_memory.ptr.data(), own_memory.ids.data(), in<float>(mine) + first * d,
                                in<float>(W), d, own_memory.dots.data());
      for (int64_t i = 0; i < pool.count(); ++i) {
        const int64_t row = first + pool.rows[i], other = pool.ids[i];
        const float lengths_of_both = lengths[of[row]] * lengths[other];
        if (other == of[row] || !(lengths_of_both > 0)) continue;
        const float cosine = own_memory.dots[i] / lengths_of_both;
        if (cosine > static_cast<float>(least) && cosine > out<float>(best)[row]) {
          out<float>(best)[row] = cosine;
          out<int64_t>(partner)[row] = other;
        }
      }
    }
  });
  return {best, partner, length};
}

// [total, d]: zeros but for `values` [n, d] at `rows` [n], each once.
Tensor rows_in_zeros(const Tensor& values, const Tensor& rows, int64_t total) {
  TORCH_CHECK_VALUE(values.dim() == 2, "rows_in_zeros: values: expected [n, d], got ", values.sizes());
  check_shape("rows", rows, {values.size(0)});
  check_ids(rows, total);
  const int64_t d = values.size(1);
  return with_type(values, [&](auto type) {
    using T = decltype(type);
    Tensor whole = empty({total, d}, values.scalar_type());
    T* to = out<T>(whole);
    at::parallel_for(0, total, 256, [&](int64_t first, int64_t last) { std::fill(to + first * d, to + last * d, T(0)); });
    for (int64_t i = 0; i < rows.numel(); ++i) std::copy_n(in<T>(values) + i * d, d, to + in<int64_t>(rows)[i] * d);
    return whole;
  });
}

}  // namespace transcoder
