// The encode ops. Matrix products run in tiles of a fixed shape, each by one thread through torch's own BLAS, so neither the
// number of threads nor who computes a tile shows in a result.
#pragma once

#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>

#include <atomic>
#include <cmath>

#include "common.h"

namespace transcoder {
namespace {

// 1 MiB of fp32 stays in a core's second-level cache, and the products of such tiles run within 4 % of the rate of one whole
// product (256 rows: 8 %, 128 rows: 17 %).
constexpr int64_t TILE_ROWS = 512;
constexpr int64_t TILE_COLUMNS = 512;

// The pre-activations of one tile less their bias, in `scratch`, rows * columns without gaps.
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

// Survivors of the rows of one task.
template <typename T>
struct Lists {
  Memory<T> values;
  Memory<int32_t> ids;
  std::vector<int64_t> count;
  std::vector<T> gate;
  void clear(int64_t rows, int64_t room) {
    values.need(rows * room);
    ids.need(rows * room);
    count.assign(rows, 0);
    gate.assign(rows, T(0));
  }
};

template <typename T>
struct TopkMemory {
  Memory<T> scratch;
  Lists<T> lists;
};

// One row's answer: its k largest in ascending order of id; zeros at the lowest free ids where fewer are positive.
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

void check_encoder(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  TORCH_CHECK_VALUE(x.dim() == 2 && W.dim() == 2 && W.size(0) > 0, "encode: expected x [B, d], W [d_sae, d]");
  check_shape("W", W, {W.size(0), x.size(1)});
  check_shape("b", b, {W.size(0)});
  TORCH_CHECK_VALUE(k >= 1 && k <= W.size(0), "encode: k: expected between 1 and ", W.size(0), ", got ", k);
}

tuple<Tensor, Tensor> topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  check_encoder(x, W, b, k);
  const int64_t rows = x.size(0), d = x.size(1), latents = W.size(0);
  Tensor values = empty({rows, k}, x.scalar_type()), ids = empty({rows, k}, at::kLong);
  if (rows == 0) return {values, ids};
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Plan plan(rows, latents);
    // At 3 k or more survivors a cut removes most of a list; with a list this long a row is cut about three times.
    const int64_t limit = k + std::clamp<int64_t>(2 * k, 64, 1024), room = limit + SLACK;
    std::vector<Lists<T>> lists(plan.ranges == 1 ? 0 : plan.tasks());
    for_each_task<TopkMemory<T>>(plan.tasks(), [&](int64_t task, TopkMemory<T>& own) {
      Lists<T>& list = plan.ranges == 1 ? own.lists : lists[task];
      const int64_t first = plan.first_row(task), last = plan.last_row(task);
      list.clear(last - first, room);
      for_each_tile<T>(plan, task, in<T>(x), in<T>(W), d, own.scratch,
                       [&](const T* tile, int64_t n, int64_t latent, int64_t columns) {
                         kernels<T>().filter_top(tile, n, columns, in<T>(b) + latent, latent, k, limit, room,
                                                 list.values.data, list.ids.data, list.count.data(),
                                                 list.gate.data());
                       });
      if (plan.ranges > 1) return;
      for (int64_t row = first; row < last; ++row) {
        const int64_t at = (row - first) * room;
        write_row<T>(list.values.data + at, list.ids.data + at, list.count[row - first], k, out<T>(values) + row * k,
                     out<int64_t>(ids) + row * k);
      }
    });
    if (plan.ranges == 1) return;
    at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
      Memory<T> own_values;
      Memory<int32_t> own_ids;
      own_values.need(plan.ranges * room);
      own_ids.need(plan.ranges * room);
      for (int64_t row = first; row < last; ++row) {
        int64_t n = 0;
        for (int64_t range = 0; range < plan.ranges; ++range) {
          const Lists<T>& list = lists[row / TILE_ROWS * plan.ranges + range];
          const int64_t local = row % TILE_ROWS, count = list.count[local];
          std::copy_n(list.values.data + local * room, count, own_values.data + n);
          std::copy_n(list.ids.data + local * room, count, own_ids.data + n);
          n += count;
        }
        write_row<T>(own_values.data, own_ids.data, n, k, out<T>(values) + row * k, out<int64_t>(ids) + row * k);
      }
    });
  });
  return {values, ids};
}

// Survivors of one task with their rows, in no order but: ascending ids within a row.
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
    std::vector<int64_t> next(TILE_ROWS + 1, 0);
    for (const int32_t row : rows) ++next[row + 1];
    for (int64_t row = 0; row < TILE_ROWS; ++row) next[row + 1] += next[row];
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

