// Decode, the nested loss and every backward reduction: rows and their threads, the loops are in reduce.h.
#include "ops.h"

namespace transcoder {

tuple<Tensor, Tensor, Tensor> by_latent(const Tensor& ids, const Tensor& row_ptr, int64_t latents) {
  check_rows(row_ptr, ids.numel());
  check_ids(ids, latents);
  const int64_t entries = ids.numel(), rows = row_ptr.numel() - 1;
  Tensor order = empty({entries}, at::kLong), row_of = empty({entries}, at::kLong),
         ptr = empty({latents + 1}, at::kLong);
  const int64_t *id = in<int64_t>(ids), *bounds = in<int64_t>(row_ptr);
  int64_t *p = out<int64_t>(ptr), *to = out<int64_t>(order), *to_row = out<int64_t>(row_of);
  std::vector<int64_t> next = starts_of(id, entries, latents);
  std::copy(next.begin(), next.end(), p);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = bounds[row]; i < bounds[row + 1]; ++i) {
      const int64_t place = next[id[i]]++;
      to[place] = i;
      to_row[place] = row;
    }
  }
  return {order, row_of, ptr};
}

// See segments.weighted_row_sum; `order` reads the weights through a permutation, `totals` also sums the weights alone.
tuple<Tensor, Tensor> row_sums(const Tensor& table, const Tensor& ids, const Tensor& ptr, const Tensor& weights,
                               const optional<Tensor>& order, const optional<Tensor>& start, bool sums, bool totals) {
  check_rows(ptr, ids.numel());
  const int64_t rows = ptr.numel() - 1, d = table.size(1);
  Tensor sum = empty({sums ? rows : 0, d}, weights.scalar_type());
  Tensor total = empty({totals ? rows : 0}, weights.scalar_type());
  check_ids(ids, table.size(0));
  if (order) check_ids(*order, weights.numel());
  check_shape("weights or their order", order ? *order : weights, ids.sizes());
  if (start) check_shape("start", *start, {d});
  with_type(weights, [&](auto type) {
    using T = decltype(type);
    for_rows(rows, in<int64_t>(ptr), 1, [&](int64_t first, int64_t last) {
      kernels<T>().rows_sum(first, last, in<int64_t>(ptr), in<int64_t>(ids), order ? in<int64_t>(*order) : nullptr,
                            in<T>(weights), in<T>(table), d, start ? in<T>(*start) : nullptr,
                            sums ? out<T>(sum) : nullptr, totals ? out<T>(total) : nullptr);
    });
  });
  return {sum, total};
}

Tensor row_dots(const Tensor& left, const Tensor& table, const Tensor& ids, const Tensor& ptr) {
  Tensor dots = empty({ids.numel()}, left.scalar_type());
  check_rows(ptr, ids.numel());
  check_ids(ids, table.size(0));
  check_shape("left", left, {ptr.numel() - 1, table.size(1)});
  with_type(left, [&](auto type) {
    using T = decltype(type);
    for_rows(left.size(0), in<int64_t>(ptr), 1, [&](int64_t first, int64_t last) {
      kernels<T>().rows_dot(first, last, in<int64_t>(ptr), in<int64_t>(ids), in<T>(left), in<T>(table), left.size(1),
                            out<T>(dots));
    });
  });
  return dots;
}

void check_widths(at::IntArrayRef widths, int64_t latents) {
  bool fine = !widths.empty() && widths.front() > 0 && widths.back() <= latents;
  for (size_t i = 1; i < widths.size(); ++i) fine = fine && widths[i - 1] < widths[i];
  TORCH_CHECK_VALUE(fine, "nested_loss: widths: expected to ascend from 1 or more to at most ", latents, ", got ", widths);
}

