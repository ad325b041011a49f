# SPDX-License-Identifier: Apache-2.0
r"""LAMB over lists of tensors, in two passes: four launches for any number of them.

With :math:`a = (\mu_t / w_1) / (\sqrt{\nu_t / w_2} + \epsilon) + \lambda p_{t-1}` from
Adam's moments :math:`\mu_t, \nu_t` of :math:`c \, g_t`, and of each tensor

.. math::
  \phi = \mathrm{clip}(\|p_{t-1}\| / \|a\|, \text{min}, \text{max}), \qquad
  p_t = p_{t-1} - \eta \phi a

where :math:`\phi = 1` if either norm is 0. Pass 1 writes the moments and adds up the
squares of p and a, chunk by chunk; a second launch adds up the chunks of each tensor,
in a fixed order; a third makes the ratios; pass 2 computes a once more and writes p.

Bytes per element, all float32: 16 read and 8 written, then 12 read and 4 written, 40 in
all. Storing a instead would cost 8 more. With bfloat16 gradients and a bfloat16 copy
of p also 40.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lamb_kernels import (
    apply_donated_op,
    apply_op,
    moments_donated_op,
    moments_op,
    ratios_op,
)
from .lamb_reference import (
    LambMoments,
    LambParams,
    lamb_apply_reference,
    lamb_moments_reference,
    trust_ratios_reference,
)
from .library import Kernel, check_floating, check_shape, compute_dtype, runs_triton
from .update_lists import Adam, check_factor, check_lists, options_of, split, written


class LambResult(NamedTuple):
    """What ``lamb`` returns.

    Attributes:
      params: New parameters, in their dtypes.
      mu: The new means.
      nu: The new mean squares.
      copies: The new parameters in ``copy_dtype``; empty without one.
    """

    params: list[Tensor]
    mu: list[Tensor]
    nu: list[Tensor]
    copies: list[Tensor]


def lamb_moments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    *,
    weight1: float | Tensor = 1.0,
    weight2: float | Tensor = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    coefficient: float | Tensor | None = None,
    finite: Tensor | None = None,
    donate: bool = False,
    kernel: Kernel = "auto",
) -> LambMoments:
    r"""Pass 1 of ``lamb``: new moments, and the squares whose roots make the ratios.

    Ranks that hold pieces of a tensor add up ``sums``, before ``trust_ratios``.

    Args:
      params: See ``lamb``, as of all others.
      grads: Likewise.
      mu: Likewise.
      nu: Likewise.
      weight1: Likewise.
      weight2: Likewise.
      b1: Likewise.
      b2: Likewise.
      eps: Likewise.
      weight_decay: Likewise.
      coefficient: Likewise.
      finite: Likewise.
      donate: Write over ``mu`` and ``nu``, and return them.
      kernel: Likewise.

    Returns:
      ``LambMoments(mu, nu, sums)``.

    Raises:
      TypeError: See ``lamb``.
      ValueError: See ``lamb``.
      RuntimeError: See ``lamb``.

    Laws:
      The moments are those of ``zfunc.optim.scale_by_adam``, bitwise. The sums are
      within 80 roundings of the dtype.

    Examples:
      >>> p, g, m, n = ([torch.tensor([x])] for x in (3.0, 2.0, 0.0, 0.0))
      >>> lamb_moments(p, g, m, n, weight1=0.1, weight2=0.001).sums.round(decimals=4)
      tensor([[9., 1.]])
    """
    lists = list(params), list(grads), list(mu), list(nu)
    check_lists("lamb_moments", params, grads, donate, mu=mu, nu=nu)
    adam = _adam_of("lamb_moments", weight1, weight2, b1, b2, eps)
    options = options_of(
        "lamb_moments",
        len(params),
        learning_rate=0.0,
        weight_decay=weight_decay,
        coefficient=coefficient,
        finite=finite,
        copy_dtype=None,
    )
    tensors = *params, *grads, *mu, *nu, *options[:3], *adam[:2]
    if not (runs_triton("lamb_moments", kernel, *tensors) and params):
        new = lamb_moments_reference(*lists, options, adam)
        return LambMoments(*written(donate, lists[2:], new[:2]), new.sums)
    if donate:
        sums = moments_donated_op(*lists, *options, *adam)
        return LambMoments(*lists[2:], sums)
    return LambMoments(*moments_op(*lists, *options, *adam))


def _adam_of(
    name: str, weight1: Any, weight2: Any, b1: float, b2: float, eps: float
) -> Adam:
    """The checked arguments that are Adam's."""
    check_factor(name, "weight1", weight1)
    check_factor(name, "weight2", weight2)
    check_factor(name, "b1", b1, high=1.0, number=True)
    check_factor(name, "b2", b2, high=1.0, number=True)
    check_factor(name, "eps", eps, number=True)
    (one, one_at), (two, two_at) = split(weight1), split(weight2)
    return Adam(one_at, two_at, one, two, float(b1), float(b2), float(eps))


