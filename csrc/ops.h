// Every op, declared: bindings.cpp registers them, each file named here defines its own and says what they compute.
#pragma once

#include "common.h"

namespace transcoder {

// encode.cpp
tuple<Tensor, Tensor> topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k);
tuple<Tensor, Tensor, Tensor> batch_topk(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k);
tuple<Tensor, Tensor, Tensor> above(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& limits);
// `missed`: the first guess is known to be too high.
tuple<Tensor, Tensor, Tensor> batch_topk_from(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k, bool missed);
int64_t looked_again();

// screened.cpp
tuple<Tensor, Tensor> topk_screened(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k);
tuple<Tensor, Tensor, Tensor> batch_topk_screened(const Tensor& x, const Tensor& W, const Tensor& b, int64_t k);
tuple<Tensor, Tensor, Tensor> above_screened(const Tensor& x, const Tensor& W, const Tensor& b, const Tensor& limits);

// decode.cpp
tuple<Tensor, Tensor, Tensor> by_latent(const Tensor& ids, const Tensor& row_ptr, int64_t latents);
tuple<Tensor, Tensor> row_sums(const Tensor& table, const Tensor& ids, const Tensor& ptr, const Tensor& weights,
                               const optional<Tensor>& order, const optional<Tensor>& start, bool sums, bool totals);
Tensor row_dots(const Tensor& left, const Tensor& table, const Tensor& ids, const Tensor& ptr);
tuple<Tensor, Tensor> prefix_errors(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                    at::IntArrayRef widths, const Tensor& W, const Tensor& b, const Tensor& y,
                                    const optional<Tensor>& token_weights);
tuple<Tensor, Tensor, Tensor> prefix_gradients(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                               const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr,
                                               at::IntArrayRef widths, const Tensor& W, const Tensor& residual,
                                               const Tensor& scales, const optional<Tensor>& token_weights);

// correlation.cpp
tuple<int64_t, int64_t> keep_entries(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                     const optional<Tensor>& token_weights, const optional<Tensor>& token_tally, Tensor total,
                                     Tensor square, Tensor count, Tensor partners, Tensor starts,
                                     const optional<Tensor>& kept_weights, const optional<Tensor>& kept_tally, int64_t entries,
                                     int64_t tokens);
void add_kept(const Tensor& partners, const Tensor& starts, const optional<Tensor>& weights, const optional<Tensor>& tallies,
              int64_t entries, int64_t tokens, bool wide, int64_t latents, Tensor product, Tensor joint);
tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int64_t> survey_pairs(at::TensorList products, at::TensorList joints,
                                                                            const Tensor& apart, const Tensor& inverse,
                                                                            const Tensor& fired, double least,
                                                                            double least_union, int64_t most,
                                                                            const optional<Tensor>& edges);

// sketch.cpp
void sketch_add(const Tensor& latent, const Tensor& token, const Tensor& weighted, const optional<Tensor>& token_weights,
                int64_t tokens, int64_t key, Tensor rows, Tensor ones);
tuple<Tensor, Tensor, Tensor> similar_rows(const Tensor& left, const Tensor& right, double above, int64_t apart);

// kernels/correlation/counter_rng.py: hash_bits; `key` is its key_state.
inline uint64_t hash_bits(uint64_t index, uint64_t key = 0) {
  uint64_t x = index * 0x9E3779B97F4A7C15u + key;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// counts.cpp
tuple<Tensor, Tensor, Tensor, Tensor, Tensor> firing_entries(const Tensor& values, const Tensor& ids, const Tensor& row_ptr,
                                                             const optional<Tensor>& token_weights);
void add_moments(const Tensor& latent, const Tensor& value, const Tensor& weighted, const Tensor& tally, Tensor total,
                 Tensor square, Tensor count);
int64_t mark_sequences(const Tensor& values, const Tensor& ids, const Tensor& row_ptr, const Tensor& sequences,
                       const optional<Tensor>& token_weights, int64_t bits, Tensor marks);
void add_by_group(const Tensor& values, const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr, const Tensor& i,
                  const Tensor& j, const Tensor& group, const optional<Tensor>& token_weights, Tensor sums);
tuple<double, Tensor> pair_penalty(const Tensor& values, const Tensor& order, const Tensor& row_of, const Tensor& latent_ptr,
                                   const Tensor& i, const Tensor& j, double margin, const optional<Tensor>& token_weights,
                                   int64_t tokens);

// samples.cpp
int64_t offer_samples(const Tensor& group, const Tensor& score, const Tensor& activation, const Tensor& rows,
                      const Tensor& tokens, const Tensor& positions, const optional<Tensor>& sequences,
                      const Tensor& contexts, int64_t step, int64_t window, Tensor own_score, Tensor own_activation,
                      Tensor own_token, Tensor own_position, Tensor own_sequence, Tensor own_step, Tensor own_context);

// nearest_rows.cpp
tuple<Tensor, Tensor, Tensor> nearest_above(const Tensor& W, const Tensor& own, double least);
Tensor rows_in_zeros(const Tensor& values, const Tensor& rows, int64_t total);

// transpose.cpp
Tensor transposed(const Tensor& W, const optional<Tensor>& factors, bool back);

// adam.cpp
Tensor adam_step(at::TensorList parameters, at::TensorList grads, at::TensorList firsts, at::TensorList seconds,
                 at::TensorList steps, int64_t unit, double lr, double beta1, double beta2, double eps, double max_norm,
                 const optional<Tensor>& bad);

}  // namespace transcoder
