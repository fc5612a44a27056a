// A multiprocessor on one CPU thread, of compute capability 9.0 and of bad will.
//
// Every CUDA thread of a cluster is a fiber: it runs until it synchronises, and then any other may
// go on, by a seed. The seed also draws whether threads, warps or whole blocks run far ahead of
// others, and whether copies and products are early or late. What the hardware may do late
// (cp.async, cp.async.bulk, wgmma) happens at once, or whenever nothing forces it yet; until then
// shared memory keeps what it held, and accumulators are NaN. Shared memory begins as NaN, between
// guard bands.
//
// wgmma reads another view of shared memory than threads write (the asynchronous proxy): a barrier
// makes both equal when all who meet have published since they met before. Whose writes they were
// is not known.
//
// Registers and global memory are those of the CPU: their races show by the order of threads alone,
// and weak memory does not show at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <utility>

namespace emulated {

using Site = std::source_location;
struct Size {
  unsigned x, y, z;
};
// Of what a lane gives to its warp.
struct Words {
  uint32_t words[6];
};

// Of the thread that runs.
extern Size threadIdx, blockIdx;
int threads();  // of its block
char* shared_memory();
uint32_t shared_address(const void* p, Site site);

// Ends the launch.
[[noreturn]] void fail(const char* what, Site site);
// Whether a tensor of the launch holds these bytes.
void check_global(const void* from, size_t bytes, size_t alignment, Site site);

// Waits until all lanes of the warp are here; what each of them gave.
const Words* gather(const char* what, const Words& mine, Site site);
void meet(int id, int count, Site site);
void publish();

void prepare(uint64_t* bar, int arrivals, Site site);
void arrive(uint64_t* bar, Site site);
void wait(uint64_t* bar, int parity, Site site);

void copy(void* to, const void* from, bool inside, Site site);
void copies_done();
void arrive_after_copies(uint64_t* bar, Site site);
void copy_bulk(void* to, const void* from, int bytes, uint64_t* bar, Site site);

// `widen`: makes float32 of so many elements.
using Widen = void(const char* from, float* to, int count);
void products_begin();
void product(float* d, int registers, uint64_t a, uint64_t b, bool add, Widen* widen, Site site);
void products_end(Site site);
void products_wait(Site site);

void cluster_arrive(Site site);
void cluster_wait(Site site);
// The same place in the shared memory of a block of the cluster.
void* in_block(int rank, const void* mine, Site site);

// --- entries, which a source lists ---------------------------------------------------------------

struct Entry {
  const char* name;
  Size cluster;
  int threads;
  void (*kernel)();
  void (*call)(void (*kernel)(), void** parameters);
};

template <typename... P>
Entry entry(const char* name, Size cluster, int threads, void (*kernel)(P...)) {
  auto call = [](void (*untyped)(), void** parameters) {
    [&]<size_t... I>(std::index_sequence<I...>) {
      reinterpret_cast<void (*)(P...)>(untyped)(*static_cast<P*>(parameters[I])...);
    }(std::index_sequence_for<P...>());
  };
  return {name, cluster, threads, reinterpret_cast<void (*)()>(kernel), call};
}

extern const Entry* const entries;
extern const int entry_count;

}  // namespace emulated
