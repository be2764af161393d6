// Runs CUDA kernels on the CPU, for tests: what csrc/cuda/device.cuh is to nvcc, this is to g++.
//
// Every CUDA thread is a fiber (fibers.h), all on one thread of the operating system. The blocks of a cluster run
// together, clusters one after the other. A fiber runs until it must wait: at a barrier, or for the other lanes of a
// warp operation. Of those that can go on, the first in `schedule.order` does, so every run can be repeated.
//
// What goes wrong is thrown by launch() as an Error which names thread, block, operation and line: divergent barriers,
// deadlocks, warp operations without all their lanes, remote() to a block that does not exist, may not have started or
// has exited, dynamic_smem() outside what the launch asked for. Shared memory begins as NaNs. Each of its variables is
// an allocation of its own which ends with its block, so AddressSanitizer sees what goes beyond it or comes too late;
// UndefinedBehaviorSanitizer sees misaligned vectors; a missing barrier changes the result from one order to another,
// and ThreadSanitizer names both lines of a race even if it does not.
//
// Not emulated: grids and blocks of more than one dimension, streams (launch() returns when all is done), fences,
// atomics but atomicAdd, waiting for another cluster, asynchronous copies, limits on registers, speed. A GPU's results
// differ in the last bits: its exponentials are approximate and it fuses multiplications with additions.
//
// What no order shows, only ThreadSanitizer does: nothing comes between a thread's load and the store after it.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

// After the types: these have functions of the host, conversions among them, for a compiler that is not nvcc.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "fibers.h"

// Set at each switch, and at each launch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace imbalance::cuda {

struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that a block can ask for
  int cache;          // bytes of L2
  bool has_clusters;
};

struct Shape {
  unsigned blocks;   // of the grid, a multiple of cluster
  unsigned threads;  // of a block
  unsigned cluster;  // blocks
  unsigned shared_memory;
};

// What current_device() and resident_clusters() answer; for a test to set. Few clusters, so that kernels whose blocks
// stay for many rows do.
inline Device emulated_device = {2, 227 << 10, 50 << 20, true};
inline int emulated_resident_clusters = 2;

