# SPDX-License-Identifier: Apache-2.0
r"""Gradient descent with momentum over lists of tensors, in one launch and one pass.

.. math::
  g &= c \, g_t + \lambda p_{t-1} \\
  b_t &= \mu b_{t-1} + d g \\
  p_t &= p_{t-1} - \eta \, (g + \mu b_t \text{ if nesterov, else } b_t)

Bytes per element: with bfloat16 gradients, float32 parameters and trace and a bfloat16
copy of the new parameters 10 are read and 10 written; without momentum 6 and 6.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl  # noqa: F401 - Triton's interpreter looks for it
from torch import Tensor

from .library import Kernel, define, looped, runs_triton
from .update_kernel import decayed, update, update_configurations
from .update_lists import (
    SCHEMA,
    Options,
    check_factor,
    check_lists,
    fresh,
    joined,
    not_mapped,
    options_of,
    split,
    widen,
    written,
)


class SGDResult(NamedTuple):
    """What ``sgd`` returns.

    Attributes:
      params: New parameters, in their dtypes.
      trace: The new trace; empty without momentum.
      copies: The new parameters in ``copy_dtype``; empty without one.
    """

    params: list[Tensor]
    trace: list[Tensor]
    copies: list[Tensor]


class Momentum(NamedTuple):
    """How the trace is made: the last arguments of the operators.

    Attributes:
      momentum_at: The momentum, where it is a 0-d tensor.
      gain_at: The gain, where it is one.
      momentum: The momentum, where it is a number.
      gain: The gain, where it is one.
      nesterov: Whether to look ahead along the new trace.
    """

    momentum_at: Tensor | None
    gain_at: Tensor | None
    momentum: float
    gain: float
    nesterov: bool


def sgd_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    trace: Sequence[Tensor],
    options: Options,
    how: Momentum,
) -> SGDResult:
    """The formula, tensor by tensor.

    Args:
      params: Floating tensors.
      grads: Like them.
      trace: Like them, in float32 (float64 for float64); empty without momentum.
      options: What all updates have.
      how: What the trace is made by.
    """
    new_params, new_trace = [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        u = options.scaled(g)
        if decay := options.weight_decay[i]:
            u = u + decay * widen(p)
        if trace:
            mu = joined(how.momentum, how.momentum_at, u.dtype)
            b = mu * trace[i] + joined(how.gain, how.gain_at, u.dtype) * u
            u = u + mu * b if how.nesterov else b
            new_trace.append(options.chosen(b, trace[i]))
        new_params.append(options.moved(p, u))
    return SGDResult(new_params, new_trace, options.copied(new_params))


@triton.jit
def _plain(columns, numbers):
    p, g = columns
    decay, rate, coefficient, _, _ = numbers
    return (p - rate * decayed(g * coefficient, p, decay),)


@triton.jit
def _heavy(columns, numbers):
    p, g, b = columns
    decay, rate, coefficient, momentum, gain = numbers
    b = momentum * b + gain * decayed(g * coefficient, p, decay)
    return p - rate * b, b


@triton.jit
def _ahead(columns, numbers):
    p, g, b = columns
    decay, rate, coefficient, momentum, gain = numbers
    g = decayed(g * coefficient, p, decay)
    b = momentum * b + gain * g
    return p - rate * (g + momentum * b), b


def _launch(lists: Any, targets: Any, options: Options, how: Momentum) -> None:
    step = (_ahead if how.nesterov else _heavy) if lists[2] else _plain
    update(
        step,
        (0, 2) if lists[2] else (0,),
        [x for x in lists if x],
        [x for x in targets if x],
        options,
        (how.momentum, how.gain),
        (how.momentum_at, how.gain_at),
    )


def _like(params: Any, grads: Any, trace: Any, *args: Any) -> Any:
    return fresh(params), fresh(trace), Options(*args[:-5]).empty_copies(params)


def _pure(params: Any, grads: Any, trace: Any, *args: Any) -> Any:
    new = _like(params, grads, trace, *args)
    _launch((params, grads, trace), new, Options(*args[:-5]), Momentum(*args[-5:]))
    return new


def _donated(params: Any, grads: Any, trace: Any, *args: Any) -> Any:
    options = Options(*args[:-5])
    new = params, trace, options.empty_copies(params)
    _launch((params, grads, trace), new, options, Momentum(*args[-5:]))
    return new[2]


_HOW: Final = (
    "Tensor? momentum_at, Tensor? gain_at, float momentum, float gain, bool nesterov"
)
pure_op: Final = define(
    f"sgd(Tensor[] params, Tensor[] grads, Tensor[] trace, {SCHEMA}, {_HOW}) "
    "-> (Tensor[], Tensor[], Tensor[])",
    _pure,
    fake=_like,
    vmap=looped(lambda: pure_op),
)
donated_op: Final = define(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] trace, "
    f"{SCHEMA}, {_HOW}) -> Tensor[]",
    _donated,
    fake=lambda *args: _like(*args)[2],
    vmap=not_mapped("sgd"),
)


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    trace: Sequence[Tensor] = (),
    *,
    learning_rate: float | Tensor,
    momentum: float | Tensor = 0.0,
    gain: float | Tensor = 1.0,
    nesterov: bool = False,
    weight_decay: float | Sequence[float] = 0.0,
    coefficient: float | Tensor | None = None,
    finite: Tensor | None = None,
    copy_dtype: torch.dtype | None = None,
    donate: bool = False,
    kernel: Kernel = "auto",
) -> SGDResult:
    r"""Gradient descent on all parameters: one launch, one pass.

    With :math:`g = c \, g_t + \lambda p_{t-1}`:

    .. math::
      b_t = \mu b_{t-1} + d g, \quad
      p_t = p_{t-1} - \eta \, (g + \mu b_t \text{ if nesterov, else } b_t)

    Args:
      params: Floating tensors on one device.
      grads: Like ``params`` in their shapes, no wider than float32 (float64 for
        float64 parameters).
      trace: Like ``params``, in float32 (float64 for float64); empty without momentum,
        where :math:`b_t` is g.
      learning_rate: :math:`\eta`: a number, or a 0-d tensor that is read on the device.
      momentum: :math:`\mu`, likewise.
      gain: :math:`d`, likewise: 1, and 1 - dampening after the first update.
      nesterov: Look ahead along the new trace.
      weight_decay: :math:`\lambda`: a number, or one for each parameter.
      coefficient: :math:`c`, of a clip or a loss scale: a number or a 0-d tensor.
      finite: 0-d bool: where it is false, everything stays as it was.
      copy_dtype: Also write the new parameters in this dtype.
      donate: Write over ``params`` and ``trace``, and return them.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      ``SGDResult(params, trace, copies)``.

    Raises:
      TypeError: Lists, dtypes or options of another kind.
      ValueError: Other lengths or shapes; a number out of its range; momentum without
        a trace; two devices; a ``kernel`` that is not there.
      RuntimeError: A derivative of the Triton kernel; ``donate`` under ``vmap``.

    Laws:
      The bits of ``zfunc.optim.sgd`` and ``apply_updates``, in every dtype. Donated or
      not, Triton or not: the same bits.

    Examples:
      >>> p, g, b = ([torch.tensor([x])] for x in (1.0, 1.0, 1.0))
      >>> sgd(p, g, b, learning_rate=0.1, momentum=0.9).params
      [tensor([0.8100])]

    References:
      Sutskever et al., `On the importance of initialization and momentum
      <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.

    Differs from:
      ``torch.optim.SGD``'s fused kernel has one dtype for all lists and no copy, and
      keeps no trace before the first update.
    """
    moments = {"trace": trace} if isinstance(trace, Tensor) or len(trace) else {}
    check_lists("sgd", params, grads, donate, **moments)
    check_factor("sgd", "momentum", momentum)
    check_factor("sgd", "gain", gain)
    if not isinstance(nesterov, bool):
        got = type(nesterov).__name__
        raise TypeError(f"sgd: nesterov is {got}, expected True or False")
    if params and not moments and (nesterov or not _is_zero(momentum)):
        raise ValueError(
            f"sgd: momentum={momentum!r}, nesterov={nesterov} without a trace, "
            "expected one of zeros like params before the first update; pass trace, "
            "or momentum=0.0"
        )
    options = options_of(
        "sgd",
        len(params),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        coefficient=coefficient,
        finite=finite,
        copy_dtype=copy_dtype,
    )
    (mu, mu_at), (factor, factor_at) = split(momentum), split(gain)
    how = Momentum(mu_at, factor_at, mu, factor, nesterov)
    lists = list(params), list(grads), list(trace)
    tensors = *lists[0], *lists[1], *lists[2], *options[:3], mu_at, factor_at
    if not (runs_triton("sgd", kernel, *tensors) and params):
        new = sgd_reference(*lists, options, how)
        return SGDResult(*written(donate, lists[::2], new[:2]), new.copies)
    if donate:
        return SGDResult(*lists[::2], donated_op(*lists, *options, *how))
    return SGDResult(*pure_op(*lists, *options, *how))


def _is_zero(momentum: float | Tensor) -> bool:
    return not isinstance(momentum, Tensor) and momentum == 0


CONFIGURATIONS: Final = (
    *update_configurations("sgd/plain", _plain, (0,), reads=2, numbers=4),
    *update_configurations("sgd/heavy", _heavy, (0, 2), reads=3, numbers=4),
    *update_configurations("sgd/nesterov", _ahead, (0, 2), reads=3, numbers=4),
)
