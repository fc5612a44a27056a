// What the block does between its matrix products, on panels. Raw pointers only: no tensors here.
#pragma once

#include <cstdint>

#include "activation.h"
#include "product.h"

namespace seaattn {

// Some neighbours in a row of the map, and where they lie in a panel of q, k and v, in floats:
// `above`, `here` and `below` are the pixels to the left of the first in three rows.
struct Segment {
  int64_t above, here, below;
  int64_t row, column, pixels;
};

// out = act(depthwise 3x3 convolution of the field), of one panel. `weight` is (9, 16).
void depthwise(const float* field, const Segment* segments, int64_t count, const float* weight,
               const float* bias, Activation activation, float slope, float* out);

// out = act(v + (row + column)), of one panel. v lies in the field, `row` is (height, 16),
// `column` (width, 16).
void mix(const float* field, const Segment* segments, int64_t count, const float* row,
         const float* column, Activation activation, float slope, float* out);

// x = act(x)
void activate(int64_t count, float* x, Activation activation, float slope);

// Means along both axes of one panel, whose first pixel `field` points to: `pitch` pixels lie from
// row to row. `row` is (height, 16), `column` (width, 16).
void panel_means(const float* field, int64_t height, int64_t width, int64_t pitch, float* row,
                 float* column);

// sums += run
void add_run(int64_t count, const float* run, double* sums);

// out[p] = sums[p] + bias, of one panel.
void round_sums(int64_t pixels, const double* sums, const float* bias, float* out);

}  // namespace seaattn