template <typename T>
struct PoolMemory {
  Memory<T> scratch, values;
  Memory<int32_t> ids;
  int32_t passed[TILE_ROWS];
};

// Every entry above a gate (or its latent's limit), by task and sorted. A pool may forget all but its `wanted` largest.
template <typename T>
std::vector<Pool<T>> collect(const Plan& plan, const Tensor& x, const Tensor& W, const Tensor& b, T gate,
                             const T* limits, int64_t wanted) {
  std::vector<Pool<T>> pools(plan.tasks());
  for_each_task<PoolMemory<T>>(plan.tasks(), [&](int64_t task, PoolMemory<T>& own) {
    Pool<T>& pool = pools[task];
    const auto filter = [&](const T* tile, int64_t rows, int64_t latent, int64_t columns) {
      own.values.need(rows * columns + SLACK);
      own.ids.need(rows * columns + SLACK);
      const T* own_limits = limits ? limits + latent : nullptr;
      const int64_t found = kernels<T>().filter_above(tile, rows, columns, in<T>(b) + latent, latent, gate, own_limits,
                                                      own.values.data, own.ids.data, own.passed);
      pool.values.insert(pool.values.end(), own.values.data, own.values.data + found);
      pool.ids.insert(pool.ids.end(), own.ids.data, own.ids.data + found);
      for (int64_t row = 0; row < rows; ++row) {
        pool.rows.insert(pool.rows.end(), own.passed[row], static_cast<int32_t>(row));
      }
      if (pool.count() > 2 * wanted) {
        pool.sort();
        pool.keep_top(wanted);
      }
    };
    for_each_tile<T>(plan, task, in<T>(x), in<T>(W), x.size(1), own.scratch, filter);
    pool.sort();
  });
  return pools;
}

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
  int64_t* p = out<int64_t>(ptr);
  std::fill_n(p, rows + 1, 0);
  for (const int32_t row : all.rows) ++p[row + 1];
  for (int64_t row = 0; row < rows; ++row) p[row + 1] += p[row];
  return {values, ids, ptr};
}

// How often a guess was too high, so that a batch was looked at again: for tests.
inline std::atomic<int64_t>& looked_again() {
  static std::atomic<int64_t> count{0};
  return count;
}

// A gate that somewhat more than `share` of all entries pass, from 128 rows and 512 latents: one of each of 512 equal stretches
// of the dictionary, at a scattered place, since neighbours are alike (the first latents of a Matryoshka dictionary fire most).
// The margin covers the sample's own noise; `wider` asks for that many times as many entries.
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

// `missed`: the first guess is known to be too high.
tuple<Tensor, Tensor, Tensor> batch_topk_from(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k, bool missed) {
  const int64_t rows = x.size(0), latents = W.size(0), wanted = rows * k;
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    if (rows == 0) return compressed<T>(Pool<T>{}, 0);
    const Plan plan(rows, latents);
    const double share = static_cast<double>(k) / static_cast<double>(latents);
    Pool<T> all;
    // A guess too high for this batch loses nothing: everything is looked at again, at last without a gate.
    for (int look = missed ? 1 : 0; look < 3; ++look) {
      const T gate = look < 2 ? guess_gate<T>(x, W, b, share, look == 0 ? 1 : 4) : T(0);
      if (look > 0) ++looked_again();
      all = join<T>(plan, collect<T>(plan, x, W, b, gate, nullptr, wanted));
      if (all.count() >= wanted || !(gate > 0)) break;
    }
    all.keep_top(wanted);
    if (all.count() < wanted) all = padded<T>(all, wanted, latents);
    return compressed<T>(all, rows);
  });
}

tuple<Tensor, Tensor, Tensor> batch_topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  check_encoder(x, W, b, k);
  return batch_topk_from(x, W, b, k, false);
}

tuple<Tensor, Tensor, Tensor> above(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& limits) {
  check_encoder(x, W, b, 1);
  check_shape("limits", limits, {W.size(0)});
  const int64_t rows = x.size(0), everything = rows * W.size(0);
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    if (rows == 0) return compressed<T>(Pool<T>{}, 0);
    const Plan plan(rows, W.size(0));
    return compressed<T>(join<T>(plan, collect<T>(plan, x, W, b, T(0), in<T>(limits), everything)), rows);
  });
}

}  // namespace
}  // namespace transcoder
