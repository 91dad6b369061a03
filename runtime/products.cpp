// Products of few rows with a large weight, as one sequence's next token needs them.
//
// Such a product reads every weight once and does little with it, so what counts is how fast memory
// is read: one row of the weight after the other, in the order in which they lie there. Products of
// more rows are a library's.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include "vectors.h"

namespace spd::products {
namespace {

using spd::kLanes;
using spd::kRegisters;
using spd::load;
using spd::Vector;

constexpr int kMostRows = kRegisters > 16 ? 8 : 4;  // more are a matter of arithmetic
constexpr int64_t kLeastBytes = 32 * 1024;  // of a weight that a thread is worth waking for
constexpr int64_t kLine = 64;               // bytes of a cache line
constexpr int64_t kAhead = 4096;            // bytes that are asked for before they are needed
constexpr int64_t kLeastWidenedRows = 64;   // fewer do not make up for widening the weight
constexpr int64_t kPanelBytes = 1 << 20;    // of a widened weight, which is to stay in a cache

// How many sums of a row need not wait for each other, as far as there are registers for them.
constexpr int chains_of(int rows) {
  int chains = 4;
  while (chains > 1 && chains * rows > kRegisters / 2) {
    chains /= 2;
  }
  return chains;
}

// sums[row] = the product of one row of the weight with each row of x [rows, size].
template <int rows, typename T>
void dot(const T* weight, const float* x, int64_t size, float* sums) {
  constexpr int kChains = chains_of(rows);
  Vector partial[rows][kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= size; i += kChains * kLanes) {
    // A processor looks only so many instructions ahead, and bfloat16 takes more of them a byte.
    const char* next = reinterpret_cast<const char*>(weight + i) + kAhead;
    for (int64_t line = 0; line < kChains * kLanes * static_cast<int64_t>(sizeof(T)); line += kLine) {
      __builtin_prefetch(next + line);
    }
    for (int chain = 0; chain < kChains; ++chain) {
      const Vector weights = load(weight + i + chain * kLanes);
      for (int row = 0; row < rows; ++row) {
        partial[row][chain] += weights * load(x + row * size + i + chain * kLanes);
      }
    }
  }
  for (; i + kLanes <= size; i += kLanes) {
    const Vector weights = load(weight + i);
    for (int row = 0; row < rows; ++row) {
      partial[row][0] += weights * load(x + row * size + i);
    }
  }
  for (int row = 0; row < rows; ++row) {
    Vector all = partial[row][0];
    for (int chain = 1; chain < kChains; ++chain) {
      all += partial[row][chain];
    }
    float sum = spd::total(all);
    for (int64_t rest = i; rest < size; ++rest) {
      sum += static_cast<float>(weight[rest]) * x[row * size + rest];
    }
    sums[row] = sum;
  }
}

template <int rows, typename T>
void multiply(const float* x, const T* weight, const T* bias, T* out, int64_t count, int64_t size) {
  const int64_t grain = std::max<int64_t>(1, kLeastBytes / (size * static_cast<int64_t>(sizeof(T))));
  at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    for (int64_t column = first; column < last; ++column) {
      float sums[rows];
      dot<rows>(weight + column * size, x, size, sums);
      const float offset = bias == nullptr ? 0.0f : static_cast<float>(bias[column]);
      for (int row = 0; row < rows; ++row) {
        out[row * count + column] = static_cast<T>(sums[row] + offset);
      }
    }
  });
}

template <typename T>
using Multiply = void (*)(const float*, const T*, const T*, T*, int64_t, int64_t);

// What multiplies 1, 2, ... rows.
template <typename T, int... before>
constexpr std::array<Multiply<T>, sizeof...(before)> multiplications(
    std::integer_sequence<int, before...>) {
  return {multiply<before + 1, T>...};
}

template <typename T>
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor* bias) {
  const int64_t count = weight.size(0), size = weight.size(1), rows = x.numel() / size;
  auto sizes = x.sizes().vec();
  sizes.back() = count;
  at::Tensor out = at::empty(sizes, x.options());
  const at::Tensor wide = x.to(at::kFloat).contiguous();
  const float* left = wide.const_data_ptr<float>();
  const T* right = weight.const_data_ptr<T>();
  const T* offset = bias == nullptr ? nullptr : bias->const_data_ptr<T>();
  T* target = out.mutable_data_ptr<T>();
  constexpr auto functions = multiplications<T>(std::make_integer_sequence<int, kMostRows>());
  functions[rows - 1](left, right, offset, target, count, size);
  return out;
}

using OneDnn = at::Tensor(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::string_view after, c10::List<std::optional<at::Scalar>> scalars,
    std::optional<std::string_view> algorithm);

