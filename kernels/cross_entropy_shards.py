# SPDX-License-Identifier: Apache-2.0
r"""Cross-entropy over a vocabulary in shards; the collectives are the caller's.

A rank holds the columns [first, first + V / ranks) of each row of logits. With
:math:`m_r, s_r, a_r, t_r` its maximum, its sum of :math:`e^{x - m_r}`, its logit at the
label (0 where another rank has it) and its sum of logits,

.. math::
  m = \max_r m_r, \quad L = m + \log \sum_r s_r e^{m_r - m}, \quad
  \ell = L - (1 - \epsilon) \sum_r a_r - \frac{\epsilon}{V} \sum_r t_r + \zeta L^2

and the gradient needs L alone. Bytes per logit, in elements of the dtype: statistics
1 read (2 B in bfloat16), gradient 1 read and 1 written (4 B); 16 B per row on the wire.
"""

import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .configuration import Configuration, pointer
from .cross_entropy import row_settings, slopes_op
from .cross_entropy_kernels import statistics_kernel
from .cross_entropy_reference import (
    capped,
    check_rows,
    checked_labels,
    checked_options,
    rowwise,
    slopes_reference,
)
from .library import (
    Kernel,
    check_floating,
    check_shape,
    compute_dtype,
    define,
    runs_triton,
)


class Statistics(NamedTuple):
    """What a shard gives to the losses of its rows; [...] each, float32 at least.

    Attributes:
      maximum: Over the ranks, the maximum.
      weight: The sum of ``exp(logits - maximum)``; over the ranks, the sum after
        ``weight * exp(maximum - the maximum of all)``.
      at_label: The logit at the label, or 0; over the ranks, the sum.
      total: The sum of the logits; over the ranks, the sum.
    """

    maximum: Tensor
    weight: Tensor
    at_label: Tensor
    total: Tensor


def statistics_reference(
    logits: Tensor,
    targets: Tensor,
    first: int,
    ignore_index: int,
    softcap: float | None,
) -> Statistics:
    """The four in plain torch; rows to ignore give (-inf, 0, 0, 0).

    Args:
      logits: [..., columns].
      targets: [...], labels of the whole vocabulary.
      first: The first column's label.
      ignore_index: The label of rows without a loss.
      softcap: None or the c of ``c * tanh(logits / c)``.
    """
    live = targets != ignore_index
    x = capped(logits.to(compute_dtype(logits.dtype)), softcap)
    maximum = x.amax(-1).masked_fill(~live, -math.inf)
    finite = maximum.masked_fill(maximum == -math.inf, 0.0)
    here = live & (targets >= first) & (targets < first + x.shape[-1])
    label = torch.where(here, targets - first, 0).long()[..., None]
    sums = (x - finite[..., None]).exp().sum(-1), x.sum(-1)
    weight, total = (s.masked_fill(~live, 0.0) for s in sums)
    at_label = x.gather(-1, label)[..., 0].masked_fill(~here, 0.0)
    return Statistics(maximum, weight, at_label, total)


def _statistics(
    logits: Tensor,
    targets: Tensor,
    first: int,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    logits = logits.contiguous()
    results = _empty(logits, targets)
    if targets.numel():
        settings = row_settings(logits, ignore_index, softcap)
        statistics_kernel[targets.numel(),](
            logits, targets.contiguous(), *results, logits.shape[-1], first, **settings
        )
    return results


def _empty(logits: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, ...]:
    wide = compute_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=wide) for _ in range(4))


statistics_op: Final = define(
    "cross_entropy_statistics(Tensor logits, Tensor targets, int first, "
    "int ignore_index, float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    _statistics,
    fake=_empty,
    vmap=rowwise(lambda: statistics_op, 4),
)


def cross_entropy_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    ignore_index: int = -100,
    softcap: float | None = None,
    kernel: Kernel = "auto",
) -> Statistics:
    """What this shard of the vocabulary gives to the losses.

    Args:
      logits: [..., columns of this rank], floating.
      targets: [...], integers: labels of the whole vocabulary, the same on all ranks.
      vocab_start: The label of the first column.
      ignore_index: Rows with this label have loss 0.
      softcap: As in ``cross_entropy``.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      Four tensors to combine over the ranks, as their names say. Their
      gradient is not for use: take ``cross_entropy_shard_gradient``.

    Raises:
      TypeError: As in ``cross_entropy``.
      ValueError: As in ``cross_entropy``; a negative ``vocab_start``.
      RuntimeError: A derivative of the Triton kernel.

    Laws:
      Those of all shards, combined, are those of the whole row within rounding.

    Examples:
      >>> shards = [
      ...     cross_entropy_statistics(
      ...         torch.zeros(1, 2), torch.tensor([3]), vocab_start=start
      ...     )
      ...     for start in (0, 2)
      ... ]
      >>> combined = Statistics(
      ...     shards[0].maximum, *(a + b for a, b in zip(*(s[1:] for s in shards)))
      ... )
      >>> losses, logsumexp = losses_of_statistics(
      ...     combined, torch.tensor([3]), vocab_size=4
      ... )
      >>> losses
      tensor([1.3863])

    References:
      Shoeybi et al., `Megatron-LM <https://arxiv.org/abs/1909.08053>`_, 2019.
    """
    name = "cross_entropy_statistics"
    *_, ignore_index, softcap = checked_options(name, 0.0, 0.0, ignore_index, softcap)
    check_rows(name, logits, targets)
    _check_start(name, vocab_start)
    rest = vocab_start, ignore_index, softcap
    if runs_triton(name, kernel, logits, targets):
        return Statistics(*statistics_op(logits, targets, *rest))
    return statistics_reference(logits, targets, *rest)


