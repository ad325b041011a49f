# SPDX-License-Identifier: Apache-2.0
"""Compare the table and the rates with the DeepSpeed that is installed:

python -m tests.unit.config.against_deepspeed

Defaults and names of keys are read from its models; the rate of each schedule is that
of its class, built from the same section, and read before each of 200 updates.
"""

import importlib.metadata
import logging
import os
import sys

import torch

from zfunc.config import interpret
from zfunc.config.keys import PLANNED, REFUSED
from zfunc.config.table import ALIASES, KEYS

STEPS = 200
SCHEDULES = [
    {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
    {"type": "WarmupLR", "params": {"warmup_max_lr": 0.3, "warmup_type": "linear"}},
    {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-5, "warmup_num_steps": 1}},
    {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": 150, "warmup_num_steps": 7},
    },
    {
        "type": "WarmupCosineLR",
        "params": {"total_num_steps": 150, "warmup_num_steps": 7, "cos_min_ratio": 0.1},
    },
    {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 30,
            "cycle_second_step_size": 50,
            "decay_step_size": 10,
            "decay_lr_rate": 0.5,
        },
    },
    {
        "type": "OneCycle",
        "params": {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 30,
            "cycle_first_stair_count": 4,
        },
    },
    {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 7}},
]


def models():
    """DeepSpeed's models of sections, by the path of the section."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime.config import HybridEngineConfig
    from deepspeed.runtime.precision_config import (
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
    )
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero import config as zero
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    prefix = "zero_optimization"
    return {
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        prefix: zero.DeepSpeedZeroConfig,
        f"{prefix}.offload_param": zero.DeepSpeedZeroOffloadParamConfig,
        f"{prefix}.offload_optimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        f"{prefix}.leaf_module": zero.DeepSpeedZeroLeafModuleConfig,
        "tensorboard": monitor.TensorBoardConfig,
        "csv_monitor": monitor.CSVConfig,
        "wandb": monitor.WandbConfig,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "tensor_parallel": TPTrainingConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def differing_keys():
    """Keys and defaults that are not those of the models."""
    found = []
    for section, model in models().items():
        for name, field in model.model_fields.items():
            path = f"{section}.{field.alias or name}"
            path = ALIASES.get(path, (path, ""))[0]
            if f"{section}.{name}" in models() or path in models():
                continue
            if path not in KEYS:
                found.append(f"{path} is not in the table")
                continue
            theirs = field.get_default(call_default_factory=True)
            ours = KEYS[path].default
            theirs = getattr(theirs, "value", theirs)
            plain = isinstance(theirs, bool | int | float | str | None)
            if plain and theirs != ours:
                found.append(f"{path} is {theirs!r} there, {ours!r} here")
    return found


def differing_top():
    """Defaults at the top, of a configuration that says nothing else."""
    from deepspeed.runtime.config import DeepSpeedConfig

    made = DeepSpeedConfig({"train_batch_size": 8})
    found = []
    for path, key in KEYS.items():
        theirs = getattr(made, path, None)
        plain = isinstance(theirs, bool | int | float | str)
        if "." not in path and plain and key.default is not None:
            same = theirs == key.default or str(theirs).endswith("float32")
            found += [] if same else [f"{path} is {theirs!r} there"]
    return found


def largest_difference(section):
    """Of float64 rates, relative; and how many differ in float32."""
    from deepspeed.runtime import lr_schedules

    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": section,
    }
    ours = interpret(config, world=1).schedule
    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.AdamW([parameter], lr=0.01)
    make = getattr(lr_schedules, section["type"])
    scheduler = make(optimizer, **section["params"])
    theirs, mine = [], []
    for step in range(STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        mine.append(float(ours(torch.tensor(step))))
        optimizer.step()
        scheduler.step()
    a = torch.tensor(theirs, dtype=torch.float64)
    b = torch.tensor(mine, dtype=torch.float64)
    apart = float((a - b).abs().max() / a.abs().max())
    return apart, int((a.float() != b.float()).sum())


def main():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    version = importlib.metadata.version("deepspeed")
    wrong = differing_keys() + differing_top()
    hidden = sum(key.status in (PLANNED, REFUSED) for key in KEYS.values())
    print(f"DeepSpeed {version}: {len(KEYS)} keys, {hidden} of features not here")
    print("\n".join(wrong) or "every key of its models is there, with its default")
    for section in SCHEDULES:
        apart, count = largest_difference(section)
        wrong += ["rates"] * (apart > 1e-14 or count > 0)
        print(
            f"{section['type']:15} largest relative difference {apart:.1e}, "
            f"{count} of {STEPS} rates differ in float32"
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
