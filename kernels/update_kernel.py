# SPDX-License-Identifier: Apache-2.0
"""One kernel for every elementwise update: what differs is a function of a block.

It gets a table (``multi_tensor``) of the columns that are read and those that are
written, each tensor's place in the lists and its weight decay; then the numbers of the
launch, four of which may be 0-d tensors instead, that are read on the device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import compute_dtype, interpreting
from .multi_tensor import (
    BLOCK,
    NUM_WARPS,
    Table,
    bits,
    by_dtypes,
    chunk_of,
    column,
    entry,
    launch,
    listed,
    narrowed,
    number,
    table,
)
from .partial_sums import triton_type
from .update_lists import Options


class Group(NamedTuple):
    """Tensors of one launch.

    Attributes:
      table: Where they are: the columns, a row of their places in the lists, a row of
        their weight decays; then the numbers.
      constants: ``TYPES`` of the columns, ``WIDE``, ``BLOCK``, ``EMULATE``.
      targets: What was to be written, beside what is in its place.
      columns: What the table points to.
    """

    table: Table
    constants: dict[str, Any]
    targets: list[tuple[Tensor, Tensor]]
    columns: list[list[Tensor]]

    def finish(self) -> None:
        """After the launch: copy to the targets that are not contiguous."""
        for target, dense in self.targets:
            target.copy_(dense)


def groups(
    reads: Sequence[Sequence[Tensor]],
    writes: Sequence[Sequence[Tensor]],
    decay: Sequence[float],
    numbers: Sequence[float],
) -> list[Group]:
    """A table for each combination of dtypes among the lists.

    Args:
      reads: Columns that the kernel reads, of any strides.
      writes: Columns that it writes, which may be among those.
      decay: The weight decay of every tensor.
      numbers: Of the launch.
    """
    found = []
    for group in by_dtypes([*reads, *writes]):
        columns, targets = _dense(reads, writes, group)
        own = [group, [bits(decay[i]) for i in group]]
        tab = table(columns, own, [bits(x) for x in numbers])
        constants = {
            "TYPES": tuple(triton_type(column[0].dtype) for column in columns),
            "WIDE": triton_type(compute_dtype(columns[0][0].dtype)),
            "BLOCK": BLOCK,
            "EMULATE": interpreting(),
        }
        found.append(Group(tab, constants, targets, columns))
    return found


def _dense(
    reads: Sequence[Sequence[Tensor]],
    writes: Sequence[Sequence[Tensor]],
    group: Sequence[int],
) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The columns of a group as a kernel takes them, and what to copy afterwards.

    Elements of equal indices are at equal places in each.
    """
    columns = [[column[i] for i in group] for column in (*reads, *writes)]
    if all(x.is_contiguous() for tensors in columns for x in tensors):
        return columns, []
    as_is = [_in_one_order(row) for row in zip(*columns, strict=True)]
    targets = []
    for k, tensors in enumerate(columns):
        for i, x in enumerate(tensors):
            if as_is[i] or x.is_contiguous():
                continue
            tensors[i] = x.contiguous() if k < len(reads) else x.new_empty(x.shape)
            if k >= len(reads):
                targets.append((x, tensors[i]))
    return columns, targets


def _in_one_order(tensors: Sequence[Tensor]) -> bool:
    """Whether elements of equal indices are at equal places, without gaps."""
    first = tensors[0]
    if any(x.stride() != first.stride() for x in tensors):
        return False
    dense = torch.ops.aten.is_non_overlapping_and_dense.default
    return first.is_contiguous() or bool(dense(first))


def update(
    step: Any,
    old: tuple[int, ...],
    reads: Sequence[Sequence[Tensor]],
    writes: Sequence[Sequence[Tensor]],
    options: Options,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None] = (None, None),
    ratios: Tensor | None = None,
) -> None:
    """Launch ``update_kernel`` on lists.

    Args:
      step: Its STEP.
      old: Its OLD.
      reads: The columns that it reads.
      writes: Those that it writes; those of ``old``, and perhaps copies.
      options: Of the update.
      numbers: Of the step, after the learning rate and the coefficient.
      tensors: 0-d tensors in the place of the first two of these.
      ratios: One more number of every tensor, that STEP gets last.
    """
    values = [options.learning_rate, options.factor, *numbers]
    values += [0.0] * (4 - len(values))
    for group in groups(reads, writes, options.weight_decay, values):
        launch(
            update_kernel,
            group.table,
            options.rate,
            options.coefficient,
            *tensors,
            options.finite,
            ratios,
            STEP=step,
            READ=len(reads),
            OLD=old,
            NUMBERS=len(values),
            **group.constants,
            enable_fp_fusion=False,
            maxnreg=_registers(group.columns[1][0].dtype),
        )
        group.finish()


def _registers(grad: torch.dtype) -> int | None:
    """What a thread may have, where ptxas alone may take 64 and spill."""
    return 72 if grad.itemsize == 2 else None


@triton.jit
def pointers(
    table_ptr, count, tensor, first, TYPES: tl.constexpr, ALIGNED: tl.constexpr
):
    """The pointers to element ``first`` of a tensor in all columns."""
    found = ()
    for i in tl.static_range(len(TYPES)):
        found += (column(table_ptr, count, tensor, i, first, TYPES[i], ALIGNED),)
    return found


