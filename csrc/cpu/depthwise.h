// The 3x3 convolution of single channels of a map whose BatchNorm is pending, and its gradients
// (seaattn_kernels/normalized.py). Raw pointers only: no tensors here.
//
//   out[i, j] = bias + sum_t weight[t] * n(y)[i + t / 3 - 1, j + t % 3 - 1]
//   dn = the same of the upstream gradient, the weights from last to first
//   dweight[t] = sum_ij gradient[i, j] * n(y)[i + t / 3 - 1, j + t % 3 - 1]
//
// A plane is copied in float32 between borders of zeros; one column of them serves the end of a row
// and the beginning of the next. So all rows are one line, whatever their length, and what is
// computed for the border is thrown away. Of NHWC the elements of such a plane are vectors of
// kChannels channels.
#pragma once

#include <cstdint>

#include "normalize.h"

namespace seaattn {

constexpr int64_t kChannels = 32;

struct Plane {
  int64_t height, width;
  int64_t pitch() const {
    return width + 1;
  }
  // Outputs, those of the border among them.
  int64_t line() const {
    return height * pitch();
  }
  // Where the plane itself begins.
  int64_t begin() const {
    return pitch() + 1;
  }
  // Elements of a copy, and those that a vector reads past the last one.
  int64_t size() const {
    return (height + 2) * pitch() + 1 + kChannels;
  }
};

// Of one channel; n(y), or y itself where the affine is null.
template <typename T>
void pad_plane(const T* y, Plane plane, Affine affine, float* padded);
// Of `channels` <= kChannels adjacent ones, `step` from pixel to pixel.
template <typename T>
void pad_channels(const T* y, int64_t step, int64_t channels, Plane plane, Affine affine,
                  float* padded);

// The way back from a line of outputs.
template <typename T>
void take_plane(const float* line, Plane plane, T* out);
template <typename T>
void take_channels(const float* line, int64_t step, int64_t channels, Plane plane, T* out);

// `weight` are nine numbers; nine vectors for channels, and `bias` a vector.
void convolve_plane(const float* padded, Plane plane, const float* weight, float bias, float* line);
void convolve_channels(const float* padded, Plane plane, const float* weight, const float* bias,
                       float* line);

// Adds dweight to nine sums, or to nine vectors of them.
void correlate_plane(const float* padded, const float* gradient, Plane plane, double* sums);
void correlate_channels(const float* padded, const float* gradient, Plane plane, double* sums);

}  // namespace seaattn