namespace emulation {

enum class Order { forward, reverse, random };  // of threads, and of clusters
struct Schedule {
  Order order = Order::forward;
  unsigned seed = 0;
};
inline Schedule schedule;  // of the launches to come; for a test to set

inline std::uint64_t switches = 0;  // from fiber to fiber, for whoever measures speed

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr unsigned kMaxThreads = 1024;  // of a block
inline constexpr unsigned kMaxCluster = 16;
inline constexpr unsigned kMaxFibers = kMaxCluster * kMaxThreads;
#if defined(__SANITIZE_THREAD__)
inline constexpr unsigned kFibers = 8000;  // ThreadSanitizer follows no more
#else
inline constexpr unsigned kFibers = kMaxFibers;
#endif
inline constexpr std::size_t kMaxStaticBytes = 48 << 10;
inline constexpr std::size_t kVectorBytes = 16;

enum class Operation : unsigned char {
  none,
  syncthreads,
  cluster_sync,
  syncwarp,
  ballot,
  any,
  all,
  shuffle,
  shuffle_xor,
  shuffle_down,
  shuffle_up,
  shared_array,
  dynamic_smem,
  remote,
  load_streaming,
  store_streaming,
};
inline constexpr const char* kOperationNames[] = {
    "no operation", "__syncthreads", "cluster_sync",    "__syncwarp",       "__ballot_sync",  "__any_sync",
    "__all_sync",   "__shfl_sync",   "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync", "SHARED_ARRAY",
    "dynamic_smem", "remote",        "load_streaming",  "store_streaming",
};

using Site = std::source_location;

// A variable in the shared memory of a block.
struct Variable {
  const void* key;  // one for each SHARED_ARRAY; null for dynamic_smem
  std::size_t offset, bytes;
  char* allocation;
  char* data;
};

struct Barrier {
  unsigned arrived = 0, phase = 0;
  char met[2];  // for ThreadSanitizer, by turns: a fast thread may leave the next phase's mark before a slow one reads
};

struct Block {
  unsigned index = 0;  // of the grid
  unsigned rank = 0;   // of the cluster
  unsigned first = 0;  // its fibers are first, ..., first + threads - 1
  unsigned alive = 0;  // threads that have not exited
  Barrier barrier;
  std::vector<Variable> variables;
  std::size_t static_bytes = 0;
  char exited = 0;  // for ThreadSanitizer
};

struct Fiber {
  Stack stack;
  Block* block = nullptr;
  unsigned thread = 0;  // of the block
  unsigned lane = 0;
  unsigned warp_first = 0, warp_lanes = 0;  // fibers of its warp
  unsigned place = 0;                       // in Machine::order
  bool done = true;
  Operation operation = Operation::none;  // that it waits in
  Site site;
  unsigned here = 0;  // of a warp's first fiber: lanes that wait in a warp operation, or are done
  // Of a warp operation: what the lane posts, and what the lane that comes last answers.
  unsigned mask = 0, ballot = 0;
  int from = 0;
  std::uint64_t posted = 0, answer = 0;
  char posted_mark = 0, answer_mark = 0, *answered_by = nullptr;  // for ThreadSanitizer
};

struct Machine {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kFibers]};
  unsigned made = 0;  // fibers that have a stack
  Fiber launcher;     // the thread of the operating system
  Fiber* self = &launcher;
  std::mutex one_launch;

  unsigned threads = 0, cluster = 0, shared_memory = 0;  // of the launch
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  char launched = 0, finished = 0;  // for ThreadSanitizer

  unsigned base = 0, total = 0, alive = 0;  // of the cluster that runs: its fibers are base, ..., base + total - 1
  std::array<Block, kMaxCluster> blocks;
  Barrier barrier;

  unsigned order[kMaxFibers];  // fibers, first come first served
  // Bit p: order[p] can go on; and which words of those bits are not 0.
  std::uint64_t ready[kMaxFibers / 64] = {};
  std::uint64_t ready_words[kMaxFibers / 4096] = {};
  std::mt19937 random;
  char error[2000] = "";  // an array, because a fiber that fails is abandoned with all that it owns
};
inline Machine* machine = nullptr;  // made by the first launch, never deleted

// ---- Errors ----

template <class... Arguments>
void report(const char* format, Arguments... arguments) {
  const std::size_t used = std::strlen(machine->error);
  std::snprintf(machine->error + used, sizeof(machine->error) - used, format, arguments...);
}

inline void report(const Fiber& fiber) {
  report("thread %u of block %u in %s at %s:%u", fiber.thread, fiber.block->index,
         kOperationNames[static_cast<int>(fiber.operation)], fiber.site.file_name(),
         static_cast<unsigned>(fiber.site.line()));
}

inline void switch_to(Fiber& to) {
  if (machine->self == &to) return;
  ++switches;
  machine->self = &to;
  threadIdx.x = to.thread;
  if (to.block) blockIdx.x = to.block->index;
  switch_to(to.stack);
}

// Ends the launch; its error is the text reported so far, the reason, and where this thread is.
template <class... Arguments>
[[noreturn]] void fail(Operation operation, const Site& site, const char* reason, Arguments... arguments) {
  const Unseen unseen;
  Fiber& self = *machine->self;
  self.operation = operation;
  self.site = site;
  report(reason, arguments...);
  report(": ");
  report(self);
  for (;;) switch_to(machine->launcher);  // which abandons this fiber
}

inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

// ---- Who goes on ----

inline void set_ready(Fiber& fiber) {
  fiber.operation = Operation::none;
  machine->ready[fiber.place / 64] |= std::uint64_t{1} << fiber.place % 64;
  machine->ready_words[fiber.place / 4096] |= std::uint64_t{1} << fiber.place / 64 % 64;
}

// The first fiber that can go on does; if none can, the launcher, to which that is a deadlock unless all are done.
inline void run_next() {
  Machine& m = *machine;
  for (unsigned i = 0; i < std::size(m.ready_words); ++i) {
    if (m.ready_words[i] == 0) continue;
    const unsigned word = 64 * i + static_cast<unsigned>(std::countr_zero(m.ready_words[i]));
    const unsigned place = 64 * word + static_cast<unsigned>(std::countr_zero(m.ready[word]));
    m.ready[word] &= m.ready[word] - 1;
    if (m.ready[word] == 0) m.ready_words[i] &= m.ready_words[i] - 1;
    return switch_to(m.fibers[m.order[place]]);
  }
  switch_to(m.launcher);
}

