// The duplicate monitor's counts of a batch: entries, moments of each latent, sequences, and the sums of followed pairs.
// One pass each over the batch's few thousand entries, in order: one thread, and the sums of backend `torch` to the bit.
#include "ops.h"

namespace transcoder {

// The entries that fire, on tokens of weight above 0: (latent, row, value, weighted, local), see torch_backend.Entries.
tuple<Tensor, Tensor, Tensor, Tensor, Tensor> firing_entries(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                                             const optional<Tensor>& token_weights) {
  const int64_t entries = ids.numel(), rows = row_ptr.numel() - 1;
  check_shape("values", values, {entries});
  check_rows(row_ptr, entries);
  if (token_weights) check_shape("token_weights", *token_weights, {rows});
  return with_type(values, [&](auto type) {
    using T = decltype(type);
    const T* value = in<T>(values);
    const int64_t *id = in<int64_t>(ids), *ptr = in<int64_t>(row_ptr);
    const double* weight = token_weights ? in<double>(*token_weights) : nullptr;
    int64_t n = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (weight && !(weight[row] > 0)) continue;
      for (int64_t i = ptr[row]; i < ptr[row + 1]; ++i) n += value[i] > 0;
    }
    Tensor latent = empty({n}, at::kLong), row_of = empty({n}, at::kLong), local = empty({n}, at::kLong);
    Tensor wide = empty({n}, at::kDouble), weighted = weight ? empty({n}, at::kDouble) : wide;
    int64_t *to_latent = out<int64_t>(latent), *to_row = out<int64_t>(row_of), *to_local = out<int64_t>(local);
    double *to_value = out<double>(wide), *to_weighted = out<double>(weighted);
    n = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (weight && !(weight[row] > 0)) continue;
      int64_t before = 0;
      for (int64_t i = ptr[row]; i < ptr[row + 1]; ++i) {
        if (!(value[i] > 0)) continue;
        to_latent[n] = id[i];
        to_row[n] = row;
        to_value[n] = static_cast<double>(value[i]);
        if (weight) to_weighted[n] = to_value[n] * weight[row];
        to_local[n++] = before++;
      }
    }
    return tuple<Tensor, Tensor, Tensor, Tensor, Tensor>{latent, row_of, wide, weighted, local};
  });
}

// total += weighted, square += weighted * value, count += tally, at each entry's latent.
void add_moments(const Tensor& latent, const Tensor& value, const Tensor& weighted, const Tensor& tally, Tensor total,
                 Tensor square, Tensor count) {
  const int64_t entries = latent.numel(), latents = total.numel();
  for (const Tensor& part : {value, weighted}) check_shape("entries", part, {entries});
  if (tally.numel() != 1) check_shape("tally", tally, {entries});
  for (const Tensor& part : {square, count}) check_shape("moments", part, {latents});
  TORCH_CHECK_TYPE(tally.scalar_type() == count.scalar_type(), "add_moments: tally: expected ", count.scalar_type(), ", got ",
                   tally.scalar_type());
  check_ids(latent, latents);
  const int64_t* id = in<int64_t>(latent);
  const double *v = in<double>(value), *w = in<double>(weighted);
  double *to_total = out<double>(total), *to_square = out<double>(square);
  for (int64_t i = 0; i < entries; ++i) {
    to_total[id[i]] += w[i];
    to_square[id[i]] += w[i] * v[i];
  }
  const int64_t stride = tally.numel() == 1 ? 0 : 1;
  const auto add = [&](auto type) {
    using Count = decltype(type);
    const Count* by = in<Count>(tally);
    Count* to = out<Count>(count);
    for (int64_t i = 0; i < entries; ++i) to[id[i]] += by[i * stride];
  };
  if (count.scalar_type() == at::kLong) return add(int64_t{});
  add(double{});
}

