// The faults that the emulator is there to find, each beside the right version: hazards NAME right|wrong
//
// Runs the kernel under several orders and says how each ended: "ok", "result: ..." where it differs from that of the
// right version, "error: ..." for what launch() threw. What a sanitizer sees ends the program.
#include <memory>
#include <string_view>

#include "cuda/device.cuh"

namespace {

using namespace imbalance::cuda;

constexpr unsigned kThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ unsigned everywhere() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- Races ----

__global__ void missing_barrier(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!wrong) __syncthreads();
  out[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

// A total is written anew while slow warps still read the last one.
__global__ void overwritten_total(bool wrong, int* out) {
  SHARED_ARRAY(int, total, 1);
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) total[0] = i + 1;
    __syncthreads();
    sum += total[0];
    if (!wrong) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// One barrier a turn is enough for two buffers, and not for one.
__global__ void double_buffer(bool wrong, int* out) {
  SHARED_ARRAY(int, total, 2);
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    int& t = total[wrong ? 0 : i % 2];
    if (threadIdx.x == 64) t = i + 1;
    __syncthreads();
    sum += t;
  }
  out[threadIdx.x] = sum;
}

__global__ void missing_syncwarp(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (!wrong) __syncwarp();
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}

__global__ void lost_update(bool wrong, int* out) {
  SHARED_ARRAY(int, n, 1);
  if (threadIdx.x == 0) n[0] = 0;
  __syncthreads();
  if (wrong) {
    n[0] += 1;
  } else {
    atomicAdd(&n[0], 1);
  }
  __syncthreads();
  out[threadIdx.x] = n[0];
}

// Blocks, and no barrier orders those, write the same number.
__global__ void blocks_race(bool wrong, int* out) {
  const unsigned to = wrong ? threadIdx.x : everywhere();
  out[to] = 1;
  if (wrong) out[everywhere()] = 1;
}

__global__ void cluster_race(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = 0;
  cluster_sync();
  remote(&x[0], (cluster_rank() + 1) % cluster_size())[threadIdx.x] = 1;
  if (wrong) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  out[everywhere()] = x[threadIdx.x];
  cluster_sync();
}

// ---- Clusters ----

__global__ void remote_after_exit(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  cluster_sync();
  out[everywhere()] = *remote(&x[threadIdx.x], (cluster_rank() + 1) % cluster_size());
  if (!wrong) cluster_sync();
}

// The same by an address that was good when it was asked for.
__global__ void remote_address_after_exit(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  cluster_sync();
  const int* const other = remote(&x[threadIdx.x], (cluster_rank() + 1) % cluster_size());
  __syncthreads();
  cluster_sync();
  if (cluster_rank() == 1) __syncthreads();
  out[everywhere()] = *other;
  if (!wrong) cluster_sync();
}

__global__ void remote_before_start(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  if (!wrong) cluster_sync();
  remote(&x[threadIdx.x], (cluster_rank() + 1) % cluster_size())[0] = 1;
  cluster_sync();
  out[everywhere()] = x[threadIdx.x];
}

__global__ void remote_rank(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x] = static_cast<int>(threadIdx.x);
  cluster_sync();
  out[everywhere()] = *remote(&x[threadIdx.x], cluster_rank() + 1 < cluster_size() || wrong ? cluster_rank() + 1 : 0);
  cluster_sync();
}

// ---- Barriers that not all reach ----