// ---- Barriers ----

// New places in the order for the fibers of a barrier, among themselves.
inline void shuffle_places(unsigned first, unsigned count) {
  Machine& m = *machine;
  for (unsigned i = count - 1; i > 0; --i) {
    Fiber &a = m.fibers[first + i], &b = m.fibers[first + m.random() % (i + 1)];
    std::swap(m.order[a.place], m.order[b.place]);
    std::swap(a.place, b.place);
  }
}

// Waits until the fibers first, ..., first + count - 1 are here. What one that `publishes` wrote before, the others
// see.
inline void await(Barrier& barrier, unsigned first, unsigned count, Operation operation, const Site& site,
                  bool publishes = true) {
  char* const met = &barrier.met[barrier.phase % 2];
  if (publishes) release(met);
  {
    const Unseen unseen;
    Fiber& self = *machine->self;
    self.operation = operation;
    self.site = site;
    if (++barrier.arrived == count) {
      Fiber* const fibers = &machine->fibers[first];
      for (unsigned i = 0; i < count; ++i) {
        if (same(fibers[i].site, site)) continue;
        report("divergent barrier: ");
        report(fibers[i]);
        fail(operation, site, "; met by");
      }
      barrier.arrived = 0;
      ++barrier.phase;
      if (schedule.order == Order::random) shuffle_places(first, count);
      for (unsigned i = 0; i < count; ++i) set_ready(fibers[i]);
    }
    run_next();
  }
  acquire(met);
}

// ---- Warp operations ----

struct Answer {
  std::uint64_t value;  // what lane `from` posted
  unsigned ballot;      // lanes that posted something else than 0
};

// Whether all lanes of `mask` wait in this operation. One that waits in another may still come; if not, that is a
// deadlock.
inline bool all_here(const Fiber* warp, unsigned mask, Operation operation, const Site& site) {
  if ((warp->here & mask) != mask) return false;  // no more than this for all lanes but the last
  bool all = true;
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const Fiber& other = warp[std::countr_zero(lanes)];
    if (other.done) fail(operation, site, "lane %u of the mask has exited", other.lane);
    all = all && other.operation == operation && other.mask == mask;
  }
  if (!all) return false;
  for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
    const Fiber& other = warp[std::countr_zero(lanes)];
    if (same(other.site, site)) continue;
    report("divergent warp: ");
    report(other);
    fail(operation, site, "; met by");
  }
  return true;
}

// Posts a value, and waits for all lanes of `mask` that the block has.
inline Answer exchange(Operation operation, unsigned mask, std::uint64_t value, int from, const Site& site) {
  Fiber& self = *machine->self;
  Answer answer;
  release(&self.posted_mark);
  {
    const Unseen unseen;
    if ((mask >> self.lane & 1) == 0) fail(operation, site, "a lane outside its mask %#x", mask);
    if (self.warp_lanes < 32) mask &= (1u << self.warp_lanes) - 1;
    self.operation = operation;
    self.site = site;
    self.mask = mask;
    self.posted = value;
    self.from = from;
    Fiber* const warp = &machine->fibers[self.warp_first];
    warp->here |= 1u << self.lane;
    if (all_here(warp, mask, operation, site)) {
      unsigned ballot = 0;
      for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
        Fiber& other = warp[std::countr_zero(lanes)];
        acquire(&other.posted_mark);
        if (other.posted != 0) ballot |= lanes & -lanes;
      }
      release(&self.answer_mark);
      warp->here &= ~mask;
      for (unsigned lanes = mask; lanes != 0; lanes &= lanes - 1) {
        Fiber& other = warp[std::countr_zero(lanes)];
        other.ballot = ballot;
        other.answer = (mask >> other.from & 1) != 0 ? warp[other.from].posted : ~std::uint64_t{0};  // or a NaN
        other.answered_by = &self.answer_mark;
        set_ready(other);
      }
    }
    run_next();
    answer = {self.answer, self.ballot};
  }
  acquire(self.answered_by);
  return answer;
}

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int from, const Site& site) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t) && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(operation, mask, bits, from, site).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(machine->self->lane); }
inline int segment(int width) { return lane() & ~(width - 1); }

