# SPDX-License-Identifier: Apache-2.0
r"""Cross-entropy of each row of logits, and its gradient in the same kernel.

.. math::
  \ell = L - (1 - \epsilon) x_t - \frac{\epsilon}{V} \sum_j x_j + \zeta L^2, \quad
  L = \log \sum_j e^{x_j}, \qquad
  \bar x_j = \bar\ell \Bigl((1 + 2 \zeta L) e^{x_j - L} - \frac{\epsilon}{V}
    - (1 - \epsilon) [j = t]\Bigr)

A softcap c puts :math:`c \tanh(x / c)` in the place of x. Bytes per logit, in elements
of the dtype: loss 1 read (2 B in bfloat16), backward 1 read and 1 written (4 B), both
at once 2 read and 1 written (6 B; the second read is of what the first left in L2).
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .cross_entropy_kernels import loss_kernel, slopes_kernel
from .cross_entropy_reference import (
    OPTIONS,
    capped,
    check_rows,
    checked_options,
    cross_entropy_reference,
    rowwise,
    slopes_reference,
)
from .gated import dense_like
from .library import (
    FirstOrder,
    Kernel,
    check_floating,
    check_shape,
    compute_dtype,
    define,
    pullback,
    runs_triton,
)

BLOCK: Final = 4096


def _shape(logits: Tensor) -> dict[str, Any]:
    block = min(BLOCK, max(128, triton.next_power_of_2(logits.shape[-1])))
    return {
        "WIDE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 512)),
    }


def row_settings(
    logits: Tensor, ignore_index: int, softcap: float | None
) -> dict[str, Any]:
    """The constants that every kernel of rows of logits takes."""
    return _shape(logits) | {"IGNORE": ignore_index, "SOFTCAP": softcap}


def launch_loss(
    logits: Tensor,
    targets: Tensor,
    cotangents: Tensor | None,
    slopes: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps; writes the gradient to ``slopes`` instead of the latter.

    All tensors are contiguous; ``slopes`` may be the logits themselves.
    """
    wide = compute_dtype(logits.dtype)
    losses = logits.new_empty(targets.shape, dtype=wide)
    logsumexps = losses if slopes is not None else torch.empty_like(losses)
    if losses.numel():
        loss_kernel[losses.numel(),](
            logits,
            targets,
            losses if cotangents is None else cotangents,
            losses,
            logsumexps,
            logits if slopes is None else slopes,
            logits.shape[-1],
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            SLOPES=slopes is not None,
            **row_settings(logits, ignore_index, softcap),
        )
    return losses, logsumexps


