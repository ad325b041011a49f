# SPDX-License-Identifier: Apache-2.0
"""One walk over a configuration: what each key says, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from zfunc.config.errors import Problem, shown
from zfunc.config.keys import MEANINGLESS, PLANNED, REFUSED, SUPPORTED, Key
from zfunc.config.optimizers import OPTIMIZERS, REFUSED_NAMES, named
from zfunc.config.schedules import HINTS, PARAMS, SCHEDULERS, TOTAL
from zfunc.config.spelling import nearest
from zfunc.config.table import ALIASES, KEYS, SECTIONS

EVERY_PATH: Final = frozenset(
    [*KEYS]
    + [key.path for each in OPTIMIZERS.values() for key in each.keys]
    + [key.path for keys in SCHEDULERS.values() for key in keys]
)
_CHOSEN: Final = tuple(
    f"{section}.{name}"
    for section in ("optimizer", "scheduler")
    for name in ("type", "params")
)
AUTO: Final = "auto"
OFF: Final = "off"
# transformers fills these in only where the file says "auto".
_NEVER_COMPARED: Final = frozenset(
    {
        f"{PARAMS}warmup_min_lr",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    }
)


class Entry(NamedTuple):
    """One key of a configuration, and what it became.

    Attributes:
      path: With dots.
      value: What the file says.
      status: ``supported``, ``not meaningful here``, or ``off``: a feature that is
        not here and not asked for.
      became: The call, or the reason.
      note: What else there is to know; "" mostly.

    Examples:
      >>> Entry("dump_state", True, "not meaningful here", "prints an engine", "").value
      True
    """

    path: str
    value: Any
    status: str
    became: str
    note: str = ""


class Checked(NamedTuple):
    """What a walk found.

    Attributes:
      values: By path, of the keys that are given with a value ("auto" is none).
      entries: One for each key in the file, in its order.
      autos: Paths that said "auto" and were given no value.
      notes: What is worth reading, in sentences.
      problems: All that is wrong, with the keys one by one.
    """

    values: Mapping[str, Any]
    entries: tuple[Entry, ...]
    autos: frozenset[str]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]


def check(raw: Mapping[Any, Any], auto: Mapping[str, Any]) -> Checked:
    """Check every key of a configuration by itself.

    Args:
      raw: The configuration.
      auto: Values for "auto", by path.

    Examples:
      >>> found = check({"gradient_cliping": 1.0}, {})
      >>> print(found.problems[0])
      gradient_cliping: got 1.0, expected a key that exists; type "gradient_clipping"
    """
    return _Walk(dict(auto)).over(raw)


class _Walk:
    """Lists that fill up in one walk; used once, inside ``check``."""

    def __init__(self, auto: dict[str, Any]) -> None:
        self.auto = auto
        self.values: dict[str, Any] = {}
        self.entries: list[Entry] = []
        self.autos: list[str] = []
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.keys: dict[str, Key] = dict(KEYS)

    def over(self, raw: Mapping[Any, Any]) -> Checked:
        self._section(_modern(raw, self.notes), "")
        self._close_sections()
        self._check_auto()
        return Checked(
            self.values,
            tuple(self.entries),
            frozenset(self.autos),
            tuple(self.notes),
            tuple(self.problems),
        )

    def _check_auto(self) -> None:
        """Values for "auto" of keys that do not exist, or are not in the file."""
        there = {entry.path for entry in self.entries}
        there |= {problem.path for problem in self.problems}
        for path in self.auto:
            if path not in EVERY_PATH:
                near = _suggestion(path, EVERY_PATH, "leave it out")
                self._problem(f"auto[{path!r}]", "it", "the path of a key", near)
            elif path not in there and path != TOTAL:
                self.notes.append(
                    f"auto[{path!r}] is not read: the configuration has no such key."
                )

    def _problem(self, path: str, got: str, expected: str, instead: str) -> None:
        self.problems.append(Problem(path or '""', got, expected, instead))

    def _section(self, raw: Mapping[Any, Any], prefix: str) -> None:
        for name, value in raw.items():
            path = f"{prefix}{name}"
            if "." in str(name):
                expected = "a name: sections are objects in objects, not dots"
                instead = f'type "{path.partition(".")[0]}": {{...}}'
                self._problem(path, shown(value), expected, instead)
                continue
            if path in ALIASES:
                path = self._renamed(path, raw, prefix)
            if prefix == "" and path in ("optimizer", "scheduler"):
                self._chosen(path, value)
            elif path in self.keys:
                self._leaf(self.keys[path], value)
            elif path in SECTIONS:
                self._deeper(path, value)
            else:
                known = [*self.keys, *SECTIONS, *_CHOSEN]
                near = _suggestion(path, known, "delete it")
                self._problem(path, shown(value), "a key that exists", near)

    def _renamed(self, path: str, raw: Mapping[Any, Any], prefix: str) -> str:
        new, why = ALIASES[path]
        if new.removeprefix(prefix) in raw:
            self._problem(path, "it", f"{new} only, which is there too", "delete it")
        elif why:
            self.notes.append(f"{path} is {why}: it is {new}.")
        return new

    def _deeper(self, path: str, value: Any) -> None:
        if value is None or value == {}:
            self.entries.append(Entry(path, value, OFF, "an empty section"))
        elif isinstance(value, Mapping):
            self._section(value, f"{path}.")
        else:
            self._problem(
                path, shown(value), "an object", f'type "{_last(path)}": {{}}'
            )

    def _leaf(self, key: Key, value: Any) -> None:
        note, said = "", value
        if isinstance(value, str) and value == AUTO:
            if key.path not in self.auto:
                self.autos.append(key.path)
                default = shown(key.default)
                self.entries.append(_entry(key, value, f"auto: the default, {default}"))
                return
            value = self.auto[key.path]
            note = f"auto: {shown(value)}, given by the caller"
        elif key.path in self.auto and key.path not in _NEVER_COMPARED:
            self._compare(key, value)
        optional = key.default is None or key.status in (PLANNED, REFUSED)
        if value is None and optional:
            self.entries.append(_entry(key, said, note))
            return
        try:
            checked = key.kind.check(value)
        except ValueError as error:
            instead = f"type {shown(_last(key.path))}: {shown(key.kind.example)}"
            self._problem(key.path, shown(value), str(error), instead)
            return
        if (
            key.status in (PLANNED, REFUSED)
            and not key.gate
            and not key.is_off(checked)
        ):
            self._problem(key.path, shown(value), *_not_here(key))
            return
        self.values[key.path] = checked
        self.entries.append(_entry(key, said, note))

    def _compare(self, key: Key, value: Any) -> None:
        wanted = self.auto[key.path]
        try:
            same = key.kind.check(value) == key.kind.check(wanted)
        except ValueError:
            same = value == wanted
        if not same:
            self._problem(
                key.path,
                shown(value),
                f"{shown(wanted)}, which the caller has",
                'type "auto", or make them equal',
            )

    def _chosen(self, path: str, value: Any) -> None:
        """A section whose type says what follows."""
        if value is None:
            self.entries.append(Entry(path, value, OFF, "an empty section"))
            return
        if not isinstance(value, Mapping):
            example = f'type "{path}": {{"type": ..., "params": {{...}}}}'
            self._problem(path, shown(value), "an object", example)
            return
        name = self._type(path, value)
        rest = {k: v for k, v in value.items() if k not in ("type", "params")}
        self._section(rest, f"{path}.")
        params = value.get("params")
        if name is None or "params" not in value:
            return
        table = OPTIMIZERS[name].keys if path == "optimizer" else SCHEDULERS[name]
        self.keys.update({key.path: key for key in table})
        if params is None or params == {}:
            self.entries.append(Entry(f"{path}.params", params, OFF, "all defaults"))
        elif isinstance(params, Mapping):
            self._section(params, f"{path}.params.")
        else:
            self._problem(
                f"{path}.params", shown(params), "an object", 'type "params": {}'
            )

    def _type(self, path: str, section: Mapping[Any, Any]) -> str | None:
        where, given = f"{path}.type", section.get("type")
        table: Mapping[str, Any] = OPTIMIZERS if path == "optimizer" else SCHEDULERS
        if not isinstance(given, str):
            got = shown(given) if "type" in section else "nothing"
            first = next(iter(table))
            self._problem(where, got, f"one of {_listed(table)}", f'type "{first}"')
            return None
        name = named(given) if path == "optimizer" else given
        if name in table:
            became = f"zf.optim, as {name}"
            self.values[where] = name
            self.entries.append(Entry(where, given, SUPPORTED, became))
            return name
        expected, instead = f"one of {_listed(table)}", ""
        if path == "optimizer" and name in REFUSED_NAMES:
            reason, other = REFUSED_NAMES[name]
            expected, instead = f"{expected} ({reason})", f'type "{other}"'
        elif path == "scheduler" and name in HINTS:
            instead = f'type "{HINTS[name]}", which is the nearest'
        else:
            near = nearest(name, table)
            instead = f"type {_either(near or list(table)[:1])}"
        self._problem(where, shown(given), expected, instead)
        return None

    def _close_sections(self) -> None:
        """Options of features that are off."""
        for i, entry in enumerate(self.entries):
            key = self.keys.get(entry.path)
            if key is not None and key.gate and key.status != SUPPORTED:
                became = f"nothing: {key.gate} is off"
                self.entries[i] = entry._replace(status=OFF, became=became)


def _modern(raw: Mapping[Any, Any], notes: list[str]) -> Mapping[Any, Any]:
    """DeepSpeed's first form of ``zero_optimization`` was a bool."""
    given = raw.get("zero_optimization")
    if not isinstance(given, bool):
        return raw
    notes.append(
        f"zero_optimization: {shown(given)} is deprecated: it is stage {int(given)}."
    )
    return {**raw, "zero_optimization": {"stage": int(given)}}


