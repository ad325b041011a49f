# SPDX-License-Identifier: Apache-2.0
r"""The norm of all tensors together, and whether all are finite, in one read.

.. math::
  s_i = \sum_j x_{ij}^2, \qquad
  \|x\| = \sqrt{\sum_i s_i}, \qquad
  \text{finite} = \bigwedge_{ij} (|x_{ij}| < \infty)

Bytes per element: the element is read once (2 B in bfloat16). Each chunk of at most
128 Ki elements leaves one partial sum in float32 (float64 for float64) and one flag;
a second launch adds them up in float64, in a fixed order.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import Kernel, check_floating, compute_dtype, define, looped, runs_triton
from .multi_tensor import by_dtypes, chunk_of, column, launch, table
from .partial_sums import (
    SUM_BLOCK,
    Partials,
    all_range,
    reduce_segments,
    sum_range,
    triton_type,
)

BLOCK: Final = 2048
NUM_WARPS: Final = 4
_ROW: Final = 1 << 10  # elements that torch adds up in float32


class Norm(NamedTuple):
    """What ``global_norm`` returns.

    Attributes:
      norm: 0-d, float32 at least.
      finite: 0-d bool.
    """

    norm: Tensor
    finite: Tensor


class SquareSums(NamedTuple):
    """What ``square_sums`` returns.

    Attributes:
      sums: One number per tensor, float32 at least.
      finite: 0-d bool.
    """

    sums: Tensor
    finite: Tensor


def square_sums_reference(tensors: Sequence[Tensor]) -> SquareSums:
    """Sums of squares: rows of 1024 elements in float32, sums of rows in float64.

    Args:
      tensors: At least one floating tensor, all on one device.
    """
    wide = _wide(tensors)
    sums = torch.stack([_square_sum(x) for x in tensors])
    return SquareSums(sums.to(wide), _finite(tensors))


def global_norm_reference(tensors: Sequence[Tensor]) -> Norm:
    """The root of the sum of ``square_sums_reference``, whose derivative at 0 is 0.

    Args:
      tensors: At least one floating tensor, all on one device.
    """
    total = torch.stack([_square_sum(x) for x in tensors]).sum()
    zero = total == 0
    norm = torch.where(zero, total, torch.where(zero, 1.0, total).sqrt())
    return Norm(norm.to(_wide(tensors)), _finite(tensors))


def _wide(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    wide = [compute_dtype(x.dtype) for x in tensors]
    return torch.float64 if torch.float64 in wide else torch.float32


def _square_sum(x: Tensor) -> Tensor:
    """0-d, float64."""
    flat, wide = x.reshape(-1), compute_dtype(x.dtype)
    full = flat.numel() // _ROW * _ROW
    rows, rest = flat[:full].view(-1, _ROW), flat[full:]
    norms = [
        torch.linalg.vector_norm(rows, dim=1, dtype=wide),
        torch.linalg.vector_norm(rest, dtype=wide).reshape(1),
    ]
    return torch.cat(norms).double().square().sum()


def _finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether the least and the largest are; NaN is both where there is one."""
    bounds = [torch.stack(torch.aminmax(x.detach())) for x in tensors if x.numel()]
    if not bounds:
        return torch.ones((), dtype=torch.bool, device=tensors[0].device)
    return torch.stack([x.isfinite().all() for x in bounds]).all()


@triton.jit(do_not_specialize=["count", "blocks"])
def _partial_kernel(
    table_ptr,
    count,
    blocks,
    sums_ptr,
    finite_ptr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    tensor, first, length = chunk_of(table_ptr, count, blocks, BLOCK)
    x_ptr = column(table_ptr, count, tensor, 0, first, TYPE, ALIGNED)
    at = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], WIDE)
    finite = at >= 0
    block = length * 0
    while block < length // BLOCK:  # without a mask: 16 bytes at a time
        x = tl.load(x_ptr + block * BLOCK + at).to(WIDE)
        sums += x * x
        finite = finite & (tl.abs(x) < float("inf"))
        block += 1
    at += block * BLOCK
    x = tl.load(x_ptr + at, at < length, 0.0).to(WIDE)
    sums += x * x
    finite = finite & (tl.abs(x) < float("inf"))
    chunk = tl.program_id(0)
    tl.store(sums_ptr + chunk, tl.sum(sums, 0))
    tl.store(finite_ptr + chunk, tl.min(finite.to(tl.int32), 0))


