# SPDX-License-Identifier: Apache-2.0
"""``initialize``: what it takes, what it refuses, and what comes back."""

import argparse
import base64
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import zfunc as zf
from tests.unit.compat.cases import LR, Net, batch, default_loss, engine_run, made
from tests.unit.compat.cases import torch_run as torch_trained
from zfunc import compat
from zfunc.compat import CompatError
from zfunc.config import ConfigError

CONFIG = {
    "train_batch_size": 12,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.05,
    "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.01}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def without(*names, **more):
    return {k: v for k, v in CONFIG.items() if k not in names} | more


def initialize(**arguments):
    return compat.initialize(**{"model": made(), "config": CONFIG, **arguments})


def test_a_configuration_is_a_torch_loop():
    engine, optimizer, loader, scheduler = initialize()
    losses = engine_run(engine, 3)
    want, module = torch_trained(Net, 3, 2, clip=0.05)
    assert losses == pytest.approx(want, abs=1e-6)
    for a, b in zip(engine.module.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert (loader, scheduler) == (None, None)
    assert optimizer.param_groups == [{"lr": LR}]
    assert (optimizer.cur_scale, optimizer.overflow) == (1.0, False)
    assert engine.local_rank == engine.global_rank == 0
    assert engine.world_size == 1
    optimizer.zero_grad()
    with pytest.raises(CompatError, match=r"optimizer.step\(\): call engine.step"):
        optimizer.step()


@pytest.mark.parametrize(
    "give",
    [
        lambda path: {"config": str(path)},
        lambda path: {"config": path},
        lambda path: {"config": None, "config_params": CONFIG},
        lambda path: {
            "config": None,
            "args": SimpleNamespace(deepspeed_config=str(path)),
        },
        lambda path: {"config": base64.urlsafe_b64encode(path.read_bytes()).decode()},
    ],
)
def test_where_the_configuration_is(tmp_path, give):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    assert initialize(**give(path))[0].zero_optimization_stage() == 3


def test_the_schedule_is_a_view():
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
    engine, _, _, scheduler = initialize(config=without(scheduler=warmup))
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(3):
        engine_run(engine, 1)
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0.0, 0.0, LR / 2, LR * 0.7924812503605781])
    assert engine.last_lr() == rates[2]
    with pytest.raises(CompatError, match=r"engine.step\(\), which advances it"):
        scheduler.step()


TORCH = [
    (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
]


@pytest.mark.parametrize(("kind", "options"), TORCH)
def test_an_optimizer_of_torch(kind, options):
    module, plain = made(), made()
    optimizer = kind([p for p in module.parameters() if p.requires_grad], LR, **options)
    engine = compat.initialize(
        model=module,
        optimizer=optimizer,
        config=without("optimizer", "gradient_clipping", gradient_clipping=0.0),
    )[0]
    other = kind([p for p in plain.parameters() if p.requires_grad], LR, **options)
    for i in range(6):
        torch.manual_seed(i)
        engine.backward(default_loss(engine, *batch(i), 0))
        engine.step()
        torch.manual_seed(i)
        (default_loss(plain, *batch(i), 0) / 2).backward()
        if i % 2:
            other.step()
            other.zero_grad()
    for a, b in zip(engine.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert engine.get_lr() == [LR]


def test_an_optimizer_of_zfunc():
    config = without("optimizer")
    engine = initialize(config=config, optimizer=zf.optim.lion(1e-3))[0]
    engine_run(engine, 1)
    with pytest.raises(CompatError, match="the rate is in the optimizer"):
        engine.get_lr()
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
    config = without("optimizer", scheduler=warmup)
    engine = initialize(config=config, optimizer=lambda rate: zf.optim.lion(rate))[0]
    assert engine.get_lr() == [0.0]


def test_trained_parameters_can_be_chosen():
    module = made()
    engine = initialize(model=module, model_parameters=module.first.parameters())[0]
    engine_run(engine, 2)
    trained, before = engine.module, made()
    assert torch.equal(trained.last.weight, before.last.weight)
    assert not torch.equal(trained.first.weight, before.first.weight)


def test_the_data_loader():
    data = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))
    engine, _, loader, _ = initialize(training_data=data)
    sizes = [len(x) for x, _ in loader]
    assert sizes == [6, 6, 6, 2]
    assert engine.train_micro_batch_size_per_gpu() == 6
    config = without(dataloader_drop_last=True)
    loader = initialize(
        config=config, training_data=data, collate_fn=lambda rows: len(rows)
    )[2]
    assert list(loader) == [6, 6, 6]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


