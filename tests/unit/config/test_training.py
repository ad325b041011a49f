# SPDX-License-Identifier: Apache-2.0
"""A training from a configuration is that of the same calls by hand, bitwise."""

import pytest
import torch

import zfunc as zf
from zfunc.config import interpret

STEPS = 6
CONFIG = {
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.1,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1.0, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": 6,
            "warmup_num_steps": 3,
            "warmup_max_lr": 0.05,
            "warmup_type": "linear",
        },
    },
}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "hysteresis": 1}}


def loss_fn(params, x):
    return (torch.tanh(x @ params["up"]) @ params["down"] - x).square().mean()


def by_hand(stage, name):
    rate = zf.optim.warmup_decay_lr(6, 0.0, 0.05, 3, "linear")
    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(0.1),
        zf.optim.adamw(rate, 0.8, 0.9, 1e-6, 0.1),
    )
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    partition = zf.partition(
        stage,
        gather_dtype=low if stage else None,
        reduce_dtype=low if name == "bf16" else None,
        persistence_threshold=100_000 if stage == 3 else 0,
    )
    extra = {
        "fp32": (),
        "bf16": (zf.precision("bf16"), zf.skip_nonfinite()),
        "fp16": (zf.precision("fp16", loss_scale=zf.DynamicLossScale(hysteresis=1)),),
    }[name]
    return zf.train_step(loss_fn, tx, partition, *extra, zf.accumulate(3))


def trained(step, **shard):
    torch.manual_seed(0)
    params = {"up": torch.randn(4, 8) / 2, "down": torch.randn(8, 4) / 2}
    state = zf.shard(params, zf.make_mesh({"data": 1}), **shard)
    losses = []
    for _ in range(STEPS):
        state = step(state, torch.randn(12, 4))
        losses.append(state.metrics.loss.clone())
    return zf.unshard(state).params, torch.stack(losses)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_training_equals_the_same_calls_by_hand(stage, name):
    precision = {"fp32": {}, "bf16": BF16, "fp16": FP16}[name]
    config = {**CONFIG, **precision, "zero_optimization": {"stage": stage}}
    made = interpret(config, world=1)
    step = zf.train_step(loss_fn, made.tx, *made.transforms)
    params, losses = trained(step, **made.shard)
    mine, my_losses = trained(by_hand(stage, name), **({} if stage else made.shard))
    assert torch.equal(losses, my_losses)
    for path in params:
        assert torch.equal(params[path], mine[path])
    assert losses[-1] < losses[0]


def test_the_passes_of_a_configuration_change_no_bit():
    zero = {
        "stage": 3,
        "reduce_bucket_size": 64,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
    }
    config = {**CONFIG, **BF16, "zero_optimization": zero}
    tx, transforms, jit, data = zf.from_ds_config(config, world=1)
    assert data.batch_size == 12
    step = zf.train_step(loss_fn, tx, *transforms)
    eager, losses = trained(step)
    jitted, jit_losses = trained(zf.jit(step, **jit))
    assert torch.equal(losses, jit_losses)
    assert all(torch.equal(eager[path], jitted[path]) for path in eager)


def test_bf16_storage():
    low = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    made = interpret({**CONFIG, **low, "zero_optimization": {"stage": 2}}, world=1)
    step = zf.train_step(loss_fn, made.tx, *made.transforms)
    params, _ = trained(step, **made.shard)
    assert {leaf.dtype for leaf in params.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [BF16, FP16])
def test_half_precision_wants_masters(dtype, extra):
    tx, transforms, *_ = zf.from_ds_config(
        {**CONFIG, **extra, "zero_optimization": {"stage": 3}}, world=1
    )
    state = zf.shard({"w": torch.ones(4, 4)}, zf.make_mesh({"data": 1}), dtype=dtype)
    step = zf.train_step(lambda p, x: (x @ p["w"]).sum(), tx, *transforms)
    with pytest.raises(TypeError) as caught:
        step(state, torch.ones(12, 4))
    assert str(caught.value) == (
        f"params['w'] is stored in {dtype}, and the configuration computes in half "
        "precision on float32 master weights: pass dtype=torch.float32 to "
        "zf.models.from_hf or to zf.shard."
    )


def test_a_program_tells_the_loss_scale_of_a_state():
    tx, transforms, *_ = zf.from_ds_config({**CONFIG, **FP16}, world=1)
    step = zf.train_step(loss_fn, tx, *transforms)
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}))
    expected = step.loss_scale_of(state)
    assert float(expected.scale) == 2.0**16
    assert zf.jit(step).loss_scale_of(state) == expected
