# SPDX-License-Identifier: Apache-2.0
"""Placement is data: where a ``Sharded`` leaf lives is in the tree's structure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from zfunc.core import collectives, wire
from zfunc.core.errors import PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.tree import (
    PyTree,
    broadcast_prefix,
    leaves_with_path,
    map_with_path,
    pytree,
    static,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from zfunc.kernels.global_norm import square_sums


class P(tuple[str | None, ...]):
    """PartitionSpec: one entry per tensor dim, an axis name or None (as in JAX).

    ``P("data")`` shards dim 0 over axis "data"; ``P()`` replicates; trailing Nones do
    not matter.

    Example:
      >>> P("data"), P(), P("tensor", None)
      (P('data'), P(), P('tensor'))
    """

    __slots__ = ()

    def __new__(cls, *entries: str | None) -> P:
        """Check the entries; trailing Nones go."""
        for entry in entries:
            if entry is not None and not isinstance(entry, str):
                raise PlacementError(
                    "P takes one axis name or None per dim: P('data', None); got "
                    f"{entry!r}. Several axes on one dim are not supported."
                )
        named = [e for e in entries if e is not None]
        if len(set(named)) < len(named):
            raise PlacementError(f"P{entries}: an axis can shard one dim only")
        end = max((i + 1 for i, e in enumerate(entries) if e is not None), default=0)
        return super().__new__(cls, entries[:end])

    def __getnewargs__(self) -> tuple[str | None, ...]:
        """What copying and pickling call ``P`` with."""
        return tuple(self)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


@dataclasses.dataclass(frozen=True)
class NamedSharding:
    """A layout on a mesh: the axes that shard each dim, and the kind of memory.

    Only ``memory_kind="device"`` exists so far.

    Raises:
      MeshError: the spec names an axis that the mesh does not have.

    Example:
      >>> from zfunc.core.mesh import AbstractMesh
      >>> NamedSharding(AbstractMesh({"data": 4}), P("data")).local_shape((10, 3))
      (3, 3)
    """

    mesh: Mesh
    spec: P
    memory_kind: Literal["device"] = "device"

    def __post_init__(self) -> None:
        if self.memory_kind != "device":
            raise PlacementError(
                f"memory_kind {self.memory_kind!r} is not supported: use 'device'."
            )
        for axis in self.axes:
            self.mesh.axis_position(axis)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that shard some dim."""
        return tuple(axis for axis in self.spec if axis is not None)

    def local_shape(self, global_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of every rank's buffer: dims divided rounding up (tail padding)."""
        spec = (*self.spec, *[None] * (len(global_shape) - len(self.spec)))
        return tuple(
            -(-d // self.mesh.axis_size(axis)) if axis else d
            for d, axis in zip(global_shape, spec, strict=True)
        )


@pytree
class Sharded:
    """A placed leaf: this rank's buffer, with its placement in the tree's structure.

    ``tree_map`` maps over the buffer and keeps the placement, so optimizer moments made
    from parameters are placed like them. The tail of an uneven dim is zero padding.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> leaf = place(torch.ones(3), NamedSharding(make_mesh({"data": 1}), P("data")))
      >>> tree_map(torch.zeros_like, leaf).buffer
      tensor([0., 0., 0.])
    """

    buffer: torch.Tensor
    sharding: NamedSharding = static()
    global_shape: tuple[int, ...] = static()


def is_sharded(node: Any) -> bool:
    """True for a ``Sharded`` node: the ``is_leaf`` of trees of placed leaves.

    Example:
      >>> is_sharded(torch.ones(2))
      False
    """
    return isinstance(node, Sharded)


def _move(tensors: list[torch.Tensor], ops: list[tuple[int, Any]]) -> list[Any]:
    """Apply to each tensor an operator along a dim; equal operators share a message.

    Each ``op.outs`` is None or the one dtype of that tensor's result.
    """
    results: list[Any] = list(tensors)
    kinds = [dataclasses.replace(op, outs=None) for _, op in ops]
    for kind in dict.fromkeys(kinds):
        where = [i for i, other in enumerate(kinds) if other == kind]
        moved = [tensors[i].movedim(ops[i][0], 0) for i in where]
        outs = [dtype for i in where for dtype in ops[i][1].outs or ()]
        together = dataclasses.replace(kind, outs=tuple(outs) or None)
        outputs = collectives.apply(together, moved)
        for i, y in zip(where, outputs, strict=True):
            results[i] = y.movedim(0, ops[i][0])
    return results


def gather_buffers(
    leaves: Sequence[Sharded],
    axis: str,
    *,
    wire_dtypes: Sequence[torch.dtype | None],
    dtypes: Sequence[torch.dtype] | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Full tensors along ``axis`` of leaves sharded over it, in ``dtypes``.

    ``wire_dtypes`` are what is sent (None: as stored); the results have the storage
    dtypes unless ``dtypes`` says others. The transpose sums over ranks in
    ``reduce_dtype`` (None: the storage dtype) and scatters; the padding of uneven dims
    is cut off, and is zero in the gradient.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> leaf = place(torch.ones(3), NamedSharding(make_mesh({"data": 1}), P("data")))
      >>> gather_buffers([leaf], "data", wire_dtypes=[None])
      [tensor([1., 1., 1.])]
    """
    ops = [
        (
            leaf.sharding.spec.index(axis),
            wire.AllGather(
                leaf.sharding.mesh,
                axis,
                sent,
                reduce_dtype or leaf.buffer.dtype,
                (dtype,),
            ),
        )
        for leaf, sent, dtype in zip(
            leaves,
            wire_dtypes,
            dtypes or [leaf.buffer.dtype for leaf in leaves],
            strict=True,
        )
    ]
    full = _move([leaf.buffer for leaf in leaves], ops)
    # An even dim has nothing to cut off (and a narrow would copy in the backward).
    return [
        y
        if y.shape[dim] == leaf.global_shape[dim]
        else y.narrow(dim, 0, leaf.global_shape[dim])
        for y, (dim, _), leaf in zip(full, ops, leaves, strict=True)
    ]


def scatter_sum_buffers(
    fulls: Sequence[torch.Tensor],
    like: Sequence[Sharded],
    axis: str,
    *,
    reduce_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Sum over the ranks of ``axis``; each rank keeps its piece of the layout ``like``.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> leaf = place(torch.ones(3), NamedSharding(make_mesh({"data": 1}), P("data")))
      >>> scatter_sum_buffers([torch.ones(3)], [leaf], "data")
      [tensor([1., 1., 1.])]
    """
    dims = [leaf.sharding.spec.index(axis) for leaf in like]
    ops = [
        (
            dim,
            wire.PSumScatter(
                leaf.sharding.mesh, axis, reduce_dtype, None, (full.dtype,)
            ),
        )
        for full, leaf, dim in zip(fulls, like, dims, strict=True)
    ]
    padded = [
        _pad(full, dim, leaf.sharding.mesh.axis_size(axis))
        for full, leaf, dim in zip(fulls, like, dims, strict=True)
    ]
    return _move(padded, ops)


def _pad(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    missing = -x.shape[dim] % n
    if not missing:
        return x
    return pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


def place(full: torch.Tensor, sharding: NamedSharding) -> Sharded:
    """This rank's piece of a tensor that every rank has in full.

    Raises:
      PlacementError: the spec has more entries than the tensor has dims.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> place(torch.ones(2), NamedSharding(make_mesh({"data": 1}), P("data"))).buffer
      tensor([1., 1.])
    """
    if len(sharding.spec) > full.dim():
        raise PlacementError(
            f"{sharding.spec} has {len(sharding.spec)} entries but the tensor has "
            f"shape {tuple(full.shape)}: give at most one entry per dim, or P()."
        )
    mesh, local = sharding.mesh, full
    for dim, axis in enumerate(sharding.spec):
        if axis is not None and mesh.kind == "abstract":
            shape = list(local.shape)
            shape[dim] = -(-shape[dim] // mesh.axis_size(axis))
            local = local.new_empty(shape)
        elif axis is not None:
            padded = _pad(local, dim, mesh.axis_size(axis))
            local = _move([padded], [(dim, wire.AxisSlice(mesh, axis))])[0]
    return Sharded(local, sharding, tuple(full.shape))


def replicate(tree: PyTree) -> PyTree:
    """Every ``Sharded`` leaf as the full plain tensor, on every rank; differentiable.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> sharding = NamedSharding(make_mesh({"data": 1}), P("data"))
      >>> replicate({"w": place(torch.ones(2), sharding)})
      {'w': tensor([1., 1.])}
    """
    leaves, spec = tree_flatten(tree, is_sharded)
    axes = dict.fromkeys(
        (leaf.sharding.mesh, axis)
        for leaf in leaves
        if is_sharded(leaf)
        for axis in leaf.sharding.axes
    )
    for mesh, axis in axes:
        where = [
            i
            for i, x in enumerate(leaves)
            if is_sharded(x) and x.sharding.mesh == mesh and axis in x.sharding.axes
        ]
        picked = [leaves[i] for i in where]
        fulls = gather_buffers(picked, axis, wire_dtypes=[None] * len(picked))
        for i, leaf, full in zip(where, picked, fulls, strict=True):
            rest = P(*[None if a == axis else a for a in leaf.sharding.spec])
            sharding = dataclasses.replace(leaf.sharding, spec=rest)
            leaves[i] = Sharded(full, sharding, leaf.global_shape)
    plain = [leaf.buffer if is_sharded(leaf) else leaf for leaf in leaves]
    return tree_unflatten(spec, plain)


def reshard(tree: PyTree, shardings: PyTree) -> PyTree:
    """Move every leaf to its sharding: the one data-movement primitive; differentiable.

    A plain tensor is taken to be whole on every rank. ``shardings`` is one
    ``NamedSharding`` or a prefix tree of them.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> mesh = make_mesh({"data": 1})
      >>> moved = reshard({"w": torch.ones(2)}, NamedSharding(mesh, P("data")))
      >>> reshard(moved, NamedSharding(mesh, P()))["w"].sharding.spec
      P()
    """
    targets = broadcast_prefix(
        shardings,
        tree_map(lambda x: 0, tree, is_leaf=is_sharded),
    )
    paths = [path for path, _ in leaves_with_path(tree, is_sharded)]
    leaves, spec = tree_flatten(tree, is_sharded)
    moved = []
    for path, leaf, target in zip(paths, leaves, targets, strict=True):
        if is_sharded(leaf) and leaf.sharding == target:
            moved.append(leaf)
            continue
        if is_sharded(leaf) and leaf.sharding.mesh != target.mesh:
            raise PlacementError(
                f"{path}: cannot move from mesh {leaf.sharding.mesh.shape} to "
                f"{target.mesh.shape} inside a program: save a checkpoint and load it "
                "on the other mesh."
            )
        moved.append(place(replicate(leaf), target))
    return tree_unflatten(spec, moved)


def place_tree(params: PyTree, mesh: Mesh, spec: Any, dtype: Any) -> PyTree:
    """Place leaves by ``spec``, a P or a tree of them; copy those that are placed."""
    shape = tree_map(lambda x: 0, params, is_leaf=is_sharded)
    specs = broadcast_prefix(spec, shape, is_leaf=lambda s: isinstance(s, P))
    one_for_all = isinstance(spec, P)
    placed = iter(specs)

    def one(path: str, leaf: Any) -> Any:
        wanted = next(placed)
        if is_sharded(leaf):
            if leaf.sharding.mesh != mesh:
                raise PlacementError(
                    f"params[{path!r}] is placed on the mesh {leaf.sharding.mesh.shape}"
                    f", not on {mesh.shape}: move it with zf.reshard."
                )
            return tree_map(lambda b: b.detach().to(dtype or b.dtype, copy=True), leaf)
        if not isinstance(wanted, P):
            raise PlacementError(
                f"spec[{path!r}] is {wanted!r}: give a P, such as P('data') or P()."
            )
        # One spec for a whole tree reaches leaves of fewer dims: scalars replicate.
        fitting = P(*wanted[: leaf.dim()]) if one_for_all else wanted
        device = mesh.device if mesh.kind in ("local", "process") else leaf.device
        value = leaf.detach().to(device, dtype or leaf.dtype)
        piece = place(value, NamedSharding(mesh, fitting))
        return tree_map(lambda b: b.clone(memory_format=torch.contiguous_format), piece)

    return map_with_path(one, params, is_leaf=is_sharded)


def global_norm(tree: PyTree) -> torch.Tensor:
    r"""Euclidean norm of all the elements of a tree, over all ranks; 0-d, >= float32.

    :math:`\sqrt{\sum_i \|x_i\|^2}`: local sums of squares, one ``psum`` per axis.
    Replicated leaves count once. The same value on every rank.

    Example:
      >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
      tensor(5.)
    """
    pieces: dict[tuple[Mesh | None, tuple[str, ...]], list[torch.Tensor]] = {}
    for leaf in tree_leaves(tree, is_sharded):
        at = getattr(leaf, "sharding", None)
        where = (at.mesh, tuple(sorted(at.axes))) if at else (None, ())
        pieces.setdefault(where, []).append(leaf.buffer if is_sharded(leaf) else leaf)
    totals = []
    for (mesh, axes), buffers in pieces.items():
        value = _square_sum(buffers)
        for axis in axes:
            value = collectives.psum(value, axis, mesh)  # type: ignore[arg-type]
        totals.append(value)
    return sum(totals[1:], totals[0]).sqrt() if totals else torch.zeros(())


def _square_sum(buffers: list[torch.Tensor]) -> torch.Tensor:
    """The sum of all squares, >= float32; on a GPU of one dtype in one launch."""
    if all(x.is_cuda for x in buffers) and len({x.dtype for x in buffers}) == 1:
        return square_sums(buffers).sums.sum()  # type: ignore[no-any-return]
    squares = [
        x.to(torch.promote_types(x.dtype, torch.float32)).square().sum()
        for x in buffers
    ]
    return sum(squares[1:], squares[0])
