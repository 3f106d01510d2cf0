// topk by screening: products in bf16 propose, exact fp32 dot products decide.
#pragma once

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <limits>

#include "encode_ops.h"

namespace transcoder {
namespace {

struct Bounded {
  Tensor rounded;  // bf16
  std::vector<double> kept, lost;
  double most_kept = 0, most_lost = 0;
  const uint16_t* data() const { return static_cast<const uint16_t*>(rounded.const_data_ptr()); }
};

Bounded bounded(const Tensor& x) {
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
    // Written so that a NaN stays.
    b.most_kept = b.kept[i] <= b.most_kept ? b.most_kept : b.kept[i];
    b.most_lost = b.lost[i] <= b.most_lost ? b.most_lost : b.lost[i];
  }
  return b;
}

struct ScreenMemory {
  Memory<uint16_t> tile;
  Memory<float> values, spare, dots;
  Memory<int32_t> ids;
  Memory<int64_t> wide_ids, every;
  std::vector<int64_t> count;
  std::vector<float> gate, twice;
};

// The k largest of relu(dot(x, w) + b), dot being kernels.h's fp32 dot product: as exact as topk's, not bitwise its values.
//
// With x = x' + dx and w = w' + dw (x', w' in bf16), |<x, w> - <x', w'>| <= |dx| |w| + |x'| |dw| (Cauchy-Schwarz). To that come the
// rounding of both fp32 sums, at most (2 d + 32) 2^-23 |x| |w|, what bf16 units take for zero (below 2^-126 a factor), and the
// rounding of the bf16 result, 2^-9 of it, which is the pre-activation less its bias. All with slack of a percent. An entry
// further below the k-th largest proposal than both errors cannot be among the k largest.
tuple<Tensor, Tensor> topk_screened(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  check_encoder(x, W, b, k);
  const int64_t rows = x.size(0), d = x.size(1), latents = W.size(0);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "topk_screened: expected float32, got ", x.scalar_type());
  const Bounded left = bounded(x), right = bounded(W);
  double bias = 0;
  for (int64_t i = 0; i < latents; ++i) {
    const double size = std::abs(static_cast<double>(in<float>(b)[i]));
    bias = size <= bias ? bias : size;
  }
  if (rows == 0 || d == 0 || !(right.most_kept + right.most_lost < 1e30) || !(bias < 1e30)) return topk(x, W, b, k);
  Tensor values = empty({rows, k}, at::kFloat), ids = empty({rows, k}, at::kLong);
  const int64_t limit = k + std::clamp<int64_t>(4 * k, 128, 4096), room = limit + SLACK;
  const double length = static_cast<double>(d), sums = (2 * length + 32) * 0x1p-23;
  const int64_t threads = at::get_num_threads();
  const int64_t height = std::clamp<int64_t>((rows + threads - 1) / threads, 1, TILE_ROWS);
  for_each_task<ScreenMemory>((rows + height - 1) / height, [&](int64_t task, ScreenMemory& own) {
    const c10::InferenceMode guard;
    const auto bf16 = at::TensorOptions().dtype(at::kBFloat16);
    const int64_t first = task * height, n = std::min(rows, first + height) - first;
    own.tile.need(n * TILE_COLUMNS);
    own.values.need(n * room);
    own.ids.need(n * room);
    own.spare.need(room);
    own.count.assign(n, 0);
    own.gate.assign(n, 0);
    own.twice.assign(n, 0);
    for (int64_t r = 0; r < n; ++r) {
      const double kept = left.kept[first + r], lost = left.lost[first + r];
      const double most = right.most_kept + right.most_lost;
      double error = lost * most + kept * right.most_lost + sums * (kept + lost) * most + 0x1p-8 * bias;
      error += length * 0x1p-125 * (1 + kept + lost + most);
      own.twice[r] = static_cast<float>(2.02 * error);
      own.gate[r] = static_cast<float>(-1.01 * error);
      if (!(kept + lost < 1e30 && (kept + lost) * most < 1e30)) own.count[r] = -1;
    }
    for (int64_t latent = 0; latent < latents; latent += TILE_COLUMNS) {
      const int64_t columns = std::min(TILE_COLUMNS, latents - latent);
      Tensor tile = at::from_blob(own.tile.data, {n, columns}, bf16);
      const Tensor from = at::from_blob(const_cast<uint16_t*>(left.data()) + first * d, {n, d}, bf16);
      const Tensor by = at::from_blob(const_cast<uint16_t*>(right.data()) + latent * d, {d, columns}, {1, d}, bf16);
      at::mm_out(tile, from, by);
      tables().screen.filter_near(own.tile.data, n, columns, in<float>(b) + latent, latent, k, limit, room,
                                  own.twice.data(), 0x1p-6f, own.values.data, own.ids.data, own.count.data(),
                                  own.gate.data(), own.spare.data);
    }
    // The exact products of the candidates; of every latent where a row was given up.
    for (int64_t r = 0; r < n; ++r) {
      const bool all = own.count[r] < 0;
      const int64_t candidates = all ? latents : own.count[r], most = std::max(candidates, room);
      own.wide_ids.need(most);
      own.dots.need(most + SLACK);
      own.every.need(all ? latents + SLACK : 1);
      int32_t* kept_ids = all ? reinterpret_cast<int32_t*>(own.every.data) : own.ids.data + r * room;
      int64_t wanted = 0;
      for (int64_t i = 0; i < candidates; ++i) {
        if (!all && own.values.data[r * room + i] < own.gate[r]) continue;
        own.wide_ids.data[wanted++] = all ? i : kept_ids[i];
      }
      const int64_t ptr[2] = {0, wanted};
      kernels<float>().rows_dot(0, 1, ptr, own.wide_ids.data, in<float>(x) + (first + r) * d, in<float>(W), d,
                                own.dots.data);
      int64_t positive = 0;
      for (int64_t i = 0; i < wanted; ++i) {
        const float v = own.dots.data[i] + in<float>(b)[own.wide_ids.data[i]];
        own.dots.data[positive] = v == v ? v : std::numeric_limits<float>::quiet_NaN();
        kept_ids[positive] = static_cast<int32_t>(own.wide_ids.data[i]);
        positive += !(v <= 0);
      }
      write_row<float>(own.dots.data, kept_ids, positive, k, out<float>(values) + (first + r) * k,
                       out<int64_t>(ids) + (first + r) * k);
    }
  });
  return {values, ids};
}

}  // namespace
}  // namespace transcoder
