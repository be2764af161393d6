"""The CUDA kernels of sigmoid_loss run on the CPU under sanitizers, by tests/emulation/sigmoid_kernels.cu; and mutants.

As test_cuda_kernels.py. Not among the mutants is what only saves work: the vote about positives, or that a pack of
nothing but ignored numbers is not computed.
"""

import re

import pytest
from emulation.mutants import BEYOND, MISALIGNED, OVERFLOW, RACE, RESULT, Emulated, Mutant, check_found, run

WRONG = RESULT + r"|^\w+: wrong: gradient \d+ is not 0"
FILE = "sigmoid_loss.cuh"
LABELS, PACKS, APART = (f"{FILE}: {kernel}" for kernel in ("logits_of_labels", "logits_in_packs", "logits_apart"))
PLAN = f"{FILE}: plan_of"

MUTANTS = [
    # Sums
    Mutant("no barrier", "block_sum.cuh: sum_over_block", {"__syncthreads();": ""}, "labels", WRONG),
    Mutant(
        "warps that are none", "block_sum.cuh: sum_over_block", {"lane < warps": "true"}, "labels", r"index \d+ out"
    ),
    Mutant("every thread writes the sum", f"{FILE}: write_sum", {"threadIdx.x == 0": "true"}, "labels", RACE, "thread"),
    Mutant("a sum of all", f"{FILE}: write_sum", {"sum * a.share": "sum"}, "packs_dense", WRONG),
    Mutant(
        "every thread writes the count",
        "sigmoid_loss.cu: count_labels",
        {"threadIdx.x == 0": "true"},
        "counts_of_few",
        RACE,
        "thread",
    ),
    Mutant(
        "counted beyond",
        "sigmoid_loss.cu: count_labels",
        {"min(first + kStretch, rows)": "first + kStretch"},
        "counts_of_few",
        BEYOND,
    ),
    Mutant(
        "counts of labels that are none",
        "sigmoid_loss.cu: count_labels",
        {"label <= classes": "true"},
        "counts_of_few",
        WRONG,
    ),
    # Which logits
    Mutant(
        "a quotient one less",
        f"{FILE}: operator()",
        {"remainder >= by_": "false"},
        "apart_vectors",
        f"{WRONG}|{BEYOND}",
    ),
    Mutant("labels: a pack too many", LABELS, {"i * step < left#0": "i * step <= left"}, "labels", BEYOND),
    Mutant("labels: a pack is written too many", LABELS, {"i * step < left_again": "true"}, "labels", BEYOND),
    Mutant("labels: another row", LABELS, {"++row;": ""}, "labels", WRONG),
    Mutant(
        "labels: the first packs again",
        LABELS,
        {"logits += kLogitPacks * step;": ""},
        "labels_blocks",
        WRONG,
    ),
    Mutant("packs: the same again", f"{FILE}: void drop", {"at += some * step_at;#0": ""}, "images_classes", WRONG),
    Mutant("packs: beyond", PACKS, {"i < stretch.packs": "i <= stretch.packs"}, "images", BEYOND),
    Mutant("packs: a class too many", f"{FILE}: stretch_of", {"a.classes - c": "kClassesOfAShare"}, "images", BEYOND),
    Mutant("packs: pixels beyond", f"{FILE}: stretch_of", {"unit < a.units": "true"}, "images", BEYOND),
    Mutant("apart: beyond", f"{FILE}: logits_apart", {"place < a.count": "place <= a.count"}, "apart_lists", BEYOND),
    Mutant("apart: the first instead of the last", APART, {"a.first": "0"}, "labels_last", WRONG),
    Mutant(
        "apart: another class", APART, {"column >= length": "column > length"}, "apart_vectors", WRONG + "|" + BEYOND
    ),
    # Labels
    Mutant(
        "labels: a label that is ignored", LABELS, {"label != a.ignored_label": "true"}, "labels_ignored_class", WRONG
    ),
    Mutant("labels: a label that is none", LABELS, {"label <= classes": "true"}, "labels", WRONG),
    Mutant("labels: half a label", LABELS, {"labels_of_packs[i] >> 32 == 0": "true"}, "labels", WRONG),
    Mutant("labels: one row a pack", LABELS, {"of_row >= width": "true"}, "labels_odd", WRONG),
    Mutant("labels: no positive", LABELS, {"bits.positive != 0": "false"}, "labels", WRONG),
    Mutant(
        "labels: the row after",
        f"{FILE}: bits_of_rows",
        {"min(a.classes - column, width - at)": "width - at"},
        "labels_odd",
        WRONG,
    ),
    Mutant(
        "a label that is ignored", f"{FILE}: mark_row", {"label == a.ignore_index": "false"}, "packs_vectors", WRONG
    ),
    Mutant("a label that is none", f"{FILE}: mark_row", {"label > a.classes": "false"}, "packs_vectors", WRONG),
    Mutant("a listed label that is none", f"{FILE}: mark_list", {"label >= a.classes": "false"}, "packs_lists", WRONG),
    Mutant("a pixel's label that is none", f"{FILE}: pixels_of", {"label <= a.classes": "true"}, "images", WRONG),
    Mutant("a pixel that is ignored", f"{FILE}: pixels_of", {"ignored ? 1u : 0u": "0u"}, "images", WRONG),
    Mutant(
        "a boolean of another byte", f"{FILE}: bits_of_booleans", {"four >> 7": "four >> 8"}, "packs_booleans", WRONG
    ),
    # What stands beside
    Mutant(
        "soft labels as hard ones",
        f"{FILE}: general_costs",
        {"beside.y[k] != T(0) && beside.y[k] != T(1)": "false"},
        "packs_dense",
        WRONG,
    ),
    Mutant(
        "what weighs nothing is looked at",
        f"{FILE}: general_costs",
        {"weight[k] == T(0)": "false"},
        "packs_weights",
        WRONG,
    ),
    Mutant("apart: what weighs nothing is looked at", APART, {"weight == T(0)": "false"}, "apart_row_weights", WRONG),
    Mutant("no upstream gradient", f"{FILE}: settle", {"slopes[k] *= upstream[k];": ""}, "labels_upstream", WRONG),
    Mutant(
        "upstream gradients are more",
        f"{FILE}: logits_of",
        {"call.upstream != nullptr": "false"},
        "labels_upstream",
        WRONG,
    ),
    Mutant("nothing counts", LABELS, {"if (nothing) bits.off = all_bits(width);": ""}, "labels_nothing", WRONG),
    # What is no vector
    *(
        Mutant(f"unaligned {name}", PLAN, {text: "true"}, case, found)
        for name, text, case, found in [
            ("logits", "at_packs(call.logits)", "apart_offset_alone", MISALIGNED),
            ("gradient", "at_packs(call.d_logits)", "apart_gradient_offset", MISALIGNED),
            ("pixels", "call.pixels % width == 0", "apart_images", f"{WRONG}|{MISALIGNED}|{BEYOND}"),
            ("rows", "call.classes % width == 0", "apart_vectors", f"{WRONG}|{MISALIGNED}|{BEYOND}"),
        ]
    ),
    Mutant(
        "rows that are apart",
        PLAN,
        {"call.image_stride == call.classes": "true", "call.gradient_image_stride == call.classes": "true"},
        "apart_strided",
        f"{WRONG}|{BEYOND}",
    ),
    Mutant(
        "unaligned vectors",
        PLAN,
        {
            f"at_packs(call.{vector})": "true"
            for vector in ("positive_weight", "negative_weight", "bias", "class_parameter")
        },
        "apart_unaligned_vectors",
        MISALIGNED,
    ),
    Mutant("lists of pixels", PLAN, {"!call.lists": "true"}, "apart_images_lists", WRONG),
    # Offsets of 32 bits
    *(
        Mutant(
            f"apart: 32 bits of {text}",
            APART,
            {text: f"static_cast<int>(line) * static_cast<int>({text.partition(' * ')[2]})"},
            "apart_far",
            OVERFLOW,
        )
        for text in ("line * a.image_stride", "line * a.gradient_image_stride")
    ),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return Emulated(tmp_path_factory, "sigmoid_kernels", "sigmoid_loss")


def test_every_kernel_in_every_order(emulated):
    code, output = run(emulated.right(), orders=2, cases=[])
    assert (code, re.sub(r"\d+", "N", output)) == (0, "N cases are right\n"), output


# In place, and with sums: every kernel, for ThreadSanitizer.
RACES = ["counts_of_few", "labels_in_place", "labels_odd", "packs_vectors", "images_classes", "apart_vectors"]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_without_a_mutant_all_is_right(emulated, sanitizer):
    cases = sorted({mutant.case for mutant in MUTANTS}) if sanitizer == "address" else RACES
    program = emulated.mutated(MUTANTS, sanitizer)
    code, output = run(program, orders=2 if sanitizer == "address" else 0, cases=cases, MUTANT="0")
    assert (code, output) == (0, f"{len(cases)} cases are right\n")


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=[mutant.name for mutant in MUTANTS])
def test_mutants_are_found(emulated, number):
    check_found(emulated, MUTANTS, number)
