# SPDX-License-Identifier: Apache-2.0
"""A running mean of the parameters, for evaluation."""

from typing import Any

from torch import Tensor

from zfunc.core.errors import StructureError
from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, check_floating, pytree, tree_leaves, tree_map
from zfunc.core.update import added
from zfunc.optim.base import (
    GradientTransformation,
    check_moments,
    check_updates,
    widen,
)
from zfunc.optim.checks import check_number


@pytree
class EmaMoments:
    """What ``ema`` remembers: the mean of the parameters, in float32 at least.

    Examples:
      >>> import torch
      >>> ema(0.5).init({"w": torch.ones(1, dtype=torch.bfloat16)}).average
      {'w': tensor([1.])}
    """

    average: PyTree


def ema(decay: float = 0.999) -> GradientTransformation:
    r"""Keep an exponential moving average of the parameters; updates pass unchanged.

    With the parameters :math:`p_t` after t updates, from :math:`a_0 = p_0`:

    .. math::
      a_t = \delta a_{t-1} + (1 - \delta) p_t

    It has to be the last part of a chain, where the updates are what will be added to
    the parameters. ``averaged_params`` returns :math:`a_t`. Memory: 4 bytes per
    parameter.

    Args:
      decay: :math:`\delta` in [0, 1).

    Returns:
      A transformation with ``EmaMoments``: one buffer like the parameters, in float32
      at least.

    Raises:
      TypeError: A decay that is not a number.
      ValueError: One outside of [0, 1).
      StructureError: (from ``update``) the moments of something else.

    Laws:
      ``torch.optim.swa_utils.AveragedModel`` with ``get_ema_avg_fn(decay)`` to
      rounding, if that is updated before the first step and after each.

    Examples:
      >>> import torch
      >>> from zfunc.optim import chain, sgd
      >>> tx, p = chain(sgd(1.0), ema(0.5)), torch.tensor([4.0])
      >>> updates, (_, mean) = tx.update(torch.tensor([2.0]), tx.init(p), p)
      >>> updates, mean.average
      (tensor([-2.]), tensor([3.]))

    References:
      Polyak and Juditsky, `Acceleration of Stochastic Approximation by Averaging
      <https://doi.org/10.1137/0330046>`_, 1992, with another weighting.

    Differs from:
      optax's ``ema`` averages the updates. A mean that starts at zero would need a
      correction of its bias; this one starts at the parameters.
    """
    decay = check_number("ema: decay", decay, high=1.0, instead="decay=0.999")

    def init(params: PyTree) -> PyTree:
        check_floating(params, "params")
        # In memory of its own: a step may write over the parameters it consumes.
        return EmaMoments(tree_map(lambda p: widen(p).clone(), params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        check_moments("ema", EmaMoments(updates), moments)

        def mean(a: Tensor, p: Tensor, u: Tensor) -> Tensor:
            return decay * a + (1 - decay) * added(p, u).to(a.dtype)

        return updates, EmaMoments(tree_map(mean, moments.average, params, updates))

    return GradientTransformation(init, update, leafwise=True)


def averaged_params(state: TrainState) -> PyTree:
    """The averages that ``ema`` keeps, as parameters to evaluate.

    Args:
      state: A state whose optimizer has one ``ema`` in it; unsharded or placed.

    Returns:
      A tree like ``state.params``, in its dtypes and with its placement.

    Raises:
      TypeError: Something that is not a state.
      StructureError: The moments have no ``ema`` in them, or several.

    Examples:
      >>> import torch
      >>> import zfunc as zf
      >>> tx = zf.optim.chain(zf.optim.sgd(1.0), zf.optim.ema(0.5))
      >>> step = zf.train_step(lambda p, batch: (p * batch).sum(), tx)
      >>> state = step(zf.shard(torch.ones(2), zf.make_mesh({}), tx=tx), torch.ones(2))
      >>> state.params.buffer, averaged_params(state).buffer
      (tensor([0., 0.]), tensor([0.5000, 0.5000]))
    """
    found = only_moments(
        "averaged_params", state, EmaMoments, "chain(adamw(3e-4), ema(0.999))"
    )
    return tree_map(lambda a, p: a.to(p.dtype), found.average, state.params)


def only_moments(name: str, state: Any, kind: type, instead: str) -> Any:
    """The one node of ``kind`` among the moments of a state.

    Args:
      name: The function that looks for it.
      state: What the user gave.
      kind: The class of the moments.
      instead: An optimizer that has it, for the message.

    Returns:
      The node.

    Raises:
      TypeError: Something that is not a state.
      StructureError: There is none, or there are several.
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{name} takes a TrainState, got a {type(state).__name__}; type for "
            f"example {name}(state)"
        )

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    found = [x for x in tree_leaves(state.moments, is_kind) if is_kind(x)]
    if len(found) != 1:
        raise StructureError(
            f"{name}: state.moments has {len(found)} {kind.__name__} in it, expected "
            f"one: train with an optimizer such as {instead}. (A state that was made "
            "without tx= has no moments before its first step.)"
        )
    return found[0]