// ---- Shared memory ----

// The variable's bytes in a block, made when first asked for. They are aligned as T and no better, and end where the
// allocation ends.
inline char* variable(Block& block, const void* key, std::size_t offset, std::size_t bytes, Operation operation,
                      const Site& site) {
  const Unseen unseen;
  std::size_t dynamic_end = 0;
  for (const Variable& v : block.variables) {
    if (v.key == key && v.offset == offset && v.bytes == bytes) return v.data;
    if (key || v.key) continue;
    if (offset < v.offset + v.bytes && v.offset < offset + bytes) {
      fail(operation, site, "bytes %zu to %zu overlap those from %zu to %zu", offset, offset + bytes, v.offset,
           v.offset + v.bytes);
    }
    dynamic_end = std::max(dynamic_end, v.offset + v.bytes);
  }
  if (key) {
    block.static_bytes += bytes;
    if (block.static_bytes > kMaxStaticBytes) fail(operation, site, "more than 48 KiB of arrays");
    if (block.static_bytes + machine->shared_memory > static_cast<std::size_t>(emulated_device.shared_memory)) {
      fail(operation, site, "more shared memory than the device has, with what the launch asked for");
    }
  } else if (offset + bytes > machine->shared_memory) {
    fail(operation, site, "bytes %zu to %zu of the %u that the launch asked for", offset, offset + bytes,
         machine->shared_memory);
  }
  const std::size_t before = offset % kVectorBytes;
  void* allocation = nullptr;
  if (posix_memalign(&allocation, kVectorBytes, before + bytes) != 0) fail(operation, site, "no memory");
  std::memset(allocation, 0xff, before + bytes);  // NaNs
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(allocation, before);
#endif
  char* const data = static_cast<char*>(allocation) + before;
  block.variables.push_back({key, offset, bytes, static_cast<char*>(allocation), data});
  return data;
}

// ThreadSanitizer sees what is freed, as if it were written: a remote access that no barrier orders is a race with it.
inline void free_variables(Block& block) {
  for (;;) {
    void* allocation = nullptr;
    {
      const Unseen unseen;
      block.static_bytes = 0;
      if (block.variables.empty()) return;
      const Variable& v = block.variables.back();
      allocation = v.allocation;
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(v.allocation, static_cast<std::size_t>(v.data - v.allocation));
#endif
      std::memset(v.data, 0xff, v.bytes);
      block.variables.pop_back();
    }
    std::free(allocation);
  }
}

// A SHARED_ARRAY. Its offset says how far from a multiple of 16 it begins, for nvcc aligns it as its type alone.
template <class T>
T& shared_array(const void* key, const Site& site = Site::current()) {
  constexpr std::size_t offset = alignof(T) % kVectorBytes;
  Block& block = *machine->self->block;
  return *reinterpret_cast<T*>(variable(block, key, offset, sizeof(T), Operation::shared_array, site));
}

// ---- Running ----

[[noreturn]] inline void fiber_main() noexcept {
  arrived();
  for (;;) {
    acquire(&machine->launched);
    machine->body(machine->argument);
    Block* left = nullptr;  // the block, to the last of its threads
    {
      const Unseen unseen;
      Fiber& self = *machine->self;
      release(&machine->finished);
      release(&self.block->exited);
      self.done = true;
      machine->fibers[self.warp_first].here |= 1u << self.lane;
      --machine->alive;
      if (--self.block->alive == 0) left = self.block;
    }
    if (left) {
      acquire(&left->exited);
      free_variables(*left);  // from here on a remote access is one to freed memory
      release(&machine->finished);
    }
    const Unseen unseen;
    run_next();
  }
}

