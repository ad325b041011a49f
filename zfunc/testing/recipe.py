# SPDX-License-Identifier: Apache-2.0
"""``Recipe``: how a loss is trained, as data: what laws are quantified over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final, Literal

from zfunc.core.sharding import P
from zfunc.core.step import TrainStep, Transform, train_step
from zfunc.optim import (
    GradientTransformation,
    adagrad,
    adam,
    adamw,
    chain,
    clip_by_global_norm,
    ema,
    kahan,
    lion,
    rmsprop,
    schedule_free_adamw,
    sgd,
    stochastic_rounding,
)
from zfunc.testing.trees import tree_loss
from zfunc.transforms import accumulate, partition
from zfunc.transforms.remat import remat

Maker = Callable[[], GradientTransformation]
Optimizer = Literal[
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "adamw",
    "lion",
    "adagrad",
    "rmsprop",
    "centered",
    "schedule_free",
    "ema",
    "kahan",
    "stochastic",
]

OPTIMIZERS: Final[MappingProxyType[str, Maker]] = MappingProxyType(
    {
        "sgd": functools.partial(sgd, 0.1),
        "momentum": functools.partial(sgd, 0.1, momentum=0.9, weight_decay=0.01),
        "nesterov": functools.partial(sgd, 0.1, momentum=0.9, nesterov=True),
        "adam": functools.partial(adam, 0.01),
        "adamw": functools.partial(adamw, 0.01, weight_decay=0.1),
        "lion": functools.partial(lion, 0.01, weight_decay=0.1),
        "adagrad": functools.partial(
            adagrad, 0.1, lr_decay=0.1, initial_accumulator_value=0.1
        ),
        "rmsprop": functools.partial(rmsprop, 0.01, alpha=0.9),
        "centered": functools.partial(rmsprop, 0.01, momentum=0.9, centered=True),
        "schedule_free": functools.partial(
            schedule_free_adamw, 0.01, weight_decay=0.1, warmup_steps=2
        ),
        "ema": lambda: chain(adamw(0.01), ema(0.9)),
        "kahan": lambda: kahan(adamw(0.01)),
        "stochastic": lambda: stochastic_rounding(sgd(0.1, momentum=0.9)),
    }
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimizer and transformations of a step, as a value to draw, compare and print.

    Args:
      zero: the stage of ``partition``.
      num_microbatches: of ``accumulate``.
      optimizer: one of the keys of ``OPTIMIZERS``.
      clip: bound on the global norm of the gradient, or None.
      persistence_threshold: see ``partition``; for stage 3.
      weighted: the recipe's own loss is a ``Mean`` with the weights of the batch. (A
        loss that is given to ``step`` decides that for itself.)
      remat: rematerialize the whole loss.
      axis: the mesh axis that splits the batch.

    Raises:
      ValueError: an unknown optimizer.

    Example:
      >>> recipe = Recipe(zero=2, optimizer="adam", clip=0.1)
      >>> eval(repr(recipe)) == recipe
      True
      >>> recipe.step()
      <TrainStep loss=tree_loss grad=partition(zero=2) accumulate=partition(zero=2) ...>
    """

    zero: Literal[0, 1, 2, 3] = 3
    num_microbatches: int = 1
    optimizer: Optimizer = "sgd"
    clip: float | None = None
    persistence_threshold: int = 0
    weighted: bool = False
    remat: bool = False
    axis: str = "data"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"Recipe: optimizer is {self.optimizer!r}, expected one of "
                f"{', '.join(map(repr, OPTIMIZERS))}"
            )

    def tx(self) -> GradientTransformation:
        """The optimizer, after the clipping if there is any."""
        made = OPTIMIZERS[self.optimizer]()
        if self.clip is None:
            return made
        return chain(clip_by_global_norm(self.clip), made)

    def transforms(self) -> tuple[Transform, ...]:
        """``partition``, and ``accumulate`` if there are several microbatches."""
        where = partition(
            zero=self.zero,
            axis=self.axis,
            persistence_threshold=self.persistence_threshold,
        )
        if self.num_microbatches == 1:
            return (where,)
        return where, accumulate(self.num_microbatches)

    def loss(self) -> Callable[..., Any]:
        """``tree_loss``, weighted or not."""
        if not self.weighted:
            return tree_loss
        made = functools.partial(tree_loss, weighted=True)
        return functools.update_wrapper(made, tree_loss)

    def step(self, loss_fn: Callable[..., Any] | None = None) -> TrainStep:
        """The step of ``loss_fn``; of the recipe's own loss without one."""
        fn = loss_fn or self.loss()
        fn = remat(fn) if self.remat else fn
        return train_step(fn, self.tx(), *self.transforms())

    def reference(self, loss_fn: Callable[..., Any] | None = None) -> TrainStep:
        """The step it must equal: one rank, the whole batch, nothing recomputed."""
        return train_step(loss_fn or self.loss(), self.tx())

    @property
    def spec(self) -> P:
        """Where the state lives between steps: whole at stage 0, else in pieces."""
        return P() if self.zero == 0 else P(self.axis)
