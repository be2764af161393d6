// softmax_loss and target_and_rest on CUDA: value and gradient of any softmax-family loss in one trip over the logits.
//
// Four kernels, by which threads share a row, around the same device functions (rows.cuh, row_reduce.cuh):
//
// - rows_in_lanes: narrow rows, each shared by 1 to 32 lanes of a warp. Nothing but shuffles between them.
// - rows_over_clusters: a row stays in the registers of a cluster of 1 to 16 blocks, or of one block where the device
//   has no clusters; maxima and sums go through distributed shared memory. Two blocks share a multiprocessor, so that
//   one row's loads overlap another's stores.
// - rows_in_sweeps: rows too long for that, and losses alone without class vectors: one block reads a row in pieces,
//   and for its gradient again, the last piece first, so that it begins with what the cache still holds.
// - rows_in_pieces: the backward of target_and_rest, which knows shift and sum already: pieces are apart.
//
// Logits that lie channels-first have a kernel of their own, rows_in_planes (planes.cuh).
//
// All are persistent. In the first two a block's stretch of class vectors stays in its shared memory while rows pass,
// and the next row is on its way as soon as there are registers for it. N*C is read once and written once; nothing of
// its size but the gradient is allocated. No atomics: a row's bits depend on its own values, its width and its
// alignment alone.
#pragma once

#include <algorithm>

#include "launches.cuh"
#include "planes.cuh"
#include "rows.cuh"

