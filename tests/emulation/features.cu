// What the emulator has for kernels that are right, each compared with what CUDA says it does; a library, for Python.
//
// run_features() returns null, or what is wrong.
#include <limits>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace {

using namespace imbalance::cuda;

constexpr unsigned kAllLanes = 0xffffffffu;

std::string failure;

void expect(bool condition, const char* what) {
  if (!condition && failure.empty()) failure = what;
}
#define EXPECT(...) expect((__VA_ARGS__), #__VA_ARGS__)

template <class Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// ---- Warps ----

__global__ void warp_operations(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32), width = 8, segment = lane / width * width;
  const auto check = [&](bool right) { *wrong += !right; };
  check(__shfl_sync(kAllLanes, lane, 5) == 5);
  check(__shfl_sync(kAllLanes, lane, 3, width) == segment + 3);
  check(__shfl_xor_sync(kAllLanes, lane, 9) == (lane ^ 9));
  check(__shfl_xor_sync(kAllLanes, 0.5 * lane, 1) == 0.5 * (lane ^ 1));
  check(__shfl_down_sync(kAllLanes, lane, 3u, width) == (lane + 3 < segment + width ? lane + 3 : lane));
  check(__shfl_up_sync(kAllLanes, lane, 3u, width) == (lane - 3 >= segment ? lane - 3 : lane));
  check(__ballot_sync(kAllLanes, lane % 2) == 0xaaaaaaaau);
  check(__any_sync(kAllLanes, lane == 31) && !__any_sync(kAllLanes, lane == 32));
  check(__all_sync(kAllLanes, lane < 32) && !__all_sync(kAllLanes, lane < 31));
  if (lane < 16) check(__shfl_xor_sync(0x0000ffffu, lane, 1) == (lane ^ 1));
  if (lane < 16) check(std::isnan(__shfl_sync(0x0000ffffu, 1.0f, 20)));  // undefined in CUDA: nobody may use it
}

// Of 40 threads the second warp has eight.
__global__ void part_of_a_warp(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  *wrong += __ballot_sync(kAllLanes, 1) != (threadIdx.x < 32 ? kAllLanes : 0xffu);
  *wrong += __shfl_xor_sync(kAllLanes, lane, 1) != (lane ^ 1);
}

// ---- Shared memory and clusters ----

template <int number>
__device__ int* array_of() {
  SHARED_ARRAY(int, x, 1);
  return x;
}

__global__ void every_array_is_its_own(int* wrong) {
  if (threadIdx.x == 0) {
    array_of<1>()[0] = 1;
    array_of<2>()[0] = 2;
    *dynamic_smem<int>(0, 1) = 3;
    *dynamic_smem<int>(4, 1) = 4;
  }
  __syncthreads();
  *wrong += array_of<1>()[0] != 1 || array_of<2>()[0] != 2;
  *wrong += *dynamic_smem<int>(0, 1) != 3 || *dynamic_smem<int>(4, 1) != 4;
  *wrong += dynamic_smem<int>(8, 0) == nullptr;
}

__global__ void neighbours(int* out) {
  SHARED_ARRAY(unsigned, x, 1024);
  x[threadIdx.x] = blockIdx.x;
  cluster_sync();
  unsigned* const other = remote(x, (cluster_rank() + 1) % cluster_size());
  atomicAdd(&out[blockIdx.x], static_cast<int>(other[blockDim.x - 1 - threadIdx.x]));
  cluster_sync();
}

void clusters_of(unsigned cluster, unsigned threads) {
  std::vector<int> sums(2 * cluster);
  EXPECT(launch(neighbours, {2 * cluster, threads, cluster, 0}, nullptr, sums.data()) == cudaSuccess);
  for (unsigned block = 0; block < sums.size(); ++block) {
    const unsigned neighbour = block / cluster * cluster + (block + 1) % cluster;
    EXPECT(sums[block] == static_cast<int>(neighbour * threads));
  }
}

// ---- Numbers ----

