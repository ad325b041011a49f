# SPDX-License-Identifier: Apache-2.0
"""How a job ended: causes before consequences, exit codes as a shell has them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

from zfunc.launch import LOST_PEER, Job, Outcome, RankFailure, StopRequest, root_cause
from zfunc.launch.job import current_job, guarded
from zfunc.launch.signals import child_processes, forwarding


def failed(tmp_path, codes, times=None):
    failures = {}
    for rank, code in codes.items():
        file = tmp_path / f"{rank}.json"
        extra = {
            "py_callstack": f"trace {rank}",
            "timestamp": (times or {}).get(rank, 9),
        }
        file.write_text(
            json.dumps({"message": {"message": f"no {rank}", "extraInfo": extra}})
        )
        failures[rank] = ProcessFailure(rank, 100 + rank, code, str(file))
    return ChildFailedError("worker", failures)


@pytest.mark.parametrize(
    ("codes", "rank"),
    [
        ({0: LOST_PEER, 1: -signal.SIGKILL}, 1),
        ({0: -signal.SIGTERM, 1: 1}, 1),
        ({0: -signal.SIGABRT, 1: -signal.SIGSEGV}, 1),
        ({0: -signal.SIGABRT, 1: 1}, 1),
        ({0: LOST_PEER, 1: LOST_PEER, 2: 2}, 2),
        ({0: 1, 1: 1}, 0),
    ],
)
def test_the_cause_is_named_not_the_consequence(tmp_path, codes, rank):
    assert root_cause(failed(tmp_path, codes)).rank == rank


def test_a_rank_that_torchrun_killed_later_is_not_the_cause(tmp_path):
    error = failed(tmp_path, {0: -signal.SIGKILL, 1: 2}, times={0: 40, 1: 10})
    cause = root_cause(error)
    assert (cause.rank, cause.pid, cause.message) == (1, 101, "no 1")
    assert cause.traceback == "trace 1"


def test_a_rank_that_wrote_nothing_has_no_message():
    error = ChildFailedError("worker", {3: ProcessFailure(0, 7, -9, "/nowhere")})
    assert str(root_cause(error)) == "rank 3 (pid 7) was killed by signal 9 (SIGKILL)"


def ended(code, sent=0, finished=False):
    failure = None if code is None else RankFailure(1, 2, code, "", "")
    return Outcome(sent, failure, finished)


@pytest.mark.parametrize(
    ("outcome", "code", "stopped", "saved"),
    [
        (ended(None, finished=True), 0, False, False),
        (ended(None, sent=2, finished=True), 0, False, False),
        (ended(None, sent=2), 130, True, False),
        (ended(143, sent=2), 130, True, True),
        (ended(143, sent=15), 143, True, True),
        (ended(143), 143, True, True),
        (ended(-15, sent=2), 130, True, False),
        (ended(-9, sent=2), 130, True, False),
        (ended(LOST_PEER, sent=15), 143, True, False),
        (ended(-9), 1, False, False),
        (ended(1, sent=2), 1, False, False),
        (ended(2), 2, False, False),
        (ended(LOST_PEER), 1, False, False),
    ],
)
def test_exit_code(outcome, code, stopped, saved):
    assert (outcome.exit_code, outcome.stopped, outcome.saved) == (code, stopped, saved)


def test_no_job_outside_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert current_job() is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert current_job() == Job(1, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="RANK=1 and WORLD_SIZE=1"):
        current_job()


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyError("x"), 2),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), 75),
    ],
)
def test_errors_become_exit_codes_and_a_file(monkeypatch, tmp_path, error, code):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert guarded(raising(error), usage=KeyError) == code
    if isinstance(error, Exception):
        data = json.loads((tmp_path / "error.json").read_text())
        assert data["message"]["message"] == f"{type(error).__name__}: {error}"


def test_an_error_behind_another_one_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = ValueError("a rank does not answer")
    error.__cause__ = RuntimeError("gloo: connection reset")
    assert guarded(raising(error), usage=KeyError) == LOST_PEER


def test_the_first_signal_is_remembered_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # the same stop, from someone else
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


SECOND = """
import os, signal, time
from zfunc.launch.signals import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.1)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""


def test_a_later_signal_kills():
    done = subprocess.run(
        [sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_signals_go_to_children_softly_then_hard(monkeypatch):
    ignoring = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1)"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"{ignoring}\nimport sys; sys.stdout.flush()\ntime.sleep(60)",
        ],
        stdout=subprocess.PIPE,
    )
    with child:
        child.stdout.read(1)
        assert child.pid in child_processes(os.getpid())
        # Not to the other children of the tests' own process, which serve later tests.
        monkeypatch.setattr(
            "zfunc.launch.signals.child_processes", lambda pid: [child.pid]
        )
        with forwarding() as received:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert child.poll() is None
            os.kill(os.getpid(), signal.SIGINT)
            assert child.wait(timeout=30) == -signal.SIGKILL
        assert received == [signal.SIGINT, signal.SIGINT]


def test_without_children_a_signal_interrupts(monkeypatch):
    monkeypatch.setattr("zfunc.launch.signals.child_processes", lambda pid: [])
    with forwarding(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, forwarding() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.signal, received) == (0, [])
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("code", "returncode", "errors"),
    [("3", 3, ""), ("None", 0, ""), ("'no'", 1, "no\n")],
)
def test_leaving_writes_what_was_printed(code, returncode, errors):
    program = f"from zfunc.launch import leave\nprint('done', end='')\nleave({code})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (returncode, "done", errors)
