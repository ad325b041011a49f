# SPDX-License-Identifier: Apache-2.0
"""AdamW's kernel, and what it ships as."""

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .multi_tensor import BLOCK, NUM_WARPS, chunk_of, launch, listed, narrowed
from .partial_sums import triton_type
from .update_kernel import decay_of, decayed, factor, groups, pointers, ratio, root
from .update_lists import Options

MAX_REGISTERS: Final = 72  # ptxas alone takes 64 on sm_80, and spills


@triton.jit
def _block(
    ptrs,
    numbers,
    at,
    length,
    COUPLED: tl.constexpr,
    COPIED: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block."""
    decay, rate, coefficient, weight1, weight2, b1, rest1, b2, rest2, eps = numbers
    at = at + tl.arange(0, BLOCK)
    inside = None
    if MASKED:
        inside = at < length
    p = tl.load(ptrs[0] + at, inside).to(WIDE)
    g = tl.load(ptrs[1] + at, inside).to(WIDE) * coefficient
    if COUPLED:
        g = decayed(g, p, decay)
    m = b1 * tl.load(ptrs[2] + at, inside) + rest1 * g
    n = b2 * tl.load(ptrs[3] + at, inside) + rest2 * (g * g)
    tl.store(ptrs[5] + at, m, inside)
    tl.store(ptrs[6] + at, n, inside)
    still = tl.where(eps == 0, m, 1.0) == 0  # without eps, and no gradient so far
    under = root(ratio(n, weight2)) + eps
    u = tl.where(still, m, ratio(ratio(m, weight1), tl.where(still, 1.0, under)))
    if not COUPLED:
        u = decayed(u, p, decay)
    p = narrowed(p - rate * u, ptrs[4].dtype.element_ty, EMULATE)
    tl.store(ptrs[4] + at, p, inside)
    if COPIED:
        copy = narrowed(p.to(WIDE), ptrs[7].dtype.element_ty, EMULATE)
        tl.store(ptrs[7] + at, copy, inside)


@triton.jit
def _old_block(
    ptrs,
    at,
    length,
    COPIED: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep a block as it was."""
    at = at + tl.arange(0, BLOCK)
    inside = at < length
    p = tl.load(ptrs[0] + at, inside)
    tl.store(ptrs[4] + at, p, inside)
    tl.store(ptrs[5] + at, tl.load(ptrs[2] + at, inside), inside)
    tl.store(ptrs[6] + at, tl.load(ptrs[3] + at, inside), inside)
    if COPIED:
        copy = narrowed(p.to(WIDE), ptrs[7].dtype.element_ty, EMULATE)
        tl.store(ptrs[7] + at, copy, inside)


@triton.jit(do_not_specialize=["count", "blocks"])
def adamw_kernel(
    table_ptr,
    count,
    blocks,
    finite_ptr,
    rate_ptr,
    coefficient_ptr,
    weight1_ptr,
    weight2_ptr,
    b1_ptr,
    COUPLED: tl.constexpr,
    TYPES: tl.constexpr,
    WIDE: tl.constexpr,
    EMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk. Without ``finite`` it is copied, so that no block keeps its old."""
    COLUMNS: tl.constexpr = len(TYPES)
    COPIED: tl.constexpr = COLUMNS == 8
    tensor, first, length = chunk_of(table_ptr, count, blocks, BLOCK)
    ptrs = pointers(table_ptr, count, tensor, first, TYPES, ALIGNED)
    b1 = listed(table_ptr, count, 4 + COLUMNS, 4, WIDE)
    rest1 = listed(table_ptr, count, 4 + COLUMNS, 5, WIDE)
    if b1_ptr is not None:
        value = tl.load(b1_ptr).to(tl.float64)
        b1, rest1 = value.to(WIDE), (1.0 - value).to(WIDE)
    numbers = (
        decay_of(table_ptr, count, tensor, COLUMNS, WIDE),
        factor(rate_ptr, table_ptr, count, 0, COLUMNS, WIDE),
        factor(coefficient_ptr, table_ptr, count, 1, COLUMNS, WIDE),
        factor(weight1_ptr, table_ptr, count, 2, COLUMNS, WIDE),
        factor(weight2_ptr, table_ptr, count, 3, COLUMNS, WIDE),
        b1,
        rest1,
        listed(table_ptr, count, 4 + COLUMNS, 6, WIDE),
        listed(table_ptr, count, 4 + COLUMNS, 7, WIDE),
        listed(table_ptr, count, 4 + COLUMNS, 8, WIDE),
    )
    at = length * 0
    if finite_ptr is not None:  # noqa: SIM102 - the one is a constant
        if tl.load(finite_ptr) == 0:
            while at < length:
                _old_block(ptrs, at, length, COPIED, WIDE, EMULATE, BLOCK)
                at += BLOCK
    while at < length // BLOCK * BLOCK:  # without a mask: 16 bytes at a time
        at = tl.multiple_of(at, BLOCK)
        _block(ptrs, numbers, at, length, COUPLED, COPIED, WIDE, EMULATE, False, BLOCK)
        at += BLOCK
    if at < length:
        _block(ptrs, numbers, at, length, COUPLED, COPIED, WIDE, EMULATE, True, BLOCK)


def update(
    reads: Sequence[Sequence[Tensor]],
    writes: Sequence[Sequence[Tensor]],
    options: Options,
    numbers: Sequence[float],
    tensors: Sequence[Tensor | None],
    coupled: bool,
) -> None:
    """Launch the kernel on lists, once for each combination of dtypes.

    Args:
      reads: p, g, mu, nu.
      writes: p, mu, nu, and perhaps copies.
      options: Of the update.
      numbers: The learning rate, the coefficient, the bias corrections, b1, 1 - b1, b2,
        1 - b2, eps.
      tensors: 0-d tensors in the place of the first five of these.
      coupled: Whether the decay goes through the moments.
    """
    for group in groups(reads, writes, options.weight_decay, numbers):
        launch(
            adamw_kernel,
            group.table,
            options.finite,
            *tensors,
            COUPLED=coupled,
            **group.constants,
            enable_fp_fusion=False,
            maxnreg=MAX_REGISTERS,
        )
        group.finish()


def _configurations(
    grad: torch.dtype, copy: torch.dtype | None, coupled: bool
) -> Configuration:
    wide = torch.float32
    dtypes = [wide, grad, *[wide] * 5] + ([] if copy is None else [copy])
    kinds = {"table_ptr": "*i64", "count": "i32", "blocks": "i32", "finite_ptr": "*i1"}
    kinds |= dict.fromkeys(("rate_ptr", "weight1_ptr", "weight2_ptr"), "*fp64")
    kind = "coupled" if coupled else "decoupled"
    copied = "no-copy" if copy is None else pointer(copy)[1:]
    return Configuration(
        f"adamw/{kind}/{pointer(grad)[1:]}/{copied}",
        adamw_kernel,
        kinds | {"coefficient_ptr": "*fp32"},
        {
            "b1_ptr": None,
            "COUPLED": coupled,
            "TYPES": tuple(triton_type(x) for x in dtypes),
            "WIDE": tl.float32,
            "EMULATE": False,
            "ALIGNED": True,
            "BLOCK": BLOCK,
        },
        NUM_WARPS,
        fp_fusion=False,
        max_registers=MAX_REGISTERS,
        narrow=142,
    )


CONFIGURATIONS: Final = (
    _configurations(torch.bfloat16, torch.bfloat16, False),
    _configurations(torch.float16, torch.float16, False),
    _configurations(torch.float32, None, False),
    _configurations(torch.float32, torch.bfloat16, False),
    _configurations(torch.float32, None, True),
)
