# SPDX-License-Identifier: Apache-2.0
r"""The loss of a language model's last layer, without its logits ever existing at once.

.. math::
  \mathcal{L} = \sum_n w_n \, \ell(W h_n, t_n), \qquad
  \bar h_n = W^\top \bar x_n, \quad \bar W = \sum_n \bar x_n h_n^\top

with the loss and :math:`\bar x` of ``cross_entropy``. Logits are made for as many rows
as fit into a workspace, turned into their gradient in place, and multiplied on before
the next rows take their place: 6 N V H operations, those of a layer that keeps its
logits. The backward multiplies by its cotangent. Gradients in the forward need to know
whether somebody will ask for them: ``_wanted`` looks, and where it says no and is
wrong, the backward computes them, 2 N V H operations more. So it decides what a loss
costs and never what it is. Bytes: 3 passes over a chunk of logits besides the matrix
products, and 2 over the float32 gradient of W per chunk.
"""

from typing import Any, Final

import torch
from torch import Tensor

from .cross_entropy import launch_loss
from .cross_entropy_reference import (
    OPTIONS,
    check_labels,
    checked_op,
    checked_options,
    cross_entropy_reference,
)
from .library import (
    FirstOrder,
    Kernel,
    check_floating,
    check_number,
    check_shape,
    compute_dtype,
    define,
    looped,
    pullback,
    runs_triton,
)

