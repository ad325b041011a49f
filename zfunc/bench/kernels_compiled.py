# SPDX-License-Identifier: Apache-2.0
"""The compile-only report as a page, a CSV and lines for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HEADINGS = (
    "configuration",
    "registers",
    "stack",
    "local",
    "shared",
    "wide",
    "narrow",
    "warps",
    "programs",
    "occupancy",
)
_INTRODUCTION = """\
# Kernels, compiled for GPUs that are not here

Written by `zfunc bench kernels --compile-only --out docs/benchmarks`; Triton {triton}.

Every configuration that ships, as ptxas compiles it: registers of a thread; bytes of
stack and local memory of a thread (spills); bytes of shared memory of a program; global
loads and stores of a thread with 16 bytes or more, and with less (scalars, indices,
rows of odd width); warps of a program; programs that a multiprocessor holds at once,
and the fraction of its warps that they are. The formula is in
`kernels/compile_only.py`, what is allowed in `violations` there. Nothing of this is a
time.
"""


def compiled_page(rows: Sequence[Any], triton: str) -> str:
    """The report as Markdown, a table for each architecture.

    Args:
      rows: Of ``zfunc.kernels.compile_only.report``.
      triton: Its version.
    """
    parts = [_INTRODUCTION.format(triton=triton)]
    for architecture in sorted({row.resources.architecture for row in rows}):
        some = [row for row in rows if row.resources.architecture == architecture]
        wrong = sum(bool(row.violations) for row in some)
        parts += [
            f"\n## sm_{architecture}\n",
            f"{len(some)} configurations, {wrong} with violations.\n",
            f"| {' | '.join(_HEADINGS)} |",
            f"|---|{'---:|' * (len(_HEADINGS) - 1)}",
            *(f"| `{row.name}` | {' | '.join(_cells(row))} |" for row in some),
        ]
        parts += [f"\n{line}" for line in violation_lines(some)]
    return "\n".join(parts) + "\n"


def _cells(row: Any) -> Iterator[str]:
    used = row.resources
    yield from map(str, used[:6])
    yield from map(str, (used.num_warps, used.programs))
    yield f"{used.occupancy:.0%}"


def violation_lines(rows: Sequence[Any]) -> list[str]:
    """A line for each violation.

    Args:
      rows: Of ``zfunc.kernels.compile_only.report``.
    """
    return [
        f"{row.name} on sm_{row.resources.architecture}: {violation}"
        for row in rows
        for violation in row.violations
    ]


def write_compiled(path: Path, rows: Sequence[Any]) -> None:
    """Write a row for each configuration and architecture.

    Args:
      path: The file.
      rows: Of ``zfunc.kernels.compile_only.report``.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["architecture", *_HEADINGS, "violations"])
        for row in rows:
            used = row.resources
            figures = [*used[:7], used.programs, used.occupancy]
            said = "; ".join(row.violations)
            writer.writerow([used.architecture, row.name, *figures, said])
