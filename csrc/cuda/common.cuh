// What the kernels share: conversions, NaN, and instructions that C++ has no name for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

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

// min(max(x, 0), most). NaN goes through, as in PyTorch.
__device__ inline float clamped(float x, float most) {
  float y;
  asm("{\n.reg .f32 t;\nmax.NaN.f32 t, %1, 0f00000000;\nmin.NaN.f32 %0, t, %2;\n}"
      : "=f"(y)
      : "f"(x), "f"(most));
  return y;
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory; zeros where not `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void copies_done() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}

// d += a b, 16 x 8 by 16 channels, by a warp.
template <typename T>
__device__ inline void multiply(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// --- from compute capability 9.0 on: kernels that overlap, and clusters of blocks ---------------

#if __CUDA_ARCH__ >= 900
// Before the first read of what the kernel before wrote, and before the first write.
__device__ inline void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ inline void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What a thread wrote before it arrived is seen by all threads of the cluster that have waited.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// To the same place in the shared memory of a block of the cluster.
__device__ inline void store_in(int block, const void* mine, float x) {
  uint32_t theirs;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(theirs)
               : "r"(shared_address(mine)), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(x) : "memory");
}
#else
// Compiled and never launched: what needs a cluster is for 9.0 and later.
__device__ inline void wait_for_previous_kernel() {}
__device__ inline void let_next_kernel_start() {}
__device__ inline void cluster_arrive() {
  __trap();
}
__device__ inline void cluster_wait() {}
__device__ inline void store_in(int, const void*, float) {}
#endif

}  // namespace seaattn
