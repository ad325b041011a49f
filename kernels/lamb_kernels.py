# SPDX-License-Identifier: Apache-2.0
"""The launches of LAMB: moments with sums of squares, trust ratios, the step."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import compute_dtype, define, looped
from .multi_tensor import BLOCK, NUM_WARPS, chunk_of, launch, listed
from .partial_sums import Partials, reduce_segments, triton_type
from .update_kernel import (
    decay_of,
    decayed,
    factor,
    groups,
    pointers,
    ratio,
    root,
    update,
    update_configurations,
)
from .update_lists import ADAM_SCHEMA, SCHEMA, Adam, Options, fresh, not_mapped


@triton.jit
def _direction(m, n, weight1, weight2, eps):
    """Adam's update; 0 where the mean and ``eps`` are."""
    bare = tl.abs(m) + eps == 0.0
    size = tl.where(bare, 1.0, root(ratio(n, weight2)) + eps)
    return tl.where(bare, m, ratio(ratio(m, weight1), size))


@triton.jit
def _moments_block(ptrs, at, inside, numbers, keep, p_sums, u_sums, WIDE: tl.constexpr):
    """The moments of one block, and its squares added to the sums."""
    decay, coefficient, weight1, weight2, eps, b1, rest1, b2, rest2 = numbers
    p = tl.load(ptrs[0] + at, inside).to(WIDE)
    g = tl.load(ptrs[1] + at, inside).to(WIDE) * coefficient
    old_m, old_n = tl.load(ptrs[2] + at, inside), tl.load(ptrs[3] + at, inside)
    m = b1 * old_m + rest1 * g
    n = b2 * old_n + rest2 * (g * g)
    if keep is not None:
        m, n = tl.where(keep, m, old_m), tl.where(keep, n, old_n)
    tl.store(ptrs[4] + at, m, inside)
    tl.store(ptrs[5] + at, n, inside)
    u = decayed(_direction(m, n, weight1, weight2, eps), p, decay)
    if inside is not None:
        p, u = tl.where(inside, p, 0.0), tl.where(inside, u, 0.0)
    return p_sums + p * p, u_sums + u * u


