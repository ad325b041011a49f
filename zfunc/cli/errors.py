# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong, said once, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zfunc.core.errors import ZfuncError


class Problem(NamedTuple):
    """One option that cannot be used, and why.

    Examples:
      >>> str(Problem("--steps 0", "must be at least 1"))
      '--steps 0: must be at least 1'
    """

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class UsageError(ZfuncError):
    """A mistake in how a command was called: exit code 2, no traceback.

    Args:
      problems: All of them; a message for one that is not about an option.

    Examples:
      >>> print(
      ...     UsageError([Problem("--steps 0", "too few"), Problem("--lr 0", "zero")])
      ... )
      2 options cannot be used:
        --steps 0: too few
        --lr 0: zero
    """

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            text = problems
        elif len(problems) == 1:
            text = str(problems[0])
        else:
            lines = "".join(f"\n  {problem}" for problem in problems)
            text = f"{len(problems)} options cannot be used:{lines}"
        super().__init__(text)
        self.problems = () if isinstance(problems, str) else tuple(problems)


def flag(name: str) -> str:
    """How a field of the configuration is spelled as an option.

    Examples:
      >>> flag("batch_size")
      '--batch-size'
    """
    return f"--{name.replace('_', '-')}"
