# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed while they save, again and again; prints what was left.

    python -m tests.unit.checkpoint.kills --kills 200
    python -m tests.unit.checkpoint.kills --kills 40 --ranks 2

A training that saves every step in the background, and keeps two checkpoints, is
killed by SIGKILL (on two ranks: one of them or both) at a random time, and goes on from
the newest checkpoint. Every time that one must load, be the state of the unbroken run
at its step bit for bit, and every loss of the run must be the unbroken one. Then a save
that also removes an old checkpoint is killed before each of its system calls in turn.

The processes are forks of this one, which has imported all that they need.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import zfunc as zf
from tests.unit.checkpoint.states import batch, contents, loss, parameters
from zfunc.checkpoint import Keep, latest, list_steps, restore, restore_newest
from zfunc.checkpoint import save as save_now
from zfunc.checkpoint.background import save_async

LAST_STEP = 40
KEEP = Keep(last=2)
LONGEST_S = 0.25
CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")


# --- what the forks do -------------------------------------------------------------


def first(mesh):
    params = {**parameters(), "large": torch.ones(64, 257)}
    return zf.shard(params, mesh, tx=zf.optim.adamw(1e-2), key=11)


def digest(state):
    """Of all that a state holds, in full."""
    whole = sorted(contents(zf.unshard(state)).items())
    return hashlib.sha256(repr(whole).encode()).hexdigest()


def steps_from(state, mesh, rank):
    """The training after ``state``: pairs of a state and its loss."""
    step = zf.donate(zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=2)))
    for i in range(int(state.step), LAST_STEP):
        state = step(state, batch(10 * i + rank))
        yield state, float(state.metrics.loss).hex()


def joined(rank, world, store):
    """The mesh of the forks."""
    torch.set_num_threads(1)
    if world > 1:
        store = dist.FileStore(str(store), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    return zf.make_mesh({"data": world})


def unbroken(rank, world, store, report):
    """Rank 0 writes the state's digest and the loss of every step."""
    mesh = joined(rank, world, store)
    state, rows = first(mesh), {}
    for state, value in steps_from(state, mesh, rank):  # noqa: B020 (a fold)
        rows[int(state.step)] = [digest(state), value]
    if rank == 0:
        report.write_text(json.dumps(rows))


def train_and_save(rank, world, store, root, log):
    """Go on from the newest checkpoint; each step's loss goes to a log."""
    mesh = joined(rank, world, store)
    state = first(mesh)
    if latest(root) is not None:
        state = restore_newest(root, state).restored.state
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, b"begin\n")
    pending = None
    for state, value in steps_from(state, mesh, rank):  # noqa: B020 (a fold)
        step = int(state.step)
        os.write(file, f"{step} {value}\n".encode())
        pending = save_async(root, state, cursor=[step], meta={"of": step}, keep=KEEP)
    pending.wait()


def warm(folder):
    """What is imported at a first step and a first save: the forks begin with it."""
    mesh = zf.make_mesh({"data": 1})
    state, _ = next(steps_from(first(mesh), mesh, 0))
    save_async(folder / "warm", state, keep=KEEP).wait()
    restore_newest(folder / "warm", state)


