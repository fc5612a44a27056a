// Row and column means, or sums, of a map in one read, and the adjoint of the means. Raw pointers
// only: no tensors here.
//
//   row[c, i] = mean_j x[c, i, j]        column[c, j] = mean_i x[c, i, j]
//
// Short runs of terms are summed in float32, the runs in float64, so a mean of a million terms is
// as exact as one of sixteen; rounded once, to the dtype of the map or to float32. Callers split
// the work by planes (NCHW) or by blocks of channels (NHWC), never within one: the bits of a result
// do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace seaattn {

// Channels that one task of squeeze_channels owns.
constexpr int64_t kChannelBlock = 32;

// float32 sums of a run, and float64 sums of the runs, one for each column.
struct SqueezeScratch {
  float* run;
  double* total;
};

// One plane: `height` rows of `width` adjacent elements, `row_stride` elements apart, each less
// `offset`. `scratch` holds `width` numbers of each kind.
template <typename T, typename Mean>
void squeeze_plane(const T* x, int64_t height, int64_t width, int64_t row_stride, Mean* row,
                   Mean* column, SqueezeScratch scratch, bool mean = true, float offset = 0.0f);

// `channels` <= kChannelBlock adjacent channels of an NHWC image that has `stride` of them.
// row is (channels, height), column (channels, width). `scratch` holds width * channels numbers of
// each kind. Each element less that of its channel in `offset`, if there is one.
template <typename T, typename Mean>
void squeeze_channels(const T* x, int64_t height, int64_t width, int64_t channels, int64_t stride,
                      Mean* row, Mean* column, SqueezeScratch scratch, bool mean = true,
                      const float* offset = nullptr);

// The adjoint of one plane, one write: grad[i, j] = row[i] / width + column[j] / height.
template <typename T>
void spread_plane(const T* row, const T* column, int64_t height, int64_t width, T* grad);

// The adjoint of one row of an NHWC image: grad[j, c] = row[c] / width + column[j, c] / height.
template <typename T>
void spread_line(const T* row, const T* column, int64_t height, int64_t width, int64_t channels,
                 T* grad);

}  // namespace seaattn
