#include "machine.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace emulated {

Size threadIdx, blockIdx;

namespace {

constexpr int kMostBlocks = 16, kMostThreads = 1024;
constexpr int kMostShared = 228 << 10, kGuard = 256;
constexpr size_t kStack = (64 << 10) + 1088;  // stacks begin in different lines of the cache
constexpr uint64_t kPrepared = 0x5EAA77ull << 32;
constexpr unsigned char kGarbage = 0xFF, kBand = 0xA5;  // NaN in every type

struct Thread;
using Threads = std::vector<Thread*>;

// A copy of 16 bytes (zeros from nowhere), or the arrival after those before it.
struct Copy {
  char* to;
  const char* from;
  uint64_t* arrival;
  Site site;
};
struct Accumulator {
  float* at;
  float before[64];
  int registers;
};
struct Product {
  uint32_t a, b;
  bool add;
  size_t accumulator;
  int registers;
  Widen* widen;
  bool operator==(const Product& other) const {
    return a == other.a && b == other.b && add == other.add && accumulator == other.accumulator &&
           registers == other.registers && widen == other.widen;
  }
};
struct Warp {
  Threads waiting;
  const char* what;
  Site site;
  Words words[2][32];  // those of the last time are still read
  int turn = 0;
};
struct Warpgroup {
  std::vector<Product> products;
  Threads members, waiting;
  unsigned committed = 0;  // threads
  unsigned size;           // products that they committed
  unsigned done = 0;       // groups of products
};
struct Meeting {
  Threads waiting;
  int count = 0;
  Site site;
};
struct Mbarrier {
  uint64_t* at;
  int expected, pending;
  long bytes = 0;
  int phase = 0;
  Threads waiting = {};
};
struct Block {
  char* memory = nullptr;
  std::vector<char> view;  // of the matrix units and bulk copies
  uint32_t first;          // address of the first byte
  Size index;
  int unfinished;
  bool started;
  std::deque<Mbarrier> mbarriers;
  Meeting meetings[16];
  Warp warps[kMostThreads / 32];
  Warpgroup warpgroups[kMostThreads / 128];
};
struct Thread {
  jmp_buf context;
  ucontext_t begin;
  bool fresh = true;
  Block* block;
  int number;
  uint32_t rank;  // who runs ahead
  const char* what;
  Site site;
  bool finished, published, fenced, in_cluster;  // in_cluster: has arrived and not waited
  unsigned cluster_phase, issued, committed;
  std::deque<Copy> copies;
  std::vector<Accumulator> accumulators;
  Warp& warp() {
    return block->warps[number / 32];
  }
  Warpgroup& warpgroup() {
    return block->warpgroups[number / 128];
  }
};

// --- the launch ----------------------------------------------------------------------------------

struct Span {
  const char* begin;
  size_t bytes;
};
const Entry* running;
void** parameters;
const Span* tensors;
int tensor_count, block_count, block_threads, shared_bytes;
uint64_t state;
int draws, patience, haste;  // of the seed: see run_cluster

Block blocks[kMostBlocks];
std::vector<Thread> fibers;
Thread* current;
Threads ready, at_cluster;
struct Work {
  Thread* thread;  // whose
  std::function<void()> run;
};
std::vector<Work> works;  // what copies and products have to do yet
unsigned cluster_phase;
int cluster_arrived, unfinished;
jmp_buf home;
std::string message;  // of what went wrong

unsigned random(unsigned n) {  // splitmix64
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return (z >> 33) * n >> 31;
}

std::string place(Site site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string who(const Thread& thread) {
  const Size& at = thread.block->index;
  char text[80];
  std::snprintf(text, sizeof text, "thread %d of block (%u, %u, %u)", thread.number, at.x, at.y,
                at.z);
  return text;
}

[[noreturn]] void end(std::string text) {
  message = std::move(text);
  _longjmp(home, 2);
}

[[noreturn]] void deadlock() {
  std::string text = "deadlock:";
  for (int i = 0, runs = 0; i < block_count * block_threads && runs < 20; ++i) {
    const Thread &thread = fibers[i], *before = i % block_threads ? &fibers[i - 1] : nullptr;
    auto where = [](const Thread& t) {
      return t.finished ? "is done" : std::string(t.what) + " at " + place(t.site);
    };
    if (before && where(*before) == where(thread)) continue;
    text += "\n  from " + who(thread) + ": " + where(thread), ++runs;
  }
  end(text);
}

// --- fibers --------------------------------------------------------------------------------------

Thread* pick() {
  for (;;) {
    if (!works.empty() && (ready.empty() || random(16) < unsigned(patience))) {
      std::swap(works[random(works.size())], works.back());
      const Work work = std::move(works.back());
      works.pop_back();
      Thread* const here = std::exchange(current, work.thread);
      work.run();
      current = here;
      continue;
    }
    if (ready.empty()) deadlock();
    unsigned best = random(ready.size());
    for (int i = 1; i < draws; ++i) {
      const unsigned other = random(ready.size());
      if (ready[other]->rank > ready[best]->rank) best = other;
    }
    Thread* next = ready[best];
    ready[best] = ready.back();
    ready.pop_back();
    return next;
  }
}

[[noreturn]] void resume(Thread* thread) {
  current = thread;
  current->block->started = true;
  threadIdx = {unsigned(thread->number), 0, 0};
  blockIdx = thread->block->index;
  if (!thread->fresh) _longjmp(thread->context, 1);
  thread->fresh = false;
  setcontext(&thread->begin);
  __builtin_unreachable();
}

__attribute__((noinline)) void switch_to(Thread* next) {
  if (next != current && !_setjmp(current->context)) resume(next);
}

// Lets others go on until this thread is ready, and chosen.
void suspend(const char* what, Site site) {
  current->what = what, current->site = site;
  switch_to(pick());
}
void yield(const char* what, Site site) {
  ready.push_back(current);
  suspend(what, site);
}
void wake(Threads& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

// At once, or when nothing else can go on, or between.
void later(std::function<void()> work) {
  if (random(2) < unsigned(haste))
    work();
  else
    works.push_back({current, std::move(work)});
}

void cluster_advance() {
  if (cluster_arrived == 0 || cluster_arrived < unfinished) return;
  cluster_arrived = 0, ++cluster_phase;
  wake(at_cluster);
}

void body() {
  for (;;) {
    running->call(running->kernel, parameters);
    Thread& self = *current;
    const Site site = self.site;  // the last where it waited
    if (self.committed != self.warpgroup().done || self.issued)
      fail("a thread ends before its products are done", site);
    if (self.in_cluster) fail("a thread ends without waiting for its cluster", site);
    self.finished = true, --self.block->unfinished, --unfinished;
    cluster_advance();
    if (unfinished == 0 && !_setjmp(self.context)) _longjmp(home, 1);
    if (current == &self && self.finished) switch_to(pick());
  }
}

// --- shared memory -------------------------------------------------------------------------------

size_t offset(const Block& block, const void* p, size_t bytes, Site site) {
  const ptrdiff_t at = static_cast<const char*>(p) - block.memory;
  if (at < 0 || at + bytes > size_t(shared_bytes))
    fail("an address outside of shared memory", site);
  return at;
}

void land(Block& block, char* to, const char* from, size_t bytes, Site site) {
  if (block.unfinished == 0) fail("a copy lands in a block that has ended", site);
  const size_t at = offset(block, to, bytes, site);
  if (from)
    std::memcpy(to, from, bytes);
  else
    std::memset(to, 0, bytes);
  if (bytes > 16) std::memcpy(block.view.data() + at, to, bytes);
}

Mbarrier& barrier(Block& block, const uint64_t* bar, Site site) {
  offset(block, bar, 8, site);
  const uint64_t number = *bar ^ kPrepared;
  if (number >= block.mbarriers.size() || block.mbarriers[number].at != bar)
    fail("a barrier that is not prepared, or overwritten", site);
  return block.mbarriers[number];
}

void advance(Mbarrier& bar) {
  if (bar.pending || bar.bytes) return;
  bar.phase ^= 1, bar.pending = bar.expected;
  wake(bar.waiting);
}

void arrive_at(Block& block, uint64_t* at, Site site) {
  Mbarrier& bar = barrier(block, at, site);
  if (--bar.pending < 0) fail("more arrivals than a barrier expects", site);
  advance(bar);
}

// --- products of a warpgroup ---------------------------------------------------------------------

// Rows of 16 channels as the matrix units find them: eight rows of 128 bytes together, pieces of 16
// bytes exchanged by the row.
void load_tile(Block& block, uint32_t start, int rows, Widen* widen, float* to, int row_step,
               int channel_step) {
  for (int i = 0; i < 2 * rows; ++i) {
    uint32_t at = start + i / 2 * 128 + i % 2 * 16;
    at ^= (at >> 7 & 7) << 4;
    if (at < block.first || at + 16 > block.first + shared_bytes)
      fail("products read outside of shared memory", Site::current());
    float piece[8];
    widen(block.view.data() + at - block.first, piece, 8);
    for (int k = 0; k < 8; ++k) to[i / 2 * row_step + (i % 2 * 8 + k) * channel_step] = piece[k];
  }
}

template <int N>
void accumulate(const float* a, const float* b, float* sums) {
  for (int r = 0; r < 64; ++r)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) sums[r * N + n] += a[r * 16 + k] * b[k * N + n];
}

// Where register `i` of a thread lies.
int in_tile(int thread, int i, int columns) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
  return row * columns + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

void multiply(Block& block, Warpgroup& group) {
  static float a[64 * 16], b[16 * 128], sums[64 * 128];
  const size_t count = group.members[0]->accumulators.size();
  for (size_t which = 0; which < count; ++which) {
    const int registers = group.members[0]->accumulators[which].registers, n = 2 * registers;
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < registers; ++i)
        sums[in_tile(t, i, n)] = group.members[t]->accumulators[which].before[i];
    for (const Product& p : group.products) {
      if (p.accumulator != which) continue;
      if (!p.add) std::fill(sums, sums + 64 * n, 0.0f);
      load_tile(block, p.a, 64, p.widen, a, 16, 1);
      load_tile(block, p.b, n, p.widen, b, 1, n);
      (n == 32   ? accumulate<32>
       : n == 64 ? accumulate<64>
       : n == 96 ? accumulate<96>
                 : accumulate<128>)(a, b, sums);
    }
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < registers; ++i)
        group.members[t]->accumulators[which].at[i] = sums[in_tile(t, i, n)];
  }
  for (Thread* member : group.members) member->accumulators.clear();
  group.products.clear();
  group.committed = 0, ++group.done;
  wake(group.waiting);
}

