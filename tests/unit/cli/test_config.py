# SPDX-License-Identifier: Apache-2.0
"""Options are checked all at once, and a resumed run keeps those that decide it."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from zfunc.cli.command import Request
from zfunc.cli.config import MAY_CHANGE, TrainConfig, conflicts, problems_of
from zfunc.cli.errors import Problem, UsageError


def whats(options):
    return [problem.what for problem in problems_of(options)]


def test_defaults_have_no_problem():
    assert problems_of({}) == []


def test_every_wrong_field_is_reported_at_once():
    options = {"nproc": 0, "zero": 4, "precision": "fp8", "lr": 0.0, "steps": -1}
    assert whats(options) == [
        "--nproc 0",
        "--steps -1",
        "--zero 4",
        "--precision fp8",
        "--lr 0.0",
    ]


def test_fields_and_combinations_are_reported_together():
    # The batch is checked although the stage is wrong; the width, although it is
    # wrong with the heads, is not checked where the heads are.
    assert whats({"zero": 9, "batch_size": 5, "d_model": 5, "heads": 0}) == [
        "--zero 9",
        "--heads 0",
        "--batch-size 5",
    ]


@pytest.mark.parametrize(
    ("options", "what", "why"),
    [
        (
            {"nproc": 4, "microbatches": 3, "batch_size": 30},
            "--batch-size 30",
            "not a multiple of --nproc 4 x --microbatches 3; type 36",
        ),
        (
            {"d_model": 20, "heads": 4},
            "--d-model 20",
            "not a multiple of twice --heads 4; type 24",
        ),
        ({"heads": 4, "kv_heads": 3}, "--kv-heads 3", "does not divide --heads 4"),
        ({"steps": 3, "warmup_steps": 4}, "--warmup-steps 4", "more than --steps 3"),
        ({"temperature": -0.1}, "--temperature -0.1", "must be at least 0"),
        ({"lr": float("inf")}, "--lr inf", "must be a finite number"),
    ],
)
def test_message(options, what, why):
    assert problems_of(options) == [Problem(what, why)]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_and_precision_is_accepted(zero, precision):
    assert problems_of({"zero": zero, "precision": precision}) == []


def test_the_configuration_is_frozen_and_reads_back():
    config = TrainConfig(data=Path("text"), warmup_steps=7)
    assert config.data == Path.cwd() / "text"
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError):
        config.steps = 1


def test_warmup_is_a_fifth_of_the_steps_and_at_most_100():
    assert [TrainConfig(steps=n).warmup for n in (1, 50, 10_000)] == [0, 10, 100]
    assert TrainConfig(steps=50, warmup_steps=0).warmup == 0


def test_the_model_follows_the_options():
    model = TrainConfig(d_model=64, layers=3, heads=8, kv_heads=2, seq_len=40).model
    assert (model.d_model, model.n_layers, model.d_ff) == (64, 3, 192)
    assert (model.n_heads, model.n_kv_heads, model.max_seq_len) == (8, 2, 40)


@pytest.mark.parametrize("name", sorted(TrainConfig.model_fields))
def test_what_decides_a_run_may_not_change_on_resume(name):
    stored = TrainConfig()
    other = {
        "data": Path("other"),
        "precision": "bf16",
        "remat": False,
        "zero": 1,
    }.get(name, 7)
    found = conflicts(stored, {name: other})
    assert [p.what.split()[0] for p in found] == (
        [] if name in MAY_CHANGE else [f"--{name.replace('_', '-')}"]
    )


def test_repeating_an_option_of_the_run_is_no_conflict():
    assert conflicts(TrainConfig(steps=9), {"steps": 9, "seed": 0}) == []


def test_one_problem_is_one_line():
    assert str(UsageError([Problem("--lr 0", "zero")])) == "--lr 0: zero"
    assert str(UsageError("as it is")) == "as it is"


def test_arguments_of_the_ranks_say_what_was_typed():
    request = Request({"remat": True, "lr": 1e-3, "kv_heads": 2}, Path("a b"), True)
    assert request.arguments() == [
        "train",
        "--out=a b",
        "--resume",
        "--remat",
        "--lr=0.001",
        "--kv-heads=2",
    ]