@triton.jit(do_not_specialize=["count", "blocks"])
def moments_kernel(
    table_ptr,
    count,
    blocks,
    sums_ptr,
    coefficient_ptr,
    weight1_ptr,
    weight2_ptr,
    finite_ptr,
    TYPES: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Writes the moments of a chunk and the sums of squares of p and of its update."""
    COLUMNS: tl.constexpr = len(TYPES)
    tensor, first, length = chunk_of(table_ptr, count, blocks, BLOCK)
    ptrs = pointers(table_ptr, count, tensor, first, TYPES, ALIGNED)
    numbers = (
        decay_of(table_ptr, count, tensor, COLUMNS, WIDE),
        factor(coefficient_ptr, table_ptr, count, 0, COLUMNS, WIDE),
        factor(weight1_ptr, table_ptr, count, 1, COLUMNS, WIDE),
        factor(weight2_ptr, table_ptr, count, 2, COLUMNS, WIDE),
    )
    for i in tl.static_range(3, 8):
        numbers += (listed(table_ptr, count, 4 + COLUMNS, i, WIDE),)
    keep = None
    if finite_ptr is not None:
        keep = tl.load(finite_ptr) != 0
    at = tl.arange(0, BLOCK)
    p_sums, u_sums = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    block = length * 0
    while block < length // BLOCK:  # without a mask: 16 bytes at a time
        here = block * BLOCK + at
        p_sums, u_sums = _moments_block(
            ptrs, here, None, numbers, keep, p_sums, u_sums, WIDE
        )
        block += 1
    at += block * BLOCK
    p_sums, u_sums = _moments_block(
        ptrs, at, at < length, numbers, keep, p_sums, u_sums, WIDE
    )
    chunk = tl.program_id(0) * 2
    tl.store(sums_ptr + chunk, tl.sum(p_sums, 0))
    tl.store(sums_ptr + chunk + 1, tl.sum(u_sums, 0))


@triton.jit
def _step(columns, numbers):
    p, m, n = columns
    decay, rate, _, weight1, weight2, eps, phi = numbers
    u = decayed(_direction(m, n, weight1, weight2, eps), p, decay)
    return (p - rate * (u * phi),)


@triton.jit(do_not_specialize=["count"])
def ratios_kernel(
    sums_ptr,
    ratios_ptr,
    count,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The trust ratio of every tensor from its two sums of squares."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = root(tl.load(sums_ptr + 2 * at, inside, 0.0))
    u = root(tl.load(sums_ptr + 2 * at + 1, inside, 0.0))
    low, high = tl.full([BLOCK], LOW, p.dtype), tl.full([BLOCK], HIGH, p.dtype)
    none = (p == 0.0) | (u == 0.0)
    phi = ratio(p, tl.where(none, 1.0, u))
    phi = tl.where(phi < low, low, tl.where(phi > high, high, phi))
    tl.store(ratios_ptr + at, tl.where(none, 1.0, phi), inside)


def launch_moments(
    lists: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    options: Options,
    adam: Adam,
    sums: Tensor,
) -> None:
    """Pass 1, and the reduction of its sums.

    Args:
      lists: Params, grads, mu and nu.
      targets: New mu and nu.
      options: Of all updates.
      adam: Of this one.
      sums: [tensors, 2] of zeros, for those of p and of the update.
    """
    b1, b2 = adam.b1, adam.b2
    numbers = options.factor, adam.weight1, adam.weight2
    numbers = *numbers, adam.eps, b1, 1 - b1, b2, 1 - b2
    for group in groups(lists, targets, options.weight_decay, numbers):
        partial = sums.new_empty(2 * group.table.chunks)
        launch(
            moments_kernel,
            group.table,
            partial,
            options.coefficient,
            adam.weight1_at,
            adam.weight2_at,
            options.finite,
            **group.constants,
            enable_fp_fusion=False,
        )
        group.finish()
        found = Partials(partial, None, [(group.table, 0)])
        reduce_segments(found, sums, None, columns=6)


def launch_ratios(sums: Tensor, ratios: Tensor, low: float, high: float) -> None:
    """The trust ratios.

    Args:
      sums: [tensors, 2], contiguous.
      ratios: [tensors], to write.
      low: The least.
      high: The largest.
    """
    if ratios.numel() == 0:
        return
    with torch.cuda.device_of(sums):
        ratios_kernel[(triton.cdiv(ratios.numel(), BLOCK),)](
            sums,
            ratios,
            ratios.numel(),
            LOW=low,
            HIGH=high,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def launch_step(
    lists: Sequence[Sequence[Tensor]],
    targets: Sequence[Sequence[Tensor]],
    ratios: Tensor,
    options: Options,
    adam: Adam,
) -> None:
    """Pass 2.

    Args:
      lists: Params, new mu and new nu.
      targets: New params, and perhaps copies.
      ratios: [tensors].
      options: Of all updates.
      adam: Of this one.
    """
    update(
        _step,
        (0,),
        lists,
        targets,
        options,
        (adam.weight1, adam.weight2, adam.eps),
        (adam.weight1_at, adam.weight2_at),
        ratios,
    )


def _split(args: Any) -> tuple[Options, Adam]:
    return Options(*args[:-7]), Adam(*args[-7:])


def _sums_like(params: Any) -> Tensor:
    wide = {compute_dtype(p.dtype) for p in params}
    dtype = torch.float64 if torch.float64 in wide else torch.float32
    return params[0].new_zeros(len(params), 2, dtype=dtype)


def _moments(params: Any, grads: Any, mu: Any, nu: Any, *args: Any) -> Any:
    new = fresh(mu), fresh(nu), _sums_like(params)
    launch_moments((params, grads, mu, nu), new[:2], *_split(args), new[2])
    return new


def _moments_donated(params: Any, grads: Any, mu: Any, nu: Any, *args: Any) -> Any:
    sums = _sums_like(params)
    launch_moments((params, grads, mu, nu), (mu, nu), *_split(args), sums)
    return sums


def _apply(params: Any, mu: Any, nu: Any, ratios: Any, *args: Any) -> Any:
    options, adam = _split(args)
    new = fresh(params), options.empty_copies(params)
    targets = [x for x in new if x]
    launch_step((params, mu, nu), targets, ratios.contiguous(), options, adam)
    return new


def _apply_donated(params: Any, mu: Any, nu: Any, ratios: Any, *args: Any) -> Any:
    options, adam = _split(args)
    copies = options.empty_copies(params)
    targets = [params, *([copies] if copies else [])]
    launch_step((params, mu, nu), targets, ratios.contiguous(), options, adam)
    return copies


def _ratios(sums: Tensor, low: float, high: float) -> Tensor:
    ratios = sums.new_empty(sums.shape[0])
    launch_ratios(sums.contiguous(), ratios, low, high)
    return ratios


_LISTS: Final = "Tensor[] params, Tensor[] grads, Tensor[] mu, Tensor[] nu"
_PASS2: Final = "Tensor[] params, Tensor[] mu, Tensor[] nu, Tensor ratios"
_TAIL: Final = f"{SCHEMA}, {ADAM_SCHEMA}"
moments_op: Final = define(
    f"lamb_moments({_LISTS}, {_TAIL}) -> (Tensor[], Tensor[], Tensor)",
    _moments,
    fake=lambda params, grads, mu, nu, *args: (
        fresh(mu),
        fresh(nu),
        _sums_like(params),
    ),
    vmap=looped(lambda: moments_op),
)
moments_donated_op: Final = define(
    "lamb_moments_(Tensor[] params, Tensor[] grads, Tensor(a!)[] mu, "
    f"Tensor(b!)[] nu, {_TAIL}) -> Tensor",
    _moments_donated,
    fake=lambda params, *args: _sums_like(params),
    vmap=not_mapped("lamb_moments"),
)
apply_op: Final = define(
    f"lamb_apply({_PASS2}, {_TAIL}) -> (Tensor[], Tensor[])",
    _apply,
    fake=lambda params, mu, nu, ratios, *args: (
        fresh(params),
        _split(args)[0].empty_copies(params),
    ),
    vmap=looped(lambda: apply_op),
)
apply_donated_op: Final = define(
    "lamb_apply_(Tensor(a!)[] params, Tensor[] mu, Tensor[] nu, Tensor ratios, "
    f"{_TAIL}) -> Tensor[]",
    _apply_donated,
    fake=lambda params, mu, nu, ratios, *args: _split(args)[0].empty_copies(params),
    vmap=not_mapped("lamb_apply"),
)
ratios_op: Final = define(
    "lamb_ratios(Tensor sums, float low, float high) -> Tensor",
    _ratios,
    fake=lambda sums, low, high: sums.new_empty(sums.shape[0]),
    vmap=looped(lambda: ratios_op),
)


def _moments_configuration(grad: torch.dtype) -> Configuration:
    f, g = tl.float32, triton_type(grad)
    kinds = {"table_ptr": "*i64", "count": "i32", "blocks": "i32", "sums_ptr": "*fp32"}
    weights = dict.fromkeys(("weight1_ptr", "weight2_ptr"), "*fp64")
    constants = {"TYPES": (f, g, f, f, f, f), "WIDE": f, "BLOCK": BLOCK}
    return Configuration(
        f"lamb/moments/{pointer(grad)[1:]}",
        moments_kernel,
        kinds | weights | {"coefficient_ptr": "*fp32", "finite_ptr": "*i1"},
        constants | {"EMULATE": False, "ALIGNED": True},
        NUM_WARPS,
        fp_fusion=False,
        narrow=69,
    )


CONFIGURATIONS: Final = (
    _moments_configuration(torch.float32),
    _moments_configuration(torch.bfloat16),
    *update_configurations("lamb", _step, (0,), reads=3, numbers=5, ratios=True),
    Configuration(
        "lamb/ratios/fp32",
        ratios_kernel,
        {"sums_ptr": "*fp32", "ratios_ptr": "*fp32", "count": "i32"},
        {"LOW": 0.01, "HIGH": 10.0, "BLOCK": BLOCK},
        NUM_WARPS,
        fp_fusion=False,
        narrow=24,
        streams=False,
    ),
)