def forked(fn, *args):
    """Run a function in a fork, quietly; its process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
        fn(*args)
        code = 0
    finally:
        os._exit(code)


def ended(pids, within_s):
    """Wait for processes, then kill those that are left; their exit codes."""
    end, codes = time.monotonic() + within_s, {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if time.monotonic() >= end:
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return codes


# --- random times ------------------------------------------------------------------


def reference(folder, world):
    report, store = folder / "unbroken", folder / "store"
    pids = [forked(unbroken, r, world, store, report) for r in range(world)]
    ended(pids, 60)
    return {int(step): row for step, row in json.loads(report.read_text()).items()}


def killed_once(folder, root, world, rng):
    """Start the training and kill it; the losses that it wrote, and if it was killed.

    One that has come to its end before is not.
    """
    store, logs, pids = folder / f"store{rng.random()}", [], []
    for rank in range(world):
        logs.append(folder / f"log{rank}")
        logs[-1].unlink(missing_ok=True)
        pids.append(forked(train_and_save, rank, world, store, root, logs[-1]))
    end = time.monotonic() + 30
    while not logs[0].exists() and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, LONGEST_S))
    victims = rng.choice([pids] + [[pid] for pid in pids] * (world > 1))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    codes = ended(pids, 5)
    lines = logs[0].read_text().splitlines()[1:] if logs[0].exists() else []
    killed = any(codes[pid] == -signal.SIGKILL for pid in victims)
    return [line.split() for line in lines], killed


def what_is_left(root, expected, like):
    """Whether each checkpoint is whole, or what is wrong with one."""
    steps = list_steps(root)
    if not steps:
        return "none yet" if not list(root.glob("step-*")) else "unreadable"
    for step in steps:
        try:
            got = restore(root / f"step-{step:08d}", like)
        except zf.CheckpointError as error:
            return f"refused: {error}"
        if digest(got.state) != expected[step][0]:
            return "mixed"
        if (got.cursor, got.meta) != ([step], {"of": step}):
            return "wrong cursor or meta"
    return "whole"


def at_random_times(folder, num_kills, world, seed=0):
    """What was left after each kill, counted; losses compared; resumes."""
    rng, root = random.Random(seed), folder / "root"
    expected, like = reference(folder, world), first(zf.make_mesh({}))
    counts = collections.Counter()
    while counts["killed"] < num_kills:
        before = max(list_steps(root), default=0)
        if before == LAST_STEP:
            shutil.rmtree(root)
            before = 0
            counts["finished, begun again"] += 1
        counts["resumed"] += before > 0
        losses, killed = killed_once(folder, root, world, rng)
        counts["killed" if killed else "came to its end before"] += 1
        root.mkdir(exist_ok=True)
        counts[what_is_left(root, expected, like)] += 1
        counts["leftovers of a killed save"] += bool(list(root.glob(".tmp-*")))
        for step, value in losses:
            equal = expected[int(step)][1] == value
            counts["losses equal" if equal else "losses different"] += 1
        counts["steps went back"] += max(list_steps(root), default=0) < before
    return counts


# --- each commit point -------------------------------------------------------------


def save_until(root, point, report):
    """Save step 3 over 1 and 2, and die before the ``point``-th call."""
    count, names = 0, []
    watching = []

    def die_at(event):
        nonlocal count
        if not watching:
            return
        count += 1
        names.append(event)
        if count == point:
            report.write_text(event)
            os.kill(os.getpid(), signal.SIGKILL)

    real = os.fsync
    os.fsync = lambda descriptor: (die_at("os.fsync"), real(descriptor))[1]
    sys.addaudithook(lambda event, _: die_at(event) if event in CALLS else None)
    state = first(zf.make_mesh({}))
    watching.append(True)
    pending = save_async(root, state.replace(step=state.step + 3), keep=KEEP)
    pending.wait()
    watching.clear()
    report.write_text(f"done {count}")


def at_each_point(folder):
    """For each call: its name, what was left, and how the next save went."""
    results, point = [], 0
    mesh = zf.make_mesh({})
    fresh = first(mesh)
    states = {s: fresh.replace(step=fresh.step + s) for s in (1, 2, 3)}
    digests = {s: digest(state) for s, state in states.items()}
    report = folder / "report"
    while True:
        point += 1
        root = folder / f"point{point}"
        for step in (1, 2):
            save_now(root, states[step])
        ended([forked(save_until, root, point, report)], 30)
        call = report.read_text()
        if call.startswith("done"):
            return results
        found = {}
        for step in list_steps(root):
            got = restore(root / f"step-{step:08d}", fresh)
            found[step] = digest(got.state) == digests[step]
        newest = max(found, default=0)
        whole = all(found.values()) and newest in (2, 3) and len(found) >= 2
        save_now(root, states[3], keep=KEEP)
        clean = [p.name for p in sorted(root.glob("*step*"))]
        again = clean == ["step-00000002", "step-00000003"]
        hidden = list(root.glob(".tmp*"))
        results.append((call, newest if whole else "lost", again and not hidden))
        shutil.rmtree(root)


# --- the command ---------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--no-points", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        made = tempfile.TemporaryDirectory(dir=options.folder)
        folder = Path(stack.enter_context(made))
        warm(folder)
        start_s = time.monotonic()
        counts = at_random_times(folder, options.kills, options.ranks, options.seed)
        middle_s = time.monotonic()
        points = [] if options.no_points else at_each_point(folder)
    print(
        f"{options.kills} kills at random times, {options.ranks} ranks, "
        f"{middle_s - start_s:.0f} s"
    )
    for name in sorted(counts):
        print(f"  {name}: {counts[name]}")
    old, new = (sum(p[1] == step for p in points) for step in (2, 3))
    clean = sum(p[2] for p in points)
    print(
        f"{len(points)} kills, one before each call of a save, "
        f"{time.monotonic() - middle_s:.0f} s\n"
        f"  the newest is the old one: {old}\n"
        f"  the newest is the new one: {new}\n"
        f"  the newest is neither: {len(points) - old - new}\n"
        f"  the next save works and leaves nothing over: {clean}"
    )
    print(f"  calls: {dict(collections.Counter(p[0] for p in points))}")
    good = {"whole", "none yet", "losses equal", "resumed", "finished, begun again"}
    good |= {"leftovers of a killed save", "killed", "came to its end before"}
    bad = sum(n for name, n in counts.items() if name not in good)
    return 0 if bad == 0 and old + new == clean == len(points) else 1


if __name__ == "__main__":
    sys.exit(main())
