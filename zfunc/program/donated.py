# SPDX-License-Identifier: Apache-2.0
"""Donation under ``jit``: a program takes over the state that it is given.

The gradients of the last step are freed before the program starts. Parameters and
moments are the program's alone while it runs, and a pass may have it write their
successors over them. What is left of the old state are markers, made once per program,
that raise on use.

Nothing that somebody else can still reach is written over: a tensor that is referred
to, looked at by a view or an array, saved for a backward, or in memory that torch does
not manage is copied first. How many references a tensor has that is nobody else's is
measured, not assumed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from zfunc.core.sharding import is_sharded
from zfunc.core.state import Donated, TrainState
from zfunc.core.tree import PyTree, leaves_with_path, tree_flatten
from zfunc.program import ir
from zfunc.program.inplace import written_over
from zfunc.program.layout import Matched
from zfunc.program.program import Program

Run = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True, eq=False)
class Donation:
    """What one program takes over of the states that it is given.

    Attributes:
      nodes: The positions of the placed leaves of params and moments among the nodes of
        a call.
      tensors: Those of their buffers among its tensors.
      markers: What is left in them.
      grad_spec: The structure that ``grad_markers`` are for: that of the parameters.
      grad_markers: What is left of such gradients.
      written: The positions of the tensors that the program writes over.
      unused: Those of the donated tensors that it does not read.
    """

    nodes: tuple[int, ...]
    tensors: tuple[int, ...]
    markers: tuple[Donated, ...]
    grad_spec: Any
    grad_markers: tuple[Donated, ...]
    written: tuple[int, ...]
    unused: tuple[int, ...]

    def run(self, run: Run, grads: PyTree, matched: Matched) -> list[Any]:
        """``run`` on the arguments of a call, which it uses up.

        A program that raises before it has written to anything, or has let go of
        anything, gives the state back, with gradients of zero.
        """
        nodes, tensors = [matched.nodes[i] for i in self.nodes], matched.tensors
        dead = self._mark_grads(grads)
        _mark(nodes, self.markers)
        kept = {i: tensors[i] for i in self.unused}
        written = [tensors[i] for i in self.written]
        before = _versions(written)
        try:
            for i in held(written, num_holders=2):  # written and tensors
                kept[self.written[i]] = written[i]
                tensors[self.written[i]] = written[i].clone()
            return run(tensors)
        except BaseException:
            left: list[Any] = [
                kept.get(i, tensors[i] if tensors else None) for i in self.tensors
            ]
            if _versions(written) == before and all(x is not None for x in left):
                _mark(nodes, left)
                _mark(dead, map(torch.zeros_like, left[: len(dead)]))
            raise

    def _mark_grads(self, grads: PyTree) -> list[Any]:
        """Let go of the old gradients; the nodes that a failed step gives back."""
        nodes, spec = tree_flatten(grads, is_sharded)
        if spec == self.grad_spec and all(map(is_sharded, nodes)):
            _mark(nodes, self.grad_markers)
            return nodes
        for path, node in leaves_with_path(grads, is_sharded):
            if is_sharded(node):
                _mark([node], [_marker("grads", path)])
        return []


def donation_of(state: TrainState, program: Program) -> Donation:
    """What a program takes over of states like this one."""
    markers = [
        _marker(field, path) if is_sharded(node) else None
        for field, tree in (("params", state.params), ("moments", state.moments))
        for path, node in leaves_with_path(tree, is_sharded)
    ]
    params = leaves_with_path(state.params, is_sharded)
    # The step counter comes before the parameters.
    nodes = [i for i, marker in enumerate(markers, 1) if marker is not None]
    inputs = ir.inputs_of(program.graph)
    places = [i for i, path in enumerate(program.inputs) if path in program.donated]
    written = written_over(program.graph)
    return Donation(
        tuple(nodes),
        tuple(places),
        tuple(marker for marker in markers if marker is not None),
        tree_flatten(state.params, is_sharded)[1],
        tuple(_marker("grads", path) for path, _ in params),
        tuple(i for i in places if inputs[i] in written),
        tuple(i for i in places if not inputs[i].users),
    )


def with_donated(program: Program, state: TrainState) -> Program:
    """The program, told which inputs are its own: the placed params and moments."""
    paths = [
        f"{field}/{path}".rstrip("/")
        for field, tree in (("params", state.params), ("moments", state.moments))
        for path, node in leaves_with_path(tree, is_sharded)
        if is_sharded(node)
    ]
    return dataclasses.replace(program, donated=frozenset(paths))


def held(tensors: list[torch.Tensor], num_holders: int) -> list[int]:
    """The tensors whose memory something besides ``num_holders`` lists can reach.

    Example:
      >>> mine, others = torch.ones(2), torch.ones(2)
      >>> seen = others[1:]
      >>> lists = [mine, others], [mine, others]
      >>> del mine, others
      >>> held(lists[0], num_holders=2)
      [1]
    """
    if not tensors:
        return []
    probe = [tensors[0].new_empty(1)]
    holders = [list(probe) for _ in range(num_holders - 1)]
    (unheld,) = _traits(probe)
    del holders
    return [i for i, traits in enumerate(_traits(tensors)) if traits != unheld]


def _traits(tensors: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    """What differs between tensors that only we can reach and others.

    A saved tensor counts as a reference, a view or a numpy array as a use of the
    storage; memory that torch did not allocate, or shares with a process, may be
    reached by what torch cannot count. Inference tensors cannot be written to.
    """
    storages = [x.untyped_storage() for x in tensors]
    columns = (
        map(sys.getrefcount, tensors),
        map(sys.getrefcount, storages),
        map(torch._C._storage_Use_Count, map(attrgetter("_cdata"), storages)),
        map(torch.UntypedStorage.resizable, storages),
        map(torch.UntypedStorage.is_shared, storages),
        map(torch.Tensor.is_inference, tensors),
    )
    return list(zip(*columns, strict=True))


def _mark(nodes: Iterable[Any], buffers: Iterable[Any]) -> None:
    """Put other buffers into placed leaves."""
    for node, buffer in zip(nodes, buffers, strict=True):
        node.__dict__["buffer"] = buffer  # frozen; __setattr__ takes twice as long


def _marker(field: str, path: str) -> Donated:
    return Donated(f"state.{field}[{path!r}]")


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    """How often each was written to; inference tensors never are."""
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]