uint32_t tile_address(uint64_t descriptor, Site site) {
  const uint32_t address = (descriptor & 0x3FFF) << 4;
  // Eight rows are 1024 bytes apart, a swizzle of 128 bytes; a step of channels within those.
  if (descriptor >> 14 != (1 << 2 | 64ull << 18 | 1ull << 48) || address % 1024 >= 128)
    fail("a descriptor of another layout", site);
  return address;
}

// --- a cluster -----------------------------------------------------------------------------------

void begin_block(Block& block, Size index, uint32_t first) {
  if (!block.memory) {
    // A CPU sees the alignment that the launch promises, and no better.
    block.memory = static_cast<char*>(std::aligned_alloc(1024, kMostShared + 2048)) + 1024 + 16;
  }
  std::memset(block.memory - kGuard, kBand, kGuard);
  std::memset(block.memory, kGarbage, shared_bytes);
  std::memset(block.memory + shared_bytes, kBand, kGuard);
  block.view.assign(shared_bytes, char(kGarbage));
  block.first = first;
  block.index = index;
  block.unfinished = block_threads;
  block.started = false;
  block.mbarriers.clear();
  for (Meeting& meeting : block.meetings) meeting.waiting.clear();
  for (Warp& warp : block.warps) warp.waiting.clear();
  for (Warpgroup& group : block.warpgroups) group = {};
}

