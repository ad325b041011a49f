# SPDX-License-Identifier: Apache-2.0
"""``zfunc train`` in this process, as the only rank of a job; and what it refuses."""

import csv
import json
import shutil

import pytest
from typer.testing import CliRunner

from zfunc.cli import command
from zfunc.cli.app import app
from zfunc.cli.rundir import RunDir
from zfunc.launch import Outcome, RankFailure

SMALL = (
    *("--d-model=16", "--layers=1", "--heads=2", "--seq-len=16", "--batch-size=4"),
    *("--steps=6", "--save-every=2", "--lr=0.01", "--sample-tokens=8"),
)


def zfunc(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    return path


@pytest.fixture
def launcher(monkeypatch):
    """Outside torchrun; starting ranks would fail the test."""
    monkeypatch.delenv("RANK", raising=False)

    def refuse(*args):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(command, "torchrun", refuse)


@pytest.fixture
def alone(monkeypatch):
    """As the only rank of a job."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


def rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def train(text, out, *words):
    done = zfunc("train", "--data", text, "--out", out, *words)
    assert done.exit_code == 0, done.output
    return done.output


# --- a run -----------------------------------------------------------------------


def test_a_run_writes_its_files(alone, text, tmp_path):
    out = tmp_path / "run"
    output = train(text, out, *SMALL)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in RunDir(out).files()}
    assert [int(row["step"]) for row in rows(out)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (2, 4, 6)
    ]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["compared_steps"] == 3
    assert summary["loss_difference"] < 1e-5
    assert summary["gradient_difference"] < 1e-4
    assert summary["params"]["per_rank"] == 4 * summary["num_params"]
    assert "byte-unigram entropy of the corpus" in output
    assert f"written to {out}" in output.replace("\n", "")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resume_gives_the_bits_of_an_unbroken_run(alone, text, tmp_path, step):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(text, whole, *SMALL)
    shutil.copytree(whole, broken)
    for path in (broken / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    done = zfunc("train", "--resume", "--out", broken)
    assert done.exit_code == 0, done.output
    assert f"going on after step {step} of 6" in done.output
    measured = ("step", "loss", "grad_norm", "lr", "tokens")
    assert [[r[m] for m in measured] for r in rows(broken)] == [
        [r[m] for m in measured] for r in rows(whole)
    ]
    shas = [json.loads((o / "summary.json").read_text()) for o in (whole, broken)]
    assert shas[0]["params_sha256"] == shas[1]["params_sha256"]


@pytest.mark.parametrize(
    "words",
    [
        ("--zero=0",),
        ("--zero=2", "--microbatches=2", "--no-remat"),
        ("--precision=bf16", "--clip=0", "--kv-heads=1"),
    ],
)
def test_options_change_how_a_run_computes(alone, text, tmp_path, words):
    out = tmp_path / "run"
    train(text, out, *SMALL, *words, "--steps=2", "--sample-tokens=0")
    summary = json.loads((out / "summary.json").read_text())
    if "--precision=bf16" in words:  # against float32: its rounding is seen
        assert 1e-4 < summary["gradient_difference"] < 0.5
    else:
        assert summary["gradient_difference"] < 1e-4


def test_a_resumed_run_may_compute_elsewhere(alone, text, tmp_path):
    out = tmp_path / "run"
    train(text, out, *SMALL, "--steps=2")
    done = zfunc("train", "--resume", "--out", out, "--zero=1", "--save-every=9")
    assert done.exit_code == 0, done.output
    config = json.loads((out / "config.json").read_text())
    assert (config["zero"], config["save_every"]) == (1, 9)


def test_a_loss_that_is_not_finite_ends_the_run(alone, text, tmp_path):
    words = [*SMALL, "--lr=1e30", "--warmup-steps=0", "--clip=0", "--save-every=99"]
    done = zfunc("train", "--data", text, "--out", tmp_path / "run", *words)
    assert done.exit_code == 2
    assert "the training diverged" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- what is refused before anything is started ------------------------------------


def refused(*words):
    done = zfunc("train", *words)
    assert done.exit_code == 2, done.output
    return done.stderr


def test_all_problems_are_reported_and_nothing_is_made(launcher, tmp_path):
    out = tmp_path / "file"
    out.write_text("")
    words = ("--zero=7", "--nproc=0", "--data", tmp_path / "none", "--out", out / "x")
    error = refused(*words)
    assert "4 options cannot be used" in error
    for part in ("--zero 7: must be 0, 1, 2 or 3", "--nproc 0: must be at least 1"):
        assert part in error
    assert "none: cannot be read (No such file or directory)" in error
    assert f"--out {out}/x: {out} is not a directory" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "got 0 bytes"),
        (b"a", "gives 0 validation tokens"),
        (b"a" * 300, "300 bytes are too little for --batch-size 4 and --seq-len 16"),
    ],
)
def test_too_little_data(launcher, tmp_path, content, problem):
    path = tmp_path / "text"
    path.write_bytes(content)
    error = refused(*SMALL, "--data", path, "--out", tmp_path / "out")
    assert f"--data {path}: " in error
    assert problem in error
    assert not (tmp_path / "out").exists()


def test_the_least_data_that_is_said_to_be_enough_is(alone, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"a" * 300)
    words = [*SMALL, "--steps=1", "--data", path, "--out", tmp_path / "out"]
    error = refused(*words)
    needed = int(error.partition("need about ")[2].partition(":")[0])
    path.write_bytes(b"a" * needed)
    assert zfunc("train", *words).exit_code == 0


@pytest.fixture
def finished(text, tmp_path, monkeypatch):
    out = tmp_path / "finished"
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        train(text, out, *SMALL, "--steps=2", "--verify-steps=0", "--sample-tokens=0")
    return out


def test_a_run_is_not_destroyed_silently(finished, launcher):
    before = (finished / "config.json").read_bytes()
    error = refused("--out", finished)
    assert "go on with --resume" in error
    assert "--overwrite" in error
    assert (finished / "config.json").read_bytes() == before


def test_overwrite_deletes_a_run_and_nothing_else(finished, alone, text):
    (finished / "notes.txt").write_text("mine")
    train(text, finished, *SMALL, "--overwrite", "--steps=1")
    assert [int(row["step"]) for row in rows(finished)] == [1]
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["step-00000001"]
    assert (finished / "notes.txt").read_text() == "mine"


def test_overwrite_spares_what_is_not_a_run(launcher, tmp_path):
    (tmp_path / "config.json").write_text('{"another": "program"}')
    (tmp_path / "checkpoints").mkdir()
    error = refused("--out", tmp_path, "--overwrite")
    assert "is not empty, and not a run" in error
    assert (tmp_path / "checkpoints").exists()


def test_resume_needs_a_run(launcher, tmp_path):
    assert "has no run to resume" in refused("--resume", "--out", tmp_path / "none")


def test_resume_needs_a_checkpoint(finished, launcher):
    shutil.rmtree(finished / "checkpoints")
    assert "no complete checkpoint" in refused("--resume", "--out", finished)


def test_resume_needs_a_configuration_that_reads(finished, launcher):
    (finished / "config.json").write_text('{"zero": 3, "colour": 1}')
    assert "config.json is damaged" in refused("--resume", "--out", finished)


def test_resume_names_what_conflicts(finished, launcher):
    error = refused("--resume", "--out", finished, "--lr=0.5", "--d-model=32")
    assert "--lr 0.5: the run to resume has 0.01" in error
    assert "--d-model 32: the run to resume has 16" in error


def test_resume_and_overwrite_exclude_each_other(finished, launcher):
    error = refused("--resume", "--overwrite", "--out", finished, "--seed=1")
    assert "give one of the two" in error
    assert "--seed 1: the run to resume has 0" in error


def test_a_damaged_checkpoint_is_named(finished, alone):
    (file,) = (finished / "checkpoints").glob("step-*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    error = refused("--resume", "--out", finished)
    assert f"{file}: its sha256 differs" in error


def test_a_checkpoint_of_another_model_is_refused(finished, alone, text, tmp_path):
    other = tmp_path / "other"
    train(text, other, *SMALL, "--steps=1", "--d-model=32")
    shutil.rmtree(finished / "checkpoints")
    shutil.copytree(other / "checkpoints", finished / "checkpoints")
    assert "the checkpoint does not fit" in refused("--resume", "--out", finished)


def test_a_checkpoint_of_another_run_is_refused(finished, alone, text, tmp_path):
    other = tmp_path / "other"
    train(text, other, *SMALL, "--steps=1", "--heads=1", "--verify-steps=0")
    shutil.rmtree(finished / "checkpoints")
    shutil.copytree(other / "checkpoints", finished / "checkpoints")
    error = refused("--resume", "--out", finished)
    assert "is of another run" in error
    assert "--heads 2" in error


def test_text_that_has_changed_is_refused(finished, alone, text):
    content = text.read_bytes()
    text.write_bytes(content[::-1])
    try:
        error = refused("--resume", "--out", finished)
    finally:
        text.write_bytes(content)
    assert "the text has changed" in error


def test_the_number_of_ranks_is_that_of_the_job(alone, tmp_path):
    error = refused("--nproc=2", "--out", tmp_path / "run")
    assert "--nproc 2: this job has 1 ranks" in error


# --- how it ends -------------------------------------------------------------------


def ending(monkeypatch, out, outcome):
    monkeypatch.setattr(command, "torchrun", lambda *args: outcome)
    return zfunc("train", "--out", out)


def test_a_dead_rank_is_named_with_the_way_to_go_on(launcher, monkeypatch, tmp_path):
    failure = RankFailure(1, 4711, -9, "", "")
    done = ending(monkeypatch, tmp_path / "run", Outcome(0, failure, False))
    assert done.exit_code == 1
    assert done.stderr == (
        "error: rank 1 (pid 4711) was killed by signal 9 (SIGKILL); "
        "there is no checkpoint yet\n"
    )


def test_a_users_mistake_in_a_rank_is_one_message(launcher, monkeypatch, tmp_path):
    failure = RankFailure(0, 4711, 2, "UsageError: --resume: [b]damaged", "Traceback")
    done = ending(monkeypatch, tmp_path / "run", Outcome(0, failure, False))
    assert (done.exit_code, done.stderr) == (2, "error: --resume: [b]damaged\n")


def test_an_error_in_a_rank_has_its_traceback(launcher, monkeypatch, tmp_path):
    failure = RankFailure(0, 4711, 1, "ValueError: no", "Traceback of it\n")
    done = ending(monkeypatch, tmp_path / "run", Outcome(0, failure, False))
    assert done.exit_code == 1
    assert "Traceback of it" in done.stderr
    assert "error: rank 0 (pid 4711) failed: ValueError: no" in done.stderr


def test_a_stop_that_saved_nothing_says_so(launcher, monkeypatch, tmp_path):
    failure = RankFailure(0, 4711, -15, "", "")
    done = ending(monkeypatch, tmp_path / "run", Outcome(2, failure, False))
    assert done.exit_code == 130
    assert done.stderr == "stopped at once; there is no checkpoint yet\n"


# --- help ----------------------------------------------------------------------------


def test_version_and_help():
    assert zfunc("--version").stdout.startswith("zfunc ")
    overview = zfunc("--help").stdout
    assert "train" in overview
    options = zfunc("train", "--help").stdout
    for name in ("--nproc", "--zero", "--resume", "--verify-steps", "--no-remat"):
        assert name in options
