// Channels-first logits (B, C, P) on CPU: tiles of pixels, whose classes are as far apart in scratch as a tile is long.
#pragma once

#include "packs.h"

namespace imbalance::cpu {
namespace {

constexpr int64_t kMostPixels = 512;         // of a tile; a run of floats takes 2 KB
constexpr int64_t kFewestPixels = 32;        // two cache lines of floats: shorter runs would read them in vain
constexpr int64_t kPlanesBytes = 512 << 10;  // of scratch

// The tile of pixels and the block of classes that scratch has room for.
struct PlanesTile {
  int64_t pixels;
  int64_t classes;
  int64_t run;    // numbers from one class to the next, of which the last pack may be written beyond its pixels
  int64_t parts;  // numbers of a class and a pixel

  PlanesTile(int64_t all_classes, int64_t parts, int64_t bytes_per_number)
      : pixels(kMostPixels), classes(all_classes), parts(parts) {
    const int64_t numbers = kPlanesBytes / (parts * bytes_per_number);
    while (classes * pixels > numbers && pixels > kFewestPixels) pixels /= 2;
    if (classes * pixels > numbers) {
      pixels = kMostPixels;
      classes = numbers / pixels;
    }
    run = pixels + kPadding;  // no power of two, whose runs would share a few of the cache's sets
  }
  int64_t count() const { return parts * part(); }
  int64_t part() const { return classes * run; }
};

// body(start, n) for each block of n classes, of which a tile's are at most.
template <class Body>
IMBALANCE_INLINE void for_blocks(const PlanesTile& tile, int64_t classes, Body body) {
  for (int64_t start = 0; start < classes; start += tile.classes) {
    body(start, classes - start < tile.classes ? classes - start : tile.classes);
  }
}

// body(i, n, image, pixel) for each run of rows [first, first + count) that lies in one image: n from the i-th on.
template <class Body>
IMBALANCE_INLINE void for_images(int64_t first, int64_t count, int64_t pixels, Body body) {
  for (int64_t i = 0; i < count;) {
    const int64_t image = (first + i) / pixels, pixel = (first + i) % pixels;
    const int64_t left = pixels - pixel, n = count - i < left ? count - i : left;
    body(i, n, image, pixel);
    i += n;
  }
}

// body(j, a) for j < n; a in 0..3 says which of four accumulators to use, so that their latencies overlap.
template <class Body>
IMBALANCE_INLINE void for_classes(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
#pragma GCC unroll 4
    for (int a = 0; a < 4; ++a) body(j + a, a);
  }
  for (; j < n; ++j) body(j, 0);
}

// What four accumulators have of a pack of pixels.
template <class L>
IMBALANCE_INLINE L sum_of_four(const L* x) {
  return (x[0] + x[1]) + (x[2] + x[3]);
}
template <class L>
IMBALANCE_INLINE L maximum_of_four(const L* x) {
  return maximum(maximum(x[0], x[1]), maximum(x[2], x[3]));
}

}  // namespace
}  // namespace imbalance::cpu
