// The whole block in eval mode, from folded weights. Raw pointers only: no tensors here.
//
// Everything inside is float32 and lies in panels (product.h). The map of q, k and v, which is the
// largest, never exists as a whole on large maps: a thread makes some rows of it, with one more on
// each side, and takes from them what the depthwise convolution and the gate need while they are
// in its cache. Small maps keep it, for then their axis vectors are its means.
#pragma once

#include <cstdint>
#include <functional>

#include "activation.h"
#include "product.h"

namespace seaattn {

struct BlockSizes {
  int64_t channels, height, width, heads, key_dim, value_dim;
  Activation activation;
  float negative_slope;
  bool hard;

  int64_t values() const {
    return heads * value_dim;
  }
  // Panels of queries and keys, and of values, which begin a panel of their own.
  int64_t key_panels() const {
    return panels_of(2 * heads * key_dim);
  }
  int64_t value_panels() const {
    return panels_of(values());
  }
  int64_t panels() const {
    return key_panels() + value_panels();
  }
  // Both axes side by side, each from a multiple of sixteen on.
  int64_t column_start() const {
    return panels_of(height) * kPanel;
  }
  int64_t axis_length() const {
    return column_start() + panels_of(width) * kPanel;
  }
};

// The fields of fold.PanelWeights.
struct BlockWeights {
  const float *qkv_weight, *qkv_bias, *dw_weight, *dw_bias, *pw_weight, *pw_bias, *encode_weight,
      *encode_bias, *proj_weight, *proj_bias, *position;
};

// A batch of maps, strides in elements. The stride of pixels or that of channels is 1.
template <typename T>
struct MapOf {
  T* data;
  int64_t image, channel, row, pixel;
};

// run(n, task) calls task(i) for each i below n, in any order and on any threads, and waits.
using Run = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Floats of scratch for a call on so many threads, at a multiple of 64 bytes.
int64_t block_scratch(const BlockSizes& sizes, int64_t images, int64_t threads);

// The bits of the result do not depend on the number of threads.
template <typename T>
void run_block(const BlockSizes& sizes, const BlockWeights& weights, int64_t images,
               MapOf<const T> x, MapOf<T> out, int64_t threads, const Run& run, float* scratch);

}  // namespace seaattn
