# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations: pairs of pure functions, and their composition.

Trees may hold ``Sharded`` leaves: ``tree_map`` maps over this rank's buffers, so
elementwise mathematics knows nothing of placement, and moments are placed like the
parameters they were made from. The zero padding of uneven dims stays zero.

Arithmetic is in float32 at least, whatever the parameters are stored in; the only
rounding to their dtype is where updates are added to parameters.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from zfunc.core.errors import StructureError
from zfunc.core.tree import (
    PyTree,
    check_floating,
    check_structure,
    tree_leaves,
    tree_map,
)
from zfunc.core.update import added
from zfunc.core.update import widen as widen
from zfunc.optim.fused import Fused, chained

InitFn = Callable[[PyTree], PyTree]
UpdateFn = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
# Stands for any tensor in a tree of which only the structure matters.
LEAF: Final[Any] = 0


class GradientTransformation(NamedTuple):
    r"""Two pure functions: an optimizer, or one of the parts it is chained from.

    ``init(params)`` makes the moments :math:`S_0`, a pytree without functions in it.
    ``update(updates, moments, params)`` is :math:`(u_t, S_t) \mapsto (u'_t, S_{t+1})`:
    the updates enter as gradients and leave the last part as what is *added* to the
    parameters. Neither changes what it is given or waits for the device.

    ``leafwise`` declares that updating a tree is updating its leaves one by one (as
    Adam does, and a clip by global norm does not); ``donate`` then needs the memory of
    a few leaves instead of a second set of moments. ``halves`` of a chain are the
    chain up to its last part that is not, the leafwise rest, and the first's length.
    ``deterministic`` declares of one that is not that its bits do not depend on the
    mesh. ``fused`` is the same update, parameters included, in one pass where a kernel
    for it is there; ``factor(updates)`` is, of one that only scales all updates, what
    by.

    Laws:
      ``tx.init(shard(p)) == shard(tx.init(p))``. ``update`` keeps the structure,
      placement and dtypes of the moments.

    Examples:
      >>> from zfunc.optim import apply_updates, sgd
      >>> tx, params = sgd(0.5), {"w": torch.tensor([1.0, 2.0])}
      >>> moments = tx.init(params)
      >>> grads = {"w": torch.tensor([2.0, -2.0])}
      >>> updates, moments = tx.update(grads, moments, params)
      >>> apply_updates(params, updates)
      {'w': tensor([0., 3.])}

    References:
      Babuschkin et al., `The DeepMind JAX Ecosystem
      <https://github.com/google-deepmind/optax>`_, 2020.

    Differs from:
      optax calls the moments a state and makes ``params`` optional. ``torch.optim``
      writes to the parameters.
    """

    init: InitFn
    update: UpdateFn
    leafwise: bool = False
    halves: tuple[Any, ...] = ()
    deterministic: bool = False
    fused: Fused | None = None
    factor: Callable[[PyTree], Tensor] | None = None


def identity() -> GradientTransformation:
    """The transformation that changes nothing; the unit of ``chain``.

    Returns:
      A transformation without moments.

    Laws:
      ``chain(identity(), tx)``, ``chain(tx, identity())`` and ``tx`` give the same
      updates.

    Examples:
      >>> identity().update([1.0], (), [2.0])
      ([1.0], ())
    """
    return stateless("identity", lambda updates, params: updates)