def _entry(key: Key, value: Any, note: str) -> Entry:
    if key.status in (SUPPORTED, MEANINGLESS):
        return Entry(key.path, value, key.status, key.note, note)
    return Entry(key.path, value, OFF, "nothing: the feature is off", note)


def _not_here(key: Key) -> tuple[str, str]:
    """What is expected of a feature that is not here, and what to type."""
    when = "yet" if key.status == PLANNED else "here"
    default = key.default if key.default is not None else (key.off or (None,))[0]
    return f"{shown(default)} (not supported {when})", key.note


def _suggestion(path: str, known: Any, otherwise: str) -> str:
    """Names like the last one of a path: beside it first, then the same elsewhere."""
    prefix, _, name = path.rpartition(".")
    start = f"{prefix}." if prefix else ""
    beside = {
        each.removeprefix(start).split(".")[0]
        for each in (*known, *ALIASES)
        if each.startswith(start)
    }
    near = sorted(nearest(name, beside))
    if near:
        return f"type {_either(near)}"
    elsewhere = sorted(each for each in EVERY_PATH if _last(each) == name)
    if elsewhere:
        return f"did you mean {_either(elsewhere[:3])}"
    return otherwise


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _either(names: list[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def _listed(names: Any) -> str:
    return ", ".join(names)