inline void place_threads(unsigned first_block) {
  Machine& m = *machine;
  for (unsigned rank = 0; rank < m.cluster; ++rank) {
    Block& block = m.blocks[rank];
    block.index = first_block + rank;
    block.rank = rank;
    block.first = m.base + rank * m.threads;
    block.alive = m.threads;
    block.barrier = {};
  }
  m.barrier = {};
  for (unsigned i = 0; i < m.total; ++i) {
    Fiber& fiber = m.fibers[m.base + i];
    fiber.block = &m.blocks[i / m.threads];
    fiber.thread = i % m.threads;
    fiber.lane = fiber.thread % 32;
    fiber.warp_first = m.base + i - fiber.lane;
    fiber.warp_lanes = std::min(32u, m.threads - (fiber.thread - fiber.lane));
    fiber.done = false;
    fiber.here = 0;
    m.order[i] = m.base + (schedule.order == Order::reverse ? m.total - 1 - i : i);
  }
  if (schedule.order == Order::random) std::shuffle(m.order, m.order + m.total, m.random);
  for (unsigned place = 0; place < m.total; ++place) m.fibers[m.order[place]].place = place;
}

inline void report_deadlock() {
  Machine& m = *machine;
  report("deadlock, %u threads have exited", m.total - m.alive);
  const Fiber* last = nullptr;  // of those who wait in one place, the first
  const char* separator = ": ";
  for (unsigned i = 0; i < m.total; ++i) {
    const Fiber& fiber = m.fibers[m.base + i];
    if (fiber.done || (last && same(last->site, fiber.site))) continue;
    report("%s", separator);
    report(fiber);
    separator = "; ";
    last = &fiber;
  }
}

// Throws what was reported. The fibers that stopped midway, or did not come to start, are made anew.
[[noreturn]] inline void throw_error() {
  Machine& m = *machine;
  for (Block& block : m.blocks) free_variables(block);
  [[maybe_unused]] void* const launcher = m.launcher.stack.watched;  // to be read by the launcher alone
  std::fill(std::begin(m.ready), std::end(m.ready), 0);
  std::fill(std::begin(m.ready_words), std::end(m.ready_words), 0);
  for (unsigned i = 0; i < m.made; ++i) {
    if (m.fibers[i].done) continue;
    m.fibers[i].done = true;
    Stack& stack = m.fibers[i].stack;
#if defined(__SANITIZE_THREAD__)  // what it did happened before now
    __tsan_switch_to_fiber(stack.watched, __tsan_switch_to_fiber_no_sync);
    release(&m.finished);
    __tsan_switch_to_fiber(launcher, __tsan_switch_to_fiber_no_sync);
#endif
    make_fiber(stack, fiber_main);
  }
  acquire(&m.finished);
  const Error error(m.error);
  m.error[0] = '\0';
  throw error;
}

inline void run_cluster(unsigned first_block) {
  Machine& m = *machine;
  const Unseen unseen;
  m.total = m.alive = m.cluster * m.threads;
  m.base = 0;
#if defined(__SANITIZE_THREAD__)
  // A cluster's fibers are not those of the one before, in which ThreadSanitizer would see the same threads go on.
  if (2 * m.total <= kFibers && first_block / m.cluster % 2 == 1) m.base = m.total;
#endif
  for (; m.made < m.base + m.total; ++m.made) make_fiber(m.fibers[m.made].stack, fiber_main);
  place_threads(first_block);
  for (unsigned i = 0; i < m.total; ++i) set_ready(m.fibers[m.base + i]);
  run_next();
  if (m.error[0] == '\0' && m.alive > 0) report_deadlock();
  if (m.error[0] != '\0') throw_error();
}

// AddressSanitizer's report knows no CUDA threads.
inline void name_thread_at_death() {
  if (machine && machine->self->block) {
    std::fprintf(stderr, "CUDA emulator: this was thread %u of block %u\n", machine->self->thread,
                 machine->self->block->index);
  }
}

inline Machine* make_machine() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(name_thread_at_death);
#endif
  return new Machine;
}

inline bool possible(const Shape& shape) {
  return shape.threads > 0 && shape.threads <= kMaxThreads && shape.cluster > 0 && shape.cluster <= kMaxCluster &&
         (shape.cluster == 1 || emulated_device.has_clusters) &&
         shape.shared_memory <= static_cast<unsigned>(emulated_device.shared_memory);
}

