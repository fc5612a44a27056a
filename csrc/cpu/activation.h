// The activations, of one number in float32, for loops under `#pragma omp simd`. NaN goes through,
// and gradients at the kinks are PyTorch's.
#pragma once

#include "elementwise.h"

namespace seaattn {

// The codes of reference.ACTIVATIONS.
enum Activation : int64_t { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu };
constexpr int64_t kActivations = 5;

template <Activation kActivation>
SEAATTN_INLINE float activate(float z, float slope) {
  if constexpr (kActivation == kRelu) {
    return choose(z <= 0.0f, 0.0f, z);
  } else if constexpr (kActivation == kRelu6) {
    return clamp6(z);
  } else if constexpr (kActivation == kLeakyRelu) {
    return choose(z > 0.0f, z, z * slope);
  } else if constexpr (kActivation == kSilu) {
    return z / (1.0f + exponential(-z));
  } else {
    return z;
  }
}

template <Activation kActivation>
SEAATTN_INLINE float activate_backward(float gradient, float z, float slope) {
  if constexpr (kActivation == kRelu) {
    return choose(z <= 0.0f, 0.0f, gradient);
  } else if constexpr (kActivation == kRelu6) {
    return choose((z <= 0.0f) | (z >= 6.0f), 0.0f, gradient);
  } else if constexpr (kActivation == kLeakyRelu) {
    return choose(z > 0.0f, gradient, gradient * slope);
  } else if constexpr (kActivation == kSilu) {
    const float s = sigmoid(z);
    return gradient * s * (1.0f + z * (1.0f - s));
  } else {
    return gradient;
  }
}

}  // namespace seaattn
