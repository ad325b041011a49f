# SPDX-License-Identifier: Apache-2.0
"""The forms that DeepSpeed takes a configuration in: a dict, a file, or base64."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

from zfunc.config.errors import ConfigError, Problem, shown

_FORMS: Final = "a dict, the path of a JSON file, or such a file in base64"
_ENDLESS: Final = "objects in objects without end"
_DEEPEST: Final = 50
# A string, which is kept, or a comment, which becomes blanks.
_TOKEN: Final = re.compile(
    r'("(?:\\.|[^"\\\n])*")|(//[^\n]*|#[^\n]*|/\*.*?\*/)', re.DOTALL
)


def read(source: Any) -> tuple[str, dict[Any, Any]]:
    """The name of a configuration for messages, and its keys and values.

    Args:
      source: A dict, the path of a JSON file (with ``//``, ``#`` and ``/* */``
        comments), or the text of such a file in URL-safe base64.

    Raises:
      ConfigError: None of these, a file that is not JSON, a key twice.

    Examples:
      >>> import base64
      >>> read(base64.urlsafe_b64encode(b'{"train_batch_size": 8}').decode())
      ('base64', {'train_batch_size': 8})
    """
    if isinstance(source, Mapping):
        _check_depth(source, "the dict")
        return "the dict", dict(source)
    if isinstance(source, Path) or (source and _is_file(source)):
        try:
            text = Path(source).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            _refuse(str(source), shown(str(error)), "a file that can be read")
        return str(source), parse(text, str(source))
    if not isinstance(source, str) or not source:
        got = '""' if source == "" else f"a {type(source).__name__}"
        _refuse("the configuration", got, _FORMS)
    try:
        padded = source + "=" * (-len(source) % 4)
        text = base64.b64decode(padded, altchars="-_", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        _refuse("the configuration", f"{shown(source)}, no file", _FORMS)
    return "base64", parse(text, "base64")


def _is_file(source: Any) -> bool:
    try:
        return isinstance(source, str) and Path(source).exists()
    except (OSError, ValueError):  # base64 can be longer than a name of a file
        return False


def parse(text: str, source: str) -> dict[str, Any]:
    """The object in a JSON text with comments.

    Args:
      text: What the file says.
      source: Its name, for messages.

    Raises:
      ConfigError: It is not JSON, no object, or has a key twice.

    Examples:
      >>> parse('{"fp16": {"enabled": true}}  // half', "ds.json")
      {'fp16': {'enabled': True}}
    """
    twice: list[tuple[dict[str, Any], str]] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made, counts = dict(items), Counter(name for name, _ in items)
        twice.extend((made, name) for name, count in counts.items() if count > 1)
        return made

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        found = json.loads(
            _TOKEN.sub(_without_comment, text),
            object_pairs_hook=pairs,
            parse_constant=constant,
        )
    except RecursionError:
        _refuse(source, _ENDLESS, "a ds_config")
    except ValueError as error:
        expected = "JSON (comments are read, other forms of Hjson are not)"
        _refuse(source, f"text that is not JSON: {error}", expected)
    _check_depth(found, source)
    if twice:
        where = dict(_places(found, ""))
        paths = dict.fromkeys(
            f"{where.get(id(made), '')}{name}" for made, name in twice
        )
        problems = [
            Problem(path, "the key more than once", "it once", "delete all but one")
            for path in paths
        ]
        raise ConfigError(source, problems)
    if not isinstance(found, dict):
        _refuse(source, shown(found), "an object: {...}")
    return found


def _check_depth(found: Any, source: str) -> None:
    """Refuse what would be too deep for walks that recurse, or has no end."""
    values = [(found, 0)]
    while values:
        value, depth = values.pop()
        if depth > _DEEPEST:
            _refuse(source, _ENDLESS, "a ds_config")
        if isinstance(value, Mapping):
            values += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list | tuple):
            values += [(each, depth + 1) for each in value]


def _places(value: Any, prefix: str) -> Iterator[tuple[int, str]]:
    """The identity of each object, with what its keys' paths start with."""
    if isinstance(value, dict):
        yield id(value), prefix
        for name, each in value.items():
            yield from _places(each, f"{prefix}{name}.")


def _without_comment(found: re.Match[str]) -> str:
    """A string as it is; of a comment only the ends of its lines."""
    return found[1] or "\n" * found[2].count("\n") or " "


def _refuse(path: str, got: str, expected: str) -> NoReturn:
    instead = 'type for example zf.from_ds_config("ds_config.json")'
    if path != "the configuration":
        instead = 'write for example {"train_batch_size": 8}'
    raise ConfigError(path, [Problem(path, got, expected, instead)])
