# SPDX-License-Identifier: Apache-2.0
"""A checkpoint before it is written: what is in it, and that all ranks say the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from zfunc.checkpoint.leaves import buffer_of, entry_of, named_leaves
from zfunc.checkpoint.manifest import (
    METRICS_PREFIX,
    Manifest,
    step_name,
    zfunc_version,
)
from zfunc.checkpoint.skeleton import plain_ints, skeleton_of
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh
from zfunc.core.state import TrainState


class Draft(NamedTuple):
    """A manifest without files, and this rank's tensors by path.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> mesh = make_mesh({})
      >>> drafted(shard(torch.ones(2), mesh), mesh, None, None).name
      'step-00000000'
    """

    manifest: Manifest
    buffers: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return step_name(self.manifest.step)


def drafted(
    state: TrainState, mesh: Mesh, cursor: Any, meta: Mapping[str, Any] | None
) -> Draft:
    """What is to be written; waits for the device, to know the step.

    Raises:
      CheckpointError: a leaf, cursor or meta that a checkpoint cannot hold.
    """
    leaves = named_leaves(state)
    try:
        position = plain_ints(cursor)
    except TypeError as error:
        raise CheckpointError(f"save: {error}") from None
    manifest = Manifest(
        schema_version=1,
        zfunc_version=zfunc_version(),
        step=int(state.step),
        key=int(state.key),
        mesh=mesh.axes,
        cursor=position,
        meta=_plain_meta(meta),
        aux=skeleton_of(state.metrics.aux, f"{METRICS_PREFIX}aux"),
        leaves=tuple(entry_of(path, leaf) for path, leaf in leaves.items()),
    )
    return Draft(manifest, {path: buffer_of(leaf) for path, leaf in leaves.items()})


def on_host(draft: Draft) -> Draft:
    """The same with tensors of its own in host memory: what happens next is no matter.

    From a GPU all copies are started, then waited for: nothing else of the device is.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> state, mesh = shard(torch.ones(2), make_mesh({})), make_mesh({})
      >>> kept = on_host(drafted(state, mesh, None, None))
      >>> _ = state.params.buffer.zero_()  # as a donating step may do
      >>> kept.buffers["params"]
      tensor([1., 1.])
    """
    buffers = {path: _copied(x.detach()) for path, x in draft.buffers.items()}
    for device in {x.device for x in draft.buffers.values() if x.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return Draft(draft.manifest, buffers)


def _copied(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x.to("cpu", copy=True, memory_format=torch.contiguous_format)
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def attempted(make: Callable[[], Draft]) -> Callable[[], Draft]:
    """Call ``make`` now; what is returned gives its result or raises its error, later.

    A rank that fails alone has to say so where the others listen.
    """
    try:
        draft = make()
    except Exception as error:
        failure = error

        def fail() -> Draft:
            raise failure

        return fail
    return lambda: draft


def digests(draft: Draft, keep: object) -> dict[str, str]:
    """What the ranks must agree about, by field."""
    fields = draft.manifest.model_dump(mode="json", exclude={"files"})
    fields["keep"] = repr(keep)
    return {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
        for name, value in fields.items()
    }


def _plain_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy that is JSON; what would come back as something else is refused."""
    given = {} if meta is None else dict(meta)
    try:
        text = json.dumps(given, allow_nan=False, ensure_ascii=False).encode()
        same = json.loads(text) == given
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save: meta is not JSON: {error}") from None
    if not same:
        raise CheckpointError(
            "save: meta would not come back as it is: use lists for tuples and strings "
            f"for keys; got {given!r:.200}"
        )
    return json.loads(text)  # type: ignore[no-any-return]
