# SPDX-License-Identifier: Apache-2.0
"""``GatherOnUse``: a parameter that lives in pieces and is gathered where it is used.

To the loss it is a tensor of the full shape; the first torch function that touches it
gathers it over its axis, and its transpose scatters the gradient as soon as the
backward of that use is done. Inside ``remat`` it is gathered again in the recompute,
a block's parameters in one message. So ZeRO-3 needs no hooks and no wrapped modules.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch
from torch._C._functorch import maybe_current_level

from zfunc.core.errors import PlacementError
from zfunc.core.sharding import Sharded, gather_buffers, is_sharded
from zfunc.core.tree import PyTree, tree_map

_T: Any = torch.Tensor
# Answered from the full tensor's description, without gathering it.
_ATTRIBUTES: Final = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_sparse",
    "is_quantized",
    "is_meta",
    "is_cuda",
    "is_cpu",
    "itemsize",
)
_METHODS: Final = (
    "size",
    "dim",
    "numel",
    "nelement",
    "ndimension",
    "element_size",
    "is_floating_point",
    "is_complex",
    "__len__",
)
_METADATA: Final = frozenset(
    [
        *[getattr(_T, name).__get__ for name in _ATTRIBUTES],
        *[getattr(_T, name) for name in _METHODS],
        torch.is_floating_point,
        torch.is_complex,
        torch.numel,
    ]
)


def with_rank(tree: PyTree, rank: Any) -> PyTree:
    """The same tree on the same meshes, seen from ``rank`` (a value, not structure)."""

    def one(node: Any) -> Any:
        if not is_sharded(node):
            return node
        mesh = dataclasses.replace(node.sharding.mesh, rank=rank)
        sharding = dataclasses.replace(node.sharding, mesh=mesh)
        return dataclasses.replace(node, sharding=sharding)

    return tree_map(one, tree, is_leaf=is_sharded)


@dataclasses.dataclass(frozen=True)
class Wire:
    """How leaves travel: the axis, the dtype of gathers and the dtype of reductions."""

    axis: str
    gather_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None

    def sent(self, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        """What a gather sends: a narrower cast commutes with it, so it goes first."""
        narrower = wanted.itemsize < stored.itemsize
        return self.gather_dtype or (wanted if narrower else stored)


class Group:
    """Leaves that are gathered together, at the first use of any of them."""

    __slots__ = ("dtypes", "leaves", "level", "memo", "wire")

    def __init__(
        self, leaves: list[Sharded], dtypes: list[torch.dtype], wire: Wire
    ) -> None:
        self.leaves, self.dtypes, self.wire = leaves, dtypes, wire
        self.level = maybe_current_level()
        self.memo: dict[bool, list[torch.Tensor]] = {}

    def full(self, index: int) -> torch.Tensor:
        """The gathered tensor ``index``, kept for as long as the group lives."""
        if maybe_current_level() != self.level:
            # A transform inside the loss: its tensors must not outlive it.
            return self._gather()[index]
        # What is gathered under no_grad has no gradient to give to later uses.
        tracked = torch.is_grad_enabled() or True in self.memo
        if tracked not in self.memo:
            self.memo[tracked] = self._gather()
        return self.memo[tracked][index]

    def _gather(self) -> list[torch.Tensor]:
        stored = [leaf.buffer.dtype for leaf in self.leaves]
        sent = [self.wire.sent(*pair) for pair in zip(stored, self.dtypes, strict=True)]
        return gather_buffers(
            self.leaves,
            self.wire.axis,
            wire_dtypes=sent,
            dtypes=self.dtypes,
            reduce_dtype=self.wire.reduce_dtype,
        )


class GatherOnUse(torch.Tensor):
    """A tensor of the full shape whose value is gathered at its first use.

    Made by ``partition(zero=3)``; a loss treats it as the parameter it stands for.
    """

    _group: Group
    _index: int

    @staticmethod
    def __new__(cls: Any, group: Group, index: int) -> GatherOnUse:
        """The leaf ``index`` of a group, as a tensor without memory."""
        leaf = group.leaves[index]
        made: GatherOnUse = torch.Tensor._make_wrapper_subclass(
            cls,
            leaf.global_shape,
            dtype=group.dtypes[index],
            device=leaf.buffer.device,
        )
        made._group, made._index = group, index
        return made

    def __repr__(self, **_: Any) -> Any:  # type: ignore[override]
        leaf = self._group.leaves[self._index]
        return f"GatherOnUse({leaf.global_shape}, {self.dtype}, {leaf.sharding.spec})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(_full, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Past ``__torch_function__`` it is too late: its gradient would be lost."""
        raise PlacementError(
            f"{func} was given a parameter that is gathered at its first use, in a way "
            "that does not count as a use (an argument of torch.func.grad or of "
            "torch.vmap inside the loss). Gather it first: pass w.clone() instead of w."
        )


def _full(value: Any) -> Any:
    return value._group.full(value._index) if type(value) is GatherOnUse else value


def cast_leaf(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x.to(dtype)``; a parameter not yet gathered stays so, to travel narrower.

    Example:
      >>> cast_leaf(torch.ones(2), torch.bfloat16)
      tensor([1., 1.], dtype=torch.bfloat16)
    """
    if type(x) is GatherOnUse:
        leaf, group = x._group.leaves[x._index], x._group
        if group.dtypes[x._index] == leaf.buffer.dtype:
            return GatherOnUse(Group([leaf], [dtype], group.wire), 0)
    return x.to(dtype)


def gather_on_use(tree: PyTree, wire: Wire) -> PyTree:
    """The leaves that are sharded over ``wire.axis`` as ``GatherOnUse``, others whole.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.sharding import NamedSharding, P, place
      >>> leaf = place(torch.ones(3), NamedSharding(make_mesh({"data": 1}), P("data")))
      >>> (gather_on_use(leaf, Wire("data")) * 2)
      tensor([2., 2., 2.])
    """

    def one(leaf: Any) -> Any:
        if wire.axis not in leaf.sharding.axes:
            return leaf.buffer
        return GatherOnUse(Group([leaf], [leaf.buffer.dtype], wire), 0)

    return tree_map(one, tree, is_leaf=is_sharded)


@dataclasses.dataclass(frozen=True)
class Ungathered:
    """What ``remat`` keeps of a ``GatherOnUse`` argument: all but the buffer."""

    sharding: Any
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    wire: Wire


def open_up(value: Any) -> tuple[Any, Any]:
    """``(buffer, Ungathered)`` of a ``GatherOnUse``; ``(value, None)`` of all else."""
    if type(value) is not GatherOnUse:
        return value, None
    group, i = value._group, value._index
    leaf = group.leaves[i]
    rest = Ungathered(leaf.sharding, leaf.global_shape, group.dtypes[i], group.wire)
    return leaf.buffer, rest


def close_up(buffers: list[Any], rests: list[Any], rank: Any) -> list[Any]:
    """Undo ``open_up`` for the arguments of one block, which gather as one group."""
    results = list(buffers)
    for wire in dict.fromkeys(rest.wire for rest in rests if rest is not None):
        where = [i for i, r in enumerate(rests) if r is not None and r.wire == wire]
        leaves = [
            Sharded(buffers[i], rests[i].sharding, rests[i].global_shape) for i in where
        ]
        if rank is not None:
            leaves = with_rank(leaves, rank)
        group = Group(leaves, [rests[i].dtype for i in where], wire)
        for position, i in enumerate(where):
            results[i] = GatherOnUse(group, position)
    return results
