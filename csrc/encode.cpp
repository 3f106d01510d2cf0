// The encode ops: the product in tiles, selection while a tile is in the cache.
#include "tiles.h"

namespace transcoder {
namespace {

// Selected candidates of the rows of one task.
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
template <typename T>
struct PoolMemory {
  Memory<T> scratch, values;
  Memory<int32_t> ids;
  int32_t passed[TILE_ROWS];
};

// Every entry above a gate (or its latent's limit), by task and sorted. A pool may drop all but its `wanted` largest.
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

// How often a guess was too high and a batch was processed again: for tests.
std::atomic<int64_t> again{0};

}  // namespace

int64_t looked_again() { return again.load(); }

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

tuple<Tensor, Tensor, Tensor> batch_topk_from(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k, bool missed) {
  const int64_t rows = x.size(0), latents = W.size(0), wanted = rows * k;
  return with_type(x, [&](auto type) {
    using T = decltype(type);
    if (rows == 0) return compressed<T>(Pool<T>{}, 0);
    const Plan plan(rows, latents);
    const double share = static_cast<double>(k) / static_cast<double>(latents);
    Pool<T> all;
    // After a guess that is too high the batch is processed again, finally without a gate.
    for (int look = missed ? 1 : 0; look < 3; ++look) {
      const T gate = look < 2 ? guess_gate<T>(x, W, b, share, look == 0 ? 1 : 4) : T(0);
      if (look > 0) ++again;
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

}  // namespace transcoder
