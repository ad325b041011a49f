# SPDX-License-Identifier: Apache-2.0
"""Where each parameter goes: whole on this process, or this rank's piece of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zfunc.core.mesh import Mesh
from zfunc.core.sharding import NamedSharding, P, Sharded, place
from zfunc.models.hf.errors import ModelError

Region = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """The mesh, the specs and the dtype of the parameters; no mesh: plain tensors."""

    mesh: Mesh | None = None
    spec: Any = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh is made by zf.make_mesh, got {self.mesh!r}")
        if self.mesh is not None and self.mesh.kind not in ("local", "process"):
            raise ModelError(
                f"mesh: parameters are made for real ranks, got a mesh of kind "
                f"{self.mesh.kind!r}: leave mesh out, and place them with zf.shard."
            )
        if self.mesh is None and self.spec is not None:
            raise ModelError("spec says how a mesh shards parameters: pass mesh too.")
        if self.spec is not None and not isinstance(self.spec, P | Mapping):
            raise TypeError(
                f"spec is a P such as zf.P('data'), or a dict of them by parameter "
                f"name, got {self.spec!r}"
            )
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise TypeError(
                f"dtype is a floating torch.dtype such as torch.bfloat16, got "
                f"{self.dtype!r}"
            )

    def check_names(self, names: set[str]) -> None:
        """Raise where ``spec`` is a dict with a name that the model does not have."""
        unknown = (
            sorted(set(self.spec) - names) if isinstance(self.spec, Mapping) else ()
        )
        if unknown:
            raise ModelError(f"spec[{unknown[0]!r}] is no parameter of this model.")

    def sharding(self, name: str, dim: int) -> NamedSharding:
        """The sharding of a parameter of so many dims."""
        mesh: Mesh = self.mesh  # type: ignore[assignment]
        default = P("data") if mesh.axes else P()
        spec = self.spec if isinstance(self.spec, P) else None
        if isinstance(self.spec, Mapping):
            spec = self.spec.get(name)
        wanted = default if spec is None else spec
        return NamedSharding(mesh, P(*wanted[:dim]))

    def placed(self, name: str, full: torch.Tensor) -> Any:
        """The leaf of a tensor that is here in full. A copy, but for plain ones."""
        value = full.detach()
        if self.mesh is None:
            return value.to(self._stored(value))
        piece = place(value, self.sharding(name, value.dim()))
        buffer = piece.buffer.to(self.mesh.device, self._stored(value), copy=True)
        return Sharded(buffer.contiguous(), piece.sharding, piece.global_shape)

    def _stored(self, value: torch.Tensor) -> torch.dtype:
        """The dtype that a leaf is stored in: whole numbers keep theirs."""
        floating = value.is_floating_point() and self.dtype is not None
        return self.dtype if floating else value.dtype  # type: ignore[return-value]

    def whole(self, buffer: torch.Tensor) -> torch.Tensor:
        """A copy of a module's buffer where the parameters are."""
        device = buffer.device if self.mesh is None else self.mesh.device
        return buffer.detach().to(device, copy=True)

    def region(self, name: str, shape: tuple[int, ...]) -> Region:
        """The part of a parameter that this rank holds, as (start, stop) per dim."""
        if self.mesh is None:
            return tuple((0, size) for size in shape)
        spec = self.sharding(name, len(shape)).spec
        region = []
        for dim, size in enumerate(shape):
            axis = spec[dim] if dim < len(spec) else None
            start, stop = 0, size
            if axis is not None:
                each = -(-size // self.mesh.axis_size(axis))
                start = min(int(self.mesh.axis_index(axis)) * each, size)
                stop = min(start + each, size)
            region.append((start, stop))
        return tuple(region)

    def leaf(self, name: str, shape: tuple[int, ...], part: torch.Tensor) -> Any:
        """The leaf whose region holds ``part``; what it is short of is padding."""
        dtype = self._stored(part)
        if self.mesh is None:
            return part.to(dtype)
        sharding = self.sharding(name, len(shape))
        local = sharding.local_shape(shape)
        device = self.mesh.device
        if tuple(part.shape) == local:
            buffer = part.to(device, dtype).contiguous()
        else:
            buffer = torch.zeros(local, dtype=dtype, device=device)
            buffer[tuple(slice(0, size) for size in part.shape)] = part.to(
                device, dtype
            )
        return Sharded(buffer, sharding, shape)
