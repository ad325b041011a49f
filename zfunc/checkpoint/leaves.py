# SPDX-License-Identifier: Apache-2.0
"""The leaves of a state, as a checkpoint describes them."""

from __future__ import annotations

import collections
from typing import Any

import torch

from zfunc.checkpoint.layout import dtype_name, stored_dtype
from zfunc.checkpoint.manifest import LeafEntry
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, leaves_with_path, tree_leaves


def mesh_of(state: Any, what: str) -> Mesh:
    """The one mesh on which a state lives; a ``CheckpointError`` if it cannot be saved.

    Args:
      state: made by ``zf.shard``, or returned by a step.
      what: names the argument in errors, as "save: state".

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> mesh_of(shard(torch.ones(2), make_mesh({"data": 1})), "save: state").shape
      {'data': 1}
    """
    if not isinstance(state, TrainState):
        raise CheckpointError(
            f"{what} is a {type(state).__name__}: give the TrainState that "
            "zf.shard(params, mesh, tx=tx) or a step returned."
        )
    meshes = dict.fromkeys(
        leaf.sharding.mesh
        for leaf in tree_leaves(state, is_sharded)
        if is_sharded(leaf)
    )
    if not meshes:
        raise CheckpointError(
            f"{what} has no placed leaf (unshard was applied?): give the state as "
            "zf.shard(params, mesh, tx=tx) or a step returned it."
        )
    if len(meshes) > 1:
        shapes = ", ".join(str(mesh.shape) for mesh in meshes)
        raise CheckpointError(f"{what} lives on several meshes: {shapes}.")
    mesh: Mesh = next(iter(meshes))
    if mesh.kind == "simulated":
        raise CheckpointError(
            f"{what} is simulated: its buffers hold all the ranks of {mesh.shape}. "
            "Take the full tensors with sim.unshard(state) and place them with "
            "zf.shard(params, zf.make_mesh({'data': 1}), tx=tx)."
        )
    if mesh.kind == "abstract":
        raise CheckpointError(
            f"{what} lives on an AbstractMesh and has no values: use zf.make_mesh."
        )
    return mesh


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, placed leaves whole.

    Raises:
      CheckpointError: two leaves of one path, or a leaf that is not a tensor.

    Example:
      >>> named_leaves({"params": {"w": torch.ones(1)}})
      {'params/w': tensor([1.])}
    """
    pairs = leaves_with_path(tree, is_sharded)
    leaves = dict(pairs)
    if len(leaves) < len(pairs):
        count = collections.Counter(path for path, _ in pairs)
        twice = count.most_common(1)[0][0]
        raise CheckpointError(
            f"two leaves have the path {twice!r}: rename a key that contains '/', or "
            "one of two keys with the same text."
        )
    for path, leaf in pairs:
        value = buffer_of(leaf)
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{path} is a {type(value).__name__}, not a tensor: a checkpoint has "
                "tensors only; wrap it with torch.as_tensor(...)."
            )
    return leaves


def buffer_of(leaf: Any) -> Any:
    """This rank's tensor of a leaf, placed or plain.

    Example:
      >>> buffer_of(torch.ones(1))
      tensor([1.])
    """
    return leaf.buffer if is_sharded(leaf) else leaf


def entry_of(path: str, leaf: Any) -> LeafEntry:
    """The description of a leaf.

    Raises:
      CheckpointError: a dtype that cannot be stored.

    Example:
      >>> entry_of("step", torch.tensor(3)).dtype
      'int64'
    """
    buffer = buffer_of(leaf)
    name = dtype_name(buffer.dtype)
    if stored_dtype(name) is None:
        raise CheckpointError(
            f"{path} has dtype {name}, which the safetensors format does not have: "
            "convert it (view_as_real for complex128)."
        )
    shape = leaf.global_shape if isinstance(leaf, Sharded) else tuple(buffer.shape)
    return LeafEntry(
        path=path,
        dtype=name,
        global_shape=shape,
        local_shape=tuple(buffer.shape),
        spec=tuple(leaf.sharding.spec) if isinstance(leaf, Sharded) else None,
    )
