#include "squeeze.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "elementwise.h"
#include "simd.h"

namespace seaattn {
namespace {

// Terms that are summed in float32 before they join a float64 sum.
constexpr int64_t kRunOfRows = 16;
constexpr int64_t kRunOfElements = 2048;  // 128 a lane
constexpr int64_t kRunOfPixels = 16;

constexpr int64_t kLanes = 16;
typedef Vectors<kLanes>::Float Lanes;

template <typename T>
SEAATTN_INLINE Lanes load(const T* from) {
  float wide[kLanes];
#pragma omp simd
  for (int64_t l = 0; l < kLanes; ++l) wide[l] = widen(from[l]);
  return *(const Lanes*)wide;
}

template <typename T>
SEAATTN_INLINE T rounded(double sum, double reciprocal) {
  return narrow<T>(static_cast<float>(sum * reciprocal));
}

// Adds `kRows` rows to `run`, so that it is read and written once for all of them, and their own
// sums to `sums`.
template <int kRows, typename T>
SEAATTN_INLINE void add_rows(const T* x, int64_t row_stride, int64_t width, float offset,
                             float* run, double* sums) {
  for (int64_t begin = 0; begin < width; begin += kRunOfElements) {
    const int64_t end = std::min(begin + kRunOfElements, width);
    Lanes parts[kRows] = {};
    int64_t j = begin;
    for (; j + kLanes <= end; j += kLanes) {
      Lanes of_columns = load(run + j);
      for (int r = 0; r < kRows; ++r) {
        const Lanes values = load(x + r * row_stride + j) - offset;
        parts[r] += values;
        of_columns += values;
      }
      *(Lanes*)(run + j) = of_columns;
    }
    for (int r = 0; r < kRows; ++r) {
      float tail = 0.0f;
      for (int64_t t = j; t < end; ++t) {
        const float value = widen(x[r * row_stride + t]) - offset;
        tail += value;
        run[t] += value;
      }
      sums[r] += static_cast<double>(sum_of(parts[r])) + tail;
    }
  }
}

template <typename T, typename Mean>
SEAATTN_INLINE void squeeze_plane_body(const T* x, int64_t height, int64_t width,
                                       int64_t row_stride, Mean* row, Mean* column,
                                       SqueezeScratch scratch, bool mean, float offset) {
  constexpr int kRows = 4;
  const double per_width = mean ? 1.0 / width : 1.0, per_height = mean ? 1.0 / height : 1.0;
  float* run = scratch.run;
  double* total = scratch.total;
  std::fill(total, total + width, 0.0);
  for (int64_t first = 0; first < height; first += kRunOfRows) {
    std::fill(run, run + width, 0.0f);
    const int64_t last = std::min(first + kRunOfRows, height);
    int64_t i = first;
    for (; i + kRows <= last; i += kRows) {
      double sums[kRows] = {};
      add_rows<kRows>(x + i * row_stride, row_stride, width, offset, run, sums);
      for (int r = 0; r < kRows; ++r) row[i + r] = rounded<Mean>(sums[r], per_width);
    }
    for (; i < last; ++i) {
      double sum = 0.0;
      add_rows<1>(x + i * row_stride, row_stride, width, offset, run, &sum);
      row[i] = rounded<Mean>(sum, per_width);
    }
    for (int64_t j = 0; j < width; ++j) total[j] += run[j];
  }
  for (int64_t j = 0; j < width; ++j) column[j] = rounded<Mean>(total[j], per_height);
}

template <typename T, typename Mean>
SEAATTN_INLINE void squeeze_channels_body(const T* x, int64_t height, int64_t width,
                                          int64_t channels, int64_t stride, Mean* row, Mean* column,
                                          SqueezeScratch scratch, bool mean, const float* offset) {
  float less[kChannelBlock] = {};
  if (offset) std::copy(offset, offset + channels, less);
  const int64_t line_size = width * channels;
  const double per_width = mean ? 1.0 / width : 1.0, per_height = mean ? 1.0 / height : 1.0;
  float* run = scratch.run;
  double* total = scratch.total;
  std::fill(total, total + line_size, 0.0);
  for (int64_t first = 0; first < height; first += kRunOfRows) {
    std::fill(run, run + line_size, 0.0f);
    const int64_t last = std::min(first + kRunOfRows, height);
    for (int64_t i = first; i < last; ++i) {
      double sum[kChannelBlock] = {};
      for (int64_t begin = 0; begin < width; begin += kRunOfPixels) {
        const int64_t end = std::min(begin + kRunOfPixels, width);
        float part[kChannelBlock] = {};
        for (int64_t j = begin; j < end; ++j) {
          const T* pixel = x + (i * width + j) * stride;
          float* of_column = run + j * channels;
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) {
            const float value = widen(pixel[c]) - less[c];
            part[c] += value;
            of_column[c] += value;
          }
        }
        for (int64_t c = 0; c < channels; ++c) sum[c] += part[c];
      }
      for (int64_t c = 0; c < channels; ++c) row[c * height + i] = rounded<Mean>(sum[c], per_width);
    }
#pragma omp simd
    for (int64_t k = 0; k < line_size; ++k) total[k] += run[k];
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t j = 0; j < width; ++j) {
      column[c * width + j] = rounded<Mean>(total[j * channels + c], per_height);
    }
  }
}

