# SPDX-License-Identifier: Apache-2.0
"""Dies in the middle of saves, again and again: run by test_crash.py.

Forks before every save; the fork dies at a given place: before the n-th line that the
modules which write execute, or at a random time. Then the newest checkpoint must be
the one before or the new one, bit for bit, and the next save must succeed.

Two kinds of death: of the process (what was written stays), and then of the machine
too (what was not fsynced is lost: half of a file, all names in a directory, a rename).
"""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import zfunc as zf
from tests.unit.checkpoint.states import contents
from zfunc.checkpoint import Keep, latest, list_steps, restore, save

TRACED = ("checkpoint/save.py", "checkpoint/files.py", "checkpoint/keep.py")
OLD, NEW = 1, 2
KILLED, DONE = 9, 0


def made(seed=0, step=0):
    """Few leaves: each one adds lines at which to die."""
    generator = torch.Generator().manual_seed(seed)
    params = {"w": torch.randn(7, 5, generator=generator), "b": torch.zeros(())}
    state = zf.shard(params, zf.make_mesh({"data": 1}))
    return state.replace(step=state.step + step)


class Disk:
    """Which inodes are safe from a loss of power, and which renames are not."""

    def __init__(self, root, ignored):
        self.root, self.ignored = root, ignored
        self.safe = {os.stat(path).st_ino for path in [root, *root.rglob("*")]}
        self.renames = []
        self.real_rename = os.rename

    def fsync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "directory" if os.path.isdir(path) else Path(path).suffix
        if kind == self.ignored:
            return
        self.safe.add(os.fstat(descriptor).st_ino)
        if path == str(self.root):
            self.renames.clear()

    def rename(self, source, target):
        self.real_rename(source, target)
        self.renames.append((str(source), str(target)))

    def die(self, code, report):
        report.write_text(json.dumps([sorted(self.safe), self.renames]))
        os._exit(code)


def lose_power(root, report):
    """The worst that may be left of what is not safe."""
    safe, renames = json.loads(report.read_text())
    for path in sorted(root.rglob("*"), reverse=True):
        if path.stat().st_ino in safe:
            continue
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2)
    for source, target in reversed(renames):
        os.rename(target, source)


def tracer(line, die):
    """Calls ``die`` before the ``line``-th traced line."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            count += 1
            if count == line:
                die()
        return trace

    return trace


def child(root, line, report, ignored, keep):
    """Save in a fork that dies; its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        disk = Disk(root, ignored)
        os.fsync, os.rename = disk.fsync, disk.rename
        sys.settrace(tracer(line, lambda: disk.die(KILLED, report)))
        save(root, made(seed=NEW, step=NEW), meta={"of": NEW}, keep=keep)
        sys.settrace(None)
        disk.die(DONE, report)  # after save has returned, the machine may die at once
    finally:
        os._exit(1)


def what_is_left(root, like, expected):
    """The newest step, "old" or "new", or what is wrong with it or an older one."""
    try:
        for step in list_steps(root):
            restore(root / f"step-{step:08d}", like)
        found = latest(root)
        step = None if found is None else int(found.name.removeprefix("step-"))
        got = restore(root, like)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if step not in expected or contents(got.state) != expected[step]:
        return f"step {step} with other contents"
    if got.meta != {"of": step}:
        return f"step {step} with the meta {got.meta}"
    return "old" if step == OLD else "new"


def saved_again(root, keep):
    """What is wrong with the next save; "" if it works and cleans up."""
    try:
        save(root, made(seed=NEW, step=NEW), meta={"of": NEW}, keep=keep)
    except zf.CheckpointError as error:
        return f"cannot go on: {error}"
    names = sorted(path.name for path in root.iterdir())
    left = ["step-00000001", "step-00000002"][keep is not None :]
    return "" if names == left else f"left over: {names}"


def at_every_line(root, *, ignored=None, stride=1, keep=None):
    """What a death at each line leaves, of the process and then of the machine."""
    root.mkdir()
    report = root.with_name(f"{root.name}.report")
    like = made(seed=9)
    expected = {s: contents(made(seed=s, step=s)) for s in (OLD, NEW)}
    results, line, code = [], 1, KILLED
    gc.freeze()
    while code == KILLED:
        if latest(root) is None:
            save(root, made(seed=OLD, step=OLD), meta={"of": OLD})
        code = child(root, line, report, ignored, keep)
        process = what_is_left(root, like, expected)
        lose_power(root, report)
        power = what_is_left(root, like, expected)
        again = saved_again(root, keep)
        results.append([process, power, again if code in (KILLED, DONE) else str(code)])
        shutil.rmtree(root / "step-00000002", ignore_errors=True)
        line += stride
    return results


def at_random_times(root, *, num_trials, seed=0):
    """A fork that saves one step after another is killed; the newest must be whole."""
    root.mkdir()
    rng, like = random.Random(seed), made(seed=9)
    results = []
    for _ in range(num_trials):
        first = max(list_steps(root), default=0) + 1
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                for step in range(first, first + 1000):
                    save(root, made(seed=step, step=step), meta={"of": step})
            os._exit(1)
        time.sleep(rng.uniform(0.001, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        newest = max(list_steps(root), default=0)
        if newest == 0:
            results.append("none yet")
            continue
        got = restore(root, like)
        whole = contents(got.state) == contents(made(seed=newest, step=newest))
        results.append("whole" if whole and got.meta == {"of": newest} else "mixed")
    return results


def main(root):
    torch.set_num_threads(1)
    kinds = (".safetensors", ".json", "directory")
    results = {
        "lines": at_every_line(root / "lines", stride=4),
        "keep": at_every_line(root / "keep", keep=Keep(last=1)),
        "random": at_random_times(root / "random", num_trials=30),
        # What these tests find in a save that forgets to fsync something.
        "mutants": {
            kind: at_every_line(root / f"no {kind}", ignored=kind, stride=60)[-1][1:]
            for kind in kinds
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
