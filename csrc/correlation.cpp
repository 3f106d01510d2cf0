// The exact correlation statistics: entries of many updates are buffered, then their pairs are added row by row; and the pass
// over all pairs.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <tuple>

#include "ops.h"

namespace transcoder {
namespace {

// A buffered entry. Values of fp32 codes stay fp32: exact, with half the bytes.
template <typename Value>
struct Partner {
  int32_t latent;
  Value value;
};

// An entry `at`, which makes a pair with each of the entries [first, at) before it on its token.
struct Closing {
  int32_t first, at;
};

template <typename T>
void prefetch_all(const T* from, const T* to) {
  for (const char* p = reinterpret_cast<const char*>(from); p < reinterpret_cast<const char*>(to); p += 64) {
    __builtin_prefetch(p);
  }
}

// The buffered entries, sorted.
template <typename Value>
struct Waiting {
  const Partner<Value>* partners;
  const int32_t* starts;
  const double *weights, *tallies;  // of tokens; null: 1
  const Closing *closings, *end;    // by latent
  const int32_t* tokens;            // of the closings, where tokens have a weight or tally
};

// Adds the pairs that some entries of one latent close to its row of products and of counts, token by token.
template <typename Value, typename Cell>
void add_closings(const Waiting<Value>& waiting, const Closing* closing, const Closing* last, double* products, Cell* joint) {
  // Partners are scattered in memory: they are prefetched this many closings ahead.
  constexpr int64_t AHEAD = 16;
  for (; closing < last; ++closing) {
    if (waiting.end - closing > AHEAD) {
      prefetch_all(waiting.partners + closing[AHEAD].first, waiting.partners + closing[AHEAD].at + 1);
    }
    const Partner<Value>* stop = waiting.partners + closing->at;
    double own = static_cast<double>(stop->value);
    Cell by = 1;
    if (waiting.tokens) {
      const int32_t token = waiting.tokens[closing - waiting.closings];
      if (waiting.weights) own *= waiting.weights[token];
      if (waiting.tallies) by = static_cast<Cell>(waiting.tallies[token]);
    }
    for (const Partner<Value>* p = waiting.partners + closing->first; p < stop; ++p) {
      products[p->latent] += own * static_cast<double>(p->value);
      joint[p->latent] += by;
    }
  }
}

template <typename Value, typename Count>
void add_kept_of(Waiting<Value> waiting, int64_t entries, int64_t tokens, int64_t latents, double* product, Count* joint) {
  // Entries by latent, ties in order: a latent's row of the triangle has one owner, is visited once, token by token. Sorted in
  // as many parts as there are threads, each behind those before it, which gives the same order for any number of them.
  struct Load {
    int64_t entries = 0, pairs = 0;
  };
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), entries >> 12));
  std::vector<int64_t> bounds(parts + 1, tokens);
  for (int64_t part = 0; part < parts; ++part) {
    const int32_t goal = static_cast<int32_t>(entries * part / parts);
    bounds[part] = std::lower_bound(waiting.starts, waiting.starts + tokens, goal) - waiting.starts;
  }
  std::vector<Load> loads(parts * latents);
  std::atomic<bool> fine{true};
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Load* load = loads.data() + part * latents;
      for (int64_t token = bounds[part]; token < bounds[part + 1]; ++token) {
        int64_t before = -1;
        for (int64_t at = waiting.starts[token]; at < waiting.starts[token + 1]; ++at) {
          const int64_t latent = waiting.partners[at].latent;
          // The loops over rows rely on this.
          if (latent <= before || latent >= latents) {
            fine = false;
            return;
          }
          before = latent;
          ++load[latent].entries;
          load[latent].pairs += at - waiting.starts[token];
        }
      }
    }
  });
  TORCH_CHECK_VALUE(fine, "add_kept: expected latents in [0, ", latents, "), ascending on a token");
  std::vector<int64_t> ptr(latents + 1, 0), work(latents + 1, 0);
  for (int64_t latent = 0; latent < latents; ++latent) {
    int64_t at = ptr[latent], pairs = 0;
    for (int64_t part = 0; part < parts; ++part) {
      Load& load = loads[part * latents + latent];
      pairs += load.pairs;
      at += load.entries;
      load.entries = at - load.entries;
    }
    ptr[latent + 1] = at;
    // A pair takes about four times as long as a cell of the row.
    work[latent + 1] = work[latent] + 4 * pairs + latent;
  }
  Memory<Closing> closings;
  Memory<int32_t> tokens_of;
  closings.need(entries);
  if (waiting.weights || waiting.tallies) tokens_of.need(entries);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Load* next = loads.data() + part * latents;
      for (int64_t token = bounds[part]; token < bounds[part + 1]; ++token) {
        for (int32_t at = waiting.starts[token]; at < waiting.starts[token + 1]; ++at) {
          const int64_t place = next[waiting.partners[at].latent].entries++;
          closings.data[place] = {waiting.starts[token], at};
          if (tokens_of.data) tokens_of.data[place] = static_cast<int32_t>(token);
        }
      }
    }
  });
  waiting.closings = closings.data;
  waiting.end = closings.data + entries;
  waiting.tokens = tokens_of.data;
  for_rows(latents, work.data(), 0, [&](int64_t first, int64_t last) {
    // A copy of the row and its narrow counts stay in the caches nearest to the core; the row itself is read and
    // written in one go.
    Memory<double> products;
    Memory<uint16_t> counts;
    products.need(last);
    counts.need(last);
    for (int64_t latent = first; latent < last; ++latent) {
      const Closing *begin = waiting.closings + ptr[latent], *end = waiting.closings + ptr[latent + 1];
      double* own_product = product + latent * (latent - 1) / 2;
      Count* own_joint = joint + latent * (latent - 1) / 2;
      // Faster where most cache lines of the row are needed.
      if ((end - begin) * 128 <= latent) {
        add_closings(waiting, begin, end, own_product, own_joint);
        continue;
      }
      std::memcpy(products.data, own_product, latent * sizeof(double));
      if (waiting.tallies || end - begin > std::numeric_limits<uint16_t>::max()) {
        add_closings(waiting, begin, end, products.data, own_joint);
      } else {
        std::memset(counts.data, 0, latent * sizeof(uint16_t));
        add_closings(waiting, begin, end, products.data, counts.data);
        const uint16_t* by = counts.data;
#pragma omp simd
        for (int64_t i = 0; i < latent; ++i) own_joint[i] += static_cast<Count>(by[i]);
      }
      std::memcpy(own_product, products.data, latent * sizeof(double));
    }
  });
}