__global__ void numbers(int* wrong) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto check = [&](bool right) { *wrong += !right; };
  check(exp2_quick(-infinity) == 0 && std::abs(exp2_quick(3.0f) - 8) <= 8 * 0x1p-22f && exp2_quick(0.0f) == 1 &&
        exp2_quick(-130.0f) == 0);
  check(std::isnan(exp2_quick(nan)) && exp2_quick(infinity) == infinity);
  check(max(nan, 1.0f) == 1 && max(1.0f, nan) == 1 && min(nan, 1.0f) == 1 && min(2.0, 1.0) == 1 && max(1, 2) == 2);
  check(__uint_as_float(__float_as_uint(1.5f)) == 1.5f && __fdividef(3.0f, 2.0f) == 1.5f && __expf(0.0f) == 1);
  check(__popc(0xf0u) == 4 && __clz(1) == 31 && __ffs(8) == 4 && __ffs(0) == 0);

  const __nv_bfloat162 pair = __floats2bfloat162_rn(1.0f, -2.5f);
  check(__bfloat162float(pair.x) == 1 && __bfloat162float(pair.y) == -2.5f);
  check(__bfloat1622float2(pair).y == -2.5f &&
        __bfloat162float(__float2bfloat16_rn(1.00390625f)) == 1);  // ties to even
  check(__bfloat16_as_ushort(__float2bfloat16_rn(1.0f)) == 0x3f80 &&
        std::isnan(__bfloat162float(__float2bfloat16(nan))));
  const __half2 halves = __floats2half2_rn(1.0f, 1e6f);
  check(__half22float2(halves).x == 1 && __half22float2(halves).y == infinity);
  check(__half_as_ushort(__float2half_rn(1.0f)) == 0x3c00 && __half2float(__ushort_as_half(1)) == 0x1p-24f);

  SHARED_ARRAY(uint4, vectors, 1);
  store_streaming(vectors, make_uint4(1, 2, 3, 4));
  check(load_streaming(vectors).w == 4);
  int word = 1;
  forget(word);
  forget_memory();
  check(word == 1);
}

// ---- Launches ----

__global__ void nothing(const float* __restrict__, double) {}
__global__ void much_static_memory() {
  SHARED_ARRAY(float, x, 13 << 10);
  x[0] = 0;
}
__global__ void never_meet() {
  if (threadIdx.x > 0) __syncthreads();
}

void launches() {
  const auto launch_of = [](Shape shape) { return launch(nothing, shape, nullptr, nullptr, 1); };
  const auto clusters_of = [](Shape shape) {
    int clusters = -1;
    EXPECT(resident_clusters(nothing, shape, &clusters) == cudaSuccess);
    return clusters;
  };
  EXPECT(launch_of({1, 1024, 1, 227 << 10}) == cudaSuccess && launch_of({32, 1, 16, 0}) == cudaSuccess);
  EXPECT(clusters_of({16, 1024, 16, 227 << 10}) == emulated_resident_clusters);
  for (const Shape& shape : {Shape{1, 1025, 1, 0}, Shape{1, 0, 1, 0}, Shape{17, 32, 17, 0}, Shape{1, 32, 0, 0},
                             Shape{1, 32, 1, (227 << 10) + 1}}) {
    EXPECT(launch_of(shape) == cudaErrorInvalidConfiguration && clusters_of(shape) == 0);
  }
  EXPECT(launch_of({0, 32, 1, 0}) == cudaErrorInvalidConfiguration);
  EXPECT(launch_of({3, 32, 2, 0}) == cudaErrorInvalidConfiguration);

  Device device;
  const Device before = emulated_device;
  emulated_device = {108, 164 << 10, 40 << 20, false};
  EXPECT(current_device(&device) == cudaSuccess && device.multiprocessors == 108 && !device.has_clusters);
  EXPECT(launch_of({2, 32, 2, 0}) == cudaErrorInvalidConfiguration && clusters_of({2, 32, 2, 0}) == 0);
  EXPECT(launch_of({2, 32, 1, 165 << 10}) == cudaErrorInvalidConfiguration);
  emulated_device = before;
}

void run_all() {
  int wrong = 0;
  EXPECT(launch(warp_operations, {1, 64, 1, 0}, nullptr, &wrong) == cudaSuccess && wrong == 0);
  EXPECT(launch(part_of_a_warp, {1, 40, 1, 0}, nullptr, &wrong) == cudaSuccess && wrong == 0);
  EXPECT(launch(every_array_is_its_own, {2, 64, 1, 64}, nullptr, &wrong) == cudaSuccess && wrong == 0);
  EXPECT(launch(numbers, {1, 1, 1, 0}, nullptr, &wrong) == cudaSuccess && wrong == 0);
  launches();
  for (const unsigned cluster : {1, 2, 3, 8, 16}) clusters_of(cluster, 96);
  EXPECT(error_of([] { launch(never_meet, {4, 64, 2, 0}, nullptr); }).find("deadlock") == 0);
  EXPECT(error_of([] { launch(much_static_memory, {1, 1, 1, 0}, nullptr); }).find("more than 48 KiB") == 0);
  clusters_of(2, 64);  // an error leaves nothing behind
}

}  // namespace

extern "C" const char* run_features() {
  using emulation::Order;
  failure.clear();
  for (const Order order : {Order::forward, Order::reverse, Order::random}) {
    emulation::schedule = {order, 7};
    const std::string error = error_of(run_all);
    expect(error.empty(), error.c_str());
  }
  return failure.empty() ? nullptr : failure.c_str();
}

// The largest cluster.
extern "C" const char* run_largest() {
  failure.clear();
  emulation::schedule = {};
  clusters_of(16, 1024);
  return failure.empty() ? nullptr : failure.c_str();
}
