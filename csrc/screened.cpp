// The encode ops by screening.
#include <ATen/ops/sub.h>

#include "screened.h"

namespace transcoder {
namespace {

struct ScreenMemory {
  Memory<uint16_t> tile;
  Memory<float> values, spare, dots;
  Memory<int32_t> ids;
  Memory<int64_t> wide_ids, every;
  std::vector<int64_t> count;
  std::vector<float> gate, twice;
};

struct ProposalMemory {
  Memory<uint16_t> tile;
  Memory<float> values;
  Memory<int32_t> ids;
  std::vector<int64_t> count;
  std::vector<float> gate, gates;
};

// A lower bound of the wanted-th largest exact value: the wanted-th largest of the proposals' lower bounds; 0 if fewer are
// positive.
double sure_gate(const Plan& plan, const Screened& screened, const std::vector<Pool<float>>& pools, int64_t wanted) {
  std::vector<float> low;
  for (int64_t task = 0; task < plan.tasks(); ++task) {
    const Pool<float>& pool = pools[task];
    for (int64_t i = 0; i < pool.count(); ++i) {
      const double v = pool.values[i] - 1.01 * screened.error(plan.first_row(task) + pool.rows[i]);
      if (v > 0) low.push_back(static_cast<float>(v * (1 - 0x1p-7)));
    }
  }
  const int64_t found = static_cast<int64_t>(low.size());
  if (found < wanted) return 0;
  std::vector<int32_t> unused(found);
  return kernels<float>().keep_top(low.data(), unused.data(), nullptr, found, wanted);
}

// The proposals that can reach `least`, with their exact values; of these, those above `gate`, or above their latent's limit.
void decide(const Plan& plan, const Screened& screened, const Tensor& x, const Tensor& W, const Tensor& b, double least,
            float gate, const float* limits, std::vector<Pool<float>>& pools) {
  const int64_t d = x.size(1);
  struct Exact {
    std::vector<int64_t> ids, ptr;
    std::vector<float> dots;
  };
  for_each_task<Exact>(plan.tasks(), [&](int64_t task, Exact& own) {
    Pool<float>& pool = pools[task];
    const int64_t first = plan.first_row(task), rows = plan.last_row(task) - first;
    own.ids.clear();
    own.ptr.assign(rows + 1, 0);
    for (int64_t i = 0; i < pool.count(); ++i) {
      const double high = pool.values[i] + 1.01 * screened.error(first + pool.rows[i]);
      if (high * (1 + 0x1p-7) < least) continue;
      own.ids.push_back(pool.ids[i]);
      ++own.ptr[pool.rows[i] + 1];
    }
    for (int64_t r = 0; r < rows; ++r) own.ptr[r + 1] += own.ptr[r];
    own.dots.resize(own.ids.size());
    kernels<float>().rows_dot(0, rows, own.ptr.data(), own.ids.data(), in<float>(x) + first * d, in<float>(W), d,
                              own.dots.data());
    Pool<float> exact;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = own.ptr[r]; i < own.ptr[r + 1]; ++i) {
        const float v = own.dots[i] + in<float>(b)[own.ids[i]];
        if (!(v > (limits ? limits[own.ids[i]] : gate))) continue;
        exact.values.push_back(v);
        exact.ids.push_back(static_cast<int32_t>(own.ids[i]));
        exact.rows.push_back(static_cast<int32_t>(r));
      }
    }
    pool = std::move(exact);
  });
}

constexpr int64_t WORTH_IT = 8;  // Screening pays off while at most one entry in so many is proposed.

}  // namespace

