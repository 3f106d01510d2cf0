// Activation samples: a batch's entries offered to stores of the k best of each group, in place.
#include "ops.h"

namespace transcoder {

// sample_store.merged(stores, candidates) of sample_store.py, for the groups that have a candidate; the others stay as they
// are. Entry e stands in row rows[e] of the batch and is offered to group[e] (groups and beyond: to none) with score[e] >= 0. A
// batch offers each group its k best, k the places of a group. Contexts of one known sequence that begin less than `window`
// apart overlap: the better one stays. Returns how many of the samples are new.
int64_t offer_samples(const Tensor& group, const Tensor& score, const Tensor& activation, const Tensor& rows,
                      const Tensor& tokens, const Tensor& positions, const optional<Tensor>& sequences,
                      const Tensor& contexts, int64_t step, int64_t window, Tensor own_score, Tensor own_activation,
                      Tensor own_token, Tensor own_position, Tensor own_sequence, Tensor own_step, Tensor own_context) {
  const int64_t entries = group.numel(), batch = tokens.numel();
  TORCH_CHECK_VALUE(own_score.dim() == 2 && contexts.dim() == 2, "offer_samples: expected stores [G, k], contexts [B, C]");
  const int64_t groups = own_score.size(0), k = own_score.size(1), width = contexts.size(1);
  for (const Tensor& part : {score, activation, rows}) check_shape("entries", part, {entries});
  check_shape("positions", positions, {batch});
  check_shape("contexts", contexts, {batch, width});
  if (sequences) check_shape("sequences", *sequences, {batch});
  for (const Tensor& part : {own_activation, own_token, own_position, own_sequence, own_step}) {
    check_shape("store", part, {groups, k});
  }
  check_shape("store", own_context, {groups, k, width});
  check_ids(rows, batch);
  check_ids(group, groups + 1);
  const int64_t *in_group = in<int64_t>(group), *row_of = in<int64_t>(rows);
  const float *scores = in<float>(score), *values = in<float>(activation);
  const int64_t *token = in<int64_t>(tokens), *position = in<int64_t>(positions);
  const int64_t* sequence = sequences ? in<int64_t>(*sequences) : nullptr;
  const std::vector<int64_t> ptr = starts_of(in_group, entries, groups + 1);
  std::vector<int64_t> sorted(entries);
  {
    std::vector<int64_t> next(ptr.begin(), ptr.end() - 1);
    for (int64_t e = 0; e < entries; ++e) sorted[next[in_group[e]]++] = e;
  }
  struct Sample {
    float score, activation;
    int64_t token, position, sequence, step;
    const int32_t* context;
    bool fresh;
  };
  std::vector<Sample> both;
  std::vector<int64_t> chosen;
  std::vector<int32_t> held(k * width);
  int64_t fresh = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (ptr[g] == ptr[g + 1]) continue;
    // Ties: the earlier entry, and stored samples before new ones.
    const auto first = sorted.begin() + ptr[g], last = sorted.begin() + ptr[g + 1];
    std::stable_sort(first, last, [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    const int64_t offered = std::min<int64_t>(k, ptr[g + 1] - ptr[g]);
    float* to_score = out<float>(own_score) + g * k;
    float* to_activation = out<float>(own_activation) + g * k;
    int64_t *to_token = out<int64_t>(own_token) + g * k, *to_position = out<int64_t>(own_position) + g * k;
    int64_t *to_sequence = out<int64_t>(own_sequence) + g * k, *to_step = out<int64_t>(own_step) + g * k;
    int32_t* to_context = out<int32_t>(own_context) + g * k * width;
    std::copy_n(to_context, k * width, held.data());
    both.clear();
    for (int64_t i = 0; i < k; ++i) {
      both.push_back({to_score[i], to_activation[i], to_token[i], to_position[i], to_sequence[i], to_step[i],
                      held.data() + i * width, false});
    }
    for (int64_t i = 0; i < offered; ++i) {
      const int64_t e = first[i], row = row_of[e];
      both.push_back({scores[e], values[e], token[row], position[row], sequence ? sequence[row] : -1, step,
                      in<int32_t>(contexts) + row * width, true});
    }
    std::stable_sort(both.begin(), both.end(), [](const Sample& a, const Sample& b) { return a.score > b.score; });
    chosen.clear();
    const auto overlaps = [&](const Sample& s) {
      for (const int64_t n : chosen) {
        const Sample& better = both[n];
        if (s.sequence >= 0 && better.sequence == s.sequence && std::abs(better.position - s.position) < window) return true;
      }
      return false;
    };
    // The samples that stay, then the others in their order, as empty places.
    std::vector<int64_t> dropped;
    for (int64_t n = 0; n < static_cast<int64_t>(both.size()); ++n) {
      (both[n].score >= 0 && !overlaps(both[n]) ? chosen : dropped).push_back(n);
    }
    const int64_t kept = static_cast<int64_t>(chosen.size());
    chosen.insert(chosen.end(), dropped.begin(), dropped.end());
    for (int64_t i = 0; i < k; ++i) {
      const Sample& s = both[chosen[i]];
      to_score[i] = i < kept ? s.score : -1.0f;
      to_activation[i] = s.activation;
      to_token[i] = s.token;
      to_position[i] = s.position;
      to_sequence[i] = s.sequence;
      to_step[i] = s.step;
      std::copy_n(s.context, width, to_context + i * width);
      fresh += s.fresh && i < kept;
    }
  }
  return fresh;
}

}  // namespace transcoder
