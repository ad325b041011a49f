# SPDX-License-Identifier: Apache-2.0
"""What the updates of optimizers take: lists of tensors, and the same options."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .library import DTYPES, check_floating, check_shape, compute_dtype


def check_lists(
    name: str, params: Any, grads: Any, donate: bool, **moments: Any
) -> None:
    """Raise unless gradients and moments are like the parameters.

    Args:
      name: The function, for messages.
      params: A list of floating tensors.
      grads: Likewise: the same shapes, and no wider than the moments.
      donate: Whether params and moments are written over.
      **moments: Likewise, in float32 (float64 for float64 parameters).

    Raises:
      TypeError: No list, no floating tensors, other dtypes.
      ValueError: Other lengths or shapes; one tensor twice where it is written over.
    """
    lists = {"params": params, "grads": grads, **moments}
    for argument, tensors in lists.items():
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(
                f"{name}: {argument} is {type(tensors).__name__}, expected a list of "
                "floating tensors; type [x] for one, or the leaves of a tree"
            )
        if len(tensors) != len(params):
            raise ValueError(
                f"{name}: {argument} has {len(tensors)} tensors, expected "
                f"{len(params)} as params"
            )
    if not _fit(list(lists.values())):
        for argument, tensors in lists.items():
            _check_each(name, argument, tensors, params)
    if not isinstance(donate, bool):
        raise TypeError(
            f"{name}: donate is {type(donate).__name__}, expected True or False"
        )
    if donate:
        targets = [x for key, some in lists.items() if key != "grads" for x in some]
        check_apart(name, targets)


def _fit(lists: Sequence[Sequence[Any]]) -> bool:
    """Whether all is well, at a tenth of the time that it takes to say what is not."""
    dtypes = set()
    for row in zip(*lists, strict=True):
        if not all(isinstance(x, Tensor) for x in row):
            return False
        shape = row[0].shape
        if any(x.shape != shape or x.layout is not torch.strided for x in row):
            return False
        dtypes.add(tuple([x.dtype for x in row]))
    for p, g, *moments in dtypes:
        if p not in DTYPES or g not in DTYPES:
            return False
        if {compute_dtype(g), *moments} != {compute_dtype(p)}:
            return False
    return True


def _check_each(name: str, argument: str, tensors: Any, params: Any) -> None:
    check_floating(name, **{f"{argument}[{i}]": x for i, x in enumerate(tensors)})
    for i, (x, p) in enumerate(zip(tensors, params, strict=True)):
        check_shape(name, f"{argument}[{i}]", x, tuple(p.shape))
        _check_dtype(name, argument, i, x, compute_dtype(p.dtype))


def check_apart(name: str, targets: Sequence[Tensor]) -> None:
    """Raise if two tensors that are written over start at the same place in memory.

    Raises:
      ValueError: They do.
    """
    try:
        plain = (x for x in targets if type(x) in (Tensor, torch.nn.Parameter))
        starts = [x.data_ptr() for x in plain if x.numel()]
    except RuntimeError:
        return  # under a transformation, or traced: tensors without memory
    if len({*starts}) < len(starts):
        raise ValueError(
            f"{name}: a tensor is in params or moments twice, and donate=True writes "
            "over it; pass each once, or donate=False"
        )


def _check_dtype(
    name: str, argument: str, i: int, x: Tensor, wide: torch.dtype
) -> None:
    if argument in ("params", "grads"):
        found, cast = compute_dtype(x.dtype), f"{argument}[{i}].to({wide})"
    else:
        found, cast = x.dtype, f"the moments of {wide}"
    if found != wide:
        raise TypeError(
            f"{name}: {argument}[{i}] is {x.dtype}, and params[{i}] is updated in "
            f"{wide}; pass {cast}"
        )


def check_factor(
    name: str,
    argument: str,
    value: Any,
    *,
    high: float = math.inf,
    number: bool = False,
) -> None:
    """Raise unless a value is a number of [0, high), or a 0-d floating tensor.

    Args:
      name: The function, for messages.
      argument: Its argument.
      value: What was given.
      high: The bound.
      number: Whether it has to be a number.

    Raises:
      TypeError: Something else.
      ValueError: Out of range; a tensor with dims.
    """
    if isinstance(value, Tensor) and not number:
        check_floating(name, **{argument: value})
        check_shape(name, argument, value, ())
        return
    expected = f"expected a number in [0, {high:g})"
    also = "" if number else " or a 0-d tensor"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name}: {argument} is {type(value).__name__}, {expected}{also}"
        )
    if not 0 <= value < high:
        raise ValueError(f"{name}: {argument} is {value!r}, {expected}")


def decays(name: str, weight_decay: Any, count: int) -> list[float]:
    """The weight decay of each of ``count`` tensors.

    Raises:
      TypeError: Neither a number nor a list of them.
      ValueError: A negative one, or another number of them.
    """
    if not isinstance(weight_decay, (list, tuple)):
        weight_decay = [weight_decay] * max(count, 1)
        where = ["weight_decay"] * len(weight_decay)
    else:
        where = [f"weight_decay[{i}]" for i in range(len(weight_decay))]
        if len(weight_decay) != count:
            raise ValueError(
                f"{name}: weight_decay has {len(weight_decay)} numbers, expected one, "
                f"or {count} as params"
            )
    for argument, value in zip(where, weight_decay, strict=True):
        check_factor(name, argument, value, number=True)
    return [float(value) for value in weight_decay[:count]]


class Options(NamedTuple):
    """What all updates have: the arguments of their operators after the lists.

    Attributes:
      rate: The learning rate, where it is a 0-d tensor.
      coefficient: What gradients are multiplied by, where it is one.
      finite: 0-d bool: where it is false everything stays as it was.
      learning_rate: The learning rate, where it is a number.
      factor: What gradients are multiplied by, where it is a number.
      weight_decay: Of every tensor.
      copy_dtype: Of copies of the new parameters.
    """

    rate: Tensor | None
    coefficient: Tensor | None
    finite: Tensor | None
    learning_rate: float
    factor: float
    weight_decay: Sequence[float]
    copy_dtype: torch.dtype | None

    def scaled(self, g: Tensor) -> Tensor:
        """A gradient times the coefficient, in the dtype of arithmetic."""
        wide = widen(g)
        if self.coefficient is None and self.factor == 1.0:
            return wide
        return wide * joined(self.factor, self.coefficient, wide.dtype)

    def moved(self, p: Tensor, update: Tensor) -> Tensor:
        """A parameter after ``-learning_rate * update``, rounded once."""
        rate = joined(self.learning_rate, self.rate, update.dtype)
        return self.chosen((widen(p) + -rate * update).to(p.dtype), p)

    def chosen(self, new: Tensor, old: Tensor) -> Tensor:
        """The new values, or the old ones where ``finite`` is false."""
        return new if self.finite is None else torch.where(self.finite, new, old)

    def copied(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The parameters in ``copy_dtype``; nothing without one."""
        dtype = self.copy_dtype
        return [] if dtype is None else [p.to(dtype, copy=True) for p in params]

    def empty_copies(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Room for the copies of these parameters; nothing without ``copy_dtype``."""
        return [] if self.copy_dtype is None else fresh(params, self.copy_dtype)


SCHEMA: Final = (
    "Tensor? rate, Tensor? coefficient, Tensor? finite, float learning_rate, "
    "float factor, float[] weight_decay, ScalarType? copy_dtype"
)


class Adam(NamedTuple):
    r"""What updates with Adam's moments have: the last arguments of their operators.

    Attributes:
      weight1_at: :math:`1 - \beta_1^t`, where it is a 0-d tensor.
      weight2_at: :math:`1 - \beta_2^t`, where it is one.
      weight1: Where it is a number.
      weight2: Where it is one.
      b1: Decay of the mean.
      b2: Decay of the mean square.
      eps: Added to the denominator.
    """

    weight1_at: Tensor | None
    weight2_at: Tensor | None
    weight1: float
    weight2: float
    b1: float
    b2: float
    eps: float


ADAM_SCHEMA: Final = (
    "Tensor? weight1_at, Tensor? weight2_at, float weight1, float weight2, float b1, "
    "float b2, float eps"
)


def widen(x: Tensor) -> Tensor:
    """The tensor in the dtype of arithmetic."""
    return x.to(compute_dtype(x.dtype))


def joined(value: float, tensor: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """A number, or the tensor in its place, as a factor of a tensor of a dtype."""
    return value if tensor is None else tensor.to(dtype)


def divisor(value: float, tensor: Tensor | None, like: Tensor) -> Tensor:
    """The same as what a tensor is divided by: CUDA multiplies by 1 / a number."""
    return like.new_full((), value) if tensor is None else tensor.to(like.dtype)


def split(value: float | Tensor | None) -> tuple[float, Tensor | None]:
    """A number and no tensor, or 1 and the tensor that stands for it; None is 1."""
    if isinstance(value, Tensor):
        return 1.0, value
    return (1.0 if value is None else float(value)), None


def options_of(
    name: str,
    count: int,
    *,
    learning_rate: float | Tensor,
    weight_decay: float | Sequence[float],
    coefficient: float | Tensor | None,
    finite: Tensor | None,
    copy_dtype: torch.dtype | None,
) -> Options:
    """What the user gave, checked, as the arguments of an operator.

    Raises:
      TypeError: Something of another type or dtype.
      ValueError: A number out of range; a tensor with dims; a list of another length.
    """
    check_factor(name, "learning_rate", learning_rate)
    if coefficient is not None:
        check_factor(name, "coefficient", coefficient)
    if finite is not None:
        if not isinstance(finite, Tensor) or finite.dtype != torch.bool:
            got = getattr(finite, "dtype", type(finite).__name__)
            raise TypeError(
                f"{name}: finite is {got}, expected a 0-d bool tensor, as "
                "global_norm(grads).finite"
            )
        check_shape(name, "finite", finite, ())
    if copy_dtype is not None and copy_dtype not in DTYPES:
        raise TypeError(
            f"{name}: copy_dtype is {copy_dtype!r}, expected a floating dtype; type "
            "for example copy_dtype=torch.bfloat16"
        )
    rate, rate_tensor = split(learning_rate)
    factor, factor_tensor = split(coefficient)
    decay = decays(name, weight_decay, count)
    return Options(rate_tensor, factor_tensor, finite, rate, factor, decay, copy_dtype)


def written(donate: bool, old: Sequence[Any], new: Sequence[Any]) -> Sequence[Any]:
    """The lists of new values, in the old tensors where these are donated."""
    if not donate:
        return new
    for before, after in zip(old, new, strict=True):
        for x, y in zip(before, after, strict=True):
            x.copy_(y)
    return [list(before) for before in old]


def not_mapped(name: str) -> Callable[..., Any]:
    """The rule for ``vmap`` of an operator that writes over its arguments."""

    def rule(*args: Any) -> Any:
        raise RuntimeError(
            f"{name}: donate=True under vmap, which would write over what is not "
            "mapped; pass donate=False"
        )

    return rule


def fresh(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Tensors of these shapes and orders of dims, not written yet."""
    return [torch.empty_like(x, dtype=dtype or x.dtype) for x in tensors]
