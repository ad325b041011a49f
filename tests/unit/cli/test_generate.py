# SPDX-License-Identifier: Apache-2.0
"""``zfunc generate``: from a directory of transformers and from a training run."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import zfunc as zf
from tests.unit.inference.families import model_of, theirs
from zfunc import checkpoint
from zfunc.cli.app import app
from zfunc.cli.config import TrainConfig
from zfunc.cli.program import first_state
from zfunc.cli.rundir import RunDir
from zfunc.models import gpt


def typed(*arguments):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Llama with a tokenizer of words ``w0`` to ``w96``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ``zfunc train`` before its first step."""
    run = RunDir(tmp_path_factory.mktemp("run"))
    config = TrainConfig(d_model=32, layers=1, heads=2, seq_len=32, steps=1)
    run.prepare(config, overwrite=False)
    state = first_state(config, zf.make_mesh({"data": 1}))
    checkpoint.save(run.checkpoints, state)
    return run, config


def test_a_directory_of_transformers(directory):
    prompt = [5, 6, 7]
    text = " ".join(f"w{i}" for i in prompt)
    arguments = ("--model", directory, "--prompt", text, "--max-new-tokens", 9)
    result = typed(*arguments)
    want = theirs(model_of("llama"), torch.tensor([prompt]), None, max_new_tokens=9)
    want = [i for i in want[0, 3:].tolist() if i != 2]
    assert result.exit_code == 0
    assert result.output.split() == [f"w{i}" for i in want]
    found = json.loads(typed(*arguments, "--json").output)
    assert set(found) == {"prompt", "text", "ids", "finished", "seconds"}
    assert found["prompt"] == text
    assert [i for i in found["ids"] if i != 2] == want
    assert found["finished"] == (found["ids"][-1] == 2)


def test_seeds_draw_other_texts(directory):
    arguments = ("--model", directory, "--prompt", "w5", "--temperature", 2.0)
    arguments += ("--top-k", 50, "--top-p", 0.99, "--max-new-tokens", 12)
    texts = [typed(*arguments, "--seed", seed).output for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_training_run(run):
    place, config = run
    result = typed("--model", place.root, "--prompt", "def", "--max-new-tokens", 8)
    params = gpt.init(config.model, seed=config.seed)
    ids = torch.tensor([list(b"def")])
    made = zf.generate(
        zf.models.decoder(config.model), params, ids, max_new_tokens=8, jit=False
    )
    want = bytes(made.ids[0, 3:].tolist()).decode("utf-8", errors="replace")
    assert result.output == want + "\n"


def test_what_cannot_be_used(directory, run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "nonsense"}')
    untold = tmp_path / "untold"
    untold.mkdir()
    (untold / "config.json").write_text((directory / "config.json").read_text())
    unsaved = tmp_path / "unsaved"
    RunDir(unsaved).prepare(run[1], overwrite=False)
    RunDir(unsaved).checkpoints.mkdir()
    for model, more, why in (
        (tmp_path / "nowhere", (), "there is no such directory"),
        (file, (), "is a file"),
        (empty, (), "has no config.json"),
        (strange, (), "--model"),
        (untold, (), "has no tokenizer: copy one there"),
        (unsaved, (), "checkpoint"),
        (directory, ("--max-new-tokens", 0), "--max-new-tokens 0, expected a positive"),
        (directory, ("--top-k", 3), "--top-k 3 with --temperature 0"),
        (directory, ("--temperature", -1), "--temperature -1.0, expected"),
        (run[0].root, ("--max-new-tokens", 99), "type --max-new-tokens 31"),
    ):
        result = typed("--model", model, "--prompt", "w", *more)
        assert result.exit_code == 2, model
        assert result.output.startswith("error: ")
        assert why in result.output
    result = typed("--model", directory, "--prompt", "")
    assert (result.exit_code, result.output) == (
        2,
        "error: --prompt '': has no tokens: type some\n",
    )


def test_ends_that_the_directory_gives(directory, tmp_path):
    arguments = ("--model", tmp_path, "--prompt", "w5 w6", "--max-new-tokens", 9)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    said = tmp_path / "generation_config.json"
    text = json.loads(typed(*arguments, "--json").output)["ids"]
    said.write_text(json.dumps({"eos_token_id": [text[3], 128_001]}))
    assert json.loads(typed(*arguments, "--json").output)["ids"] == text[:4]
    said.write_text("{")
    result = typed(*arguments)
    assert result.exit_code == 2
    assert "generation_config.json: is no JSON" in result.output
