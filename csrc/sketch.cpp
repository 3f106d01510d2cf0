// The random-sign sketch of the correlation statistics: its update, and the search for pairs of similar rows.
#include <limits>

#include "tiles.h"

namespace transcoder {
namespace {

struct SimilarMemory {
  Memory<float> scratch, values;
  Memory<int32_t> ids;
  int32_t passed[TILE_ROWS];
};

}  // namespace

// rows[latent] += weighted * signs of the entry's token; ones += sum over tokens of weight * signs. A latent's row has one
// owner and one order, that of the entries: results do not depend on the number of threads.
void sketch_add(const Tensor& latent, const Tensor& token, const Tensor& weighted, const optional<Tensor>& token_weights,
                int64_t tokens, int64_t key, Tensor rows, Tensor ones) {
  const int64_t entries = latent.numel();
  TORCH_CHECK_VALUE(rows.dim() == 2, "sketch_add: rows: expected [d_sae, m], got ", rows.sizes());
  const int64_t latents = rows.size(0), columns = rows.size(1), words_a_token = (columns + 31) / 32;
  TORCH_CHECK_VALUE(tokens >= 0 && tokens < std::numeric_limits<int32_t>::max(), "sketch_add: tokens: expected below 2^31, got ",
                    tokens);
  check_shape("token", token, {entries});
  check_shape("weighted", weighted, {entries});
  check_shape("ones", ones, {columns});
  if (token_weights) check_shape("token_weights", *token_weights, {tokens});
  check_ids(latent, latents);
  check_ids(token, tokens);
  const int64_t *id = in<int64_t>(latent), *of = in<int64_t>(token);
  const double* weight = in<double>(weighted);
  const std::vector<int64_t> ptr = starts_of(id, entries, latents);
  Memory<Signed> sorted;
  sorted.need(entries + 1);
  {
    std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
    for (int64_t i = 0; i < entries; ++i) sorted.data[next[id[i]]++] = {static_cast<float>(weight[i]), static_cast<int32_t>(of[i])};
  }
  std::vector<uint32_t> words(tokens * words_a_token);
  // The low 32 bits are signs.
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(hash_bits(i, static_cast<uint64_t>(key)));
  const auto add = tables().sketching.add_signed;
  float* to = out<float>(rows);
  for_rows(latents, ptr.data(), 0, [&](int64_t first, int64_t last) {
    const auto next_fired = [&](int64_t m) {
      while (m < last && ptr[m] == ptr[m + 1]) ++m;
      return m;
    };
    for (int64_t m = next_fired(first), after; m < last; m = after) {
      after = next_fired(m + 1);
      if (after < last) {
        for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(to + after * columns + c, 1);
      }
      add(sorted.data + ptr[m], ptr[m + 1] - ptr[m], words.data(), words_a_token, columns, to + m * columns);
    }
  });
  std::vector<Signed> every(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    every[t] = {token_weights ? static_cast<float>(in<double>(*token_weights)[t]) : 1.0f, static_cast<int32_t>(t)};
  }
  std::vector<float> sum(columns, 0.0f);
  add(every.data(), tokens, words.data(), words_a_token, columns, sum.data());
  for (int64_t c = 0; c < columns; ++c) out<float>(ones)[c] += sum[c];
}

// (i, j, product) of the pairs with <left[i], right[j]> > above and j > i + apart, in tiles of a fixed shape, row by row in each.
tuple<Tensor, Tensor, Tensor> similar_rows(const Tensor& left, const Tensor& right, double above, int64_t apart) {
  TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2, "similar_rows: expected matrices");
  check_shape("right", right, {right.size(0), left.size(1)});
  const int64_t rows = left.size(0), columns = right.size(0), d = left.size(1);
  const int64_t across = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS, tasks = (rows + TILE_ROWS - 1) / TILE_ROWS * across;
  struct Hits {
    std::vector<int64_t> i, j;
    std::vector<float> value;
  };
  std::vector<Hits> hits(tasks);
  const std::vector<float> no_bias(TILE_COLUMNS, 0.0f);
  for_each_task<SimilarMemory>(tasks, [&](int64_t task, SimilarMemory& own) {
    const int64_t row = task / across * TILE_ROWS, column = task % across * TILE_COLUMNS;
    const int64_t height = std::min(TILE_ROWS, rows - row), width = std::min(TILE_COLUMNS, columns - column);
    if (column + width - 1 <= row + apart) return;
    own.scratch.need(TILE_ROWS * TILE_COLUMNS);
    own.values.need(height * width + SLACK);
    own.ids.need(height * width + SLACK);
    product<float>(in<float>(left) + row * d, in<float>(right) + column * d, height, width, d, own.scratch.data);
    kernels<float>().filter_above(own.scratch.data, height, width, no_bias.data(), column, static_cast<float>(above), nullptr,
                                  own.values.data, own.ids.data, own.passed);
    int64_t n = 0;
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t last = n + own.passed[r]; n < last; ++n) {
        // filter_above lets a NaN through.
        if (own.ids.data[n] <= row + r + apart || !(own.values.data[n] == own.values.data[n])) continue;
        hits[task].i.push_back(row + r);
        hits[task].j.push_back(own.ids.data[n]);
        hits[task].value.push_back(own.values.data[n]);
      }
    }
  });
  return {joined(hits, &Hits::i), joined(hits, &Hits::j), joined(hits, &Hits::value)};
}

}  // namespace transcoder
