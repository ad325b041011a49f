# SPDX-License-Identifier: Apache-2.0
r"""AdamW and Adam: one pass over all tensors, with everything around it folded in.

With the coefficient c of a clip or loss scale, the bias corrections w, and the decay
:math:`\lambda`, which is coupled (:math:`\lambda_c`) or not (:math:`\lambda_d`):

.. math::
  g &= c \, g_t + \lambda_c p_{t-1} \\
  \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1) g, \quad
  \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2) g^2 \\
  p_t &= p_{t-1} - \eta \Bigl( \frac{\mu_t / w_1}{\sqrt{\nu_t / w_2} + \epsilon}
  + \lambda_d p_{t-1} \Bigr)

Every operation is rounded to float32 (float64 for float64) in this order, so Triton,
C++ and torch give the same bits; the root is ``square_root``.

Bytes per element with float32 p, :math:`\mu` and :math:`\nu`, a bfloat16 gradient and
a bfloat16 copy of the new parameters: 14 are read and 14 written. With a float32
gradient and no copy it is 16 and 12.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import adamw_cpu
from .adamw_kernel import update
from .library import (
    Kernel,
    at_once,
    check_floating,
    check_shape,
    define,
    looped,
    runs_triton,
)
from .square_root import square_root
from .update_lists import (
    SCHEMA,
    Options,
    check_apart,
    check_factor,
    check_lists,
    divisor,
    fresh,
    not_mapped,
    options_of,
    split,
    widen,
    written,
)


class AdamWResult(NamedTuple):
    """What ``adamw`` returns.

    Attributes:
      params: New parameters, in their dtypes.
      mu: New means of the gradients.
      nu: New means of their squares.
      copies: The new parameters in ``copy_dtype``; empty without one.
    """

    params: list[Tensor]
    mu: list[Tensor]
    nu: list[Tensor]
    copies: list[Tensor]


class Moments(NamedTuple):
    """How the moments are made: the last arguments of the operators.

    Attributes:
      weight1_at: The bias correction of mu, where it is a 0-d tensor.
      weight2_at: That of nu, where it is one.
      b1_at: The decay of mu, where it is one.
      weight1: Where it is a number.
      weight2: Where it is a number.
      b1: Where it is a number.
      b2: The decay of nu.
      eps: Added to the root.
      coupled: Whether the weight decay goes through the moments.
      kernel: As ``adamw`` was called.
    """

    weight1_at: Tensor | None
    weight2_at: Tensor | None
    b1_at: Tensor | None
    weight1: float
    weight2: float
    b1: float
    b2: float
    eps: float
    coupled: bool
    kernel: str


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    options: Options,
    how: Moments,
) -> AdamWResult:
    """The formula, tensor by tensor.

    Args:
      params: Floating tensors.
      grads: Like them.
      mu: Like them, in float32 (float64 for float64).
      nu: Likewise.
      options: What all updates have.
      how: What the moments are made by.
    """
    new: tuple[list[Tensor], ...] = ([], [], [])
    tensors = zip(params, grads, mu, nu, options.weight_decay, strict=True)
    for p, g, m, n, decay in tensors:
        g = options.scaled(g)
        if how.coupled and decay:
            g = g + decay * widen(p)
        keep = how.b1 if how.b1_at is None else how.b1_at.double()
        b1, rest1 = (
            x.to(m.dtype) if isinstance(x, Tensor) else x for x in (keep, 1 - keep)
        )
        mean = b1 * m + rest1 * g
        square = how.b2 * n + (1 - how.b2) * g.square()
        under = square_root(square / divisor(how.weight2, how.weight2_at, n))
        u = mean / divisor(how.weight1, how.weight1_at, m) / (under + how.eps)
        if how.eps == 0:
            u = torch.where(mean == 0, mean, u)
        if decay and not how.coupled:
            u = u + decay * widen(p)
        new[0].append(options.moved(p, u))
        new[1].append(options.chosen(mean, m))
        new[2].append(options.chosen(square, n))
    return AdamWResult(*new, options.copied(new[0]))


def _launch(lists: Any, targets: Any, options: Options, how: Moments) -> None:
    """Write the targets: by Triton, by C++ where that is worth it, or by torch."""
    targets = [x for x in targets if x]
    values = options.learning_rate, options.factor, how.weight1, how.weight2
    tensors = options.rate, options.coefficient, how.weight1_at, how.weight2_at
    if not runs_triton("adamw", how.kernel, *lists[0]):
        if not _by_cpp(lists, targets, options, how, values, tensors):
            new = adamw_reference(*lists, options, how)
            written(True, targets, [x for x in new if x])
        return
    numbers = (*values, how.b1, 1 - how.b1, how.b2, 1 - how.b2, how.eps)
    update(lists, targets, options, numbers, (*tensors, how.b1_at), how.coupled)


def _by_cpp(
    lists: Any, targets: Any, options: Options, how: Moments, values: Any, tensors: Any
) -> bool:
    if options.finite is not None and not bool(options.finite):
        return False
    pairs = zip((*values, how.b1), (*tensors, how.b1_at), strict=True)
    numbers = [x if at is None else float(at) for x, at in pairs]
    numbers += [1 - numbers[-1], how.b2, 1 - how.b2, how.eps]
    decay = options.weight_decay
    return adamw_cpu.run(lists, targets, decay, numbers, how.coupled)


def _like(params: Any, grads: Any, mu: Any, nu: Any, _: Any, *args: Any) -> Any:
    copies = Options(*args[:-10]).empty_copies(params)
    return [*fresh(params), *fresh(mu), *fresh(nu), *copies]


def _pure(params: Any, grads: Any, mu: Any, nu: Any, _: Any, *args: Any) -> Any:
    new, n = _like(params, grads, mu, nu, _, *args), len(params)
    targets = [new[at : at + n] for at in range(0, len(new), max(n, 1))]
    how = Moments(*args[-10:])
    _launch((params, grads, mu, nu), targets, Options(*args[:-10]), how)
    return new


def _donated(params: Any, grads: Any, mu: Any, nu: Any, copies: Any, *args: Any) -> Any:
    options = Options(*args[:-10])
    new = [] if copies else options.empty_copies(params)
    targets = params, mu, nu, copies or new
    _launch((params, grads, mu, nu), targets, options, Moments(*args[-10:]))
    return new


def _like_new(
    params: Any, grads: Any, mu: Any, nu: Any, copies: Any, *args: Any
) -> Any:
    return [] if copies else Options(*args[:-10]).empty_copies(params)


_HOW: Final = (
    "Tensor? weight1_at, Tensor? weight2_at, Tensor? b1_at, float weight1, "
    "float weight2, float b1, float b2, float eps, bool coupled, str kernel"
)
# The first returns new params, mu, nu and copies, in one list; the second writes over
# these four, and returns the copies if there were none.
pure_op: Final = define(
    "adamw(Tensor[] params, Tensor[] grads, Tensor[] mu, Tensor[] nu, "
    f"Tensor[] copies, {SCHEMA}, {_HOW}) -> Tensor[]",
    _pure,
    fake=_like,
    vmap=looped(lambda: pure_op),
)
donated_op: Final = define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] mu, Tensor(c!)[] nu, "
    f"Tensor(d!)[] copies, {SCHEMA}, {_HOW}) -> Tensor[]",
    _donated,
    fake=_like_new,
    vmap=not_mapped("adamw"),
)
_pure_now: Final = at_once(pure_op, _pure)
_donated_now: Final = at_once(donated_op, _donated)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    *,
    learning_rate: float | Tensor,
    weight1: float | Tensor,
    weight2: float | Tensor,
    b1: float | Tensor = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.01,
    coupled: bool = False,
    coefficient: float | Tensor | None = None,
    finite: Tensor | None = None,
    copy_dtype: torch.dtype | None = None,
    copies: Sequence[Tensor] = (),
    donate: bool = False,
    kernel: Kernel = "auto",
) -> AdamWResult:
    r"""AdamW (or Adam) on all parameters: one launch, one pass.

    With :math:`g = c \, g_t` (coupled: :math:`c \, g_t + \lambda p_{t-1}`):

    .. math::
      \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1) g, \quad
      \nu_t = \beta_2 \nu_{t-1} + (1 - \beta_2) g^2 \\
      p_t &= p_{t-1} - \eta \Bigl( \frac{\mu_t / w_1}{\sqrt{\nu_t / w_2} + \epsilon}
      + \lambda p_{t-1} \text{ if not coupled} \Bigr)

    Args:
      params: Floating tensors on one device.
      grads: Like ``params`` in their shapes, no wider than float32 (float64 for
        float64 parameters).
      mu: Like ``params``, in float32 (float64 for float64).
      nu: Likewise.
      learning_rate: :math:`\eta`: a number, or a 0-d tensor that is read on the device.
      weight1: :math:`w_1 = 1 - \beta_1^t`, likewise, above 0.
      weight2: :math:`w_2 = 1 - \beta_2^t`, likewise.
      b1: :math:`\beta_1` in [0, 1), likewise.
      b2: :math:`\beta_2` in [0, 1).
      eps: :math:`\epsilon`, at least 0; with 0 a mean of 0 moves nothing.
      weight_decay: :math:`\lambda`: a number, or one for each parameter.
      coupled: Adam: the decay is a part of the gradient.
      coefficient: :math:`c`, of a clip or a loss scale: a number or a 0-d tensor.
      finite: 0-d bool: where it is false, everything stays as it was.
      copy_dtype: Also write the new parameters in this dtype.
      copies: The old copies, in the place of ``copy_dtype``: memory for the new ones
        where it is donated. What is in them does not matter.
      donate: Write over ``params``, ``mu``, ``nu`` and ``copies``, and return them.
      kernel: "auto" is Triton on CUDA; on a CPU one pass in C++ for 2^20 elements or
        more where a compiler is found, else torch.

    Returns:
      ``AdamWResult(params, mu, nu, copies)``.

    Raises:
      TypeError: Lists, dtypes or options of another kind.
      ValueError: Other lengths or shapes; a number out of its range; two devices; a
        ``kernel`` that is not there.
      RuntimeError: A derivative of a kernel; ``donate`` of a kernel under ``vmap``.

    Laws:
      The bits of ``zfunc.optim.adamw`` (``adam``, with a clip) and ``apply_updates``
      where torch's square root is rounded to nearest, as on CUDA. Donated or not,
      Triton, C++ or torch: the same bits.

    Examples:
      >>> lists = ([torch.tensor([x])] for x in (1.0, 5.0, 0.0, 0.0))
      >>> adamw(*lists, learning_rate=0.1, weight1=0.1, weight2=0.001).params
      [tensor([0.8990])]

    References:
      Loshchilov and Hutter, `Decoupled Weight Decay Regularization
      <https://arxiv.org/abs/1711.05101>`_, 2019.

    Differs from:
      ``torch._fused_adamw_`` has one dtype for all lists, no coefficient and no copy,
      and counts steps itself.
    """
    check_lists("adamw", params, grads, donate, mu=mu, nu=nu)
    copy_dtype = _copy_dtype(params, copies, copy_dtype)
    for name, value in (("weight1", weight1), ("weight2", weight2)):
        check_factor("adamw", name, value)
        if not isinstance(value, Tensor) and value == 0:
            raise ValueError(
                f"adamw: {name} is 0, expected 1 - b{name[-1]}**t after t >= 1 updates"
            )
    check_factor("adamw", "b1", b1, high=1.0)
    check_factor("adamw", "b2", b2, high=1.0, number=True)
    check_factor("adamw", "eps", eps, number=True)
    if not isinstance(coupled, bool):
        got = type(coupled).__name__
        raise TypeError(f"adamw: coupled is {got}, expected True or False")
    options = options_of(
        "adamw",
        len(params),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        coefficient=coefficient,
        finite=finite,
        copy_dtype=copy_dtype,
    )
    how = _moments(weight1, weight2, b1, b2, eps, coupled, kernel)
    lists = list(params), list(grads), list(mu), list(nu), list(copies)
    if donate:
        check_apart("adamw", [x for i in (0, 2, 3, 4) for x in lists[i]])
    tensors = [x for some in lists for x in some] + [*options[:3], *how[:3]]
    by_triton, n = runs_triton("adamw", kernel, *tensors), len(params)
    if not (n and (by_triton or (kernel == "auto" and _many(tensors, n)))):
        new = adamw_reference(*lists[:4], options, how)
        old = lists[0], lists[2], lists[3], lists[4] or new.copies
        return AdamWResult(*written(donate, old, new))
    if donate:
        made = _donated_now(*lists, *options, *how)
        return AdamWResult(lists[0], *lists[2:4], lists[4] or made)
    new = _pure_now(*lists, *options, *how)
    return AdamWResult(*(new[at : at + n] for at in range(0, 4 * n, n)))


def _copy_dtype(params: Any, copies: Any, dtype: Any) -> Any:
    """The dtype of the copies, which are like the parameters if there are any."""
    if not isinstance(copies, (list, tuple)) or len(copies) not in (0, len(params)):
        got = type(copies).__name__
        got += f" of {len(copies)}" if isinstance(copies, (list, tuple)) else ""
        raise TypeError(
            f"adamw: copies is {got}, expected a list of {len(params)} tensors like "
            "params; leave it out, or pass those of the last update"
        )
    for i, (x, p) in enumerate(zip(copies, params, strict=False)):
        if x is None:
            raise TypeError(f"adamw: copies[{i}] is None, expected a tensor")
        check_floating("adamw", **{f"copies[{i}]": x})
        check_shape("adamw", f"copies[{i}]", x, tuple(p.shape))
        dtype = x.dtype if dtype is None else dtype
        if x.dtype != dtype:
            raise TypeError(
                f"adamw: copies[{i}] is {x.dtype}, expected {dtype} as copy_dtype and "
                f"the others; pass copies[{i}].to({dtype})"
            )
    return dtype


def _moments(weight1: Any, weight2: Any, b1: Any, *others: Any) -> Moments:
    (w1, w1_at), (w2, w2_at), (keep, keep_at) = map(split, (weight1, weight2, b1))
    return Moments(w1_at, w2_at, keep_at, w1, w2, keep, *others)


def _many(tensors: Sequence[Tensor | None], n: int) -> bool:
    """Whether CPU tensors are worth a compiled pass, which nothing differentiates."""
    if (
        any(x is not None and x.requires_grad for x in tensors)
        and torch.is_grad_enabled()
    ):
        return False
    on_cpu = all(x.device.type == "cpu" for x in tensors[:n])
    return on_cpu and sum(x.numel() for x in tensors[:n]) >= adamw_cpu.WORTH_NUMEL
