# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy in plain torch, and the checks that all its forms share."""

import math
from typing import Any, Final

import torch
from torch import Tensor

from .library import (
    batched_first,
    check_columns,
    check_floating,
    check_number,
    check_shape,
    compute_dtype,
    define,
)

OPTIONS: Final = "label_smoothing", "z_loss", "ignore_index", "softcap"


def cross_entropy_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
) -> Tensor:
    """The loss of each row in float32 at least; differentiable as often as wanted.

    Args:
      logits: [..., V].
      targets: [...], integers. On the CPU one that is out of range is an error.
      label_smoothing: Weight of the uniform distribution.
      z_loss: Weight of the squared logsumexp.
      ignore_index: The label of rows without a loss.
      softcap: None or the c of ``c * tanh(logits / c)``.
    """
    V = logits.shape[-1]
    live, known, targets = checked_labels(targets, V, ignore_index)
    x = capped(logits.to(compute_dtype(logits.dtype)), softcap)
    x = x.masked_fill(~live[..., None], 0.0)
    label = torch.where(live & known, targets, 0).long()[..., None]
    logp = x.log_softmax(-1)
    losses = (label_smoothing - 1.0) * logp.gather(-1, label)[..., 0]
    if label_smoothing:
        losses = losses - label_smoothing * logp.mean(-1)
    losses = losses + z_loss * x.logsumexp(-1).square() if z_loss else losses
    return losses.masked_fill(~known, math.nan).masked_fill(~live, 0.0)


def slopes_reference(
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
    """The gradient of ``cotangents * losses`` for the columns of one shard.

    Args:
      cotangents: [...].
      logits: [..., columns].
      targets: [...], labels of the whole vocabulary.
      logsumexp: [...], of the whole rows.
      first: The first column's label.
      size: Of the whole vocabulary.
      label_smoothing: As in the loss.
      z_loss: As in the loss.
      ignore_index: As in the loss.
      softcap: As in the loss.
    """
    live, known = targets != ignore_index, (targets >= 0) & (targets < size)
    x = capped(logits.to(compute_dtype(logits.dtype)), softcap)
    L = logsumexp.masked_fill(~known, math.nan)[..., None]
    slopes = (x - L).exp() * (1.0 + 2.0 * z_loss * L) - label_smoothing / size
    columns = torch.arange(first, first + x.shape[-1], device=x.device)
    slopes = slopes - (1.0 - label_smoothing) * (columns == targets[..., None])
    if softcap is not None:
        slopes = slopes * (1.0 - (x / softcap).square())
    slopes = slopes * cotangents[..., None]
    return slopes.masked_fill(~live[..., None], 0.0).to(logits.dtype)


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(x / softcap)``, or ``x`` for None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def _checked(targets: Tensor, size: int, ignore_index: int) -> Tensor:
    wrong = ((targets < 0) | (targets >= size)) & (targets != ignore_index)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"cross_entropy: targets{list(at)} is {targets[at].item()}, expected a "
            f"label in [0, {size}) or ignore_index={ignore_index}; set targets of rows "
            f"without a loss to {ignore_index}"
        )
    return targets.clone()


def rowwise(op: Any, results: int) -> Any:
    """The rule for ``vmap`` of an operator on rows: one more dim of rows."""

    def rule(info: Any, dims: Any, *args: Any) -> Any:
        pairs = zip(args, dims, strict=True)
        moved = [batched_first(x, dim, info.batch_size) for x, dim in pairs]
        return op()(*moved), (0,) * results if results > 1 else 0

    return rule


checked_op: Final = define(
    "cross_entropy_checked(Tensor targets, int size, int ignore_index) -> Tensor",
    _checked,
    fake=lambda targets, *_: targets.new_empty(targets.shape),
    vmap=rowwise(lambda: checked_op, 1),
)


def checked_labels(
    targets: Tensor, size: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows have a loss, which labels are in range, and the labels.

    Raises:
      ValueError: On the CPU, when it runs: the first label that is out of range.
    """
    if targets.device.type == "cpu":
        targets = checked_op(targets, size, ignore_index)
    live, known = targets != ignore_index, (targets >= 0) & (targets < size)
    return live, known, targets


def checked_options(
    name: str,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float | None,
) -> tuple[float, float, int, float | None]:
    """The options as an operator takes them.

    Raises:
      TypeError: One that is no number.
      ValueError: One that is out of range.
    """
    check_number(name, "label_smoothing", label_smoothing)
    check_number(name, "z_loss", z_loss)
    check_number(name, "ignore_index", ignore_index)
    if softcap is not None:
        check_number(name, "softcap", softcap)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"{name}: label_smoothing is {label_smoothing}, expected a number in [0, 1]"
        )
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(
            f"{name}: z_loss is {z_loss}, expected a number of at least 0; 0.0 is off"
        )
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(
            f"{name}: softcap is {softcap}, expected a positive number; None is off"
        )
    if ignore_index != int(ignore_index):
        raise ValueError(
            f"{name}: ignore_index is {ignore_index}, expected a label, such as -100"
        )
    cap = None if softcap is None else float(softcap)
    return float(label_smoothing), float(z_loss), int(ignore_index), cap


def check_labels(name: str, targets: Tensor) -> None:
    """Raise unless targets are integers.

    Raises:
      TypeError: They are something else.
    """
    dtype = getattr(targets, "dtype", torch.bool)
    if dtype == torch.bool or dtype.is_floating_point or dtype.is_complex:
        got = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(
            f"{name}: targets is {got}, expected a tensor of integers; use "
            "targets.long()"
        )


def check_rows(name: str, logits: Tensor, targets: Tensor) -> None:
    """Raise unless there is a label for each row of logits.

    Raises:
      TypeError: Logits that are not floating, targets that are not integers.
      ValueError: Shapes that do not fit; no classes.
    """
    check_floating(name, logits=logits)
    check_labels(name, targets)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name}: logits has shape {tuple(logits.shape)}, expected [..., V] with "
            "V >= 1"
        )
    check_columns(name, "logits", logits)
    check_shape(name, "targets", targets, tuple(logits.shape[:-1]))
