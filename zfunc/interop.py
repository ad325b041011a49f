# SPDX-License-Identifier: Apache-2.0
"""Interop with DTensor, at the edge: under torch.func a DTensor loses its methods."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn.functional import pad

from zfunc.core.errors import PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import NamedSharding, P, Sharded, is_sharded
from zfunc.core.tree import PyTree, map_with_path, tree_map


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    """The DeviceMesh over the mesh's own process groups."""
    resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009
    groups = [resolve(name) for name in mesh.groups]
    if len(groups) == 1:
        one = dist.get_process_group_ranks(groups[0])
        names = tuple(mesh.shape)
        return DeviceMesh.from_group(
            groups[0], mesh.device_type, one, mesh_dim_names=names
        )
    ranks = torch.arange(mesh.size).view(tuple(mesh.shape.values()))
    return DeviceMesh.from_group(
        groups, mesh.device_type, ranks, mesh_dim_names=tuple(mesh.shape)
    )


def to_dtensor(tree: PyTree) -> PyTree:
    """``Sharded`` leaves as DTensors sharing their memory: interop at the edge.

    Never inside the step: under ``torch.func`` a DTensor loses its methods. Needs a
    mesh of real ranks.

    Raises:
      PlacementError: a leaf on a mesh without processes.

    Example:
      >>> import zfunc as zf
      >>> state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({"data": 1}))
      >>> to_dtensor(state.params)
      Traceback (most recent call last):
      zfunc.core.errors.PlacementError: to_dtensor needs a mesh of processes, not a ...
    """

    def one(leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        mesh = leaf.sharding.mesh
        if mesh.kind != "process":
            raise PlacementError(
                f"to_dtensor needs a mesh of processes, not a {mesh.kind} one: make it "
                "with zf.make_mesh under torchrun."
            )
        placements: list[Placement] = [Replicate()] * len(mesh.axes)
        local = leaf.buffer
        for dim, axis in enumerate(leaf.sharding.spec):
            if axis is not None:
                placements[mesh.axis_position(axis)] = Shard(dim)
                rows, index = leaf.buffer.shape[dim], int(mesh.axis_index(axis))
                kept = min(max(leaf.global_shape[dim] - rows * index, 0), rows)
                local = local.narrow(dim, 0, kept)
        shape = torch.Size(leaf.global_shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, _device_mesh(mesh), placements, shape=shape, stride=stride
        )

    return tree_map(one, tree, is_leaf=is_sharded)


def from_dtensor(tree: PyTree, mesh: Mesh) -> PyTree:
    """DTensors as ``Sharded`` leaves on ``mesh``, padded at the tail; a copy.

    Raises:
      PlacementError: a DTensor on other axes, or with a placement other than
        ``Shard(dim)`` and ``Replicate()``.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from_dtensor({"not a DTensor": torch.ones(2)}, make_mesh({"data": 1}))
      {'not a DTensor': tensor([1., 1.])}
    """

    def one(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        names = leaf.device_mesh.mesh_dim_names
        if names != tuple(mesh.shape) or leaf.device_mesh.shape != (
            *mesh.shape.values(),
        ):
            raise PlacementError(
                f"{path}: the DTensor lives on {names} {leaf.device_mesh.shape}, the "
                f"mesh is {mesh.shape}: redistribute it first."
            )
        entries: list[str | None] = [None] * leaf.dim()
        for axis, placement in zip(mesh.shape, leaf.placements, strict=True):
            if type(placement) is Shard and entries[placement.dim] is None:
                entries[placement.dim] = axis
            elif not isinstance(placement, Replicate):
                raise PlacementError(
                    f"{path}: placement {placement} has no PartitionSpec: redistribute "
                    "to Shard(dim), one axis per dim, or Replicate()."
                )
        sharding = NamedSharding(mesh, P(*entries))
        local = leaf.to_local().detach()
        missing = [
            w - d
            for w, d in zip(sharding.local_shape(leaf.shape), local.shape, strict=True)
        ]
        padding = [v for m in reversed(missing) for v in (0, m)]
        buffer = pad(local, padding) if any(missing) else local.clone()
        return Sharded(buffer.contiguous(), sharding, tuple(leaf.shape))

    return map_with_path(one, tree)
