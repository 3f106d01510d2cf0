// The fused optimizer step: one pass reads the gradients for their norm, one updates parameters and moments.
#include <ATen/ops/scalar_tensor.h>

#include <cmath>

#include "ops.h"

namespace transcoder {
namespace {

// A parameter is split at fixed places, so the sum of its squares does not depend on the number of threads.
constexpr int64_t PIECE = 1 << 14;

struct Piece {
  size_t parameter;
  int64_t first, last;  // elements; rows where the parameter has rows of unit length
};

void check_parameter(const Tensor& p, const Tensor& other, const char* what) {
  TORCH_CHECK_VALUE(other.scalar_type() == p.scalar_type() && other.sizes() == p.sizes() && other.is_contiguous(),
                    "adam_step: ", what, ": expected a contiguous ", p.scalar_type(), " of shape ", p.sizes(), ", got ",
                    other.scalar_type(), " of shape ", other.sizes());
}

}  // namespace

// torch.optim.Adam's update after clipping by the global norm (in place). The parameter numbered `unit` (none: -1) is a matrix
// whose rows have unit length: the part of its gradient along each row is taken away first, and rows are scaled to unit
// length afterwards. Returns the norm before clipping; `max_norm` infinite does not clip. `bad` (0-dim bool) is set if the norm
// is not finite, as with a NaN or Inf in any gradient; if it is set, nothing is updated.
Tensor adam_step(at::TensorList parameters, at::TensorList grads, at::TensorList firsts, at::TensorList seconds,
                 at::TensorList steps, int64_t unit, double lr, double beta1, double beta2, double eps, double max_norm,
                 const optional<Tensor>& bad) {
  const size_t count = parameters.size();
  TORCH_CHECK_VALUE(grads.size() == count && firsts.size() == count && seconds.size() == count && steps.size() == count,
                    "adam_step: expected lists of one length, ", count);
  TORCH_CHECK_VALUE(count > 0, "adam_step: expected at least one parameter");
  TORCH_CHECK_VALUE(unit < static_cast<int64_t>(count) && (unit < 0 || parameters[unit].dim() == 2),
                    "adam_step: unit: expected the number of a matrix or -1, got ", unit);
  TORCH_CHECK_VALUE(!bad || (bad->scalar_type() == at::kBool && bad->numel() == 1), "adam_step: bad: expected one bool");
  std::vector<Piece> pieces;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = parameters[i];
    TORCH_CHECK_VALUE(p.scalar_type() == parameters[0].scalar_type(), "adam_step: expected parameters of one dtype");
    check_parameter(p, p, "parameter");
    check_parameter(p, grads[i], "gradient");
    check_parameter(p, firsts[i], "exp_avg");
    check_parameter(p, seconds[i], "exp_avg_sq");
    TORCH_CHECK_VALUE(steps[i].scalar_type() == at::kFloat && steps[i].numel() == 1,
                      "adam_step: step: expected one float32, got ", steps[i].numel(), " of ", steps[i].scalar_type());
    const bool rows = static_cast<int64_t>(i) == unit;
    const int64_t all = rows ? p.size(0) : p.numel();
    const int64_t size = rows ? std::max<int64_t>(1, PIECE / std::max<int64_t>(1, p.size(1))) : PIECE;
    for (int64_t first = 0; first < all; first += size) pieces.push_back({i, first, std::min(all, first + size)});
  }
  const int64_t tasks = static_cast<int64_t>(pieces.size());
  return with_type(parameters[0], [&](auto type) {
    using T = decltype(type);
    Memory<T> along;
    if (unit >= 0) along.need(parameters[unit].size(0));
    std::vector<double> sums(tasks);
    for_each_task<Nothing>(tasks, [&](int64_t task, Nothing&) {
      const auto [i, first, last] = pieces[task];
      const T* g = in<T>(grads[i]);
      sums[task] = static_cast<int64_t>(i) == unit
                       ? kernels<T>().tangent_squares(first, last, parameters[i].size(1), g, in<T>(parameters[i]), along.data)
                       : kernels<T>().squares(g + first, last - first);
    });
    double total = 0;
    for (const double sum : sums) total += sum;
    const T norm = static_cast<T>(std::sqrt(total));
    if (bad) {
      bool& held = *out<bool>(*bad);
      held = held || !std::isfinite(norm);
      if (held) return at::scalar_tensor(norm, parameters[0].options());
    }
    // As torch.nn.utils.clip_grad_norm_: a NaN propagates.
    const T clip = static_cast<T>(max_norm) / (norm + T(1e-6));
    std::vector<Adam<T>> by;
    for (size_t i = 0; i < count; ++i) {
      const double step = static_cast<double>(*in<float>(steps[i])) + 1;
      *out<float>(steps[i]) = static_cast<float>(step);
      by.push_back({clip > T(1) ? T(1) : clip, T(1 - beta1), T(beta2), T(1 - beta2), T(lr / (1 - std::pow(beta1, step))),
                    T(1 / std::sqrt(1 - std::pow(beta2, step))), T(eps), std::numeric_limits<T>::min()});
    }
    // In reverse order: the last reads of the first pass are still in the cache.
    for_each_task<Nothing>(tasks, [&](int64_t task, Nothing&) {
      const auto [i, first, last] = pieces[tasks - 1 - task];
      const T* g = in<T>(grads[i]);
      T *p = out<T>(parameters[i]), *m = out<T>(firsts[i]), *v = out<T>(seconds[i]);
      if (static_cast<int64_t>(i) == unit) {
        kernels<T>().adam_rows(first, last, parameters[i].size(1), by[i], along.data, g, p, m, v);
      } else {
        kernels<T>().adam(last - first, by[i], g + first, p + first, m + first, v + first);
      }
    });
    return at::scalar_tensor(norm, parameters[0].options());
  });
}

}  // namespace transcoder