REFUSED = [
    ({"lr_scheduler": object()}, 'write it as the section "scheduler"'),
    ({"mpu": object()}, "there is no model parallelism"),
    ({"mesh_param": (1, 2)}, "all ranks are along the axis 'data'"),
    ({"distributed_port": 1}, "torchrun --master-port says it"),
    ({"dist_init_required": "yes"}, "expected True, False or None"),
    ({"config": None}, "there is no configuration"),
    ({"config_params": {"train_batch_size": 1}}, "are not the same"),
    ({"model": None}, "model is a NoneType, expected a torch.nn.Module"),
    (
        {"training_data": Stream()},
        "is a Stream, expected a torch Dataset",
    ),
    ({"collate_fn": len}, "collate_fn is for training_data"),
    ({"model_parameters": [{"params": []}]}, "groups with settings of their own"),
    ({"model_parameters": [torch.ones(1)]}, "1 of model_parameters are not parameters"),
    ({"model_parameters": iter(())}, "none of model_parameters requires grad"),
    (
        {"optimizer": torch.optim.Adam([torch.ones(1)])},
        "an optimizer in the arguments and one in the configuration",
    ),
    (
        {
            "optimizer": torch.optim.Rprop([torch.ones(1)]),
            "config": without("optimizer"),
        },
        "Rprop with 1 groups, expected one of torch.optim's AdamW, Adam, SGD",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(arguments, message):
    with pytest.raises(CompatError, match=message):
        initialize(**arguments)


def test_all_that_is_not_taken_at_once():
    with pytest.raises(CompatError) as raised:
        initialize(mpu=1, mesh_param=1, distributed_port=5)
    assert len(str(raised.value).splitlines()) == 4


def test_a_wrong_configuration_leaves_the_module_as_it_was():
    module = made()
    with pytest.raises(ConfigError, match='type "optimizer"'):
        compat.initialize(model=module, config={**CONFIG, "optimiser": {}})
    assert module(batch(0)[0]).shape == (6, 3)
    with pytest.raises(ConfigError):
        compat.initialize(
            model=module,
            config=without("optimizer"),
            optimizer=torch.optim.AdamW(module.parameters(), amsgrad=True),
        )
    assert module(batch(0)[0]).shape == (6, 3)


def test_hooks_belong_to_the_module_that_was_given():
    module = made()
    module.first.register_forward_hook(lambda *_: None)
    with pytest.raises(CompatError, match="first has the hook"):
        initialize(model=module)
    rope = nn.Linear(5, 3)
    rope.rope_type = "dynamic"
    with pytest.raises(CompatError, match="writes to a buffer in its forward"):
        initialize(model=nn.Sequential(rope))


def test_arguments_of_a_script():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=3)
    args = compat.add_config_arguments(parser).parse_args(["--deepspeed"])
    assert (args.deepspeed, args.deepspeed_config, args.local_rank) == (True, None, 3)


def test_init_distributed():
    compat.init_distributed("gloo")
    compat.init_distributed()
    with pytest.raises(CompatError, match="dist_backend is 'mpi', expected 'gloo'"):
        compat.init_distributed("mpi")


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'runtime'"):
        compat.runtime  # noqa: B018
