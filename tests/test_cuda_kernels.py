"""The CUDA kernels run on the CPU under sanitizers, by tests/emulation/kernels.cu; and what is wrong with them shows.

Not among the mutants is what changes nothing: Columns.has and may_hold only save work, and so does the end of a class
vector in load_values, where it is aligned; an unaligned row without padding is staged by the threads that read it.
Shuffles, where the emulator's lanes wait for each other too, follow __syncwarp, so without it nothing shows.
"""

import re

import pytest
from emulation.mutants import BEYOND, CUDA, MISALIGNED, OVERFLOW, RACE, RESULT, Emulated, Mutant, check_found, run, span

INDEX = r"runtime error: index \d+ out of bounds for type"
NOT_STARTED = r"error: block \d of the cluster may not have started"
EXITED = r"error: block \d of the cluster has exited: thread \d+ of block \d in remote"
TOO_EARLY = f"{RESULT}|{EXITED}"
NOTHING = "(void)0"

LANES, CLUSTERS = "softmax_loss.cuh: rows_in_lanes", "softmax_loss.cuh: rows_over_clusters"
SWEEPS, PIECES = "softmax_loss.cuh: rows_in_sweeps", "softmax_loss.cuh: rows_in_pieces"
PLANES, LAUNCH_PLANES = "planes.cuh: rows_in_planes", "softmax_loss.cuh: launch_in_planes"
STORE_TARGET = {"if (owns_target) store_number(d_row + place.target, gradient.target);": ""}
MINE = "&of_blocks[rank]"
FINISH = "finish(results, place, {}, sums, common, rank == 0 && lane == 0)"
HIGHEST = "maximum(sums.highest, piece.highest())"
ALIGNED_PLANES = "planes.cuh: is_aligned_in_planes"
ALIGNED, SCALE = "softmax_loss.cuh: is_aligned", "softmax_loss.cu: cudaError_t scale"