def trust_ratios(
    sums: Tensor,
    *,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""LAMB's ratios: :math:`\mathrm{clip}(\|p\| / \|a\|)`, or 1 if either norm is 0.

    Args:
      sums: [tensors, 2]: sums of squares of each parameter and of its update.
      max_coeff: The largest ratio, above 0.
      min_coeff: The least, at most ``max_coeff``.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      [tensors], in the dtype of ``sums``.

    Raises:
      TypeError: ``sums`` is no floating tensor; a bound that is not a number.
      ValueError: ``sums`` is not [tensors, 2]; bounds out of range.

    Examples:
      >>> trust_ratios(torch.tensor([[25.0, 4.0], [0.0, 1.0], [1.0, 1e-6]]))
      tensor([ 2.5000,  1.0000, 10.0000])
    """
    check_floating("trust_ratios", sums=sums)
    if sums.dim() != 2 or sums.shape[1] != 2:
        raise ValueError(
            f"trust_ratios: sums has shape {tuple(sums.shape)}, expected [tensors, 2]"
        )
    if sums.dtype != compute_dtype(sums.dtype):
        raise TypeError(f"trust_ratios: sums is {sums.dtype}, expected torch.float32")
    check_factor("trust_ratios", "max_coeff", max_coeff, number=True)
    check_factor("trust_ratios", "min_coeff", min_coeff, number=True)
    if not 0 < max_coeff >= min_coeff:
        raise ValueError(
            f"trust_ratios: min_coeff is {min_coeff!r} and max_coeff is {max_coeff!r}, "
            "expected 0 <= min_coeff <= max_coeff and max_coeff > 0; type for example "
            "max_coeff=10.0, min_coeff=0.01"
        )
    if not runs_triton("trust_ratios", kernel, sums):
        return trust_ratios_reference(sums, max_coeff, min_coeff)
    return ratios_op(sums, float(min_coeff), float(max_coeff))


def lamb_apply(
    params: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    ratios: Tensor,
    *,
    learning_rate: float | Tensor,
    weight1: float | Tensor = 1.0,
    weight2: float | Tensor = 1.0,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    finite: Tensor | None = None,
    copy_dtype: torch.dtype | None = None,
    donate: bool = False,
    kernel: Kernel = "auto",
) -> LambParams:
    r"""Pass 2 of ``lamb``: the new parameters, by the new moments and the ratios.

    Args:
      params: See ``lamb``, as of all others.
      mu: The new means, of ``lamb_moments``.
      nu: The new mean squares.
      ratios: [tensors], of ``trust_ratios``.
      learning_rate: Likewise.
      weight1: As in pass 1.
      weight2: As in pass 1.
      eps: As in pass 1.
      weight_decay: As in pass 1.
      finite: As in pass 1.
      copy_dtype: Likewise.
      donate: Write over ``params``, and return them.
      kernel: Likewise.

    Returns:
      ``LambParams(params, copies)``.

    Raises:
      TypeError: See ``lamb``.
      ValueError: See ``lamb``.
      RuntimeError: See ``lamb``.

    Laws:
      With equal ratios the bits of ``zfunc.optim.lamb`` and ``apply_updates``, where
      roots are rounded to nearest (see ``square_root``).

    Examples:
      >>> p, m, n = ([torch.tensor([x])] for x in (3.0, 2.0, 4.0))
      >>> lamb_apply(p, m, n, torch.tensor([0.5]), learning_rate=0.1).params
      [tensor([2.9500])]
    """
    lists = list(params), list(mu), list(nu)
    check_lists("lamb_apply", params, params, donate, mu=mu, nu=nu)
    check_floating("lamb_apply", ratios=ratios)
    check_shape("lamb_apply", "ratios", ratios, (len(params),))
    adam = _adam_of("lamb_apply", weight1, weight2, 0.0, 0.0, eps)
    options = options_of(
        "lamb_apply",
        len(params),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        coefficient=None,
        finite=finite,
        copy_dtype=copy_dtype,
    )
    tensors = *params, *mu, *nu, ratios, *options[:3], *adam[:2]
    if not (runs_triton("lamb_apply", kernel, *tensors) and params):
        new = lamb_apply_reference(*lists, ratios, options, adam)
        return LambParams(*written(donate, lists[:1], new[:1]), new.copies)
    if donate:
        copies = apply_donated_op(*lists, ratios, *options, *adam)
        return LambParams(lists[0], copies)
    return LambParams(*apply_op(*lists, ratios, *options, *adam))


def lamb(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    *,
    learning_rate: float | Tensor,
    weight1: float | Tensor = 1.0,
    weight2: float | Tensor = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    coefficient: float | Tensor | None = None,
    finite: Tensor | None = None,
    copy_dtype: torch.dtype | None = None,
    donate: bool = False,
    kernel: Kernel = "auto",
) -> LambResult:
    r"""LAMB's update of all parameters: two passes, four launches.

    ``lamb_moments``, ``trust_ratios``, then ``lamb_apply``: call these where ranks hold
    pieces of tensors, and add up the sums in between.

    Args:
      params: Floating tensors on one device.
      grads: Like ``params`` in their shapes, no wider than the moments.
      mu: The means: like ``params``, float32 (float64 for float64 parameters).
      nu: The mean squares, likewise.
      learning_rate: :math:`\eta`: a number, or a 0-d tensor that is read on the device.
      weight1: :math:`1 - \beta_1^t`, likewise; 1 without bias correction.
      weight2: :math:`1 - \beta_2^t`, likewise.
      b1: Decay of the mean, in [0, 1).
      b2: Decay of the mean square, in [0, 1).
      eps: Added to the denominator.
      weight_decay: :math:`\lambda`, inside of the ratio: a number, or one for each
        parameter.
      max_coeff: The largest ratio, above 0.
      min_coeff: The least, at most ``max_coeff``.
      coefficient: :math:`c`, of a clip or a loss scale: a number or a 0-d tensor.
      finite: 0-d bool: where it is false, everything stays as it was.
      copy_dtype: Also write the new parameters in this dtype.
      donate: Write over ``params``, ``mu`` and ``nu``, and return them.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      ``LambResult(params, mu, nu, copies)``.

    Raises:
      TypeError: Lists, dtypes or options of another kind.
      ValueError: Other lengths or shapes; a number out of its range; two devices; a
        ``kernel`` that is not there.
      RuntimeError: A derivative of the Triton kernel; ``donate`` under ``vmap``.

    Laws:
      The moments of ``zfunc.optim.lamb``, bitwise; its parameters, to the rounding of
      the norms. Donated or not: the same bits, and the same every time.

    Examples:
      >>> p, g, m, n = (
      ...     [torch.tensor(x)] for x in ([3.0, 4.0], [7.0, 0], [0.0, 0], [0.0, 0])
      ... )
      >>> lamb(p, g, m, n, learning_rate=0.1, weight1=0.1, weight2=0.001).params
      [tensor([2.5000, 4.0000])]

    References:
      You et al., `Large Batch Optimization for Deep Learning
      <https://arxiv.org/abs/1904.00962>`_, 2020, algorithm 2.

    Differs from:
      DeepSpeed's ``FusedLamb`` has three launches for each tensor, bias corrections in
      the learning rate alone, and reads a coefficient back to the host.
    """
    ratio_options = {"max_coeff": max_coeff, "min_coeff": min_coeff, "kernel": kernel}
    shared = {
        "weight1": weight1,
        "weight2": weight2,
        "eps": eps,
        "weight_decay": weight_decay,
        "finite": finite,
        "donate": donate,
        "kernel": kernel,
    }
    own = {"b1": b1, "b2": b2, "coefficient": coefficient}
    mu, nu, sums = lamb_moments(params, grads, mu, nu, **own, **shared)
    ratios = trust_ratios(sums, **ratio_options)
    rest = {"learning_rate": learning_rate, "copy_dtype": copy_dtype}
    new, copies = lamb_apply(params, mu, nu, ratios, **rest, **shared)
    return LambResult(new, mu, nu, copies)
