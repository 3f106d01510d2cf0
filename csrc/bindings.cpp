// Backend `cpp`: registration of the ops. Checks, tiles and threads are in the files that ops.h names, the loops in
// kernels.cpp.
#include <torch/library.h>

#include "ops.h"

namespace transcoder {
namespace {

std::string instruction_set() { return tables().name; }

TORCH_LIBRARY(transcoder_cpp, m) {
  const auto cpu = [&m](const char* schema, auto* op) { m.def(schema, torch::dispatch(c10::DispatchKey::CPU, op)); };
  m.def("instruction_set() -> str", instruction_set);
  m.def("looked_again() -> int", looked_again);
  cpu("topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor)", topk);
  cpu("topk_screened(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor)", topk_screened);
  cpu("batch_topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor, Tensor)", batch_topk);
  cpu("batch_topk_screened(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor, Tensor)", batch_topk_screened);
  cpu("above_screened(Tensor x, Tensor W, Tensor b, Tensor limits) -> (Tensor, Tensor, Tensor)", above_screened);
  cpu("above(Tensor x, Tensor W, Tensor b, Tensor limits) -> (Tensor, Tensor, Tensor)", above);
  cpu("by_latent(Tensor ids, Tensor row_ptr, int latents) -> (Tensor, Tensor, Tensor)", by_latent);
  cpu(
      "row_sums(Tensor table, Tensor ids, Tensor ptr, Tensor weights, Tensor? order, Tensor? start, bool sums, bool "
      "totals) -> (Tensor, Tensor)",
      row_sums);
  cpu("row_dots(Tensor left, Tensor table, Tensor ids, Tensor ptr) -> Tensor", row_dots);
  cpu(
      "prefix_errors(Tensor values, Tensor ids, Tensor row_ptr, int[] widths, Tensor W, Tensor b, Tensor y, Tensor? "
      "token_weights) -> (Tensor, Tensor)",
      prefix_errors);
  cpu(
      "prefix_gradients(Tensor values, Tensor ids, Tensor row_ptr, Tensor order, Tensor row_of, Tensor latent_ptr, "
      "int[] widths, Tensor W, Tensor residual, Tensor scales, Tensor? token_weights) -> (Tensor, Tensor, Tensor)",
      prefix_gradients);
  cpu(
      "keep_entries(Tensor values, Tensor ids, Tensor row_ptr, Tensor? token_weights, Tensor? token_tally, "
      "Tensor(a!) total, Tensor(b!) square, Tensor(c!) count, Tensor(d!) partners, Tensor(e!) starts, Tensor(f!)? "
      "kept_weights, Tensor(g!)? kept_tally, int entries, int tokens) -> (int, int)",
      keep_entries);
  cpu(
      "add_kept(Tensor partners, Tensor starts, Tensor? weights, Tensor? tallies, int entries, int tokens, bool "
      "wide, int latents, Tensor(a!) product, Tensor(b!) joint) -> ()",
      add_kept);
  cpu(
      "survey_pairs(Tensor[] products, Tensor[] joints, Tensor apart, Tensor inverse, Tensor fired, float least, float "
      "least_union, int most, Tensor? edges) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int)",
      survey_pairs);
  cpu(
      "sketch_add(Tensor latent, Tensor token, Tensor weighted, Tensor? token_weights, int tokens, int key, "
      "Tensor(a!) rows, Tensor(b!) ones) -> ()",
      sketch_add);
  cpu("similar_rows(Tensor left, Tensor right, float above, int apart) -> (Tensor, Tensor, Tensor)", similar_rows);
  cpu(
      "firing_entries(Tensor values, Tensor ids, Tensor row_ptr, Tensor? token_weights) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)",
      firing_entries);
  cpu(
      "add_moments(Tensor latent, Tensor value, Tensor weighted, Tensor tally, Tensor(a!) total, Tensor(b!) square, "
      "Tensor(c!) count) -> ()",
      add_moments);
  cpu(
      "mark_sequences(Tensor values, Tensor ids, Tensor row_ptr, Tensor sequences, Tensor? token_weights, int bits, "
      "Tensor(a!) marks) -> int",
      mark_sequences);
  cpu(
      "add_by_group(Tensor values, Tensor order, Tensor row_of, Tensor latent_ptr, Tensor i, Tensor j, Tensor "
      "group, Tensor? token_weights, Tensor(a!) sums) -> ()",
      add_by_group);
  cpu(
      "pair_penalty(Tensor values, Tensor order, Tensor row_of, Tensor latent_ptr, Tensor i, Tensor j, float margin, "
      "Tensor? token_weights, int tokens) -> (float, Tensor)",
      pair_penalty);
  cpu(
      "offer_samples(Tensor group, Tensor score, Tensor activation, Tensor rows, Tensor tokens, Tensor positions, "
      "Tensor? sequences, Tensor contexts, int step, int window, Tensor(a!) own_score, Tensor(b!) own_activation, "
      "Tensor(c!) own_token, Tensor(d!) own_position, Tensor(e!) own_sequence, Tensor(f!) own_step, Tensor(g!) "
      "own_context) -> int",
      offer_samples);
  cpu("nearest_above(Tensor W, Tensor own, float least) -> (Tensor, Tensor, Tensor)", nearest_above);
  cpu("transposed(Tensor W, Tensor? factors, bool back) -> Tensor", transposed);
  cpu("rows_in_zeros(Tensor values, Tensor rows, int total) -> Tensor", rows_in_zeros);
  cpu(
      "adam_step(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, int unit, float lr, float beta1, float beta2, float eps, float max_norm, Tensor(e!)? "
      "bad=None) -> Tensor",
      adam_step);
}

}  // namespace
}  // namespace transcoder
