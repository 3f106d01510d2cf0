// Backend `cpp`: the ops as torch sees them. Checks, tiles and threads are here, the loops are in kernels.cpp.
//
// Matrix products run in tiles of a fixed shape, each by one thread through torch's own BLAS, so neither the number of
// threads nor who computes a tile shows in a result.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace transcoder {

void fill_base(Kernels<float>*, Kernels<double>*);
#if defined(TRANSCODER_X86)
void fill_avx2(Kernels<float>*, Kernels<double>*);
void fill_avx512(Kernels<float>*, Kernels<double>*);
#endif

namespace {

using at::Tensor;
using std::optional;
using std::tuple;

// 1 MiB of fp32 stays in a core's second-level cache, and the products of such tiles run within 4 % of the rate of one whole
// product (256 rows: 8 %, 128 rows: 17 %).
constexpr int64_t TILE_ROWS = 512;
constexpr int64_t TILE_COLUMNS = 512;

// The widest instruction set of this CPU; TRANSCODER_CPU = base | avx2 caps it (for tests).
struct Tables {
  Kernels<float> single;
  Kernels<double> wide;
  std::string name = "base";
  Tables() {
#if defined(TRANSCODER_X86)
    const char* cap = std::getenv("TRANSCODER_CPU");
    const std::string at_most = cap ? cap : "avx512";
    __builtin_cpu_init();
    if (at_most != "base" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) name = "avx2";
    if (at_most == "avx512" && name == "avx2" && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      name = "avx512";
    }
    if (name == "avx512") fill_avx512(&single, &wide);
    if (name == "avx2") fill_avx2(&single, &wide);
#endif
    if (name == "base") fill_base(&single, &wide);
  }
};

const Tables& tables() {
  static const Tables found;
  return found;
}
template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>() {
  return tables().single;
}
template <>
const Kernels<double>& kernels<double>() {
  return tables().wide;
}

// Calls f with a value of the C++ type of the tensor.
template <typename F>
auto with_type(const Tensor& t, F f) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble,
                   "backend cpp: expected float32 or float64, got ", t.scalar_type());
  return t.scalar_type() == at::kFloat ? f(float{}) : f(double{});
}

template <typename T>
const T* in(const Tensor& t) {
  return t.const_data_ptr<T>();
}
template <typename T>
T* out(const Tensor& t) {
  return t.mutable_data_ptr<T>();
}

Tensor empty(at::IntArrayRef shape, at::ScalarType type) { return at::empty(shape, at::TensorOptions().dtype(type)); }

// Runs f(task, own) for every task; threads take the next task when they are done with one. `own` is a thread's memory.
// A single task gets two threads: inside a parallel region the BLAS splits no product by the number of threads.
template <typename Own, typename F>
void for_each_task(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = at::get_num_threads();
  const int64_t workers = threads == 1 ? 1 : std::clamp<int64_t>(tasks, 2, threads);
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    Own own;
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, own);
    }
  });
}
struct Nothing {};

// Splits rows [0, n) into parts of about equal work, a row costing its entries and `fixed` more, and runs f(first, last).
template <typename F>
void for_rows(int64_t n, const int64_t* ptr, int64_t fixed, const F& f) {
  const int64_t parts = std::min<int64_t>(n, at::get_num_threads() == 1 ? 1 : 8 * at::get_num_threads());
  const auto bound = [&](int64_t part) {
    const int64_t goal = (ptr[n] - ptr[0] + fixed * n) * part / parts;
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ptr[middle] - ptr[0] + fixed * middle < goal) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  for_each_task<Nothing>(parts, [&](int64_t part, Nothing&) {
    const int64_t first = bound(part), last = part + 1 == parts ? n : bound(part + 1);
    if (first < last) f(first, last);
  });
}

void check_rows(const Tensor& ptr, int64_t entries) {
  const int64_t rows = ptr.numel() - 1;
  const int64_t* p = in<int64_t>(ptr);
  bool fine = rows >= 0 && p[0] == 0 && p[rows] == entries;
  for (int64_t i = 0; fine && i < rows; ++i) fine = p[i] <= p[i + 1];
  TORCH_CHECK_VALUE(fine, "SparseCodes: row_ptr: expected to ascend from 0 to ", entries);
}

