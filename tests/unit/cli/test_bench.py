# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench step``: what it refuses, and what it hands to its ranks."""

import pytest
from typer.testing import CliRunner

from zfunc.cli import bench
from zfunc.cli.app import app
from zfunc.launch import Outcome, RankFailure


@pytest.fixture
def launched(monkeypatch):
    """Outside torchrun; the calls of the launcher, which starts nothing."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    calls, outcomes = [], [Outcome(0, None, finished=True)]

    def start(module, arguments, nproc):
        calls.append((module, arguments, nproc, bench.os.environ["OMP_NUM_THREADS"]))
        return outcomes[-1]

    monkeypatch.setattr(bench, "torchrun", start)
    start.calls, start.outcomes = calls, outcomes
    return start


def step(*words):
    return CliRunner().invoke(app, ["bench", "step", *map(str, words)])


def test_one_launcher_starts_the_ranks_with_their_threads(launched, tmp_path):
    path = tmp_path / "a.json"
    done = step("--model=tiny", "--threads=2", f"--json={path}", "--nproc=3")
    assert done.exit_code == 0, done.output
    ((module, arguments, nproc, threads),) = launched.calls
    assert (module, nproc, threads) == ("zfunc.cli", 3, "2")
    assert arguments[:2] == ["bench", "step"]
    assert {"--model=tiny", "--nproc=3", f"--json={path}"} <= set(arguments)
    assert not any(word.startswith("--csv") for word in arguments)


def test_all_mistakes_are_told_at_once(launched, tmp_path):
    done = step(
        "--model=huge",
        "--contenders=ddp,megatron",
        f"--json={tmp_path}",
        f"--plot={tmp_path}/no/a.png",
    )
    assert done.exit_code == 2
    assert launched.calls == []
    assert done.stderr == (
        "error: 4 options cannot be used:\n"
        f"  --json {tmp_path}: is a directory: name a file in it\n"
        f"  --plot {tmp_path}/no/a.png: there is no directory {tmp_path}/no: make it "
        "first\n"
        "  --model: there is no model 'huge'; there are small, medium, single, "
        "launch-bound, tiny\n"
        "  --contenders: there is no 'megatron'; on 2 ranks there are zfunc-0, "
        "zfunc-0-inductor, zfunc-1, zfunc-1-inductor, zfunc-2, zfunc-2-inductor, "
        "zfunc-3, zfunc-3-inductor, ddp, fsdp2, deepspeed-1, deepspeed-2, "
        "deepspeed-3\n"
    )


def test_losses_that_differ_end_it_with_1_and_no_traceback(launched):
    failure = RankFailure(0, 1, 1, "LossesDifferError: the losses differ", "Trace...")
    launched.outcomes.append(Outcome(0, failure, finished=False))
    done = step("--model=tiny")
    assert (done.exit_code, done.stderr) == (1, "error: the losses differ\n")


def test_a_rank_that_fails_is_named_with_its_traceback(launched):
    failure = RankFailure(1, 4711, 1, "ValueError: no", "Traceback of it")
    launched.outcomes.append(Outcome(0, failure, finished=False))
    done = step("--model=tiny")
    assert done.exit_code == 1
    assert "Traceback of it" in done.stderr
    assert "error: rank 1 (pid 4711) failed: ValueError: no" in done.stderr


def test_another_number_of_ranks_than_the_job_has(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = step("--model=tiny", "--nproc=2")
    assert done.exit_code == 2
    assert "--nproc 2: this job has 4 ranks" in done.stderr
