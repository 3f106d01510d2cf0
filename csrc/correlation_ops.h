// The pair update of the exact correlation statistics, many batches at a time.
#pragma once


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

}  // namespace
}  // namespace transcoder
