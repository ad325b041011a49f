# SPDX-License-Identifier: Apache-2.0
"""The proof commands, with smaller numbers; docs/checkpoints.md has the full ones.

They run in a process of their own: theirs are forks, of a process without threads.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.unit.checkpoint import flips

COMMAND = ("-m", "tests.unit.checkpoint.kills")
ROOT = Path(__file__).resolve().parents[3]


def proof(*words):
    """What a command prints; it must end well."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, *COMMAND, *words, "--folder", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def count(text, name):
    found = re.search(rf"^  {name}: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def test_kills_at_random_times_and_before_each_call():
    text = proof("--kills", "15")
    assert count(text, "killed") == 15
    assert count(text, "whole") + count(text, "none yet") >= 15
    assert count(text, "resumed") >= 5
    assert count(text, "losses equal") > 30
    for bad in ("losses different", "steps went back", "mixed"):
        assert count(text, bad) == 0
    points = re.search(r"(\d+) kills, one before each call of a save", text)
    assert points is not None, text
    old, new, neither = (
        count(text, f"the newest is {which}")
        for which in ("the old one", "the new one", "neither")
    )
    clean = count(text, "the next save works and leaves nothing over")
    assert int(points[1]) == old + new == clean > 20
    assert new > 5
    assert neither == 0


@pytest.mark.distributed
def test_kills_on_two_ranks():
    text = proof("--kills", "4", "--ranks", "2", "--no-points")
    assert count(text, "killed") == 4
    assert count(text, "whole") + count(text, "none yet") >= 4
    assert count(text, "losses equal") > 0
    assert count(text, "losses different") == count(text, "mixed") == 0


@pytest.mark.parametrize(
    ("damage", "number"), [(flips.flipped, 150), (flips.cut, 50)], ids=["flips", "cuts"]
)
def test_damage_is_refused_by_name(tmp_path, damage, number):
    counts = flips.damaged(tmp_path, number, damage)
    assert {what for _, what in counts} == {"refused, the file named"}
    assert {kind for kind, _ in counts} == {"data", "manifest"}
    assert sum(counts.values()) == number
