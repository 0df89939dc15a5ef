"""What the programs of benchmarks/on_gpu.sh share, and tests/cuda_kernels/test_gpu.py with them."""

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

import fastkd

UNFINISHED = 75  # a program's status where its time ran out
Output = TypeVar("Output")


def arguments(parser: argparse.ArgumentParser, seconds: float) -> argparse.Namespace:
    """With --backend and --seconds; ends the program where the backend cannot run."""
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin none after so many")
    chosen = parser.parse_args()
    if reasons := fastkd.backends()[chosen.backend]:
        sys.exit("; ".join(reasons))
    return chosen


def captured(call: Callable[[], Output]) -> tuple[torch.cuda.CUDAGraph, Output]:
    """`call` as a CUDA graph, and the tensors that every replay writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once before, so that nothing is set up in the capture
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output