FEW_CHUNKS: Final = 8
WORKSPACE: Final = 512 * 2**20


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """The weighted sum of losses with all logits at once; differentiable twice.

    Args:
      hidden: [N, H].
      weight: [V, H].
      targets: [N], integers.
      row_weights: [N] or None for 1.
      label_smoothing: As in ``cross_entropy``.
      z_loss: As in ``cross_entropy``.
      ignore_index: As in ``cross_entropy``.
      softcap: As in ``cross_entropy``.
    """
    losses = cross_entropy_reference(
        hidden @ weight.mT,
        targets,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    weighted = losses if row_weights is None else losses * row_weights
    return weighted.sum().to(losses.dtype)


def _losses_and_slopes(
    logits: Tensor,
    targets: Tensor,
    cotangents: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """``launch_loss`` in torch; the slopes in float32, in place of float32 logits."""
    x = logits.to(compute_dtype(logits.dtype))
    if softcap is not None:
        x = x.div_(softcap).tanh_().mul_(softcap)
    live = (targets != ignore_index)[:, None]
    x.masked_fill_(~live, 0.0)
    label = torch.where(live, targets[:, None], 0).long()
    top, at_label = x.amax(-1, keepdim=True), x.gather(-1, label)
    mean = x.mean(-1, keepdim=True) if label_smoothing else top
    slopes_needed = cotangents is not None
    curve = None
    if slopes_needed and softcap is not None:
        curve = (x / softcap).square_().neg_().add_(1.0)
    x.sub_(top).exp_()
    weight = x.sum(-1, keepdim=True)
    logarithm = weight.log()
    L = top + logarithm
    losses = logarithm + (1.0 - label_smoothing) * (top - at_label)
    losses += label_smoothing * (top - mean)
    if z_loss:
        losses += z_loss * L.square()
    losses = losses.masked_fill_(~live, 0.0)[:, 0]
    if not slopes_needed:
        return losses, x
    cotangents = cotangents[:, None] * live
    x.mul_(cotangents * (1.0 + 2.0 * z_loss * L) / weight)
    if label_smoothing:
        x.sub_(cotangents * (label_smoothing / x.shape[-1]))
    x.scatter_add_(-1, label, cotangents * (label_smoothing - 1.0))
    return losses, x if curve is None else x.mul_(curve)


def _logit_bytes(dtype: torch.dtype, triton: bool, softcap: float | None) -> int:
    """What one logit takes while its chunk is worked on."""
    if triton:
        return dtype.itemsize
    wide = compute_dtype(dtype)
    # The product, and its gradient rounded for the next products.
    narrow = 2 * dtype.itemsize if wide != dtype else 0
    return narrow + wide.itemsize * (1 if softcap is None else 2)


def _chunk(row_bytes: int, rows: int, workspace: int) -> int:
    """How many rows fit; whole tiles of a matrix product where there are several."""
    fit = max(1, workspace // row_bytes)
    return max(1, min(rows, fit // 128 * 128 if fit >= 128 else fit))


def _accumulate(total: Tensor, slopes: Tensor, hidden: Tensor) -> None:
    """``total += slopes.T @ hidden``, in the dtype of ``total``."""
    wide = total.dtype
    if slopes.is_cuda and slopes.dtype != wide:
        torch.addmm(total, slopes.mT, hidden, out_dtype=wide, out=total)
    else:
        total.addmm_(slopes.mT.to(wide), hidden.to(wide))


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
    triton: bool,
    workspace: int,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all rows, and the gradients that are asked for (else empty)."""
    (N, H), V, dtype = hidden.shape, weight.shape[0], hidden.dtype
    wide, slopes_needed = compute_dtype(dtype), for_hidden or for_weight
    if not triton:
        targets = checked_op(targets, V, options[2])
    hidden, targets = hidden.contiguous(), targets.contiguous()
    losses = hidden.new_empty(N, dtype=wide)
    hidden_grad = hidden.new_empty((N, H) if for_hidden else 0)
    rows = _chunk(V * _logit_bytes(dtype, triton, options[3]), N, workspace)
    # In float32, or rounded at each of a few chunks where that is not in the workspace.
    fits = V * H * wide.itemsize <= workspace or -(-N // rows) > FEW_CHUNKS
    total = wide if fits else dtype
    weight_grad = hidden.new_zeros((V, H) if for_weight else 0, dtype=total)
    cotangents = None
    if slopes_needed:
        ones = hidden.new_ones(N, dtype=wide)
        cotangents = ones if row_weights is None else row_weights.to(wide).contiguous()
    buffer = hidden.new_empty(rows, V)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits = buffer[: part.stop - start]
        torch.mm(hidden[part], weight.mT, out=logits)
        cotangent = None if cotangents is None else cotangents[part]
        if triton:
            slopes = logits if slopes_needed else None
            losses[part], _ = launch_loss(
                logits, targets[part], cotangent, slopes, *options
            )
        else:
            losses[part], slopes = _losses_and_slopes(
                logits, targets[part], cotangent, *options
            )
        if for_hidden:
            torch.mm(slopes.to(dtype), weight, out=hidden_grad[part])
        if for_weight:
            _accumulate(weight_grad, slopes, hidden[part])
    return losses, hidden_grad, weight_grad.to(dtype)


def _gradients_like(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None,
    for_hidden: bool,
    for_weight: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype)),
        hidden.new_empty(hidden.shape if for_hidden else 0),
        hidden.new_empty(weight.shape if for_weight else 0),
    )


def _scaled_by(
    grad: Tensor,
    losses: Tensor,
    hidden_grad: Tensor,
    weight_grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangent times each gradient; a constant only to who asks for no second."""
    return hidden_grad * grad, weight_grad * grad, losses * grad


gradients_op: Final = define(
    "linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? row_weights, bool for_hidden, bool for_weight, bool triton, "
    "int workspace, float label_smoothing, float z_loss, int ignore_index, "
    "float? softcap) -> (Tensor, Tensor, Tensor)",
    _gradients,
    fake=_gradients_like,
    vmap=looped(lambda: gradients_op),
)
scaled_op: Final = define(
    "linear_cross_entropy_scaled(Tensor grad, Tensor losses, Tensor hidden_grad, "
    "Tensor weight_grad, Tensor hidden, Tensor weight) -> (Tensor, Tensor, Tensor)",
    _scaled_by,
    fake=_scaled_by,
    vmap=looped(lambda: scaled_op),
)
_computed: Final = pullback(gradients_op)
_scaled: Final = pullback(scaled_op)


class _LinearCrossEntropy(FirstOrder):
    """The loss and, where they will be asked for, its gradients."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor | None,
        *rest: Any,
    ) -> Any:
        losses, *grads = gradients_op(hidden, weight, targets, row_weights, *rest)
        weighted = losses if row_weights is None else losses * row_weights
        return weighted.sum().to(losses.dtype), losses, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, _, triton, workspace = inputs[:8]
        ctx.rest = triton, workspace, *inputs[8:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        *tensors, losses, hidden_grad, weight_grad = ctx.saved_tensors
        hidden, weight = tensors[:2]
        needed = ctx.needs_input_grad
        missing = hidden_grad.ndim == 1, weight_grad.ndim == 1
        if (needed[0] and missing[0]) or (needed[1] and missing[1]):
            losses, hidden_grad, weight_grad = _computed(
                *tensors, needed[0], needed[1], *ctx.rest
            )
        grads = _scaled(grad, losses, hidden_grad, weight_grad, hidden, weight)
        hidden_grad = grads[0] if needed[0] else None
        weight_grad = grads[1] if needed[1] else None
        weights_grad = grads[2].to(tensors[3].dtype) if needed[3] else None
        return hidden_grad, weight_grad, None, weights_grad, *(None,) * 8


def _wanted(x: Tensor) -> bool:
    """Whether a derivative with respect to ``x`` is on record at any level."""
    functorch = torch._C._functorch
    while torch.is_grad_enabled() and not x.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return torch.is_grad_enabled()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    workspace_bytes: int = WORKSPACE,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""The weighted sum of ``cross_entropy(hidden @ weight.T, targets)``.

    Args:
      hidden: [N, H], floating.
      weight: [V, H], of the same dtype.
      targets: [N], integers in [0, V) or ``ignore_index``.
      row_weights: [N], floating, differentiable; None for 1.
      label_smoothing: As in ``cross_entropy``.
      z_loss: As in ``cross_entropy``.
      ignore_index: As in ``cross_entropy``.
      softcap: As in ``cross_entropy``.
      workspace_bytes: For logits; at least one row is made at a time. The gradient of
        ``weight`` is added up over chunks in float32, V H numbers on top; in the dtype
        of ``weight`` where these alone are more and there are 8 chunks at most.
      kernel: "auto" is Triton on CUDA and the same chunks in torch elsewhere;
        "reference" makes all logits at once.

    Returns:
      A scalar in float32 (float64 for float64).

    Raises:
      TypeError: As in ``cross_entropy``; two dtypes.
      ValueError: As in ``cross_entropy``; no room for workspace.
      RuntimeError: A second derivative other than by ``kernel="reference"``.

    Laws:
      ``kernel="reference"`` is the same within rounding, for any workspace.

    Examples:
      >>> hidden, weight = torch.zeros(3, 2), torch.ones(4, 2)
      >>> linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]))
      tensor(2.7726)

    References:
      Hsu et al., `Liger Kernel <https://arxiv.org/abs/2410.10989>`_, 2024 (gradients in
      the forward). Wijmans et al., `Cut Your Losses
      <https://arxiv.org/abs/2411.09009>`_, 2024.

    Differs from:
      A backward of separate layers multiplies by its cotangent before it rounds. Here
      that comes after, so a loss scale for float16 has to be in ``row_weights``.
    """
    name = "linear_cross_entropy"
    options = checked_options(name, label_smoothing, z_loss, ignore_index, softcap)
    _check(name, hidden, weight, targets, row_weights)
    check_number(name, "workspace_bytes", workspace_bytes)
    if workspace_bytes < 1:
        raise ValueError(
            f"{name}: workspace_bytes is {workspace_bytes}, expected a positive number "
            "of bytes"
        )
    triton = runs_triton(name, kernel, hidden, weight, targets, row_weights)
    if kernel == "reference":
        named = dict(zip(OPTIONS, options, strict=True))
        return linear_cross_entropy_reference(
            hidden, weight, targets, row_weights=row_weights, **named
        )
    wanted = _wanted(hidden), _wanted(weight)
    rest = *wanted, triton, int(workspace_bytes), *options
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_weights, *rest)[0]


def _check(
    name: str, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Any
) -> None:
    check_floating(name, hidden=hidden, weight=weight, row_weights=row_weights)
    check_labels(name, targets)
    if hidden.ndim != 2 or weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)} and weight "
            f"{tuple(weight.shape)}, expected [N, H] and [V, H] with V >= 1; use "
            "hidden.flatten(0, -2)"
        )
    N, H = hidden.shape
    check_shape(name, "weight", weight, (weight.shape[0], H))
    check_shape(name, "targets", targets, (N,))
    if row_weights is not None:
        check_shape(name, "row_weights", row_weights, (N,))
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name}: weight is {weight.dtype}, expected {hidden.dtype} as hidden; use "
            "weight.to(hidden.dtype)"
        )
