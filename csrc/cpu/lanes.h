// A vector of sixteen floats, which the compiler cuts to the registers that there are; what
// operators share of arithmetic on it.
#pragma once

#include <cstdint>
#include <cstring>

#include "elementwise.h"

namespace seaattn {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

template <typename T>
SEAATTN_INLINE Lanes load(const T* from) {
  Lanes lanes;
  float wide[kLanes];
#pragma omp simd
  for (int64_t l = 0; l < kLanes; ++l) wide[l] = widen(from[l]);
  std::memcpy(&lanes, wide, sizeof(lanes));
  return lanes;
}

template <>
SEAATTN_INLINE Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// bfloat16 is the upper half of a float.
template <>
SEAATTN_INLINE Lanes load(const c10::BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
}

template <typename T>
SEAATTN_INLINE void store(T* to, Lanes lanes) {
  float wide[kLanes];
  std::memcpy(wide, &lanes, sizeof(lanes));
#pragma omp simd
  for (int64_t l = 0; l < kLanes; ++l) to[l] = narrow<T>(wide[l]);
}

template <>
SEAATTN_INLINE void store(float* to, Lanes lanes) {
  std::memcpy(to, &lanes, sizeof(lanes));
}

// To the nearest, ties to even; NaN stays one.
template <>
SEAATTN_INLINE void store(c10::BFloat16* to, Lanes lanes) {
  const Words bits = reinterpret_cast<Words>(lanes);
  const Words nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Words nan = reinterpret_cast<Words>(lanes != lanes);
  const Halves halves = __builtin_convertvector((nearest & ~nan) | (nan & 0x7FC0), Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// The first `count` lanes; the others are zero.
template <typename T>
SEAATTN_INLINE Lanes load(const T* from, int64_t count) {
  Lanes lanes = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = static_cast<float>(from[l]);
  return lanes;
}

template <typename T>
SEAATTN_INLINE void store(T* to, Lanes lanes, int64_t count) {
  for (int64_t l = 0; l < count; ++l) to[l] = static_cast<T>(lanes[l]);
}

SEAATTN_INLINE Lanes all(float value) {
  return value - Lanes{};
}

// `then` where the mask of a comparison is set, `other` elsewhere. By bits: the compiler turns a
// conditional of conditionals into branches for each lane.
SEAATTN_INLINE Lanes select(Integers mask, Lanes then, Lanes other) {
  return reinterpret_cast<Lanes>((mask & reinterpret_cast<Integers>(then)) |
                                 (~mask & reinterpret_cast<Integers>(other)));
}

// The larger and the smaller of the two, and `x` where it is NaN.
SEAATTN_INLINE Lanes at_least(Lanes bound, Lanes x) {
  return bound > x ? bound : x;
}

SEAATTN_INLINE Lanes at_most(Lanes bound, Lanes x) {
  return bound < x ? bound : x;
}

// Between 0 and 6; NaN goes through.
SEAATTN_INLINE Lanes clamp6(Lanes x) {
  return at_most(all(6.0f), at_least(Lanes{}, x));
}

// e^x to one unit in the last place; infinity and zero where float has no more, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of degree seven.
SEAATTN_INLINE Lanes exponential(Lanes x) {
  constexpr float kHigh = 0.693145751953125f, kLow = 1.42860682030941723212e-6f;  // of ln 2
  const Lanes bounded = select(x > 90.0f, all(90.0f), select(x < -105.0f, all(-105.0f), x));
  const Lanes scaled = bounded * 1.44269504088896341f;
  const Integers n =
      __builtin_convertvector(scaled + select(scaled < 0.0f, all(-0.5f), all(0.5f)), Integers);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes r = (bounded - whole * kHigh) - whole * kLow;
  Lanes p = all(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, each of which is a float.
  const Integers half = n / 2;
  const Lanes first = reinterpret_cast<Lanes>((half + 127) << 23);
  const Lanes second = reinterpret_cast<Lanes>((n - half + 127) << 23);
  p = p * first * second;
  return select(x != x, x, p);
}

SEAATTN_INLINE Lanes sigmoid(Lanes x) {
  return 1.0f / (1.0f + exponential(-x));
}

}  // namespace seaattn
