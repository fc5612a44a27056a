#include "gate.h"

#include "elementwise.h"

namespace seaattn {
namespace {

// A division takes longer than all that is around it.
constexpr float kSixth = 1.0f / 6.0f;

template <bool kHard, typename T>
SEAATTN_INLINE void gate_body(const T* x, const T* y, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float t = widen(x[i]);
    const float weight = kHard ? clamp6(t + 3.0f) * kSixth : sigmoid(t);
    out[i] = narrow<T>(weight * widen(y[i]));
  }
}

template <bool kHard, typename T>
SEAATTN_INLINE void gate_backward_body(const T* gradient, const T* x, const T* y, int64_t n, T* dx,
                                       T* dy) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = widen(gradient[i]), t = widen(x[i]), of_y = g * widen(y[i]);
    if constexpr (kHard) {
      const float shifted = t + 3.0f;
      dx[i] = narrow<T>(choose((shifted <= 0.0f) | (shifted >= 6.0f), 0.0f, of_y * kSixth));
      dy[i] = narrow<T>(g * (clamp6(shifted) * kSixth));
    } else {
      const float weight = sigmoid(t);
      dx[i] = narrow<T>(of_y * weight * (1.0f - weight));
      dy[i] = narrow<T>(g * weight);
    }
  }
}

}  // namespace

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_INSTANTIATE(T)                                                               \
  template <>                                                                                \
  SEAATTN_CLONES void gate<T>(const T* x, const T* y, int64_t n, bool hard, T* out) {        \
    if (hard) {                                                                              \
      gate_body<true>(x, y, n, out);                                                         \
    } else {                                                                                 \
      gate_body<false>(x, y, n, out);                                                        \
    }                                                                                        \
  }                                                                                          \
  template <>                                                                                \
  SEAATTN_CLONES void gate_backward<T>(const T* gradient, const T* x, const T* y, int64_t n, \
                                       bool hard, T* dx, T* dy) {                            \
    if (hard) {                                                                              \
      gate_backward_body<true>(gradient, x, y, n, dx, dy);                                   \
    } else {                                                                                 \
      gate_backward_body<false>(gradient, x, y, n, dx, dy);                                  \
    }                                                                                        \
  }

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
