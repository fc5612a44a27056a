// The instructions of csrc/cuda/ptx.cuh and wgmma.cuh, for the machine of machine.h.
#pragma once

#include "machine.h"
#include "toolkit.h"

#define SEAATTN_SHARED_MEMORY(NAME) char* const NAME = emulated::shared_memory()

namespace seaattn {

using emulated::Site;

// --- numbers, registers, memory ------------------------------------------------------------------

inline float clamped(float x, float most) {
  return x != x ? x : x < 0 ? 0 : x > most ? most : x;
}
inline int afresh(int x) {
  return x;
}
template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}

inline uint32_t shared_address(const void* p, Site site = Site::current()) {
  return emulated::shared_address(p, site);
}
template <int WORDS>
void load_words(uint32_t (&x)[WORDS], const void* from, bool inside, Site site = Site::current()) {
  if (inside) emulated::check_global(from, sizeof x, sizeof x, site);
  for (int i = 0; i < WORDS; ++i) x[i] = inside ? static_cast<const uint32_t*>(from)[i] : 0;
}

// --- copies to shared memory ---------------------------------------------------------------------

inline void copy_async(void* to, const void* from, bool inside = true,
                       Site site = Site::current()) {
  emulated::copy(to, from, inside, site);
}
inline void copies_done() {
  emulated::copies_done();
}
inline void arrive_after_copies(Barrier* bar, Site site = Site::current()) {
  emulated::arrive_after_copies(&bar->state, site);
}
inline void copy_bulk(void* to, const void* from, int bytes, Barrier* bar,
                      Site site = Site::current()) {
  emulated::copy_bulk(to, from, bytes, &bar->state, site);
}

// --- barriers ------------------------------------------------------------------------------------

inline void prepare(Barrier* bar, int arrivals, Site site = Site::current()) {
  emulated::prepare(&bar->state, arrivals, site);
}
inline void prepared() {}
inline void arrive(Barrier* bar, Site site = Site::current()) {
  emulated::arrive(&bar->state, site);
}
inline void wait(Barrier* bar, int parity, Site site = Site::current()) {
  emulated::wait(&bar->state, parity, site);
}
inline void meet(int id, int threads, Site site = Site::current()) {
  emulated::meet(id, threads, site);
}
inline void publish() {
  emulated::publish();
}

// --- products of a warp --------------------------------------------------------------------------

template <typename T>
void widen(uint32_t word, float* to) {
  T both[2];
  std::memcpy(both, &word, 4);
  to[0] = both[0], to[1] = both[1];
}

template <typename T>
void multiply(float* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
              uint32_t b1, Site site = Site::current()) {
  const emulated::Words* all = emulated::gather("mma", {{a0, a1, a2, a3, b0, b1}}, site);
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < 8; ++k) {  // pairs of channels
    const uint32_t* a = all[lane / 4 * 4 + k % 4].words + k / 4 * 2;
    float left[2][2], right[2][2];
    for (int i = 0; i < 2; ++i) {
      widen<T>(a[i], left[i]);
      widen<T>(all[(lane % 4 * 2 + i) * 4 + k % 4].words[4 + k / 4], right[i]);
    }
    for (int i = 0; i < 4; ++i)
      d[i] += left[i / 2][0] * right[i % 2][0] + left[i / 2][1] * right[i % 2][1];
  }
}
inline void load_matrices(uint32_t (&r)[4], const char* at, Site site = Site::current()) {
  emulated::Words mine{{emulated::shared_address(at, site)}};
  std::memcpy(mine.words + 2, &at, sizeof at);
  if (mine.words[0] % 16) emulated::fail("ldmatrix of a row that is not aligned", site);
  const emulated::Words* all = emulated::gather("ldmatrix", mine, site);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const char* row;
    std::memcpy(&row, all[8 * i + lane / 4].words + 2, sizeof row);
    std::memcpy(r + i, row + lane % 4 * 4, 4);
  }
}

// --- products of a warpgroup ---------------------------------------------------------------------

inline void products_begin() {
  emulated::products_begin();
}
inline void products_end(Site site = Site::current()) {
  emulated::products_end(site);
}
inline void products_wait(Site site = Site::current()) {
  emulated::products_wait(site);
}
template <typename T>
void widen(const char* from, float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = reinterpret_cast<const T*>(from)[i];
}
template <typename T, int R>
void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool add, Site site = Site::current()) {
  emulated::product(d, R, a, b, add, widen<T>, site);
}

// --- kernels that overlap, and clusters of blocks ------------------------------------------------

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}
inline void cluster_arrive(Site site = Site::current()) {
  emulated::cluster_arrive(site);
}
inline void cluster_wait(Site site = Site::current()) {
  emulated::cluster_wait(site);
}
inline void store_in(int block, const void* mine, float x, Site site = Site::current()) {
  std::memcpy(emulated::in_block(block, mine, site), &x, sizeof x);
}

}  // namespace seaattn
