# SPDX-License-Identifier: Apache-2.0
"""A save that does not get to its end leaves the checkpoints before it whole."""

import errno
import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import zfunc as zf
from tests.unit.checkpoint.states import assert_same, everything, made, message_of
from zfunc.checkpoint import (
    Keep,
    latest,
    list_steps,
    remove_old,
    restore,
    save,
    save_async,
)
from zfunc.checkpoint.leaves import named_leaves

ROOT = Path(__file__).resolve().parents[3]
CALLS = ("open", "fsync", "mkdir", "rename", "close")


@pytest.fixture(scope="module")
def deaths():
    """What crash_child found: by line, at random times, and with a mutant.

    It knows itself what would be lost without power, so memory serves as the disk.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        root = str(Path(folder).resolve())
        done = subprocess.run(
            [sys.executable, "-m", "tests.unit.checkpoint.crash_child", root],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("what", ["lines", "keep"])
@pytest.mark.parametrize("kind", [0, 1], ids=["process", "machine"])
def test_death_at_every_line_of_a_save(deaths, kind, what):
    """Every line of one that removes the checkpoint before; every fourth of others."""
    results = [row[kind] for row in deaths[what]]
    assert set(results) == {"old", "new"}
    assert len(results) > (150 if what == "keep" else 40)
    # Once it is there it stays; and what save has returned is there.
    first = results.index("new")
    assert results[first:] == ["new"] * (len(results) - first)


def test_the_save_after_a_death_succeeds_and_cleans_up(deaths):
    assert {row[2] for row in deaths["lines"] + deaths["keep"]} == {""}


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
            message = message_of(save, tmp_path, made(step=2))
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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; needs the right to mount."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def large(step):
    params = {"w": torch.ones(2500), "v": torch.ones(10)}
    state = zf.shard(params, zf.make_mesh({"data": 1}))
    return state.replace(step=state.step + step)


def save_and_wait(root, state):
    return save_async(root, state).wait()


@pytest.mark.parametrize("saved", [save, save_and_wait])
def test_a_disk_that_is_full(small_disk, saved):
    """One checkpoint of 20 kB and its pages fit twice, not three times."""
    for step in (1, 2):
        save(small_disk, large(step))
    before = everything(small_disk)
    size_bytes = len(before["step-00000001/rank-00000.safetensors"])
    with pytest.raises(zf.CheckpointError) as raised:
        saved(small_disk, large(3))
    path = small_disk / ".tmp-step-00000003" / "rank-00000.safetensors"
    found = re.fullmatch(
        rf"{path}: cannot write {size_bytes} bytes: No space left on device; (\d+) "
        r"bytes were free when it began\. Make room, or keep fewer checkpoints "
        r"\(keep=zf.checkpoint.Keep\(last=...\)\)\.",
        str(raised.value),
    )
    assert found is not None, raised.value
    assert 0 < int(found[1]) < size_bytes
    assert everything(small_disk) == before
    assert int(restore(small_disk, large(0)).state.step) == 2
    remove_old(small_disk, Keep(last=1))
    save(small_disk, large(3))
    assert list_steps(small_disk) == (2, 3)


class FullAt:
    """A file on a disk that is full at its ``at``-th write, of all files together."""

    def __init__(self, file, at, seen):
        self._file, self._at, self._seen = file, at, seen

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        self._seen.append(len(data))
        if len(self._seen) == self._at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)


def full_at(at, seen, path, mode):
    return FullAt(open(path, mode), at, seen)


@pytest.mark.parametrize("saved", [save, save_and_wait])
def test_a_disk_that_is_full_at_each_write(tmp_path, monkeypatch, saved):
    old = save(tmp_path, made(step=1))
    before = everything(tmp_path)
    files = sys.modules["zfunc.checkpoint.files"]
    for at in range(1, 100):
        opened = functools.partial(full_at, at, [])
        try:
            with monkeypatch.context() as patch:
                patch.setattr(files, "open", opened, raising=False)
                saved(tmp_path, made(step=2))
        except zf.CheckpointError as error:
            text = str(error)
        else:
            break
        match = r"cannot write \d+ bytes: No space left on device; \d+ bytes were free"
        assert re.search(match, text)
        assert str(tmp_path / ".tmp-step-00000002") in text
        assert everything(tmp_path) == before
        restore(old, made())
    leaves = len(list(named_leaves(made())))
    assert at == leaves + 3  # a header, the leaves, the manifest; and none at the end


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