// The sums of one part of a stream.
struct Triangle {
  const double* product;
  const void* joint;
};

// A pair that is reported, with its sums over all parts.
template <typename Count>
struct Hit {
  double r;
  int64_t i, j;
  double product;
  Count joint;
};

// Keeps the `most` pairs of the highest r, ties by (j, i): the same ones whatever the order in which they came.
template <typename Count>
void keep_highest(std::vector<Hit<Count>>& hits, int64_t most) {
  if (static_cast<int64_t>(hits.size()) <= most) return;
  std::nth_element(hits.begin(), hits.begin() + most, hits.end(), [](const Hit<Count>& a, const Hit<Count>& b) {
    return std::tie(b.r, a.j, a.i) < std::tie(a.r, b.j, b.i);
  });
  hits.resize(most);
}

// The result of a range of rows of the triangle.
template <typename Count>
struct Found {
  std::vector<Hit<Count>> hits;
  int64_t total = 0;
  double squared = 0;
  std::vector<int64_t> histogram;
};

// Which pairs are reported, and how many at most.
template <typename Count>
struct Wanted {
  double least;
  const Count* fired;
  Count least_union;
  int64_t most;
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
             const Wanted<Count>& wanted, const double* edges, int64_t bins, Found<Count>& found) {
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
      if (r >= wanted.least && wanted.fired[i] + wanted.fired[j] - joint >= wanted.least_union) {
        ++found.total;
        found.hits.push_back({r, i, j, product, joint});
        if (static_cast<int64_t>(found.hits.size()) >= 2 * wanted.most) keep_highest(found.hits, wanted.most);
      }
    }
  }
}

}  // namespace

