// What the kernels of csrc/cuda take from the CUDA toolkit, for a C++ compiler and a CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

using emulated::blockIdx;
using emulated::threadIdx;
using std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

using __half = _Float16;
struct alignas(4) __half2 {
  __half x, y;
};
inline float2 __half22float2(__half2 x) {
  return {static_cast<float>(x.x), static_cast<float>(x.y)};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<__half>(x), static_cast<__half>(y)};
}

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    bits = x != x ? 0x7FFF : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {x.x, x.y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__nv_bfloat16(x), __nv_bfloat16(y)};
}

inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __expf(float x) {
  return std::exp(x);
}
template <typename T>
T __ldg(const T* from, emulated::Site site = emulated::Site::current()) {
  emulated::check_global(from, sizeof(T), sizeof(T), site);
  return *from;
}

inline void __syncthreads(emulated::Site site = emulated::Site::current()) {
  emulated::meet(0, emulated::threads(), site);
}
inline void __syncwarp(emulated::Site site = emulated::Site::current()) {
  emulated::gather("__syncwarp", {}, site);
}
inline float __shfl_xor_sync(unsigned, float x, int other,
                             emulated::Site site = emulated::Site::current()) {
  emulated::Words mine;
  std::memcpy(mine.words, &x, 4);
  const emulated::Words* all = emulated::gather("__shfl_xor_sync", mine, site);
  std::memcpy(&x, all[threadIdx.x % 32 ^ other].words, 4);
  return x;
}
