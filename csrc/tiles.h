// Matrix products in tiles of a fixed shape, each by one thread through torch's BLAS, so that results do not depend on the
// number of threads; and the pools of entries that pass a filter while a tile is in the cache.
#pragma once

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <cmath>

#include "ops.h"

namespace transcoder {

// 1 MiB of fp32 stays in a core's second-level cache, and the products of such tiles run within 4 % of the rate of one whole
// product (256 rows: 8 %, 128 rows: 17 %).
constexpr int64_t TILE_ROWS = 512;
constexpr int64_t TILE_COLUMNS = 512;

// The pre-activations of one tile without their bias, in `scratch`, rows * columns without gaps.
template <typename T>
void product(const T* x, const T* W, int64_t rows, int64_t columns, int64_t d, T* scratch) {
  const c10::InferenceMode guard;
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  Tensor result = at::from_blob(scratch, {rows, columns}, options);
  if (d == 0) {
    std::fill_n(scratch, rows * columns, T(0));
    return;
  }
  const Tensor left = at::from_blob(const_cast<T*>(x), {rows, d}, options);
  const Tensor right = at::from_blob(const_cast<T*>(W), {d, columns}, {1, d}, options);
  at::mm_out(result, left, right);
}

// Rows in blocks; where there are fewer blocks than threads can share, latents in ranges as well.
struct Plan {
  int64_t rows, latents, blocks, panels, ranges;
  Plan(int64_t rows, int64_t latents) : rows(rows), latents(latents) {
    blocks = (rows + TILE_ROWS - 1) / TILE_ROWS;
    panels = (latents + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int64_t threads = at::get_num_threads();
    const auto busy = [&](int64_t r) {
      const int64_t tasks = blocks * r, turns = (tasks + threads - 1) / threads;
      return static_cast<double>(tasks) / static_cast<double>(turns * threads);
    };
    ranges = 1;
    while (ranges < panels && busy(ranges) < 0.85) ++ranges;
  }
  int64_t tasks() const { return blocks * ranges; }
  int64_t first_row(int64_t task) const { return task / ranges * TILE_ROWS; }
  int64_t last_row(int64_t task) const { return std::min(rows, first_row(task) + TILE_ROWS); }
  int64_t first_panel(int64_t task) const { return panels * (task % ranges) / ranges; }
  int64_t last_panel(int64_t task) const { return panels * (task % ranges + 1) / ranges; }
};

// The tiles of one task, each with its first latent, in ascending order.
template <typename T, typename F>
void for_each_tile(const Plan& plan, int64_t task, const T* x, const T* W, int64_t d, Memory<T>& scratch, const F& f) {
  const int64_t first = plan.first_row(task), rows = plan.last_row(task) - first;
  scratch.need(rows * std::min(TILE_COLUMNS, plan.latents));
  for (int64_t panel = plan.first_panel(task); panel < plan.last_panel(task); ++panel) {
    const int64_t latent = panel * TILE_COLUMNS, columns = std::min(TILE_COLUMNS, plan.latents - latent);
    product<T>(x + first * d, W + latent * d, rows, columns, d, scratch.data);
    f(scratch.data, rows, latent, columns);
  }
}

// The result of one row: its k largest in ascending order of id; zeros at the lowest free ids where fewer are positive.
template <typename T>
void write_row(T* values, int32_t* ids, int64_t count, int64_t k, T* to_values, int64_t* to_ids) {
  if (count > k) {
    kernels<T>().keep_top(values, ids, nullptr, count, k);
    count = k;
  }
  int64_t missing = k - count, i = 0, n = 0;
  for (int32_t id = 0; missing > 0; ++id, ++n) {
    const bool taken = i < count && ids[i] == id;
    to_values[n] = taken ? values[i] : T(0);
    to_ids[n] = id;
    i += taken;
    missing -= !taken;
  }
  for (; i < count; ++i, ++n) {
    to_values[n] = values[i];
    to_ids[n] = ids[i];
  }
}

inline void check_encoder(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  TORCH_CHECK_VALUE(x.dim() == 2 && W.dim() == 2 && W.size(0) > 0, "encode: expected x [B, d], W [d_sae, d]");
  check_shape("W", W, {W.size(0), x.size(1)});
  check_shape("b", b, {W.size(0)});
  TORCH_CHECK_VALUE(k >= 1 && k <= W.size(0), "encode: k: expected between 1 and ", W.size(0), ", got ", k);
}
// Selected entries of one task with their rows; only within a row in order, by ascending id.
template <typename T>
struct Pool {
  std::vector<T> values;
  std::vector<int32_t> ids, rows;

