// Screening: products in bf16 propose, exact fp32 dot products decide.
#pragma once

#include <limits>

#include "tiles.h"

namespace transcoder {

// Infinity where one is NaN.
inline double larger(double a, double b) { return a >= b ? a : (a < b ? b : std::numeric_limits<double>::infinity()); }

struct Bounded {
  Tensor rounded;  // bf16
  std::vector<double> kept, lost;
  double most_kept = 0, most_lost = 0;
  const uint16_t* data() const { return static_cast<const uint16_t*>(rounded.const_data_ptr()); }
};

inline Bounded bounded(const Tensor& x) {
  Bounded b;
  b.rounded = x.to(at::kBFloat16);
  b.kept.resize(x.size(0));
  b.lost.resize(x.size(0));
  const int64_t d = x.size(1);
  at::parallel_for(0, x.size(0), 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      tables().screen.rounded_norms(in<float>(x) + i * d, b.data() + i * d, d, &b.kept[i], &b.lost[i]);
    }
  });
  for (size_t i = 0; i < b.kept.size(); ++i) {
    b.most_kept = larger(b.most_kept, b.kept[i]);
    b.most_lost = larger(b.most_lost, b.lost[i]);
  }
  return b;
}

// How far a proposal v, a bf16 product plus bias, can be from its exact pre-activation p: |v - p| <= error(row) + 2^-8 |p|.
//
// With x = x' + dx and w = w' + dw (x', w' in bf16), |<x, w> - <x', w'>| <= |dx| |w| + |x'| |dw| (Cauchy-Schwarz). To that come the
// rounding of both fp32 sums, at most (2 d + 32) 2^-23 |x| |w|, factors below 2^-126, which bf16 units flush to zero, and the
// rounding of the bf16 result, 2^-8 of it, which is the pre-activation less its bias. Callers add a percent.
struct Screened {
  Bounded left, right;
  double length, bias = 0;
  Screened(const Tensor& x, const Tensor& W, const Tensor& b)
      : left(bounded(x)), right(bounded(W)), length(static_cast<double>(x.size(1))) {
    for (int64_t i = 0; i < b.numel(); ++i) bias = larger(bias, std::abs(static_cast<double>(in<float>(b)[i])));
  }
  double most() const { return right.most_kept + right.most_lost; }
  // Whether there is a bound at all.
  bool bounds_any() const { return length > 0 && most() < 1e30 && bias < 1e30; }
  bool bounds(int64_t row) const {
    const double size = left.kept[row] + left.lost[row];
    return size < 1e30 && size * most() < 1e30;
  }
  double error(int64_t row) const {
    const double kept = left.kept[row], lost = left.lost[row], sums = (2 * length + 32) * 0x1p-23;
    return lost * most() + kept * right.most_lost + sums * (kept + lost) * most() + 0x1p-8 * bias +
           length * 0x1p-125 * (1 + kept + lost + most());
  }
  // The products of rows [first, first + rows) and latents [latent, latent + columns) into `tile`.
  void product(int64_t first, int64_t rows, int64_t latent, int64_t columns, uint16_t* tile) const {
    const c10::InferenceMode guard;
    const auto bf16 = at::TensorOptions().dtype(at::kBFloat16);
    const int64_t d = left.rounded.size(1);
    Tensor result = at::from_blob(tile, {rows, columns}, bf16);
    const Tensor from = at::from_blob(const_cast<uint16_t*>(left.data()) + first * d, {rows, d}, bf16);
    const Tensor by = at::from_blob(const_cast<uint16_t*>(right.data()) + latent * d, {d, columns}, {1, d}, bf16);
    at::mm_out(result, from, by);
  }
};

inline bool bounds_every(const Screened& screened, int64_t rows) {
  bool fine = screened.bounds_any();
  for (int64_t row = 0; fine && row < rows; ++row) fine = screened.bounds(row);
  return fine;
}

// By task and sorted: every entry whose exact pre-activation under `bias` can exceed its row's gate (at least 0), as proposed.
// Empty if there are more than `most`: that many exact dot products cost as much as an fp32 product. Tiles have fixed shapes,
// so this does not depend on the number of threads.
optional<std::vector<Pool<float>>> proposals(const Plan& plan, const Screened& screened, const float* bias,
                                             const double* gate, int64_t most);

}  // namespace transcoder
