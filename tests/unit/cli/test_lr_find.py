# SPDX-License-Identifier: Apache-2.0
"""``zfunc lr-find``: what it measures, suggests, writes and refuses."""

import dataclasses
import json
import math
import random

import pytest
import torch
from typer.testing import CliRunner

import zfunc as zf
from zfunc.cli import lr_find, lr_sweep, program
from zfunc.cli.app import app
from zfunc.cli.config import TrainConfig
from zfunc.cli.lr_curve import Curve, Point, has_diverged, smoothed, suggestion
from zfunc.cli.lr_find import JSON_NAME, PNG_NAME
from zfunc.cli.lr_sweep import Sweep, optimizer
from zfunc.core.tree import tree_leaves
from zfunc.launch import Outcome, RankFailure
from zfunc.optim import lr_range_test

SMALL = (
    *("--d-model=16", "--layers=1", "--heads=2", "--seq-len=16", "--batch-size=8"),
    *("--backend=eager", "--nproc=1"),
)


def find(*words):
    return CliRunner().invoke(app, ["lr-find", *map(str, words)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    return path


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """Not a rank; starting ranks fails a test that does not mean to."""
    monkeypatch.delenv("RANK", raising=False)

    def refuse(*args):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(lr_find, "torchrun", refuse)


# --- a sweep -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "new" / "folder"
    words = ("--steps=60", "--max-lr=100", "--weight-decay=0", "--clip=0")
    done = find(*SMALL, *words, "--data", text, "--out", out)
    assert done.exit_code == 0, done.output
    return done.output, json.loads((out / JSON_NAME).read_text()), out


def test_it_stops_when_the_loss_diverges(swept):
    output, found, _ = swept
    step, lr = found["diverged"]["step"], found["diverged"]["lr"]
    assert 20 < step < 60
    assert f"diverged at step {step}" in output
    *_, last = found["points"]
    assert last["step"] == step - 1
    assert last["lr"] < lr < 100
    means = [point["smoothed"] for point in found["points"]]
    assert all(mean <= 1.5 * min(means[: i + 1]) for i, mean in enumerate(means))


def test_points_are_those_of_the_schedule_and_the_smoothing(swept):
    _, found, _ = swept
    schedule, losses = Sweep(max_lr=100.0).schedule(60), []
    for t, point in enumerate(found["points"]):
        losses.append(point["loss"])
        assert point["step"] == t + 1
        assert point["lr"] == float(schedule(t))
        assert point["smoothed"] == smoothed(losses, 0.8)
    assert math.isclose(losses[0], math.log(256), rel_tol=0.2)
    assert min(losses) < 0.7 * losses[0]


def test_the_suggestion_is_in_the_fall(swept):
    output, found, _ = swept
    read = found["suggestion"]
    assert 1e-4 < read["steepest_lr"] < read["lowest_lr"] < read["last_lr"]
    assert read["lr"] == min(read["steepest_lr"], read["last_lr"] / 10)
    assert f"suggestion: zfunc train --lr {read['lr']:.2g}" in output


def test_only_the_two_files_are_left(swept):
    _, found, out = swept
    assert {path.name for path in out.iterdir()} == {JSON_NAME, PNG_NAME}
    assert (out / PNG_NAME).read_bytes().startswith(b"\x89PNG")
    assert found["schema"] == 1
    assert found["config"]["d_model"] == 16
    assert found["sweep"]["max_lr"] == 100.0


def test_a_linear_sweep_that_does_not_diverge(text, tmp_path):
    words = ("--linear", "--min-lr=0.001", "--max-lr=0.02", "--steps=12")
    (tmp_path / JSON_NAME).write_text("older")
    done = find(*SMALL, *words, "--data", text, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "did not diverge up to a learning rate of 0.02" in done.output
    found = json.loads((tmp_path / JSON_NAME).read_text())
    assert found["diverged"] is None
    rates = torch.tensor([point["lr"] for point in found["points"]])
    torch.testing.assert_close(rates, torch.linspace(0.001, 0.02, 12))
    assert found["suggestion"]["last_lr"] is None


def test_the_losses_are_those_of_zfunc_train(text, tmp_path, monkeypatch):
    """At a rate that stays, the sweep is a training: the same model, data and bits."""
    words = [*SMALL, "--steps=10", "--data", text]
    monkeypatch.setattr(Sweep, "schedule", lambda self, steps: lambda step: 0.01)
    assert find(*words, "--out", tmp_path).exit_code == 0
    found = json.loads((tmp_path / JSON_NAME).read_text())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(program, "schedule_of", lambda config: lambda step: 0.01)
    monkeypatch.setattr("zfunc.cli.loop.schedule_of", lambda config: lambda step: 0.01)
    run = tmp_path / "run"
    words += ["--verify-steps=0", "--sample-tokens=0", "--out", run]
    done = CliRunner().invoke(app, ["train", *map(str, words)])
    assert done.exit_code == 0, done.output
    lines = (run / "metrics.csv").read_text().splitlines()[1:]
    trained = [float(line.split(",")[1]) for line in lines]
    assert [point["loss"] for point in found["points"]] == trained


def test_a_step_that_float16_skips_has_no_rate(text, tmp_path):
    words = ("--precision=fp16", "--steps=12", "--max-lr=0.01", "--data", text)
    done = find(*SMALL, *words, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / JSON_NAME).read_text())["points"]
    schedule = Sweep(max_lr=0.01).schedule(12)
    rates = [float(schedule(t)) for t in range(len(points))]
    assert [point["lr"] for point in points] == rates
    assert points[0]["step"] > 1
    assert len(points) >= 5


def test_the_optimizer_is_that_of_zfunc_train():
    config = TrainConfig(steps=9, d_model=16, heads=2, layers=1, clip=0.5)
    mine = optimizer(config, program.schedule_of(config))
    theirs = program.optimizer(config)
    params = zf.models.gpt.init(config.model, seed=0)
    grads = zf.tree_map(lambda p: p + 1.0, params)
    for _ in range(3):
        results = [tx.update(grads, tx.init(params), params) for tx in (mine, theirs)]
        for a, b in zip(*map(tree_leaves, results), strict=True):
            assert torch.equal(a, b)


@pytest.mark.distributed
def test_two_ranks_measure_what_one_does(text, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("RANK", raising=False)
    words = (*SMALL, "--steps=12", "--max-lr=0.1", "--data", text)
    curves = []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        done = find(*words, f"--nproc={nproc}", "--out", out)
        assert done.exit_code == 0, done.output
        found = json.loads((out / JSON_NAME).read_text())
        curves.append([point["loss"] for point in found["points"]])
    assert len(curves[0]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


# --- reading a curve -----------------------------------------------------------------


def curve(losses, rates, diverged=None):
    means = [smoothed(losses[: i + 1], 0.5) for i in range(len(losses))]
    rows = zip(rates, losses, means, strict=True)
    points = [Point(i + 1, r, x, m) for i, (r, x, m) in enumerate(rows)]
    return Curve(tuple(points), diverged)


def test_the_steepest_rate_of_a_logistic_fall_is_its_middle():
    for rates, rel in (
        ([1e-5 * 10 ** (i / 40) for i in range(240)], 0.03),
        ([1e-4 + 1e-3 * i for i in range(100)], 0.4),
    ):
        losses = [5 - 2 / (1 + (3e-3 / r) ** 2) for r in rates]
        read = suggestion(curve(losses, rates))
        assert read.steepest_lr == pytest.approx(3e-3, rel=rel)
        assert read.lr == read.steepest_lr


@pytest.mark.parametrize("seed", range(5))
def test_noise_moves_the_steepest_rate_by_a_factor_of_two_or_so(seed):
    noise = random.Random(seed)
    rates = [1e-5 * 10 ** (i / 40) for i in range(240)]
    losses = [5 - 2 / (1 + 3e-3 / r) + noise.gauss(0, 0.05) for r in rates]
    assert 3e-3 / 2.5 < suggestion(curve(losses, rates)).steepest_lr < 3e-3 * 2.5


def test_a_tenth_of_the_last_rate_bounds_the_suggestion():
    rates = [10.0 ** (i / 10 - 3) for i in range(11)]
    read = suggestion(curve([5 - (i / 5) ** 2 for i in range(11)], rates, (12, 0.02)))
    assert read.last_lr == pytest.approx(0.01)
    assert read.steepest_lr > 0.001
    assert read.lr == pytest.approx(0.001)


def test_a_loss_that_never_falls_suggests_nothing():
    rates = [0.1 * 2**i for i in range(10)]
    for losses in ([3.0] * 10, [3.0 + i for i in range(10)]):
        read = suggestion(curve(losses, rates))
        assert (read.steepest_lr, read.lr) == (None, None)
    assert suggestion(curve([3.0], [0.1])).lr is None


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_divergence(loss):
    points = curve([3.0, 2.0], [0.1, 0.2]).points
    assert has_diverged(points, loss, loss, by=2.0)
    assert not has_diverged(points, 9.0, 4.0, by=2.0)


def test_smoothing_is_a_weighted_mean():
    assert smoothed([5.0], 0.9) == pytest.approx(5.0)
    assert smoothed([5.0, 2.0], 0.0) == 2.0
    weights = [0.9**2, 0.9, 1.0]
    mean = sum(w * x for w, x in zip(weights, [3.0, 1.0, 2.0], strict=True))
    assert smoothed([3.0, 1.0, 2.0], 0.9) == pytest.approx(mean / sum(weights))


# --- the sweep's schedule ------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 11, 100, 1000])
@pytest.mark.parametrize(("low", "high"), [(1e-5, 10.0), (0.1, 0.15), (1e-8, 1e8)])
def test_a_sweep_rises_from_the_least_to_the_largest_rate(steps, low, high):
    for linear in (False, True):
        schedule = Sweep(low, high, linear).schedule(steps)
        rates = torch.vmap(schedule)(torch.arange(steps))
        assert (rates.diff() > 0).all()
        assert float(rates[0]) == low
        assert float(rates[-1]) == pytest.approx(high, rel=1e-9)
    middle = float(Sweep(low, high).schedule(steps)((steps - 1) // 2))
    if steps >= 100:
        assert math.log(middle / low) == pytest.approx(
            math.log(high / low) / 2, rel=0.1
        )


def test_a_linear_sweep_is_one_range_test():
    mine = Sweep(0.01, 0.31, linear=True).schedule(31)
    theirs = lr_range_test(0.01, 30, 0.31 / 0.01 - 1)
    assert all(torch.equal(mine(t), theirs(t)) for t in range(40))


# --- what is refused -----------------------------------------------------------------


def refused(*words):
    done = find(*words)
    assert done.exit_code == 2, done.output
    return done.stderr


def test_all_problems_are_reported_and_nothing_is_made(text, tmp_path):
    (tmp_path / "file").write_text("")
    words = (
        "--data",
        text,
        "--zero=7",
        "--min-lr=0",
        "--steps=3",
        "--smoothing=1",
        "--diverged-by=1",
    )
    error = refused(*words, "--out", tmp_path / "file" / "x")
    assert "6 options cannot be used" in error
    for line in (
        "--zero 7: must be 0, 1, 2 or 3",
        "--min-lr 0: must be a number above 0",
        "--steps 3: must be at least 10",
        "--smoothing 1: must be at least 0 and less than 1",
        "--diverged-by 1: must be more than 1",
        f"{tmp_path / 'file'} is not a directory",
    ):
        assert line in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-lr=2", "--max-lr=0.1"], "--min-lr 2: must be less than --max-lr 0.1"),
        (["--max-lr=inf"], "--max-lr inf: must be a number above 0"),
        (["--max-lr=nan"], "--max-lr nan: must be a number above 0"),
        (["--steps=0"], "--steps 0: must be at least 10"),
        (["--smoothing=nan"], "--smoothing nan: must be at least 0"),
        (["--diverged-by=inf"], "--diverged-by inf: must be more than 1"),
        (
            ["--batch-size=3", "--nproc=2"],
            "--batch-size 3: not a multiple of --nproc 2",
        ),
        (["--data=nowhere"], "--data nowhere: "),
    ],
)
def test_options_that_cannot_be_used(words, message, text, tmp_path):
    error = refused("--data", text, *words, "--out", tmp_path / "out")
    assert error.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_directory_in_the_place_of_a_file(tmp_path, text):
    (tmp_path / PNG_NAME).mkdir()
    error = refused(*SMALL, "--data", text, "--out", tmp_path)
    assert f"--out {tmp_path}: {PNG_NAME} in it is a directory" in error


def test_a_disk_that_refuses_leaves_the_older_files(text, tmp_path, monkeypatch):
    for name in (JSON_NAME, PNG_NAME):
        (tmp_path / name).write_text("older")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lr_find, "draw", full)
    words = (*SMALL, "--steps=10", "--max-lr=0.1", "--data", text, "--out", tmp_path)
    assert "cannot be written: No space left on device" in refused(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == [JSON_NAME, PNG_NAME]
    assert (tmp_path / JSON_NAME).read_text() == "older"


@pytest.fixture
def metrics(monkeypatch):
    """Have every step report other metrics."""
    compiled = lr_sweep._compiled

    def report(**changes):
        def step_of(config, tx):
            inner = compiled(config, tx)

            def step(state, batch):
                after = inner(state, batch)
                return after.replace(
                    metrics=dataclasses.replace(after.metrics, **changes)
                )

            return step

        monkeypatch.setattr(lr_sweep, "_compiled", step_of)

    return report


def test_a_first_loss_that_is_not_finite_is_said(text, tmp_path, metrics):
    metrics(loss=torch.tensor(math.nan))
    error = refused(*SMALL, "--data", text, "--out", tmp_path / "out")
    assert "the loss of the first step is nan, before any update" in error
    assert not (tmp_path / "out").exists()


def test_nothing_but_overflows_is_said(text, tmp_path, metrics):
    metrics(skipped=torch.tensor(1))
    words = ("--steps=10", "--data", text, "--out", tmp_path / "out")
    error = refused(*SMALL, *words)
    assert "the gradients of all 10 steps overflowed: give more --steps" in error
    assert not (tmp_path / "out").exists()


def test_the_number_of_ranks_is_that_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    error = refused("--nproc=2", "--out", tmp_path / "out")
    assert "--nproc 2: this job has 1 ranks" in error


# --- how it ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (
            Outcome(2, None, False),
            130,
            "error: stopped before the end: nothing was written",
        ),
        (
            Outcome(0, RankFailure(0, 7, 2, "UsageError: --data x: gone", ""), False),
            2,
            "error: --data x: gone",
        ),
        (
            Outcome(0, RankFailure(1, 7, 1, "ValueError: no", "Trace"), False),
            1,
            "Trace\nerror: rank 1 (pid 7) failed: ValueError: no",
        ),
        (Outcome(0, None, True), 0, ""),
    ],
)
def test_how_a_job_ended(outcome, code, message, text, tmp_path, monkeypatch):
    seen = []

    def torchrun(module, arguments, nproc):
        seen.append((module, arguments, nproc))
        return outcome

    monkeypatch.setattr(lr_find, "torchrun", torchrun)
    words = ("--nproc=2", "--no-remat", "--linear", "--max-lr=0.25", "--seq-len=16")
    done = find(*words, "--data", text, "--out", tmp_path / "out")
    assert (done.exit_code, done.stderr.strip()) == (code, message)
    [(module, arguments, nproc)] = seen
    assert (module, nproc, arguments[0]) == ("zfunc.cli", 2, "lr-find")
    for word in ("--no-remat", "--linear", "--max-lr=0.25", "--nproc=2", "--steps=120"):
        assert word in arguments


def test_help():
    done = find("--help")
    assert done.exit_code == 0
    for name in ("--min-lr", "--linear", "--smoothing", "--diverged-by", "--d-model"):
        assert name in done.stdout