void check_ids(const Tensor& ids, int64_t limit) {
  const int64_t* p = in<int64_t>(ids);
  uint64_t worst = 0;
  for (int64_t i = 0; i < ids.numel(); ++i) worst = std::max(worst, static_cast<uint64_t>(p[i]));
  TORCH_CHECK_INDEX(ids.numel() == 0 || worst < static_cast<uint64_t>(limit),
                    "SparseCodes: indices: expected in [0, ", limit, "), got ", static_cast<int64_t>(worst));
}

// ---------------------------------------------------------------------------------------------------------- encode

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

template <typename T>
struct Memory {  // uninitialised
  Tensor tensor;
  T* data = nullptr;
  void need(int64_t n) {
    if (!tensor.defined() || tensor.numel() < n) {
      tensor = empty({n}, c10::CppTypeToScalarType<T>::value);
      data = out<T>(tensor);
    }
  }
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

tuple<Tensor, Tensor> topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
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

// A gate that about 1.5 times `share` of all entries pass, from 128 rows and 8 runs of 64 latents spread over the batch.
template <typename T>
T guess_gate(const Tensor& x, const Tensor& W, const Tensor& b, double share) {
  constexpr int64_t ROWS = 128, RUNS = 8, RUN = 64;
  const int64_t rows = std::min<int64_t>(x.size(0), ROWS), d = x.size(1);
  const int64_t run = std::min<int64_t>(W.size(0), RUN), runs = W.size(0) <= RUN ? 1 : std::min(RUNS, W.size(0) / RUN);
  std::vector<T> part(rows * d), tiles(rows * run * runs), values(rows * run * runs + SLACK);
  std::vector<int32_t> ids(values.size()), passed(rows);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(in<T>(x) + i * x.size(0) / rows * d, d, part.data() + i * d);
  const auto latent = [&](int64_t i) { return runs == 1 ? 0 : i * (W.size(0) - run) / (runs - 1); };
  for_each_task<Nothing>(runs, [&](int64_t i, Nothing&) {
    product<T>(part.data(), in<T>(W) + latent(i) * d, rows, run, d, tiles.data() + i * rows * run);
  });
  int64_t positive = 0;
  for (int64_t i = 0; i < runs; ++i) {
    positive += kernels<T>().filter_above(tiles.data() + i * rows * run, rows, run, in<T>(b) + latent(i), latent(i), T(0),
                                          nullptr, values.data() + positive, ids.data() + positive, passed.data());
  }
  const int64_t rank = static_cast<int64_t>(std::ceil(1.5 * share * static_cast<double>(rows * run * runs)));
  if (rank < 1 || rank >= positive) return T(0);
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

tuple<Tensor, Tensor, Tensor> batch_topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  const int64_t rows = x.size(0), latents = W.size(0), wanted = rows * k;
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    if (rows == 0) return compressed<T>(Pool<T>{}, 0);
    const Plan plan(rows, latents);
    const T gate = guess_gate<T>(x, W, b, static_cast<double>(k) / static_cast<double>(latents));
    Pool<T> all = join<T>(plan, collect<T>(plan, x, W, b, gate, nullptr, wanted));
    // The guess was too high for this batch: nothing is lost, everything is looked at again.
    if (all.count() < wanted && gate > 0) all = join<T>(plan, collect<T>(plan, x, W, b, T(0), nullptr, wanted));
    all.keep_top(wanted);
    if (all.count() < wanted) all = padded<T>(all, wanted, latents);
    return compressed<T>(all, rows);
  });
}

tuple<Tensor, Tensor, Tensor> above(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& limits) {
  const int64_t rows = x.size(0), everything = rows * W.size(0);
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    if (rows == 0) return compressed<T>(Pool<T>{}, 0);
    const Plan plan(rows, W.size(0));
    return compressed<T>(join<T>(plan, collect<T>(plan, x, W, b, T(0), in<T>(limits), everything)), rows);
  });
}

// ------------------------------------------------------------------------------------------------------- reductions

