# SPDX-License-Identifier: Apache-2.0
"""One launch over lists of tensors, which the kernel finds by a table of addresses.

A kernel over n tensors in c columns (parameters, gradients, ...) is given a table of
int64 on the device. Its rows, n numbers each: the first chunk of every tensor, the
number of its elements, a row of addresses per column, a row per further number of a
tensor; then numbers of the whole launch. Program k works on chunk k: it finds the
tensor by a binary search (``chunk_of``), and the addresses at its place (``column``).
Floats in the table are the bits of a float64 (``bits``, ``number``), so no value is
compiled into a kernel, or rounded on its way there.

The bytes of the table are 8 (2 + c) per tensor and launch, read from the L2 cache.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration

BLOCK: Final = 1024  # elements at a time, by 4 warps
NUM_WARPS: Final = 4
_MOST_BLOCKS: Final = 64  # in a chunk
_PROGRAMS: Final = 132 * 8  # that small launches should still have
_FILLED: Final = 64  # numbers of a table that one launch writes
_HALF: Final = (1 << 32) - 1
# Twice a half of these and 1 are added: all are int64, and none is a multiple of 16,
# or each pattern of such multiples would be a kernel of its own.
_OFFSET: Final = (1 << 62) + 1


class Table(NamedTuple):
    """What one launch needs to know of its tensors.

    Attributes:
      data: The rows, on the device of the tensors.
      count: Tensors: the length of a row.
      blocks: Blocks of ``BLOCK`` elements in a chunk.
      chunks: Programs of the launch.
      aligned: Whether every address is a multiple of 16.
      device: Where.
    """

    data: Tensor
    count: int
    blocks: int
    chunks: int
    aligned: bool
    device: torch.device


def bits(value: float) -> int:
    """A float64 as an int64 of the same bits, which ``number`` reads.

    Examples:
      >>> bits(0.0), bits(-1.0)
      (0, -4616189618054758400)
    """
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def chunked(numels: Sequence[int], block: int = BLOCK) -> tuple[int, list[int]]:
    """How tensors are cut: blocks in a chunk, and where each tensor's chunks start.

    It depends on the sizes alone, not on the device; so do the bits of sums over
    chunks.

    Args:
      numels: Elements of every tensor.
      block: Elements of a block.

    Returns:
      The blocks of a chunk; the first chunk of every tensor, and the number of all.

    Examples:
      >>> chunked([1024, 0, 1025])
      (1, [0, 1, 1, 3])
      >>> chunked([2**31])
      (64, [0, 32768])
    """
    total = sum(-(-numel // block) for numel in numels)
    blocks = min(max(-(-total // _PROGRAMS), 1), _MOST_BLOCKS)
    starts = [0]
    for numel in numels:
        starts.append(starts[-1] - (-numel // (block * blocks)))
    return blocks, starts


def by_dtypes(columns: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """The indices of tensors that one launch can take: those of equal dtypes.

    Args:
      columns: Lists of equal length.

    Returns:
      Lists of indices, which together are all that have elements.

    Examples:
      >>> x, y = torch.ones(2), torch.ones(2, dtype=torch.float64)
      >>> by_dtypes([[x, y, x, x[:0]], [x, x, x, x]])
      [[0, 2], [1]]
    """
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, tensors in enumerate(zip(*columns, strict=True)):
        if tensors[0].numel():
            groups.setdefault(tuple(x.dtype for x in tensors), []).append(i)
    return list(groups.values())


def table(
    columns: Sequence[Sequence[Tensor]],
    rows: Sequence[Sequence[int]] = (),
    numbers: Sequence[int] = (),
    block: int = BLOCK,
) -> Table:
    """The table of one launch. It is written without waiting for the device.

    While a CUDA graph is captured, every replay would read host memory again, which by
    then holds something else; so the numbers become arguments of small kernels.

    Args:
      columns: Lists of contiguous tensors; the i-th of all have the same number of
        elements. Each is alive until the launch.
      rows: Further int64 numbers of every tensor (floats by ``bits``).
      numbers: Int64 numbers of the launch.
      block: Elements of a block.

    Returns:
      The table.
    """
    first = columns[0]
    numels = [x.numel() for x in first]
    blocks, starts = chunked(numels, block)
    addresses = [[x.data_ptr() for x in column] for column in columns]
    values = [*starts[:-1], *numels]
    for row in (*addresses, *rows, numbers):
        values.extend(row)
    aligned = all(a % 16 == 0 for column in addresses for a in column)
    device = first[0].device
    data = _on_device(values, device)
    return Table(data, len(first), blocks, starts[-1], aligned, device)


def _on_device(values: list[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return filled(values, device)
        _load_filling(device)
        host = torch.tensor(values, dtype=torch.int64, pin_memory=True)
        return host.to(device, non_blocking=True)


@functools.cache
def _load_filling(device: torch.device) -> None:
    """Compile and load the kernel of ``filled``: a graph being captured forbids it."""
    filled([0], device)


def filled(values: list[int], device: torch.device) -> Tensor:
    """An int64 tensor whose values are arguments of kernels, not host memory.

    Args:
      values: Int64 numbers.
      device: Where.
    """
    padded = values + [0] * (-len(values) % _FILLED)
    data = torch.empty(len(padded), dtype=torch.int64, device=device)
    for at in range(0, len(padded), _FILLED):
        some = padded[at : at + _FILLED]
        low = tuple(_OFFSET + 2 * (v & _HALF) for v in some)
        high = tuple(_OFFSET + 2 * (v >> 32 & _HALF) for v in some)
        _fill_kernel[(1,)](data, at, low, high, num_warps=1)
    return data


@triton.jit(do_not_specialize=["at", "low", "high"])
def _fill_kernel(data_ptr, at, low, high):
    for i in tl.static_range(len(low)):
        value = (low[i] >> 1 & 0xFFFFFFFF) | ((high[i] >> 1 & 0xFFFFFFFF) << 32)
        tl.store(data_ptr + at + i, value)


def launch(kernel: Any, tab: Table, *args: Any, **options: Any) -> None:
    """Run ``kernel[chunks](data, count, blocks, *args, ALIGNED=..., **options)``.

    Args:
      kernel: A ``@triton.jit`` function, with ``count`` and ``blocks`` among its
        ``do_not_specialize``.
      tab: The table; without chunks nothing is launched.
      *args: Its further arguments.
      **options: Constants, ``num_warps`` (else 4), ``enable_fp_fusion``.
    """
    if tab.chunks == 0:
        return
    options = {"num_warps": NUM_WARPS} | options
    with torch.cuda.device_of(tab.data):
        kernel[(tab.chunks,)](
            tab.data, tab.count, tab.blocks, *args, ALIGNED=tab.aligned, **options
        )


@triton.jit
def chunk_of(table_ptr, count, blocks, BLOCK: tl.constexpr):
    """This program's tensor, its first element there, and how many it has (int32)."""
    chunk = tl.program_id(0).to(tl.int64)
    low, high = count * 0, count
    # The last tensor that starts at this chunk or before: one that is not empty.
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = (chunk - tl.load(table_ptr + low)) * blocks * BLOCK
    left = tl.load(table_ptr + count + low) - first
    length = tl.minimum(left, (blocks * BLOCK).to(tl.int64)).to(tl.int32)
    return low, first, length


