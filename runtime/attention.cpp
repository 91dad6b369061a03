// Attention of one new token of each sequence to those in its cache (cached_attention.py).
//
// What it does not do itself (several new tokens, windows, caps, sinks, other dtypes) it leaves to
// the operator that it takes the place of.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"

namespace spd::attention {
namespace {

using at::Tensor;
using spd::kLanes;
using spd::load;
using spd::Vector;

// Which keys a query sees besides those that are there.
struct Limits {
  bool causal;
  int64_t window;
  double softcap;
  int64_t chunk;
};

template <typename T>
float dot(const float* left, const T* right, int64_t size) {
  Vector partial = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    partial += load(left + i) * load(right + i);
  }
  float sum = spd::total(partial);
  for (; i < size; ++i) {
    sum += left[i] * static_cast<float>(right[i]);
  }
  return sum;
}

// to += factor * from
template <typename T>
void add_scaled(float factor, const T* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    spd::store(load(to + i) + factor * load(from + i), to + i);
  }
  for (; i < size; ++i) {
    to[i] += factor * static_cast<float>(from[i]);
  }
}

// Scores become weights; those that are not seen are minus infinity, and at least one is seen.
void softmax(std::vector<float>& scores) {
  float most = -std::numeric_limits<float>::infinity();
  for (const float score : scores) {
    most = std::max(most, score);
  }
  float sum = 0;
  for (float& score : scores) {
    score = std::exp(score - most);
    sum += score;
  }
  for (float& score : scores) {
    score /= sum;
  }
}

// Of one query head: q [D], keys [T, D], values [T, V], seen [T] -> out [V].
template <typename T>
void attend_head(
    const T* q, const T* keys, int64_t key_stride, const T* values, int64_t value_stride,
    const std::vector<bool>& seen, double scale, int64_t width, int64_t value_width, T* out) {
  std::vector<float> query(width), scores(seen.size()), sum(value_width);
  for (int64_t i = 0; i < width; ++i) {
    query[i] = static_cast<float>(q[i]) * static_cast<float>(scale);
  }
  for (size_t t = 0; t < seen.size(); ++t) {
    scores[t] = seen[t] ? dot(query.data(), keys + t * key_stride, width)
                        : -std::numeric_limits<float>::infinity();
  }
  softmax(scores);
  for (size_t t = 0; t < seen.size(); ++t) {
    if (seen[t]) {
      add_scaled(scores[t], values + t * value_stride, sum.data(), value_width);
    }
  }
  for (int64_t i = 0; i < value_width; ++i) {
    out[i] = static_cast<T>(sum[i]);
  }
}

template <typename T>
Tensor attend(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& valid, const Tensor& start, double scale, bool causal) {
  const int64_t batch = q.size(0), heads = q.size(1), groups = k.size(1), total = valid.size(1);
  const int64_t width = q.size(3), value_width = v.size(3), members = heads / groups;
  Tensor out = at::empty({batch, 1, heads, value_width}, q.options());
  const int64_t* starts = start.const_data_ptr<int64_t>();
  const int64_t* there = valid.const_data_ptr<int64_t>();
  const auto row = [](const Tensor& x, int64_t b, int64_t head) {
    return x.mutable_data_ptr<T>() + b * x.stride(0) + head * x.stride(1);
  };
  at::parallel_for(0, batch * groups, 1, [&](int64_t first, int64_t last) {
    std::vector<bool> seen(total);
    for (int64_t index = first; index < last; ++index) {
      const int64_t b = index / groups, group = index % groups, now = starts[b];
      T* const keys = row(k_cache, b, group);
      T* const values = row(v_cache, b, group);
      std::memcpy(keys + now * k_cache.stride(2), row(k, b, group), width * sizeof(T));
      std::memcpy(values + now * v_cache.stride(2), row(v, b, group), value_width * sizeof(T));
      for (int64_t t = 0; t < total; ++t) {
        seen[t] = t == now || (there[b * valid.stride(0) + t * valid.stride(1)] != 0 &&
                               (!causal || t < now));
      }
      for (int64_t head = group * members; head < (group + 1) * members; ++head) {
        attend_head<T>(
            row(q, b, head), keys, k_cache.stride(2), values, v_cache.stride(2), seen, scale,
            width, value_width, row(out.squeeze(1), b, head));
      }
    }
  });
  return out;
}

bool is_simple(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& valid, const Tensor& start, const Limits& limits) {
  const int64_t total = valid.size(1);
  const auto type = q.scalar_type();
  if (q.size(2) != 1 || (type != at::kFloat && type != at::kBFloat16) || limits.softcap != 0 ||
      (limits.window > 0 && limits.window < total) || (limits.chunk > 0 && limits.chunk < total) ||
      total > k_cache.size(2) || total > v_cache.size(2) || k.size(1) == 0 ||
      q.size(1) % k.size(1) != 0 || valid.scalar_type() != at::kLong ||
      start.scalar_type() != at::kLong || !start.is_contiguous() || start.size(0) != q.size(0) ||
      valid.size(0) != q.size(0)) {
    return false;
  }
  for (const Tensor& each : {q, k, v, k_cache, v_cache}) {
    if (each.scalar_type() != type || each.stride(3) != 1) {
      return false;
    }
  }
  const int64_t* starts = start.const_data_ptr<int64_t>();
  return std::all_of(starts, starts + start.numel(), [&](int64_t now) {
    return now >= 0 && now < total;
  });
}

Tensor attend_cached(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& valid, const Tensor& start,
    const std::optional<Tensor>& sinks, double scale, bool causal, int64_t window, double softcap,
    int64_t chunk) {
  const bool no_sinks = !sinks.has_value() || !sinks->defined();
  const Limits limits{causal, window, softcap, chunk};
  if (no_sinks && is_simple(q, k, v, k_cache, v_cache, valid, start, limits)) {
    return q.scalar_type() == at::kFloat
        ? attend<float>(q, k, v, k_cache, v_cache, valid, start, scale, causal)
        : attend<at::BFloat16>(q, k, v, k_cache, v_cache, valid, start, scale, causal);
  }
  static const auto whole = c10::Dispatcher::singleton()
      .findSchemaOrThrow("spd::attend_cached", "")
      .typed<decltype(attend_cached)>();
  return whole.call(
      q, k, v, k_cache, v_cache, valid, start, sinks, scale, causal, window, softcap, chunk);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spd_cpu, library) {
  library.def(
      "attend_cached(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache,"
      " Tensor valid, Tensor start, Tensor? sinks, float scale, bool causal, int window,"
      " float softcap, int chunk=0) -> Tensor");
}

TORCH_LIBRARY_IMPL(spd_cpu, CPU, library) {
  library.impl("attend_cached", &attend_cached);
}

}  // namespace spd::attention
