# SPDX-License-Identifier: Apache-2.0
"""Sums in one order for every number of ranks: the same bits on any world size.

The batch is cut into V virtual shards, a power of two. Each has a gradient of its
own, and these are added up along one binary tree over the V of them: a rank adds up
the subtree of the shards that it holds, and ``wire.fold_add`` goes on over the ranks.
So the number of ranks decides where an addition happens, and not which.
"""

from __future__ import annotations

from typing import Any

from zfunc.core.errors import PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.step import GradFn
from zfunc.core.tally import Samples, sample_counts
from zfunc.core.tree import PyTree, tree_map
from zfunc.core.update import widen
from zfunc.transforms.accumulate import Microbatched, microbatched


def in_fixed_order(
    grad_fn: GradFn, virtual_shards: int, num_ranks: int, mesh: Mesh
) -> GradFn:
    """The sum over this rank's virtual shards, along its subtree, in float32 at least.

    Microbatches of ``accumulate`` are virtual shards themselves: each gradient is that
    of one virtual shard already, whatever their number.

    Raises:
      PlacementError: a number of ranks times microbatches that does not divide the
        virtual shards, or ranks that add up in an order of their own.
      ValueError: (when called) a batch that cannot be cut into them.
    """
    num_microbatches = 1
    while isinstance(grad_fn, Microbatched):
        num_microbatches *= grad_fn.n
        grad_fn = grad_fn.grad_fn
    if virtual_shards % (num_ranks * num_microbatches):
        raise PlacementError(
            f"partition: {num_ranks} ranks with accumulate({num_microbatches}) do not "
            f"divide virtual_shards={virtual_shards}: all three are powers of two, and "
            "ranks times microbatches at most virtual_shards."
        )
    if num_ranks > 1 and mesh.device_type == "cuda":
        raise PlacementError(
            "partition: deterministic=True adds up in a fixed order on gloo alone; "
            f"the mesh {mesh.shape} is on GPUs, whose collectives have an "
            "order of their own: leave deterministic out, or use a mesh on the CPU."
        )
    local, num_local = grad_fn, virtual_shards // num_ranks
    for _ in range(num_local.bit_length() - 1):  # halves of halves: a binary tree
        local = microbatched(local, 2)

    def summed(params: PyTree, batch: PyTree, samples: Samples) -> Any:
        what = f"deterministic=True with {virtual_shards} virtual shards"
        for path, size in sample_counts(batch, what).items():
            if size % num_local:
                raise ValueError(
                    f"partition: {what} cuts this rank's batch into {num_local} equal "
                    f"ones, but batch[{path!r}] has {size} samples: give a multiple of "
                    f"{num_local}, or fewer virtual_shards."
                )
        tally, grads = local(params, batch, samples)
        return tally, tree_map(widen, grads)

    return summed
