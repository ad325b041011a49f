# SPDX-License-Identifier: Apache-2.0
r"""Lion over lists of tensors, in one launch and one pass.

.. math::
  g &= c \, g_t \\
  u &= \mathrm{sign}(\beta_1 \mu_{t-1} + (1 - \beta_1) g) + \lambda p_{t-1} \\
  \mu_t &= \beta_2 \mu_{t-1} + (1 - \beta_2) g \\
  p_t &= p_{t-1} - \eta u

Bytes per element: with bfloat16 gradients, float32 parameters and momentum and a
bfloat16 copy of the new parameters 10 are read and 10 written.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import Kernel, define, looped, runs_triton
from .update_kernel import decayed, update, update_configurations
from .update_lists import (
    SCHEMA,
    Options,
    check_factor,
    check_lists,
    fresh,
    not_mapped,
    options_of,
    widen,
    written,
)

_OLD: Final = (0, 2)  # new p and new mu are like p and mu, of p, g, mu


class LionResult(NamedTuple):
    """What ``lion`` returns.

    Attributes:
      params: New parameters, in their dtypes.
      mu: New momentum.
      copies: The new parameters in ``copy_dtype``; empty without one.
    """

    params: list[Tensor]
    mu: list[Tensor]
    copies: list[Tensor]


def lion_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    options: Options,
    b1: float,
    b2: float,
) -> LionResult:
    """The formula, tensor by tensor.

    Args:
      params: Floating tensors.
      grads: Like them.
      mu: Like them, in float32 (float64 for float64).
      options: What all updates have.
      b1: What the momentum weighs in the update.
      b2: Decay of the momentum.
    """
    new_params, new_mu = [], []
    for p, g, m, decay in zip(params, grads, mu, options.weight_decay, strict=True):
        g = options.scaled(g)
        u = (b1 * m + (1 - b1) * g).sign()
        new_params.append(options.moved(p, u + decay * widen(p) if decay else u))
        new_mu.append(options.chosen(b2 * m + (1 - b2) * g, m))
    return LionResult(new_params, new_mu, options.copied(new_params))


@triton.jit
def _step(columns, numbers):
    p, g, m = columns
    decay, rate, coefficient, b1, rest1, b2, rest2 = numbers
    g = g * coefficient
    mixed = b1 * m + rest1 * g
    u = tl.where(mixed > 0, 1.0, tl.where(mixed < 0, -1.0, 0.0)).to(p.dtype)
    return p - rate * decayed(u, p, decay), b2 * m + rest2 * g


def _launch(
    params: Any, grads: Any, mu: Any, written_lists: Any, options: Options, *b: float
) -> None:
    numbers = [x for one in b for x in (one, 1 - one)]
    update(_step, _OLD, (params, grads, mu), written_lists, options, numbers)


def _pure(params: Any, grads: Any, mu: Any, *args: Any) -> Any:
    options, b = Options(*args[:-2]), args[-2:]
    new = _like(params, grads, mu, *args)
    _launch(params, grads, mu, [x for x in new if x], options, *b)
    return new


def _donated(params: Any, grads: Any, mu: Any, *args: Any) -> Any:
    options, b = Options(*args[:-2]), args[-2:]
    copies = options.empty_copies(params)
    _launch(params, grads, mu, [params, mu, *([copies] if copies else [])], options, *b)
    return copies


def _like(params: Any, grads: Any, mu: Any, *args: Any) -> Any:
    return fresh(params), fresh(mu), Options(*args[:-2]).empty_copies(params)


pure_op: Final = define(
    f"lion(Tensor[] params, Tensor[] grads, Tensor[] mu, {SCHEMA}, float b1, float b2) "
    "-> (Tensor[], Tensor[], Tensor[])",
    _pure,
    fake=_like,
    vmap=looped(lambda: pure_op),
)
donated_op: Final = define(
    "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mu, "
    f"{SCHEMA}, float b1, float b2) -> Tensor[]",
    _donated,
    fake=lambda params, grads, mu, *args: _like(params, grads, mu, *args)[2],
    vmap=not_mapped("lion"),
)


def lion(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    *,
    learning_rate: float | Tensor,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float | Sequence[float] = 0.0,
    coefficient: float | Tensor | None = None,
    finite: Tensor | None = None,
    copy_dtype: torch.dtype | None = None,
    donate: bool = False,
    kernel: Kernel = "auto",
) -> LionResult:
    r"""Lion's update of all parameters: one launch, one pass.

    .. math::
      p_t = p_{t-1} - \eta (\mathrm{sign}(\beta_1 \mu_{t-1} + (1 - \beta_1) c g_t)
        + \lambda p_{t-1}), \quad
      \mu_t = \beta_2 \mu_{t-1} + (1 - \beta_2) c g_t

    Args:
      params: Floating tensors on one device.
      grads: Like ``params`` in their shapes, of any dtype that is no wider than ``mu``.
      mu: The momentum: like ``params``, float32 (float64 for float64 parameters).
      learning_rate: :math:`\eta`: a number, or a 0-d tensor that is read on the device.
      b1: What the momentum weighs in the update, in [0, 1).
      b2: Decay of the momentum, in [0, 1).
      weight_decay: :math:`\lambda`: a number, or one for each parameter.
      coefficient: :math:`c`, of a clip or a loss scale: a number or a 0-d tensor.
      finite: 0-d bool: where it is false, everything stays as it was.
      copy_dtype: Also write the new parameters in this dtype.
      donate: Write over ``params`` and ``mu``, and return them.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      ``LionResult(params, mu, copies)``.

    Raises:
      TypeError: Lists, dtypes or options of another kind.
      ValueError: Other lengths or shapes; a number out of its range; two devices; a
        ``kernel`` that is not there.
      RuntimeError: A derivative of the Triton kernel; ``donate`` under ``vmap``.

    Laws:
      The bits of ``zfunc.optim.lion`` and ``apply_updates``, in every dtype. Donated or
      not, Triton or not: the same bits.

    Examples:
      >>> p, g, m = ([torch.tensor(x)] for x in ([1.0, 1.0], [5.0, -0.01], [0.0, 0.0]))
      >>> lion(p, g, m, learning_rate=0.1).params
      [tensor([0.9000, 1.1000])]

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023, algorithm 2.

    Differs from:
      DeepSpeed's ``FusedLion`` has one dtype for all lists and no copy.
    """
    check_lists("lion", params, grads, donate, mu=mu)
    check_factor("lion", "b1", b1, high=1.0, number=True)
    check_factor("lion", "b2", b2, high=1.0, number=True)
    options = options_of(
        "lion",
        len(params),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        coefficient=coefficient,
        finite=finite,
        copy_dtype=copy_dtype,
    )
    lists = list(params), list(grads), list(mu)
    triton_runs = runs_triton("lion", kernel, *params, *grads, *mu, *options[:3])
    if not (params and triton_runs):
        new = lion_reference(*lists, options, b1, b2)
        return LionResult(*written(donate, (params, mu), new[:2]), new.copies)
    if donate:
        return LionResult(*lists[::2], donated_op(*lists, *options, b1, b2))
    return LionResult(*pure_op(*lists, *options, b1, b2))


CONFIGURATIONS: Final = update_configurations("lion", _step, _OLD, reads=3, numbers=6)
