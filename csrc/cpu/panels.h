// Between a map of any dtype and layout and the panels of product.h. Raw pointers only.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#include "product.h"

namespace seaattn {

// Pixels of a map at `pixel` + p * pixel_stride, their channels channel_stride apart: one of the
// two strides is 1.
template <typename T>
struct Pixels {
  T* data;
  int64_t channel_stride;
  int64_t pixel_stride;
};

// panels[c / 16, p, c % 16] = x[p, c] in float32; `stride` floats from panel to panel. Lanes past
// the last channel are zero.
void to_panels(Pixels<const float> x, int64_t channels, int64_t pixels, float* panels,
               int64_t stride);
void to_panels(Pixels<const c10::Half> x, int64_t channels, int64_t pixels, float* panels,
               int64_t stride);
void to_panels(Pixels<const c10::BFloat16> x, int64_t channels, int64_t pixels, float* panels,
               int64_t stride);

// The way back, rounded to the dtype of the map.
void from_panels(const float* panels, int64_t stride, int64_t channels, int64_t pixels,
                 Pixels<float> out);
void from_panels(const float* panels, int64_t stride, int64_t channels, int64_t pixels,
                 Pixels<c10::Half> out);
void from_panels(const float* panels, int64_t stride, int64_t channels, int64_t pixels,
                 Pixels<c10::BFloat16> out);

}  // namespace seaattn
