// The exact correlation statistics: the pair update, many batches at a time, and the walk over all pairs.
#pragma once


#include <ATen/ops/zeros.h>

#include <limits>

#include "common.h"

namespace transcoder {
namespace {

// An entry, which makes a pair with each of the entries [first, last) before it in its row.
template <typename Count>
struct Closing {
  int32_t first, last;
  double weighted;
  Count tally;
};

// What an earlier entry gives to a pair. Values of fp32 codes are kept as such: half the bytes to fetch, and exact.
template <typename Value>
struct Partner {
  int32_t latent;
  Value value;
};

// The entries of one update.
struct Update {
  int64_t entries;
  const int32_t* latent;
  const int64_t* local;  // how many earlier entries its row has
  const double *value, *weighted;
  Tensor tally;  // one for all, or one an entry
};

template <typename T>
void prefetch_all(const T* from, const T* to) {
  for (const char* p = reinterpret_cast<const char*>(from); p < reinterpret_cast<const char*>(to); p += 64) {
    __builtin_prefetch(p, 1);
  }
}

template <typename Value, typename Count>
void add_pairs_of(const std::vector<Update>& updates, int64_t entries, int64_t latents, Tensor& product, Tensor& joint) {
  // Entries by latent, ties in order: a latent's row of the triangle has one owner, is visited once, token by token, and so
  // stays in the cache. What the walk needs of an entry is copied in that order: read in sequence, it says early which
  // partners are to be fetched.
  std::vector<int64_t> ptr(latents + 1, 0);
  for (const Update& u : updates) {
    for (int64_t i = 0; i < u.entries; ++i) ++ptr[u.latent[i] + 1];
  }
  for (int64_t i = 0; i < latents; ++i) ptr[i + 1] += ptr[i];
  Memory<Closing<Count>> closings;
  Memory<Partner<Value>> earlier;
  closings.need(entries);
  earlier.need(entries);
  Closing<Count>* sorted = closings.data;
  Partner<Value>* partners = earlier.data;
  std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
  int32_t at = 0;
  for (const Update& u : updates) {
    const Count* tally = in<Count>(u.tally);
    const int64_t stride = u.tally.numel() == 1 ? 0 : 1;
    for (int64_t i = 0; i < u.entries; ++i, ++at) {
      sorted[next[u.latent[i]]++] = {at - static_cast<int32_t>(u.local[i]), at, u.weighted[i], tally[i * stride]};
      partners[at] = {u.latent[i], static_cast<Value>(u.value[i])};
    }
  }
  double* to_product = out<double>(product);
  Count* to_joint = out<Count>(joint);
  prefer_large_pages(to_product, static_cast<int64_t>(product.nbytes()));
  prefer_large_pages(to_joint, static_cast<int64_t>(joint.nbytes()));
  for_rows(latents, ptr.data(), 0, [&](int64_t first, int64_t last) {
    const int64_t end = ptr[last];
    for (int64_t latent = first; latent < last; ++latent) {
      const int64_t begin = latent * (latent - 1) / 2;
      double* own_product = to_product + begin;
      Count* own_joint = to_joint + begin;
      // In sequence, and worth it where most lines of the row will be wanted.
      if ((ptr[latent + 1] - ptr[latent]) * 128 > latent) {
        prefetch_all(own_product, own_product + latent);
        prefetch_all(own_joint, own_joint + latent);
      }
      for (int64_t place = ptr[latent]; place < ptr[latent + 1]; ++place) {
        constexpr int64_t AHEAD = 8;
        if (place + AHEAD < end) {
          prefetch_all(partners + sorted[place + AHEAD].first, partners + sorted[place + AHEAD].last);
        }
        const Closing<Count> closing = sorted[place];
        for (int64_t j = closing.first; j < closing.last; ++j) {
          const Partner<Value> partner = partners[j];
          own_product[partner.latent] += closing.weighted * static_cast<double>(partner.value);
          own_joint[partner.latent] += closing.tally;
        }
      }
    }
  });
}

template <typename Count>
void add_pairs_of(const std::vector<Update>& updates, int64_t entries, int64_t latents, Tensor& product, Tensor& joint) {
  bool narrow = true;
  for (const Update& u : updates) {
    for (int64_t i = 0; i < u.entries; ++i) narrow &= static_cast<double>(static_cast<float>(u.value[i])) == u.value[i];
  }
  return narrow ? add_pairs_of<float, Count>(updates, entries, latents, product, joint)
                : add_pairs_of<double, Count>(updates, entries, latents, product, joint);
}

// Adds the pairs of entries of one row to the packed triangle, for several updates in the order given.
void add_pairs(at::TensorList latent, at::TensorList local, at::TensorList value, at::TensorList weighted,
               at::TensorList tally, int64_t latents, Tensor product, Tensor joint) {
  const size_t count = latent.size();
  TORCH_CHECK_VALUE(local.size() == count && value.size() == count && weighted.size() == count && tally.size() == count,
                    "add_pairs: expected lists of one length, ", count);
  TORCH_CHECK_VALUE(product.numel() >= latents * (latents - 1) / 2 && joint.numel() >= latents * (latents - 1) / 2,
                    "add_pairs: expected a triangle of ", latents, " latents");
  std::vector<Update> updates;
  int64_t entries = 0;
  for (size_t u = 0; u < count; ++u) {
    const int64_t n = latent[u].numel();
    for (const Tensor& part : {local[u], value[u], weighted[u]}) check_shape("entries", part, {n});
    if (tally[u].numel() != 1) check_shape("tally", tally[u], {n});
    const int32_t* id = in<int32_t>(latent[u]);
    const int64_t* before = in<int64_t>(local[u]);
    bool fine = true;
    for (int64_t i = 0; i < n; ++i) {
      fine = fine && id[i] >= 0 && id[i] < latents && before[i] >= 0 && before[i] <= (i == 0 ? 0 : before[i - 1] + 1);
      fine = fine && (before[i] == 0 || (before[i] == before[i - 1] + 1 && id[i] > id[i - 1]));
    }
    TORCH_CHECK_VALUE(fine, "add_pairs: expected latents in [0, ", latents, "), ascending within a row");
    updates.push_back({n, id, before, in<double>(value[u]), in<double>(weighted[u]), tally[u].to(joint.scalar_type())});
    entries += n;
  }
  TORCH_CHECK_VALUE(entries < std::numeric_limits<int32_t>::max(), "add_pairs: expected fewer than 2^31 entries at once");
  switch (joint.scalar_type()) {
    case at::kInt: return add_pairs_of<int32_t>(updates, entries, latents, product, joint);
    case at::kLong: return add_pairs_of<int64_t>(updates, entries, latents, product, joint);
    default: return add_pairs_of<double>(updates, entries, latents, product, joint);
  }
}

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
