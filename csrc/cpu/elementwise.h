// What operators do to one number, in float32. Written for loops under `#pragma omp simd`: nothing
// here branches, because a loop with a branch in it is not vectorised.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace seaattn {

SEAATTN_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

SEAATTN_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// `condition ? then : other` by bits: of conditionals within conditionals the compiler makes
// branches.
SEAATTN_INLINE uint32_t choose(bool condition, uint32_t then, uint32_t other) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return (mask & then) | (~mask & other);
}

SEAATTN_INLINE float choose(bool condition, float then, float other) {
  return float_of(choose(condition, bits_of(then), bits_of(other)));
}

SEAATTN_INLINE float widen(float value) {
  return value;
}

// bfloat16 is the upper half of a float.
SEAATTN_INLINE float widen(c10::BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.x) << 16);
}

// By arithmetic, since not every processor has an instruction for it: the exponent is moved by a
// product for normal numbers, infinity and NaN, by a difference for subnormal ones.
SEAATTN_INLINE float widen(c10::Half value) {
  const uint32_t word = static_cast<uint32_t>(value.x) << 16, magnitude = word << 1;
  const float normal = float_of((magnitude >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const float subnormal = float_of((magnitude >> 17) | (126u << 23)) - 0.5f;
  const bool small = magnitude < (1u << 27);
  return float_of(choose(small, bits_of(subnormal), bits_of(normal)) | (word & 0x80000000u));
}

// To the nearest, ties to even; NaN stays one.
template <typename T>
SEAATTN_INLINE T narrow(float value);

template <>
SEAATTN_INLINE float narrow(float value) {
  return value;
}

template <>
SEAATTN_INLINE c10::BFloat16 narrow(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t rounded = choose(value != value, 0x7FC0u, nearest);
  return c10::BFloat16(static_cast<uint16_t>(rounded), c10::BFloat16::from_bits());
}

// Adding a power of two above the value rounds it at the last bit that float16 has.
template <>
SEAATTN_INLINE c10::Half narrow(float value) {
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, magnitude = bits << 1;
  const uint32_t exponent = magnitude & 0xFF000000u;
  const uint32_t bias = choose(exponent < 0x71000000u, 0x71000000u, exponent);
  const float bounded = (float_of(bits ^ sign) * 0x1p112f) * 0x1p-110f;  // infinity past 65535
  const uint32_t sum = bits_of(float_of((bias >> 1) + 0x07800000u) + bounded);
  const uint32_t nearest = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  const uint32_t rounded = choose(magnitude > 0xFF000000u, 0x7E00u, nearest);
  return c10::Half(static_cast<uint16_t>((sign >> 16) | rounded), c10::Half::from_bits());
}

// Between 0 and 6; NaN is neither below nor above.
SEAATTN_INLINE float clamp6(float x) {
  return choose(x >= 6.0f, 6.0f, choose(x <= 0.0f, 0.0f, x));
}

// e^x to one unit in the last place; infinity and zero where float has no more, NaN for NaN.
//
// x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of degree seven.
SEAATTN_INLINE float exponential(float x) {
  constexpr float kHigh = 0.693145751953125f, kLow = 1.42860682030941723212e-6f;  // of ln 2
  const float bounded =
      choose(x >= -105.0f, choose(x <= 90.0f, x, 90.0f), -105.0f);  // of NaN a number too
  const float scaled = bounded * 1.44269504088896341f;
  const int32_t n = static_cast<int32_t>(scaled + choose(scaled < 0.0f, -0.5f, 0.5f));
  const float whole = static_cast<float>(n);
  const float r = (bounded - whole * kHigh) - whole * kLow;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, each of which is a float.
  const int32_t half = n / 2;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(n - half + 127) << 23);
  return choose(x != x, x, p * first * second);
}

SEAATTN_INLINE float sigmoid(float x) {
  return 1.0f / (1.0f + exponential(-x));
}

}  // namespace seaattn
