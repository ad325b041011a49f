# SPDX-License-Identifier: Apache-2.0
"""Configurations that must not ship: the gate has to say why, of each."""

import sys

import triton
import triton.language as tl

from zfunc.kernels.compile_only import main
from zfunc.kernels.configuration import Configuration


@triton.jit
def _copy_kernel(x_ptr, out_ptr, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride))


@triton.jit
def _mean_of_squares_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps a row of 2 * 16384 values in the registers of one warp."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    total = tl.sum(x * x, 0)
    tl.store(out_ptr + at, x / tl.sqrt(total))


_ROW = {"x_ptr": "*fp32", "out_ptr": "*fp32"}

CONFIGURATIONS = (
    Configuration(
        "good/copy",
        _copy_kernel,
        _ROW,
        {"stride": 1, "BLOCK": 1024},
        num_warps=4,
    ),
    Configuration(
        "bad/strided",
        _copy_kernel,
        {**_ROW, "stride": "i64"},
        {"BLOCK": 1024},
        num_warps=4,
    ),
    Configuration(
        "bad/spills",
        _mean_of_squares_kernel,
        _ROW,
        {"BLOCK": 16384},
        num_warps=1,
    ),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], CONFIGURATIONS))