def stateless(
    name: str,
    fn: Callable[[PyTree, PyTree], PyTree],
    *,
    leafwise: bool = True,
    deterministic: bool = False,
) -> GradientTransformation:
    """A transformation without moments.

    Args:
      name: How error messages name it.
      fn: ``(updates, params) -> updates``, pure.
      leafwise: Whether ``fn`` treats every leaf by itself.
      deterministic: Whether its bits do not depend on the mesh all the same.

    Returns:
      The transformation; its moments are ``()``.

    Examples:
      >>> double = stateless("double", lambda updates, params: 2 * updates)
      >>> double.update(torch.ones(2), double.init(torch.ones(2)), torch.ones(2))
      (tensor([2., 2.]), ())
    """

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments(name, (), moments)
        return fn(updates, params), ()

    return GradientTransformation(
        lambda params: (), update, leafwise, deterministic=deterministic
    )


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    r"""Apply transformations from left to right: :math:`u \mapsto f_n(\dots f_1(u))`.

    Args:
      *transformations: The parts, such as ``clip_by_global_norm(1.0), adamw(3e-4)``.

    Returns:
      A transformation whose moments are the tuple of the parts' moments.

    Raises:
      TypeError: An argument that is not a transformation.
      StructureError: (from ``update``) moments that are not those of this chain.

    Laws:
      Associative in the updates; the unit is ``identity()``.

    Examples:
      >>> from zfunc.optim import clip_by_value, scale_by_learning_rate
      >>> tx = chain(clip_by_value(1.0), scale_by_learning_rate(0.1))
      >>> params = torch.zeros(2)
      >>> tx.update(torch.tensor([0.5, 9.0]), tx.init(params), params)[0]
      tensor([-0.0500, -0.1000])
    """
    for position, part in enumerate(transformations):
        if not isinstance(part, GradientTransformation):
            raise TypeError(
                f"chain: argument {position} is a {type(part).__name__}, expected a "
                "GradientTransformation: call its maker, as in "
                "chain(clip_by_global_norm(1.0), adamw(3e-4))"
            )

    def init(params: PyTree) -> PyTree:
        return tuple(part.init(params) for part in transformations)

    def check(moments: PyTree) -> None:
        if type(moments) is not tuple or len(moments) != len(transformations):
            raise StructureError(
                f"chain: moments is {_summary(moments)}, expected the tuple of "
                f"{len(transformations)} that this chain's init returned: pass "
                "moments = tx.init(params), or those of this tx's last update"
            )

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check(moments)
        after = []
        for part, before in zip(transformations, moments, strict=True):
            updates, part_moments = part.update(updates, before, params)
            after.append(part_moments)
        return updates, tuple(after)

    whole = [i for i, part in enumerate(transformations) if not part.leafwise]
    cut = whole[-1] + 1 if whole else 0
    halves: tuple[Any, ...] = ()
    if 0 < cut < len(transformations):
        first, rest = transformations[:cut], transformations[cut:]
        halves = (chain(*first), chain(*rest), cut)
    fixed = all(part.leafwise or part.deterministic for part in transformations)
    fused = chained(transformations, check)
    return GradientTransformation(init, update, not whole, halves, fixed, fused)


def _summary(moments: Any) -> str:
    kind = type(moments).__name__
    return f"a tuple of {len(moments)}" if kind == "tuple" else f"a {kind}"


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    r"""The new parameters :math:`p + u`, rounded once, to the dtype of ``p``.

    Args:
      params: Floating tensors of any dtype.
      updates: What the last transformation returned, in float32 or wider.

    Returns:
      A tree like ``params``, in its dtypes.

    Raises:
      StructureError: The two trees differ, with the paths.

    Examples:
      >>> half = torch.tensor([256.0], dtype=torch.bfloat16)
      >>> apply_updates(half, torch.tensor([1.001]))  # bfloat16 steps by 2 here
      tensor([258.], dtype=torch.bfloat16)

    Differs from:
      ``p + u.to(p.dtype)`` rounds twice; the example would give 256. optax rounds once
      too.
    """
    check_updates(params, updates)
    return tree_map(added, params, updates)


def zeros_wide(params: PyTree) -> PyTree:
    """Zeros placed like ``params``, in ``widen``'s dtype: a moment at the start.

    Args:
      params: Floating tensors.

    Returns:
      A tree like ``params``.

    Examples:
      >>> zeros_wide({"w": torch.ones(2, dtype=torch.float16)})
      {'w': tensor([0., 0.])}
    """
    return tree_map(
        lambda p: torch.zeros_like(
            p, dtype=torch.promote_types(p.dtype, torch.float32)
        ),
        params,
    )


def new_count(params: PyTree) -> Tensor:
    """A count of zero updates: 0-d int64, on the device of the parameters.

    Args:
      params: Floating tensors; with no leaf at all the count is on the CPU.

    Returns:
      The count.

    Raises:
      TypeError: A leaf that is not a floating tensor, with its path.

    Examples:
      >>> new_count({"w": torch.ones(2)}), new_count({})
      (tensor(0), tensor(0))
    """
    check_floating(params, "params")
    leaves = tree_leaves(params)
    like = leaves[0] if leaves else torch.empty(())
    return like.new_zeros((), dtype=torch.int64)


def check_moments(name: str, expected: PyTree, moments: PyTree) -> None:
    """Raise unless ``moments`` has the structure of ``expected``.

    Args:
      name: The transformation that was given them.
      expected: A tree of the right structure; its leaves do not matter.
      moments: What the user gave.

    Raises:
      StructureError: They differ, with the paths.

    Examples:
      >>> check_moments("trace", {"w": 0}, {"w": 1})
    """
    check_structure(
        expected,
        moments,
        f"{name}: moments",
        "They belong to another optimizer or to other parameters: pass moments = "
        "tx.init(params), or those of this tx's last update, with the gradients of "
        "the same params.",
    )


def check_updates(params: PyTree, updates: PyTree) -> None:
    """Raise unless ``updates`` has the structure of ``params``.

    Args:
      params: The parameters.
      updates: Gradients, or what was made of them.

    Raises:
      StructureError: They differ, with the paths.

    Examples:
      >>> check_updates({"w": 0}, {"w": 1})
    """
    check_structure(
        params, updates, "updates", "Pass the gradients of these params, placed alike."
    )
