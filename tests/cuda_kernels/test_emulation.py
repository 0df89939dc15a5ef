"""The emulation of CUDA can fail: mistakes in small kernels and in the real ones are each caught.

And what it shows of the real kernels depends on no schedule: threads forward, backward, at random.
"""

import functools
import re
import subprocess
from typing import Any

import pytest
import torch
from cuda_kernels.emulation import build
from lib.backends import BACKENDS, BETAS
from lib.compare import check
from lib.logits import pair, some_labels

SCHEDULES = ("0", "1", "2", "3", "4")  # forward, reverse, and seeds of random ones
CLUSTERS, TICKETS = LAYOUTS = "0", "1"


def output(program, *arguments: str) -> str:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)
    return result.stdout if result.returncode == 0 else f"ended by {result.returncode}"


@functools.cache
def rows(layout: str, schedule: str, *how: Any) -> str:
    """What driver.cpp prints: a line for each case, with a hash of all bits that came out."""
    return output(build.program("driver", *how), schedule, layout, "16", "few")


def test_every_schedule_and_layout_gives_the_same_bits():
    expected = rows(CLUSTERS, "0")
    assert expected.count("soft") == 6
    for layout in LAYOUTS:
        for schedule in SCHEDULES:
            assert rows(layout, schedule) == expected
    # Places for the CTAs of one row only: each row has to leave before the next can begin.
    assert output(build.program("driver"), "1", TICKETS, "3", "few") == expected


def test_every_kind_of_row_in_every_layout():
    """Dtypes, divergences, terms, pruning, edges, alignments: the same bits; for the sanitizers."""
    said = [output(build.program("driver"), "2", layout, "16", "all") for layout in LAYOUTS]
    assert said[0].count("soft") == len(said[0].splitlines()) == 140, said[0]
    assert len(set(said)) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=["clusters", "tickets"])
def test_large_vocabularies_laid_out_as_the_wheel_has_them(layout):
    """Its own vectors of a thread, warps of a CTA and CTAs of a row: the same bits twice."""
    schedules = ("0", "2")
    said = [output(build.program("driver"), x, layout, "64", "large") for x in schedules]
    plans = [line for line in said[0].splitlines() if line.startswith("V ")]
    assert plans == {
        CLUSTERS: ["V 50257: clusters of 7 CTAs of 256 threads",
                   "V 128256: clusters of 16 CTAs of 256 threads"],
        TICKETS: ["V 50257: tickets of 9 CTAs of 256 threads",
                  "V 128256: tickets of 21 CTAs of 256 threads"],
    }[layout], said[0]  # fmt: skip
    assert said[0].count("soft") == 8, said[0]
    assert len(set(said)) == 1


@pytest.mark.parametrize("V", [50257, 128256])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.emulated], ids=str)
def test_large_vocabularies_against_the_definition(backend, V):
    build.load()
    student, teacher = pair(1, V, dtype=torch.bfloat16)
    labels = some_labels(1, V)
    for beta in BETAS:
        check(backend, student, teacher, labels, beta=beta, alpha=0.5, temperature=2.0)
    check(backend, student, teacher, top_k=V // 8)


FAULTS = {
    "a barrier is missing: warp 0 adds up sums that are not there yet": (
        CLUSTERS,
        "row.h",
        "shared.warps[warp()] = warp_sums;\n    __syncthreads();",
        "shared.warps[warp()] = warp_sums;",
    ),
    "a barrier is missing: the sums are read before they are there": (
        CLUSTERS,
        "row.h",
        "exchange.advance();\n    __syncthreads();",
        "exchange.advance();",
    ),
    "a barrier is missing: a histogram is cleared that another CTA still reads": (
        CLUSTERS,
        "select.h",
        "if (exchange.size() > 1) exchange.barrier();\n    __syncthreads();",
        "__syncthreads();",
    ),
    "the classes a sparse teacher names are looked up before they are all marked": (
        CLUSTERS,
        "sparse.h",
        "named_[bit / 32], 1u << bit % 32);\n    });\n    __syncthreads();",
        "named_[bit / 32], 1u << bit % 32);\n    });",
    ),
    "the gradient of a class that a sparse teacher names is put back before it is there": (
        CLUSTERS,
        "sparse.h",
        "if (puts_back) write_named();\n      __syncthreads();",
        "if (puts_back) write_named();",
    ),
    "the label set apart is left in the sums": (
        CLUSTERS,
        "row.h",
        "return decoupled() && label() / kStep == step ?",
        "return decoupled() && label() / kStep == step + 1 ?",
    ),
    "the tail is one column too long": (
        CLUSTERS,
        "load.h",
        "return column < view.columns ? reinterpret_cast",
        "return column <= view.columns ? reinterpret_cast",
    ),
    "the tail is written one column too far": (
        CLUSTERS,
        "load.h",
        "if (column < view.columns) reinterpret_cast<uint32_t*>",
        "if (column <= view.columns) reinterpret_cast<uint32_t*>",
    ),
    "a CTA sends into another one's place": (
        CLUSTERS,
        "exchange.h",
        "inbox[buffer][rank()]",
        "inbox[buffer][to]",
    ),
    "nobody waits for what the other CTAs send": (
        CLUSTERS,
        "exchange.h",
        "mbarrier_wait(&shared_.barrier[count() & 1], static_cast<unsigned>(count() >> 1 & 1));",
        "",
    ),
    "the wait is for the phase before": (
        CLUSTERS,
        "exchange.h",
        "static_cast<unsigned>(count() >> 1 & 1)",
        "static_cast<unsigned>(~count() >> 1 & 1)",
    ),
    "the first exchange begins before the other CTAs have": (
        CLUSTERS,
        "exchange.h",
        "if (size() > 1) cluster_wait();",
        "",
    ),
    "nobody waits for the other CTAs in global memory": (
        TICKETS,
        "exchange.h",
        "while (load_acquire(arrived(row())) < all) spin();",
        "(void)all;",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_kernels_is_caught(name):
    layout, *fault = FAULTS[name]
    level = "-O0"  # each is compiled to run for a second
    expected = rows(CLUSTERS, "0", None, level)
    assert expected.count("soft") == 6
    seen = [rows(layout, schedule, tuple(fault), level) for schedule in SCHEDULES]
    assert any(said != expected for said in seen), seen


MISTAKES = {
    "a_thread_is_missing": "thread 5 of CTA . has ended while others wait",
    "two_barriers": "diverges",
    "a_lane_is_missing": "has ended while its warp waits",
    "no_such_peer": "no CTA 2 in the cluster",
    "not_in_shared_memory": "not in shared memory",
    "a_peer_has_ended": "a CTA that has ended is used",
    "arrival_without_wait": "ended without cluster_wait",
    "a_barrier_nobody_made": "not initialised",
    "bytes_that_never_come": "deadlock: thread 0 of CTA . waits for an mbarrier",
    "gone_before_the_store_arrives": "has ended",
    "waits_for_a_cta_that_cannot_start": "deadlock: thread 0 of CTA 0 spins",
    "a_misaligned_vector": "misaligned load",
}


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_a_mistake_is_named(schedule):
    program = build.program("faults")
    assert output(program, "nothing", schedule) == ""
    for name, message in MISTAKES.items():
        said = output(program, name, schedule)
        assert re.search(message, said), (name, said)
