#include "depthwise.h"

#include <algorithm>

#include "elementwise.h"
#include "simd.h"

namespace seaattn {
namespace {

constexpr int kTaps = 9;
// Elements, or pixels, whose products are summed in float32 before they join a float64 sum.
constexpr int64_t kRunOfElements = 2048, kRunOfPixels = 128;

template <typename T>
SEAATTN_INLINE void pad_plane_body(const T* y, Plane plane, Affine affine, float* padded) {
  const int64_t pitch = plane.pitch();
  const bool as_it_is = !affine.mean;
  const float mean = as_it_is ? 0.0f : *affine.mean, scale = as_it_is ? 1.0f : *affine.scale;
  const float shift = as_it_is ? 0.0f : *affine.shift;
  std::fill(padded, padded + plane.begin(), 0.0f);
  float* to = padded + plane.begin();
  for (int64_t i = 0; i < plane.height; ++i) {
    const T* row = y + i * plane.width;
#pragma omp simd
    for (int64_t j = 0; j < plane.width; ++j) to[j] = (widen(row[j]) - mean) * scale + shift;
    to[plane.width] = 0.0f;
    to += pitch;
  }
  std::fill(to, padded + plane.size(), 0.0f);
}

template <typename T>
SEAATTN_INLINE void pad_channels_body(const T* y, int64_t step, int64_t channels, Plane plane,
                                      Affine affine, float* padded) {
  float mean[kChannels] = {}, scale[kChannels] = {}, shift[kChannels] = {};
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = affine.mean ? affine.mean[c] : 0.0f;
    scale[c] = affine.mean ? affine.scale[c] : 1.0f;
    shift[c] = affine.mean ? affine.shift[c] : 0.0f;
  }
  std::fill(padded, padded + plane.begin() * kChannels, 0.0f);
  float* to = padded + plane.begin() * kChannels;
  for (int64_t i = 0; i < plane.height; ++i) {
    for (int64_t j = 0; j < plane.width; ++j, to += kChannels) {
      const T* pixel = y + (i * plane.width + j) * step;
      if (channels == kChannels) {
#pragma omp simd
        for (int64_t c = 0; c < kChannels; ++c) {
          to[c] = (widen(pixel[c]) - mean[c]) * scale[c] + shift[c];
        }
      } else {
        for (int64_t c = 0; c < kChannels; ++c) {
          to[c] = c < channels ? (widen(pixel[c]) - mean[c]) * scale[c] + shift[c] : 0.0f;
        }
      }
    }
    std::fill(to, to + kChannels, 0.0f);
    to += kChannels;
  }
  std::fill(to, padded + plane.size() * kChannels, 0.0f);
}

template <typename T>
SEAATTN_INLINE void take_plane_body(const float* line, Plane plane, T* out) {
  for (int64_t i = 0; i < plane.height; ++i) {
    const float* from = line + i * plane.pitch();
    T* to = out + i * plane.width;
#pragma omp simd
    for (int64_t j = 0; j < plane.width; ++j) to[j] = narrow<T>(from[j]);
  }
}

template <typename T>
SEAATTN_INLINE void take_channels_body(const float* line, int64_t step, int64_t channels,
                                       Plane plane, T* out) {
  for (int64_t i = 0; i < plane.height; ++i) {
    for (int64_t j = 0; j < plane.width; ++j) {
      const float* from = line + (i * plane.pitch() + j) * kChannels;
      T* to = out + (i * plane.width + j) * step;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[c] = narrow<T>(from[c]);
    }
  }
}

template <typename Isa>
SEAATTN_INLINE void convolve_plane_body(const float* padded, Plane plane, const float* weight,
                                        float bias, float* line) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  const int64_t pitch = plane.pitch(), count = plane.line();
  for (int64_t k = 0; k < count; k += kWidth) {
    // Two sums, so that one product need not wait for the last.
    Vector even = {}, odd = {};
    even += bias;
    for (int t = 0; t < kTaps; ++t) {
      const Vector values = *(const Vector*)(padded + k + t / 3 * pitch + t % 3);
      if (t % 2) {
        odd += values * weight[t];
      } else {
        even += values * weight[t];
      }
    }
    *(Vector*)(line + k) = even + odd;
  }
}

