// Matrix products of a warpgroup: 64 x N of float32, N = 32, 64, 96 or 128, from operands of half
// precision in shared memory (PTX ISA, "wgmma.mma_async"). One overload for each N, by the number
// of results that a thread holds.
#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__  // another compiler takes them from where ptx.cuh does

namespace seaattn {

// Around products that start together. Their results are there after `products_wait`.
__device__ inline void products_begin() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void products_end() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
__device__ inline void products_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// clang-format off
#define SEAATTN_WGMMA_32(TYPE)                                                                    \
  asm volatile(                                                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"                                                  \
    "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {"                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                        \
    "}, %16, %17, p, 1, 1, 0, 0;\n}\n"                                                            \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),\
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])\
    : "l"(a), "l"(b), "r"(add))
template <typename T>
__device__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) SEAATTN_WGMMA_32("f16");
  else SEAATTN_WGMMA_32("bf16");
}

#define SEAATTN_WGMMA_64(TYPE)                                                                    \
  asm volatile(                                                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                  \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"              \
    "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                            \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),\
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),\
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])\
    : "l"(a), "l"(b), "r"(add))
template <typename T>
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) SEAATTN_WGMMA_64("f16");
  else SEAATTN_WGMMA_64("bf16");
}

#define SEAATTN_WGMMA_96(TYPE)                                                                    \
  asm volatile(                                                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %50, 0;\n"                                                  \
    "wgmma.mma_async.sync.aligned.m64n96k16.f32." TYPE "." TYPE " {"                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"              \
    "}, %48, %49, p, 1, 1, 0, 0;\n}\n"                                                            \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),\
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),\
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),\
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),\
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])\
    : "l"(a), "l"(b), "r"(add))
template <typename T>
__device__ void wgmma(float (&d)[48], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) SEAATTN_WGMMA_96("f16");
  else SEAATTN_WGMMA_96("bf16");
}

#define SEAATTN_WGMMA_128(TYPE)                                                                   \
  asm volatile(                                                                                   \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                  \
    "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31,"             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"              \
    "}, %64, %65, p, 1, 1, 0, 0;\n}\n"                                                            \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),\
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),\
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),\
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),\
      "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),\
      "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),\
      "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),\
      "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])\
    : "l"(a), "l"(b), "r"(add))
template <typename T>
__device__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
  if constexpr (std::is_same_v<T, __half>) SEAATTN_WGMMA_128("f16");
  else SEAATTN_WGMMA_128("bf16");
}

// clang-format on

}  // namespace seaattn

#endif