def _forward(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return launch_loss(logits.contiguous(), targets.contiguous(), None, None, *options)


def _fused(
    cotangents: Tensor, logits: Tensor, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    logits, targets = logits.contiguous(), targets.contiguous()
    slopes = torch.empty_like(logits)
    cotangents = cotangents.contiguous()
    losses, _ = launch_loss(logits, targets, cotangents, slopes, *options)
    return losses, slopes


def _slopes(
    cotangents: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    first: int,
    size: int,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float | None,
) -> Tensor:
    logits = logits.contiguous()
    slopes = torch.empty_like(logits)
    if slopes.numel():
        slopes_kernel[targets.numel(),](
            logits,
            targets.contiguous(),
            cotangents.contiguous(),
            logsumexp.contiguous(),
            slopes,
            logits.shape[-1],
            first,
            size,
            SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            **row_settings(logits, ignore_index, softcap),
        )
    return slopes


def _like_rows(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.new_empty(targets.shape, dtype=compute_dtype(logits.dtype))


_OPTIONS: Final = (
    "float label_smoothing, float z_loss, int ignore_index, float? softcap"
)
forward_op: Final = define(
    f"cross_entropy_forward(Tensor logits, Tensor targets, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    _forward,
    fake=lambda logits, targets, *_: (
        _like_rows(logits, targets),
        _like_rows(logits, targets),
    ),
    vmap=rowwise(lambda: forward_op, 2),
)
fused_op: Final = define(
    "cross_entropy_fused(Tensor cotangents, Tensor logits, Tensor targets, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _fused,
    fake=lambda cotangents, logits, targets, *_: (
        _like_rows(logits, targets),
        dense_like(logits),
    ),
    vmap=rowwise(lambda: fused_op, 2),
)
slopes_op: Final = define(
    "cross_entropy_slopes(Tensor cotangents, Tensor logits, Tensor targets, "
    f"Tensor logsumexp, int first, int size, {_OPTIONS}) -> Tensor",
    _slopes,
    fake=lambda cotangents, logits, *_: dense_like(logits),
    vmap=rowwise(lambda: slopes_op, 1),
)
_transposed: Final = pullback(slopes_op)


class _CrossEntropy(FirstOrder):
    """Losses, and the logsumexps that their gradient needs."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, *options: Any) -> Any:
        return forward_op(logits, targets, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, targets, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, targets, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        saved = ctx.saved_tensors
        slopes = _transposed(grad, *saved, 0, saved[0].shape[-1], *ctx.options)
        return slopes, *(None,) * (1 + len(ctx.options))


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""Cross-entropy of each row; no mean, whose weights are the caller's.

    The options are constants of the compiled kernel: each new value compiles once.

    Args:
      logits: [..., V], floating; computed in float32 (float64 for float64).
      targets: [...], integers in [0, V) or ``ignore_index``.
      label_smoothing: Weight :math:`\epsilon` in [0, 1] of the uniform distribution.
      z_loss: Weight :math:`\zeta` of the squared logsumexp.
      ignore_index: Rows with this label have loss 0 and gradient 0, whatever they hold.
      softcap: None, or c > 0: the loss of ``c * tanh(logits / c)``.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      [...] in float32 (float64 for float64). Where a label is out of range, NaN from
      the kernel, with a gradient of NaN: to raise would wait for the device.

    Raises:
      TypeError: Logits that are not floating, targets that are not integers.
      ValueError: Shapes that do not fit; no classes; options out of range; two devices;
        a ``kernel`` that is not there; on the CPU without Triton, a label out of range.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      ``torch.nn.functional.cross_entropy(..., reduction="none")`` is the same within
      rounding where both are defined.

    Examples:
      >>> cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
      tensor([1.3863, 0.0000])

    References:
      Milakov and Gimelshein, `Online normalizer calculation for softmax
      <https://arxiv.org/abs/1805.02867>`_, 2018. Szegedy et al., `Rethinking the
      Inception Architecture <https://arxiv.org/abs/1512.00567>`_, 2016 (smoothing).
      Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022 (z-loss).
    """
    options = checked_options(
        "cross_entropy", label_smoothing, z_loss, ignore_index, softcap
    )
    check_rows("cross_entropy", logits, targets)
    if runs_triton("cross_entropy", kernel, logits, targets):
        return _CrossEntropy.apply(logits, targets, *options)[0]
    named = dict(zip(OPTIONS, options, strict=True))
    return cross_entropy_reference(logits, targets, **named)


def cross_entropy_and_gradient(
    logits: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    kernel: Kernel = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Losses, and the gradient of their weighted sum, in one kernel.

    For a caller with a transpose of its own: 2 reads and 1 write of the logits, where
    a loss and its backward are 2 launches with as many. Not differentiable.

    Args:
      logits: As in ``cross_entropy``.
      targets: As in ``cross_entropy``.
      row_weights: [...], the cotangents of the losses; None for 1.
      label_smoothing: As in ``cross_entropy``.
      z_loss: As in ``cross_entropy``.
      ignore_index: As in ``cross_entropy``.
      softcap: As in ``cross_entropy``.
      kernel: As in ``cross_entropy``.

    Returns:
      The losses, and the gradient of ``(row_weights * losses).sum()`` like ``logits``,
      computed in float32 and rounded once, that at the label too.

    Raises:
      TypeError: As in ``cross_entropy``.
      ValueError: As in ``cross_entropy``, and row weights that do not fit.
      RuntimeError: A derivative of the Triton kernel.

    Laws:
      The gradient is that of ``cross_entropy``, within rounding.

    Examples:
      >>> cross_entropy_and_gradient(torch.zeros(1, 2), torch.tensor([1]))
      (tensor([0.6931]), tensor([[ 0.5000, -0.5000]]))
    """
    name = "cross_entropy_and_gradient"
    options = checked_options(name, label_smoothing, z_loss, ignore_index, softcap)
    check_rows(name, logits, targets)
    if row_weights is None:
        row_weights = _like_rows(logits, targets).fill_(1.0)
    check_floating(name, row_weights=row_weights)
    check_shape(name, "row_weights", row_weights, tuple(targets.shape))
    if runs_triton(name, kernel, logits, targets, row_weights):
        return fused_op(row_weights, logits, targets, *options)
    named = dict(zip(OPTIONS, options, strict=True))
    losses = cross_entropy_reference(logits, targets, **named)
    x = capped(logits.to(losses.dtype), softcap)
    rest = 0, logits.shape[-1], *options
    return losses, slopes_reference(
        row_weights, logits, targets, x.logsumexp(-1), *rest
    )


def _configuration(
    kind: str, dtype: torch.dtype, cols: int, every_option: bool
) -> Configuration:
    x, fp32 = pointer(dtype), pointer(torch.float32)
    kernel = slopes_kernel if kind == "backward" else loss_kernel
    shape = _shape(torch.empty(0, cols, dtype=dtype, device="meta"))
    warps = shape.pop("num_warps")
    constants = shape | {
        "SMOOTHING": 0.1 if every_option else 0.0,
        "Z_LOSS": 1e-4 if every_option else 0.0,
        "IGNORE": -100,
        "SOFTCAP": 30.0 if every_option else None,
    }
    integers = ("cols",)
    if kind == "backward":
        constants["first"] = 0
        integers = ("cols", "size")
    else:
        constants["SLOPES"] = kind == "loss+gradient"
    signature = {
        "logits_ptr": x,
        "targets_ptr": pointer(torch.int64),
        "cotangents_ptr": fp32,
        "losses_ptr": fp32,
        "logsumexps_ptr": fp32,
        "slopes_ptr": x,
    }
    if kind == "backward":
        del signature["losses_ptr"]
    return Configuration(
        f"cross_entropy/{kind}/{x[1:]}/{cols}" + "/every_option" * every_option,
        kernel,
        signature | dict.fromkeys(integers, "i32"),
        constants,
        warps,
        divisible=integers,
        # The label, its logit, the cotangent or logsumexp, and what a row writes.
        narrow=4,
    )


CONFIGURATIONS: Final = tuple(
    _configuration(kind, dtype, cols, every_option)
    for kind in ("loss", "backward", "loss+gradient")
    for dtype in (torch.bfloat16, torch.float32)
    for cols in (32768, 131072)
    for every_option in (False, True)
)
