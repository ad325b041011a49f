# SPDX-License-Identifier: Apache-2.0
"""Configurations of the kinds that tutorials have: they load, or name what is not here.

The values are those that are usual; "auto" is filled in as transformers does.
"""

import json
from pathlib import Path

import pytest

from zfunc.config import ConfigError, interpret

FOLDER = Path(__file__).parent / "tutorials"
WORLD = 4
TRAINER = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 64,
    "gradient_clipping": 0.5,
    "optimizer.params.lr": 3e-4,
    "optimizer.params.betas": [0.9, 0.98],
    "optimizer.params.eps": 1e-7,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.params.warmup_min_lr": 0,
    "scheduler.params.warmup_max_lr": 3e-4,
    "scheduler.params.warmup_num_steps": 10,
    "scheduler.params.total_num_steps": 100,
    "fp16.enabled": False,
    "bf16.enabled": True,
    "zero_optimization.reduce_bucket_size": 512 * 512,
    "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * 512 * 512),
    "zero_optimization.stage3_param_persistence_threshold": 10 * 512,
}
LOADS = {
    "cifar_adam_fp16": (4, {}, 0, "fp16", (16, 4, 1)),
    "t5_zero2_auto": (4, TRAINER, 2, "bf16", (64, 8, 2)),
    "t5_zero3_auto": (4, TRAINER, 3, "bf16", (64, 8, 2)),
    "bert_lamb_64k": (64, {}, 0, "fp16", (65536, 64, 16)),
    "gpt2_one_cycle": (2, {}, 1, "bf16", (16, 8, 1)),
}
NAMES = {
    "llama_fp16_offload": [
        "zero_optimization.offload_param.device",
        "zero_optimization.offload_optimizer.device",
        "activation_checkpointing.partition_activations",
    ],
    "bert_onebit_adam": ["optimizer.type"],
}


def paths(value, prefix=""):
    """Every key of a configuration that is no section."""
    for name, each in value.items():
        if isinstance(each, dict):
            yield from paths(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_file_is_tested():
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files == set(LOADS) | set(NAMES)


@pytest.mark.parametrize("name", LOADS)
def test_it_loads_unchanged_and_every_key_is_accounted_for(name):
    world, auto, stage, precision, sizes = LOADS[name]
    file = FOLDER / f"{name}.json"
    made = interpret(file, world=world, auto=auto)
    data = made.data
    assert (made.stage, made.precision) == (stage, precision)
    assert sizes == (
        data.train_batch_size,
        data.micro_batch_size,
        data.accumulation_steps,
    )
    given = [
        path.replace("bfloat16", "bf16") for path in paths(json.loads(file.read_text()))
    ]
    assert [entry.path for entry in made.entries] == given
    assert all(entry.became for entry in made.entries)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_exactly_what_is_not_here(name):
    with pytest.raises(ConfigError) as caught:
        interpret(FOLDER / f"{name}.json", world=4)
    problems = caught.value.problems
    offload = [problem.path for problem in problems]
    if name == "bert_onebit_adam":
        problems = [p for p in problems if p.path != "train_batch_size"]
        assert "compressed communication" in str(problems[0])
    assert [problem.path for problem in problems] == NAMES[name], offload


def test_llama_trains_once_what_is_not_here_is_off():
    config = json.loads((FOLDER / "llama_fp16_offload.json").read_text())
    zero = config["zero_optimization"]
    zero["offload_param"]["device"] = zero["offload_optimizer"]["device"] = "none"
    config["activation_checkpointing"]["partition_activations"] = False
    made = interpret(config, world=4)
    assert made.data.batch_size == 16
    off = [entry for entry in made.entries if ".offload_" in entry.path]
    assert {entry.status for entry in off} == {"off"}


def test_the_trainer_fills_in_what_says_auto():
    made = interpret(FOLDER / "t5_zero3_auto.json", world=WORLD, auto=TRAINER)
    assert made.clipping == 0.5
    assert float(made.schedule(11)) == 3e-4
    by_path = {entry.path: entry for entry in made.entries}
    lr = by_path["optimizer.params.betas"]
    assert lr.value == "auto"
    assert lr.note == "auto: [0.9, 0.98], given by the caller"
    assert len(made.jit["passes"]) > 5


def test_a_trainer_that_disagrees_is_one_error_with_each_mismatch():
    config = json.loads((FOLDER / "t5_zero3_auto.json").read_text())
    config["gradient_clipping"] = 1.0
    config["optimizer"]["params"]["lr"] = 1e-5
    config["zero_optimization"]["reduce_bucket_size"] = 5  # not compared
    with pytest.raises(ConfigError) as caught:
        interpret(config, world=WORLD, auto=TRAINER)
    assert [problem.path for problem in caught.value.problems] == [
        "optimizer.params.lr",
        "gradient_clipping",
    ]
    assert "expected 0.0003, which the caller has" in str(caught.value)


def test_auto_without_a_value():
    with pytest.raises(ConfigError) as caught:
        interpret(FOLDER / "t5_zero2_auto.json", world=WORLD)
    assert [problem.path for problem in caught.value.problems] == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    ]
    assert 'type auto={"train_batch_size": ...' in str(caught.value)
