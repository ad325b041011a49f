# SPDX-License-Identifier: Apache-2.0
"""Saving in the background: the values of now, one at a time, no error lost."""

import errno
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import zfunc as zf
from tests.unit.checkpoint.states import (
    assert_same,
    batch,
    contents,
    everything,
    loss,
    made,
)
from zfunc.checkpoint import (
    Keep,
    latest,
    list_steps,
    restore,
    restore_newest,
    save,
    save_async,
)
from zfunc.checkpoint.running import SavingThread
from zfunc.core.tree import tree_leaves

ROOT = Path(__file__).resolve().parents[3]
FILES = sys.modules["zfunc.checkpoint.files"]
WRITE = sys.modules["zfunc.checkpoint.save"]


@pytest.fixture
def held(monkeypatch):
    """Background saves wait before they write, until this is set."""
    free, real = threading.Event(), WRITE.write_durably

    def write(*args):
        if isinstance(threading.current_thread(), SavingThread) and not free.wait(20):
            raise AssertionError("was held too long")
        return real(*args)

    monkeypatch.setattr(WRITE, "write_durably", write)
    yield free
    free.set()


def no_space(monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)


def test_the_bytes_are_those_of_save(tmp_path):
    options = {"cursor": [3], "meta": {"run": 7}}
    one = save(tmp_path / "now", made(step=2), **options)
    pending = save_async(tmp_path / "later", made(step=2), **options)
    two = pending.wait()
    assert two == tmp_path / "later" / "step-00000002"
    assert everything(one) == everything(two)
    assert pending.is_done
    assert pending.wait() == two
    assert repr(pending) == f"<saving in {tmp_path / 'later'}: done>"


def test_what_happens_to_the_state_meanwhile_is_no_matter(tmp_path, held):
    state = made(step=1)
    pending = save_async(tmp_path, state)
    for leaf in tree_leaves(state):
        leaf.zero_()
    assert not pending.is_done
    assert repr(pending).endswith(": under way>")
    assert latest(tmp_path) is None
    held.set()
    pending.wait()
    assert_same(restore(tmp_path, made()).state, made(step=1))


@pytest.mark.parametrize("kind", ["donate", "jit"])
def test_a_state_may_be_donated_at_once(tmp_path, held, kind):
    plain = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=2))
    step = zf.donate(plain) if kind == "donate" else zf.jit(plain, backend="aten")
    state, expected = step(made(), batch(0)), plain(made(), batch(0))
    pending = save_async(tmp_path, state)
    for i in range(1, 4):
        state = step(state, batch(i))
    held.set()
    pending.wait()
    got = restore(tmp_path, made()).state
    if kind == "donate":
        assert_same(got, expected)
    assert int(got.step) == 1
    for i in range(1, 4):  # and the training goes on from it to the same bits
        got = step(got, batch(i))
    assert contents(got) == contents(state)


def test_the_step_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda d: (time.sleep(0.15), real(d))[1])
    start_s = time.perf_counter()
    pending = save_async(tmp_path, made())
    blocked_s = time.perf_counter() - start_s
    pending.wait()
    assert blocked_s < 0.15 < 0.4 < time.perf_counter() - start_s


# --- one at a time -----------------------------------------------------------------


@pytest.mark.parametrize("again", [save, save_async])
def test_a_save_waits_for_the_one_before(tmp_path, held, again):
    first = save_async(tmp_path, made(step=1))
    threading.Timer(0.1, held.set).start()
    second = again(tmp_path, made(step=2))
    assert first.is_done
    if again is save_async:
        second.wait()
    assert list_steps(tmp_path) == (1, 2)


def test_a_chain_of_saves_that_nobody_waits_for(tmp_path):
    for step in range(1, 8):
        pending = save_async(tmp_path, made(step=step), keep=Keep(last=2))
    pending.wait()
    assert list_steps(tmp_path) == (6, 7)
    assert not list(tmp_path.glob(".tmp*"))


