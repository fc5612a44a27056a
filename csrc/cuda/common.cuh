// Pairs of half precision, which the kernels load, convert and store at once.
#pragma once

#include "ptx.cuh"

namespace seaattn {

template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ float2 wide(__half2 x) {
    return __half22float2(x);
  }
  static __device__ __half2 narrow(float x, float y) {
    return __floats2half2_rn(x, y);
  }
};
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ float2 wide(__nv_bfloat162 x) {
    return __bfloat1622float2(x);
  }
  static __device__ __nv_bfloat162 narrow(float x, float y) {
    return __floats2bfloat162_rn(x, y);
  }
};

}  // namespace seaattn
