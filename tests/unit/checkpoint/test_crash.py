# SPDX-License-Identifier: Apache-2.0
"""A save that does not get to its end leaves the checkpoints before it whole."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zfunc as zf
from tests.unit.checkpoint.states import assert_same, everything, made
from zfunc.checkpoint import latest, list_steps, restore, save

ROOT = Path(__file__).resolve().parents[3]
CALLS = ("open", "fsync", "mkdir", "rename", "close")


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    """What crash_child found: by line, at random times, and with a mutant."""
    root = tmp_path_factory.mktemp("deaths").resolve()
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.checkpoint.crash_child", str(root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", [0, 1], ids=["process", "machine"])
def test_death_at_every_line_of_a_save(deaths, kind):
    results = [row[kind] for row in deaths["lines"]]
    assert set(results) == {"old", "new"}
    assert len(results) > 200
    # Once it is there it stays; and what save has returned is there.
    first = results.index("new")
    assert results[first:] == ["new"] * (len(results) - first)


def test_the_save_after_a_death_succeeds_and_cleans_up(deaths):
    assert {row[2] for row in deaths["lines"]} == {""}


def test_death_at_random_times(deaths):
    assert set(deaths["random"]) <= {"whole", "none yet"}
    assert deaths["random"].count("whole") > 20


def test_a_save_that_forgets_to_sync_would_be_found(deaths):
    power, again = zip(*deaths["mutants"].values(), strict=True)
    assert "rank-00000.safetensors: " in power[0]
    assert "not a complete checkpoint" in again[1]
    assert power[2] == "old"


# --- calls that fail -------------------------------------------------------------


def failing(name, at, error, seen):
    """``os.<name>`` that raises at its ``at``-th call."""
    real = getattr(os, name)

    def call(*args, **options):
        seen.append(args)
        if len(seen) == at + 1:
            if name == "close":
                real(*args)
            raise error
        return real(*args, **options)

    return call


def message_of_saving(root, state):
    """The error of saving, "" if there is none."""
    try:
        save(root, state)
    except zf.CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_call_that_fails_leaves_the_old_and_no_leftovers(tmp_path, name, code):
    """Each call in turn; the reason is in the message, and the next save works."""
    old = save(tmp_path, made(step=1))
    before = everything(tmp_path)
    num_failed = 0
    for at in range(100):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            error = OSError(code, os.strerror(code))
            patch.setattr(os, name, failing(name, at, error, seen))
            message = message_of_saving(tmp_path, made(step=2))
        if len(seen) <= at:  # it did not come to that many calls
            break
        if message:
            assert os.strerror(code) in message
            assert str(tmp_path) in message
            num_failed += 1
        assert not list(tmp_path.glob(".tmp*"))
        found = everything(tmp_path)
        assert {name: found[name] for name in before} == before
        assert int(restore(tmp_path, made()).state.step) in (1, 2)
        assert_same(restore(old, made()).state, made(step=1))
        save(tmp_path, made(step=2))
        shutil.rmtree(tmp_path / "step-00000002")
    assert num_failed >= 1


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), RuntimeError("x")]
)
def test_other_exceptions_leave_no_leftovers(tmp_path, monkeypatch, error):
    save(tmp_path, made(step=1))
    before = everything(tmp_path)

    def fail(*args):
        raise error

    monkeypatch.setattr(sys.modules["zfunc.checkpoint.save"], "tensor_bytes", fail)
    interrupt = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt if interrupt else zf.CheckpointError):
        save(tmp_path, made(step=2))
    assert everything(tmp_path) == before


def test_a_full_disk_names_the_file_and_its_bytes(tmp_path):
    """The limit on the size of a file stands for the disk's; Python ignores SIGXFSZ."""
    save(tmp_path, made(step=1))
    before = everything(tmp_path)
    size_bytes = (tmp_path / "step-00000001" / "rank-00000.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit_bytes in (0, 1, size_bytes // 3, size_bytes - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
            with pytest.raises(zf.CheckpointError) as raised:
                save(tmp_path, made(step=2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        path = tmp_path / ".tmp-step-00000002" / "rank-00000.safetensors"
        expected = f"{path}: cannot write {size_bytes} bytes: File too large."
        assert str(raised.value) == expected
        assert everything(tmp_path) == before
    assert latest(tmp_path) == tmp_path / "step-00000001"


def test_a_failed_fsync_of_the_root_can_be_repeated(tmp_path, monkeypatch):
    """The rename is done, only its durability is unknown: saving again settles it."""
    real, failed = os.fsync, []

    def fsync(descriptor):
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) and not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(zf.CheckpointError, match=r"cannot commit \d+ bytes: Input"):
        save(tmp_path, made(step=1))
    path = save(tmp_path, made(step=1))
    assert_same(restore(path, made()).state, made(step=1))


def test_the_order_of_what_reaches_the_disk(tmp_path, monkeypatch):
    """Data, manifest, directory, name: nothing counts before what it counts on."""
    trace = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        trace.append(f"fsync {path.relative_to(tmp_path.resolve())}")
        real_fsync(descriptor)

    def rename(source, target):
        trace.append(f"rename {Path(source).name} {Path(target).name}")
        real_rename(source, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("os.rename", rename)
    save(tmp_path / "a" / "b", made(step=3))
    assert trace == [
        "fsync .",
        "fsync a",
        "fsync a/b/.tmp-step-00000003/rank-00000.safetensors",
        "fsync a/b/.tmp-step-00000003/manifest.json",
        "fsync a/b/.tmp-step-00000003",
        "rename .tmp-step-00000003 step-00000003",
        "fsync a/b",
    ]


def test_no_growth_over_many_saves(tmp_path):
    state = made()

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    for step in range(3):
        save(tmp_path, state.replace(step=state.step + step))
        restore(tmp_path, state)
    before = descriptors()
    for step in range(3, 40):
        save(tmp_path, state.replace(step=state.step + step))
        restore(tmp_path, state)
    assert descriptors() == before
    assert len(list_steps(tmp_path)) == 40
