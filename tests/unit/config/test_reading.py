# SPDX-License-Identifier: Apache-2.0
"""The forms of a configuration, and the other arguments."""

import base64
import json
from pathlib import Path

import pytest

import zfunc as zf
from zfunc.config import ConfigError, interpret

CONFIG = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}
TEXT = json.dumps(CONFIG)


def refused(source):
    with pytest.raises(ConfigError) as caught:
        interpret(source, world=1)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "ds_config.json"
        file.write_text(text)
        return file

    return write


def test_a_dict_a_file_and_base64_are_the_same(write):
    file = write(TEXT)
    coded = base64.urlsafe_b64encode(TEXT.encode()).decode()
    for source in (CONFIG, file, str(file), coded, coded.rstrip("=")):
        assert interpret(source, world=1).data.train_batch_size == 8


def test_a_dict_is_not_changed():
    config = json.loads(TEXT)
    interpret(config, world=1)
    assert config == CONFIG


def test_comments_are_read_and_strings_with_their_signs_stay(write):
    file = write(
        '{ // one\n "train_batch_size": 8, # two\n /* three\n lines */'
        '"optimizer": {"type": "SGD"}, "log_level": "a // b # c /* d \\" e" }'
    )
    made = interpret(file, world=1)
    assert made.entries[-1].value == 'a // b # c /* d " e'


def test_a_mistake_in_the_text_has_its_line(write):
    file = write('{ // one\n /* two\n three */ "train_batch_size" 8}')
    message = refused(file)
    assert message.startswith(f"{file} cannot be used, 1 problem:")
    assert "line 3" in message
    assert "comments are read, other forms of Hjson are not" in message


def test_a_key_twice(write):
    text = '{"train_batch_size": 8, "fp16": {"enabled": true, "enabled": false}}'
    assert "enabled: got the key more than once, expected it once" in refused(
        write(text)
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "no/such/file.json",
            '"no/such/file.json", no file, expected a dict, the path',
        ),
        ("", 'got "", expected a dict'),
        (None, "got a NoneType"),
        (7, "got a int"),
        (Path("no/such/file.json"), "no/such/file.json"),
    ],
)
def test_what_is_no_configuration(source, words):
    assert words in refused(source)


def test_a_key_twice_has_its_path(write):
    text = '{"optimizer": {"params": {"lr": 1, "lr": 2}}, "fp16": {"lr": 1}}'
    assert "\n  optimizer.params.lr: got the key more than once" in refused(write(text))


@pytest.mark.parametrize("key", ["amp", "zenflow", "fp16", "no_key"])
def test_objects_without_end(key):
    deep = nested = {}
    for _ in range(3000):
        nested["enabled"] = nested = {}
    endless = {}
    endless["enabled"] = [endless]
    for value in (deep, endless):
        assert "objects in objects without end" in refused({**CONFIG, key: value})


def test_json_that_is_no_object(write):
    assert "got [1], expected an object" in refused(write("[1]"))
    assert "NaN is no number of JSON" in refused(write('{"train_batch_size": NaN}'))
    assert "text that is not JSON" in refused(write(""))


def test_world_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert zf.from_ds_config(CONFIG).data.micro_batch_size == 2
    monkeypatch.delenv("WORLD_SIZE")
    assert zf.from_ds_config(CONFIG).data.world == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"world": "2"}, TypeError, "world is a str, expected the number of data"),
        ({"world": 0}, ValueError, "world is 0, expected an int >= 1; type for"),
        ({"auto": 5}, TypeError, "auto is a int, expected a dict of values by path"),
        ({"total_steps": 1.5}, TypeError, "total_steps is a float, expected a number"),
        ({"total_steps": 0}, ValueError, "total_steps is 0, expected an int >= 1"),
        ({"optimizer": 3}, TypeError, "optimizer is a int, expected a GradientTrans"),
    ],
)
def test_other_arguments(options, error, message):
    with pytest.raises(error, match=message):
        zf.from_ds_config(CONFIG, **options)


@pytest.mark.parametrize("given", ["", "two"])
def test_an_environment_without_a_number_of_ranks(monkeypatch, given):
    monkeypatch.setenv("WORLD_SIZE", given)
    with pytest.raises(ValueError, match=r"WORLD_SIZE=.*type for example world=2"):
        interpret(CONFIG)


def test_a_value_for_auto_that_is_not_read_is_a_note():
    path = "optimizer.params.lr"
    made = interpret(CONFIG, world=1, auto={path: 3e-4})
    assert made.notes == (
        f"auto['{path}'] is not read: the configuration has no such key.",
    )
    with_it = {**CONFIG, "optimizer": {"type": "SGD", "params": {"lr": "auto"}}}
    assert interpret(with_it, world=1, auto={path: 3e-4}).notes == ()


def test_the_paths_of_auto_are_strings():
    with pytest.raises(TypeError, match="auto has the key 3, expected the path"):
        interpret(CONFIG, world=1, auto={3: 1})


SCHEDULED = {"train_batch_size": 8, "scheduler": {"type": "LRRangeTest"}}


@pytest.mark.parametrize("clipping", [0, 1])
def test_a_function_that_makes_no_optimizer(clipping):
    config = {**SCHEDULED, "gradient_clipping": clipping}
    with pytest.raises(TypeError, match="optimizer returned a int, expected a Grad"):
        interpret(config, world=1, optimizer=lambda rate: 3)


def test_an_error_of_the_callers_function_is_not_one_of_the_configuration():
    def broken(rate):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        interpret(SCHEDULED, world=1, optimizer=broken)


def test_auto_names_keys_that_exist():
    with pytest.raises(ConfigError) as caught:
        interpret(CONFIG, world=1, auto={"optimizer.params.lrr": 1})
    assert "auto['optimizer.params.lrr']" in str(caught.value)
    assert 'type "lr"' in str(caught.value)


def test_an_optimizer_of_the_caller():
    config = {"train_batch_size": 8, "gradient_clipping": 0}
    whole = zf.optim.sgd(0.1)
    assert zf.from_ds_config(config, optimizer=whole).tx is whole
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5}}
    made = interpret(config, optimizer=zf.optim.adamw)
    assert float(made.schedule(5000)) == 0.5
    for bad, words in (
        (whole, "a schedule, and a whole optimizer from the caller"),
        (None, "got nothing, expected an optimizer"),
    ):
        with pytest.raises(ConfigError, match=words):
            zf.from_ds_config(config, optimizer=bad)
    with pytest.raises(ConfigError, match="one here and one from the caller"):
        zf.from_ds_config(CONFIG, optimizer=whole)
    config["scheduler"] = {"type": "WarmupLR"}
    with pytest.raises(ConfigError, match="a schedule that says its rate"):
        zf.from_ds_config(config, optimizer=zf.optim.adamw)


def test_total_steps():
    config = {**CONFIG, "scheduler": {"type": "WarmupDecayLR"}}
    for params in ({}, {"total_num_steps": "auto"}):
        config["scheduler"]["params"] = {"warmup_num_steps": 2, **params}
        made = interpret(config, total_steps=10)
        assert float(made.schedule(11)) == 0.0
        assert float(made.schedule(10)) > 0.0
    config["scheduler"]["params"]["total_num_steps"] = 5
    with pytest.raises(ConfigError, match="expected 10, which the caller has"):
        interpret(config, total_steps=10)
    assert "no end" in interpret(CONFIG, total_steps=10).notes[-1]