namespace imbalance::cuda {

constexpr int kClusterPacks = 8;      // of a thread's registers, in rows_over_clusters
constexpr int kClusterThreads = 256;  // at most; two such blocks fill a multiprocessor's registers
constexpr int kLargestCluster = 16;   // blocks
constexpr int kLanePacks = 4;         // in rows_in_lanes
constexpr int kWideLanePacks = 8;     // where 32 lanes need more
constexpr int kLaneThreads = 128;
constexpr int lane_blocks(Map map, int packs) {  // of a multiprocessor
  return packs == kLanePacks ? (map == Map::general ? 4 : 5) : (map == Map::general ? 2 : 4);
}
constexpr int kSweepPacks = 4;            // at a time, in rows_in_sweeps
constexpr int kSweepThreads = 1024;       // a multiprocessor's, at 64 registers each; some forms need more
constexpr int kSweepThreadsToRead = 256;  // of a block that only reads: several share a multiprocessor
constexpr int sweep_threads(Map map, bool aligned) {
  return map == Map::general || !aligned ? kSweepThreads / 2 : kSweepThreads;
}
constexpr int kPiecePacks = 4;  // in rows_in_pieces
constexpr int kPieceThreads = 256;
constexpr unsigned kReservedShared = 4 << 10;  // bytes of a block beside the class vectors

template <class S, Map map, bool aligned, int packs>
__global__ void __launch_bounds__(kLaneThreads, lane_blocks(map, packs))
    rows_in_lanes(const __grid_constant__ Rows<S> rows, const __grid_constant__ Results<S> results, int lanes) {
  using T = Accumulate<S>;
  constexpr bool weighted = map == Map::general;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const Columns<aligned> columns{0, rows.classes, lanes, lane};
  auto tile = tile_of<map, packs>(rows, columns, stage<aligned>(rows, 0, lanes * packs * Pack<S>::width, map));
  __syncthreads();
  const bool is_nothing = results.is_nothing();
  const T common = common_factor(results);

  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * groups;
  std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * groups;  // of the block's rows
  Place place = place_of(rows, first + group, is_nothing);
  tile.load(place);
  std::int64_t label = label_of(rows, first + step + group);
  for (Place next; first < rows.count; first += step, place = next) {
    next = place_of(rows, first + step + group, label, is_nothing);
    label = label_of(rows, first + 2 * step + group);
    auto coming = tile;  // while its numbers are on their way, this row's are worked on
    coming.load(next);
    const Target<T> target = load_target(rows, results, place);
    const bool owns_target = tile.exclude(place.target);
    __syncwarp();  // in place: all lanes have read the target before its owner overwrites it
    const T highest = max_over_lanes(tile.highest(), lanes);
    const RowSums<T> sums = add_over_lanes<weighted>(tile.sums(highest), lanes);
    S* const d_row = results.d_logits ? results.d_logits + place.row * results.gradient_stride : nullptr;
    if (place.is_read) {
      const RowGradient<T> gradient = finish(results, place, target, sums, common, lane == 0);
      if (d_row) tile.spread(gradient, d_row);
      if (d_row && owns_target) store_number(d_row + place.target, gradient.target);
    } else if (place.row < rows.count) {
      if (lane == 0) finish_unread(results, place);
      if (d_row) tile.fill(value_of_unread<T>(place), d_row);
    }
    tile.take(coming);
  }
}

template <class S, Map map, bool aligned>
__global__ void __launch_bounds__(kClusterThreads, 2)
    rows_over_clusters(const __grid_constant__ Rows<S> rows, const __grid_constant__ Results<S> results) {
  using T = Accumulate<S>;
  constexpr bool weighted = map == Map::general;
  SHARED_ARRAY(RowSums<T>, sums_of_warps, kClusterThreads / kWarp);
  SHARED_ARRAY(RowSums<T>, sums_of_blocks, 2 * kLargestCluster);  // of this row and of the next
  SHARED_ARRAY(RowGradient<T>, gradient_of_row, 1);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int stretch = threads * kClusterPacks * Pack<S>::width;
  const Columns<aligned> columns{rank * stretch, rows.classes, threads, thread};
  auto tile = tile_of<map, kClusterPacks>(rows, columns, stage<aligned>(rows, rank * stretch, stretch, map));
  cluster_sync();  // the stretches are there, and so are all blocks
  const bool is_nothing = results.is_nothing();
  const T common = common_factor(results);

  const int count = static_cast<int>(rows.count), step = static_cast<int>(gridDim.x) / blocks;
  int row = static_cast<int>(blockIdx.x) / blocks, parity = 0;
  const bool ahead = results.d_logits == nullptr;  // the next row is loaded while this one's sums travel
  Place place = place_of(rows, row, is_nothing);
  if (ahead) tile.load(place);
  for (Place next; row < count; row += step, place = next) {
    next = place_of(rows, row + step, is_nothing);
    S* const d_row = ahead ? nullptr : results.d_logits + row * results.gradient_stride;
    if (!place.is_read) {  // the same for all threads of the cluster
      if (rank == 0 && thread == 0) finish_unread(results, place);
      if (ahead) {
        tile.load(next);
      } else {
        tile.fill(value_of_unread<T>(place), d_row);
      }
      continue;
    }
    if (!ahead) tile.load(place);
    const bool owns_target = tile.exclude(place.target);
    const T highest = max_over_lanes(tile.highest(), kWarp);
    RowSums<T> sums = add_over_lanes<weighted>(tile.sums(highest), kWarp);
    if (ahead) tile.load(next);
    if (lane == 0) sums_of_warps[warp] = sums;
    Target<T> target{};
    if (warp == 0) target = load_target(rows, results, place);  // in place: before others may overwrite it
    __syncthreads();                                            // sums of warps
    if (warp == 0) sums = join_lanes<weighted>(lane < warps ? sums_of_warps[lane] : RowSums<T>::nothing(), kWarp);
    if (blocks > 1) {
      RowSums<T>* const of_blocks = &sums_of_blocks[parity * kLargestCluster];
      if (warp == 0 && lane < blocks) *remote(&of_blocks[rank], static_cast<unsigned>(lane)) = sums;
      cluster_sync(warp == 0);  // sums of blocks: no warp waits for its last gradient's stores
      if (warp == 0) sums = join_lanes<weighted>(lane < blocks ? of_blocks[lane] : RowSums<T>::nothing(), kWarp);
      parity ^= 1;  // a block that is ahead writes the next row's sums while others read this one's
    }
    if (warp == 0) {
      const RowGradient<T> gradient = finish(results, place, target, sums, common, rank == 0 && lane == 0);
      if (lane == 0) gradient_of_row[0] = gradient;
    }
    __syncthreads();  // gradient of the row
    if (ahead) continue;
    const RowGradient<T> gradient = gradient_of_row[0];
    tile.spread(gradient, d_row);
    if (owns_target) store_number(d_row + place.target, gradient.target);
  }
}

template <class S, Map map, bool aligned>
__global__ void __launch_bounds__(sweep_threads(map, aligned), 1)
    rows_in_sweeps(const __grid_constant__ Rows<S> rows, const __grid_constant__ Results<S> results) {
  using T = Accumulate<S>;
  constexpr bool weighted = map == Map::general;
  SHARED_ARRAY(RowSums<T>, sums_of_warps, sweep_threads(map, aligned) / kWarp);
  SHARED_ARRAY(RowGradient<T>, gradient_of_row, 1);

  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int warp = thread / kWarp, lane = thread % kWarp, warps = threads / kWarp;
  const int length = threads * kSweepPacks * Pack<S>::width, pieces = (rows.classes + length - 1) / length;
  const auto piece_of = [&](int index) {
    const Columns<aligned> columns{index * length, rows.classes, threads, thread};
    return tile_of<map, kSweepPacks>(rows, columns, vectors_of(rows));
  };
  const bool is_nothing = results.is_nothing();
  const T common = common_factor(results);

  for (std::int64_t row = blockIdx.x; row < rows.count; row += gridDim.x) {
    const Place place = place_of(rows, row, is_nothing);
    S* const d_row = results.d_logits ? results.d_logits + row * results.gradient_stride : nullptr;
    if (!place.is_read) {
      if (thread == 0) finish_unread(results, place);
      for (int i = 0; d_row && i < pieces; ++i) piece_of(i).fill(value_of_unread<T>(place), d_row);
      continue;
    }
    Target<T> target{};
    if (warp == 0) target = load_target(rows, results, place);
    RowSums<T> sums = RowSums<T>::nothing();
    for (int i = 0; i < pieces; ++i) {
      auto piece = piece_of(i);
      piece.load(place, Reads::again);
      piece.exclude(place.target);
      sums = sums.raised(maximum(sums.highest, piece.highest()));
      sums = sums.plus(piece.sums(sums.highest));
    }
    sums = join_lanes<weighted>(sums, kWarp);
    if (lane == 0) sums_of_warps[warp] = sums;
    __syncthreads();  // sums of warps
    if (warp == 0) {
      sums = join_lanes<weighted>(lane < warps ? sums_of_warps[lane] : RowSums<T>::nothing(), kWarp);
      const RowGradient<T> gradient = finish(results, place, target, sums, common, lane == 0);
      if (lane == 0) gradient_of_row[0] = gradient;
    }
    __syncthreads();  // gradient of the row
    if (d_row == nullptr) continue;
    const RowGradient<T> gradient = gradient_of_row[0];
    for (int i = pieces - 1; i >= 0; --i) {
      auto piece = piece_of(i);
      piece.load(place);
      const bool owns_target = piece.exclude(place.target);
      piece.spread(gradient, d_row);
      if (owns_target) store_number(d_row + place.target, gradient.target);
    }
  }
}

// The gradients of a split; weighted_logits may be null.
template <class T>
struct SplitGradients {
  const T* rest;  // (N,) and shift: of the forward
  const T* shift;
  const T* d_target;
  const T* d_rest;
  const T* d_weighted_logits;
};

template <class S, Map map, bool aligned>
__global__ void __launch_bounds__(kPieceThreads)
    rows_in_pieces(const __grid_constant__ Rows<S> rows,
                   const __grid_constant__ SplitGradients<Accumulate<S>> gradients, S* d_logits,
                   std::int64_t gradient_stride, int lanes) {
  using T = Accumulate<S>;
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = static_cast<int>(blockDim.x) / lanes;
  const int length = lanes * kPiecePacks * Pack<S>::width;
  const Pieces pieces(static_cast<std::int64_t>(gridDim.x) * groups, (rows.classes + length - 1) / length);
  Piece<int> piece = pieces.at(static_cast<std::int64_t>(blockIdx.x) * groups + group);
  for (; piece.row < rows.count; piece = pieces.after(piece)) {
    const Place place = place_of(rows, piece.row, false);
    S* const d_row = d_logits + place.row * gradient_stride;
    const Columns<aligned> columns{piece.index * length, rows.classes, lanes, lane};
    auto tile = tile_of<map, kPiecePacks>(rows, columns, vectors_of(rows));
    if (!place.is_read) {
      tile.fill(value_of_unread<T>(place), d_row);
      continue;
    }
    tile.load(place);
    const bool owns_target = tile.exclude(place.target);
    const T rest = gradients.rest[place.row];
    const T d_rest = gradients.d_rest[place.row];
    RowGradient<T> gradient{
        T(0),
        rest == -infinity<T>() ? T(0) : d_rest * std::exp(-rest),
        gradients.d_weighted_logits ? -gradients.d_weighted_logits[place.row] : T(0),
        gradients.shift[place.row],
    };
    if (owns_target) {  // its logit is read by the thread that overwrites it
      const Target<T> target = load_target(rows, Results<S>{}, place);
      gradient.target = (gradients.d_target[place.row] - gradient.weights * target.weight) * target.slope;
    }
    tile.spread(gradient, d_row);
    if (owns_target) store_number(d_row + place.target, gradient.target);
  }
}

// ---------------------------------------------------------------- launches

template <class S>
Rows<S> rows_of(const SplitArguments& a, std::int64_t count) {
  using T = Accumulate<S>;
  Rows<S> rows{};
  rows.count = count;
  rows.classes = static_cast<int>(a.classes);
  rows.logits = static_cast<const S*>(a.logits);
  rows.stride = a.row_stride;
  rows.pixels = a.pixels;
  rows.class_stride = a.class_stride;
  rows.target = a.target;
  rows.probabilities = a.probabilities_are_logits_dtype ? static_cast<const S*>(a.probabilities) : nullptr;
  rows.probabilities_wide = a.probabilities_are_logits_dtype ? nullptr : static_cast<const T*>(a.probabilities);
  rows.ignore_index = a.ignore_index;
  rows.scale = static_cast<T>(a.scale);
  rows.factor = static_cast<const T*>(a.factor);
  rows.bias = static_cast<const T*>(a.bias);
  rows.class_margin = static_cast<const T*>(a.class_margin);
  rows.class_weight = static_cast<const T*>(a.class_weight);
  rows.target_map = {a.margin_kind,
                     {static_cast<T>(a.margin_parameters[0]), static_cast<T>(a.margin_parameters[1]),
                      static_cast<T>(a.margin_parameters[2]), static_cast<T>(a.margin_parameters[3])},
                     static_cast<T>(a.softcap)};
  rows.kept = static_cast<T>(1 - a.label_smoothing);
  rows.smoothing_per_class = static_cast<T>(a.label_smoothing / static_cast<double>(a.classes));
  rows.spreads = a.target == nullptr || a.label_smoothing > 0;
  return rows;
}

// Whether rows are made of whole packs: of all that is (N, C), and beside class vectors.
template <class S>
bool is_aligned(const Rows<S>& rows, const S* d_logits, std::int64_t gradient_stride) {
  const auto at_packs = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  constexpr int width = Pack<S>::width;
  return rows.classes % width == 0 && rows.stride % width == 0 && gradient_stride % width == 0 &&
         at_packs(rows.logits) && at_packs(d_logits) && at_packs(rows.probabilities) &&
         at_packs(rows.probabilities_wide) && at_packs(rows.factor) && at_packs(rows.bias) &&
         (!rows.spreads || at_packs(rows.class_weight));
}

template <class S>
Map map_of(const Rows<S>& rows) {
  if (std::is_same_v<S, double> || rows.spreads || rows.factor || rows.target_map.softcap > 0 ||
      rows.target_map.kind == MarginKind::circle || !(rows.scale > 0)) {
    return Map::general;
  }
  return rows.bias != nullptr || rows.scale != 1 ? Map::affine : Map::plain;
}

// The form of a kernel, as constants.
template <Map map_, bool aligned_>
struct Form {
  static constexpr Map map = map_;
  static constexpr bool aligned = aligned_;
};

// f(Form) for the form that serves these rows. Not every kernel is worth compiling in a plain form (`with_plain`), and
// float64, which is for tests, has the general ones alone.
template <class S, bool with_plain, class Function>
cudaError_t with_form(const Rows<S>& rows, bool aligned, const Function& f) {
  const Map map = map_of(rows);
  if constexpr (!std::is_same_v<S, double>) {
    if constexpr (with_plain) {
      if (map == Map::plain && aligned) return f(Form<Map::plain, true>{});
    }
    if (map != Map::general) return aligned ? f(Form<Map::affine, true>{}) : f(Form<Map::affine, false>{});
  }
  return aligned ? f(Form<Map::general, true>{}) : f(Form<Map::general, false>{});
}

template <int packs, class S>
cudaError_t launch_in_lanes(const Rows<S>& rows, const Results<S>& results, bool aligned, cudaStream_t stream) {
  constexpr int per_lane = packs * Pack<S>::width;
  const int lanes = lanes_for(rows.classes, per_lane, kWarp);
  return with_form<S, true>(rows, aligned, [&](auto form) {
    const auto kernel = &rows_in_lanes<S, form.map, form.aligned, packs>;
    Shape shape{1, kLaneThreads, 1, staged_bytes(rows, lanes * per_lane, form.map)};
    if (const cudaError_t error = fill_device(kernel, ceiling(rows.count, kLaneThreads / lanes), &shape)) return error;
    return launch(kernel, shape, stream, rows, results, lanes);
  });
}

// Launches with the smallest clusters whose registers hold a row, and whose shared memory its class vectors, for two
// blocks of a multiprocessor if that can be.
template <class S>
cudaError_t launch_over_clusters(const Rows<S>& rows, const Results<S>& results, bool aligned, const Device& device,
                                 cudaStream_t stream) {
  constexpr int per_thread = kClusterPacks * Pack<S>::width;
  return with_form<S, true>(rows, aligned, [&](auto form) {
    const auto kernel = &rows_over_clusters<S, form.map, form.aligned>;
    for (const unsigned at_a_time : {2u, 1u}) {
      for (int blocks = 1; blocks <= (device.has_clusters ? kLargestCluster : 1); blocks *= 2) {
        const int stretch = ceiling(rows.classes, blocks);
        if (stretch > kClusterThreads * per_thread) continue;
        const int threads = threads_for(stretch, per_thread, kClusterThreads);
        const unsigned bytes = staged_bytes(rows, threads * per_thread, form.map);
        if (at_a_time * (bytes + kReservedShared) > static_cast<unsigned>(device.shared_memory)) continue;
        Shape shape{0, static_cast<unsigned>(threads), static_cast<unsigned>(blocks), bytes};
        const cudaError_t error = fill_device(kernel, rows.count, &shape);
        if (error == kNoSuchCluster) continue;
        return error == cudaSuccess ? launch(kernel, shape, stream, rows, results) : error;
      }
    }
    return kNoSuchCluster;
  });
}

template <class S>
cudaError_t launch_in_sweeps(const Rows<S>& rows, const Results<S>& results, bool aligned, const Device& device,
                             cudaStream_t stream) {
  constexpr int per_thread = kSweepPacks * Pack<S>::width;
  std::int64_t most_rows = INT32_MAX;  // at a time
  if (results.d_logits != nullptr) {   // so few rows at a time that the cache holds them until they are read again
    most_rows = most_at_a_time(device, static_cast<double>(rows.classes) * sizeof(S));
  }
  return with_form<S, false>(rows, aligned, [&](auto form) {
    const auto kernel = &rows_in_sweeps<S, form.map, form.aligned>;
    const int most = results.d_logits != nullptr ? sweep_threads(form.map, form.aligned) : kSweepThreadsToRead;
    Shape shape{1, static_cast<unsigned>(threads_for(rows.classes, per_thread, most)), 1, 0};
    if (const cudaError_t error = fill_device(kernel, rows.count, &shape, most_rows)) return error;
    return launch(kernel, shape, stream, rows, results);
  });
}

template <class S>
cudaError_t launch_rows(const Rows<S>& rows, const Results<S>& results, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const bool aligned = is_aligned(rows, results.d_logits, results.gradient_stride);
  Device device;
  if (const cudaError_t error = current_device(&device)) return error;
  if constexpr (!std::is_same_v<S, double>) {  // which is for tests
    constexpr int a_pack_each = kWarp * Pack<S>::width;
    if (rows.classes <= a_pack_each * kLanePacks) return launch_in_lanes<kLanePacks>(rows, results, aligned, stream);
    if (rows.classes <= a_pack_each * kWideLanePacks) {
      return launch_in_lanes<kWideLanePacks>(rows, results, aligned, stream);
    }
    // With class vectors losses alone go there too, since it reads these from shared memory.
    const bool has_class_vectors = rows.bias || rows.factor || (rows.spreads && rows.class_weight);
    const bool fits_indices = rows.count <= std::numeric_limits<int>::max();
    if (fits_indices && (results.d_logits != nullptr || has_class_vectors)) {
      const cudaError_t error = launch_over_clusters(rows, results, aligned, device, stream);
      if (error != kNoSuchCluster) return error;
    }
  }
  return launch_in_sweeps(rows, results, aligned, device, stream);
}

template <class S>
cudaError_t launch_in_planes(const Rows<S>& rows, const Results<S>& results, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  constexpr int packs = kPlaneBytes / sizeof(S);
  Device device;
  if (const cudaError_t error = current_device(&device)) return error;
  const int groups = lanes_for(rows.classes, packs, kPlaneGroups);
  const int threads = groups <= kPlaneGroups / 4 ? kPlaneThreads / 2 : kPlaneThreads, lanes = threads / groups;
  const PlaneGroups shape_of_block{groups, lanes, ceiling(rows.classes, groups * packs)};
  return with_form<S, true>(rows, is_aligned_in_planes(rows, results), [&](auto form) {
    const auto kernel = &rows_in_planes<S, form.map, form.aligned>;
    constexpr int width = plane_width<S>(form.aligned);
    Shape shape{1, static_cast<unsigned>(threads), 1, 0};
    shape.shared_memory =
        PlaneMemory<Accumulate<S>>{static_cast<unsigned>(groups), static_cast<unsigned>(lanes * width)}.bytes();
    std::int64_t most_tiles = INT32_MAX;                             // at a time
    if (results.d_logits != nullptr && shape_of_block.sweeps > 1) {  // as in launch_in_sweeps
      most_tiles = most_at_a_time(device, static_cast<double>(rows.classes) * sizeof(S) * lanes * width);
    }
    if (const auto error = fill_device(kernel, ceiling(rows.count, lanes * width), &shape, most_tiles)) return error;
    return launch(kernel, shape, stream, rows, results, shape_of_block);
  });
}

template <class S>
cudaError_t loss_rows_of(const LossArguments& a, std::int64_t count, cudaStream_t stream) {
  using T = Accumulate<S>;
  S* const d_logits = static_cast<S*>(a.d_logits);
  const Rows<S> rows = rows_of<S>(a.split, count);
  Results<S> results{};
  results.options = {rows.target != nullptr,
                     a.objective,
                     static_cast<T>(a.objective_parameters[1]),
                     static_cast<T>(a.split.label_smoothing),
                     rows.smoothing_per_class,
                     static_cast<T>(a.z_loss),
                     T(1)};
  results.first_parameter = static_cast<T>(a.objective_parameters[0]);
  results.class_parameter = static_cast<const T*>(a.class_parameter);
  results.sample_weight = static_cast<const T*>(a.sample_weight);
  results.upstream = static_cast<const T*>(a.upstream);
  results.upstream_step = a.upstream_step;
  results.normalizer = static_cast<const T*>(a.normalizer);
  results.divisor = static_cast<const T*>(a.divisor);
  results.losses = static_cast<T*>(a.losses);
  results.log_probs = static_cast<T*>(a.log_probs);
  results.d_logits = d_logits;
  results.gradient_stride = a.gradient_stride;
  results.gradient_class_stride = a.gradient_class_stride;
  return rows.pixels > 0 ? launch_in_planes(rows, results, stream) : launch_rows(rows, results, stream);
}

template <class S>
cudaError_t split_rows_of(const SplitArguments& a, const SplitVectors& out, std::int64_t count, cudaStream_t stream) {
  using T = Accumulate<S>;
  Results<S> results{};
  results.target = static_cast<T*>(out.target);
  results.rest = static_cast<T*>(out.rest);
  results.shift = static_cast<T*>(out.shift);
  results.weighted_logits = static_cast<T*>(out.weighted_logits);
  results.weight_sum = static_cast<T*>(out.weight_sum);
  return launch_rows(rows_of<S>(a, count), results, stream);
}

template <class S>
cudaError_t split_backward_rows_of(const SplitBackwardArguments& a, std::int64_t count, cudaStream_t stream) {
  using T = Accumulate<S>;
  constexpr int per_lane = kPiecePacks * Pack<S>::width;
  S* const d_logits = static_cast<S*>(a.d_logits);
  const Rows<S> rows = rows_of<S>(a.split, count);
  const SplitGradients<T> gradients{static_cast<const T*>(a.rest), static_cast<const T*>(a.shift),
                                    static_cast<const T*>(a.d_target), static_cast<const T*>(a.d_rest),
                                    static_cast<const T*>(a.d_weighted)};
  const int lanes = lanes_for(rows.classes, per_lane, kPieceThreads);
  const std::int64_t items = count * ceiling(rows.classes, lanes * per_lane);
  if (items == 0) return cudaSuccess;
  const bool aligned = is_aligned(rows, d_logits, a.gradient_stride);
  return with_form<S, false>(rows, aligned, [&](auto form) {
    const auto kernel = &rows_in_pieces<S, form.map, form.aligned>;
    Shape shape{1, kPieceThreads, 1, 0};
    if (const cudaError_t error = fill_device(kernel, ceiling(items, kPieceThreads / lanes), &shape)) return error;
    return launch(kernel, shape, stream, rows, gradients, d_logits, a.gradient_stride, lanes);
  });
}

// The functions of softmax_loss.h for one dtype of logits, each compiled in a file of its own.
#define IMBALANCE_CUDA_DTYPE(S)                                                                                  \
  template cudaError_t loss_rows_of<S>(const LossArguments&, std::int64_t, cudaStream_t);                        \
  template cudaError_t split_rows_of<S>(const SplitArguments&, const SplitVectors&, std::int64_t, cudaStream_t); \
  template cudaError_t split_backward_rows_of<S>(const SplitBackwardArguments&, std::int64_t, cudaStream_t);

}  // namespace imbalance::cuda
