#include "broadcast_add.h"

#include "elementwise.h"

namespace seaattn {
namespace {

template <Activation kActivation, bool kBackward, typename T>
SEAATTN_INLINE T element(const T* gradient, int64_t at, float z, float slope) {
  if constexpr (kBackward) {
    return narrow<T>(activate_backward<kActivation>(widen(gradient[at]), z, slope));
  } else {
    return narrow<T>(activate<kActivation>(z, slope));
  }
}

template <Activation kActivation, bool kBackward, typename T>
SEAATTN_INLINE void plane(const T* gradient, const T* v, const T* row, const T* column,
                          int64_t height, int64_t width, float slope, T* out) {
  for (int64_t i = 0; i < height; ++i) {
    const float of_row = widen(row[i]);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const int64_t at = i * width + j;
      const float z = widen(v[at]) + (of_row + widen(column[j]));
      out[at] = element<kActivation, kBackward>(gradient, at, z, slope);
    }
  }
}

template <Activation kActivation, bool kBackward, typename T>
SEAATTN_INLINE void pixels(const T* gradient, const T* v, const T* row, const T* column,
                           int64_t width, int64_t channels, float slope, T* out) {
  for (int64_t j = 0; j < width; ++j) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = j * channels + c;
      const float z = widen(v[at]) + (widen(row[c]) + widen(column[at]));
      out[at] = element<kActivation, kBackward>(gradient, at, z, slope);
    }
  }
}

}  // namespace

#define SEAATTN_CASE(kActivation, body, ...) \
  case kActivation:                          \
    if (gradient) {                          \
      body<kActivation, true>(__VA_ARGS__);  \
    } else {                                 \
      body<kActivation, false>(__VA_ARGS__); \
    }                                        \
    break

#define SEAATTN_BODY(body, ...)                  \
  switch (activation) {                          \
    SEAATTN_CASE(kIdentity, body, __VA_ARGS__);  \
    SEAATTN_CASE(kRelu, body, __VA_ARGS__);      \
    SEAATTN_CASE(kRelu6, body, __VA_ARGS__);     \
    SEAATTN_CASE(kLeakyRelu, body, __VA_ARGS__); \
    SEAATTN_CASE(kSilu, body, __VA_ARGS__);      \
  }

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_INSTANTIATE(T)                                                                  \
  template <>                                                                                   \
  SEAATTN_CLONES void broadcast_add_plane<T>(const T* gradient, const T* v, const T* row,       \
                                             const T* column, int64_t height, int64_t width,    \
                                             Activation activation, float slope, T* out) {      \
    SEAATTN_BODY(plane, gradient, v, row, column, height, width, slope, out)                    \
  }                                                                                             \
  template <>                                                                                   \
  SEAATTN_CLONES void broadcast_add_pixels<T>(const T* gradient, const T* v, const T* row,      \
                                              const T* column, int64_t width, int64_t channels, \
                                              Activation activation, float slope, T* out) {     \
    SEAATTN_BODY(pixels, gradient, v, row, column, width, channels, slope, out)                 \
  }

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
