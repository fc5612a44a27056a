#include "squeeze.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

// One body, compiled for several instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SEAATTN_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#define SEAATTN_INLINE inline __attribute__((always_inline))
#else
#define SEAATTN_CLONES
#define SEAATTN_INLINE inline
#endif

namespace seaattn {
namespace {

template <typename T>
SEAATTN_INLINE void squeeze_plane_body(const T* x, int64_t height, int64_t width,
                                       int64_t row_stride, T* row, T* column, double* total) {
  std::fill(total, total + width, 0.0);
  for (int64_t i = 0; i < height; ++i) {
    const T* line = x + i * row_stride;
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; ++j) {
      const double value = static_cast<float>(line[j]);
      sum += value;
      total[j] += value;
    }
    row[i] = static_cast<T>(static_cast<float>(sum / width));
  }
  for (int64_t j = 0; j < width; ++j) {
    column[j] = static_cast<T>(static_cast<float>(total[j] / height));
  }
}

template <typename T>
SEAATTN_INLINE void squeeze_channels_body(const T* x, int64_t height, int64_t width,
                                          int64_t channels, int64_t stride, T* row, T* column,
                                          double* total) {
  std::fill(total, total + width * channels, 0.0);
  for (int64_t i = 0; i < height; ++i) {
    double sum[kChannelBlock] = {};
    for (int64_t j = 0; j < width; ++j) {
      const T* pixel = x + (i * width + j) * stride;
      double* line = total + j * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const double value = static_cast<float>(pixel[c]);
        sum[c] += value;
        line[c] += value;
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      row[c * height + i] = static_cast<T>(static_cast<float>(sum[c] / width));
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t j = 0; j < width; ++j) {
      column[c * width + j] =
          static_cast<T>(static_cast<float>(total[j * channels + c] / height));
    }
  }
}

template <typename T>
SEAATTN_INLINE void spread_plane_body(const T* row, const T* column, int64_t height, int64_t width,
                                      T* grad) {
  const float per_width = static_cast<float>(width), per_height = static_cast<float>(height);
  for (int64_t i = 0; i < height; ++i) {
    const float of_row = static_cast<float>(row[i]) / per_width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      grad[i * width + j] = static_cast<T>(of_row + static_cast<float>(column[j]) / per_height);
    }
  }
}

template <typename T>
SEAATTN_INLINE void spread_channels_body(const T* row, const T* column, int64_t height,
                                         int64_t width, int64_t channels, T* grad) {
  const float per_width = static_cast<float>(width), per_height = static_cast<float>(height);
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      T* pixel = grad + (i * width + j) * channels;
      for (int64_t c = 0; c < channels; ++c) {
        pixel[c] = static_cast<T>(static_cast<float>(row[c * height + i]) / per_width +
                                  static_cast<float>(column[c * width + j]) / per_height);
      }
    }
  }
}

}  // namespace

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_INSTANTIATE(T)                                                                    \
  template <>                                                                                     \
  SEAATTN_CLONES void squeeze_plane<T>(const T* x, int64_t height, int64_t width,                 \
                                       int64_t row_stride, T* row, T* column, double* scratch) {  \
    squeeze_plane_body(x, height, width, row_stride, row, column, scratch);                       \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void squeeze_channels<T>(const T* x, int64_t height, int64_t width,              \
                                          int64_t channels, int64_t stride, T* row, T* column,    \
                                          double* scratch) {                                      \
    squeeze_channels_body(x, height, width, channels, stride, row, column, scratch);              \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void spread_plane<T>(const T* row, const T* column, int64_t height,              \
                                      int64_t width, T* grad) {                                   \
    spread_plane_body(row, column, height, width, grad);                                          \
  }                                                                                               \
  template <>                                                                                     \
  SEAATTN_CLONES void spread_channels<T>(const T* row, const T* column, int64_t height,           \
                                         int64_t width, int64_t channels, T* grad) {              \
    spread_channels_body(row, column, height, width, channels, grad);                             \
  }

SEAATTN_INSTANTIATE(float)
SEAATTN_INSTANTIATE(c10::Half)
SEAATTN_INSTANTIATE(c10::BFloat16)

}  // namespace seaattn
