# SPDX-License-Identifier: Apache-2.0
"""Meshes: ranks arranged along named axes, in one of five kinds.

``local`` is this process alone; ``process`` spans a torch.distributed job;
``simulated`` is one level of ``torch.vmap`` (all ranks in this process);
``abstract`` has sizes only; ``traced`` is one of these while ``jit`` records what its
collectives send, each tensor by itself. Collectives interpret the kind; nothing else
looks at it.
"""

from __future__ import annotations

import atexit
import gc
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from zfunc.core.errors import MeshError

Kind = Literal["local", "process", "simulated", "abstract", "traced"]


@dataclass(frozen=True)
class Mesh:
    """Ranks arranged along named axes; made by ``make_mesh`` or ``AbstractMesh``.

    Two meshes are equal when axes, kind and device type are: this rank's place in the
    mesh (``rank``, row-major over the axes) is data, not identity, so that a pytree's
    structure is the same on every rank.

    Example:
      >>> make_mesh({"data": 1}).shape
      {'data': 1}
    """

    axes: tuple[tuple[str, int], ...]
    kind: Kind
    device_type: str = "cpu"
    rank: int | torch.Tensor = field(default=0, compare=False, repr=False)
    groups: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def shape(self) -> dict[str, int]:
        """Axis sizes by name."""
        return dict(self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(n for _, n in self.axes)

    @property
    def device(self) -> torch.device:
        """Where this rank's buffers live."""
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)

    @property
    def native_reductions(self) -> bool:
        """Whether sums are the backend's own, or sent and added up by ranks."""
        return self.kind in ("abstract", "traced") or self.device_type == "cuda"

    def axis_position(self, axis: str) -> int:
        """Index of ``axis`` among the axes; an unknown name is a ``MeshError``."""
        names = [name for name, _ in self.axes]
        if axis not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise MeshError(
                f"axis {axis!r} is not an axis of the mesh {self.shape}; "
                f"its axes: {known}"
            )
        return names.index(axis)

    def axis_size(self, axis: str) -> int:
        """Number of ranks along ``axis``."""
        return self.axes[self.axis_position(axis)][1]

    def axis_index(self, axis: str) -> Any:
        """This rank's coordinate along ``axis`` (a tensor on a simulated mesh)."""
        position = self.axis_position(axis)
        stride = math.prod(n for _, n in self.axes[position + 1 :])
        return (self.rank // stride) % self.axes[position][1]

    def group(self, axis: str) -> str:
        """Name of the process group along ``axis``."""
        position = self.axis_position(axis)
        return self.groups[position] if self.groups else f"abstract:{axis}"


def AbstractMesh(axes: Mapping[str, int]) -> Mesh:  # noqa: N802 (JAX's name)
    """A mesh of sizes only: trace and plan for any number of ranks without ranks.

    Collectives on it run on fake tensors (see ``abstract``) and need no process group.

    Example:
      >>> AbstractMesh({"data": 1024}).size
      1024
    """
    return Mesh(_checked_axes(axes), "abstract")


def make_mesh(
    axes: Mapping[str, int],
    *,
    device: Literal["cpu", "cuda"] | None = None,
    timeout_s: float | None = None,
) -> Mesh:
    """The mesh of the running job, from torchrun's environment.

    ``{}`` is this process alone, also inside a job; a mesh of one rank needs no process
    group. A larger mesh joins the job that torchrun started (gloo on CPU, NCCL on GPU)
    and its size must be the job's.

    Args:
      axes: axis name to number of ranks, row-major: the last axis is the nearest.
      device: "cuda" where torch sees GPUs, else "cpu".
      timeout_s: seconds after which a collective gives up; torch's default if None.

    Raises:
      MeshError: bad names or sizes, or a size that is not the job's. Nothing has been
        started when it is raised.

    Differs from DeepSpeed: no environment variable of its own, no global group.

    Example:
      >>> make_mesh({"data": 1})
      Mesh(axes=(('data', 1),), kind='local', device_type='cpu')
    """
    checked = _checked_axes(axes)
    size = math.prod(n for _, n in checked)
    device_type = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world = _world_size()
    if checked and size != world:
        raise MeshError(
            f"the mesh {dict(checked)} has {size} ranks but this job has {world}: "
            f"start it with `torchrun --nproc-per-node {size} ...` or make the product "
            f"of the axis sizes {world}. (zfunc.testing.simulate runs all the ranks "
            "of a mesh in one process.)"
        )
    if timeout_s is not None and (timeout_s <= 0 or dist.is_initialized()):
        raise MeshError(
            f"timeout_s={timeout_s} must be positive, and given where the process "
            "group is made: the first mesh of the job (or your own init_process_group)."
        )
    if size == 1:
        return Mesh(checked, "local", device_type)
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = None if timeout_s is None else timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit)
        atexit.register(_leave_group)  # or gloo may abort while Python shuts down
    sizes = [n for _, n in checked]
    groups = tuple(_group_along(i, sizes, limit) for i in range(len(sizes)))
    return Mesh(checked, "process", device_type, dist.get_rank(), groups)


def _leave_group() -> None:
    """Gloo's threads let go of tensors a moment after a wait has returned.

    In an interpreter that is shutting down that is an abort (torch 2.13: 1 exit in 8 on
    a busy machine, 2026-11-21), so they are given that moment.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    time.sleep(0.1)


def _group_along(position: int, sizes: list[int], limit: timedelta | None) -> str:
    """Name of this rank's process group along an axis; all ranks make them together."""
    if len(sizes) == 1:
        return dist.group.WORLD.group_name  # type: ignore[union-attr]
    grid = torch.arange(math.prod(sizes)).view(sizes)
    lines = grid.movedim(position, -1).reshape(-1, sizes[position]).tolist()
    mine, _ = dist.new_subgroups_by_enumeration(lines, timeout=limit)
    return mine.group_name  # type: ignore[no-any-return]


def _world_size() -> int:
    """Ranks of the running job: torchrun's environment, or the group already made."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _checked_axes(axes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    if not isinstance(axes, Mapping):
        raise MeshError(
            f'a mesh is made from axis sizes by name, as {{"data": 2}}; got {axes!r}'
        )
    for name, size in axes.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise MeshError(f"an axis name is an identifier such as 'data'; {name!r}")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise MeshError(f"axis {name!r} has size {size!r}; it must be an int >= 1")
    return tuple(axes.items())
