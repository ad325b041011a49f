# SPDX-License-Identifier: Apache-2.0
r"""Collectives by axis name: pure, differentiable, and vmappable as a whole mesh.

Every collective is linear, so all of them are one ``autograd.Function`` around an
operator ``op`` (see ``wire``): the backward applies ``op.transpose()``, the jvp applies
``op`` to the tangent, and vmap either batches (the operand ``rank`` is not batched) or
*is the mesh* (it is: each row is a rank).

Why not the stock functional collectives: under ``torch.func`` they raise or give
silently wrong gradients (torch 2.13: zeros, unwaited memory).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from zfunc.core import wire
from zfunc.core.errors import MeshError
from zfunc.core.mesh import Mesh
from zfunc.core.tree import PyTree, tree_flatten, tree_unflatten


class _Collective(torch.autograd.Function):
    """``ys = op(xs)`` for any linear operator of ``wire``."""

    @staticmethod
    def forward(op: Any, rank: Any, *xs: torch.Tensor) -> Any:
        return tuple(wire.run(op, list(xs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op, ctx.rank, *xs = inputs
        ctx.in_dtypes = tuple(x.dtype for x in xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        transposed = ctx.op.transpose(ctx.in_dtypes)
        return (None, None, *_run(transposed, ctx.rank, *cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        moving = [i for i, t in enumerate(tangents[2:]) if t is not None]
        outs = ctx.op.outs and tuple(ctx.op.outs[i] for i in moving)
        op = dataclasses.replace(ctx.op, outs=outs)
        pushed = _run(op, ctx.rank, *[tangents[i + 2] for i in moving])
        results: list[Any] = [None] * (len(tangents) - 2)
        for i, t in zip(moving, pushed, strict=True):
            results[i] = t
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, rank: Any, *xs: torch.Tensor) -> Any:
        dims = in_dims[2:]
        if in_dims[1] is None:  # an ordinary vmap inside the loss: ride along, last
            moved = [
                x if d is None else x.movedim(d, -1)
                for x, d in zip(xs, dims, strict=True)
            ]
            ys = _run(op, rank, *moved)
            return ys, tuple(None if d is None else -1 for d in dims)
        rows = [
            x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            for x, d in zip(xs, dims, strict=True)
        ]
        return tuple(wire.simulate(op, rows)), (0,) * len(rows)


_run: Any = _Collective.apply  # torch leaves it without annotations


def apply(op: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Apply a linear operator of ``wire`` to tensors whose dim 0 it acts on."""
    rank = op.mesh.rank if op.mesh.kind == "simulated" else None
    return list(_run(op, rank, *xs)) if xs else []


def _mapped(op: Any, tree: PyTree, dim: int = 0) -> PyTree:
    leaves, spec = tree_flatten(tree)
    for x in leaves:
        if not x.dim():
            raise MeshError(
                f"a collective over {op.axis!r} along dim {dim} was given a 0-d "
                "tensor: reshape it to (1,)."
            )
    ys = apply(op, [x.movedim(dim, 0) if dim else x for x in leaves])
    return tree_unflatten(spec, [y.movedim(0, dim) if dim else y for y in ys])


def all_gather(tree: PyTree, axis: str, mesh: Mesh, *, dim: int = 0) -> PyTree:
    r"""Concatenate every rank's tensor along ``dim``, on every rank.

    :math:`y = [x_0, \dots, x_{n-1}]`; the transpose is ``psum_scatter``. Each rank
    receives :math:`(n-1)/n` of the result's bytes.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> all_gather(torch.ones(3), "data", make_mesh({"data": 1}))
      tensor([1., 1., 1.])
    """
    return _mapped(wire.AllGather(mesh, axis), tree, dim)


def psum_scatter(tree: PyTree, axis: str, mesh: Mesh, *, dim: int = 0) -> PyTree:
    r"""Sum over ranks; rank ``r`` keeps the r-th chunk along ``dim``.

    The transpose is ``all_gather``. ``dim`` must be a multiple of the axis size.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> psum_scatter(torch.ones(3), "data", make_mesh({"data": 1}))
      tensor([1., 1., 1.])
    """
    n = mesh.axis_size(axis)
    for leaf in tree_flatten(tree)[0]:
        _check_divides(leaf, dim, n, "psum_scatter", axis)
    return _mapped(wire.PSumScatter(mesh, axis), tree, dim)