void run_cluster(Size first) {
  const Size size = running->cluster;
  const int grains[] = {1, 32, 128, block_threads};
  const int grain = grains[random(4)];  // threads of one rank
  const uint64_t salt = state;
  draws = 1 << random(3) * 3;        // of the ready threads, the one of the highest rank goes on
  patience = random(3) * random(3);  // how often a work is done while threads are ready
  haste = random(3);                 // never, half of all, all works at once
  ready.clear(), at_cluster.clear(), works.clear();
  cluster_phase = 0, cluster_arrived = 0, unfinished = block_count * block_threads;
  const uint32_t address = 1024 + 16 * random(64);
  for (int i = 0; i < block_count; ++i) {
    const int x = i % size.x, y = i / size.x % size.y, z = i / size.x / size.y;
    begin_block(blocks[i], {first.x + x, first.y + y, first.z + z}, address);
  }
  for (int i = 0; i < unfinished; ++i) {
    Thread& thread = fibers[i];
    thread.block = &blocks[i / block_threads];
    thread.number = i % block_threads;
    thread.rank = uint32_t(((i / grain) * 0x9E3779B97F4A7C15 ^ salt) * 0xBF58476D1CE4E5B9 >> 32);
    thread.what = "has not begun", thread.site = Site::current();
    thread.finished = thread.published = thread.fenced = thread.in_cluster = false;
    thread.cluster_phase = thread.issued = thread.committed = 0;
    thread.copies.clear(), thread.accumulators.clear();
    thread.warpgroup().members.push_back(&thread);
    ready.push_back(&thread);
  }
  const int how = _setjmp(home);
  if (how == 0) resume(pick());
  if (how == 2) throw message;
  for (int i = 0; i < block_count; ++i) {
    const char* memory = blocks[i].memory;
    for (int k = 0; k < kGuard; ++k)
      if (memory[k - kGuard] != char(kBand) || memory[shared_bytes + k] != char(kBand))
        throw std::string("written outside of shared memory");
  }
  bool copying = !works.empty();
  for (int i = 0; i < block_count * block_threads; ++i) copying |= !fibers[i].copies.empty();
  if (copying) throw std::string("copies or products are under way as the cluster ends");
}

