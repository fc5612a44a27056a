// Row and column means of a map in one read, and the adjoint. Raw pointers only: no torch here.
//
//   row[c, i] = mean_j x[c, i, j]        column[c, j] = mean_i x[c, i, j]
//
// Sums are float64 whatever T is, so the order of the terms hardly matters and the result does not
// depend on the number of threads: a caller splits the work by planes (NCHW) or by blocks of
// channels (NHWC), never within one.
#pragma once

#include <cstdint>

namespace seaattn {

// Channels that one task of the NHWC loops owns.
constexpr int64_t kChannelBlock = 32;

// One plane of `height` rows, `row_stride` elements apart, each of `width` adjacent elements.
// `scratch` holds `width` doubles.
template <typename T>
void squeeze_plane(const T* x, int64_t height, int64_t width, int64_t row_stride, T* row, T* column,
                   double* scratch);

// `channels` <= kChannelBlock adjacent channels of an NHWC image with `stride` channels in all.
// row is (channels, height), column (channels, width). `scratch` holds width * kChannelBlock doubles.
template <typename T>
void squeeze_channels(const T* x, int64_t height, int64_t width, int64_t channels, int64_t stride,
                      T* row, T* column, double* scratch);

// The adjoint, one write: grad[i, j] = row[i] / width + column[j] / height, in float32.
template <typename T>
void spread_plane(const T* row, const T* column, int64_t height, int64_t width, T* grad);

// The same for an NHWC image of all its channels: row (channels, height), column (channels, width).
template <typename T>
void spread_channels(const T* row, const T* column, int64_t height, int64_t width, int64_t channels,
                     T* grad);

}  // namespace seaattn
