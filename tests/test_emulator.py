"""The emulator of CUDA kernels finds what it is there to find, and has what kernels use: tests/emulation/."""

import os
import re
import subprocess
import sys

import pytest
from emulation import build

# The faults of tests/emulation/hazards.cu -> how each is found: in the output of the program that the address and
# undefined-behaviour sanitizers watch, and of that which the thread sanitizer does; None: there it is not.
RESULT = r"^result: not that"
RACE = r"WARNING: ThreadSanitizer: data race"
FOUND = {
    "missing_barrier": (RESULT, RACE),
    "overwritten_total": (RESULT, RACE),
    "double_buffer": (RESULT, RACE),
    "missing_syncwarp": (RESULT, RACE),
    "lost_update": (None, RACE),  # nobody comes between a thread's load and its store
    "blocks_race": (None, RACE),
    "cluster_race": (RESULT, RACE),
    "remote_after_exit": (
        r"^error: block \d of the cluster has exited: thread \d+ of block \d in remote at .*:\d+$",
        RACE,
    ),
    "remote_address_after_exit": (r"AddressSanitizer: heap-use-after-free", r"ThreadSanitizer: heap-use-after-free"),
    "remote_before_start": (r"^error: block \d of the cluster may not have started", None),
    "remote_rank": (r"^error: no block 4 in a cluster of 4: thread \d+ of block [37] in remote", None),
    "warp_skips_barrier": (
        r"^error: deadlock, 32 threads have exited: thread 0 of block 0 in __syncthreads at .*:\d+$",
        None,
    ),
    "half_warp_skips_barrier": (r"^error: divergent barrier: thread .* in __syncthreads at .*; met by: thread", None),
    "barrier_at_two_sites": (r"^error: divergent barrier: thread .* in __syncthreads at .*; met by: thread", None),
    "early_return": (r"^error: deadlock, 1 threads have exited: thread 0 of block 0 in __syncthreads", None),
    "half_warp_shuffles": (
        r"^error: deadlock, 0 .* in __shfl_xor_sync at .*; thread 16 of block 0 in __syncthreads",
        None,
    ),
    "shuffle_at_two_sites": (r"^error: divergent warp: thread .* in __shfl_xor_sync", None),
    "exited_lane": (r"^error: lane 3 of the mask has exited", None),
    "lane_outside_mask": (r"^error: a lane outside its mask 0xffff", None),
    "beyond_array": (r"runtime error: index 128 out of bounds for type 'int \[128\]'", None),
    "beyond_array_by_pointer": (r"AddressSanitizer: heap-buffer-overflow[^$]*this was thread 127 of block 0", None),
    "beyond_dynamic": (r"AddressSanitizer: heap-buffer-overflow[^$]*this was thread 127 of block 0", None),
    "dynamic_outside_launch": (
        r"^error: bytes 512 to 1028 of the 1024 that the launch asked for: .* dynamic_smem",
        None,
    ),
    "dynamic_overlap": (r"^error: bytes 508 to 1020 overlap those from 0 to 512: .* in dynamic_smem", None),
    "dynamic_offset": (r"^error: offset 4 is not aligned: .* in dynamic_smem", None),
    "beyond_global": (r"AddressSanitizer: heap-buffer-overflow[^$]*this was thread 127 of block 1", None),
    "misaligned_vector": (r"runtime error: store to misaligned address", None),
    "misaligned_load": (r"^error: address 0x\w+ is not aligned to 16 bytes: .* in load_streaming at .*:\d+$", None),
    "misaligned_store": (r"^error: address 0x\w+ is not aligned to 16 bytes: .* in store_streaming at .*:\d+$", None),
    "misaligned_array": (r"runtime error: store to misaligned address", None),
    "uninitialised": (RESULT, None),
    "deep": (r"AddressSanitizer: stack-overflow", None),
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Compile hazards.cu for a sanitizer."""
    build.require()
    folder = build.session_folder(tmp_path_factory)

    def program(sanitizer):
        flags = [*build.SANITIZERS[sanitizer], "-Werror"]
        return build.compile_once([build.EMULATION / "hazards.cu"], folder / f"hazards_{sanitizer}", flags)

    return program


def output(*command):
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, env=environment)
    return done.stdout + done.stderr


def test_every_hazard_is_in_the_table(programs):
    assert output(programs("address")).split() == list(FOUND)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("hazard", FOUND)
def test_right_versions_pass_in_every_order(programs, hazard, sanitizer):
    assert output(programs(sanitizer), hazard, "right").split("\n") == ["ok"] * 8 + [""]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("hazard", FOUND)
def test_wrong_versions_are_reported(programs, hazard, sanitizer):
    pattern = FOUND[hazard][sanitizer == "thread"]
    if pattern:
        assert re.search(pattern, output(programs(sanitizer), hazard, "wrong"), re.MULTILINE)


@pytest.mark.parametrize("hazard", [hazard for hazard, (address, _) in FOUND.items() if address == RESULT])
def test_forward_and_reverse_order_are_enough_for_what_changes_the_result(programs, hazard):
    assert RESULT[1:] in "".join(output(programs("address"), hazard, "wrong").splitlines(keepends=True)[:2])


# Launches from one thread of the operating system after another, and from the first again.
CALLS = """
import ctypes, sys, threading
library = ctypes.CDLL(sys.argv[1])
def call(name):
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    print(function() or b"right")
call("run_features")
threads = [threading.Thread(target=call, args=("run_features",)) for _ in range(2)]
for thread in threads:
    thread.start()
    thread.join()
call("run_largest")
"""


def test_kernels_in_a_library_that_python_loads(tmp_path_factory):
    build.require()
    flags = [*build.SANITIZERS["address"], *build.LIBRARY, "-Werror"]
    library = build.session_folder(tmp_path_factory) / "features.so"
    build.compile_once([build.EMULATION / "features.cu"], library, flags)
    command = [sys.executable, "-c", CALLS, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env=build.address_environment(), timeout=60)
    assert (done.stdout, done.stderr) == ("b'right'\n" * 4, "")
