// Backend `cpp`: the ops as torch sees them. Checks, tiles and threads are in the *_ops.h, the loops in kernels.cpp.
#include <torch/library.h>

#include "correlation_ops.h"
#include "cosine_ops.h"
#include "count_ops.h"
#include "encode_ops.h"
#include "pair_ops.h"
#include "reduce_ops.h"
#include "sample_ops.h"
#include "screen_ops.h"
#include "sketch_ops.h"
#include "step_ops.h"
#include "turn_ops.h"

namespace transcoder {
namespace {

std::string instruction_set() { return tables().name; }

TORCH_LIBRARY(transcoder_cpp, m) {
  m.def("instruction_set() -> str", instruction_set);
  m.def("topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor)");
  m.def("topk_screened(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor)");
  m.def("batch_topk(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor, Tensor)");
  m.def("batch_topk_screened(Tensor x, Tensor W, Tensor b, int k) -> (Tensor, Tensor, Tensor)");
  m.def("above_screened(Tensor x, Tensor W, Tensor b, Tensor limits) -> (Tensor, Tensor, Tensor)");
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
      "keep_entries(Tensor values, Tensor ids, Tensor row_ptr, Tensor? token_weights, Tensor? token_tally, Tensor(a!) total, "
      "Tensor(b!) square, Tensor(c!) count, Tensor(d!) partners, Tensor(e!) starts, Tensor(f!)? kept_weights, "
      "Tensor(g!)? kept_tally, int entries, int tokens) -> (int, int)");
  m.def(
      "add_kept(Tensor partners, Tensor starts, Tensor? weights, Tensor? tallies, int entries, int tokens, bool wide, "
      "int latents, Tensor(a!) product, Tensor(b!) joint) -> ()");
  m.def(
      "survey_pairs(Tensor[] products, Tensor[] joints, Tensor apart, Tensor inverse, float least, Tensor? edges) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sketch_add(Tensor latent, Tensor token, Tensor weighted, Tensor? token_weights, int tokens, int key, Tensor(a!) rows, "
      "Tensor(b!) ones) -> ()");
  m.def("similar_rows(Tensor left, Tensor right, float above, int apart) -> (Tensor, Tensor, Tensor)");
  m.def(
      "firing_entries(Tensor values, Tensor ids, Tensor row_ptr, Tensor? token_weights) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_moments(Tensor latent, Tensor value, Tensor weighted, Tensor tally, Tensor(a!) total, Tensor(b!) square, "
      "Tensor(c!) count) -> ()");
  m.def(
      "mark_places(Tensor values, Tensor ids, Tensor row_ptr, Tensor place, Tensor? token_weights, int bits, "
      "Tensor(a!) marks) -> ()");
  m.def(
      "add_by_group(Tensor values, Tensor order, Tensor row_of, Tensor latent_ptr, Tensor i, Tensor j, Tensor group, "
      "Tensor? token_weights, Tensor(a!) sums) -> ()");
  m.def(
      "offer_samples(Tensor group, Tensor score, Tensor activation, Tensor rows, Tensor tokens, Tensor positions, "
      "Tensor? sequences, Tensor contexts, int step, int window, Tensor(a!) own_score, Tensor(b!) own_activation, "
      "Tensor(c!) own_token, Tensor(d!) own_position, Tensor(e!) own_sequence, Tensor(f!) own_step, "
      "Tensor(g!) own_context) -> int");
  m.def("nearest_above(Tensor W, Tensor own, float least) -> (Tensor, Tensor, Tensor)");
  m.def("turned(Tensor W, Tensor? factors, bool back) -> Tensor");
  m.def("rows_in_zeros(Tensor values, Tensor rows, int total) -> Tensor");
  m.def(
      "adam_step(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, int unit, float lr, float beta1, float beta2, float eps, float max_norm, "
      "Tensor(e!)? bad=None) -> Tensor");
  m.def("looked_again() -> int", [] { return looked_again().load(); });
}

TORCH_LIBRARY_IMPL(transcoder_cpp, CPU, m) {
  m.impl("topk", topk);
  m.impl("topk_screened", topk_screened);
  m.impl("batch_topk", batch_topk);
  m.impl("batch_topk_screened", batch_topk_screened);
  m.impl("above_screened", above_screened);
  m.impl("above", above);
  m.impl("by_latent", by_latent);
  m.impl("row_sums", row_sums);
  m.impl("row_dots", row_dots);
  m.impl("prefix_errors", prefix_errors);
  m.impl("prefix_gradients", prefix_gradients);
  m.impl("keep_entries", keep_entries);
  m.impl("add_kept", add_kept);
  m.impl("survey_pairs", survey_pairs);
  m.impl("sketch_add", sketch_add);
  m.impl("similar_rows", similar_rows);
  m.impl("firing_entries", firing_entries);
  m.impl("add_moments", add_moments);
  m.impl("mark_places", mark_places);
  m.impl("add_by_group", add_by_group);
  m.impl("offer_samples", offer_samples);
  m.impl("nearest_above", nearest_above);
  m.impl("rows_in_zeros", rows_in_zeros);
  m.impl("turned", turned);
  m.impl("adam_step", adam_step);
}

}  // namespace
}  // namespace transcoder
