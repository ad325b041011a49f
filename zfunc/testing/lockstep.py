# SPDX-License-Identifier: Apache-2.0
"""``lockstep``: what ``zf.jit`` makes of a step, on all ranks in one process.

``simulate`` runs the step; here run the programs that are traced from it, each rank its
own, after any passes: so that passes can be compared with the step bit for bit, and
cannot deadlock (see ``messages``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from zfunc.core.mesh import AbstractMesh, Mesh
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import TrainState
from zfunc.core.step import TrainStep
from zfunc.core.tree import PyTree, tree_leaves, tree_map, tree_unflatten
from zfunc.program.jit import _traceable, jit
from zfunc.program.program import Pass, Program
from zfunc.testing.messages import run_lockstep
from zfunc.testing.simulate import Simulation

NO_PASSES: Final[tuple[Pass, ...]] = ()


class Lockstep(NamedTuple):
    """A jitted step on all ranks of a mesh; states and batches are stacked by rank.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(0.5), zf.partition(zero=1)
      ... )
      >>> two = lockstep(step, {"data": 2})
      >>> state, batch = two.shard(torch.ones(3)), torch.ones(2, 3)
      >>> two(state, batch).params.buffer.tolist()
      [[0.5, 0.5], [0.5, 0.0]]
    """

    step: TrainStep
    mesh_shape: Mapping[str, int]
    passes: tuple[Pass, ...] = NO_PASSES

    def shard(self, params: PyTree, **options: Any) -> TrainState:
        """``zf.shard(params, mesh, **options)`` on every rank."""
        return Simulation(self.step, self.mesh_shape).shard(params, **options)

    def lower(self, state: TrainState, batch: PyTree) -> list[Program]:
        """Each rank's program, after the passes."""
        jitted = jit(self.step, passes=self.passes)
        return [jitted.lower(*mine) for mine in self._by_rank(state, batch)]

    def arguments(self, state: TrainState, batch: PyTree) -> list[list[torch.Tensor]]:
        """The inputs of each rank's program, without its constants."""
        pairs = [(_traceable(self.step, s), b) for s, b in self._by_rank(state, batch)]
        return [
            [x for x in tree_leaves(pair) if isinstance(x, torch.Tensor)]
            for pair in pairs
        ]

    def __call__(
        self,
        state: TrainState,
        batch: PyTree,
        programs: Sequence[Program] | None = None,
    ) -> TrainState:
        """One step; with the programs of an earlier ``lower`` where they are given."""
        programs = programs or self.lower(state, batch)
        rows = run_lockstep(programs, self.arguments(state, batch))
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        simulated = dataclasses.replace(AbstractMesh(self.mesh_shape), kind="simulated")
        return _moved(tree_unflatten(programs[0].out_spec, stacked), simulated)  # type: ignore[no-any-return]

    def _by_rank(self, state: TrainState, batch: PyTree) -> list[tuple[Any, PyTree]]:
        """Each rank's state, on a mesh of its own, and its batch."""
        mesh = AbstractMesh(self.mesh_shape)
        # Passes that know gloo's groups from no groups take these for gloo's.
        mesh = dataclasses.replace(mesh, groups=tuple(mesh.shape))
        rows = []
        for rank in range(mesh.size):
            mine = tree_map(lambda x, r=rank: x[r].clone(), (state, batch))
            seen_from = dataclasses.replace(mesh, rank=rank)
            rows.append((_moved(mine[0], seen_from), mine[1]))
        return rows


def _moved(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same buffers, placed alike on another mesh of the same axes."""

    def one(node: Any) -> Any:
        if not is_sharded(node):
            return node
        sharding = dataclasses.replace(node.sharding, mesh=mesh)
        return Sharded(node.buffer, sharding, node.global_shape)

    return tree_map(one, tree, is_leaf=is_sharded)


def lockstep(
    step: TrainStep, mesh_shape: Mapping[str, int], passes: Sequence[Pass] = NO_PASSES
) -> Lockstep:
    """The programs of ``zf.jit(step, passes=passes)`` on every rank, in one process.

    Laws: ``lockstep(step, mesh) == simulate(step, mesh)``, for all passes.

    Example:
      >>> import zfunc as zf
      >>> from zfunc.program.passes import DEFAULT
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.partition(zero=3)
      ... )
      >>> two = lockstep(step, {"data": 2}, DEFAULT)
      >>> two(two.shard(torch.ones(3)), torch.ones(2, 3)).metrics.loss
      tensor([3., 3.])
    """
    return Lockstep(step, mesh_shape, tuple(passes))
