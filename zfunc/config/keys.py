# SPDX-License-Identifier: Apache-2.0
"""A key of a configuration, as a row of the table that checks and documents it."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from zfunc.config.kinds import ANYTHING, Kind

Status = Literal["supported", "planned", "not meaningful here", "refused"]
SUPPORTED: Final = "supported"
PLANNED: Final = "planned"
MEANINGLESS: Final = "not meaningful here"
REFUSED: Final = "refused"


class Key(NamedTuple):
    """One key: its place, what it may be, and what becomes of it here.

    Attributes:
      path: With dots, as ``zero_optimization.stage``.
      kind: What its value has to be.
      default: DeepSpeed's.
      status: ``planned`` and ``refused`` are features that are not here: a value that
        switches one on is an error.
      note: What it becomes, why it means nothing here, or what to type instead.
      off: Values, besides the default and null, that leave a feature off.
      gate: The key that switches this key's section on; "" if it has none.

    Examples:
      >>> from zfunc.config.kinds import BOOL
      >>> Key("dump_state", BOOL, False, MEANINGLESS, "prints the engine").is_off(True)
      False
    """

    path: str
    kind: Kind
    default: Any
    status: Status
    note: str
    off: tuple[Any, ...] = ()
    gate: str = ""

    def is_off(self, value: Any) -> bool:
        """Whether a value leaves the feature of this key switched off."""
        if value is None or self.kind is ANYTHING:
            return value is None or value is False or _is_off_section(value)
        return value == self.default or value in self.off


def _is_off_section(value: Any) -> bool:
    """Empty, or with a switch (or several, deeper down) that all say false."""
    if not isinstance(value, dict):
        return False
    switches = list(_switches(value))
    return not value or (bool(switches) and not any(switches))


def _switches(value: Any) -> Any:
    if isinstance(value, dict):
        if "enabled" in value:
            yield value["enabled"] is not False
        else:
            for each in value.values():
                yield from _switches(each)


def supported(path: str, kind: Kind, default: Any, note: str) -> Key:
    """A key that does here what it does in DeepSpeed."""
    return Key(path, kind, default, SUPPORTED, note)


def meaningless(path: str, kind: Kind, default: Any, note: str) -> Key:
    """A key of DeepSpeed's machinery: accepted, without any effect on numbers."""
    return Key(path, kind, default, MEANINGLESS, note)


def planned(
    path: str, kind: Kind, default: Any, note: str, off: tuple[Any, ...] = ()
) -> Key:
    """A feature that is not here yet."""
    return Key(path, kind, default, PLANNED, note, off)


def refused(
    path: str, kind: Kind, default: Any, note: str, off: tuple[Any, ...] = ()
) -> Key:
    """A feature that will not be here in this form."""
    return Key(path, kind, default, REFUSED, note, off)


def section(gate: Key, *options: tuple[str, Kind, Any]) -> tuple[Key, ...]:
    """A feature with a switch, and the options that tune it once it is on.

    Args:
      gate: The switch, such as ``tensorboard.enabled``.
      *options: Name, kind and default of each key beside it.

    Examples:
      >>> from zfunc.config.kinds import BOOL, TEXT
      >>> gate = planned("tensorboard.enabled", BOOL, False, "not here yet")
      >>> [key.path for key in section(gate, ("job_name", TEXT, "job"))]
      ['tensorboard.enabled', 'tensorboard.job_name']
    """
    prefix = gate.path.rpartition(".")[0]
    note = f"an option of `{gate.path}`"
    rest = [
        Key(f"{prefix}.{name}", kind, default, gate.status, note, gate=gate.path)
        for name, kind, default in options
    ]
    return (gate, *rest)