// The k largest of relu(dot(x, w) + b), dot being kernels.h's fp32 dot product: as exact as topk's, not bitwise its values. An
// entry further below the k-th largest proposal than both errors (Screened) cannot be among the k largest.
tuple<Tensor, Tensor> topk_screened(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  check_encoder(x, W, b, k);
  const int64_t rows = x.size(0), d = x.size(1), latents = W.size(0);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "topk_screened: expected float32, got ", x.scalar_type());
  const Screened screened(x, W, b);
  if (rows == 0 || !screened.bounds_any()) return topk(x, W, b, k);
  Tensor values = empty({rows, k}, at::kFloat), ids = empty({rows, k}, at::kLong);
  const int64_t limit = k + std::clamp<int64_t>(4 * k, 128, 4096), room = limit + SLACK;
  const int64_t threads = at::get_num_threads();
  const int64_t height = std::clamp<int64_t>((rows + threads - 1) / threads, 1, TILE_ROWS);
  for_each_task<ScreenMemory>((rows + height - 1) / height, [&](int64_t task, ScreenMemory& own) {
    const int64_t first = task * height, n = std::min(rows, first + height) - first;
    own.tile.need(n * TILE_COLUMNS);
    own.values.need(n * room);
    own.ids.need(n * room);
    own.spare.need(room);
    own.count.assign(n, 0);
    own.gate.assign(n, 0);
    own.twice.assign(n, 0);
    for (int64_t r = 0; r < n; ++r) {
      const double error = screened.error(first + r);
      own.twice[r] = static_cast<float>(2.02 * error);
      own.gate[r] = static_cast<float>(-1.01 * error);
      if (!screened.bounds(first + r)) own.count[r] = -1;
    }
    for (int64_t latent = 0; latent < latents; latent += TILE_COLUMNS) {
      const int64_t columns = std::min(TILE_COLUMNS, latents - latent);
      screened.product(first, n, latent, columns, own.tile.data);
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

optional<std::vector<Pool<float>>> proposals(const Plan& plan, const Screened& screened, const float* bias,
                                             const double* gate, int64_t most) {
  std::vector<Pool<float>> pools(plan.tasks());
  std::atomic<int64_t> total{0};
  for_each_task<ProposalMemory>(plan.tasks(), [&](int64_t task, ProposalMemory& own) {
    const int64_t first = plan.first_row(task), rows = plan.last_row(task) - first, room = TILE_COLUMNS + SLACK;
    own.tile.need(rows * TILE_COLUMNS);
    own.values.need(rows * room);
    own.ids.need(rows * room);
    own.gates.resize(rows);
    for (int64_t r = 0; r < rows; ++r) {
      own.gates[r] = static_cast<float>(gate[first + r] * (1 - 0x1p-7) - 1.01 * screened.error(first + r));
    }
    Pool<float>& pool = pools[task];
    for (int64_t panel = plan.first_panel(task); panel < plan.last_panel(task) && total.load() <= most; ++panel) {
      const int64_t latent = panel * TILE_COLUMNS, columns = std::min(TILE_COLUMNS, plan.latents - latent);
      screened.product(first, rows, latent, columns, own.tile.data);
      own.count.assign(rows, 0);
      own.gate = own.gates;
      tables().screen.filter_near(own.tile.data, rows, columns, bias + latent, latent, 1,
                                  std::numeric_limits<int64_t>::max(), room, nullptr, 0, own.values.data, own.ids.data,
                                  own.count.data(), own.gate.data(), nullptr);
      const int64_t before = pool.count();
      for (int64_t r = 0; r < rows; ++r) {
        const float* values = own.values.data + r * room;
        const int32_t* ids = own.ids.data + r * room;
        pool.values.insert(pool.values.end(), values, values + own.count[r]);
        pool.ids.insert(pool.ids.end(), ids, ids + own.count[r]);
        pool.rows.insert(pool.rows.end(), own.count[r], static_cast<int32_t>(r));
      }
      total += pool.count() - before;
    }
    pool.sort();
  });
  if (total.load() > most) return std::nullopt;
  return pools;
}

// The k * B largest of relu(dot(x, w) + b) as topk_screened's, or batch_topk itself where screening would not help.
tuple<Tensor, Tensor, Tensor> batch_topk_screened(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k) {
  check_encoder(x, W, b, k);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "batch_topk_screened: expected float32, got ", x.scalar_type());
  const int64_t rows = x.size(0), latents = W.size(0), wanted = rows * k, most = rows * latents / WORTH_IT;
  if (rows == 0 || wanted > most) return batch_topk(x, W, b, k);
  const Screened screened(x, W, b);
  if (!bounds_every(screened, rows)) return batch_topk(x, W, b, k);
  const Plan plan(rows, latents);
  const float gate = guess_gate<float>(x, W, b, static_cast<double>(k) / static_cast<double>(latents), 1);
  optional<std::vector<Pool<float>>> pools = proposals(plan, screened, in<float>(b), std::vector<double>(rows, gate).data(), most);
  if (!pools) return batch_topk(x, W, b, k);
  decide(plan, screened, x, W, b, sure_gate(plan, screened, *pools, wanted), gate, nullptr, *pools);
  Pool<float> all = join<float>(plan, *pools);
  // The guess was too high: wanted entries may be below it.
  if (all.count() < wanted && gate > 0) return batch_topk_from(x, W, b, k, true);
  all.keep_top(wanted);
  if (all.count() < wanted) all = padded<float>(all, wanted, latents);
  return compressed<float>(all, rows);
}

// Entries above their latent's limit, or `above` itself where screening would not help. With the bias less the limit in the
// bias' place this is the search for positive entries.
tuple<Tensor, Tensor, Tensor> above_screened(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& limits) {
  check_encoder(x, W, b, 1);
  check_shape("limits", limits, {W.size(0)});
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "above_screened: expected float32, got ", x.scalar_type());
  const int64_t rows = x.size(0), latents = W.size(0);
  const Tensor shifted = at::sub(b, limits);
  const Screened screened(x, W, shifted);
  if (rows == 0 || !bounds_every(screened, rows)) return above(x, W, b, limits);
  const Plan plan(rows, latents);
  optional<std::vector<Pool<float>>> pools =
      proposals(plan, screened, in<float>(shifted), std::vector<double>(rows, 0).data(), rows * latents / WORTH_IT);
  if (!pools) return above(x, W, b, limits);
  decide(plan, screened, x, W, b, -std::numeric_limits<double>::infinity(), 0, in<float>(limits), *pools);
  return compressed<float>(join<float>(plan, *pools), rows);
}

}  // namespace transcoder
