# SPDX-License-Identifier: Apache-2.0
"""``zfunc config check`` and ``zfunc config explain``."""

import json

import pytest
from typer.testing import CliRunner

from zfunc.cli.app import app

CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "overlap_comm": True},
    "tensorboard": {"enabled": False},
}


@pytest.fixture
def run(tmp_path):
    def run(command, config, *words):
        file = tmp_path / "ds_config.json"
        text = config if isinstance(config, str) else json.dumps(config)
        file.write_text(text)
        return CliRunner().invoke(app, ["config", command, str(file), *words])

    return run


def test_check(run):
    result = run("check", CONFIG, "--world", "3")
    assert result.exit_code == 0, result.output
    head, counts = result.stdout.splitlines()
    assert head.endswith(
        "ds_config.json: ZeRO 3, bf16, 24 samples = 4 x 2 microbatches x 3 ranks"
    )
    assert counts == "9 keys: 7 supported, 1 not meaningful here, 1 off"


def test_check_says_all_that_is_wrong(run):
    result = run("check", {**CONFIG, "zero": 1, "fp16": {"enabled": "x"}})
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("ds_config.json cannot be used, 2 problems:")
    assert lines[1] == "  zero: got 1, expected a key that exists; delete it"
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--auto", "train_batch_size"), "expected PATH=VALUE; type --auto train_mic"),
        (("--auto", "train_batch_siz=8"), 'type "train_batch_size"'),
        (("--world", "0"), "world is 0, expected an int >= 1"),
    ],
)
def test_wrong_options(run, words, message):
    result = run("check", CONFIG, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_no_such_file():
    result = CliRunner().invoke(app, ["config", "check", "nothing.json"])
    assert result.exit_code == 2
    assert result.stderr == "error: nothing.json: there is no such file\n"


def test_a_directory(tmp_path):
    result = CliRunner().invoke(app, ["config", "check", str(tmp_path)])
    assert result.exit_code == 2
    assert "Is a directory" in result.output


def test_a_text_that_is_no_configuration(run):
    for text in ("{", "[1]"):
        result = run("explain", text)
        assert result.exit_code == 2
        assert "cannot be used, 1 problem" in result.stderr


def test_explain(run):
    words = ("--world", "2", "--auto", "optimizer.params.lr=0.25")
    result = run("explain", CONFIG, *words)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in (
        'optimizer.params.lr "auto" supported learning_rate (auto: 0.25, given by',
        "zero_optimization.stage 3 supported zf.partition(zero=3)",
        "zero_optimization.overlap_comm true not meaningful here",
        "tensorboard.enabled false off nothing: the feature is off",
        "gradient_clipping 1.0 supported zf.optim.clip_by_global_norm(1.0)",
    ):
        assert part in text


def test_explain_as_json(run):
    result = run("explain", CONFIG, "--world", "2", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert (document["stage"], document["precision"]) == (3, "bf16")
    assert document["data"]["train_batch_size"] == 16
    assert document["transforms"] == [
        "partition(zero=3)",
        "precision(compute=bf16,output=f32)",
        "skip_nonfinite()",
        "accumulate(2)",
    ]
    given = {entry["path"]: entry for entry in document["entries"]}
    assert given["train_batch_size"]["note"] == "auto: inferred from the others"
    assert given["bf16.enabled"]["status"] == "supported"
    defaults = {entry["path"]: entry["value"] for entry in document["defaults"]}
    assert defaults["gradient_clipping"] == 1.0
    assert defaults["zero_optimization.stage3_param_persistence_threshold"] == 100_000


def test_a_file_without_an_optimizer_is_whole(run):
    config = {name: value for name, value in CONFIG.items() if name != "optimizer"}
    result = run("check", config)
    assert result.exit_code == 0, result.output
    assert "There is no optimizer in the file" in result.stdout
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
    assert run("check", config).exit_code == 0
