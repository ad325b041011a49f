# SPDX-License-Identifier: Apache-2.0
"""``zfunc plan``: what it prints, writes and refuses."""

import json

import pytest
from typer.testing import CliRunner

from zfunc.cli.app import app

TINY = ("--model", "tiny", "--ranks", "8", "--seq-len", "32", "--layers", "3")


def run(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    json_path, picture = folder / "plan.json", folder / "memory.png"
    result = run(*TINY, "--memory-gb", 80, "--json", json_path, "--plot", picture)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(json_path.read_text()), picture


def test_the_table(written):
    text, _, _ = written
    head, *rows = text.splitlines()
    assert head.startswith("tiny: 1")
    assert "on 8 ranks, bf16, 1 x 32 tokens per rank in 1 microbatch" in text
    assert "ZeRO 0" in rows[0]
    assert "ZeRO 3" in rows[0]
    for name in ("model states", "peak memory", "fits in 80.0 GB", "operations"):
        assert name in text
    assert "2.00 Ψ" in text
    assert "3.00 Ψ" in text


def test_the_suggestion(written):
    text, document, _ = written
    assert "fits in 80.0 GB" in text
    assert document["suggestion"]["command"] in text
    assert 'zf.partition(zero=0), zf.precision("bf16")' in text


def test_the_json(written):
    _, document, _ = written
    assert document["schema"] == 1
    assert document["request"]["ranks"] == 8
    assert [stage["zero"] for stage in document["stages"]] == [0, 1, 2, 3]
    for stage in document["stages"]:
        assert stage["peak_bytes"] == sum(stage["peak_by_kind"].values())
        states = dict(stage["model_states"])
        assert states.pop("total") == sum(states.values())
        assert stage["sent_bytes"] == sum(row["sent_bytes"] for row in stage["comm"])
        seconds = stage["seconds"]
        assert max(seconds["compute"], seconds["comm"]) <= seconds["step"]
        assert seconds["step"] <= seconds["compute"] + seconds["comm"]
    zero, *_, three = document["stages"]
    assert three["peak_bytes"] < zero["peak_bytes"]


def test_the_picture(written):
    _, _, picture = written
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_to_stdout_is_nothing_else():
    result = run(*TINY, "--zero", 3, "--json", "-")
    [stage] = json.loads(result.stdout)["stages"]
    assert stage["zero"] == 3


def test_a_mesh_is_its_ranks():
    a, b = (
        json.loads(run(*words, "--zero", 2, "--json", "-").stdout)["stages"]
        for words in (TINY, ("--mesh", "data=8", *TINY[:2], *TINY[4:]))
    )
    assert a == b


def test_the_list_of_presets():
    text = run("--list").output
    assert "7.5b" in text
    assert "figure 1 of the ZeRO paper" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tinny"], "--model tinny: there is no preset of that name"),
        (["--mesh", "tensor=2"], "on one axis, data; type --mesh data=1024"),
        (["--ranks", "4", "--mesh", "data=2"], "give one of the two"),
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--memory-gb", "-1"], "--memory-gb -1.0: must be more than 0"),
        (["--json", "nowhere/plan.json"], "there is no directory nowhere; make it"),
        (["--plot", "nowhere/plan.png"], "there is no directory nowhere; make it"),
    ],
)
def test_errors_say_what_to_type(words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
