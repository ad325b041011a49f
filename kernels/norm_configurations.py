# SPDX-License-Identifier: Apache-2.0
"""What RMSNorm and LayerNorm ship as, by the width of their rows."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton.language as tl

from . import norm_backward, norm_forward, norm_rows
from .configuration import Configuration, pointer


def configurations(name: str, centred: bool) -> tuple[Configuration, ...]:
    """What a norm ships as, for each width: forward, backward and the last sum.

    (Beyond 32768 columns there is nothing new in the backward but the last sum is of
    any width, so each stands once.)
    """
    return tuple(
        configuration
        for dtype in (torch.bfloat16, torch.float32)
        for columns in (1024, 2048, 4096, 8192, 16384, 32768, 65536)
        for residual in (False, True)
        for configuration in _shipped(name, centred, residual, dtype, columns)
    )


def _shipped(
    name: str, centred: bool, residual: bool, dtype: torch.dtype, columns: int
) -> Iterator[Configuration]:
    x, wide = pointer(dtype), {"WIDE": tl.float32}
    size = f"{x[1:]}/{columns}" + "/residual" * residual
    rows, block, num_warps = norm_rows.forward_tile(columns)
    pointers = {"x_ptr": x, "y_ptr": x, "grad_ptr": x, "x_grad_ptr": x}
    added = "residual_ptr", "total_ptr", "total_grad_ptr"
    pointers |= dict.fromkeys(added, x if residual else None)
    centre = "mean_ptr", "bias_ptr", "bias_sums_ptr", "bias_grad_ptr", "shift_ptr"
    pointers |= dict.fromkeys(centre, "*fp32" if centred else None)

    def of(
        kind: str,
        kernel: Any,
        constants: Any,
        num_warps: int,
        narrow: int,
        registers: int | None = None,
    ) -> Any:
        whole = f"{name}/{kind}/{size}"
        made = _configuration(whole, kernel, pointers, constants, num_warps, narrow)
        return dataclasses.replace(made, max_registers=registers)

    norm = wide | {"EPS": 1e-6, "ROWS": rows, "BLOCK": block}
    if columns > norm_rows.forward_columns(dtype.itemsize, centred):
        norm["BLOCK"] = norm_rows.CHUNK
        yield of("forward", norm_forward.forward_chunks, norm, 16, 1 + centred)
    else:
        registers = norm_rows.forward_registers(block)
        kernel = norm_forward.forward_rows
        yield of("forward", kernel, norm, num_warps, 1 + centred, registers)
    if columns > norm_rows.FORWARD_COLUMNS:
        return
    tile = norm_rows.backward_tile(columns, dtype.itemsize)
    constants = wide | {"ROWS": tile.rows, "BLOCK": tile.columns}
    constants["AHEAD"] = norm_rows.ahead(tile, dtype.itemsize, centred and residual)
    if columns <= norm_rows.BACKWARD_COLUMNS:
        yield of("backward", norm_backward.backward_rows, constants, tile.num_warps, 4)
        return
    pair = columns <= 2 * tile.columns
    if pair:
        pointers |= {"slope_ptr": None, "shift_ptr": None}
    registers = norm_rows.segment_registers(dtype.itemsize, centred)
    kernel = norm_backward.backward_segments
    yield of("backward", kernel, constants, tile.num_warps, 4, registers)
    if not pair and not residual:
        slopes = wide | {"BLOCK": norm_rows.CHUNK}
        registers = norm_rows.slope_registers(dtype.itemsize, centred)
        yield of("slopes", norm_backward.slopes, slopes, 16, 4, registers)
        adding = {"ROWS": norm_rows.SUM_ROWS, "BLOCK": norm_rows.SUM_COLUMNS}
        yield of("sum", norm_backward.add_up, adding, 4, 1 + centred)


def _configuration(
    name: str,
    kernel: Any,
    pointers: Mapping[str, str | None],
    constants: Mapping[str, Any],
    num_warps: int,
    narrow: int = 0,
) -> Configuration:
    """With a float32 scale; what is None, and no parameter elsewhere, is left out."""
    kinds = {
        argument: pointers.get(
            argument, "*fp32" if argument.endswith("_ptr") else "i32"
        )
        for argument in kernel.arg_names
        if argument.islower()
    }
    return Configuration(
        name,
        kernel,
        {argument: kind for argument, kind in kinds.items() if kind is not None},
        {argument: None for argument, kind in kinds.items() if kind is None}
        | {k: v for k, v in constants.items() if k in kernel.arg_names},
        num_warps,
        divisible=("columns",),
        narrow=narrow,
    )
