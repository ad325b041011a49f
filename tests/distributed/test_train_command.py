# SPDX-License-Identifier: Apache-2.0
"""``zfunc train`` on two real ranks: it finishes, stops, goes on, sees a death."""

import contextlib
import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from zfunc.checkpoint import latest, list_steps
from zfunc.data import ByteDataset, standard_library_files
from zfunc.launch.signals import child_processes

pytestmark = pytest.mark.distributed

COMMAND = (sys.executable, "-m", "zfunc.cli")
STEPS = 40
OPTIONS = (
    *("--nproc=2", f"--steps={STEPS}", "--save-every=10", "--batch-size=8"),
    *("--d-model=32", "--layers=2", "--heads=2", "--seq-len=32", "--lr=0.01"),
)
WAIT_S = 60
DEADLINE_S = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.py"
    data = ByteDataset(standard_library_files(), max_bytes=200_000)
    path.write_bytes(bytes(data.window(0, len(data)).tolist()))
    return path


@pytest.fixture
def started():
    """Start commands; whatever is left of them is killed, ranks included."""
    running = []

    def start(*words):
        process = subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        ranks = child_processes(process.pid)
        process.kill()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for_step(out, step, process):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and process.poll() is None:
        if (out / "metrics.csv").exists() and len(rows(out)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def wait_for_checkpoint(out, process):
    """The first one is written in the background, while steps go on."""
    end = time.monotonic() + WAIT_S
    while latest(out / "checkpoints") is None:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(out):
    """The measurements of each step that do not depend on the clock."""
    with (out / "metrics.csv").open(newline="") as file:
        return [tuple(row.values())[:5] for row in csv.DictReader(file)]


def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    done = subprocess.run(
        [*COMMAND, "train", *OPTIONS, "--data", str(text), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return out, done.stdout


def test_a_run_finishes_with_all_its_files(unbroken):
    out, output = unbroken
    assert [int(row[0]) for row in rows(out)] == list(range(1, STEPS + 1))
    assert list_steps(out / "checkpoints") == tuple(range(10, STEPS + 1, 10))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "config.json").read_text())["nproc"] == 2
    assert "state on 2 ranks, ZeRO 3" in output
    assert f"step {STEPS}/{STEPS}" in output


def test_a_run_learns_and_is_the_unsharded_one(unbroken):
    figures = summary(unbroken[0])
    assert figures["train_loss"] < math.log(256) - 1
    assert figures["params"]["unsharded"] == 4 * figures["num_params"]
    assert figures["params"]["per_rank"] == 2 * figures["num_params"]
    assert figures["compared_steps"] == 3
    assert figures["loss_difference"] < 1e-5
    assert figures["gradient_difference"] < 1e-4


def test_ctrl_c_saves_and_resume_gives_the_bits_of_the_unbroken_run(
    unbroken, started, text, tmp_path
):
    out = tmp_path / "stopped"
    process = started("train", *OPTIONS, "--data", text, "--out", out)
    wait_for_step(out, 13, process)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, errors) == (130, ""), errors
    step = list_steps(out / "checkpoints")[-1]
    assert 13 <= step < STEPS
    assert len(rows(out)) == step
    assert f"stopped after step {step}, which is saved" in output

    command = shlex.split(output.splitlines()[-1])
    assert command[0] == "zfunc"
    done = started(*command[1:])
    output, errors = done.communicate(timeout=2 * WAIT_S)
    assert (done.returncode, errors) == (0, "")
    assert f"going on after step {step} of {STEPS}" in output
    whole = unbroken[0]
    assert rows(out) == rows(whole)
    assert summary(out)["params_sha256"] == summary(whole)["params_sha256"]


def test_a_killed_rank_ends_the_job_and_is_named(started, text, tmp_path):
    out = tmp_path / "killed"
    process = started("train", *OPTIONS, "--data", text, "--out", out)
    wait_for_step(out, 13, process)
    wait_for_checkpoint(out, process)
    victim = child_processes(process.pid)[1]
    os.kill(victim, signal.SIGKILL)
    errors = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 1
    newest = latest(out / "checkpoints")
    assert newest is not None
    assert int(newest.name.removeprefix("step-")) % 10 == 0
    assert errors == (
        f"error: rank 1 (pid {victim}) was killed by signal 9 (SIGKILL); the last "
        f"checkpoint is {newest}, go on with:\n  zfunc train --resume --out {out}\n"
    )


def test_a_second_ctrl_c_stops_at_once(started, text, tmp_path):
    out = tmp_path / "twice"
    process = started("train", *OPTIONS, "--data", text, "--out", out)
    wait_for_step(out, 13, process)
    wait_for_checkpoint(out, process)
    ranks = child_processes(process.pid)
    for pid in ranks:  # so that the first one cannot be obeyed
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 130
    assert "stopped at once; the last checkpoint is" in errors
