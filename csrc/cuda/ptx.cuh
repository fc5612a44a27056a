// Instructions that C++ has no name for, one a function. Nothing else of csrc/cuda is tied to a
// compiler; where it is not nvcc, tests/emulated brings the same functions for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace seaattn {

// A barrier in shared memory, for copies and for warps.
struct Barrier {
  uint64_t state;
};

}  // namespace seaattn

#ifndef __CUDACC__
#include "instructions.h"
#else

namespace seaattn {

// --- numbers, registers, memory ------------------------------------------------------------------

// min(max(x, 0), most). NaN goes through, as in PyTorch.
__device__ inline float clamped(float x, float most) {
  float y;
  asm("{\n.reg .f32 t;\nmax.NaN.f32 t, %1, 0f00000000;\nmin.NaN.f32 %0, t, %2;\n}"
      : "=f"(y)
      : "f"(x), "f"(most));
  return y;
}

// Keeps what is computed from a value out of registers that live through a loop.
__device__ inline int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A warpgroup leaves its registers to the others, or takes what these left.
template <int COUNT>
__device__ void give_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// Declares the shared memory of the launch; it begins at a multiple of 16 bytes. Through a function
// the compiler would choose other registers.
#define SEAATTN_SHARED_MEMORY(NAME) extern __shared__ __align__(16) char NAME[]

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Past the first cache; zeros where not `inside`.
template <int WORDS>
__device__ inline void load_words(uint32_t (&x)[WORDS], const void* from, bool inside) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) x[i] = 0;
  if constexpr (WORDS == 4) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])
        : "l"(from), "r"(static_cast<int>(inside))
        : "memory");
  } else {
    static_assert(WORDS == 2);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\n@p ld.global.cg.v2.u32 {%0, %1}, [%2];\n}"
        : "+r"(x[0]), "+r"(x[1])
        : "l"(from), "r"(static_cast<int>(inside))
        : "memory");
  }
}

// --- copies to shared memory ---------------------------------------------------------------------

// 16 bytes; zeros where not `inside`.
__device__ inline void copy_async(void* to, const void* from, bool inside = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
// Waits for those of this thread.
__device__ inline void copies_done() {
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");
}
// Arrives when the copies that this thread started before are done.
__device__ inline void arrive_after_copies(Barrier* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar))
               : "memory");
}
#if __CUDA_ARCH__ >= 900
// A multiple of 16 bytes by one thread, which arrives; the barrier waits for the bytes too.
__device__ inline void copy_bulk(void* to, const void* from, int bytes, Barrier* bar) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
#endif

// --- barriers ------------------------------------------------------------------------------------

__device__ inline void prepare(Barrier* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}
// After the last that a thread prepares.
__device__ inline void prepared() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ inline void arrive(Barrier* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ inline void wait(Barrier* bar, int parity) {
  int done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(bar)), "r"(parity)
        : "memory");
#endif
  } while (!done);
}
// Among the warps of `threads` threads.
__device__ inline void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// What this thread wrote to shared memory is seen by the matrix units after the next barrier.
__device__ inline void publish() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// --- products of a warp --------------------------------------------------------------------------

// d += a b, 16 x 8 by 16 channels.
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
// Four 8 x 8 matrices of 16 bits; a lane gives the address of a row.
__device__ inline void load_matrices(uint32_t (&r)[4], const char* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(at)));
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

#endif