tuple<Tensor, Tensor, Tensor> by_latent(const Tensor& ids, const Tensor& row_ptr, int64_t latents) {
  check_rows(row_ptr, ids.numel());
  check_ids(ids, latents);
  const int64_t entries = ids.numel(), rows = row_ptr.numel() - 1;
  Tensor order = empty({entries}, at::kLong), row_of = empty({entries}, at::kLong),
         ptr = empty({latents + 1}, at::kLong);
  const int64_t *id = in<int64_t>(ids), *bounds = in<int64_t>(row_ptr);
  int64_t *p = out<int64_t>(ptr), *to = out<int64_t>(order), *to_row = out<int64_t>(row_of);
  std::vector<int64_t> next(latents + 1, 0);
  for (int64_t i = 0; i < entries; ++i) ++next[id[i] + 1];
  for (int64_t i = 0; i < latents; ++i) next[i + 1] += next[i];
  std::copy(next.begin(), next.end(), p);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = bounds[row]; i < bounds[row + 1]; ++i) {
      const int64_t place = next[id[i]]++;
      to[place] = i;
      to_row[place] = row;
    }
  }
  return {order, row_of, ptr};
}

// See segments.weighted_row_sum; `order` reads the weights through a permutation, `totals` also sums the weights alone.
tuple<Tensor, Tensor> row_sums(const Tensor& table, const Tensor& ids, const Tensor& ptr, const Tensor& weights,
                               const optional<Tensor>& order, const optional<Tensor>& start, bool sums, bool totals) {
  const int64_t rows = ptr.numel() - 1, d = table.size(1);
  Tensor sum = empty({sums ? rows : 0, d}, weights.scalar_type());
  Tensor total = empty({totals ? rows : 0}, weights.scalar_type());
  check_rows(ptr, ids.numel());
  check_ids(ids, table.size(0));
  if (order) check_ids(*order, weights.numel());
  with_type(weights, [&](auto type) {
    using T = decltype(type);
    for_rows(rows, in<int64_t>(ptr), 1, [&](int64_t first, int64_t last) {
      kernels<T>().rows_sum(first, last, in<int64_t>(ptr), in<int64_t>(ids), order ? in<int64_t>(*order) : nullptr,
                            in<T>(weights), in<T>(table), d, start ? in<T>(*start) : nullptr,
                            sums ? out<T>(sum) : nullptr, totals ? out<T>(total) : nullptr);
    });
  });
  return {sum, total};
}

Tensor row_dots(const Tensor& left, const Tensor& table, const Tensor& ids, const Tensor& ptr) {
  Tensor dots = empty({ids.numel()}, left.scalar_type());
  check_rows(ptr, ids.numel());
  check_ids(ids, table.size(0));
  with_type(left, [&](auto type) {
    using T = decltype(type);
    for_rows(left.size(0), in<int64_t>(ptr), 1, [&](int64_t first, int64_t last) {
      kernels<T>().rows_dot(first, last, in<int64_t>(ptr), in<int64_t>(ids), in<T>(left), in<T>(table), left.size(1),
                            out<T>(dots));
    });
  });
  return dots;
}

tuple<Tensor, Tensor> prefix_errors(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                    at::IntArrayRef widths, const Tensor& W, const Tensor& b, const Tensor& y,
                                    const optional<Tensor>& token_weights) {
  const int64_t rows = y.size(0), d = y.size(1), prefixes = static_cast<int64_t>(widths.size());
  check_rows(row_ptr, ids.numel());
  check_ids(ids, W.size(0));
  Tensor residual = empty({rows, d}, values.scalar_type()), errors = empty({prefixes}, values.scalar_type());
  with_type(values, [&](auto type) {
    using T = decltype(type);
    std::vector<double> squares(rows * prefixes), sums(prefixes, 0.0);
    for_rows(rows, in<int64_t>(row_ptr), 4, [&](int64_t first, int64_t last) {
      kernels<T>().prefixes_up(first, last, in<int64_t>(row_ptr), in<int64_t>(ids), in<T>(values), prefixes,
                               widths.data(), in<T>(W), in<T>(b), in<T>(y), d, out<T>(residual), squares.data());
    });
    for (int64_t row = 0; row < rows; ++row) {
      const double w = token_weights ? static_cast<double>(in<T>(*token_weights)[row]) : 1.0;
      for (int64_t p = 0; p < prefixes; ++p) sums[p] += w * squares[row * prefixes + p];
    }
    std::copy(sums.begin(), sums.end(), out<T>(errors));
  });
  return {errors, residual};
}

