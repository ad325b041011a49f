# SPDX-License-Identifier: Apache-2.0
"""``with_frozen``: parameters that a loss uses and no optimizer changes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from zfunc.core.errors import MeshError, StructureError
from zfunc.core.sharding import is_sharded
from zfunc.core.tree import PyTree, leaves_with_path, tree_leaves, tree_map
from zfunc.transforms.gathered import Wire, cast_leaf, gather_on_use


def with_frozen(
    loss_fn: Callable[..., Any], frozen: PyTree, *, axis: str = "data"
) -> Callable[..., Any]:
    r"""The loss as a function of the trained parameters alone.

    .. math:: L'(p, b) = L(p \cup f, b)

    The frozen ones have no gradient, no moments and no place in the state or its
    checkpoints: a fine-tuning of :math:`\psi` of :math:`\Psi` parameters on n ranks
    holds :math:`(4\Psi + 16\psi) / n` bytes in float32.

    Args:
      loss_fn: ``(params, batch)`` or ``(params, batch, key)``, as ``train_step`` takes
        it, of all the parameters.
      frozen: The parameters that stay: dicts like those of ``params``, whose keys are
        not those of the trained ones. ``Sharded`` leaves are gathered at each use, in
        the forward and with ``remat`` again in the backward, whatever the ZeRO stage.
        Plain tensors are on every rank. Where the trained leaves all have a narrower
        dtype when the loss gets them (``precision``), the frozen ones are cast to it.
      axis: The mesh axis that sharded leaves are gathered over.

    Returns:
      The loss of the trained parameters.

    Raises:
      TypeError: A leaf that is not a floating tensor, with its path; no dict.
      MeshError: A leaf that is sharded over another axis, with its path.
      StructureError: (When called) a parameter that is both trained and frozen; trained
        ones that are no dict.

    Laws: the gradient is that of the whole loss, in the trained parameters.

    Differs from DeepSpeed: no ``requires_grad`` flag that an engine reads; what is
    trained is what the state holds.

    Examples:
      >>> import zfunc as zf
      >>> def loss(p, batch):
      ...     return (p["w"] * batch + p["b"]).sum()
      >>> mesh = zf.make_mesh({"data": 1})
      >>> frozen = zf.shard({"w": torch.ones(2)}, mesh).params
      >>> step = zf.train_step(
      ...     zf.with_frozen(loss, frozen), zf.optim.sgd(0.5), zf.partition(zero=3)
      ... )
      >>> state = step(zf.shard({"b": torch.zeros(2)}, mesh), torch.ones(2))
      >>> state.metrics.loss, state.params["b"].buffer
      (tensor(2.), tensor([-0.5000, -0.5000]))
    """
    if not callable(loss_fn):
        raise TypeError(f"with_frozen: loss_fn must be a function, got {loss_fn!r}")
    if not isinstance(frozen, dict):
        raise TypeError(
            f"with_frozen: frozen is a {type(frozen).__name__}, expected a dict of "
            'parameters; type for example with_frozen(loss_fn, {"w": w})'
        )
    _check(frozen, axis)
    wire = Wire(axis)

    @functools.wraps(loss_fn)
    def loss(params: PyTree, *args: Any, **kwargs: Any) -> Any:
        usable = tree_map(
            lambda x: gather_on_use(x, wire) if is_sharded(x) else x,
            frozen,
            is_leaf=is_sharded,
        )
        narrow = _narrow(params)
        usable = tree_map(lambda x: narrow(x), usable)
        return loss_fn(_union(params, usable, ""), *args, **kwargs)

    return loss


def _check(frozen: PyTree, axis: str) -> None:
    for path, leaf in leaves_with_path(frozen, is_sharded):
        tensor = leaf.buffer if is_sharded(leaf) else leaf
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise TypeError(
                f"frozen[{path!r}] must be a floating tensor, got {kind}: close over "
                "buffers in the loss."
            )
        others = set(leaf.sharding.axes) - {axis} if is_sharded(leaf) else ()
        if others:
            raise MeshError(
                f"frozen[{path!r}] is sharded over {sorted(others)}, and with_frozen "
                f"gathers over axis={axis!r}: move it with zf.reshard, or pass axis=."
            )


def _narrow(params: PyTree) -> Callable[[torch.Tensor], torch.Tensor]:
    """The cast of a frozen leaf to the one dtype that the trained leaves compute in."""
    dtypes = {x.dtype for x in tree_leaves(params)}
    if len(dtypes) != 1:
        return lambda x: x
    wanted = dtypes.pop()
    return lambda x: cast_leaf(x, wanted) if wanted.itemsize < x.dtype.itemsize else x


def _union(trained: PyTree, frozen: PyTree, path: str) -> PyTree:
    if isinstance(trained, dict) and isinstance(frozen, dict):
        union = {**frozen, **trained}
        for key in (name for name in trained if name in frozen):
            union[key] = _union(trained[key], frozen[key], f"{path}/{key}".lstrip("/"))
        return union
    if not isinstance(trained, dict) and not path:
        raise StructureError(
            f"params is a {type(trained).__name__} and the frozen ones are a dict: "
            "with_frozen joins dicts by their keys. Make both dicts."
        )
    raise StructureError(
        f"params[{path!r}] is both trained and frozen: a parameter is one of these. "
        "Split the dict of parameters by its keys."
    )
