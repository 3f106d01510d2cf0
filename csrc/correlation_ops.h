// The exact correlation statistics: the walk over all pairs.
#pragma once


#include <ATen/ops/zeros.h>

#include "common.h"

namespace transcoder {
namespace {

// The sums of one part of a stream.
struct Triangle {
  const double* product;
  const void* joint;
};

// What a range of rows of the triangle holds.
template <typename Count>
struct Found {
  std::vector<int64_t> i, j;
  std::vector<double> product;
  std::vector<Count> joint;
  double squared = 0;
  std::vector<int64_t> histogram;
};

// The last place whose edge is not above r; r outside, and NaN, in the first or last bin. Edges ascend, most often evenly.
inline int64_t bin_of(double r, const double* edges, int64_t bins) {
  if (!(r < edges[bins])) return bins - 1;
  if (!(r > edges[0])) return 0;
  int64_t bin = static_cast<int64_t>((r - edges[0]) / (edges[bins] - edges[0]) * static_cast<double>(bins));
  bin = std::clamp<int64_t>(bin, 0, bins - 1);
  while (edges[bin] > r) --bin;
  while (edges[bin + 1] <= r) ++bin;
  return bin;
}

// Stored is the type of the counts in the triangles, Count that of their sum.
template <typename Stored, typename Count>
void look_at(int64_t first, int64_t last, const std::vector<Triangle>& parts, const double* apart, const double* inverse,
             double least, const double* edges, int64_t bins, Found<Count>& found) {
  found.histogram.assign(bins, 0);
  for (int64_t j = first; j < last; ++j) {
    const int64_t begin = j * (j - 1) / 2;
    for (int64_t i = 0; i < j; ++i) {
      Count joint = 0;
      for (const Triangle& part : parts) joint += static_cast<const Stored*>(part.joint)[begin + i];
      if (!(joint > 0)) continue;
      double product = 0;
      for (const Triangle& part : parts) product += part.product[begin + i];
      const double by_chance = apart[i] * apart[j], r = product * inverse[i] * inverse[j] - by_chance;
      found.squared += r * r - by_chance * by_chance;
      if (bins > 0) ++found.histogram[bin_of(r, edges, bins)];
      if (r >= least) {
        found.i.push_back(i);
        found.j.push_back(j);
        found.product.push_back(product);
        found.joint.push_back(joint);
      }
    }
  }
}

// One walk over all pairs that fired together, in parts of one stream: those whose correlation
// product * inverse[i] * inverse[j] - apart[i] * apart[j] is at least `least` (i, j, product, joint), the sum over all of r^2
// less what it would be had they not met, and how many fall between which edges.
tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> survey_pairs(at::TensorList products, at::TensorList joints,
                                                                   const Tensor& apart, const Tensor& inverse, double least,
                                                                   const optional<Tensor>& edges) {
  const int64_t latents = apart.numel(), pairs = latents * (latents - 1) / 2;
  const int64_t bins = edges ? edges->numel() - 1 : 0;
  TORCH_CHECK_VALUE(bins >= 0, "survey_pairs: edges: expected at least one");
  TORCH_CHECK_VALUE(!products.empty() && products.size() == joints.size(), "survey_pairs: expected lists of one length");
  check_shape("apart", apart, {latents});
  check_shape("inverse", inverse, {latents});
  bool same = true;
  for (const Tensor& joint : joints) same = same && joint.scalar_type() == joints[0].scalar_type();
  std::vector<Triangle> parts;
  std::vector<Tensor> counts;
  for (size_t p = 0; p < products.size(); ++p) {
    TORCH_CHECK_VALUE(products[p].numel() >= pairs && joints[p].numel() >= pairs && joints[p].is_contiguous(),
                      "survey_pairs: expected triangles of ", latents, " latents");
    // One part may have widened its counts before another.
    counts.push_back(same ? joints[p] : joints[p].to(at::kLong));
    parts.push_back({in<double>(products[p]), counts[p].const_data_ptr()});
  }
  // Cut at fixed places, so sums do not depend on threads.
  constexpr int64_t RANGE = 1 << 17;
  std::vector<int64_t> bounds{0};
  for (int64_t j = 0; j < latents; ++j) {
    if ((j + 1) * j / 2 - bounds.back() * (bounds.back() - 1) / 2 >= RANGE || j + 1 == latents) bounds.push_back(j + 1);
  }
  const int64_t tasks = static_cast<int64_t>(bounds.size()) - 1;
  const auto run = [&](auto stored, auto count) {
    using Count = decltype(count);
    std::vector<Found<Count>> found(tasks);
    for_each_task<Nothing>(tasks, [&](int64_t task, Nothing&) {
      look_at<decltype(stored), Count>(bounds[task], bounds[task + 1], parts, in<double>(apart), in<double>(inverse), least,
                                       edges ? in<double>(*edges) : nullptr, bins, found[task]);
    });
    Tensor squared = at::zeros({}, at::kDouble), histogram = at::zeros({bins}, at::kLong);
    std::vector<const std::vector<int64_t>*> i, j;
    std::vector<const std::vector<double>*> product;
    std::vector<const std::vector<Count>*> joint;
    for (const Found<Count>& part : found) {
      *out<double>(squared) += part.squared;
      for (int64_t bin = 0; bin < bins; ++bin) out<int64_t>(histogram)[bin] += part.histogram[bin];
      i.push_back(&part.i);
      j.push_back(&part.j);
      product.push_back(&part.product);
      joint.push_back(&part.joint);
    }
    return tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>{joined(i), joined(j), joined(product), joined(joint),
                                                                 squared, histogram};
  };
  switch (counts[0].scalar_type()) {
    case at::kInt: return run(int32_t{}, int64_t{});
    case at::kLong: return run(int64_t{}, int64_t{});
    case at::kDouble: return run(double{}, double{});
    default: TORCH_CHECK_VALUE(false, "survey_pairs: counts: expected int32, int64 or float64");
  }
}

}  // namespace
}  // namespace transcoder
