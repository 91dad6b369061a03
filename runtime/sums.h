// What collectives of this package have in common: what is exchanged, and how it is summed.
//
// Sums are taken in the order of the ranks, in float32 at least, and rounded once: all ranks get
// the same bits, and the same bits every time.

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace spd {

constexpr int64_t kLine = 64;         // bytes; no two ranks write to the same cache line
constexpr int64_t kSummed = 2048;     // elements at a time, in registers and first cache

// What a piece is; ranks that exchange different things must notice.
struct alignas(kLine) Label {
  int64_t operation, dtype, elements, offset;

  bool operator==(const Label& other) const {
    return operation == other.operation && dtype == other.dtype && elements == other.elements &&
        offset == other.offset;
  }
};

inline void check_equal(
    int rank, const Label& own, int other, const Label& theirs, const char* through) {
  TORCH_CHECK(
      own == theirs, "ranks ", rank, " and ", other, " exchange different tensors through ",
      through, ": ", own.elements, " and ", theirs.elements, " elements, operation ",
      own.operation, " and ", theirs.operation, ", dtype ", own.dtype, " and ", theirs.dtype);
}

template <typename T>
struct Sum {
  using type = float;
};
template <>
struct Sum<double> {
  using type = double;
};

// out[i] = the sum over ranks of their part's element i, for i in [first, last).
template <typename T>
void sum(const std::vector<const T*>& parts, T* out, int64_t first, int64_t last) {
  using Wide = typename Sum<T>::type;
  alignas(kLine) Wide total[kSummed];
  for (int64_t begin = first; begin < last; begin += kSummed) {
    const int64_t count = std::min(kSummed, last - begin);
    const T* __restrict__ start = parts[0] + begin;
    for (int64_t i = 0; i < count; ++i) {
      total[i] = static_cast<Wide>(start[i]);
    }
    for (size_t rank = 1; rank < parts.size(); ++rank) {
      const T* __restrict__ next = parts[rank] + begin;
      for (int64_t i = 0; i < count; ++i) {
        total[i] += static_cast<Wide>(next[i]);
      }
    }
    T* __restrict__ target = out + begin;
    for (int64_t i = 0; i < count; ++i) {
      target[i] = static_cast<T>(total[i]);
    }
  }
}

// Calls act(what is in one tensor, what is in the other), both as numbers of their dtype.
template <typename Act>
void with_numbers_of(const at::Tensor& in, at::Tensor& out, const Act& act) {
  switch (in.scalar_type()) {
    case at::kFloat:
      return act(in.const_data_ptr<float>(), out.mutable_data_ptr<float>());
    case at::kDouble:
      return act(in.const_data_ptr<double>(), out.mutable_data_ptr<double>());
    case at::kBFloat16:
      return act(in.const_data_ptr<at::BFloat16>(), out.mutable_data_ptr<at::BFloat16>());
    case at::kHalf:
      return act(in.const_data_ptr<at::Half>(), out.mutable_data_ptr<at::Half>());
    default:
      TORCH_CHECK(false, "sums of ", in.scalar_type(), " are not taken");
  }
}

}  // namespace spd