@triton.jit
def entry(table_ptr, count, tensor, row):
    """A tensor's number in a row: 0 first chunk, 1 elements, 2 first address, ..."""
    return tl.load(table_ptr + row * count + tensor)


@triton.jit
def column(
    table_ptr, count, tensor, at, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """The pointer to element ``first`` of the tensor in column ``at``."""
    address = entry(table_ptr, count, tensor, 2 + at)
    pointer = address.to(tl.pointer_type(TYPE)) + first
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def listed(table_ptr, count, rows, at, WIDE: tl.constexpr):
    """The float whose ``bits`` are the launch's number ``at``, after all rows."""
    return number(tl.load(table_ptr + rows * count + at), WIDE)


@triton.jit
def number(value, WIDE: tl.constexpr):
    """The float whose ``bits`` are in the table."""
    return value.to(tl.float64, bitcast=True).to(WIDE)


@triton.jit
def narrowed(x, TYPE: tl.constexpr, EMULATE: tl.constexpr):
    """``x.to(TYPE)``, to nearest even; Triton's interpreter truncates bfloat16."""
    if EMULATE and tl.bfloat16 == TYPE:
        u = x.to(tl.float32).to(tl.uint32, bitcast=True)
        u = tl.where(x == x, u + 0x7FFF + ((u >> 16) & 1), 0x7FC00000) >> 16
        return u.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if TYPE.primitive_bitwidth == 16:
        return x.to(tl.float32).to(TYPE)  # from float64 in two steps, as torch
    return x.to(TYPE)


CONFIGURATIONS: Final = (
    Configuration(
        "multi_tensor/fill",
        _fill_kernel,
        {
            "data_ptr": "*i64",
            "at": "i32",
            "low": ("i64",) * _FILLED,
            "high": ("i64",) * _FILLED,
        },
        {},
        num_warps=1,
        narrow=_FILLED,
        streams=False,
    ),
)