@triton.jit
def factor(ptr, table_ptr, count, at, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """Number ``at`` of the launch, or the 0-d tensor that is given in its place."""
    if ptr is None:
        return listed(table_ptr, count, 4 + COLUMNS, at, WIDE)
    else:  # noqa: RET505 - Triton compiles one of the two
        return tl.load(ptr).to(WIDE)


@triton.jit
def decay_of(table_ptr, count, tensor, COLUMNS: tl.constexpr, WIDE: tl.constexpr):
    """The weight decay of a tensor."""
    return number(entry(table_ptr, count, tensor, 3 + COLUMNS), WIDE)


@triton.jit
def decayed(update, p, decay):
    """The update with its weight decay; without one as it is, bit for bit."""
    return tl.where(decay == 0.0, update, update + decay * p)


@triton.jit
def _update_block(
    ptrs,
    at,
    inside,
    numbers,
    keep,
    STEP: tl.constexpr,
    READ: tl.constexpr,
    OLD: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """One block, without a mask where ``inside`` is None."""
    old, wide = (), ()
    for i in tl.static_range(READ):
        old += (tl.load(ptrs[i] + at, inside),)
        wide += (old[i].to(WIDE),)
    new = STEP(wide, numbers)
    for i in tl.static_range(len(OLD)):
        x = narrowed(new[i], old[OLD[i]].dtype, EMULATE)
        if keep is not None:
            x = tl.where(keep, x, old[OLD[i]])
        tl.store(ptrs[READ + i] + at, x, inside)
        if i == 0 and READ + len(OLD) < len(ptrs):
            copy_ptr = ptrs[READ + len(OLD)] + at
            copy = narrowed(x.to(WIDE), copy_ptr.dtype.element_ty, EMULATE)
            tl.store(copy_ptr, copy, inside)


@triton.jit(do_not_specialize=["count", "blocks"])
def update_kernel(
    table_ptr,
    count,
    blocks,
    rate_ptr,
    coefficient_ptr,
    third_ptr,
    fourth_ptr,
    finite_ptr,
    ratios_ptr,
    STEP: tl.constexpr,
    READ: tl.constexpr,
    OLD: tl.constexpr,
    NUMBERS: tl.constexpr,
    TYPES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``STEP((p, ...), (decay, *numbers))`` on every block; the tensor's ratio last.

    READ columns are read; the i-th result is written to column ``READ + i``, in the
    dtype of column ``OLD[i]``, and where ``finite_ptr`` says false it is that column. A
    further column gets the first result in another dtype.
    """
    COLUMNS: tl.constexpr = len(TYPES)
    tensor, first, length = chunk_of(table_ptr, count, blocks, BLOCK)
    ptrs = pointers(table_ptr, count, tensor, first, TYPES, ALIGNED)
    numbers = (
        decay_of(table_ptr, count, tensor, COLUMNS, WIDE),
        factor(rate_ptr, table_ptr, count, 0, COLUMNS, WIDE),
        factor(coefficient_ptr, table_ptr, count, 1, COLUMNS, WIDE),
        factor(third_ptr, table_ptr, count, 2, COLUMNS, WIDE),
        factor(fourth_ptr, table_ptr, count, 3, COLUMNS, WIDE),
    )
    for i in tl.static_range(4, NUMBERS):
        numbers += (listed(table_ptr, count, 4 + COLUMNS, i, WIDE),)
    if ratios_ptr is not None:
        place = entry(table_ptr, count, tensor, 2 + COLUMNS)
        numbers += (tl.load(ratios_ptr + place).to(WIDE),)
    keep = None
    if finite_ptr is not None:
        keep = tl.load(finite_ptr) != 0
    at = tl.arange(0, BLOCK)
    block = length * 0
    while block < length // BLOCK:  # without a mask: 16 bytes at a time
        _update_block(
            ptrs,
            block * BLOCK + at,
            None,
            numbers,
            keep,
            STEP,
            READ,
            OLD,
            WIDE,
            EMULATE,
        )
        block += 1
    at += block * BLOCK
    inside = at < length
    _update_block(ptrs, at, inside, numbers, keep, STEP, READ, OLD, WIDE, EMULATE)


@triton.jit
def ratio(x, y):
    """The quotient, rounded to nearest."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


def update_configurations(
    name: str,
    step: Any,
    old: tuple[int, ...],
    reads: int,
    numbers: int,
    ratios: bool = False,
) -> tuple[Configuration, ...]:
    """What an update ships as: one dtype; and bfloat16 gradients with a copy."""
    found = []
    for grad, copy in ((torch.float32, ()), (torch.bfloat16, (torch.bfloat16,))):
        dtypes = [torch.float32] * (reads + len(old))
        dtypes[1] = torch.float32 if ratios else grad
        constants = {
            "STEP": step,
            "READ": reads,
            "OLD": old,
            "NUMBERS": numbers,
            "TYPES": tuple(triton_type(x) for x in (*dtypes, *copy)),
            "WIDE": tl.float32,
            "BLOCK": BLOCK,
            "EMULATE": False,
            "ALIGNED": True,
            "third_ptr": None,
            "fourth_ptr": None,
        }
        if not ratios:
            constants["ratios_ptr"] = None
        kinds = {"table_ptr": "*i64", "count": "i32", "blocks": "i32"}
        kinds |= {"rate_ptr": "*fp64", "coefficient_ptr": "*fp32", "finite_ptr": "*i1"}
        kinds |= {"ratios_ptr": "*fp32"} if ratios else {}
        found.append(
            Configuration(
                f"{name}/update/{pointer(grad)[1:]}",
                update_kernel,
                kinds,
                constants,
                NUM_WARPS,
                fp_fusion=False,
                max_registers=_registers(dtypes[1]),
                # The last block of a chunk, and a few numbers, by the element.
                narrow=9 * len(constants["TYPES"]) + numbers + 5 + 2 * ratios,
            )
        )
    return tuple(found)
