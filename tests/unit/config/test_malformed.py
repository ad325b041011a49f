# SPDX-License-Identifier: Apache-2.0
"""Configurations with one mistake each: one clear error, with the path of the key."""

import pytest

from zfunc.config import ConfigError, interpret

GOOD = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
}


def adam(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


def zero(**options):
    return {"zero_optimization": options}


def schedule(name, **params):
    return {"scheduler": {"type": name, "params": params}}


def cycle(**params):
    return schedule("OneCycle", cycle_min_lr=0.1, cycle_max_lr=1.0, **params)


# What is changed, the path of the problem, and words of the message.
MALFORMED = [
    # keys that do not exist
    ({"gradient_cliping": 1.0}, "gradient_cliping", 'type "gradient_clipping"'),
    ({"optimiser": {}}, "optimiser", 'type "optimizer"'),
    ({"shceduler": {}}, "shceduler", 'type "scheduler"'),
    ({"zero_optimisation": {}}, "zero_optimisation", 'type "zero_optimization"'),
    ({"p16": {"enabled": True}}, "p16", '"fp16"'),
    ({"stage": 2}, "stage", 'did you mean "zero_optimization.stage"'),
    ({"lr": 1e-3}, "lr", 'did you mean "optimizer.params.lr"'),
    ({"learning_rate_of_mine": 1}, "learning_rate_of_mine", "delete it"),
    ({7: 1}, "7", "a key that exists"),
    ({"fp16": {"enable": True}}, "fp16.enable", 'type "enabled"'),
    ({"fp16": {"loss_scal": 0}}, "fp16.loss_scal", 'type "loss_scale"'),
    (zero(sage=2), "zero_optimization.sage", 'type "stage"'),
    (zero(stag=2), "zero_optimization.stag", 'type "stage"'),
    (
        zero(stage=3, stage3_max_live_params=1),
        "zero_optimization.stage3_max_live_params",
        'type "stage3_max_live_parameters"',
    ),
    (
        zero(offload_optimizer={"devise": "cpu"}),
        "zero_optimization.offload_optimizer.devise",
        'type "device"',
    ),
    (zero(grad_hooks=True), "zero_optimization.grad_hooks", "a key that exists"),
    # dots are no sections: DeepSpeed would pass over them
    ({"fp16.enabled": True}, "fp16.enabled", 'type "fp16": {...}'),
    ({"zero_optimization.stage": 3}, "zero_optimization.stage", "not dots"),
    (
        zero(**{"offload_param.device": "none"}),
        "zero_optimization.offload_param.device",
        "not dots",
    ),
    (adam(learning_rate=1e-3), "optimizer.params.learning_rate", "a key that exists"),
    (adam(beta=[0.9, 0.9]), "optimizer.params.beta", 'type "betas"'),
    (
        {"optimizer": {"type": "AdamW", "parms": {}}},
        "optimizer.parms",
        'type "params"',
    ),
    (
        schedule("WarmupLR", warmup_steps=5),
        "scheduler.params.warmup_steps",
        'type "warmup_num_steps"',
    ),
    # wrong types
    ({"train_batch_size": "8"}, "train_batch_size", 'got "8", expected an integer'),
    ({"train_batch_size": 8.5}, "train_batch_size", "got 8.5, expected an integer"),
    ({"train_batch_size": True}, "train_batch_size", "got true, expected an integer"),
    ({"gradient_clipping": "1.0"}, "gradient_clipping", "expected a number"),
    ({"gradient_clipping": None}, "gradient_clipping", "got null, expected a number"),
    ({"fp16": {"enabled": "yes"}}, "fp16.enabled", "expected true or false"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled", 'type "enabled": true'),
    ({"fp16": True}, "fp16", "got true, expected an object"),
    ({"optimizer": "AdamW"}, "optimizer", 'got "AdamW", expected an object'),
    ({"optimizer": {"type": 3}}, "optimizer.type", "expected one of Adam, AdamW"),
    ({"optimizer": {"params": {}}}, "optimizer.type", "got nothing"),
    (
        {"optimizer": {"type": "AdamW", "params": []}},
        "optimizer.params",
        "expected an object",
    ),
    (adam(lr="fast"), "optimizer.params.lr", 'type "lr": 0.001'),
    (adam(betas=[0.9]), "optimizer.params.betas", "expected two numbers of [0, 1)"),
    (adam(betas=0.9), "optimizer.params.betas", "expected two numbers of [0, 1)"),
    (zero(stage="2"), "zero_optimization.stage", "an integer from 0 to 3"),
    (zero(overlap_comm="true"), "zero_optimization.overlap_comm", "true or false"),
    ({"zero_optimization": [2]}, "zero_optimization", "expected an object"),
    ({"communication_data_type": 16}, "communication_data_type", '"fp32", "fp16"'),
    ({"scheduler": [1]}, "scheduler", "expected an object"),
    # out of range
    ({"train_batch_size": 0}, "train_batch_size", "an integer, 1 or more"),
    ({"gradient_clipping": -1}, "gradient_clipping", "a number, 0 or more"),
    ({"gradient_clipping": float("nan")}, "gradient_clipping", "a number, 0 or more"),
    (zero(stage=4), "zero_optimization.stage", 'type "stage": 2'),
    (zero(reduce_bucket_size=0), "zero_optimization.reduce_bucket_size", "1 or more"),
    (adam(lr=-1), "optimizer.params.lr", "a number, 0 or more"),
    (adam(betas=[0.9, 1.0]), "optimizer.params.betas", "two numbers of [0, 1)"),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 0}},
        "fp16.loss_scale_window",
        "an integer, 1 or more",
    ),
    (
        {"fp16": {"enabled": True, "initial_scale_power": 1, "min_loss_scale": 4}},
        "fp16.min_loss_scale",
        "more than the first scale",
    ),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 2**63 - 1}},
        "fp16.loss_scale_window",
        'type "loss_scale_window": 1000',
    ),
    (
        {"fp16": {"enabled": True, "hysteresis": 2**63 - 1}, **zero(stage=1)},
        "fp16.hysteresis",
        'type "hysteresis": 2',
    ),
    (
        {"fp16": {"enabled": True, "loss_scale": 1e300}},
        "fp16.loss_scale",
        'at most 2**100; type "loss_scale": 128',
    ),
    (
        schedule("WarmupLR", warmup_type="cosine"),
        "scheduler.params.warmup_type",
        'expected "log" or "linear"',
    ),
    # what is there, but not here
    (
        {"optimizer": {"type": "OneBitAdam"}},
        "optimizer.type",
        'compressed communication is not here yet, and DeepSpeed removed it); type "A',
    ),
    ({"optimizer": {"type": "Adamw2"}}, "optimizer.type", 'type "AdamW"'),
    ({"optimizer": {"type": "sgd"}}, "optimizer.type", 'type "SGD"'),
    (schedule("WarmupLr"), "scheduler.type", 'type "WarmupLR"'),
    (schedule("CosineAnnealingLR"), "scheduler.type", 'type "WarmupCosineLR"'),
    (
        zero(stage=2, offload_optimizer={"device": "cpu"}),
        "zero_optimization.offload_optimizer.device",
        'offload is not here yet: type "device": "none"',
    ),
    (zero(cpu_offload=True), "zero_optimization.cpu_offload", "type false"),
    (
        zero(stage=3, zero_quantized_weights=True),
        "zero_optimization.zero_quantized_weights",
        "not quantized: type false",
    ),
    (
        zero(stage=3, zero_hpz_partition_size=8),
        "zero_optimization.zero_hpz_partition_size",
        "type 1",
    ),
    ({"amp": {"enabled": True}}, "amp", '"bf16": {"enabled": true}'),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "type false"),
    ({"tensorboard": {"enabled": True}}, "tensorboard.enabled", "state.metrics"),
    ({"flops_profiler": {"enabled": True}}, "flops_profiler.enabled", "zfunc plan"),
    (
        {"sparse_attention": {"mode": "fixed", "block": 16}},
        "sparse_attention",
        "delete it",
    ),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", 'type "mean"'),
    ({"pipeline": {"stages": 2}}, "pipeline.stages", "type 1"),
    ({"bf16": {"bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states", "fp32"),
    (adam(amsgrad=True), "optimizer.params.amsgrad", "type false"),
    (adam(max_grad_norm=1.0), "optimizer.params.max_grad_norm", "gradient_clipping"),
    # what does not fit together
    (
        {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2},
        "train_batch_size",
        "expected 12 = train_micro_batch_size_per_gpu 3 x gradient_accumulation_steps "
        '2 x 2 ranks; type "train_batch_size": 12',
    ),
    (
        {"train_micro_batch_size_per_gpu": 3},
        "train_batch_size",
        "expected a multiple of 6 = train_micro_batch_size_per_gpu 3 x 2 ranks; type "
        '"train_batch_size": 12',
    ),
    ({"train_batch_size": 7}, "train_batch_size", "a multiple of 2"),
    ({"train_batch_size": None}, "train_micro_batch_size_per_gpu", "got nothing"),
    (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "bf16.enabled",
        "one of the two",
    ),
    (
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        "bf16.bf16_master_weights_and_grads",
        "false at stage 0",
    ),
    (
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}},
        "data_types.grad_accum_dtype",
        'type "fp32"',
    ),
    ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype", '"fp32", as'),
    (
        {"communication_data_type": "fp16", "prescale_gradients": True},
        "prescale_gradients",
        'type "communication_data_type": "fp32"',
    ),
    (
        {"bfloat16": {"enabled": True}, "bf16": {"enabled": True}},
        "bfloat16",
        "delete it",
    ),
    ({"optimizer": None}, "optimizer", "expected an optimizer"),
    (schedule("WarmupDecayLR"), "scheduler.params.total_num_steps", "total_steps=1000"),
    (
        schedule("OneCycle", cycle_min_lr=0.1),
        "scheduler.params.cycle_max_lr",
        "nothing",
    ),
    (
        schedule("WarmupDecayLR", total_num_steps=5, warmup_num_steps=6),
        "scheduler.params",
        "warmup_num_steps <= total_num_steps",
    ),
    (
        {**cycle(), "optimizer": {"type": "Lion"}},
        "scheduler.params",
        'type "cycle_momentum": false',
    ),
    (
        schedule("WarmupLR", last_batch_iteration=5),
        "scheduler.params.last_batch_iteration",
        "restore a checkpoint",
    ),
    (
        {"optimizer": {"type": "SGD", "params": {"nesterov": True}}},
        "optimizer.params",
        "expected momentum > 0",
    ),
]


