// Several numbers at a time, in float32 whatever they are stored as.

#pragma once

#include <c10/util/BFloat16.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace spd {

// As many as a register holds: compilers spill longer vectors to memory.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
constexpr int kRegisters = 32;
#else
constexpr int64_t kLanes = 8;
constexpr int kRegisters = 16;
#endif

using Vector = float __attribute__((vector_size(kLanes * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Vector load(const float* from) {
  Vector loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return loaded;
}

inline Vector load(const c10::BFloat16* from) {
  Halves loaded;
  std::memcpy(&loaded, from, sizeof(loaded));
  return std::bit_cast<Vector>(__builtin_convertvector(loaded, Words) << 16);
}

inline void store(Vector vector, float* to) {
  std::memcpy(to, &vector, sizeof(vector));
}

inline float total(Vector vector) {
  float lanes[kLanes];
  std::memcpy(lanes, &vector, sizeof(vector));
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

}  // namespace spd