// Appends the entries that fire, on tokens of weight above 0, to `partners` (at `entries`; as bytes) and where each token's
// begin to `starts` (at `tokens`, with one number more: where the last one ends), a token's weight and tally to theirs. In the
// same pass, for each entry: total += weighted, square += weighted * value, count += tally at its latent. Returns how many
// entries and tokens are buffered then. Tokens of at most one entry make no pair and are left out.
tuple<int64_t, int64_t> keep_entries(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                     const optional<Tensor>& token_weights, const optional<Tensor>& token_tally, Tensor total,
                                     Tensor square, Tensor count, Tensor partners, Tensor starts,
                                     const optional<Tensor>& kept_weights, const optional<Tensor>& kept_tally, int64_t entries,
                                     int64_t tokens) {
  const int64_t rows = row_ptr.numel() - 1, latents = total.numel();
  const int64_t limit = std::numeric_limits<int32_t>::max();
  check_codes(values, ids, row_ptr, latents);
  for (const Tensor& part : {square, count}) check_shape("moments", part, {latents});
  for (const auto& [given, kept] : {std::pair{&token_weights, &kept_weights}, std::pair{&token_tally, &kept_tally}}) {
    TORCH_CHECK_VALUE(given->has_value() == kept->has_value(), "keep_entries: expected room for each token's weight and tally");
    if (given->has_value()) check_shape("tokens", **given, {rows});
    if (given->has_value()) {
      TORCH_CHECK_VALUE((*kept)->numel() >= tokens + rows, "keep_entries: expected room for ", tokens + rows, " tokens");
    }
  }
  TORCH_CHECK_VALUE(entries >= 0 && tokens >= 0 && entries + ids.numel() < limit && latents < limit,
                    "keep_entries: expected fewer than 2^31 entries at once");
  TORCH_CHECK_VALUE(starts.numel() > tokens + rows, "keep_entries: expected room for ", tokens + rows, " tokens");
  TORCH_CHECK_TYPE(count.scalar_type() == (token_tally ? at::kDouble : at::kLong), "keep_entries: count: expected int64, or ",
                   "float64 with tallies, got ", count.scalar_type());
  const double* weight = token_weights ? in<double>(*token_weights) : nullptr;
  const double* tally = token_tally ? in<double>(*token_tally) : nullptr;
  double* to_weight = kept_weights ? out<double>(*kept_weights) : nullptr;
  double* to_tally = kept_tally ? out<double>(*kept_tally) : nullptr;
  const int64_t *id = in<int64_t>(ids), *ptr = in<int64_t>(row_ptr);
  double *to_total = out<double>(total), *to_square = out<double>(square);
  int64_t* whole = tally ? nullptr : out<int64_t>(count);
  double* decayed = tally ? out<double>(count) : nullptr;
  int32_t* start = out<int32_t>(starts);
  with_type(values, [&](auto type) {
    using Value = decltype(type);
    TORCH_CHECK_VALUE(static_cast<int64_t>(partners.nbytes() / sizeof(Partner<Value>)) >= entries + ids.numel(),
                      "keep_entries: expected room for ", entries + ids.numel(), " entries");
    auto* to = reinterpret_cast<Partner<Value>*>(out<uint8_t>(partners));
    if (entries == 0) prefer_large_pages(to, static_cast<int64_t>(partners.nbytes()));
    const Value* value = in<Value>(values);
    for (int64_t row = 0; row < rows; ++row) {
      const double w = weight ? weight[row] : 1.0;
      if (!(w > 0)) continue;
      const int64_t first = entries;
      for (int64_t i = ptr[row]; i < ptr[row + 1]; ++i) {
        if (!(value[i] > 0)) continue;
        const double v = static_cast<double>(value[i]), weighted = weight ? v * w : v;
        to_total[id[i]] += weighted;
        to_square[id[i]] += weighted * v;
        if (tally) {
          decayed[id[i]] += tally[row];
        } else {
          ++whole[id[i]];
        }
        to[entries++] = {static_cast<int32_t>(id[i]), value[i]};
      }
      if (entries < first + 2) {
        entries = first;
        continue;
      }
      start[tokens] = static_cast<int32_t>(first);
      if (weight) to_weight[tokens] = w;
      if (tally) to_tally[tokens] = tally[row];
      ++tokens;
    }
  });
  start[tokens] = static_cast<int32_t>(entries);
  return {entries, tokens};
}