def test_there_are_enough():
    assert len(MALFORMED) >= 60


@pytest.mark.parametrize(
    ("change", "path", "words"), MALFORMED, ids=[case[1] for case in MALFORMED]
)
def test_one_error_names_the_key_and_what_to_type(change, path, words):
    with pytest.raises(ConfigError) as caught:
        interpret({**GOOD, **change}, world=2)
    problems = caught.value.problems
    assert [problem.path for problem in problems] == [path], str(caught.value)
    assert words in str(problems[0])
    assert str(caught.value).startswith("the dict cannot be used, 1 problem:\n  ")
    assert all(problems[0])


def test_all_problems_come_at_once():
    changes = {
        "train_batch_size": 7,
        "gradient_cliping": 1,
        "fp16": {"enabled": 1},
        **zero(stage=7),
        **adam(lr="x"),
        **schedule("WarmupDecayLR", warmup_type="x"),
    }
    with pytest.raises(ConfigError) as caught:
        interpret({**GOOD, **changes}, world=2)
    assert [problem.path for problem in caught.value.problems] == [
        "optimizer.params.lr",
        "gradient_cliping",
        "fp16.enabled",
        "zero_optimization.stage",
        "scheduler.params.warmup_type",
        "train_batch_size",
        "scheduler.params.total_num_steps",
    ]
    assert str(caught.value).startswith("the dict cannot be used, 7 problems:\n")