MUTANTS = [
    # Barriers
    Mutant("lanes: no barrier", LANES, {"__syncthreads();": ""}, "lanes_4", RESULT),
    Mutant("clusters: no first barrier", CLUSTERS, {"cluster_sync();": ""}, "cluster_2", NOT_STARTED),
    Mutant("clusters: no first barrier, one block", CLUSTERS, {"cluster_sync();": ""}, "cluster_1_bias", RESULT),
    Mutant(
        "clusters: only blocks meet first",
        CLUSTERS,
        {"cluster_sync();": "__syncthreads();"},
        "cluster_2_bias",
        NOT_STARTED,
    ),
    Mutant("clusters: no barrier of warps", CLUSTERS, {"__syncthreads();#0": ""}, "cluster_1", RESULT),
    Mutant(
        "clusters: no barrier of blocks", CLUSTERS, {"cluster_sync(warp == 0)": NOTHING}, "cluster_2_bias", TOO_EARLY
    ),
    Mutant(
        "clusters: only threads of a block meet",
        CLUSTERS,
        {"cluster_sync(warp == 0)": "__syncthreads()"},
        "cluster_2_bias",
        TOO_EARLY,
    ),
    Mutant(
        "clusters: nobody publishes",
        CLUSTERS,
        {"cluster_sync(warp == 0)": "cluster_sync(false)"},
        "cluster_2_bias",
        RACE,
        "thread",
    ),
    Mutant(
        "clusters: another warp publishes",
        CLUSTERS,
        {"cluster_sync(warp == 0)": "cluster_sync(warp == 1)"},
        "cluster_2_bias",
        RACE,
        "thread",
    ),
    Mutant("clusters: no barrier of the gradient", CLUSTERS, {"__syncthreads();#1": ""}, "cluster_1", RESULT),
    Mutant("clusters: one buffer", CLUSTERS, {"parity ^= 1;": ""}, "cluster_2_bias", RESULT),
    Mutant("sweeps: no barrier of warps", SWEEPS, {"__syncthreads();#0": ""}, "sweeps_weights", RESULT),
    Mutant("sweeps: no barrier of the gradient", SWEEPS, {"__syncthreads();#1": ""}, "sweeps_weights", RESULT),
    Mutant("planes: no barrier of groups", PLANES, {"__syncthreads();#0": ""}, "planes_2_in_place", RESULT),
    Mutant("planes: no barrier of the gradients", PLANES, {"__syncthreads();#1": ""}, "planes_2_in_place", RESULT),
    Mutant("sum: no barrier", "softmax_loss.cu: sum_over_block", {"__syncthreads();": ""}, "sum_of_few", RESULT),
    # Who shares a row
    Mutant(
        "lanes: maximum over too many",
        LANES,
        {"max_over_lanes(tile.highest(), lanes)": "max_over_lanes(tile.highest(), kWarp)"},
        "lanes_2",
        RESULT,
    ),
    Mutant(
        "lanes: sums over too many",
        LANES,
        {"add_over_lanes<weighted>(tile.sums(highest), lanes)": "add_over_lanes<weighted>(tile.sums(highest), kWarp)"},
        "lanes_2",
        RESULT,
    ),
    Mutant(
        "lanes: some leave early",
        LANES,
        {"__syncwarp();": "if (place.row >= rows.count) continue; __syncwarp();"},
        "lanes_2",
        r"error: (lane \d+ of the mask has exited|deadlock)",
    ),
    Mutant(
        "a sum over the wrong lanes",
        "row_reduce.cuh: sum_over_lanes",
        {"distance#3": "distance / 2"},
        "lanes_16",
        RESULT,
    ),
    Mutant(
        "a maximum over half the lanes",
        "row_reduce.cuh: max_over_lanes",
        {"lanes / 2": "lanes / 4"},
        "lanes_16",
        RESULT,
    ),
    Mutant(
        "a lane outside its mask",
        "row_reduce.cuh: sum_over_lanes",
        {"kAllLanes": "0xffffu"},
        "lanes_2",
        r"error: a lane outside its mask 0xffff",
    ),
    Mutant(
        "clusters: a rank that is none",
        CLUSTERS,
        {"lane < blocks#0": "lane <= blocks"},
        "cluster_2_bias",
        r"error: no block 2 in a cluster of 2",
    ),
    Mutant(
        "clusters: to itself alone",
        CLUSTERS,
        {"static_cast<unsigned>(lane)": "static_cast<unsigned>(rank)"},
        "cluster_2_bias",
        RESULT,
    ),
    Mutant(
        "clusters: pulled, not pushed",
        CLUSTERS,
        {
            f"remote({MINE}, static_cast<unsigned>(lane))": MINE,
            "of_blocks[lane]": "*remote(&of_blocks[lane], static_cast<unsigned>(lane))",
        },
        "cluster_2_bias",
        EXITED,
    ),
    Mutant(
        "clusters: more blocks than there are",
        CLUSTERS,
        {"lane < blocks#1": "true"},
        "cluster_2_bias",
        RESULT + "|" + BEYOND,
    ),
    Mutant("clusters: more warps than there are", CLUSTERS, {"lane < warps": "true"}, "cluster_1", INDEX),
    Mutant("sweeps: more warps than there are", SWEEPS, {"lane < warps": "true"}, "sweeps_weights", INDEX),
    Mutant(
        "clusters: a stretch read twice", CLUSTERS, {"rank * stretch#0": "rank / 2 * stretch"}, "cluster_2_bias", RESULT
    ),
    Mutant("clusters: another stretch of the bias", CLUSTERS, {"rank * stretch#1": "0"}, "cluster_2_bias", RESULT),
    Mutant(
        "clusters: every block writes the loss",
        CLUSTERS,
        {"rank == 0 && lane == 0": "lane == 0"},
        "cluster_2_bias",
        RACE,
        "thread",
    ),
    Mutant(
        "clusters: rows left out",
        CLUSTERS,
        {"static_cast<int>(gridDim.x) / blocks": "static_cast<int>(gridDim.x)"},
        "cluster_2_bias",
        RESULT,
    ),
    Mutant(
        "sweeps: a piece left out",
        SWEEPS,
        {"(rows.classes + length - 1) / length": "rows.classes / length"},
        "sweeps",
        RESULT,
    ),
    Mutant("sweeps: pieces overlap", SWEEPS, {"index * length": "index * (length - 4)"}, "sweeps", RESULT),
    Mutant(
        "pieces: an item too many", PIECES, {"piece.row < rows.count": "piece.row <= rows.count"}, "pieces_1", BEYOND
    ),
    Mutant("pieces: another piece", PIECES, {"piece.index * length": "0 * length"}, "pieces_256", RESULT),
    Mutant("pieces: the target is read by all", PIECES, {"owns_target#1": "true"}, "pieces_8", RACE, "thread"),
    Mutant(
        "sum: every thread writes it",
        "softmax_loss.cu: sum_stretches",
        {"if (threadIdx.x != 0) return;": ""},
        "sum_of_few",
        RACE,
        "thread",
    ),
    Mutant(
        "pieces: none after the last of a row",
        "rows.cuh: Piece<Index> after",
        {"next.index < of_a_row_": "true"},
        "pieces_256",
        f"{RESULT}|{BEYOND}|{OVERFLOW}",
    ),
    Mutant(
        "rounds: more than the cache holds",
        "launches.cuh: fill_device",
        {"std::min<std::int64_t>(resident, most)": "resident"},
        "rounds_of_the_cache",
        r"wrong: 3 blocks",
    ),
    Mutant(
        "rounds: some clusters work on fewer rows",
        "launches.cuh: fill_device",
        {"ceiling(work, rounds)": "std::min<std::int64_t>(work, resident)"},
        "rounds_of_some",
        r"wrong: 3 blocks",
    ),
    Mutant(
        "planes: another group's classes",
        PLANES,
        {"thread / shape.lanes": "0"},
        "planes_2_in_place",
        RESULT,
    ),
    Mutant("planes: only one group counts", PLANES, {"j < groups#1": "j < 1"}, "planes_2_in_place", RESULT),
    Mutant("planes: a group too many", PLANES, {"j < groups#0": "j <= groups"}, "planes_2_in_place", BEYOND),
    Mutant(
        "planes: sums of different shifts",
        PLANES,
        {"sums_of_groups[j * pixels + i].raised(joined.highest)": "sums_of_groups[j * pixels + i]"},
        "planes_2_in_place",
        RESULT,
    ),
    Mutant(
        "planes: classes left out",
        LAUNCH_PLANES,
        {"ceiling(rows.classes, groups * packs)": "1"},
        "planes_sweeps",
        RESULT,
    ),
    Mutant("planes: some sweeps read nothing", PLANES, {"i > 0": "false"}, "planes_sweeps", RESULT),
    Mutant("planes: the gradient's sweeps read nothing", PLANES, {"i < sweeps - 1": "false"}, "planes_sweeps", RESULT),
    Mutant(
        "planes: a sweep's sums are relative to another shift",
        "planes.cuh: void raise",
        {"sums[k].raised(maximum(sums[k].highest, highest[k]))": "sums[k]"},
        "planes_sweeps",
        RESULT,
    ),
    Mutant(
        "planes: pixels that are none end", PLANES, {"first + i < rows.count": "true"}, "planes_1", f"{RESULT}|{BEYOND}"
    ),
    Mutant("planes: pixels that are none", PLANES, {"row < rows.count": "true"}, "planes_1", BEYOND),
    Mutant(
        "planes: more tiles than the cache holds",
        LAUNCH_PLANES,
        {"shape_of_block.sweeps > 1": "false"},
        "rounds_of_planes",
        r"wrong: 2 blocks",
    ),
    # The row that comes
    Mutant(
        "lanes: this row comes again", LANES, {"coming.load(next);": "coming.load(place);"}, "lanes_many_rows", RESULT
    ),
    Mutant("lanes: no row comes", LANES, {"tile.take(coming);": ""}, "lanes_many_rows", RESULT),
    Mutant(
        "lanes: another row's class probabilities",
        "rows.cuh: void take",
        {"row_ = other.row_;": ""},
        "lanes_32",
        RESULT,
    ),
    Mutant(
        "clusters: this row comes again",
        CLUSTERS,
        {"tile.load(next)#1": "tile.load(place)"},
        "cluster_2_losses",
        RESULT,
    ),
    Mutant(
        "clusters: no row comes after one that is ignored",
        CLUSTERS,
        {"tile.load(next);#0": ""},
        "cluster_2_losses",
        RESULT,
    ),
    Mutant(
        "clusters: the first row does not come",
        CLUSTERS,
        {"if (ahead) tile.load(place);": ""},
        "cluster_2_losses",
        RESULT,
    ),
    # The target
    Mutant(
        "the target stays in the rest",
        "rows.cuh: bool exclude",
        {"packs_[i].set(k, mask_number<S>());": ""},
        "lanes_4",
        RESULT,
    ),
    Mutant(
        "the target is looked for in one column of a pack",
        "vector.cuh: may_hold",
        {"width * step": "step"},
        "lanes_4",
        RESULT,
    ),
    Mutant(
        "lanes: no gradient of the target",
        LANES,
        {"if (d_row && owns_target) store_number(d_row + place.target, gradient.target);": ""},
        "lanes_4",
        RESULT,
    ),
    Mutant("clusters: no gradient of the target", CLUSTERS, STORE_TARGET, "cluster_1", RESULT),
    Mutant("sweeps: no gradient of the target", SWEEPS, STORE_TARGET, "sweeps", RESULT),
    Mutant("pieces: no gradient of the target", PIECES, STORE_TARGET, "pieces_8", RESULT),
    Mutant(
        "planes: the target stays in the rest",
        "planes.cuh: void exclude",
        {"packs_[i].set(k, mask_number<S>())#1": NOTHING},
        "planes_2_in_place",
        RESULT,
    ),
    Mutant(
        "planes: pixels that do not count are worked on",
        "planes.cuh: void exclude",
        {"!places[k].is_read": "false"},
        "planes_2_in_place",
        RESULT,
    ),
    Mutant("planes: no logit of the target", PLANES, {"places[k].target < 0": "true"}, "planes_2_in_place", RESULT),
    Mutant(
        "planes: every group reads the target",
        PLANES,
        {"group != 0": "false"},
        "planes_2_in_place",
        RACE,
        "thread",
    ),
    Mutant(
        "planes: no gradient of the target",
        "planes.cuh: void spread",
        {"class_of(i) == places[k].target": "false"},
        "planes_2_in_place",
        RESULT,
    ),
    Mutant(
        "clusters: the target is read when it may be overwritten",
        CLUSTERS,
        {
            "if (warp == 0) target = load_target(rows, results, place);": "",
            FINISH.format("target"): FINISH.format("load_target(rows, results, place)"),
        },
        "cluster_2_bias",
        RESULT,
    ),
    Mutant("a target that is none", "rows.cuh: place_of", {"label < rows.classes": "true"}, "lanes_2", RESULT),
    Mutant("a row that is none", "rows.cuh: place_of", {"row >= rows.count": "false"}, "lanes_32", BEYOND),
    Mutant(
        "a weight of a class that is none",
        "softmax_loss.cu: sum_weights",
        {"labels[i] >= classes": "false"},
        "weight_sums_of_classes",
        r"AddressSanitizer",
    ),
    # Beyond the ends
    Mutant(
        "packs: read beyond",
        "vector.cuh: load_pack",
        {"column < columns.end": "column <= columns.end"},
        "lanes_32",
        BEYOND,
    ),
    Mutant(
        "packs: read beyond, unaligned",
        "vector.cuh: load_pack",
        {"column < apart.end": "column <= apart.end"},
        "lanes_2",
        BEYOND,
    ),
    Mutant(
        "packs: written beyond",
        "vector.cuh: store_pack",
        {"column < columns.end": "column <= columns.end"},
        "scale_8",
        BEYOND,
    ),
    Mutant(
        "packs: written beyond, unaligned",
        "vector.cuh: store_pack",
        {"column < apart.end": "column <= apart.end"},
        "scale_odd",
        BEYOND,
    ),
    Mutant(
        "vectors: read beyond, unaligned",
        "vector.cuh: load_values",
        {"column < apart.end": "column <= apart.end"},
        "pieces_unaligned_weights",
        BEYOND,
    ),
    Mutant(
        "planes: a class that is none",
        "planes.cuh: bool has",
        {"class_of(i) < rows_.classes": "true"},
        "planes_2_in_place",
        f"{BEYOND}|{RESULT}",
    ),
    Mutant(
        "planes: the launch asks for too little",
        "planes.cuh: unsigned bytes",
        {"sizeof(T)": "0"},
        "planes_2_in_place",
        r"error: bytes \d+ to \d+ of the \d+ that the launch asked for",
    ),
    Mutant("staged: read beyond", "rows.cuh: stage", {"column < rows.classes": "true"}, "lanes_2", BEYOND),
    Mutant("staged: no padding", LANES, {"lanes * packs * Pack<S>::width": "rows.classes"}, "lanes_2", BEYOND),
    Mutant(
        "staged: one too few",
        "rows.cuh: stage",
        {"static_cast<unsigned>(stretch)#0": "static_cast<unsigned>(stretch - 1)"},
        "lanes_4",
        BEYOND,
    ),
    Mutant(
        "staged: one over the other",
        "rows.cuh: stage",
        {"offset += static_cast<unsigned>(stretch) * sizeof(T);": ""},
        "lanes_16",
        RESULT,
    ),
    Mutant(
        "staged: as far as the row is",
        "vector.cuh: void load",
        {"apart.template of<width>(pack, k) - apart.first": "apart.template of<width>(pack, k)"},
        "cluster_8_odd",
        BEYOND,
    ),
    Mutant(
        "staged: the launch asks for too little",
        "rows.cuh: staged_bytes",
        {"static_cast<unsigned>(stretch)": "static_cast<unsigned>(stretch - 1)"},
        "lanes_4",
        r"error: bytes \d+ to \d+ of the \d+ that the launch asked for",
    ),
    Mutant(
        "sum: beyond",
        "softmax_loss.cu: sum_stretches",
        {"min(first + kStretch, n)": "first + kStretch"},
        "sum_of_few",
        BEYOND,
    ),
    Mutant(
        "weight sums: beyond",
        "softmax_loss.cu: sum_weights",
        {"min(first + kStretch, rows)": "first + kStretch"},
        "weight_sums_count",
        BEYOND,
    ),
    # What is no vector
    *(
        Mutant(f"unaligned {name}", ALIGNED, {text: "true"}, case, found)
        for name, text, case, found in [
            ("width", "rows.classes % width == 0", "lanes_8", BEYOND),
            ("rows", "rows.stride % width == 0", "lanes_strided", MISALIGNED),
            ("rows of the gradient", "gradient_stride % width == 0", "lanes_gradient_strided", MISALIGNED),
            ("logits", "at_packs(rows.logits)", "lanes_offset", MISALIGNED),
            ("gradient", "at_packs(d_logits)", "lanes_gradient_offset", MISALIGNED),
            ("probabilities", "at_packs(rows.probabilities)", "lanes_8_unaligned_probabilities", MISALIGNED),
            ("wide probabilities", "at_packs(rows.probabilities_wide)", "lanes_8_unaligned_wide", MISALIGNED),
            ("factor", "at_packs(rows.factor)", "pieces_circle", MISALIGNED),
            ("bias", "at_packs(rows.bias)", "sweeps_unaligned_bias", MISALIGNED),
            ("class weights", "at_packs(rows.class_weight)", "pieces_unaligned_weights", MISALIGNED),
        ]
    ),
    *(
        Mutant(f"planes: unaligned {name}", ALIGNED_PLANES, {text: "true"}, case, found)
        for name, text, case, found in [
            ("width", "rows.pixels % width == 0", "planes_narrow", MISALIGNED),
            ("images", "rows.stride % width == 0", "planes_images_apart", MISALIGNED),
            ("classes", "rows.class_stride % width == 0", "planes_strided", MISALIGNED),
            ("images of the gradient", "results.gradient_stride % width == 0", "planes_gradient_apart", MISALIGNED),
            ("gradient's classes", "results.gradient_class_stride % width == 0", "planes_gradient_strided", MISALIGNED),
            ("logits", "at_packs(rows.logits)", "planes_offset", MISALIGNED),
            ("gradient", "at_packs(results.d_logits)", "planes_gradient_offset", MISALIGNED),
            ("probabilities", "at_packs(rows.probabilities)", "planes_unaligned_probabilities", MISALIGNED),
            ("wide probabilities", "at_packs(rows.probabilities_wide)", "planes_unaligned_wide", MISALIGNED),
        ]
    ),
    Mutant(
        "scale: unaligned gradient",
        SCALE,
        {"reinterpret_cast<std::uintptr_t>(gradient) % 16 == 0": "true"},
        "scale_offset",
        MISALIGNED,
    ),
    Mutant("scale: unaligned rows", SCALE, {"stride % Pack<S>::width == 0": "true"}, "scale_strided", MISALIGNED),
    Mutant("scale: unaligned width", SCALE, {"classes % Pack<S>::width == 0": "true"}, "scale_narrow", BEYOND),
    # Offsets of 32 bits
    *(
        Mutant(
            f"{place}: 32 bits",
            place,
            {text: re.sub(r"(.+) \* (.+)", r"static_cast<int>(\1) * static_cast<int>(\2)", text)},
            case,
            f"{OVERFLOW}|{RESULT}" if "image" in text else OVERFLOW,  # whose stride may be cut to a small one
        )
        for place, text, case in [
            ("rows.cuh: load_target", "place.row * rows.stride", "lanes_far"),
            ("rows.cuh: void load", "place.row * rows_.stride", "lanes_far"),
            (LANES, "place.row * results.gradient_stride", "lanes_far"),
            (CLUSTERS, "row * results.gradient_stride", "cluster_1_far"),
            (SWEEPS, "row * results.gradient_stride", "sweeps_far"),
            (PIECES, "place.row * gradient_stride", "pieces_far"),
            ("softmax_loss.cu: scale_rows", "piece.row * stride", "scale_far"),
            ("planes.cuh: PlaneTile", "image * rows.stride", "planes_far"),
            ("planes.cuh: T logit", "of_class * rows_.class_stride", "planes_far"),
            ("planes.cuh: void load", "first * rows_.class_stride", "planes_far_sweeps"),
            ("planes.cuh: void load", "step_ * rows_.class_stride", "planes_far"),
            ("planes.cuh: void spread", "first_ * class_stride", "planes_far_sweeps"),
            ("planes.cuh: void spread", "step_ * class_stride", "planes_far"),
            (PLANES, "image * results.gradient_stride", "planes_far"),
        ]
    ),
    # Sums
    Mutant(
        "exponentials: sums are not corrected",
        "rows.cuh: RowSums<T> sums",
        {"sums.total *= exponential.correction;": ""},
        "lanes_high",
        RESULT,
    ),
    Mutant(
        "exponentials: the gradient is not corrected",
        "rows.cuh: void spread",
        {"gradient.rest * exponential.correction": "gradient.rest"},
        "lanes_high",
        RESULT,
    ),
    Mutant("exponentials: too high", "row_reduce.cuh: base", {"fabsf(shift) < 0x1p30f": "true"}, "lanes_high", RESULT),
    Mutant(
        "joined: totals of different shifts", "row_reduce.cuh: raised", {"total * factor": "total"}, "sweeps", RESULT
    ),
    Mutant(
        "joined: logits of different shifts",
        "row_reduce.cuh: raised",
        {"(shift_of(highest) - shift) * weight_sum": "T(0)"},
        "sweeps_weights",
        RESULT,
    ),
    Mutant(
        "joined: lanes not raised",
        "row_reduce.cuh: join_lanes",
        {"of_lane.raised(max_over_lanes(of_lane.highest, lanes))": "of_lane"},
        "sweeps_weights",
        RESULT,
    ),
    Mutant(
        "sweeps: pieces not raised",
        SWEEPS,
        {f"sums = sums.raised({HIGHEST});": f"sums.highest = {HIGHEST};"},
        "sweeps",
        RESULT,
    ),
    Mutant(
        "everything masked: the shift is infinite",
        "row_reduce.cuh: shift_of",
        {"highest == -infinity<T>()": "false"},
        "lanes_1_one_class",
        RESULT,
    ),
]


