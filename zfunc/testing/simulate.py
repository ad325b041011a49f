# SPDX-License-Identifier: Apache-2.0
"""All the ranks of a mesh in one process: one level of ``torch.vmap`` is the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from zfunc.core.mesh import AbstractMesh, Mesh
from zfunc.core.state import TrainState, shard, unshard
from zfunc.core.step import TrainStep
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    map_with_path,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from zfunc.transforms.gathered import with_rank

# To mypy a NamedTuple with __call__ is not a Callable.
Step = TrainStep | Callable[[TrainState, PyTree], TrainState]


def spmd(
    fn: Callable[..., PyTree], mesh_shape: Mapping[str, int]
) -> Callable[..., PyTree]:
    """Run ``fn(mesh, *args)`` as every rank of a mesh at once, in this process.

    The arguments and the result are pytrees whose tensors have the ranks as their first
    dim (row-major over the axes). No process group, no copies of the interpreter, and
    the collectives mix the rows. ``fn`` is one program for all ranks: Python branches
    on the values of tensors are errors. Reductions add in the order that gloo has.

    Raises:
      ValueError: an argument whose first dim is not the number of ranks, with its path.

    Example:
      >>> from zfunc.core.collectives import psum
      >>> total = spmd(lambda mesh, x: psum(x, "data", mesh), {"data": 3})
      >>> total(torch.tensor([1.0, 2.0, 4.0]))
      tensor([7., 7., 7.])
    """
    frozen = dataclasses.replace(AbstractMesh(mesh_shape), kind="simulated")

    def simulated(*args: PyTree) -> PyTree:
        leaves, spec = tree_flatten(args)
        for path, leaf in leaves_with_path(args):
            shape = tuple(getattr(leaf, "shape", ()))
            if not shape or shape[0] != frozen.size:
                raise ValueError(
                    f"argument {path}: the first dim must be the {frozen.size} ranks "
                    f"of {frozen.shape}; got shape {shape}. (torch.stack one per rank.)"
                )
        out_spec: list[Any] = []

        def one_rank(rank: torch.Tensor, *local: torch.Tensor) -> Any:
            mesh = dataclasses.replace(frozen, rank=rank)
            out = fn(mesh, *with_rank(tree_unflatten(spec, local), rank))
            outputs, structure = tree_flatten(with_rank(out, 0))
            out_spec.append(structure)
            return tuple(outputs)

        ranks = torch.arange(frozen.size)
        mapped = torch.func.vmap(one_rank, randomness="different")
        outputs = mapped(ranks, *leaves)
        return tree_unflatten(out_spec[-1], outputs)

    return simulated


class Simulation(NamedTuple):
    """A step on all the ranks of a mesh; states and batches are stacked by rank.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(0.5), zf.partition(zero=1)
      ... )
      >>> sim = simulate(step, {"data": 2})
      >>> state = sim.shard(torch.ones(3))
      >>> state = sim(state, torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
      >>> sim.unshard(state).params
      tensor([0., 0., 0.])
    """

    step: Step
    mesh_shape: Mapping[str, int]

    @property
    def num_ranks(self) -> int:
        """Ranks of the mesh."""
        return AbstractMesh(self.mesh_shape).size

    def shard(self, params: PyTree, **options: Any) -> TrainState:
        """``zf.shard(params, mesh, **options)`` on every rank."""

        def program(mesh: Mesh, stacked: PyTree) -> TrainState:
            return shard(stacked, mesh, **options)

        stacked = tree_map(lambda x: x.expand(self.num_ranks, *x.shape), params)
        return spmd(program, self.mesh_shape)(stacked)  # type: ignore[no-any-return]

    def __call__(self, state: TrainState, batch: PyTree) -> TrainState:
        """One step; every tensor of ``batch`` is stacked by rank."""
        program = spmd(lambda mesh, s, b: self.step(s, b), self.mesh_shape)
        return program(state, batch)  # type: ignore[no-any-return]

    def unshard(self, state: TrainState) -> TrainState:
        """The full state, as rank 0 sees it."""
        return self.unshard_all(state)[0]

    def unshard_all(self, state: TrainState) -> list[TrainState]:
        """The full state as each rank sees it: equal, unless something broke."""
        stacked = spmd(lambda mesh, s: unshard(s), self.mesh_shape)(state)
        leaves, spec = tree_flatten(stacked)
        rows = zip(*[leaf.unbind(0) for leaf in leaves], strict=True)
        return [tree_unflatten(spec, row) for row in rows]


def simulate(step: Step, mesh_shape: Mapping[str, int]) -> Simulation:
    """``step`` on every rank of a mesh, in one process and without a process group.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.partition(zero=3)
      ... )
      >>> sim = simulate(step, {"data": 2})
      >>> state = sim(sim.shard(torch.ones(3)), torch.ones(2, 3))
      >>> sim.unshard(state).grads
      tensor([1., 1., 1.])
    """
    return Simulation(step, mesh_shape)


def split_batch(
    batch: PyTree, mesh_shape: Mapping[str, int], axis: str = "data"
) -> PyTree:
    """A global batch as the slices that the ranks are given, stacked by rank.

    Dim 0 is divided over ``axis``; ranks that differ along other axes get the same
    samples. 0-d tensors go to every rank.

    Raises:
      MeshError: ``axis`` is not an axis of the mesh.
      ValueError: a dim 0 that the axis does not divide, with the path.

    Example:
      >>> split_batch(torch.arange(4), {"data": 2})
      tensor([[0, 1],
              [2, 3]])
    """
    mesh = AbstractMesh(mesh_shape)
    n = mesh.axis_size(axis)
    seen_from = [dataclasses.replace(mesh, rank=r) for r in range(mesh.size)]
    slices = [one.axis_index(axis) for one in seen_from]

    def one(path: str, x: torch.Tensor) -> torch.Tensor:
        if not x.dim():
            return x.expand(mesh.size)
        if x.shape[0] % n:
            raise ValueError(
                f"batch[{path!r}] has {x.shape[0]} samples, which the {n} ranks of "
                f"axis {axis!r} do not divide: give a multiple of {n}."
            )
        parts: torch.Tensor = x.unflatten(0, (n, x.shape[0] // n))
        return parts[slices]

    return map_with_path(one, batch)