// marks[latent * bits + hash_bits(sequences[row]) % bits] = 1 where the entry fires on a token of weight above 0, bits a power
// of two. Returns the number of pairs of entries that fire on one token, whatever its weight.
int64_t mark_sequences(const Tensor& values, const Tensor& ids, const Tensor& row_ptr, const Tensor& sequences,
                       const optional<Tensor>& token_weights, int64_t bits, Tensor marks) {
  const int64_t entries = ids.numel(), rows = row_ptr.numel() - 1;
  check_shape("values", values, {entries});
  check_shape("sequences", sequences, {rows});
  check_rows(row_ptr, entries);
  TORCH_CHECK_VALUE(bits >= 1 && (bits & (bits - 1)) == 0, "mark_sequences: bits: expected a power of two, got ", bits);
  check_ids(ids, marks.numel() / bits);
  if (token_weights) check_shape("token_weights", *token_weights, {rows});
  const double* weight = token_weights ? in<double>(*token_weights) : nullptr;
  const int64_t *id = in<int64_t>(ids), *ptr = in<int64_t>(row_ptr), *sequence = in<int64_t>(sequences);
  uint8_t* to = out<uint8_t>(marks);
  int64_t pairs = 0;
  with_type(values, [&](auto type) {
    using T = decltype(type);
    const T* value = in<T>(values);
    for (int64_t row = 0; row < rows; ++row) {
      const bool counts = !weight || weight[row] > 0;
      uint8_t* mark = to + (hash_bits(static_cast<uint64_t>(sequence[row])) & static_cast<uint64_t>(bits - 1));
      int64_t fired = 0;
      for (int64_t i = ptr[row]; i < ptr[row + 1]; ++i) {
        if (!(value[i] > 0)) continue;
        ++fired;
        if (counts) mark[id[i] * bits] = 1;
      }
      pairs += fired * (fired - 1) / 2;
    }
  });
  return pairs;
}

// Entries by latent: `order`, their rows, and where each latent's begin.
static void check_by_latent(const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr, int64_t entries, int64_t tokens) {
  check_shape("order", order, {entries});
  check_shape("row_of", row_of, {entries});
  check_rows(latent_ptr, entries);
  check_ids(order, entries);
  check_ids(row_of, tokens);
}

// For each pair (i, j) and the group [0, groups) of each token, sums [6, P, groups] of: weight; weight times value and its
// square of i; the same of j; and the product. Tokens on which neither fires add to the first alone, the same for every pair.
// The entries by latent: `order`, their rows, and where each latent's begin.
void add_by_group(const Tensor& values, const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr, const Tensor& i,
                  const Tensor& j, const Tensor& group, const optional<Tensor>& token_weights, Tensor sums) {
  const int64_t entries = values.numel(), latents = latent_ptr.numel() - 1, pairs = i.numel(), tokens = group.numel();
  TORCH_CHECK_VALUE(sums.dim() == 3, "add_by_group: sums: expected [6, P, groups], got ", sums.sizes());
  const int64_t groups = sums.size(2);
  check_shape("sums", sums, {6, pairs, groups});
  check_by_latent(order, row_of, latent_ptr, entries, tokens);
  check_ids(i, latents);
  check_ids(j, latents);
  check_shape("j", j, {pairs});
  check_ids(group, groups);
  if (token_weights) check_shape("token_weights", *token_weights, {tokens});
  const double* weight = token_weights ? in<double>(*token_weights) : nullptr;
  const int64_t *of = in<int64_t>(order), *row = in<int64_t>(row_of), *ptr = in<int64_t>(latent_ptr), *at = in<int64_t>(group);
  double* to = out<double>(sums);
  std::vector<double> every(groups, 0.0);
  for (int64_t t = 0; t < tokens; ++t) every[at[t]] += weight ? weight[t] : 1.0;
  with_type(values, [&](auto type) {
    using T = decltype(type);
    const T* value = in<T>(values);
    at::parallel_for(0, pairs, 64, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) {
        const auto cell = [&](int64_t which) { return to + (which * pairs + p) * groups; };
        for (int64_t g = 0; g < groups; ++g) cell(0)[g] += every[g];
        const int64_t sides[2] = {in<int64_t>(i)[p], in<int64_t>(j)[p]};
        for (int64_t side = 0; side < 2; ++side) {
          double *sum = cell(1 + 2 * side), *square = cell(2 + 2 * side);
          for (int64_t n = ptr[sides[side]]; n < ptr[sides[side] + 1]; ++n) {
            const double v = static_cast<double>(value[of[n]]), w = weight ? weight[row[n]] : 1.0;
            sum[at[row[n]]] += v * w;
            square[at[row[n]]] += v * v * w;
          }
        }
        double* both = cell(5);
        const int64_t end = ptr[sides[0] + 1], other_end = ptr[sides[1] + 1];
        for (int64_t a = ptr[sides[0]], b = ptr[sides[1]]; a < end && b < other_end;) {
          if (row[a] == row[b]) {
            const double w = weight ? weight[row[a]] : 1.0;
            both[at[row[a]]] += static_cast<double>(value[of[a]]) * static_cast<double>(value[of[b]]) * w;
            ++a;
            ++b;
          } else {
            row[a] < row[b] ? ++a : ++b;
          }
        }
      }
    });
  });
}