def test_no_thread_is_left(tmp_path):
    pending = save_async(tmp_path, made())
    pending.wait()
    time.sleep(0.01)
    end = time.monotonic() + 5
    while time.monotonic() < end and any(
        isinstance(thread, SavingThread) for thread in threading.enumerate()
    ):
        time.sleep(0.01)
    kinds = {type(thread) for thread in threading.enumerate()}
    assert SavingThread not in kinds


# --- errors ------------------------------------------------------------------------


def test_wait_raises_what_save_would_have(tmp_path, monkeypatch):
    save(tmp_path, made(step=1))
    before = everything(tmp_path)
    with monkeypatch.context() as patch:
        no_space(patch)
        pending = save_async(tmp_path, made(step=2))
        path = tmp_path / ".tmp-step-00000002" / "rank-00000.safetensors"
        for _ in range(2):
            with pytest.raises(zf.CheckpointError) as raised:
                pending.wait()
            assert str(raised.value).startswith(f"{path}: cannot write ")
    assert everything(tmp_path) == before
    save_async(tmp_path, made(step=2)).wait()
    assert list_steps(tmp_path) == (1, 2)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(zf.CheckpointError, match="save_async: state is a dict"):
        save_async(tmp_path, {"w": torch.ones(1)})
    step = zf.donate(zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=1)))
    old = made()
    step(old, batch(0))
    with pytest.raises(zf.DonatedBufferError, match="was donated"):
        save_async(tmp_path, old)
    # One rank alone may be wrong here: the others hear of it in the background.
    for options, match in (
        ({"meta": {"x": float("nan")}}, "meta is not JSON"),
        ({"cursor": 1.5}, "cursor is a float"),
    ):
        with pytest.raises(zf.CheckpointError, match=match):
            save_async(tmp_path, made(), **options).wait()
    assert everything(tmp_path) == {}


def test_other_exceptions_are_raised_too(tmp_path, monkeypatch):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(WRITE, "tensor_bytes", fail)
    with pytest.raises(zf.CheckpointError, match="MemoryError"):
        save_async(tmp_path, made()).wait()
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("finished", [True, False])
def test_an_error_that_nobody_asked_for_is_printed(
    tmp_path, monkeypatch, capsys, held, finished
):
    no_space(monkeypatch)
    pending = save_async(tmp_path, made())
    if finished:
        held.set()
        while not pending.is_done:
            time.sleep(0.01)
        assert capsys.readouterr().err == ""
    del pending
    gc.collect()
    held.set()
    WRITE.wait_for_running()
    text = capsys.readouterr().err
    assert text.startswith(f"saving in {tmp_path} failed, and wait() was not called: ")
    assert "cannot write" in text


def test_an_error_that_was_raised_is_not_printed(tmp_path, monkeypatch, capsys):
    no_space(monkeypatch)
    pending = save_async(tmp_path, made())
    with pytest.raises(zf.CheckpointError):
        pending.wait()
    del pending
    gc.collect()
    assert capsys.readouterr().err == ""


def test_a_process_that_ends_waits_and_tells(tmp_path):
    """Nobody calls wait(): the first is written, the error of the second is told."""
    program = f"""
import os, time, torch, zfunc as zf
real = os.fsync
os.fsync = lambda d: (time.sleep(0.1), real(d))[1]
state = zf.shard({{"w": torch.ones(2)}}, zf.make_mesh({{}}))
one = zf.checkpoint.save_async({str(tmp_path / "a")!r}, state)
two = zf.checkpoint.save_async("/dev/null/b", state)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert list_steps(tmp_path / "a") == (0,)
    expected = "saving in /dev/null/b failed, and wait() was not called: /dev/null/b/"
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("read", [restore, restore_newest])
def test_a_restore_waits_for_a_save(tmp_path, held, read):
    """Which would remove what is being read."""
    state = made()
    save(tmp_path, state)
    pending = save_async(
        tmp_path, state.replace(step=state.step + 1), keep=Keep(last=1)
    )
    found = []
    reader = threading.Thread(target=lambda: found.append(read(tmp_path, state)))
    reader.start()
    time.sleep(0.2)
    assert found == []
    held.set()
    reader.join(20)
    pending.wait()
    restored = found[0] if read is restore else found[0].restored
    assert int(restored.state.step) == int(state.step) + 1