def psum(tree: PyTree, axis: str, mesh: Mesh) -> PyTree:
    r"""Sum over the ranks of ``axis``: :math:`y = \sum_r x_r`; its own transpose.

    As in JAX's pmap without replication tracking: the objective that is differentiated
    is the sum over ranks of what each rank returns.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> psum({"a": torch.tensor(2.0)}, "data", make_mesh({"data": 1}))
      {'a': tensor(2.)}
    """
    leaves, spec = tree_flatten(tree)
    ys = apply(
        wire.PSum(mesh, axis), [x.reshape(1) if not x.dim() else x for x in leaves]
    )
    return tree_unflatten(
        spec, [y.reshape(x.shape) for x, y in zip(leaves, ys, strict=True)]
    )


def pmean(tree: PyTree, axis: str, mesh: Mesh) -> PyTree:
    """``psum`` divided by the size of the axis.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> pmean(torch.tensor(2.0), "data", make_mesh({"data": 1}))
      tensor(2.)
    """
    leaves, spec = tree_flatten(psum(tree, axis, mesh))
    return tree_unflatten(spec, [y / mesh.axis_size(axis) for y in leaves])


def ppermute(
    tree: PyTree, axis: str, mesh: Mesh, perm: Iterable[tuple[int, int]]
) -> PyTree:
    """Send along ``(source, target)`` pairs; ranks that nobody sends to get zeros.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> ppermute(torch.ones(2), "data", make_mesh({"data": 1}), [(0, 0)])
      tensor([1., 1.])
    """
    pairs, n = tuple(perm), mesh.axis_size(axis)
    sources, targets = [s for s, _ in pairs], [d for _, d in pairs]
    if len(set(sources)) < len(pairs) or len(set(targets)) < len(pairs):
        raise MeshError(f"ppermute over {axis!r}: a rank appears twice in {pairs}")
    if any(not 0 <= r < n for r in sources + targets):
        raise MeshError(f"ppermute over {axis!r}: ranks are 0..{n - 1}; got {pairs}")
    return _mapped(wire.PPermute(mesh, axis, pairs=pairs), tree)


def all_to_all(
    tree: PyTree, axis: str, mesh: Mesh, *, split_dim: int, concat_dim: int
) -> PyTree:
    """Split along ``split_dim``, exchange, concatenate along ``concat_dim``.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> x = torch.ones(2, 3)
      >>> mesh = make_mesh({"data": 1})
      >>> all_to_all(x, "data", mesh, split_dim=0, concat_dim=1).shape
      torch.Size([2, 3])
    """
    n = mesh.axis_size(axis)
    leaves, spec = tree_flatten(tree)
    stacked = []
    for x in leaves:
        _check_divides(x, split_dim, n, "all_to_all", axis)
        dim = split_dim % x.dim()
        stacked.append(x.unflatten(dim, (n, x.shape[dim] // n)).movedim(dim, 0))
    joined = []
    for x, y in zip(leaves, apply(wire.AllToAll(mesh, axis), stacked), strict=True):
        dim = concat_dim % x.dim()
        joined.append(y.movedim(0, dim).flatten(dim, dim + 1))
    return tree_unflatten(spec, joined)


def axis_index(axis: str, mesh: Mesh) -> torch.Tensor:
    """This rank's coordinate along ``axis``: a 0-d int64 tensor.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> axis_index("data", make_mesh({"data": 1}))
      tensor(0)
    """
    index = mesh.axis_index(axis)
    if isinstance(index, torch.Tensor):
        return index
    return torch.full((), index, dtype=torch.int64, device=mesh.device)


def axis_size(axis: str, mesh: Mesh) -> int:
    """Number of ranks along ``axis``.

    Example:
      >>> from zfunc.core.mesh import AbstractMesh
      >>> axis_size("data", AbstractMesh({"data": 8}))
      8
    """
    return mesh.axis_size(axis)


def _check_divides(x: torch.Tensor, dim: int, n: int, name: str, axis: str) -> None:
    if not x.dim() or x.shape[dim] % n:
        got = f"dim {dim} has size {x.shape[dim]}" if x.dim() else "it is 0-d"
        raise MeshError(
            f"{name} over {axis!r} splits a dim into {n} equal chunks, but {got}: pad "
            "it, or use a size that divides."
        )