void run(const unsigned* grid) {
  const Size size = running->cluster;
  block_count = size.x * size.y * size.z;
  if (block_threads != running->threads || shared_bytes > kMostShared || grid[0] % size.x ||
      grid[1] % size.y || grid[2] % size.z)
    throw std::string("a grid, threads or shared memory that the entry cannot have");
  const size_t wanted = block_count * block_threads;
  if (fibers.size() < wanted) {
    fibers = std::vector<Thread>(wanted);
    static size_t mapped = 0;
    static char* stacks = nullptr;
    if (mapped) munmap(stacks, mapped);
    mapped = wanted * kStack;
    stacks = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (size_t i = 0; i < wanted; ++i) {
      getcontext(&fibers[i].begin);
      fibers[i].begin.uc_stack = {stacks + i * kStack, 0, kStack};
      makecontext(&fibers[i].begin, body, 0);
    }
  }
  for (unsigned z = 0; z < grid[2]; z += size.z)
    for (unsigned y = 0; y < grid[1]; y += size.y)
      for (unsigned x = 0; x < grid[0]; x += size.x) run_cluster({x, y, z});
}

}  // namespace

// --- what a thread does --------------------------------------------------------------------------

int threads() {
  return block_threads;
}
char* shared_memory() {
  return current->block->memory;
}
uint32_t shared_address(const void* p, Site site) {
  return current->block->first + offset(*current->block, p, 0, site);
}