template <typename Isa>
SEAATTN_INLINE void convolve_channels_body(const float* padded, Plane plane, const float* weight,
                                           const float* bias, float* line) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  const int64_t pitch = plane.pitch(), count = plane.line();
  for (int64_t c = 0; c < kChannels; c += kWidth) {
    Vector taps[kTaps];
    for (int t = 0; t < kTaps; ++t) taps[t] = *(const Vector*)(weight + t * kChannels + c);
    const Vector start = *(const Vector*)(bias + c);
    for (int64_t k = 0; k < count; ++k) {
      Vector even = start, odd = {};
      for (int t = 0; t < kTaps; ++t) {
        const float* at = padded + (k + t / 3 * pitch + t % 3) * kChannels + c;
        if (t % 2) {
          odd += *(const Vector*)at * taps[t];
        } else {
          even += *(const Vector*)at * taps[t];
        }
      }
      *(Vector*)(line + k * kChannels + c) = even + odd;
    }
  }
}

template <typename Isa>
SEAATTN_INLINE void correlate_plane_body(const float* padded, const float* gradient, Plane plane,
                                         double* sums) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  const int64_t pitch = plane.pitch(), count = plane.line();
  const float* g = gradient + plane.begin();
  // Beyond the plane a gradient is zero, and so is what a vector reads past the last row.
  for (int64_t begin = 0; begin < count; begin += kRunOfElements) {
    const int64_t end = std::min(begin + kRunOfElements, count);
    Vector parts[kTaps] = {};
    for (int64_t k = begin; k < end; k += kWidth) {
      const Vector of_g = *(const Vector*)(g + k);
      for (int t = 0; t < kTaps; ++t) {
        parts[t] += of_g * *(const Vector*)(padded + k + t / 3 * pitch + t % 3);
      }
    }
    for (int t = 0; t < kTaps; ++t) {
      float sum = 0.0f;
      for (int l = 0; l < kWidth; ++l) sum += parts[t][l];
      sums[t] += sum;
    }
  }
}

template <typename Isa>
SEAATTN_INLINE void correlate_channels_body(const float* padded, const float* gradient, Plane plane,
                                            double* sums) {
  constexpr int kWidth = Isa::kWidth;
  typedef typename Vectors<kWidth>::Float Vector;
  const int64_t pitch = plane.pitch(), count = plane.line();
  const float* g = gradient + plane.begin() * kChannels;
  for (int64_t begin = 0; begin < count; begin += kRunOfPixels) {
    const int64_t end = std::min(begin + kRunOfPixels, count);
    for (int64_t c = 0; c < kChannels; c += kWidth) {
      Vector parts[kTaps] = {};
      for (int64_t k = begin; k < end; ++k) {
        const Vector of_g = *(const Vector*)(g + k * kChannels + c);
        for (int t = 0; t < kTaps; ++t) {
          parts[t] += of_g * *(const Vector*)(padded + (k + t / 3 * pitch + t % 3) * kChannels + c);
        }
      }
      for (int t = 0; t < kTaps; ++t) {
        for (int l = 0; l < kWidth; ++l) sums[t * kChannels + c + l] += parts[t][l];
      }
    }
  }
}

}  // namespace

SEAATTN_VERSIONS(convolve_plane,
                 (const float* padded, Plane plane, const float* weight, float bias, float* line),
                 (padded, plane, weight, bias, line))
SEAATTN_VERSIONS(convolve_channels,
                 (const float* padded, Plane plane, const float* weight, const float* bias,
                  float* line),
                 (padded, plane, weight, bias, line))
SEAATTN_VERSIONS(correlate_plane,
                 (const float* padded, const float* gradient, Plane plane, double* sums),
                 (padded, gradient, plane, sums))
SEAATTN_VERSIONS(correlate_channels,
                 (const float* padded, const float* gradient, Plane plane, double* sums),
                 (padded, gradient, plane, sums))

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_INSTANTIATE(T)                                                                 \
  template <>                                                                                  \
  SEAATTN_CLONES void pad_plane<T>(const T* y, Plane plane, Affine affine, float* padded) {    \
    pad_plane_body(y, plane, affine, padded);                                                  \
  }                                                                                            \
  template <>                                                                                  \
  SEAATTN_CLONES void pad_channels<T>(const T* y, int64_t step, int64_t channels, Plane plane, \
                                      Affine affine, float* padded) {                          \
    pad_channels_body(y, step, channels, plane, affine, padded);                               \
  }                                                                                            \
  template <>                                                                                  \
  SEAATTN_CLONES void take_plane<T>(const float* line, Plane plane, T* out) {                  \
    take_plane_body(line, plane, out);                                                         \
  }                                                                                            \
  template <>                                                                                  \
  SEAATTN_CLONES void take_channels<T>(const float* line, int64_t step, int64_t channels,      \
                                       Plane plane, T* out) {                                  \
    take_channels_body(line, step, channels, plane, out);                                      \
  }

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