tuple<Tensor, Tensor> prefix_errors(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                    at::IntArrayRef widths, const Tensor& W, const Tensor& b, const Tensor& y,
                                    const optional<Tensor>& token_weights) {
  const int64_t rows = y.size(0), d = y.size(1), prefixes = static_cast<int64_t>(widths.size());
  check_codes(values, ids, row_ptr, W.size(0));
  check_widths(widths, W.size(0));
  check_shape("W", W, {W.size(0), d});
  check_shape("b", b, {d});
  check_shape("row_ptr", row_ptr, {rows + 1});
  if (token_weights) check_shape("token_weights", *token_weights, {rows});
  Tensor residual = empty({rows, d}, values.scalar_type()), errors = empty({prefixes}, values.scalar_type());
  with_type(values, [&](auto type) {
    using T = decltype(type);
    std::vector<double> squares(rows * prefixes), sums(prefixes, 0.0);
    for_rows(rows, in<int64_t>(row_ptr), 4, [&](int64_t first, int64_t last) {
      kernels<T>().prefixes_up(first, last, in<int64_t>(row_ptr), in<int64_t>(ids), in<T>(values), prefixes,
                               widths.data(), in<T>(W), in<T>(b), in<T>(y), d, out<T>(residual), squares.data());
    });
    for (int64_t row = 0; row < rows; ++row) {
      const double w = token_weights ? static_cast<double>(in<T>(*token_weights)[row]) : 1.0;
      for (int64_t p = 0; p < prefixes; ++p) sums[p] += w * squares[row * prefixes + p];
    }
    std::copy(sums.begin(), sums.end(), out<T>(errors));
  });
  return {errors, residual};
}

// scales [P] are the gradients of the errors.
tuple<Tensor, Tensor, Tensor> prefix_gradients(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                               const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr,
                                               at::IntArrayRef widths, const Tensor& W, const Tensor& residual,
                                               const Tensor& scales, const optional<Tensor>& token_weights) {
  const int64_t rows = residual.size(0), d = residual.size(1), latents = W.size(0);
  const int64_t prefixes = static_cast<int64_t>(widths.size());
  check_codes(values, ids, row_ptr, latents);
  check_widths(widths, latents);
  check_shape("W", W, {latents, d});
  check_shape("row_ptr", row_ptr, {rows + 1});
  check_shape("scales", scales, {prefixes});
  if (token_weights) check_shape("token_weights", *token_weights, {rows});
  check_shape("order", order, ids.sizes());
  check_shape("row_of", row_of, ids.sizes());
  check_shape("latent_ptr", latent_ptr, {latents + 1});
  check_ids(order, ids.numel());
  check_ids(row_of, rows);
  check_rows(latent_ptr, ids.numel());
  Tensor grad_values = empty({values.numel()}, values.scalar_type());
  Tensor grad_W = empty({latents, d}, values.scalar_type()), running = empty({rows, d}, values.scalar_type());
  Tensor work = empty({prefixes > 1 ? rows : 0, d}, values.scalar_type());
  std::vector<int64_t> cursor(rows);
  with_type(values, [&](auto type) {
    using T = decltype(type);
    const int64_t* bounds = in<int64_t>(row_ptr);
    const int64_t* by = in<int64_t>(latent_ptr);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t end = bounds[row + 1];
      for (; end > bounds[row] && in<int64_t>(ids)[end - 1] >= widths.back(); --end) out<T>(grad_values)[end - 1] = 0;
      cursor[row] = end;
    }
    std::fill_n(out<T>(grad_W) + widths.back() * d, (latents - widths.back()) * d, T(0));
    for (int64_t p = prefixes - 1; p >= 0; --p) {
      const int64_t low = p > 0 ? widths[p - 1] : 0;
      const bool fresh = p == prefixes - 1;
      for_rows(rows, bounds, 4, [&](int64_t first, int64_t last) {
        kernels<T>().prefixes_down(first, last, bounds, in<int64_t>(ids), in<T>(values), low, in<T>(W), d,
                                   2 * in<T>(scales)[p], token_weights ? in<T>(*token_weights) : nullptr, fresh,
                                   fresh ? in<T>(residual) : out<T>(work), p > 0 ? out<T>(work) : nullptr,
                                   out<T>(running), cursor.data(), out<T>(grad_values));
      });
      for_rows(widths[p] - low, by + low, 1, [&](int64_t first, int64_t last) {
        kernels<T>().rows_sum(low + first, low + last, by, in<int64_t>(row_of), in<int64_t>(order), in<T>(values),
                              in<T>(running), d, nullptr, out<T>(grad_W), nullptr);
      });
    }
  });
  return {grad_values, grad_W, running};
}

}  // namespace transcoder
