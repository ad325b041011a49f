# SPDX-License-Identifier: Apache-2.0
"""``Batched``: one chain of elementwise calls over many leaves, in few launches.

An optimizer is the same dozen of calls for every parameter. Leaf by leaf, each call on
a large leaf goes through memory, and each on a small one costs more to start than to
run. Here large leaves are cut into chunks that stay in the cache for the whole chain,
and small ones are joined to a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from zfunc.program.chain import Chain

Tensors = list[torch.Tensor]
Task = tuple[int, ...]

# Of torch's own gradient buckets; they have no types.
_flatten: Final[Callable[..., torch.Tensor]] = torch._C._nn.flatten_dense_tensors
_unflatten: Final[Callable[..., Any]] = torch._C._nn.unflatten_dense_tensors


@dataclass(frozen=True, eq=False)
class Batched:
    """A chain of elementwise calls over the leaves of several columns.

    Operands: for each column the list of its leaves, the i-th ones all of one shape;
    then the 0-d tensors that all leaves share. Results: for each of the chain's first
    ``num_outputs`` wholes its leaves; then for each of ``sums``, the place of a whole,
    the 0-d sums of its leaves. A whole that is only summed is let go of, leaf by leaf.

    Attributes:
      over: For each output and leaf, whether it is written over the leaf of its
        ``column``, which nothing else may use then.
      strides: What each leaf has in all columns, and is copied to where it has not.
      tasks: The leaves that run together: several joined, or one, cut into chunks.
      chunk_numel: The most elements that one call works on.
    """

    chain: Chain
    num_outputs: int
    sums: tuple[int, ...]
    over: tuple[tuple[bool, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    tasks: tuple[Task, ...]
    chunk_numel: int

    __name__ = "batched"

    def __repr__(self) -> str:
        return f"<{len(self.chain.calls)} calls over {len(self.strides)} leaves>"

    def __call__(self, *operands: Any) -> Tensors:
        """The results; what is written over a leaf is that very tensor."""
        run = _Run(self, operands)
        for task in self.tasks:
            if len(task) > 1:
                run.joined(task)
            else:
                run.alone(task[0])
        return [x for column in (*run.outputs, *run.sums) for x in column]

    def operand_of(self, result: int) -> tuple[int, int] | None:
        """The column and the leaf whose successor a result is; None for a sum."""
        j, leaf = divmod(result, len(self.strides))
        column = self.chain.wholes[j].column if j < self.num_outputs else None
        return None if column is None else (column, leaf)

    def extra_bytes(self, *operands: Any) -> int:
        """The most bytes that a call has at once besides its operands."""
        columns, chain = operands[: self.chain.num_columns], self.chain
        sizes: list[int] = [x.numel() for x in columns[0]]
        whole_bytes = [chain.calls[w.value].dtype.itemsize for w in chain.wholes]
        width = min(max(sum(sizes[i] for i in t) for t in self.tasks), self.chunk_numel)
        scratch = width * sum(dtype.itemsize for dtype in chain.scratch)
        made, most = 0, scratch
        for task in self.tasks:
            numel = sum(sizes[i] for i in task)
            new = sum(
                sizes[i] * whole_bytes[j]
                for j in range(self.num_outputs)
                for i in task
                if not self.over[j][i]
            )
            if len(task) > 1:  # joined: every column, and wholes of their own memory
                free = [j for j, w in enumerate(chain.wholes) if w.column is None]
                own: int = sum(column[0].dtype.itemsize for column in columns)
                own += sum(whole_bytes[j] for j in free)
            else:  # what is only summed
                own = sum(whole_bytes[self.num_outputs :])
            most = max(most, scratch + made + numel * own + new)
            made += new
        return most


class _Run:
    """One call of a ``Batched``: its operands, its results, and scratch for a chunk."""

    def __init__(self, batched: Batched, operands: Sequence[Any]) -> None:
        chain = batched.chain
        self._batched, self._wholes, self._run = batched, chain.wholes, chain.run
        self._columns: Sequence[Tensors] = operands[: chain.num_columns]
        self._scalars = operands[chain.num_columns :]
        self._dtypes = [chain.calls[whole.value].dtype for whole in chain.wholes]
        first = self._columns[0]
        self.outputs = [list(first) for _ in range(batched.num_outputs)]
        self.sums = [list(first) for _ in batched.sums]
        sizes = [x.numel() for x in first]
        widest = max(sum(sizes[i] for i in task) for task in batched.tasks)
        self._width = min(widest, batched.chunk_numel)
        self._scratch = [
            first[0].new_empty(self._width, dtype=d) for d in chain.scratch
        ]
        self._shaped: dict[Any, Tensors] = {}

    def alone(self, i: int) -> None:
        """Run one leaf, a chunk at a time if it is larger than that."""
        batched, strides = self._batched, self._batched.strides[i]
        leaves = [_with_strides(column[i], strides) for column in self._columns]
        wholes = [
            leaves[whole.column or 0]
            if j < batched.num_outputs and batched.over[j][i]
            else torch.empty_like(leaves[0], dtype=dtype)
            for j, (whole, dtype) in enumerate(
                zip(self._wholes, self._dtypes, strict=True)
            )
        ]
        if leaves[0].numel() <= batched.chunk_numel:
            scratch = self._scratch_like(leaves[0], strides)
            self._run(*leaves, *wholes, *scratch, *self._scalars)
        else:
            chunk = batched.chunk_numel
            rows = [_flat(x).split(chunk) for x in leaves + wholes]
            for row in zip(*rows, strict=True):
                self._launch(row)
        for j, column in enumerate(self.outputs):
            column[i] = wholes[j]
        for j, sums in zip(batched.sums, self.sums, strict=True):
            sums[i] = wholes[j].sum()

    def _scratch_like(self, leaf: torch.Tensor, strides: tuple[int, ...]) -> Tensors:
        """The scratch in the shape of a leaf: layers have leaves of the same shapes."""
        key = (leaf.shape, strides)
        if key not in self._shaped:
            views = [x.as_strided(leaf.shape, strides) for x in self._scratch]
            self._shaped[key] = views
        return self._shaped[key]

    def joined(self, task: Task) -> None:
        """Run several leaves as one chunk, and copy the results to where they go."""
        given = [[column[i] for i in task] for column in self._columns]
        buffers = [_flatten(leaves) for leaves in given]
        for whole, dtype in zip(self._wholes, self._dtypes, strict=True):
            free = whole.column is None
            new = torch.empty_like(buffers[0], dtype=dtype) if free else None
            buffers.append(buffers[whole.column or 0] if new is None else new)
        self._launch(buffers)
        results = [_unflatten(x, given[0]) for x in buffers[len(given) :]]
        for j, column in enumerate(self.outputs):
            over, source = self._batched.over[j], given[self._wholes[j].column or 0]
            places = [
                x if over[i] else torch.empty_like(x, dtype=self._dtypes[j])
                for i, x in zip(task, source, strict=True)
            ]
            torch._foreach_copy_(places, results[j])
            for i, place in zip(task, places, strict=True):
                column[i] = place
        for j, sums in zip(self._batched.sums, self.sums, strict=True):
            for i, result in zip(task, results[j], strict=True):
                sums[i] = result.sum()

    def _launch(self, buffers: Sequence[torch.Tensor]) -> None:
        numel, scratch = buffers[0].numel(), self._scratch
        if numel < self._width:
            scratch = [x[:numel] for x in scratch]
        self._run(*buffers, *scratch, *self._scalars)


def _with_strides(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The tensor, or a copy with these strides if a kernel chose others."""
    if x.stride() == strides:
        return x
    made = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    return made.copy_(x)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All elements of a dense tensor, in the order of memory."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))
