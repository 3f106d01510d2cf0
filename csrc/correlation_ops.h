// The pair update of the exact correlation statistics.
#pragma once


#include "common.h"

namespace transcoder {
namespace {

template <typename Count>
void add_pairs_of(const Tensor& latent, const Tensor& local, const Tensor& value, const Tensor& weighted,
                  const Tensor& tally, int64_t latents, Tensor& product, Tensor& joint) {
  const int64_t n = latent.numel();
  const int64_t *id = in<int64_t>(latent), *before = in<int64_t>(local);
  const double *z = in<double>(value), *wz = in<double>(weighted);
  const Count* counts = in<Count>(tally);
  // Entries by latent, ties in order: a latent's row of the triangle has one owner and is visited once, token by token.
  std::vector<int64_t> ptr(latents + 1, 0), order(n);
  for (int64_t i = 0; i < n; ++i) ++ptr[id[i] + 1];
  for (int64_t i = 0; i < latents; ++i) ptr[i + 1] += ptr[i];
  std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
  for (int64_t i = 0; i < n; ++i) order[next[id[i]]++] = i;
  double* to_product = out<double>(product);
  Count* to_joint = out<Count>(joint);
  for_rows(latents, ptr.data(), 0, [&](int64_t first, int64_t last) {
    const int64_t end = ptr[last];
    for (int64_t place = ptr[first]; place < end; ++place) {
      constexpr int64_t AHEAD = 2, FAR_AHEAD = 8;  // entries whose cells, and whose rows, are on their way
      if (place + FAR_AHEAD < end) {
        const int64_t far = order[place + FAR_AHEAD];
        for (int64_t j = far - before[far]; j <= far + 7; j += 8) {
          __builtin_prefetch(id + std::min(j, far));
          __builtin_prefetch(z + std::min(j, far));
        }
      }
      if (place + AHEAD < end) {
        const int64_t soon = order[place + AHEAD], base = id[soon] * (id[soon] - 1) / 2;
        for (int64_t j = soon - before[soon]; j < soon; ++j) {
          __builtin_prefetch(to_product + base + id[j], 1);
          __builtin_prefetch(to_joint + base + id[j], 1);
        }
      }
      const int64_t i = order[place], base = id[i] * (id[i] - 1) / 2;
      const double w = wz[i];
      const Count one = counts[i];
      for (int64_t j = i - before[i]; j < i; ++j) {
        to_product[base + id[j]] += w * z[j];
        to_joint[base + id[j]] += one;
      }
    }
  });
}

// Adds the pairs of entries of one row to the packed triangle; local[i] counts the earlier entries of i's row.
void add_pairs(const Tensor& latent, const Tensor& local, const Tensor& value, const Tensor& weighted,
               const Tensor& tally, int64_t latents, Tensor product, Tensor joint) {
  check_ids(latent, latents);
  for (const Tensor& part : {local, value, weighted, tally}) check_shape("entries", part, latent.sizes());
  TORCH_CHECK_VALUE(product.numel() >= latents * (latents - 1) / 2 && joint.numel() >= latents * (latents - 1) / 2,
                    "add_pairs: expected a triangle of ", latents, " latents");
  const int64_t* p = in<int64_t>(local);
  bool fine = true, ascending = true;
  for (int64_t i = 0; i < local.numel(); ++i) {
    fine = fine && p[i] >= 0 && p[i] <= i;
    ascending = ascending && (p[i] == 0 || in<int64_t>(latent)[i] > in<int64_t>(latent)[i - 1]);
  }
  TORCH_CHECK_VALUE(fine && ascending, "add_pairs: expected ascending latents within a row");
  switch (joint.scalar_type()) {
    case at::kInt: return add_pairs_of<int32_t>(latent, local, value, weighted, tally, latents, product, joint);
    case at::kLong: return add_pairs_of<int64_t>(latent, local, value, weighted, tally, latents, product, joint);
    default: return add_pairs_of<double>(latent, local, value, weighted, tally, latents, product, joint);
  }
}

}  // namespace
}  // namespace transcoder