  int64_t count() const { return static_cast<int64_t>(values.size()); }
  void resize(int64_t n) {
    values.resize(n);
    ids.resize(n);
    rows.resize(n);
  }
  // Row by row, stable.
  void sort() {
    std::vector<int64_t> next = starts_of(rows.data(), count(), TILE_ROWS);
    Pool<T> sorted;
    sorted.resize(count());
    for (int64_t i = 0; i < count(); ++i) {
      const int64_t place = next[rows[i]]++;
      sorted.values[place] = values[i];
      sorted.ids[place] = ids[i];
      sorted.rows[place] = rows[i];
    }
    *this = std::move(sorted);
  }
  void keep_top(int64_t k) {
    if (count() <= k) return;
    kernels<T>().keep_top(values.data(), ids.data(), rows.data(), count(), k);
    resize(k);
  }
};
// All pools as one, row by row.
template <typename T>
Pool<T> join(const Plan& plan, const std::vector<Pool<T>>& pools) {
  int64_t total = 0;
  for (const Pool<T>& pool : pools) total += pool.count();
  Pool<T> all;
  all.resize(total);
  std::vector<int64_t> cursor(plan.ranges);
  int64_t n = 0;
  for (int64_t block = 0; block < plan.blocks; ++block) {
    std::fill(cursor.begin(), cursor.end(), 0);
    const int64_t first = block * TILE_ROWS, last = std::min(plan.rows, first + TILE_ROWS);
    for (int64_t row = first; row < last; ++row) {
      for (int64_t range = 0; range < plan.ranges; ++range) {
        const Pool<T>& pool = pools[block * plan.ranges + range];
        int64_t& i = cursor[range];
        for (; i < pool.count() && pool.rows[i] == row - first; ++i, ++n) {
          all.values[n] = pool.values[i];
          all.ids[n] = pool.ids[i];
          all.rows[n] = static_cast<int32_t>(row);
        }
      }
    }
  }
  return all;
}

template <typename T>
tuple<Tensor, Tensor, Tensor> compressed(const Pool<T>& all, int64_t rows) {
  Tensor values = empty({all.count()}, c10::CppTypeToScalarType<T>::value), ids = empty({all.count()}, at::kLong),
         ptr = empty({rows + 1}, at::kLong);
  std::copy(all.values.begin(), all.values.end(), out<T>(values));
  std::copy(all.ids.begin(), all.ids.end(), out<int64_t>(ids));
  const std::vector<int64_t> starts = starts_of(all.rows.data(), all.count(), rows);
  std::copy(starts.begin(), starts.end(), out<int64_t>(ptr));
  return {values, ids, ptr};
}

// A gate that somewhat more than `share` of all entries pass, from 128 rows and 512 latents: one of each of 512 equal ranges
// of the dictionary, at a scattered place, since neighbouring latents are similar (the first latents of a Matryoshka dictionary
// fire most). The margin covers the sample's own noise; `wider` asks for that many times as many entries.
template <typename T>
T guess_gate(const Tensor& x, const Tensor& W, const Tensor& b, double share, double wider) {
  constexpr int64_t ROWS = 128, LATENTS = 512, RUN = 64;
  const int64_t rows = std::min<int64_t>(x.size(0), ROWS), d = x.size(1);
  const int64_t sampled = std::min<int64_t>(W.size(0), LATENTS), runs = (sampled + RUN - 1) / RUN;
  std::vector<T> part(rows * d), weights(sampled * d), biases(sampled), tiles(rows * sampled), values(rows * sampled + SLACK);
  std::vector<int32_t> ids(values.size()), passed(rows);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(in<T>(x) + i * x.size(0) / rows * d, d, part.data() + i * d);
  for (int64_t i = 0; i < sampled; ++i) {
    const int64_t first = i * W.size(0) / sampled, length = (i + 1) * W.size(0) / sampled - first;
    const uint64_t scattered = (static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15ull) >> 33;
    const int64_t latent = first + static_cast<int64_t>(scattered % static_cast<uint64_t>(length));
    std::copy_n(in<T>(W) + latent * d, d, weights.data() + i * d);
    biases[i] = in<T>(b)[latent];
  }
  const auto width = [&](int64_t run) { return std::min(RUN, sampled - run * RUN); };
  for_each_task<Nothing>(runs, [&](int64_t run, Nothing&) {
    product<T>(part.data(), weights.data() + run * RUN * d, rows, width(run), d, tiles.data() + run * RUN * rows);
  });
  int64_t positive = 0;
  for (int64_t run = 0; run < runs; ++run) {
    positive += kernels<T>().filter_above(tiles.data() + run * RUN * rows, rows, width(run), biases.data() + run * RUN, 0, T(0),
                                          nullptr, values.data() + positive, ids.data() + positive, passed.data());
  }
  const double expected = wider * share * static_cast<double>(rows * sampled);
  const int64_t rank = static_cast<int64_t>(std::ceil(1.25 * expected + 4 * std::sqrt(expected) + 4));
  if (rank >= positive) return T(0);
  const T gate = kernels<T>().keep_top(values.data(), ids.data(), nullptr, positive, rank);
  return std::isfinite(gate) ? gate : T(0);
}

// Fewer positives than asked for: the rest are zeros at the lowest free places.
template <typename T>
Pool<T> padded(const Pool<T>& all, int64_t wanted, int64_t latents) {
  Pool<T> full;
  full.resize(wanted);
  int64_t i = 0, missing = wanted - all.count();
  for (int64_t n = 0; n < wanted; ++n) {
    // While zeros are missing, every place so far is filled: the n-th entry stands at place n.
    const bool taken = missing == 0 || (i < all.count() && all.rows[i] * latents + all.ids[i] == n);
    full.values[n] = taken ? all.values[i] : T(0);
    full.rows[n] = taken ? all.rows[i] : static_cast<int32_t>(n / latents);
    full.ids[n] = taken ? all.ids[i] : static_cast<int32_t>(n % latents);
    i += taken;
    missing -= !taken;
  }
  return full;
}

}  // namespace transcoder
