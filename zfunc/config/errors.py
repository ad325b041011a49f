# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a configuration, all of it at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from zfunc.core.errors import ZfuncError

_SHOWN: Final = 60


class Problem(NamedTuple):
    """One key that cannot be used: where, what was found, what was expected.

    Examples:
      >>> print(Problem("fp16.enabled", "1", "true or false", 'type "enabled": true'))
      fp16.enabled: got 1, expected true or false; type "enabled": true
    """

    path: str
    got: str
    expected: str
    instead: str

    def __str__(self) -> str:
        return f"{self.path}: got {self.got}, expected {self.expected}; {self.instead}"


class ConfigError(ZfuncError, ValueError):
    """A DeepSpeed configuration that cannot be used; it lists every problem.

    Args:
      source: What was read, such as the name of the file.
      problems: All of them.

    Examples:
      >>> print(ConfigError("ds.json", [Problem("a", "1", "no such key", "delete it")]))
      ds.json cannot be used, 1 problem:
        a: got 1, expected no such key; delete it
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        count = len(problems)
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(
            f"{source} cannot be used, {count} problem{'s' * (count > 1)}:{lines}"
        )
        self.source = source
        self.problems = tuple(problems)


def shown(value: Any) -> str:
    """A value as JSON, cut to one short line.

    Args:
      value: Anything.

    Examples:
      >>> shown(True), shown("auto"), shown({1})
      ('true', '"auto"', '{1}')
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
