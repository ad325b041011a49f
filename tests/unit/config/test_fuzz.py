# SPDX-License-Identifier: Apache-2.0
"""Random configurations: a ``ConfigError`` or an answer for each key, never a crash."""

import json
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zfunc.config import ConfigError, interpret
from zfunc.config.checking import EVERY_PATH
from zfunc.config.keys import PLANNED, REFUSED
from zfunc.config.kinds import ANYTHING
from zfunc.config.optimizers import OPTIMIZERS
from zfunc.config.schedules import SCHEDULERS
from zfunc.config.table import ALIASES, KEYS, SECTIONS

GOOD = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}}
PATHS = sorted(EVERY_PATH | set(SECTIONS) | set(ALIASES) | {"optimizer.type"})
PARAMS = {
    **{f"optimizer:{name}": each.keys for name, each in OPTIMIZERS.items()},
    **{f"scheduler:{name}": keys for name, keys in SCHEDULERS.items()},
}
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, 2, 3, 8, 0.5, 5e8, -1, 10**400, "auto", "cpu", "fp16", ""]),
    st.floats(),
    st.text(max_size=6),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["enabled", "type", "x"]), inner, max_size=2),
    ),
    max_leaves=4,
)
types = {
    "optimizer": st.sampled_from([*OPTIMIZERS, "OneBitAdam"]),
    "scheduler": st.sampled_from([*SCHEDULERS, "StepLR"]),
}


def put(config, path, value):
    """The value at a path, with the sections on the way there."""
    *sections, name = path.split(".")
    for section in sections:
        inner = config.get(section)
        if not isinstance(inner, dict):
            inner = config[section] = {}
        config = inner
    config[name] = value


@st.composite
def configs(draw):
    config = json.loads(json.dumps(GOOD)) if draw(st.booleans()) else {}
    for section, names in types.items():
        if draw(st.booleans()):
            put(config, f"{section}.type", draw(names))
    paths = st.one_of(st.sampled_from(PATHS), st.text(string.ascii_letters, max_size=4))
    for path in draw(st.lists(paths, max_size=6)):
        key = KEYS.get(path)
        near = values
        if key is not None:  # half of the values are of the right kind
            near = st.one_of(st.just(key.default), st.just(key.kind.example), values)
        put(config, path, draw(near))
    return config


def leaves(value, prefix=""):
    """Every path that an entry can have: keys, and sections that are empty."""
    for name, each in value.items():
        path = f"{prefix}{name}"
        if isinstance(each, dict) and each and not _opaque(path):
            yield from leaves(each, f"{path}.")
        else:
            yield path


def _opaque(path):
    return path in KEYS and KEYS[path].kind is ANYTHING


def renamed(path):
    for old, (new, _) in ALIASES.items():
        if path == old or path.startswith(f"{old}."):
            return new + path[len(old) :]
    return path


def outcome(config, world):
    """What a configuration means, or None and what is wrong with it."""
    try:
        return interpret(config, world=world), ()
    except ConfigError as error:
        return None, error.problems


def check_answered(config, entries):
    answered = [entry.path for entry in entries]
    assert len(answered) == len(set(answered))
    for path in leaves(config):
        legacy = path == "zero_optimization" and isinstance(config[path], bool)
        assert (renamed(path) + ".stage" * legacy) in answered, path


@settings(max_examples=400, deadline=None)
@given(configs(), st.integers(1, 4))
def test_no_crash_and_no_silent_acceptance(config, world):
    before = repr(config)
    made, problems = outcome(config, world)
    assert repr(config) == before
    if made is None:
        assert problems
        for problem in problems:
            assert all(isinstance(part, str) and part for part in problem)
        return
    check_answered(config, made.entries)
    for entry in made.entries:
        assert entry.became
        key = KEYS.get(entry.path)
        if key is not None and key.status in (PLANNED, REFUSED):
            assert entry.status == "off"


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(KEYS)), values)
def test_any_value_at_any_key_is_taken_or_named(path, value):
    config = json.loads(json.dumps(GOOD))
    put(config, path, value)
    made, problems = outcome(config, 2)
    if made is None:
        section = path.split(".")[0]
        places = {problem.path.split(".")[0] for problem in problems}
        assert section in places or path.startswith(("train_", "gradient_"))
    else:
        check_answered(config, made.entries)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_typo_one_edit_away_is_named(data):
    path = data.draw(st.sampled_from(sorted(EVERY_PATH | {"optimizer", "scheduler"})))
    prefix, _, name = path.rpartition(".")
    at = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase + "_"))
    typo = data.draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at + 1 : at + 2] + name[at : at + 1] + name[at + 2 :],
            ]
        )
    )
    wrong = f"{prefix}.{typo}" if prefix else typo
    config = json.loads(json.dumps(GOOD))
    if prefix.endswith(".params"):
        section = prefix.split(".")[0]
        name_of = next(
            each.split(":")[1]
            for each, keys in PARAMS.items()
            if each.startswith(section) and path in [key.path for key in keys]
        )
        config[section] = {"type": name_of}
        known = {key.path for key in PARAMS[f"{section}:{name_of}"]}
    else:
        known = set(KEYS) | set(SECTIONS) | set(ALIASES)
    assume(typo and wrong not in known)
    assume(wrong not in ("optimizer.type", "optimizer.params"))
    put(config, wrong, 1)
    with pytest.raises(ConfigError) as caught:
        interpret(config, world=2)
    messages = [str(p) for p in caught.value.problems if p.path == wrong]
    assert len(messages) == 1
    assert f'"{name}"' in messages[0].partition("; ")[2]
