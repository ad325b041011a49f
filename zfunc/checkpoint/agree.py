# SPDX-License-Identifier: Apache-2.0
"""Do something on every rank, and succeed or fail together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from zfunc.checkpoint.damage import DamagedError
from zfunc.core import collectives
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh

T = TypeVar("T")
MAX_FAILURES_SHOWN = 8
GROUP_NAME = "zfunc:checkpoint"


class Peers(NamedTuple):
    """The ranks of a mesh, and the group by which they talk.

    ``group`` is None for the mesh's own collectives. A thread beside the training
    needs one of its own: messages of one group are matched by their order.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> Peers(make_mesh({})).group is None
      True
    """

    mesh: Mesh
    group: Any = None


class Agreed(NamedTuple, Generic[T]):
    """What this rank's work returned, and the report of every rank, by rank."""

    result: T
    reports: list[Any]


def agree(peers: Peers, what: str, work: Callable[[], tuple[T, Any]]) -> Agreed[T]:
    """Run ``work`` on every rank of a mesh; if it raises on one, all ranks raise.

    This is also a barrier: no rank returns before every rank has done its work.

    Args:
      peers: every rank of the mesh calls this function, with the same ``what``.
      what: for the error of a rank that another rank has left, as "saving step 3".
      work: returns a result, kept here, and a report, JSON for every rank.

    Raises:
      DamagedError: all failures are damage; the message has each rank's.
      CheckpointError: the work failed somewhere; the message has each rank's.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> agree(Peers(make_mesh({})), "counting", lambda: (7, "seven"))
      Agreed(result=7, reports=['seven'])
    """
    try:
        result, report = work()
    except Exception as error:
        if peers.mesh.size == 1 and isinstance(error, CheckpointError):
            raise
        failure = {"failure": _described(error), "kind": type(error).__name__}
        rows = _gathered(peers, what, failure)
        raise _joined(rows) from error
    rows = _gathered(peers, what, {"report": report})
    if any("failure" in row for row in rows):
        raise _joined(rows)
    return Agreed(result, [row["report"] for row in rows])


def check_equal(reports: Sequence[dict[str, Any]], what: str) -> None:
    """Raise if the ranks' reports differ, naming the fields and the first two ranks.

    Example:
      >>> check_equal([{"step": 3}, {"step": 3}], "save")
    """
    for rank, report in enumerate(reports):
        fields = [name for name in report if report[name] != reports[0].get(name)]
        if fields:
            raise CheckpointError(
                f"{what}: ranks 0 and {rank} disagree about {', '.join(fields)}. Every "
                "rank must pass the same."
            )


def _described(error: Exception) -> str:
    known = isinstance(error, CheckpointError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _joined(rows: list[dict[str, Any]]) -> CheckpointError:
    """One error for all ranks; what every rank says is said once."""
    failures = [(r, row["failure"]) for r, row in enumerate(rows) if "failure" in row]
    kinds = {row["kind"] for row in rows if "failure" in row}
    kind = DamagedError if kinds == {DamagedError.__name__} else CheckpointError
    texts = {text for _, text in failures}
    if len(failures) == len(rows) and len(texts) == 1:
        return kind(str(failures[0][1]))
    lines = [f"rank {rank}: {text}" for rank, text in failures[:MAX_FAILURES_SHOWN]]
    hidden = len(failures) - len(lines)
    return kind("\n".join(lines + ([f"... and {hidden} more ranks"] * (hidden > 0))))


def _gathered(peers: Peers, what: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's JSON value, by rank."""
    if peers.mesh.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        lengths = _all_gather(torch.tensor([data.numel()]), peers).tolist()
        padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
        padded[0, : data.numel()] = data
        rows = _all_gather(padded, peers)
    except (RuntimeError, ValueError) as error:  # ValueError: the group is gone
        raise CheckpointError(
            f"{what}: a rank of the mesh {peers.mesh.shape} does not answer: {error}"
        ) from error
    return [
        json.loads(row[:length].numpy().tobytes())
        for row, length in zip(rows, lengths, strict=True)
    ]


def _all_gather(x: torch.Tensor, peers: Peers) -> torch.Tensor:
    mesh, group = peers
    if group is not None:
        rows = [torch.empty_like(x) for _ in range(mesh.size)]
        dist.all_gather(rows, x, group=group)
        return torch.cat(rows)
    x = x.to(mesh.device)
    for axis, _ in reversed(mesh.axes):
        x = collectives.all_gather(x, axis, mesh)
    return x.cpu()


def own_group(mesh: Mesh) -> Any:
    """The gloo group of checkpoints that are written in the background, one per job.

    Every rank calls this at the same point of its program. The group is looked up in
    torch's own list: the first call of a job makes it (some 10 ms on 2 ranks), and it
    goes away with the job's other groups.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> own_group(make_mesh({})) is None
      True
    """
    if mesh.size == 1:
        return None
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc == GROUP_NAME:
            return group
    device = torch.device(mesh.device_type)
    limit = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    return dist.new_group(backend="gloo", timeout=limit, group_desc=GROUP_NAME)