// Adds the pairs of what `keep_entries` has kept to the packed triangle: the first `entries` and `tokens`, each cell in the order
// of the tokens, so the sums are those of adding each token at once, and the same bits for any number of threads. `wide`: the
// values are float64.
void add_kept(const Tensor& partners, const Tensor& starts, const optional<Tensor>& weights, const optional<Tensor>& tallies,
              int64_t entries, int64_t tokens, bool wide, int64_t latents, Tensor product, Tensor joint) {
  const auto pairs = latents * (latents - 1) / 2;
  TORCH_CHECK_VALUE(product.numel() >= pairs && joint.numel() >= pairs, "add_kept: expected a triangle of ", latents, " latents");
  TORCH_CHECK_VALUE(tokens >= 0 && starts.numel() > tokens, "add_kept: expected ", tokens, " tokens, got ", starts.numel() - 1);
  const int32_t* start = in<int32_t>(starts);
  bool fine = start[0] == 0 && start[tokens] == entries;
  for (int64_t token = 0; fine && token < tokens; ++token) fine = start[token] <= start[token + 1];
  TORCH_CHECK_VALUE(fine, "add_kept: starts: expected to ascend from 0 to ", entries);
  for (const auto* part : {&weights, &tallies}) {
    TORCH_CHECK_VALUE(!part->has_value() || (*part)->numel() >= tokens, "add_kept: expected a number for each of ", tokens,
                      " tokens");
  }
  TORCH_CHECK_TYPE(tallies.has_value() == (joint.scalar_type() == at::kDouble), "add_kept: joint: expected integers, or float64 ",
                   "with tallies, got ", joint.scalar_type());
  prefer_large_pages(product.mutable_data_ptr(), static_cast<int64_t>(product.nbytes()));
  prefer_large_pages(joint.mutable_data_ptr(), static_cast<int64_t>(joint.nbytes()));
  const auto run = [&](auto value, auto count) {
    using Value = decltype(value);
    using Count = decltype(count);
    TORCH_CHECK_VALUE(static_cast<int64_t>(partners.nbytes() / sizeof(Partner<Value>)) >= entries, "add_kept: expected ", entries,
                      " entries");
    const Waiting<Value> waiting = {reinterpret_cast<const Partner<Value>*>(in<uint8_t>(partners)), start,
                                    weights ? in<double>(*weights) : nullptr, tallies ? in<double>(*tallies) : nullptr, nullptr,
                                    nullptr, nullptr};
    add_kept_of<Value, Count>(waiting, entries, tokens, latents, out<double>(product), out<Count>(joint));
  };
  const auto of = [&](auto value) {
    switch (joint.scalar_type()) {
      case at::kInt: return run(value, int32_t{});
      case at::kLong: return run(value, int64_t{});
      default: return run(value, double{});
    }
  };
  wide ? of(double{}) : of(float{});
}

