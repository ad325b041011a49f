# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench decode``: both say the same tokens, and what is printed."""

import json

import pytest
import torch
from typer.testing import CliRunner

from zfunc.bench import decode
from zfunc.bench.decode import DecodePlan, TokensDifferError, decode_model, run_decode
from zfunc.cli.app import app

QUICK = ("--model", "tiny", "--tokens", "6", "--rounds", "2", "--threads", "1")


def typed(*words):
    return CliRunner().invoke(app, ["bench", "decode", *map(str, words)])


def test_what_it_prints_and_writes(tmp_path):
    path = tmp_path / "decode.json"
    threads = torch.get_num_threads()
    result = typed(*QUICK, "--json", path)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    lines = result.output.splitlines()[-4:]
    assert lines[0].startswith("tiny: hidden 64, 2 layers, 1 x 6 tokens after 16")
    assert [line.split()[0] for line in lines[1:]] == ["zfunc", "transformers", "ratio"]
    found = json.loads(path.read_text())
    assert len(found["ours_s"]) == len(found["theirs_s"]) == 2
    assert found["ratio"][1] <= found["ratio"][0] <= found["ratio"][2]


def test_what_cannot_be_used(tmp_path):
    for words, why in (
        (("--model", "huge"), "there is no model 'huge'; there are small, large, tiny"),
        (("--json", tmp_path / "no" / "a.json"), "there is no directory"),
    ):
        result = typed(*words)
        assert result.exit_code == 2
        assert why in result.output


@pytest.mark.parametrize(
    ("other", "why"),
    [([[1, 2, 4]], "from position 2 on"), ([[1, 2]], r"one says \(1, 3\) tokens")],
)
def test_other_tokens_are_an_error(monkeypatch, other, why):
    plan = DecodePlan(decode_model("tiny"), 1, 3, 4, 1, 1)
    texts = torch.tensor([[1, 2, 3]]), torch.tensor(other)
    monkeypatch.setattr(
        decode, "_contenders", lambda plan: tuple(lambda x=x: x for x in texts)
    )
    with pytest.raises(TokensDifferError, match=why):
        run_decode(plan, print)
