# SPDX-License-Identifier: Apache-2.0
"""Each collective as a linear operator: how it runs, simulates and transposes.

All operators act on dim 0 of a list of tensors of one dtype; ``collectives`` moves
other dims there. Reductions add along one binary tree over the ranks on gloo and in the
simulator (in at least float32), so the two agree bit for bit; NCCL reduces in its own
order.

Why not the stock gloo reductions: its reduce-scatter is one all-reduce per rank (1.5
times slower than all_to_all and a local sum), and its all-reduce adds in an order that
depends on the world size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zfunc.core.errors import MeshError
from zfunc.core.mesh import Mesh

Tensors = list[torch.Tensor]
# Small tensors share a message (0.3 ms of latency each on gloo); large ones go alone,
# which saves the copy into a bucket.
BUCKET_BYTES = 4 * 2**20
ALONE_BYTES = 2**18
SMALL_REDUCTION_ELEMENTS = 2**12


@dataclass(frozen=True)
class Op:
    """A linear map between per-rank values along one axis of a mesh.

    ``wire`` is the dtype sent (None: the input's), ``back_wire`` the dtype that its
    transpose sends, ``outs`` the dtypes of the results (None: the dtype sent). Every
    kind of operator has ``run_bucket`` for ranks that talk (tensors of one dtype, in as
    few messages as it can), ``simulate`` for values stacked by rank, ``transpose``.
    """

    mesh: Mesh
    axis: str
    wire: torch.dtype | None = None
    back_wire: torch.dtype | None = None
    outs: tuple[torch.dtype, ...] | None = None

    @property
    def n(self) -> int:
        return self.mesh.axis_size(self.axis)

    def transposed(self, kind: type[Op], in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return kind(self.mesh, self.axis, self.back_wire, self.wire, in_dtypes)


def fold_add(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum along a binary tree, in float32 when the parts are narrower.

    The first ``2^k`` of n parts, for the largest ``2^k < n``, and the rest: so 4 parts
    are added as 2 sums of 2 are, wherever those were made.
    """
    dtype = parts[0].dtype
    if dtype.is_floating_point and dtype.itemsize < 4:
        return _tree_sum([p.float() for p in parts]).to(dtype)
    return _tree_sum(parts)


def first_half(num_parts: int) -> int:
    """How many of several parts the first operand of their last addition is the sum of.

    Example:
      >>> [first_half(n) for n in (2, 3, 4, 5, 8)]
      [1, 2, 2, 4, 4]
    """
    return 1 << (num_parts - 1).bit_length() - 1


def _tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    half = first_half(len(parts))
    return _tree_sum(parts[:half]) + _tree_sum(parts[half:])


@dataclass(frozen=True)
class AllGather(Op):
    """y on every rank = the x of all ranks, concatenated."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(PSumScatter, in_dtypes)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops._c10d_functional
        return _wait(ops.all_gather_into_tensor(x, self.n, self.mesh.group(self.axis)))

    def run_bucket(self, xs: Tensors) -> Tensors:
        flat, sizes = _flatten(xs, 0)
        parts = self.run(flat).view(self.n, -1).split(sizes, 1)
        return [
            p.reshape(self.n * x.shape[0], *x.shape[1:])
            for p, x in zip(parts, xs, strict=True)
        ]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(0, 1).unsqueeze(0).expand(self.n, *([-1] * (x.dim() - 1)))


@dataclass(frozen=True)
class PSumScatter(Op):
    """y on rank r = the r-th chunk of the sum of all x."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(AllGather, in_dtypes)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        ops, group = torch.ops._c10d_functional, self.mesh.group(self.axis)
        if self.mesh.native_reductions:
            return _wait(ops.reduce_scatter_tensor(x, "sum", self.n, group))
        splits = [x.shape[0] // self.n] * self.n
        received = _wait(ops.all_to_all_single(x, splits, splits, group))
        return fold_add(received.chunk(self.n))

    def run_bucket(self, xs: Tensors) -> Tensors:
        flat, sizes = _flatten(xs, self.n)
        parts = self.run(flat.flatten()).split(sizes)
        return [
            p.view(x.shape[0] // self.n, *x.shape[1:])
            for p, x in zip(parts, xs, strict=True)
        ]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(fold_add(x.unbind(0)).chunk(self.n))


@dataclass(frozen=True)
class PSum(Op):
    """y on every rank = the sum of all x; self-transpose."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(PSum, in_dtypes)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        ops, group = torch.ops._c10d_functional, self.mesh.group(self.axis)
        if self.mesh.native_reductions:
            return _wait(ops.all_reduce(x, "sum", group))
        gather = AllGather(self.mesh, self.axis)
        if x.numel() <= SMALL_REDUCTION_ELEMENTS:  # one latency instead of two
            return fold_add(gather.run(x).chunk(self.n))
        length = x.shape[0]
        padded = torch.nn.functional.pad(x, (0, -length % self.n))
        return gather.run(PSumScatter(self.mesh, self.axis).run(padded))[:length]

    def run_bucket(self, xs: Tensors) -> Tensors:
        flat, sizes = _flatten(xs, 0)
        parts = self.run(flat).split(sizes)
        return [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return fold_add(x.unbind(0)).unsqueeze(0).expand(x.shape)


@dataclass(frozen=True)
class AllToAll(Op):
    """Chunk j of rank r becomes chunk r of rank j; self-transpose."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(AllToAll, in_dtypes)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        splits = [x.shape[0] // self.n] * self.n
        ops, group = torch.ops._c10d_functional, self.mesh.group(self.axis)
        return _wait(ops.all_to_all_single(x, splits, splits, group))

    def run_bucket(self, xs: Tensors) -> Tensors:
        return [self.run(x.contiguous()) for x in xs]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([c.flatten(0, 1) for c in x.chunk(self.n, 1)])


@dataclass(frozen=True)
class PPermute(Op):
    """y on rank d = the x of rank s for each pair (s, d), zeros where no pair ends."""

    pairs: tuple[tuple[int, int], ...] = ()

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        flipped = tuple((d, s) for s, d in self.pairs)
        plain = self.transposed(PPermute, in_dtypes)
        return dataclasses.replace(plain, pairs=flipped)  # type: ignore[call-arg]

    def run_bucket(self, xs: Tensors) -> Tensors:
        return [self._exchange(x.contiguous()) for x in xs]

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        """An uneven all_to_all: every rank takes part, so no order can deadlock."""
        me, group = int(self.mesh.axis_index(self.axis)), self.mesh.group(self.axis)
        flat = x.flatten()
        send, receive = [0] * self.n, [0] * self.n
        for source, target in self.pairs:
            if source == me:
                send[target] = flat.numel()
            if target == me:
                receive[source] = flat.numel()
        outgoing = flat if sum(send) else flat[:0]
        ops = torch.ops._c10d_functional
        got = _wait(ops.all_to_all_single(outgoing, receive, send, group))
        return got.view(x.shape) if sum(receive) else torch.zeros_like(x)

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        source = {d: s for s, d in self.pairs}
        zero = torch.zeros_like(x[0])
        rows = [x[source[r]] if r in source else zero for r in range(self.n)]
        return torch.stack(rows)


@dataclass(frozen=True)
class AxisSlice(Op):
    """y on rank r = the r-th chunk of its own x; nothing travels."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(AxisPlace, in_dtypes)

    def run_bucket(self, xs: Tensors) -> Tensors:
        index = self.mesh.axis_index(self.axis)
        return [x.chunk(self.n)[index].clone() if x.shape[0] else x for x in xs]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.unflatten(1, (self.n, x.shape[1] // self.n))
        return torch.stack([chunks[r, r] for r in range(self.n)])


@dataclass(frozen=True)
class AxisPlace(Op):
    """y = zeros with x as the r-th chunk on rank r; nothing travels."""

    def transpose(self, in_dtypes: tuple[torch.dtype, ...]) -> Op:
        return self.transposed(AxisSlice, in_dtypes)

    def run_bucket(self, xs: Tensors) -> Tensors:
        index = self.mesh.axis_index(self.axis)
        zeros = [torch.zeros_like(x) for x in xs]
        return [
            torch.cat([*[z] * index, x, *[z] * (self.n - 1 - index)])
            for x, z in zip(xs, zeros, strict=True)
        ]

    def simulate(self, x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x[0])
        rows = [[z] * r + [x[r]] + [z] * (self.n - 1 - r) for r in range(self.n)]
        return torch.stack([torch.cat(row) for row in rows])


def _wait(x: torch.Tensor) -> torch.Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]


def _flatten(xs: Tensors, rows: int) -> tuple[torch.Tensor, list[int]]:
    """A contiguous buffer, (total,) or (rows, total / rows), and the pieces' sizes."""
    flats = [x.reshape(rows, -1) if rows else x.reshape(-1) for x in xs]
    sizes = [f.shape[-1] for f in flats]
    return (flats[0] if len(xs) == 1 else torch.cat(flats, -1)).contiguous(), sizes


def run(op: Any, xs: Tensors) -> Tensors:
    """Run ``op`` on a real or abstract mesh: few large messages, one per bucket."""
    sent = [x.to(op.wire or x.dtype) for x in xs]
    if op.n == 1 and not isinstance(op, PPermute):
        ys = [x.view_as(x) for x in sent]
    elif op.n == 1:
        ys = [x.clone() if op.pairs else torch.zeros_like(x) for x in sent]
    elif op.mesh.kind == "traced":  # the form that passes work on: no buckets yet
        check_fake(op.mesh, sent)
        ys = [op.run_bucket([x])[0] for x in sent]
    else:
        _check_runnable(op, sent)
        ys = _by_bucket(op.run_bucket, sent)
    return _cast(op, ys)


def simulate(op: Any, xs: Tensors) -> Tensors:
    """Run ``op`` on stacked values, one row per rank of the mesh."""
    sizes = [n for _, n in op.mesh.axes]
    position = op.mesh.axis_position(op.axis)
    ys = []
    for x in xs:
        sent = x.to(op.wire or x.dtype).unflatten(0, sizes).movedim(position, 0)
        lanes = sent.flatten(1, len(sizes) - 1) if len(sizes) > 1 else sent.unsqueeze(1)
        mixed = torch.stack(
            [op.simulate(lanes[:, i]) for i in range(lanes.shape[1])], 1
        )
        others = sizes[:position] + sizes[position + 1 :]
        y = mixed.unflatten(1, others) if others else mixed.squeeze(1)
        ys.append(y.movedim(0, position).flatten(0, len(sizes) - 1))
    return _cast(op, ys)


def _cast(op: Op, ys: Tensors) -> Tensors:
    outs = op.outs or tuple(y.dtype for y in ys)
    return [y.to(dtype) for y, dtype in zip(ys, outs, strict=True)]


def _by_bucket(fn: Callable[[Tensors], Tensors], xs: Tensors) -> Tensors:
    """Apply ``fn`` to runs of tensors of one dtype, each of at most BUCKET_BYTES."""
    order = sorted(range(len(xs)), key=lambda i: str(xs[i].dtype))
    results: dict[int, torch.Tensor] = {i: xs[i] for i in order}
    for _, same in itertools.groupby(order, key=lambda i: xs[i].dtype):
        for bucket in _split(list(same), [x.nbytes for x in xs]):
            outputs = fn([xs[i] for i in bucket])
            results.update(zip(bucket, outputs, strict=True))
    return [results[i] for i in range(len(xs))]


def _split(indices: list[int], sizes_bytes: list[int]) -> list[list[int]]:
    buckets: list[list[int]] = []
    filled_bytes = BUCKET_BYTES + 1
    for i in sorted(indices, key=lambda i: sizes_bytes[i] >= ALONE_BYTES):
        alone = sizes_bytes[i] >= ALONE_BYTES
        if alone or filled_bytes + sizes_bytes[i] > BUCKET_BYTES:
            buckets.append([])
            filled_bytes = 0
        buckets[-1].append(i)
        filled_bytes += sizes_bytes[i]
    return buckets


def _check_runnable(op: Op, xs: Tensors) -> None:
    if op.mesh.kind == "simulated":
        raise MeshError(
            "a collective on a simulated mesh was called outside of the simulation: "
            "call it inside the function given to zfunc.testing.simulate."
        )
    if op.mesh.kind == "abstract":
        check_fake(op.mesh, xs)


def check_fake(mesh: Mesh, xs: Tensors) -> None:
    """Raise ``MeshError`` for real tensors on an abstract mesh."""
    if not all(_is_fake(x) for x in xs):
        raise MeshError(
            f"the mesh {mesh.shape} is abstract: it has no ranks to talk to. Give "
            "it fake tensors (zf.abstract(tree)), or use zf.make_mesh inside a job."
        )


def _is_fake(x: torch.Tensor) -> bool:
    unwrapped = x
    while torch._C._functorch.is_functorch_wrapped_tensor(unwrapped):
        unwrapped = torch._C._functorch.get_unwrapped(unwrapped)
    return unwrapped.is_meta or isinstance(unwrapped, torch._subclasses.FakeTensor)