__global__ void warp_skips_barrier(bool wrong, int* out) {
  if (!wrong || threadIdx.x / 32 != 1) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_warp_skips_barrier(bool wrong, int* out) {
  if (!wrong || threadIdx.x < kThreads - 16) __syncthreads();
  out[threadIdx.x] = 1;
  __syncthreads();
}

__global__ void barrier_at_two_sites(bool wrong, int* out) {
  if (wrong && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void early_return(bool wrong, int* out) {
  out[threadIdx.x] = 1;
  if (wrong && threadIdx.x == 3) return;
  __syncthreads();
}

// ---- Warp operations without all their lanes ----

__global__ void half_warp_shuffles(bool wrong, int* out) {
  int x = static_cast<int>(threadIdx.x);
  if (!wrong || threadIdx.x % 32 < 16) x += __shfl_xor_sync(kAllLanes, x, 1);
  __syncthreads();
  out[threadIdx.x] = wrong ? 0 : x;
}

__global__ void shuffle_at_two_sites(bool wrong, int* out) {
  int x = static_cast<int>(threadIdx.x);
  if (wrong && threadIdx.x % 2 == 0) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
  } else {
    x += __shfl_xor_sync(kAllLanes, x, 1);
  }
  out[threadIdx.x] = x;
}

__global__ void exited_lane(bool wrong, int* out) {
  out[threadIdx.x] = 1;
  if (wrong && threadIdx.x == 3) return;
  out[threadIdx.x] += __shfl_xor_sync(kAllLanes, 1, 1);
}

__global__ void lane_outside_mask(bool wrong, int* out) {
  out[threadIdx.x] = __shfl_xor_sync(wrong ? 0x0000ffffu : kAllLanes, 1, 1);
}

// ---- Memory ----

__global__ void beyond_array(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  x[threadIdx.x + wrong] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void beyond_array_by_pointer(bool wrong, int* out) {
  SHARED_ARRAY(int, x, kThreads);
  int* const p = &x[threadIdx.x];
  p[wrong] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = *p + wrong;
}

__global__ void beyond_dynamic(bool wrong, int* out) {
  int* const x = dynamic_smem<int>(0, kThreads);
  int* const y = dynamic_smem<int>(kThreads * sizeof(int), kThreads);
  x[threadIdx.x + wrong] = static_cast<int>(threadIdx.x);  // into y
  y[threadIdx.x] = 0;
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void dynamic_outside_launch(bool wrong, int* out) {
  int* const x = dynamic_smem<int>(kThreads * sizeof(int), kThreads + wrong);
  x[threadIdx.x] = 1;
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void dynamic_overlap(bool wrong, int* out) {
  int* const x = dynamic_smem<int>(0, kThreads);
  int* const y = dynamic_smem<int>((kThreads - wrong) * sizeof(int), kThreads);
  x[threadIdx.x] = y[threadIdx.x] = 1;
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void dynamic_offset(bool wrong, int* out) {
  double* const x = dynamic_smem<double>(wrong ? 4 : 8, 1);
  if (threadIdx.x == 0) x[0] = 1;
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(x[0]);
}

__global__ void beyond_global(bool wrong, int* out) { out[everywhere() + wrong] = 1; }

__global__ void misaligned_vector(bool wrong, int* out) {
  if (threadIdx.x == 0) *reinterpret_cast<int4*>(out + wrong) = make_int4(1, 1, 1, 1);
}

__global__ void misaligned_load(bool wrong, int* out) {
  const uint4 x = load_streaming(reinterpret_cast<const uint4*>(out + wrong));
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(x.x);
}

__global__ void misaligned_store(bool wrong, int* out) {
  if (threadIdx.x == 0) store_streaming(reinterpret_cast<uint4*>(out + wrong), make_uint4(1, 1, 1, 1));
}

// Nothing aligns an array better than its type does.
__global__ void misaligned_array(bool wrong, int* out) {
  SHARED_ARRAY(int, narrow, 4);
  SHARED_ARRAY(int4, wide, 1);
  if (threadIdx.x == 0) *(wrong ? reinterpret_cast<int4*>(narrow) : wide) = make_int4(1, 1, 1, 1);
  __syncthreads();
  out[threadIdx.x] = wrong ? narrow[0] : wide[0].x;
}

__global__ void uninitialised(bool wrong, int* out) {
  SHARED_ARRAY(float, x, kThreads);
  if (!wrong || threadIdx.x != 5) x[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] = std::isnan(x[threadIdx.x]);
}

[[gnu::noinline]] __device__ int recurse(int depth) {
  volatile int numbers[256] = {depth};
  return depth == 0 ? 0 : recurse(depth - 1) + numbers[0];
}

__global__ void deep(bool wrong, int* out) { out[threadIdx.x] = recurse(wrong ? 1000 : 3); }

// ---- The program ----

using Kernel = void (*)(bool, int*);
struct Hazard {
  std::string_view name;
  Kernel kernel;
  unsigned blocks = 1, cluster = 1;
};
constexpr Hazard kHazards[] = {
#define HAZARD(name, ...) {#name, name __VA_OPT__(, ) __VA_ARGS__}
    HAZARD(missing_barrier),
    HAZARD(overwritten_total),
    HAZARD(double_buffer),
    HAZARD(missing_syncwarp),
    HAZARD(lost_update),
    HAZARD(blocks_race, 4),
    HAZARD(cluster_race, 4, 4),
    HAZARD(remote_after_exit, 4, 2),
    HAZARD(remote_address_after_exit, 4, 2),
    HAZARD(remote_before_start, 4, 2),
    HAZARD(remote_rank, 8, 4),
    HAZARD(warp_skips_barrier),
    HAZARD(half_warp_skips_barrier),
    HAZARD(barrier_at_two_sites),
    HAZARD(early_return),
    HAZARD(half_warp_shuffles),
    HAZARD(shuffle_at_two_sites),
    HAZARD(exited_lane),
    HAZARD(lane_outside_mask),
    HAZARD(beyond_array),
    HAZARD(beyond_array_by_pointer),
    HAZARD(beyond_dynamic),
    HAZARD(dynamic_outside_launch),
    HAZARD(dynamic_overlap),
    HAZARD(dynamic_offset),
    HAZARD(beyond_global, 2),
    HAZARD(misaligned_vector),
    HAZARD(misaligned_load),
    HAZARD(misaligned_store),
    HAZARD(misaligned_array),
    HAZARD(uninitialised),
    HAZARD(deep),
#undef HAZARD
};

class Numbers {  // of just the size that the kernel writes, so that AddressSanitizer sees the end
 public:
  explicit Numbers(unsigned n) : n_(n), numbers_(new int[n]()) {}
  int* data() const { return numbers_.get(); }
  bool operator==(const Numbers& other) const { return std::equal(data(), data() + n_, other.data()); }

 private:
  unsigned n_;
  std::unique_ptr<int[]> numbers_;
};

Numbers run(const Hazard& hazard, bool wrong, emulation::Schedule schedule) {
  emulation::schedule = schedule;
  Numbers out(hazard.blocks * kThreads);
  const Shape shape{hazard.blocks, kThreads, hazard.cluster, 2 * kThreads * sizeof(int)};
  if (launch(hazard.kernel, shape, nullptr, wrong, out.data()) != cudaSuccess) throw emulation::Error("not launched");
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  using emulation::Order;
  const auto* const hazard = std::find_if(std::begin(kHazards), std::end(kHazards),
                                          [&](const Hazard& h) { return argc == 3 && h.name == argv[1]; });
  if (hazard == std::end(kHazards)) {
    for (const Hazard& h : kHazards) std::puts(h.name.data());
    return 0;
  }
  const bool wrong = std::string_view(argv[2]) == "wrong";
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const Numbers expected = run(*hazard, false, {});
  for (unsigned i = 0; i < 8; ++i) {
    const Order order = i == 0 ? Order::forward : i == 1 ? Order::reverse : Order::random;
    try {
      std::puts(run(*hazard, wrong, {order, i}) == expected ? "ok" : "result: not that of the right version");
    } catch (const emulation::Error& error) {
      std::printf("error: %s\n", error.what());
    }
  }
}
