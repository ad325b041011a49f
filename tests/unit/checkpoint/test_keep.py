# SPDX-License-Identifier: Apache-2.0
"""Old checkpoints go once a newer one is on the disk, and never by halves."""

import errno
import os
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.checkpoint.states import assert_same, everything, made
from zfunc.checkpoint import Keep, latest, list_steps, remove_old, restore, save

SAVE, KEEP = (sys.modules[f"zfunc.checkpoint.{name}"] for name in ("save", "keep"))


def at(step):
    return made(step=step)


@given(
    steps=st.lists(st.integers(0, 60), unique=True, min_size=1),
    last=st.integers(1, 5),
    every=st.none() | st.integers(1, 9),
)
def test_the_newest_stays_and_the_rule_is_what_it_says(steps, last, every):
    kept = Keep(last, every).kept(steps)
    newest = sorted(steps)[-last:]
    for step in steps:
        due = step in newest or (every is not None and step % every == 0)
        assert (step in kept) == due
    assert max(steps) in kept


def test_saves_remove_what_is_old(tmp_path):
    for step in range(8):
        save(tmp_path, at(step), keep=Keep(last=2, every=3))
    assert list_steps(tmp_path) == (0, 3, 6, 7)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for step in list_steps(tmp_path):
        assert_same(restore(tmp_path / f"step-0000000{step}", made()).state, at(step))


def test_without_keep_all_stay(tmp_path):
    for step in range(4):
        save(tmp_path, at(step))
    assert list_steps(tmp_path) == (0, 1, 2, 3)


def test_the_old_goes_only_when_the_new_is_on_the_disk(tmp_path, monkeypatch):
    """The order of renames and syncs: commit, sync, hide, sync, and then the files."""
    save(tmp_path, at(1))
    trace = []
    real_fsync, real_rename, real_rmtree = os.fsync, os.rename, shutil.rmtree

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        trace.append(f"fsync {os.path.relpath(path, tmp_path.resolve())}")
        real_fsync(descriptor)

    def rename(source, target):
        trace.append(f"rename {os.path.basename(source)} {os.path.basename(target)}")
        real_rename(source, target)

    def rmtree(path, **options):
        trace.append(f"remove {os.path.basename(path)}")
        real_rmtree(path, **options)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.rename", rename)
    monkeypatch.setattr("shutil.rmtree", rmtree)
    save(tmp_path, at(2), keep=Keep(last=1))
    assert trace[-6:] == [
        "rename .tmp-step-00000002 step-00000002",
        "fsync .",
        "remove .tmp-step-00000002",  # is not there any more
        "rename step-00000001 .tmp-removed-step-00000001",
        "fsync .",
        "remove .tmp-removed-step-00000001",
    ]


@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_removal_that_fails_is_said_and_the_new_is_there(tmp_path, call, code):
    """Whatever is left of the old one has no name that counts, and goes next time."""
    save(tmp_path, at(1))
    real = getattr(os, call)

    def fail(path, *args, **options):
        if call == "rename" and "removed" not in str(args[0]):
            return real(path, *args, **options)
        raise OSError(code, os.strerror(code), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(zf.CheckpointError) as raised:
            save(tmp_path, at(2), keep=Keep(last=1))
    text = str(raised.value)
    assert text.startswith(f"{tmp_path / 'step-00000002'} is saved, but an older")
    assert os.strerror(code) in text
    assert latest(tmp_path) == tmp_path / "step-00000002"
    for step in list_steps(tmp_path):
        restore(tmp_path / f"step-0000000{step}", made())
    save(tmp_path, at(3), keep=Keep(last=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_save_that_fails_removes_nothing(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, at(step))
    before = everything(tmp_path)

    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SAVE, "write_durably", fail)
    with pytest.raises(zf.CheckpointError):
        save(tmp_path, at(3), keep=Keep(last=1))
    assert everything(tmp_path) == before


def test_steps_of_another_way_are_not_touched(tmp_path):
    """Fallen back to 2 because 9 is damaged: 9 is not counted, so 2 and 3 stay."""
    for step in (1, 2, 9):
        save(tmp_path, at(step))
    save(tmp_path, at(3), keep=Keep(last=2))
    assert list_steps(tmp_path) == (2, 3, 9)


def test_leftovers_of_a_killed_removal_go_with_the_next_save(tmp_path):
    save(tmp_path, at(1)).rename(tmp_path / ".tmp-removed-step-00000001")
    (tmp_path / ".tmp-removed-step-00000001" / "manifest.json").unlink()
    assert list_steps(tmp_path) == ()
    save(tmp_path, at(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


# --- remove_old ------------------------------------------------------------------


def test_remove_old(tmp_path):
    for step in range(6):
        save(tmp_path, at(step))
    assert remove_old(tmp_path, Keep(last=2, every=4)) == (1, 2, 3)
    assert list_steps(tmp_path) == (0, 4, 5)
    assert remove_old(tmp_path, Keep(last=2, every=4)) == ()
    assert remove_old(tmp_path / "nowhere", Keep()) == ()


def test_the_newest_whole_one_stays_when_newer_are_damaged(tmp_path):
    paths = [save(tmp_path, at(step)) for step in range(5)]
    (paths[4] / "rank-00000.safetensors").unlink()
    file = paths[3] / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert remove_old(tmp_path, Keep(last=1)) == (0, 1)
    assert list_steps(tmp_path) == (2, 3, 4)
    restore(paths[2], made())


def test_nothing_goes_when_nothing_is_whole(tmp_path):
    for step in range(3):
        path = save(tmp_path, at(step)) / "rank-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    before = everything(tmp_path)
    with pytest.raises(zf.CheckpointError, match="no checkpoint is whole, none is rem"):
        remove_old(tmp_path, Keep(last=1))
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda r: Keep(0), ValueError, "Keep: last is 0, expected at least 1; type l"),
        (lambda r: Keep(1, -2), ValueError, "Keep: every is -2, expected at least 1"),
        (
            lambda r: Keep(True),
            TypeError,
            "Keep: last is an int, got True; type",
        ),
        (lambda r: Keep(1, 2.0), TypeError, "Keep: every is an int, got 2.0"),
        (
            lambda r: save(r, made(), keep=3),
            TypeError,
            "save: keep is 3, expected None",
        ),
        (lambda r: remove_old(r, 2), TypeError, "remove_old: keep is 2, expected None"),
        (
            lambda r: zf.checkpoint.save_async(r, made(), keep=[1]),
            TypeError,
            r"save_async: keep is \[1\], expected None or a Keep; type for exa",
        ),
    ],
)
def test_wrong_rules_are_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path)
    assert everything(tmp_path) == {}