// The pair penalty (antidup/penalties.py): the mean over P pairs of relu(c - margin)^2, c the cosine of the activations of i and
// j over the batch, and its gradient at each entry (0 where it does not fire). Entries by latent as in `add_by_group`. Pair by
// pair, at the cost of both latents' firings.
tuple<double, Tensor> pair_penalty(const Tensor& values, const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr,
                                   const Tensor& i, const Tensor& j, double margin, const optional<Tensor>& token_weights,
                                   int64_t tokens) {
  const int64_t entries = values.numel(), latents = latent_ptr.numel() - 1, pairs = i.numel();
  check_by_latent(order, row_of, latent_ptr, entries, tokens);
  check_ids(i, latents);
  check_ids(j, latents);
  check_shape("j", j, {pairs});
  if (token_weights) check_shape("token_weights", *token_weights, {tokens});
  const double* weight = token_weights ? in<double>(*token_weights) : nullptr;
  const int64_t *of = in<int64_t>(order), *row = in<int64_t>(row_of), *ptr = in<int64_t>(latent_ptr);
  double total = 0;
  Tensor gradient = at::zeros({entries}, values.options());
  with_type(values, [&](auto type) {
    using T = decltype(type);
    const T* value = in<T>(values);
    const auto fired = [&](int64_t n) { return std::max(0.0, static_cast<double>(value[of[n]])); };
    const auto counts = [&](int64_t n) { return weight ? weight[row[n]] : 1.0; };
    // 1 / the length of each latent's activations, once it is asked for; the entries' slopes, by latent.
    std::vector<double> inverse(latents, -1.0), own(latents, 0.0), slope(entries, 0.0);
    const auto length = [&](int64_t latent) {
      if (inverse[latent] < 0) {
        double square = 0;
        for (int64_t n = ptr[latent]; n < ptr[latent + 1]; ++n) square += fired(n) * fired(n) * counts(n);
        inverse[latent] = square > 0 ? 1 / std::sqrt(square) : 0;
      }
      return inverse[latent];
    };
    const auto both = [&](int64_t left, int64_t right, auto&& met) {
      const int64_t end = ptr[left + 1], other_end = ptr[right + 1];
      for (int64_t a = ptr[left], b = ptr[right]; a < end && b < other_end;) {
        if (row[a] == row[b]) {
          met(a, b);
          ++a;
          ++b;
        } else {
          row[a] < row[b] ? ++a : ++b;
        }
      }
    };
    for (int64_t p = 0; p < pairs; ++p) {
      const int64_t left = in<int64_t>(i)[p], right = in<int64_t>(j)[p];
      const double scale = length(left) * length(right);
      double product = 0;
      both(left, right, [&](int64_t a, int64_t b) { product += fired(a) * fired(b) * counts(a); });
      const double cosine = product * scale, excess = cosine - margin;
      if (!(excess > 0)) continue;
      total += excess * excess;
      const double rise = 2 * excess / static_cast<double>(pairs);
      both(left, right, [&](int64_t a, int64_t b) {
        slope[a] += rise * scale * fired(b);
        slope[b] += rise * scale * fired(a);
      });
      own[left] += rise * cosine * inverse[left] * inverse[left];
      own[right] += rise * cosine * inverse[right] * inverse[right];
    }
    T* to = out<T>(gradient);
    for (int64_t latent = 0; latent < latents; ++latent) {
      if (own[latent] == 0) continue;
      for (int64_t n = ptr[latent]; n < ptr[latent + 1]; ++n) {
        if (fired(n) > 0) to[of[n]] = static_cast<T>((slope[n] - own[latent] * fired(n)) * counts(n));
      }
    }
  });
  return {pairs > 0 ? total / static_cast<double>(pairs) : 0.0, gradient};
}

}  // namespace transcoder
