// Tiles in shared memory of 64 channels a row, as the matrix units read them: rows of 128 bytes
// whose pieces of 16 bytes are exchanged by the row (the swizzle of 128 bytes of wgmma), and
// products of such tiles. Without wgmma the same tiles and results by mma.sync.
#pragma once

#include "common.cuh"
#include "wgmma.cuh"

namespace seaattn {

constexpr int kRow = 128;  // bytes: of 64 channels

// Where piece `piece` of a row lies; `key` is the row, or what takes its place modulo 8.
__device__ inline int swizzled(int piece, int key) {
  return (piece ^ (key & 7)) << 4;
}

// The 128 threads of a warpgroup copy `bytes`, a multiple of 16, and arrive kArrivals times in all
// once these, and what they copied before, are there.
constexpr int kArrivals = 129;
__device__ inline void copy_whole(void* to, const void* from, int bytes, Barrier* bar) {
  const int thread = threadIdx.x % 128;
#if __CUDA_ARCH__ >= 900
  if (thread == 0) copy_bulk(to, from, bytes, bar);
#else
  for (int i = thread * 16; i < bytes; i += 128 * 16)
    copy_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, true);
  if (thread == 0) arrive(bar);
#endif
  arrive_after_copies(bar);
}

// The products of a warpgroup: 64 rows of `a` by N rows of `b`, over the 64 channels of both.
//
// `d[4 i + j]` of a thread is in row 16 (warp) + (lane / 4) + 8 (j / 2) and column
// 8 i + 2 (lane % 4) + j % 2, as in a fragment of mma.m16n8. Both tiles begin at 1024 bytes.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ inline uint64_t descriptor(uint32_t address) {
  // Groups of eight rows lie 1024 bytes apart; the swizzle is that of 128 bytes.
  return ((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

// Starts `d = a b`, or `d += a b` where `add`.
template <typename T, int R>
__device__ void product(float (&d)[R], const char* a, const char* b, bool add) {
  const uint64_t da = descriptor(shared_address(a)), db = descriptor(shared_address(b));
#pragma unroll
  for (int k = 0; k < 4; ++k)  // 16 channels are 32 bytes
    wgmma<T>(d, da + 2 * k, db + 2 * k, add || k > 0);
}

#else

template <typename T, int R>
__device__ void product(float (&d)[R], const char* a, const char* b, bool add) {
  if (!add) {
#pragma unroll
    for (int i = 0; i < R; ++i) d[i] = 0;
  }
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t left[4];
    load_matrices(left, a + row * kRow + swizzled(2 * k + lane / 16, row));
#pragma unroll
    for (int n = 0; n < R / 8; ++n) {  // sixteen columns: rows of b
      uint32_t right[4];
      const int column = 16 * n + lane % 8 + lane / 16 * 8;
      load_matrices(right, b + column * kRow + swizzled(2 * k + lane / 8 % 2, column));
      multiply<T>(d + 8 * n, left[0], left[1], left[2], left[3], right[0], right[1]);
      multiply<T>(d + 8 * n + 4, left[0], left[1], left[2], left[3], right[2], right[3]);
    }
  }
}

#endif

}  // namespace seaattn
