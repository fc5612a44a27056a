// What reads a map whose BatchNorm is pending, and the gradients: seaattn_kernels/normalized.py has
// the formulas. Raw pointers only: no tensors here.
//
//   n(y) = (y - mean) * scale + shift
//
// A map is read line by line. A line of NCHW lies in one plane, so its constants are one number
// each; a line of NHWC is the channels of a pixel, each with constants of its own. Arithmetic is
// float32; sums over runs of a line or of kPixels pixels are, and join in float64: the bits do not
// depend on the number of threads.
#pragma once

#include <cstdint>

#include "activation.h"

namespace seaattn {

// Pixels of an NHWC map whose sums are one task's, in float32.
constexpr int64_t kPixels = 128;

// Lines of `length` adjacent elements.
struct Lines {
  int64_t count, length;
  bool pixels;  // constants are vectors of `length`
  // From one line to the next, of each map and of the axis vectors.
  int64_t row_step, column_step;
};

// A map from its first line on.
template <typename T>
struct Reader {
  T* data;
  int64_t step;  // from one line to the next
};

// Of one channel, or of the channels of a pixel.
struct Affine {
  const float *mean, *scale, *shift;
};
struct Terms {
  const float *offset, *factor;
};

// One number a line of NCHW and one an element of its columns; vectors of a pixel in NHWC. Null
// where nothing is added.
struct Axes {
  const float *row, *column;
};

// out = act(n(y) + row + column); where `gradient` is given, gradient * act'(the same) instead.
template <typename T>
void normalize_lines(Lines lines, Reader<const T> gradient, Reader<const T> y, Affine affine,
                     Axes axes, Activation activation, float slope, Reader<T> out);

// Adds the sums of g and of g * (y - mean) to `sums`, g = gradient * act'(n(y)), or with axes
// gradient + row + column. In pixels float32 to vectors, else float64 to two numbers.
template <typename T, typename Sum>
void normalize_sums_lines(Lines lines, Reader<const T> gradient, Reader<const T> y, Affine affine,
                          Axes axes, Activation activation, float slope, Sum* sum, Sum* dot);

// out = scale * (g - offset - (y - mean) * factor)
template <typename T>
void normalize_backward_lines(Lines lines, Reader<const T> gradient, Reader<const T> y,
                              Affine affine, Terms terms, Axes axes, Activation activation,
                              float slope, Reader<T> out);

// Two maps, and the affines of both.
template <typename T>
struct Gated {
  Reader<const T> x, y;
  Affine of_x, of_y;
  bool hard;
};

// out = sigmoid(n(x)) * n(y)
template <typename T>
void normalize_gate_lines(Lines lines, Gated<T> maps, Reader<T> out);

// Adds the sums of the gradients of n(x) and of n(y), as normalize_sums_lines.
template <typename T, typename Sum>
void normalize_gate_sums_lines(Lines lines, Reader<const T> gradient, Gated<T> maps,
                               Sum* const sums[4]);

template <typename T>
void normalize_gate_backward_lines(Lines lines, Reader<const T> gradient, Gated<T> maps, Terms of_x,
                                   Terms of_y, Reader<T> dx, Reader<T> dy);

// The sum of y, and of (y - mean)**2, of one channel.
template <typename T>
double sum_of_line(const T* y, int64_t length);
template <typename T>
double deviations_of_line(const T* y, int64_t length, float mean);

// Of a run of pixels, the mean and the sum of squared deviations from it of each channel.
template <typename T>
void moments_of_pixels(Lines lines, Reader<const T> y, float* mean, float* deviations);

}  // namespace seaattn