@triton.jit(do_not_specialize=["chunks"])
def _norm_kernel(sums_ptr, finite_ptr, norm_ptr, all_ptr, chunks, BLOCK: tl.constexpr):
    total = sum_range(sums_ptr, chunks * 0, chunks, 1, BLOCK)
    tl.store(norm_ptr, tl.sqrt(total).to(norm_ptr.dtype.element_ty))
    tl.store(all_ptr, all_range(finite_ptr, chunks, BLOCK))


def _partials(tensors: Sequence[Tensor]) -> Partials:
    dense = [x.contiguous() for x in tensors]
    groups = by_dtypes([dense])
    tables, start = [], 0
    for group in groups:
        tab = table([[dense[i] for i in group]], rows=[group], block=BLOCK)
        tables.append((tab, start))
        start += tab.chunks
    sums = dense[0].new_empty(start, dtype=_wide(tensors))
    finite = dense[0].new_empty(start, dtype=torch.int32)
    for group, (tab, at) in zip(groups, tables, strict=True):
        dtype = dense[group[0]].dtype
        constants = _constants(dtype)
        launch(
            _partial_kernel,
            tab,
            sums[at:],
            finite[at:],
            **constants,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return Partials(sums, finite, tables)


def _constants(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "TYPE": triton_type(dtype),
        "WIDE": triton_type(compute_dtype(dtype)),
        "BLOCK": BLOCK,
    }


def _global_norm(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    norm, finite = _norm_like(tensors)
    partials = _partials(tensors)
    with torch.cuda.device_of(norm):
        _norm_kernel[(1,)](
            partials.sums,
            partials.finite,
            norm,
            finite,
            partials.sums.numel(),
            BLOCK=SUM_BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return norm, finite


def _square_sums(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    sums, finite = _sums_like(tensors)
    reduce_segments(_partials(tensors), sums.zero_(), finite.fill_(True), columns=1)
    return sums, finite


def _norm_like(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    first = tensors[0]
    norm = first.new_empty((), dtype=_wide(tensors))
    return norm, first.new_empty((), dtype=torch.bool)


def _sums_like(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    first = tensors[0]
    sums = first.new_empty(len(tensors), dtype=_wide(tensors))
    return sums, first.new_empty((), dtype=torch.bool)


norm_op: Final = define(
    "global_norm(Tensor[] tensors) -> (Tensor, Tensor)",
    _global_norm,
    fake=_norm_like,
    vmap=looped(lambda: norm_op),
)
sums_op: Final = define(
    "square_sums(Tensor[] tensors) -> (Tensor, Tensor)",
    _square_sums,
    fake=_sums_like,
    vmap=looped(lambda: sums_op),
)


def _scaled(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor times its factor, rounded once: the backward of both."""
    return tuple(
        (x.to(compute_dtype(x.dtype)) * factor).to(x.dtype)
        for x, factor in zip(tensors, factors, strict=True)
    )


class _GlobalNorm(torch.autograd.Function):
    """The operator; its backward is torch, so that it has derivatives of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Any:
        return norm_op(list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[0], *inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        norm, *tensors = ctx.saved_tensors
        zero = norm == 0
        factor = torch.where(zero, 0.0, grad / torch.where(zero, 1.0, norm))
        return _scaled(tensors, [factor] * len(tensors))


class _SquareSums(torch.autograd.Function):
    """The operator; its backward is torch, so that it has derivatives of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> Any:
        return sums_op(list(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        tensors = ctx.saved_tensors
        return _scaled(tensors, (2 * grad).unbind())


def global_norm(tensors: Sequence[Tensor], *, kernel: Kernel = "auto") -> Norm:
    r"""The 2-norm of all tensors together, and whether every element is finite.

    .. math::
      \|x\| = \sqrt{\sum_{ij} x_{ij}^2}

    ``finite`` is about the elements: where they are finite and the sum of the squares
    of a chunk of at most 128 Ki of them overflows float32, ``finite`` is true and the
    norm is infinite. That takes an element above 5e16; below, the norm is right, also
    where its square overflows. Squares below 1e-45 count as 0.

    Args:
      tensors: A list of floating tensors of any dtypes and shapes on one device.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      ``Norm(norm, finite)``, both 0-d on the device: nothing waits for it. The norm is
      float64 if any tensor is, else float32. Of no tensors: 0 and true, on the CPU.

    Raises:
      TypeError: Something that is not a list of floating tensors.
      ValueError: Tensors on two devices; a ``kernel`` that is not there.

    Laws:
      Triton's norm is within 80 roundings of float32 of the exact one, whatever the
      sizes. The same bits every time.

    Examples:
      >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
      Norm(norm=tensor(5.), finite=tensor(True))

    Differs from:
      ``torch.nn.utils.get_total_norm`` is the norm of the norms, each rounded, and
      knows nothing of finite elements whose squares overflow.
    """
    if not _checked("global_norm", tensors):
        return Norm(torch.zeros(()), torch.ones((), dtype=torch.bool))
    if not runs_triton("global_norm", kernel, *tensors):
        return global_norm_reference(tensors)
    return Norm(*_GlobalNorm.apply(*tensors))


def square_sums(tensors: Sequence[Tensor], *, kernel: Kernel = "auto") -> SquareSums:
    r"""The sum of squares of each tensor, and whether every element is finite.

    :math:`s_i = \sum_j x_{ij}^2`. Ranks that hold pieces of a tensor add these up; the
    root of all of them together is ``global_norm``.

    Args:
      tensors: A list of floating tensors of any dtypes and shapes on one device.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      ``SquareSums(sums, finite)``: one number per tensor, float64 if any tensor is,
      else float32; and 0-d bool, which is about the elements, not the sums.

    Raises:
      TypeError: Something that is not a list of floating tensors.
      ValueError: Tensors on two devices; a ``kernel`` that is not there.

    Laws:
      Triton's sums are within 80 roundings of float32 of the exact ones, whatever the
      sizes. The same bits every time.

    Examples:
      >>> square_sums([torch.tensor([3.0, 4.0]), torch.ones(2, 2)]).sums
      tensor([25.,  4.])
    """
    if not _checked("square_sums", tensors):
        return SquareSums(torch.zeros(0), torch.ones((), dtype=torch.bool))
    if not runs_triton("square_sums", kernel, *tensors):
        return square_sums_reference(tensors)
    return SquareSums(*_SquareSums.apply(*tensors))


def _checked(name: str, tensors: Any) -> int:
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"{name}: tensors is {type(tensors).__name__}, expected a list of floating "
            "tensors; type [x] for one, or the leaves of a tree"
        )
    check_floating(name, **{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    return len(tensors)


def _configurations(dtype: torch.dtype) -> Configuration:
    wide = pointer(compute_dtype(dtype))
    kinds = {"table_ptr": "*i64", "count": "i32", "blocks": "i32", "sums_ptr": wide}
    return Configuration(
        f"global_norm/partial/{pointer(dtype)[1:]}",
        _partial_kernel,
        kinds | {"finite_ptr": "*i32"},
        _constants(dtype) | {"ALIGNED": True},
        NUM_WARPS,
        narrow=22,
    )


CONFIGURATIONS: Final = (
    _configurations(torch.bfloat16),
    _configurations(torch.float32),
    Configuration(
        "global_norm/norm/fp32",
        _norm_kernel,
        {"sums_ptr": "*fp32", "finite_ptr": "*i32", "all_ptr": "*i1"}
        | {"norm_ptr": "*fp32", "chunks": "i32"},
        {"BLOCK": SUM_BLOCK},
        NUM_WARPS,
        narrow=18,
        streams=False,
    ),
)