def test_every_barrier_has_its_mutant():
    for path in (CUDA / name for name in ("softmax_loss.cu", "softmax_loss.cuh", "planes.cuh")):
        text = path.read_text()
        barriers = {match.start() for match in re.finditer(r"__syncthreads\(\)|cluster_sync\(", text)}
        begins = set()
        for mutant in MUTANTS:
            file, _, function = mutant.place.partition(": ")
            if file == path.name:
                begins |= {span(text, function, wanted)[0] for wanted in mutant.edits}
        assert barriers <= begins


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(tmp_path_factory, "kernels", "softmax_loss")


def test_every_kernel_in_every_order(emulated):
    code, output = run(emulated.right(), orders=3, cases=[])
    assert (code, re.sub(r"\d+", "N", output)) == (0, "N cases are right\n"), output


# Few and small, for ThreadSanitizer: every kernel, every barrier, in place.
RACES = [
    *("lanes_2", "lanes_4", "lanes_16", "cluster_1", "cluster_1_odd", "cluster_2_bias", "sweeps_weights"),
    *("sweeps_in_place", "pieces_8", "scale_8", "sum_of_few", "weight_sums_of_samples"),
    *("planes_2_in_place", "planes_8_margin", "planes_sweeps_odd"),
]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_without_a_mutant_all_is_right(emulated, sanitizer):
    cases = sorted({mutant.case for mutant in MUTANTS}) if sanitizer == "address" else RACES
    program = emulated.mutated(MUTANTS, sanitizer)
    code, output = run(program, orders=2 if sanitizer == "address" else 0, cases=cases, MUTANT="0")
    assert (code, output) == (0, f"{len(cases)} cases are right\n")


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=[mutant.name for mutant in MUTANTS])
def test_mutants_are_found(emulated, number):
    check_found(emulated, MUTANTS, number)