void fail(const char* what, Site site) {
  end(std::string(what) + " at " + place(site) + ", " + who(*current));
}

void check_global(const void* from, size_t bytes, size_t alignment, Site site) {
  if (reinterpret_cast<uintptr_t>(from) % alignment) fail("a read that is not aligned", site);
  const char* at = static_cast<const char*>(from);
  for (int i = 0; i < tensor_count; ++i)
    if (at >= tensors[i].begin && at + bytes <= tensors[i].begin + tensors[i].bytes) return;
  fail("a read outside of all tensors", site);
}

const Words* gather(const char* what, const Words& mine, Site site) {
  Warp& warp = current->warp();
  if (warp.waiting.empty())
    warp.what = what, warp.site = site;
  else if (warp.what != what || warp.site.line() != site.line() ||
           warp.site.column() != site.column())
    end("lanes of a warp are in " + std::string(warp.what) + " at " + place(warp.site) +
        " and in " + what + " at " + place(site) + ", " + who(*current));
  Words* all = warp.words[warp.turn];
  all[current->number % 32] = mine;
  warp.waiting.push_back(current);
  if (warp.waiting.size() == 32) warp.turn ^= 1, wake(warp.waiting);
  suspend(what, site);
  return all;
}

void meet(int id, int count, Site site) {
  Block& block = *current->block;
  Meeting& meeting = block.meetings[id];
  if (meeting.waiting.empty())
    meeting.count = count, meeting.site = site;
  else if (meeting.count != count)
    fail("threads meet in different numbers", site);
  meeting.waiting.push_back(current);
  if (int(meeting.waiting.size()) == count) {
    bool published = true;
    for (Thread* thread : meeting.waiting) published &= std::exchange(thread->published, false);
    if (published) std::memcpy(block.view.data(), block.memory, shared_bytes);
    wake(meeting.waiting);
  }
  suspend("meet", site);
}

void publish() {
  current->published = true;
}

void prepare(uint64_t* bar, int arrivals, Site site) {
  Block& block = *current->block;
  if ((block.first + offset(block, bar, 8, site)) % 8) fail("a barrier that is not aligned", site);
  *bar = kPrepared | block.mbarriers.size();
  block.mbarriers.push_back({bar, arrivals, arrivals});
}

void arrive(uint64_t* bar, Site site) {
  arrive_at(*current->block, bar, site);
  yield("arrive", site);
}

void wait(uint64_t* at, int parity, Site site) {
  Mbarrier& bar = barrier(*current->block, at, site);
  yield("wait", site);
  while (bar.phase == parity) {
    bar.waiting.push_back(current);
    suspend("wait", site);
  }
}

void copy(void* to, const void* from, bool inside, Site site) {
  if (inside) check_global(from, 16, 16, site);
  if (shared_address(to, site) % 16) fail("a copy that is not aligned", site);
  const Copy given{static_cast<char*>(to), inside ? static_cast<const char*>(from) : nullptr,
                   nullptr, site};
  if (random(2) < unsigned(haste))
    land(*current->block, given.to, given.from, 16, site);
  else
    current->copies.push_back(given);
}

// The copies of a thread up to its next arrival.
static void land_copies(Thread& thread) {
  while (!thread.copies.empty()) {
    const Copy next = thread.copies.front();
    thread.copies.pop_front();
    if (next.arrival) return arrive_at(*thread.block, next.arrival, next.site);
    land(*thread.block, next.to, next.from, 16, next.site);
  }
}

void copies_done() {
  while (!current->copies.empty()) land_copies(*current);
}

void arrive_after_copies(uint64_t* bar, Site site) {
  current->copies.push_back({nullptr, nullptr, bar, site});
  later([] { land_copies(*current); });
}

