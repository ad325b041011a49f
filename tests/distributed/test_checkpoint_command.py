# SPDX-License-Identifier: Apache-2.0
"""``zfunc train`` on two ranks that is told to stop, and ``zfunc replay`` of it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from zfunc.checkpoint import list_steps
from zfunc.launch.signals import child_processes

pytestmark = pytest.mark.distributed

COMMAND = (sys.executable, "-m", "zfunc.cli")
OPTIONS = (
    *("--nproc=2", "--steps=4000", "--save-every=4", "--batch-size=4", "--lr=0.01"),
    *("--d-model=16", "--layers=1", "--heads=2", "--seq-len=16", "--backend=eager"),
    *("--hash-every=3", "--keep-last=3"),
)
WAIT_S = 90


def ended(words):
    return subprocess.run(
        [*COMMAND, *map(str, words)], capture_output=True, text=True, timeout=WAIT_S
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that got SIGTERM, its output and its exit code."""
    folder = tmp_path_factory.mktemp("stopped")
    text, out = folder / "text", folder / "run"
    text.write_bytes(bytes(range(32, 127)) * 100)
    words = [*COMMAND, "train", *OPTIONS, "--data", str(text), "--out", str(out)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError):
                if len((out / "metrics.csv").read_text().splitlines()) > 20:
                    break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=WAIT_S)
    finally:
        for pid in child_processes(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()
    return out, process.returncode, output, errors


def test_sigterm_saves_and_ends_with_143(stopped):
    out, code, output, errors = stopped
    assert (code, errors) == (128 + signal.SIGTERM, ""), output
    steps = list_steps(out / "checkpoints")
    assert len(steps) == 3
    assert f"stopped after step {steps[-1]}, which is saved; go on with:" in output
    assert output.rstrip().endswith(f"zfunc train --resume --out {out}")
    rows = (out / "metrics.csv").read_text().splitlines()
    assert len(rows) == steps[-1] + 1
    assert not list((out / "checkpoints").glob(".tmp*"))


def test_replay_on_the_ranks_of_the_run(stopped):
    out = stopped[0]
    first, *_, last = list_steps(out / "checkpoints")
    path = out / "checkpoints" / f"step-{first:08d}"
    done = ended(["replay", path, "--steps", last - first])
    assert (done.returncode, done.stderr) == (0, ""), done
    match = r"equal: steps (\d+) to (\d+) bit for bit; .* (\d+) states"
    found = re.search(match, done.stdout)
    assert found is not None, done.stdout
    assert [int(found[1]), int(found[2])] == [first + 1, last]
    assert int(found[3]) >= 3