inline cudaError_t run(const Shape& shape, void (*body)(const void*), const void* argument) {
  if (!possible(shape) || shape.blocks == 0 || shape.blocks > 0x7fffffff || shape.blocks % shape.cluster != 0) {
    return cudaErrorInvalidConfiguration;
  }
  static std::mutex first_launch;
  {
    const std::lock_guard lock(first_launch);
    if (!machine) machine = make_machine();
  }
  Machine& m = *machine;
  const std::lock_guard lock(m.one_launch);
  if (shape.threads * shape.cluster > kFibers) throw Error("ThreadSanitizer cannot follow that many threads");
  adopt_own_stack(m.launcher.stack);
  m.self = &m.launcher;
  gridDim = dim3(shape.blocks);
  blockDim = dim3(shape.threads);
  m.threads = shape.threads;
  m.cluster = shape.cluster;
  m.shared_memory = shape.shared_memory;
  m.body = body;
  m.argument = argument;
  m.random.seed(schedule.seed);

  std::vector<unsigned> first_blocks;
  for (unsigned block = 0; block < shape.blocks; block += shape.cluster) first_blocks.push_back(block);
  if (schedule.order == Order::reverse) std::reverse(first_blocks.begin(), first_blocks.end());
  if (schedule.order == Order::random) std::shuffle(first_blocks.begin(), first_blocks.end(), m.random);
  release(&m.launched);  // clusters have no order among them: ThreadSanitizer sees a race between two
  for (const unsigned block : first_blocks) run_cluster(block);
  acquire(&m.finished);
  return cudaSuccess;
}

template <class Vector>
void check_alignment(const Vector* p, Operation operation, const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(Vector) != 0) {
    fail(operation, site, "address %p is not aligned to %zu bytes", static_cast<const void*>(p), sizeof(Vector));
  }
}

}  // namespace emulation

// ---- What device.cuh has for nvcc ----

#define SHARED_ARRAY(T, name, n)             \
  static constexpr char name##_of_block = 0; \
  auto& name = ::imbalance::cuda::emulation::shared_array<T[n]>(&name##_of_block)

template <class T>
T* dynamic_smem(unsigned offset, unsigned count, emulation::Site site = emulation::Site::current()) {
  constexpr auto operation = emulation::Operation::dynamic_smem;
  if (offset % alignof(T) != 0) emulation::fail(operation, site, "offset %u is not aligned", offset);
  emulation::Block& block = *emulation::machine->self->block;
  return reinterpret_cast<T*>(emulation::variable(block, nullptr, offset, count * sizeof(T), operation, site));
}

inline unsigned cluster_rank() { return emulation::machine->self->block->rank; }
inline unsigned cluster_size() { return emulation::machine->cluster; }

inline void cluster_sync(bool publishes = true, emulation::Site site = emulation::Site::current()) {
  emulation::Machine& m = *emulation::machine;
  emulation::await(m.barrier, m.base, m.total, emulation::Operation::cluster_sync, site, publishes);
}

template <class T>
T* remote(T* p, unsigned rank, emulation::Site site = emulation::Site::current()) {
  using namespace emulation;
  constexpr auto operation = Operation::remote;
  const Unseen unseen;
  if (rank >= machine->cluster) fail(operation, site, "no block %u in a cluster of %u", rank, machine->cluster);
  Block &mine = *machine->self->block, &other = machine->blocks[rank];
  if (&other != &mine && machine->barrier.phase == 0) {
    fail(operation, site, "block %u of the cluster may not have started, no cluster_sync came before", rank);
  }
  if (other.alive == 0) fail(operation, site, "block %u of the cluster has exited", rank);
  for (const Variable& v : mine.variables) {
    const auto at = static_cast<std::size_t>(reinterpret_cast<const char*>(p) - v.data);
    if (at < v.bytes) {
      return reinterpret_cast<T*>(variable(other, v.key, v.offset, v.bytes, operation, site) + at);
    }
  }
  fail(operation, site, "%p is not in the shared memory of this block", static_cast<const void*>(p));
}

template <class Vector>
Vector load_streaming(const Vector* p, emulation::Site site = emulation::Site::current()) {
  emulation::check_alignment(p, emulation::Operation::load_streaming, site);
  return *p;
}
template <class Vector>
void store_streaming(Vector* p, Vector x, emulation::Site site = emulation::Site::current()) {
  emulation::check_alignment(p, emulation::Operation::store_streaming, site);
  *p = x;
}

template <class T>
T load_constant(const T* p) {
  return *p;
}

// Off by up to `most` units in the last place, like the device's, so that nothing relies on more.
inline float off_by_units(float exact, float x, int most) {
  float y = exact;
  if (std::isfinite(y)) {
    const int units = static_cast<int>(std::hash<float>()(x) % static_cast<unsigned>(2 * most + 1)) - most;
    y += static_cast<float>(units) * (std::nextafter(y, INFINITY) - y);
  }
  return std::fabs(y) < FLT_MIN ? std::copysign(0.0f, y) : y;
}
inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// Exact at 0.
inline float exp2_quick(float x) { return x == 0 ? 1.0f : off_by_units(std::exp2(x), x, 2); }
// Off by up to 2^-22, absolutely between 1/2 and 2, relatively elsewhere; exact at 1.
inline float log2_quick(float x) {
  const float y = std::log2(flushed(x));
  if (x == 1 || !std::isfinite(y)) return y;
  const float share = static_cast<float>(static_cast<int>(std::hash<float>()(x) % 5) - 2) / 2;
  return y + share * 0x1p-22f * std::fmax(std::fabs(y), 1.0f);
}
inline float reciprocal_quick(float x) { return x == 1 ? 1.0f : off_by_units(1 / flushed(x), x, 1); }

// These are about registers.
template <class Word>
void forget(Word& /*word*/) {}
inline void forget_memory() {}

inline cudaError_t current_device(Device* device) {
  *device = emulated_device;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Shape& shape, cudaStream_t, Arguments... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...));
  const auto body = [](const void* argument) {
    const Call& call = *static_cast<const Call*>(argument);
    std::apply(call.first, call.second);
  };
  return emulation::run(shape, body, &call);
}