void copy_bulk(void* to, const void* from, int bytes, uint64_t* at, Site site) {
  Block& block = *current->block;
  if (bytes % 16 || shared_address(to, site) % 16) fail("a copy that is not aligned", site);
  check_global(from, bytes, 16, site);
  barrier(block, at, site).bytes += bytes;
  arrive_at(block, at, site);
  later([=] {
    Block& block = *current->block;
    land(block, static_cast<char*>(to), static_cast<const char*>(from), bytes, site);
    Mbarrier& bar = barrier(block, at, site);
    bar.bytes -= bytes;
    advance(bar);
  });
}

void products_begin() {
  current->fenced = true;
}

void product(float* d, int registers, uint64_t a, uint64_t b, bool add, Widen* widen, Site site) {
  Thread& self = *current;
  Warpgroup& group = self.warpgroup();
  if (!self.fenced) fail("products without products_begin", site);
  if (self.committed != group.done) fail("products before those before them are done", site);
  size_t which = 0;
  while (which < self.accumulators.size() && self.accumulators[which].at != d) ++which;
  if (which == self.accumulators.size()) {
    self.accumulators.push_back({d, {}, registers});
    std::copy(d, d + registers, self.accumulators.back().before);
    std::fill(d, d + registers, std::numeric_limits<float>::quiet_NaN());
  }
  const Product given{tile_address(a, site), tile_address(b, site), add, which, registers, widen};
  if (self.issued == group.products.size())
    group.products.push_back(given);
  else if (!(group.products[self.issued] == given))
    fail("threads of a warpgroup start different products", site);
  ++self.issued;
}

void products_end(Site site) {
  Thread& self = *current;
  if (self.issued == 0) return;
  Warpgroup& group = self.warpgroup();
  if (group.committed == 0) group.size = self.issued;
  if (self.issued != group.size) fail("threads of a warpgroup commit different products", site);
  self.issued = 0, self.fenced = false, ++self.committed;
  if (++group.committed == 128) later([] { multiply(*current->block, current->warpgroup()); });
}

void products_wait(Site site) {
  yield("products_wait", site);
  while (current->committed != current->warpgroup().done) {
    current->warpgroup().waiting.push_back(current);
    suspend("products_wait", site);
  }
}

void cluster_arrive(Site site) {
  if (current->in_cluster) fail("arrives at the cluster twice", site);
  current->in_cluster = true, current->cluster_phase = cluster_phase;
  ++cluster_arrived;
  cluster_advance();
  yield("cluster_arrive", site);
}

void cluster_wait(Site site) {
  if (!current->in_cluster) fail("waits for the cluster and has not arrived", site);
  yield("cluster_wait", site);
  while (cluster_phase == current->cluster_phase) {
    at_cluster.push_back(current);
    suspend("cluster_wait", site);
  }
  current->in_cluster = false;
}

void* in_block(int rank, const void* mine, Site site) {
  Block& block = blocks[rank];
  if (rank < 0 || rank >= block_count) fail("a block outside of the cluster", site);
  if (!block.started) fail("a store to a block that has not begun", site);
  if (block.unfinished == 0) fail("a store to a block that has ended", site);
  return block.memory + offset(*current->block, mine, 4, site);
}

}  // namespace emulated

// As cuLaunchKernel: an entry by its name, the addresses of its parameters. `given`: the tensors
// that it may read. Null, or what went wrong.
extern "C" const char* launch(const char* name, const unsigned* grid, unsigned threads,
                              unsigned shared, void** parameters, const void* given, int count,
                              uint64_t seed) {
  using namespace emulated;
  for (int i = 0; i < entry_count; ++i) {
    if (std::strcmp(entries[i].name, name)) continue;
    running = entries + i;
    emulated::parameters = parameters;
    tensors = static_cast<const Span*>(given), tensor_count = count;
    block_threads = threads, shared_bytes = shared;
    state = seed;
    try {
      run(grid);
      return nullptr;
    } catch (std::string& text) {
      fibers.clear();  // they are somewhere in the kernel
      message = text;
      return message.c_str();
    }
  }
  return "there is no such entry";
}