template <typename T>
SEAATTN_INLINE void spread_plane_body(const T* row, const T* column, int64_t height, int64_t width,
                                      T* grad) {
  const float per_width = 1.0f / width, per_height = 1.0f / height;
  for (int64_t i = 0; i < height; ++i) {
    const float of_row = widen(row[i]) * per_width;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      grad[i * width + j] = narrow<T>(of_row + widen(column[j]) * per_height);
    }
  }
}

template <typename T>
SEAATTN_INLINE void spread_line_body(const T* row, const T* column, int64_t height, int64_t width,
                                     int64_t channels, T* grad) {
  const float per_width = 1.0f / width, per_height = 1.0f / height;
  for (int64_t j = 0; j < width; ++j) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      grad[j * channels + c] =
          narrow<T>(widen(row[c]) * per_width + widen(column[j * channels + c]) * per_height);
    }
  }
}

}  // namespace

// Clones need functions that are no templates: one set for each dtype.
#define SEAATTN_SQUEEZE(T, Mean)                                                                   \
  template <>                                                                                      \
  SEAATTN_CLONES void squeeze_plane<T>(const T* x, int64_t height, int64_t width,                  \
                                       int64_t row_stride, Mean* row, Mean* column,                \
                                       SqueezeScratch scratch, bool mean, float offset) {          \
    squeeze_plane_body(x, height, width, row_stride, row, column, scratch, mean, offset);          \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void squeeze_channels<T>(                                                         \
      const T* x, int64_t height, int64_t width, int64_t channels, int64_t stride, Mean* row,      \
      Mean* column, SqueezeScratch scratch, bool mean, const float* offset) {                      \
    squeeze_channels_body(x, height, width, channels, stride, row, column, scratch, mean, offset); \
  }
#define SEAATTN_SPREAD(T)                                                                          \
  template <>                                                                                      \
  SEAATTN_CLONES void spread_plane<T>(const T* row, const T* column, int64_t height,               \
                                      int64_t width, T* grad) {                                    \
    spread_plane_body(row, column, height, width, grad);                                           \
  }                                                                                                \
  template <>                                                                                      \
  SEAATTN_CLONES void spread_line<T>(const T* row, const T* column, int64_t height, int64_t width, \
                                     int64_t channels, T* grad) {                                  \
    spread_line_body(row, column, height, width, channels, grad);                                  \
  }

SEAATTN_SQUEEZE(float, float)
SEAATTN_SQUEEZE(c10::Half, c10::Half)
SEAATTN_SQUEEZE(c10::BFloat16, c10::BFloat16)
SEAATTN_SQUEEZE(c10::Half, float)
SEAATTN_SQUEEZE(c10::BFloat16, float)
SEAATTN_SPREAD(float)
SEAATTN_SPREAD(c10::Half)
SEAATTN_SPREAD(c10::BFloat16)

}  // namespace seaattn