def losses_of_statistics(
    combined: Statistics,
    targets: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps from statistics of the whole rows.

    Args:
      combined: Over all ranks, ``weight`` relative to the maximum of all.
      targets: [...].
      vocab_size: Of all ranks together.
      label_smoothing: As in ``cross_entropy``.
      z_loss: As in ``cross_entropy``.
      ignore_index: As in ``cross_entropy``.

    Returns:
      Losses, and what ``cross_entropy_shard_gradient`` wants. A label out of range is
      an error on the CPU and NaN elsewhere.

    Raises:
      ValueError: Options out of range; on the CPU, a label out of range.

    Laws:
      Of one shard, the loss of ``cross_entropy`` within rounding.

    Examples:
      >>> one = Statistics(*(torch.tensor([x]) for x in (0.0, 2.0, 0.0, 0.0)))
      >>> losses_of_statistics(one, torch.tensor([1]), vocab_size=2)[0]
      tensor([0.6931])
    """
    name = "losses_of_statistics"
    smoothing, z, ignored, _ = checked_options(
        name, label_smoothing, z_loss, ignore_index, None
    )
    live, known, _ = checked_labels(targets, vocab_size, ignored)
    maximum, weight, at_label, total = combined
    maximum = maximum.masked_fill(~live, 0.0)
    logarithm = weight.masked_fill(~live, 1.0).log()
    logsumexp = maximum + logarithm
    losses = logarithm + (1.0 - smoothing) * (maximum - at_label)
    if smoothing:
        losses = losses + smoothing * (maximum - total / vocab_size)
    losses = losses + z * logsumexp.square() if z else losses
    return losses.masked_fill(~known, math.nan).masked_fill(~live, 0.0), logsumexp


def cross_entropy_shard_gradient(
    cotangents: Tensor,
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    softcap: float | None = None,
    kernel: Kernel = "auto",
) -> Tensor:
    """The gradient of ``(cotangents * losses).sum()`` for the columns of this rank.

    Args:
      cotangents: [...], floating, the same on all ranks.
      logits: [..., columns of this rank].
      targets: [...], labels of the whole vocabulary.
      logsumexp: [...], of the whole rows: from ``losses_of_statistics``.
      vocab_start: The label of the first column.
      vocab_size: Of all ranks together.
      label_smoothing: As in ``cross_entropy``.
      z_loss: As in ``cross_entropy``.
      ignore_index: As in ``cross_entropy``.
      softcap: As in ``cross_entropy``.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``logits``, rounded once.

    Raises:
      TypeError: As in ``cross_entropy``.
      ValueError: As in ``cross_entropy``; columns beyond ``vocab_size``.
      RuntimeError: A derivative of the Triton kernel.

    Laws:
      The gradients of all shards, side by side, are that of the whole row.

    Examples:
      >>> cross_entropy_shard_gradient(
      ...     torch.ones(1),
      ...     torch.zeros(1, 2),
      ...     torch.tensor([3]),
      ...     torch.tensor([4.0]).log(),
      ...     vocab_start=2,
      ...     vocab_size=4,
      ... )
      tensor([[ 0.2500, -0.7500]])
    """
    name = "cross_entropy_shard_gradient"
    options = checked_options(name, label_smoothing, z_loss, ignore_index, softcap)
    check_rows(name, logits, targets)
    check_floating(name, cotangents=cotangents, logsumexp=logsumexp)
    for argument, x in (("cotangents", cotangents), ("logsumexp", logsumexp)):
        check_shape(name, argument, x, tuple(targets.shape))
    _check_start(name, vocab_start)
    if vocab_start + logits.shape[-1] > vocab_size:
        raise ValueError(
            f"{name}: columns [{vocab_start}, {vocab_start + logits.shape[-1]}), "
            f"expected within [0, {vocab_size}); pass vocab_size of all ranks together"
        )
    args = cotangents, logits, targets, logsumexp, vocab_start, vocab_size, *options
    if runs_triton(name, kernel, *args[:4]):
        return slopes_op(*args)
    return slopes_reference(*args)


def _check_start(name: str, vocab_start: int) -> None:
    if vocab_start < 0:
        raise ValueError(
            f"{name}: vocab_start is {vocab_start}, expected the label of the first "
            "column, at least 0"
        )


CONFIGURATIONS: Final = tuple(
    Configuration(
        f"cross_entropy_statistics/forward/{pointer(dtype)[1:]}/32768",
        statistics_kernel,
        {
            "logits_ptr": pointer(dtype),
            "targets_ptr": pointer(torch.int64),
            "cols": "i32",
            "first": "i32",
        }
        | dict.fromkeys(
            ("tops_ptr", "weights_ptr", "at_labels_ptr", "totals_ptr"),
            pointer(torch.float32),
        ),
        settings,
        num_warps,
        divisible=("cols", "first"),
        # The label and its logit are read, four numbers written.
        narrow=6,
    )
    for dtype in (torch.bfloat16, torch.float32)
    for settings in [
        row_settings(torch.empty(0, 32768, dtype=dtype, device="meta"), -100, None)
    ]
    for num_warps in [settings.pop("num_warps")]
)
