# SPDX-License-Identifier: Apache-2.0
"""What ranks that gather parameters together have to agree on, or they hang."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zfunc.core import collectives
from zfunc.core.mesh import Mesh
from zfunc.inference.options import Request

Axes = Sequence[tuple[Mesh, str]]


def rows_of_all(mine: Tensor, axes: Axes) -> Tensor:
    """A vector of every rank that gathers from this one, ``[ranks, n]``.

    Examples:
      >>> rows_of_all(torch.tensor([3, 4]), [])
      tensor([[3, 4]])
    """
    rows = mine[None]
    for mesh, axis in axes:
        rows = collectives.all_gather(rows, axis, mesh)
    return rows


def agreed(request: Request | None, problem: Exception | None, axes: Axes) -> Request:
    """The request; what is wrong on one rank is raised on all of them.

    Args:
      request: Of this rank.
      problem: Why this rank cannot begin.
      axes: Over which the parameters are gathered.

    Raises:
      Exception: ``problem``, where it is.
      ValueError: Another rank has a problem, or other steps.

    Examples:
      >>> agreed(None, ValueError("generate: why"), [])
      Traceback (most recent call last):
      ValueError: generate: why
    """
    steps, ends = (request.max_new_tokens, len(request.eos)) if request else (0, 0)
    rows = [[steps, ends, problem is not None]]
    if axes:
        mine = torch.tensor(rows[0], device=axes[0][0].device)
        rows = rows_of_all(mine, axes).tolist()
    if problem is not None or request is None:
        raise problem or ValueError("generate: there is no request")
    failed = [rank for rank, row in enumerate(rows) if row[2]]
    names = ", ".join(repr(axis) for _, axis in axes)
    if failed:
        raise ValueError(
            f"generate: of the ranks of axis {names} those at {failed} cannot begin, "
            "and say why: all gather the parameters together, so none begins"
        )
    if any(row != rows[0] for row in rows):
        raise ValueError(
            f"generate: the ranks of axis {names} have max_new_tokens "
            f"{[row[0] for row in rows]} and {[row[1] for row in rows]} ends, expected "
            "the same on every rank: they gather the parameters together"
        )
    return request
