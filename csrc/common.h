// Shared by the ops: the instruction set, threads, memory and the checks of compressed rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace transcoder {

void fill_base(Kernels<float>*, Kernels<double>*, Screen*, Sketching*);
#if defined(TRANSCODER_X86)
void fill_avx2(Kernels<float>*, Kernels<double>*, Screen*, Sketching*);
void fill_avx512(Kernels<float>*, Kernels<double>*, Screen*, Sketching*);
#endif

using at::Tensor;
using std::optional;
using std::tuple;

// The widest instruction set of this CPU; TRANSCODER_CPU = base | avx2 caps it (for tests).
struct Tables {
  Kernels<float> single;
  Kernels<double> wide;
  Screen screen;
  Sketching sketching;
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
    if (name == "avx512") fill_avx512(&single, &wide, &screen, &sketching);
    if (name == "avx2") fill_avx2(&single, &wide, &screen, &sketching);
#endif
    if (name == "base") fill_base(&single, &wide, &screen, &sketching);
  }
};

inline const Tables& tables() {
  static const Tables found;
  return found;
}
template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return tables().single;
}
template <>
inline const Kernels<double>& kernels<double>() {
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
  TORCH_CHECK_VALUE(t.is_contiguous(), "backend cpp: expected contiguous tensors");
  return t.const_data_ptr<T>();
}
template <typename T>
T* out(const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), "backend cpp: expected contiguous tensors");
  return t.mutable_data_ptr<T>();
}

// The ops read raw memory: every length is checked first, so no input causes an access out of bounds.
inline void check_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, "backend cpp: ", name, ": expected shape ", shape, ", got ", t.sizes());
}

// Large results are fresh pages more often than not, and first touches of 4 KiB pages were measured at 8 ms for 16 MiB, a
// twelfth of an encoder product of that size; of 2 MiB pages, at 1.8 ms. The system may ignore this advice.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 4096;
  if (bytes < (4 << 20)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(at::IntArrayRef shape, at::ScalarType type) {
  Tensor made = at::empty(shape, at::TensorOptions().dtype(type));
  prefer_large_pages(made.mutable_data_ptr(), static_cast<int64_t>(made.nbytes()));
  return made;
}

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

inline void check_rows(const Tensor& ptr, int64_t entries) {
  TORCH_CHECK_VALUE(ptr.dim() == 1 && ptr.numel() > 0, "SparseCodes: row_ptr: expected B + 1 numbers, got none");
  const int64_t rows = ptr.numel() - 1;
  const int64_t* p = in<int64_t>(ptr);
  bool fine = rows >= 0 && p[0] == 0 && p[rows] == entries;
  for (int64_t i = 0; fine && i < rows; ++i) fine = p[i] <= p[i + 1];
  TORCH_CHECK_VALUE(fine, "SparseCodes: row_ptr: expected to ascend from 0 to ", entries);
}

inline void check_ids(const Tensor& ids, int64_t limit) {
  const int64_t* p = in<int64_t>(ids);
  uint64_t worst = 0;
  for (int64_t i = 0; i < ids.numel(); ++i) worst = std::max(worst, static_cast<uint64_t>(p[i]));
  TORCH_CHECK_VALUE(ids.numel() == 0 || worst < static_cast<uint64_t>(limit),
                    "SparseCodes: indices: expected in [0, ", limit, "), got ", static_cast<int64_t>(worst));
}

// Prefixes are found by the order of entries. Call after check_rows and check_ids.
inline void check_ascending(const Tensor& ids, const Tensor& ptr) {
  const int64_t *id = in<int64_t>(ids), *p = in<int64_t>(ptr);
  for (int64_t row = 0; row + 1 < ptr.numel(); ++row) {
    bool fine = true;
    for (int64_t i = p[row] + 1; i < p[row + 1]; ++i) fine = fine && id[i - 1] < id[i];
    TORCH_CHECK_VALUE(fine, "SparseCodes: indices: expected ascending and unique within a row, row ", row, " is not");
  }
}

inline void check_codes(const Tensor& values, const Tensor& ids, const Tensor& row_ptr, int64_t latents) {
  check_shape("values", values, ids.sizes());
  check_rows(row_ptr, ids.numel());
  check_ids(ids, latents);
  check_ascending(ids, row_ptr);
}

template <typename T>
struct Memory {  // uninitialised
  Tensor tensor;
  T* data = nullptr;
  void need(int64_t n) {
    const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
    if (!tensor.defined() || tensor.numel() < bytes) {
      tensor = empty({bytes}, at::kByte);
      data = static_cast<T*>(tensor.mutable_data_ptr());
    }
  }
};

// The lists of all parts, in order, as one tensor.
template <typename Part, typename T>
Tensor joined(const std::vector<Part>& parts, std::vector<T> Part::*list) {
  int64_t total = 0;
  for (const Part& part : parts) total += static_cast<int64_t>((part.*list).size());
  Tensor all = empty({total}, c10::CppTypeToScalarType<T>::value);
  T* to = out<T>(all);
  for (const Part& part : parts) to = std::copy((part.*list).begin(), (part.*list).end(), to);
  return all;
}

// [groups + 1]: where each group begins once n numbers of groups are sorted by them.
template <typename Id>
std::vector<int64_t> starts_of(const Id* group, int64_t n, int64_t groups) {
  std::vector<int64_t> ptr(groups + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++ptr[group[i] + 1];
  for (int64_t g = 0; g < groups; ++g) ptr[g + 1] += ptr[g];
  return ptr;
}

}  // namespace transcoder