// scales [P] are the gradients of the errors.
tuple<Tensor, Tensor, Tensor> prefix_gradients(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                               const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr,
                                               at::IntArrayRef widths, const Tensor& W, const Tensor& residual,
                                               const Tensor& scales, const optional<Tensor>& token_weights) {
  const int64_t rows = residual.size(0), d = residual.size(1), latents = W.size(0);
  const int64_t prefixes = static_cast<int64_t>(widths.size());
  check_rows(row_ptr, ids.numel());
  check_ids(ids, latents);
  Tensor grad_values = empty({values.numel()}, values.scalar_type());
  Tensor grad_W = empty({latents, d}, values.scalar_type()), running = empty({rows, d}, values.scalar_type());
  Tensor work = empty({prefixes > 1 ? rows : 0, d}, values.scalar_type());
  std::vector<int64_t> cursor(rows);
  with_type(values, [&](auto type) {
    using T = decltype(type);
    const int64_t* bounds = in<int64_t>(row_ptr);
    const int64_t* by = in<int64_t>(latent_ptr);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t end = bounds[row + 1];
      for (; end > bounds[row] && in<int64_t>(ids)[end - 1] >= widths.back(); --end) out<T>(grad_values)[end - 1] = 0;
      cursor[row] = end;
    }
    std::fill_n(out<T>(grad_W) + widths.back() * d, (latents - widths.back()) * d, T(0));
    for (int64_t p = prefixes - 1; p >= 0; --p) {
      const int64_t low = p > 0 ? widths[p - 1] : 0;
      const bool fresh = p == prefixes - 1;
      for_rows(rows, bounds, 4, [&](int64_t first, int64_t last) {
        kernels<T>().prefixes_down(first, last, bounds, in<int64_t>(ids), in<T>(values), low, in<T>(W), d,
                                   2 * in<T>(scales)[p], token_weights ? in<T>(*token_weights) : nullptr, fresh,
                                   fresh ? in<T>(residual) : out<T>(work), p > 0 ? out<T>(work) : nullptr,
                                   out<T>(running), cursor.data(), out<T>(grad_values));
      });
      for_rows(widths[p] - low, by + low, 1, [&](int64_t first, int64_t last) {
        kernels<T>().rows_sum(low + first, low + last, by, in<int64_t>(row_of), in<int64_t>(order), in<T>(values),
                              in<T>(running), d, nullptr, out<T>(grad_W), nullptr);
      });
    }
  });
  return {grad_values, grad_W, running};
}

// ------------------------------------------------------------------------------------------------------ correlation

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

std::string instruction_set() { return tables().name; }

TORCH_LIBRARY(transcoder_cpp, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def("topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor)");
  m.def("batch_topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor, Tensor)");
  m.def("above(Tensor x, Tensor W, Tensor b, Tensor limits) -> (Tensor, Tensor, Tensor)");
  m.def("by_latent(Tensor ids, Tensor row_ptr, int latents) -> (Tensor, Tensor, Tensor)");
  m.def(
      "row_sums(Tensor table, Tensor ids, Tensor ptr, Tensor weights, Tensor? order, Tensor? start, bool sums, "
      "bool totals) -> (Tensor, Tensor)");
  m.def("row_dots(Tensor left, Tensor table, Tensor ids, Tensor ptr) -> Tensor");
  m.def(
      "prefix_errors(Tensor values, Tensor ids, Tensor row_ptr, int[] widths, Tensor W, Tensor b, Tensor y, "
      "Tensor? token_weights) -> (Tensor, Tensor)");
  m.def(
      "prefix_gradients(Tensor values, Tensor ids, Tensor row_ptr, Tensor order, Tensor row_of, Tensor latent_ptr, "
      "int[] widths, Tensor W, Tensor residual, Tensor scales, Tensor? token_weights) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_pairs(Tensor latent, Tensor local, Tensor value, Tensor weighted, Tensor tally, int latents, "
      "Tensor(a!) product, Tensor(b!) joint) -> ()");
}

TORCH_LIBRARY_IMPL(transcoder_cpp, CPU, m) {
  m.impl("topk", topk);
  m.impl("batch_topk", batch_topk);
  m.impl("above", above);
  m.impl("by_latent", by_latent);
  m.impl("row_sums", row_sums);
  m.impl("row_dots", row_dots);
  m.impl("prefix_errors", prefix_errors);
  m.impl("prefix_gradients", prefix_gradients);
  m.impl("add_pairs", add_pairs);
}

}  // namespace
}  // namespace transcoder