// One pass over all pairs that fired together, in parts of one stream: those whose correlation
// product * inverse[i] * inverse[j] - apart[i] * apart[j] is at least `least`, and of whose firing tokens there are at least
// `least_union`: the `most` of the highest correlation (i, j, product, joint), and how many there are; the sum over all of r^2
// minus its value without joint firings, and the number of pairs in each bin. `fired`: firing tokens of each latent.
tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> survey_pairs(at::TensorList products, at::TensorList joints,
                                                                            const Tensor& apart, const Tensor& inverse,
                                                                            const Tensor& fired, double least,
                                                                            double least_union, int64_t most,
                                                                            const optional<Tensor>& edges) {
  const int64_t latents = apart.numel(), pairs = latents * (latents - 1) / 2;
  const int64_t bins = edges ? edges->numel() - 1 : 0;
  TORCH_CHECK_VALUE(bins >= 0, "survey_pairs: edges: expected at least one");
  TORCH_CHECK_VALUE(!products.empty() && products.size() == joints.size(), "survey_pairs: expected lists of one length");
  TORCH_CHECK_VALUE(most >= 1, "survey_pairs: most: expected at least 1, got ", most);
  check_shape("apart", apart, {latents});
  check_shape("inverse", inverse, {latents});
  check_shape("fired", fired, {latents});
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
  // Split at fixed places, so sums do not depend on the number of threads.
  constexpr int64_t RANGE = 1 << 17;
  std::vector<int64_t> bounds{0};
  for (int64_t j = 0; j < latents; ++j) {
    if ((j + 1) * j / 2 - bounds.back() * (bounds.back() - 1) / 2 >= RANGE || j + 1 == latents) bounds.push_back(j + 1);
  }
  const int64_t tasks = static_cast<int64_t>(bounds.size()) - 1;
  most = std::min(most, std::max<int64_t>(1, pairs));
  const auto run = [&](auto stored, auto count) {
    using Count = decltype(count);
    const Wanted<Count> wanted = {least, in<Count>(fired), static_cast<Count>(std::ceil(least_union)), most};
    std::vector<Found<Count>> found(tasks);
    std::vector<Hit<Count>> hits;
    std::mutex guard;
    for_each_task<Nothing>(tasks, [&](int64_t task, Nothing&) {
      Found<Count>& own = found[task];
      look_at<decltype(stored), Count>(bounds[task], bounds[task + 1], parts, in<double>(apart), in<double>(inverse), wanted,
                                       edges ? in<double>(*edges) : nullptr, bins, own);
      // In the order in which the tasks end: what is kept does not depend on it.
      const std::lock_guard<std::mutex> held(guard);
      hits.insert(hits.end(), own.hits.begin(), own.hits.end());
      std::vector<Hit<Count>>().swap(own.hits);
      if (static_cast<int64_t>(hits.size()) >= 2 * most) keep_highest(hits, most);
    });
    keep_highest(hits, most);
    std::sort(hits.begin(), hits.end(),
              [](const Hit<Count>& a, const Hit<Count>& b) { return std::tie(a.j, a.i) < std::tie(b.j, b.i); });
    const int64_t number = hits.size();
    Tensor i = empty({number}, at::kLong), j = empty({number}, at::kLong), product = empty({number}, at::kDouble);
    Tensor joint = empty({number}, c10::CppTypeToScalarType<Count>::value);
    for (int64_t n = 0; n < number; ++n) {
      out<int64_t>(i)[n] = hits[n].i;
      out<int64_t>(j)[n] = hits[n].j;
      out<double>(product)[n] = hits[n].product;
      out<Count>(joint)[n] = hits[n].joint;
    }
    int64_t total = 0;
    Tensor squared = at::zeros({}, at::kDouble), histogram = at::zeros({bins}, at::kLong);
    for (const Found<Count>& part : found) {
      total += part.total;
      *out<double>(squared) += part.squared;
      for (int64_t bin = 0; bin < bins; ++bin) out<int64_t>(histogram)[bin] += part.histogram[bin];
    }
    return tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t>{i, j, product, joint, squared, histogram, total};
  };
  switch (counts[0].scalar_type()) {
    case at::kInt: return run(int32_t{}, int64_t{});
    case at::kLong: return run(int64_t{}, int64_t{});
    case at::kDouble: return run(double{}, double{});
    default: TORCH_CHECK_VALUE(false, "survey_pairs: counts: expected int32, int64 or float64");
  }
}

}  // namespace transcoder