// oneDNN's product as torch exposes it, if this torch has it under that name and signature.
const std::optional<c10::TypedOperatorHandle<OneDnn>>& one_dnn() {
  static const auto found = []() -> std::optional<c10::TypedOperatorHandle<OneDnn>> {
    const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (!handle.has_value()) {
      return std::nullopt;
    }
    try {
      return handle->typed<OneDnn>();
    } catch (const c10::Error&) {
      return std::nullopt;
    }
  }();
  return found;
}

// More rows than those above. In float32 torch multiplies with the BLAS that it was built with, which
// is not the fastest on every processor; in bfloat16 it takes oneDNN itself.
at::Tensor of_many_rows(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (one_dnn().has_value() && at::globalContext().userEnabledMkldnn()) {
    const c10::List<std::optional<at::Scalar>> nothing;
    const auto product = one_dnn()->call(x.contiguous(), weight, bias, "none", nothing, std::nullopt);
    return product.contiguous();
  }
  return at::linear(x, weight, bias).contiguous();
}

void widen(const at::BFloat16* from, int64_t count, float* to) {
  constexpr int64_t grain = kLeastBytes / (kLanes * sizeof(at::BFloat16));
  at::parallel_for(0, count / kLanes, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kLanes; i < last * kLanes; i += kLanes) {
      __builtin_prefetch(from + i + kAhead);
      spd::store(load(from + i), to + i);
    }
  });
  for (int64_t i = count / kLanes * kLanes; i < count; ++i) {
    to[i] = static_cast<float>(from[i]);
  }
}

// x [..., k], weight [n, k], bias [n] -> [..., n], all in bfloat16, multiplied in float32: some rows
// of the weight are widened at a time, so that they lie in a cache when they are multiplied.
at::Tensor widened(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t count = weight.size(0), size = weight.size(1), rows = x.numel() / size;
  const int64_t most = std::max<int64_t>(1, kPanelBytes / (size * static_cast<int64_t>(sizeof(float))));
  const at::Tensor wide = x.reshape({rows, size}).to(at::kFloat);
  const at::Tensor panel = at::empty({std::min(most, count), size}, wide.options());
  at::Tensor out = at::empty({rows, count}, x.options());
  for (int64_t first = 0; first < count; first += most) {
    const int64_t here = std::min(most, count - first);
    const at::Tensor some = panel.narrow(0, 0, here);
    const at::BFloat16* from = weight.const_data_ptr<at::BFloat16>() + first * size;
    widen(from, here * size, some.mutable_data_ptr<float>());
    at::Tensor product = of_many_rows(wide, some, std::nullopt);
    if (bias.has_value() && bias->defined()) {
      product.add_(bias->narrow(0, first, here));
    }
    out.narrow(1, first, here).copy_(product);
  }
  auto sizes = x.sizes().vec();
  sizes.back() = count;
  return out.view(sizes);
}

// x [..., k], weight [n, k], bias [n] -> [..., n], contiguous. widens: whether many rows in bfloat16
// are multiplied in float32.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    bool widens) {
  const int64_t size = weight.size(-1), rows = size > 0 ? x.numel() / size : 0;
  const at::Tensor* offset = bias.has_value() && bias->defined() ? &*bias : nullptr;
  const auto type = weight.scalar_type();
  const bool plain = weight.dim() == 2 && weight.is_contiguous() && x.scalar_type() == type &&
      x.dim() > 0 && x.size(-1) == size &&
      (offset == nullptr || (offset->is_contiguous() && offset->scalar_type() == type));
  if (plain && rows >= 1) {
    if (type == at::kFloat) {
      return rows <= kMostRows ? product<float>(x, weight, offset) : of_many_rows(x, weight, bias);
    }
    if (type == at::kBFloat16 && rows <= kMostRows) {
      return product<at::BFloat16>(x, weight, offset);
    }
    if (type == at::kBFloat16 && widens && rows >= kLeastWidenedRows) {
      return widened(x, weight, bias);
    }
  }
  return at::linear(x, weight, bias).contiguous();
}

// With a gradient it is torch's own operator, which has one.
at::Tensor differentiable_linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    bool widens) {
  const bool wanted = x.requires_grad() || weight.requires_grad() ||
      (bias.has_value() && bias->requires_grad());
  if (at::GradMode::is_enabled() && wanted) {
    return at::linear(x, weight, bias).contiguous();
  }
  static const auto operation = c10::Dispatcher::singleton()
      .findSchemaOrThrow("spd_cpu::linear", "")
      .typed<decltype(linear)>();
  at::AutoDispatchBelowADInplaceOrView below;
  return operation.call(x, weight, bias, widens);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spd_cpu, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias=None, bool widens=False) -> Tensor");
}

TORCH_LIBRARY_IMPL(spd_cpu, CPU, library) {
  library.impl("linear", &linear);
}

TORCH_LIBRARY_IMPL(spd_cpu, Autograd, library) {
  library.impl("linear", &differentiable_linear);
}

}  // namespace spd::products
