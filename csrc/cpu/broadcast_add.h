// A row and a column vector added to a map, then an activation, and the gradient of the map. Raw
// pointers only: no tensors here.
//
//   z[c, i, j] = v[c, i, j] + (row[c, i] + column[c, j])        out = act(z)
//   dv = dout * act'(z)
//
// The gradients of row and column are sums of dv along its rows and columns: squeeze.h. Arithmetic
// is float32; act' is PyTorch's at the kinks; NaN goes through.
#pragma once

#include <cstdint>

#include "activation.h"

namespace seaattn {

// One plane of an NCHW map. Where `gradient` is not null, dv instead of the result.
template <typename T>
void broadcast_add_plane(const T* gradient, const T* v, const T* row, const T* column,
                         int64_t height, int64_t width, Activation activation, float slope, T* out);

// One line of an NHWC map, (width, channels): row (channels), column (width, channels).
template <typename T>
void broadcast_add_pixels(const T* gradient, const T* v, const T* row, const T* column,
                          int64_t width, int64_t channels, Activation activation, float slope,
                          T* out);

}  // namespace seaattn
