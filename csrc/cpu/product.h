// The matrix product of the block. Raw pointers only: no tensors here.
//
// Operands lie in panels of sixteen channels: a map of `pixels` is (panels, pixels, 16), a weight
// (panels of its outputs, inputs, 16). Both are then read in the order of memory, and channels fill
// vectors however wide the map is.
#pragma once

#include <cstdint>

namespace seaattn {

constexpr int64_t kPanel = 16;

constexpr int64_t panels_of(int64_t channels) {
  return (channels + kPanel - 1) / kPanel;
}

// The first of adjacent panels, `stride` floats apart.
template <typename Float>
struct PanelsOf {
  Float* data;
  int64_t stride;
  PanelsOf from(int64_t panel) const {
    return {data + panel * stride, stride};
  }
};
using Panels = PanelsOf<float>;
using ConstPanels = PanelsOf<const float>;

// Memory that is needed soon, fetched bit by bit while something else is computed: `rows` of
// `bytes` each.
struct Fetch {
  const char* data = nullptr;
  int64_t stride = 0, rows = 0, bytes = 0;
};

// out[p, n] = bias[n] + sum_k a[p, k] * weight[n, k], in float32, the terms added in the order of
// k: the bits of an element depend on nothing but its own inputs.
//
// `a` has panels_of(depth) panels, `weight`, `bias` and `out` have `panels` of them. Pixel p is
// written at place `where[p]` of a panel, at p itself where that is null. No bias: zero.
void product(int64_t pixels, int64_t panels, int64_t depth, ConstPanels a, ConstPanels weight,
             const float* bias, Panels out, const int32_t* where, const Fetch& fetch);

}  // namespace seaattn
