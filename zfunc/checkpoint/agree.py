# SPDX-License-Identifier: Apache-2.0
"""Do something on every rank, and succeed or fail together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from zfunc.core import collectives
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh

T = TypeVar("T")
MAX_FAILURES_SHOWN = 8


class Agreed(NamedTuple, Generic[T]):
    """What this rank's work returned, and the report of every rank, by rank."""

    result: T
    reports: list[Any]


def agree(mesh: Mesh, what: str, work: Callable[[], tuple[T, Any]]) -> Agreed[T]:
    """Run ``work`` on every rank of a mesh; if it raises on one, all ranks raise.

    This is also a barrier: no rank returns before every rank has done its work.

    Args:
      mesh: every rank of it calls this function, with the same ``what``.
      what: for the error of a rank that another rank has left, as "saving step 3".
      work: returns a result, kept here, and a report, JSON for every rank.

    Raises:
      CheckpointError: the work failed somewhere; the message has each rank's.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> agree(make_mesh({}), "counting", lambda: (7, "seven"))
      Agreed(result=7, reports=['seven'])
    """
    try:
        result, report = work()
    except Exception as error:
        if mesh.size == 1 and isinstance(error, CheckpointError):
            raise
        rows = _gathered(mesh, what, {"failure": _described(error)})
        raise CheckpointError(_joined(rows)) from error
    rows = _gathered(mesh, what, {"report": report})
    if any("failure" in row for row in rows):
        raise CheckpointError(_joined(rows))
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


def _joined(rows: list[dict[str, Any]]) -> str:
    """One message for all ranks; what every rank says is said once."""
    failures = [(r, row["failure"]) for r, row in enumerate(rows) if "failure" in row]
    texts = {text for _, text in failures}
    if len(failures) == len(rows) and len(texts) == 1:
        return str(failures[0][1])
    lines = [f"rank {rank}: {text}" for rank, text in failures[:MAX_FAILURES_SHOWN]]
    hidden = len(failures) - len(lines)
    return "\n".join(lines + ([f"... and {hidden} more ranks"] if hidden else []))


def _gathered(mesh: Mesh, what: str, value: dict[str, Any]) -> list[dict[str, Any]]:
    """Every rank's JSON value, by rank."""
    if mesh.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        lengths = _all_gather(torch.tensor([data.numel()]), mesh).tolist()
        padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
        padded[0, : data.numel()] = data
        rows = _all_gather(padded, mesh)
    except RuntimeError as error:
        raise CheckpointError(
            f"{what}: a rank of the mesh {mesh.shape} does not answer: {error}"
        ) from error
    return [
        json.loads(row[:length].numpy().tobytes())
        for row, length in zip(rows, lengths, strict=True)
    ]


def _all_gather(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    x = x.to(mesh.device)
    for axis, _ in reversed(mesh.axes):
        x = collectives.all_gather(x, axis, mesh)
    return x.cpu()
