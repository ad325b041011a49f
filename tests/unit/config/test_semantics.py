# SPDX-License-Identifier: Apache-2.0
"""What keys become: the calls with their arguments, and updates that are exact."""

import math
import sys

import pytest
import torch

import zfunc as zf
from zfunc.config import ConfigError, interpret, numerics, programs
from zfunc.optim import apply_updates
from zfunc.program.passes import DEFAULT

BASE = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}


def read(world=2, **changes):
    return interpret({**BASE, **changes}, world=world)


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each transformation and pass that is made."""
    made = {}

    def spy(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            made[name] = (args, kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    module = sys.modules["zfunc.config.interpret"]
    for name in ("partition", "accumulate"):
        spy(module, name)
    for name in ("precision", "DynamicLossScale", "StaticLossScale", "skip_nonfinite"):
        spy(numerics, name)
    for name in ("bucket", "keep_small", "prefetch"):
        spy(programs, name)
    return made


BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True}}
LOW, HALF = torch.bfloat16, torch.float16
PARTITIONS = [
    ({}, (0,), {"gather_dtype": None, "reduce_dtype": None}),
    ({"zero_optimization": {"stage": 1}}, (1,), {}),
    ({"zero_optimization": True}, (1,), {}),
    ({"zero_optimization": False}, (0,), {}),
    ({"zero_optimization": {"stage": 3}}, (3,), {"persistence_threshold": 100_000}),
    (
        {"zero_optimization": {"stage": 3, "param_persistence_threshold": 1e4}},
        (3,),
        {"persistence_threshold": 10_000},
    ),
    (
        {"zero_optimization": {"stage": 2, "stage3_param_persistence_threshold": 5}},
        (2,),
        {"persistence_threshold": None},
    ),
    (BF16, (0,), {"gather_dtype": None, "reduce_dtype": LOW}),
    (
        {**BF16, "zero_optimization": {"stage": 2}},
        (2,),
        {"gather_dtype": LOW, "reduce_dtype": LOW},
    ),
    (
        {**FP16, "zero_optimization": {"stage": 2}},
        (2,),
        {"gather_dtype": HALF, "reduce_dtype": None},
    ),
    (
        {**BF16, "communication_data_type": "fp32"},
        (0,),
        {"reduce_dtype": torch.float32},
    ),
    ({"communication_data_type": "FP16"}, (0,), {"reduce_dtype": HALF}),
]


@pytest.mark.parametrize(("changes", "args", "options"), PARTITIONS)
def test_partition(calls, changes, args, options):
    read(**changes)
    assert calls["partition"][0] == args
    for name, value in options.items():
        assert calls["partition"][1].get(name) == value


SCALES = [
    ({"enabled": True}, 1, "DynamicLossScale", {"hysteresis": 2}),
    ({"enabled": True}, 0, "DynamicLossScale", {"hysteresis": 1}),
    (
        {
            "enabled": True,
            "initial_scale_power": 8,
            "loss_scale_window": 5,
            "hysteresis": 3,
            "consecutive_hysteresis": True,
            "min_loss_scale": 4,
        },
        2,
        "DynamicLossScale",
        {
            "initial_scale_power": 8,
            "loss_scale_window": 5,
            "hysteresis": 3,
            "consecutive_hysteresis": True,
            "min_loss_scale": 4,
        },
    ),
]


@pytest.mark.parametrize(("section", "stage", "rule", "options"), SCALES)
def test_dynamic_loss_scale(calls, section, stage, rule, options):
    read(fp16=section, zero_optimization={"stage": stage})
    assert {name: calls[rule][1][name] for name in options} == options
    assert calls["precision"][0] == ("fp16",)


def test_static_loss_scale(calls):
    made = read(fp16={"enabled": True, "loss_scale": 128, "hysteresis": 5})
    unread = made.entries[-1]
    assert (unread.path, unread.status) == ("fp16.hysteresis", "off")
    assert unread.became == "nothing: fp16.loss_scale is static"
    assert calls["StaticLossScale"][0] == (128.0,)
    assert "DynamicLossScale" not in calls
    assert made.precision == "fp16"


@pytest.mark.parametrize(
    ("options", "stage", "skips"),
    [
        ({}, 1, 1),
        ({"check_grad_overflow": False}, 1, 0),
        ({}, 0, 1),
        ({"check_grad_overflow": False}, 0, 1),
    ],
)
def test_bf16_skips_what_is_not_finite(calls, options, stage, skips):
    read(bf16={"enabled": True, **options}, zero_optimization={"stage": stage})
    assert ("skip_nonfinite" in calls) == skips
    assert calls["precision"] == (("bf16",), {})


def test_fp32_has_neither_precision_nor_a_scale(calls):
    made = read(fp16={"enabled": False, "loss_scale": 5}, bf16={"enabled": False})
    assert "precision" not in calls
    assert "skip_nonfinite" not in calls
    assert len(made.transforms) == 1
    assert "fp16.enabled is false" in made.entries[3].became


def test_storage():
    assert read().shard == {"spec": zf.P()}
    assert read(zero_optimization={"stage": 1}).shard == {}
    low = {"enabled": True, "bf16_master_weights_and_grads": True}
    made = read(bf16=low, zero_optimization={"stage": 1})
    assert made.shard == {"dtype": torch.bfloat16}
    made = read(
        bf16={**low, "enabled": False}, zero_optimization={"stage": 1}
    )  # it is off
    assert made.shard == {}


TRIPLES = [  # the table of DeepSpeed's inference: what is given, on 2 ranks, and all
    ((16, 4, 2), (16, 4, 2)),
    ((16, 4, None), (16, 4, 2)),
    ((16, None, 2), (16, 4, 2)),
    ((None, 4, 2), (16, 4, 2)),
    ((16, None, None), (16, 8, 1)),
    ((None, 4, None), (8, 4, 1)),
]


@pytest.mark.parametrize(("given", "all_three"), TRIPLES)
def test_batch_sizes(given, all_three):
    names = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    )
    data = read(**dict(zip(names, given, strict=True))).data
    sizes = (data.train_batch_size, data.micro_batch_size, data.accumulation_steps)
    assert sizes == all_three
    assert data.batch_size == all_three[1] * all_three[2]
    assert data.drop_last is False
    assert read(dataloader_drop_last=True).data.drop_last is True


def test_accumulation(calls):
    read(train_micro_batch_size_per_gpu=2)
    assert calls["accumulate"][0] == (2,)
    calls.clear()
    read()
    assert "accumulate" not in calls


@pytest.mark.parametrize(
    ("options", "stage", "precision", "expected"),
    [
        ({}, 2, {}, {}),
        ({"reduce_bucket_size": 100}, 0, {}, {"bucket": {"bucket_bytes": 400}}),
        ({"reduce_bucket_size": 100}, 2, BF16, {"bucket": {"bucket_bytes": 200}}),
        ({"reduce_bucket_size": 100}, 2, FP16, {"bucket": {"bucket_bytes": 400}}),
        (
            {"reduce_bucket_size": 100, "allgather_bucket_size": 50},
            1,
            {},
            {"bucket": {"bucket_bytes": 200}},
        ),
        (
            {"reduce_bucket_size": 100, "allgather_bucket_size": 50},
            3,
            {},
            {"bucket": {"bucket_bytes": 400}},
        ),
        ({"allgather_bucket_size": 0}, 1, {}, {"bucket": {"bucket_bytes": 1}}),
        (
            {"stage3_prefetch_bucket_size": 5e7},
            3,
            BF16,
            {"bucket": {"bucket_bytes": 100_000_000}},
        ),
        ({"stage3_prefetch_bucket_size": 0}, 3, {}, {"prefetch": {"gathers": 0}}),
        ({"stage3_prefetch_bucket_size": 7}, 2, {}, {}),
        (
            {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 10},
            3,
            FP16,
            {"keep_small": {"small_bytes": 20}},
        ),
        ({"stage3_max_live_parameters": 1e9}, 2, {}, {}),
        ({"reduce_bucket_size": "auto"}, 2, {}, {}),
    ],
)
def test_sizes_of_elements_become_bytes(calls, options, stage, precision, expected):
    zero = {"stage": stage, **options}
    jit = read(zero_optimization=zero, **precision).jit
    passes = ("bucket", "keep_small", "prefetch")
    assert {name: calls[name][1] for name in passes if name in calls} == expected
    assert bool(jit) == bool(expected)
    if jit:
        names = [each.__name__ for each in jit["passes"]]
        assert names == [each.__name__ for each in DEFAULT]


def test_clipping_is_on_by_default_as_in_deepspeed():
    assert read().clipping == 1.0
    assert read(gradient_clipping=0).clipping == 0.0
    p, g = torch.zeros(2), torch.tensor([30.0, 40.0])
    for config, norm in (({}, 1.0), ({"gradient_clipping": 0}, 50.0)):
        tx = read(optimizer={"type": "SGD", "params": {"lr": 1.0}}, **config).tx
        update = tx.update(g, tx.init(p), p)[0]
        assert float(update.norm()) == pytest.approx(norm)


def optimizer(kind, params, rate=None):
    section = {"optimizer": {"type": kind, "params": params}, "gradient_clipping": 0}
    if rate is not None:
        section["scheduler"] = rate
    return read(**section)


def run(tx, steps=5, shape=(3, 4)):
    torch.manual_seed(0)
    p = {"w": torch.randn(shape)}
    moments = tx.init(p)
    for _ in range(steps):
        updates, moments = tx.update({"w": torch.randn(shape)}, moments, p)
        p = apply_updates(p, updates)
    return p["w"]


def run_torch(make, steps=5, shape=(3, 4)):
    torch.manual_seed(0)
    p = torch.randn(shape)
    p.requires_grad_()
    other = make([p])
    for _ in range(steps):
        p.grad = torch.randn(shape)
        other.step()
    return p.detach()


o, zo = torch.optim, zf.optim
DECAY = 0.1
SAME_BITS = [
    ("Adam", {}, lambda: zo.adamw(1e-3, weight_decay=0.0)),
    ("adamw", {}, lambda: zo.adamw(1e-3, weight_decay=0.0)),
    ("Adam", {"weight_decay": DECAY}, lambda: zo.adamw(1e-3, weight_decay=DECAY)),
    (
        "Adam",
        {"weight_decay": DECAY, "adam_w_mode": False},
        lambda: zo.adam(1e-3, weight_decay=DECAY),
    ),
    (
        "AdamW",
        {"weight_decay": DECAY, "adam_w_mode": False, "betas": [0.8, 0.9], "eps": 1e-3},
        lambda: zo.adamw(1e-3, 0.8, 0.9, 1e-3, DECAY),
    ),
    ("AdamW", {"torch_adam": True}, lambda: zo.adamw(1e-3, weight_decay=0.01)),
    ("Adam", {"torch_adam": True}, lambda: zo.adamw(1e-3, weight_decay=0.01)),
    ("Adam", {"torch_adam": True, "adam_w_mode": False}, lambda: zo.adam(1e-3)),
    (
        "Adam",
        {"torch_adam": True, "weight_decay": 0},
        lambda: zo.adamw(1e-3, weight_decay=0.0),
    ),
    ("Lion", {"weight_decay": DECAY}, lambda: zo.lion(1e-3, weight_decay=DECAY)),
    (
        "Lamb",
        {"bias_correction": False, "max_coeff": 0.3},
        lambda: zo.lamb(1e-3, bias_correction=False, max_coeff=0.3),
    ),
    (
        "Muon",
        {"lr": 0.1, "adam_lr": 1e-3},
        lambda: zo.muon(0.1, adam_learning_rate=1e-3, mask=lambda path, leaf: True),
    ),
]


@pytest.mark.parametrize(("kind", "params", "make"), SAME_BITS)
def test_optimizers_are_those_of_zfunc_bitwise(kind, params, make):
    assert torch.equal(run(optimizer(kind, params).tx), run(make()))


TORCH = [
    ("Adam", {"weight_decay": DECAY}, lambda p: o.AdamW(p, weight_decay=DECAY)),
    ("Adagrad", {"lr_decay": 0.1}, lambda p: o.Adagrad(p, lr_decay=0.1)),
    ("Adagrad", {"weight_decay": DECAY}, lambda p: o.Adagrad(p, weight_decay=DECAY)),
    ("SGD", {}, o.SGD),
    (
        "SGD",
        {"momentum": 0.9, "nesterov": True, "lr": 0.1, "weight_decay": DECAY},
        lambda p: o.SGD(p, 0.1, 0.9, nesterov=True, weight_decay=DECAY),
    ),
    ("SGD", {"dampening": 0.5}, lambda p: o.SGD(p, dampening=0.5)),
    (
        "SGD",
        {"momentum": 0.5, "dampening": 0.5},
        lambda p: o.SGD(p, momentum=0.5, dampening=0.5),
    ),
    ("RMSprop", {}, o.RMSprop),
    (
        "RMSprop",
        {"alpha": 0.9, "momentum": 0.5, "centered": True},
        lambda p: o.RMSprop(p, alpha=0.9, momentum=0.5, centered=True),
    ),
    ("Adafactor", {}, o.Adafactor),
    ("Adafactor", {"d": 1.5, "lr": 0.1}, lambda p: o.Adafactor(p, lr=0.1, d=1.5)),
]


@pytest.mark.parametrize(("kind", "params", "make"), TORCH)
def test_optimizers_are_those_of_torch(kind, params, make):
    apart = run(optimizer(kind, params).tx) - run_torch(make)
    assert float(apart.abs().max()) < 2e-6


@pytest.mark.parametrize("corrected", [True, False])
def test_lamb_is_the_formula_of_deepspeeds_kernel(corrected):
    lr, b1, b2, eps, decay, low, high = 0.1, 0.8, 0.9, 1e-2, 0.05, 0.3, 0.9
    params = {
        "lr": lr,
        "betas": [b1, b2],
        "eps": eps,
        "weight_decay": decay,
        "min_coeff": low,
        "max_coeff": high,
        "bias_correction": corrected,
    }
    torch.manual_seed(0)
    p = torch.randn(3, 4).double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 6):
        g = torch.randn(3, 4).double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (v.sqrt() + eps) + decay * p
        size = lr * math.sqrt(1 - b2**t) / (1 - b1**t) if corrected else lr
        p = p - size * (p.norm() / u.norm()).clamp(low, high) * u
    ours = run(optimizer("Lamb", params).tx)
    assert float((ours - p).abs().max()) < 1e-6


@pytest.mark.parametrize("mode", [True, False])
def test_adam_without_bias_correction(mode):
    lr, decay = 0.1, 0.05
    torch.manual_seed(0)
    p = torch.randn(3, 4).double()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for _ in range(5):
        g = torch.randn(3, 4).double()
        g = g if mode else g + decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (v.sqrt() + 1e-8)
        p = p - lr * (u + decay * p if mode else u)
    params = {"lr": lr, "weight_decay": decay, "bias_correction": False}
    ours = run(optimizer("Adam", {**params, "adam_w_mode": mode}).tx)
    assert float((ours - p).abs().max()) < 2e-6


def test_muon_takes_the_parameters_that_deepspeed_tags():
    made = optimizer("Muon", {"lr": 0.1})
    names = ("up", "wte", "model.embed_tokens.weight", "lm_head.weight", "bias")
    p = {name: torch.ones(2, 2) for name in names} | {"bias": torch.ones(2)}
    tx = made.tx
    state = tx.init(p)[0]
    assert {name for name in names if state.nu[name].numel() == 0} == {"up", "wte"}
    # The rate is shared, unless there is none: 0.02 and 3e-4.
    for params, rates in (
        ({}, (0.02, 3e-4)),
        ({"lr": 0.5}, (0.5, 0.5)),
        ({"lr": 0.5, "muon_lr": 0.1}, (0.1, 0.5)),
        ({"adam_lr": 0.1}, (0.02, 0.1)),
    ):
        tx = optimizer("Muon", params).tx
        grads = {"up": torch.eye(2), "bias": torch.ones(2)}
        p = {"up": torch.zeros(2, 2), "bias": torch.zeros(2)}
        ups = tx.update(grads, tx.init(p), p)[0]
        whole = zf.optim.muon(
            rates[0], adam_learning_rate=rates[1], mask=lambda path, leaf: path == "up"
        )
        mine = whole.update(grads, whole.init(p), p)[0]
        assert torch.equal(ups["up"], mine["up"])
        assert torch.equal(ups["bias"], mine["bias"])


def test_one_cycle_sets_both_betas():
    cycle = {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.1, "cycle_first_step_size": 3}
    rate = {"type": "OneCycle", "params": cycle}
    made = optimizer("AdamW", {"betas": [0.5, 0.6]}, rate)
    of = zo.one_cycle(**cycle)
    mine = zo.adamw(of.learning_rate, of.momentum, 0.99, weight_decay=0.0)
    assert torch.equal(run(made.tx, 9), run(mine, 9))
    assert "second beta to 0.99" in made.notes[-1]
    # without momentum, and where there are no betas
    rate["params"] = {**cycle, "cycle_momentum": False, "cycle_min_mom": 0.1}
    made = optimizer("AdamW", {"betas": [0.5, 0.6]}, rate)
    mine = zo.adamw(of.learning_rate, 0.5, 0.6, weight_decay=0.0)
    assert torch.equal(run(made.tx, 9), run(mine, 9))
    rate["params"] = cycle
    made = optimizer("SGD", {"momentum": 0.3}, rate)
    assert torch.equal(run(made.tx, 9), run(zo.sgd(of.learning_rate, 0.3), 9))
    assert "no momentum of SGD" in made.notes[-1]


def test_one_cycle_reads_no_rate_of_decay_without_a_size():
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 2}
    for extra in ({"decay_lr_rate": 0.5}, {"decay_step_size": 5}):
        rate = {"type": "OneCycle", "params": {**cycle, **extra}}
        made = optimizer("SGD", {}, rate)
        assert float(made.schedule(50)) == 0.1


def test_a_step_that_overflows_does_not_advance_the_rate():
    rate = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 4}}
    made = read(
        scheduler=rate,
        bf16={"enabled": True},
        gradient_clipping=0,
        zero_optimization={"stage": 1},
    )
    step = zf.train_step(lambda p, b: (p * b).sum(), made.tx, *made.transforms)
    state = zf.shard(torch.ones(2), zf.make_mesh({"data": 1}), **made.shard)
    inf = torch.full((2,), torch.inf)
    for batch in (torch.ones(2), inf, inf, torch.ones(2), torch.ones(2)):
        state = step(state, batch)
    # The rates of the updates that were made are those of steps 0, 1 and 2.
    moved = sum(float(made.schedule(t)) for t in range(3))
    assert float(state.params.buffer[0]) == pytest.approx(1 - moved)
    assert int(state.step) == 5


def test_entries_say_when_a_key_has_no_effect():
    zero = {"stage": 2, "stage3_param_persistence_threshold": 5}
    rate = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0}}
    made = read(
        zero_optimization=zero,
        optimizer={"type": "Adam", "params": {"lr": 0.5}},
        scheduler=rate,
        steps_per_print=float("inf"),
        wall_clock_breakdown=True,
    )
    became = {entry.path: (entry.status, entry.became) for entry in made.entries}
    assert became["zero_optimization.stage3_param_persistence_threshold"] == (
        "off",
        "nothing: the stage is 2",
    )
    assert became["optimizer.params.lr"] == (
        "off",
        "nothing: the scheduler says the rate",
    )
    for path in ("steps_per_print", "wall_clock_breakdown"):
        assert became[path][0] == "not meaningful here"
    assert "optimizer.params.lr" not in {entry.path for entry in made.defaults}


def test_notes_of_names_and_rates():
    made = read(bfloat16={"enabled": True}, zero_optimization=True)
    assert made.notes[0] == "zero_optimization: true is deprecated: it is stage 1."
    assert made.notes[1] == "bfloat16 is deprecated: it is bf16."
    rate = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0}}
    made = optimizer("Adam", {"lr": 0.5}, rate)
    assert made.notes[0] == "optimizer.params.lr is not read: WarmupLR says the rate."
    assert float(made.schedule(5000)) == 1.0
    rate["params"] = {}
    made = optimizer("Adam", {"lr": 0.5}, rate)
    assert float(made.schedule(5000)) == 0.5
    rate = {"type": "WarmupCosineLR", "params": {"total_num_steps": 2000}}
    assert float(optimizer("Adam", {"lr": 0.5}, rate).schedule(1001)) == pytest.approx(
        0.5, rel=1e-4
    )


def test_an_old_option_and_its_new_name_together():
    zero = {
        "stage": 3,
        "param_persistence_threshold": 1,
        "stage3_param_persistence_threshold": 2,
    }
    with pytest.raises(ConfigError, match="which is there too"):
        read(zero_optimization=zero)
