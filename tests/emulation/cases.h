// What the programs that run CUDA kernels on the CPU have in common: memory, orders, and the choice of cases.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "emulator.h"
#include "halves.h"

namespace {

using namespace imbalance;
using namespace imbalance::cuda;

int random_orders = 0;
std::string name;  // of the case

template <class... Arguments>
[[noreturn]] void wrong(const char* format, Arguments... arguments) {
  char text[300];
  std::snprintf(text, sizeof(text), format, arguments...);
  throw std::runtime_error(text);
}

// ---- Memory ----

using Bytes = std::vector<unsigned char>;

std::size_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
Dtype wide(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

// `count` numbers, at first NaNs, of which the first is `offset` numbers from a multiple of 16 bytes.
class Numbers {
 public:
  Numbers() = default;  // absent
  Numbers(Dtype dtype, std::size_t count, std::size_t offset = 0, bool is_far = false)
      : dtype_(dtype), size_((offset + count) * size_of(dtype)) {
    if (is_far) {  // touched where there are rows alone
      memory_ = static_cast<unsigned char*>(
          mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (memory_ == MAP_FAILED) wrong("no address space");
    } else {
      memory_ = static_cast<unsigned char*>(std::malloc(size_));
      std::fill_n(memory_, size_, 0xff);
    }
    first_ = memory_ + offset * size_of(dtype);
    is_far_ = is_far;
  }
  Numbers(const Numbers&) = delete;
  Numbers(Numbers&& other) noexcept { swap(other); }
  Numbers& operator=(Numbers other) noexcept {
    swap(other);
    return *this;
  }
  ~Numbers() {
    if (is_far_) {
      munmap(memory_, size_);
    } else {
      std::free(memory_);
    }
  }

  void* data() const { return first_; }
  explicit operator bool() const { return first_ != nullptr; }

  double operator[](std::size_t i) const {
    switch (dtype_) {
      case Dtype::float32:
        return reinterpret_cast<const float*>(first_)[i];
      case Dtype::float64:
        return reinterpret_cast<const double*>(first_)[i];
      case Dtype::bfloat16:
        return static_cast<double>(__bfloat162float(reinterpret_cast<const __nv_bfloat16*>(first_)[i]));
      case Dtype::float16:
        return static_cast<double>(__half2float(reinterpret_cast<const __half*>(first_)[i]));
    }
    return 0;
  }
  void set(std::size_t i, double x) {
    switch (dtype_) {
      case Dtype::float32:
        reinterpret_cast<float*>(first_)[i] = static_cast<float>(x);
        break;
      case Dtype::float64:
        reinterpret_cast<double*>(first_)[i] = x;
        break;
      case Dtype::bfloat16:
        reinterpret_cast<__nv_bfloat16*>(first_)[i] = __float2bfloat16(static_cast<float>(x));
        break;
      case Dtype::float16:
        reinterpret_cast<__half*>(first_)[i] = __float2half(static_cast<float>(x));
        break;
    }
  }

  // Numbers from, ..., to - 1.
  Bytes bytes(std::size_t from, std::size_t to) const {
    return {first_ + from * size_of(dtype_), first_ + to * size_of(dtype_)};
  }
  void check_untouched(std::size_t from, std::size_t to) const {
    const Bytes all = bytes(from, to);
    if (std::any_of(all.begin(), all.end(), [](unsigned char byte) { return byte != 0xff; })) {
      wrong("numbers between the rows are overwritten");
    }
  }
  void check_untouched_before() const {
    if (std::any_of(memory_, first_, [](unsigned char byte) { return byte != 0xff; })) {
      wrong("numbers before the rows are overwritten");
    }
  }

 private:
  Dtype dtype_ = Dtype::float32;
  std::size_t size_ = 0;
  unsigned char *memory_ = nullptr, *first_ = nullptr;
  bool is_far_ = false;

  void swap(Numbers& other) noexcept {
    std::swap(dtype_, other.dtype_);
    std::swap(size_, other.size_);
    std::swap(memory_, other.memory_);
    std::swap(first_, other.first_);
    std::swap(is_far_, other.is_far_);
  }
};

// Runs in every order, on 1 to 3 clusters at a time; `run` returns its results.
template <class Run>
void in_every_order(const Run& run) {
  using emulation::Order;
  Bytes first;
  for (int i = 0; i < 2 + random_orders; ++i) {
    emulation::schedule = {i == 0 ? Order::forward : i == 1 ? Order::reverse : Order::random, static_cast<unsigned>(i)};
    emulated_resident_clusters = 1 + i % 3;
    const Bytes results = run();
    if (i == 0) first = results;
    if (results != first) wrong("not the same in every order: order %d", i);
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) wrong("not launched, error %d", static_cast<int>(error));
}

void append(Bytes* all, const Bytes& more) { all->insert(all->end(), more.begin(), more.end()); }

bool close(double ours, double exact, double tolerance) {
  return std::isnan(exact) ? std::isnan(ours) : ours == exact || std::abs(ours - exact) <= tolerance;
}

// Runs what choose_and_run(choose) chooses by choose(name): all, or what the arguments name after the orders.
template <class ChooseAndRun>
int run_program(int argc, char** argv, const ChooseAndRun& choose_and_run) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc > 1) random_orders = std::atoi(argv[1]);
  int chosen = 0;
  const auto choose = [&](std::string_view candidate) {
    const bool is_chosen = argc <= 2 || std::find(argv + 2, argv + argc, candidate) != argv + argc;
    if (is_chosen) name = candidate;
    chosen += is_chosen;
    return is_chosen;
  };
  try {
    choose_and_run(choose);
  } catch (const emulation::Error& error) {
    std::printf("%s: error: %s\n", name.c_str(), error.what());
    return 1;
  } catch (const std::exception& error) {
    std::printf("%s: wrong: %s\n", name.c_str(), error.what());
    return 1;
  }
  std::printf("%d cases are right\n", chosen);
  return chosen == 0;
}

}  // namespace