template <class... Parameters>
cudaError_t resident_clusters(void (*)(Parameters...), const Shape& shape, int* clusters) {
  *clusters = emulation::possible(shape) ? emulated_resident_clusters : 0;
  return cudaSuccess;
}

}  // namespace imbalance::cuda

// ---- What nvcc itself has ----

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __cluster_dims__
#define __cluster_dims__(...)
#undef __noinline__
#undef __forceinline__
#define __forceinline__ inline
#undef __shared__  // means nothing to g++: a plain __shared__ would be a variable of each thread
#define __shared__ static_assert(false, "use SHARED_ARRAY or dynamic_smem");

// Macros, because glibc's <math.h> declares functions of these names for itself.
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }

using std::max;
using std::min;
// Unlike the library's, CUDA's pass over a NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  return std::atomic_ref<T>(*p).fetch_add(x, std::memory_order_relaxed);
}

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  Block& block = *machine->self->block;
  await(block.barrier, block.first, machine->threads, Operation::syncthreads, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  exchange(Operation::syncwarp, mask, 0, 0, site);
}

inline unsigned __ballot_sync(unsigned mask, int vote, std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  return exchange(Operation::ballot, mask, vote != 0, 0, site).ballot;
}
inline int __any_sync(unsigned mask, int vote, std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  return exchange(Operation::any, mask, vote != 0, 0, site).ballot != 0;
}
inline int __all_sync(unsigned mask, int vote, std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  return exchange(Operation::all, mask, vote == 0, 0, site).ballot == 0;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  return shuffle(Operation::shuffle, mask, value, segment(width) | (from & (width - 1)), site);
}
// A lane whose source lies outside its segment keeps its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  const int from = lane() ^ bits;
  return shuffle(Operation::shuffle_xor, mask, value, from < segment(width) + width ? from : lane(), site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  const int from = lane() + static_cast<int>(by);
  return shuffle(Operation::shuffle_down, mask, value, from < segment(width) + width ? from : lane(), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 std::source_location site = std::source_location::current()) {
  using namespace imbalance::cuda::emulation;
  const int from = lane() - static_cast<int>(by);
  return shuffle(Operation::shuffle_up, mask, value, from >= segment(width) ? from : lane(), site);
}
