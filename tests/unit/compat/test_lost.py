# SPDX-License-Identifier: Apache-2.0
"""What would be lost in silence: gradients, writes, settings of the script."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.compat.cases import Net, batch, engine_of, engine_run, made
from zfunc import compat
from zfunc.compat import CompatError

SGD = {"type": "SGD", "params": {"lr": 0.1}}
CONFIG = {"train_batch_size": 4, "optimizer": SGD}
ONES = torch.ones(4, 3)


def refused(match):
    return pytest.raises(CompatError, match=match)


def test_the_gradient_of_an_argument():
    engine, before = engine_of(nn.Linear(5, 1)), nn.Linear(5, 5)
    x, _ = batch(0)
    with refused(r"shape \(6, 5\) that requires grad, and its gradient would be lost"):
        engine(before(x))
    with torch.no_grad():
        engine(before(x))
    engine(before(x).detach())


def test_an_optimizer_of_some_parameters_trains_those():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    weights = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module[1].parameters(), 0.1)
    config = {"train_batch_size": 4}
    with refused("model_parameters are not those of the optimizer"):
        compat.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=module.parameters(),
            config=config,
        )
    engine = compat.initialize(model=module, optimizer=optimizer, config=config)[0]
    engine.backward(engine(ONES).mean())
    engine.step()
    same = [
        torch.equal(a, b)
        for a, b in zip(weights, engine.module.parameters(), strict=True)
    ]
    assert same == [True, True, False, False]


def test_the_moments_of_an_optimizer():
    module = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(module.parameters())
    module(ONES).mean().backward()
    optimizer.step()
    with refused("its moments would be lost"):
        compat.initialize(
            model=module, optimizer=optimizer, config={"train_batch_size": 4}
        )


def test_the_backward_draws_what_the_forward_drew():
    drawn = []

    class Noisy(nn.Linear):
        def forward(self, x):
            factors = random.random(), np.random.rand(), float(torch.rand(()))
            drawn.append(factors)
            return super().forward(x) * sum(factors)

    engine = engine_of(Noisy(5, 1))
    outputs = engine(batch(0)[0])
    elsewhere = random.random(), np.random.rand()
    engine.backward(outputs.mean())
    assert drawn[0] == drawn[1] == drawn[2]
    assert elsewhere != (random.random(), np.random.rand())
    engine.step()


class Assigns(nn.Linear):
    def __init__(self):
        super().__init__(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        return super().forward(x)


class Adds(Assigns):
    def forward(self, x):
        self.count += 1
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    "make",
    [
        Assigns,
        Adds,
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    ],
)
def test_a_forward_that_writes_to_a_buffer(make):
    engine = engine_of(make())
    with refused("writes to .* in its forward, which a pure function cannot"):
        engine(ONES)


def test_a_boundary_holds_until_the_script_says_another():
    engine = engine_of(made(), accumulation=2)
    engine.set_gradient_accumulation_boundary(False)
    for updates in (0, 0, 0, 1):
        if updates:
            engine.set_gradient_accumulation_boundary(True)
        x, _ = batch(0)
        engine.backward(engine(x).mean(), retain_graph=True)
        engine.step()
        assert engine.global_steps == updates
    engine.zero_grad(set_to_none=True)


def test_a_learning_rate_that_is_written():
    _, optimizer, _, _ = compat.initialize(model=nn.Linear(3, 1), config=CONFIG)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1
        with refused("'lr' cannot be written"):
            group["lr"] = 1.0


def test_names_that_are_elsewhere():
    engine = engine_of(made(Net))
    engine_run(engine, 1)
    assert not hasattr(engine, "no_sync")
    with refused("engine.optimizer: initialize returned it"):
        _ = engine.optimizer
    with refused("engine.parameters: engine.module has it"):
        engine.parameters()
    with refused("engine.fp16_enabled: the bridge does not have it"):
        engine.fp16_enabled()


def test_modules_without_values():
    with torch.device("meta"):
        module = nn.Linear(3, 1)
    with refused("weight is on the meta device and has no values"):
        compat.initialize(model=module, config=CONFIG)
    module = nn.Linear(3, 1)
    compat.initialize(model=module, config=CONFIG)
    with refused("was given to an engine before"):
        compat.initialize(model=module, config=CONFIG)


def test_an_lstm_needs_the_kernels_of_torch():
    torch.manual_seed(0)
    module, same = nn.LSTM(5, 3), nn.LSTM(5, 3)
    same.load_state_dict(module.state_dict())
    with refused(r"is an LSTM, whose kernel of oneDNN .*set_flags\(False\)"):
        engine_of(module)
    x, _ = batch(0)
    torch.backends.mkldnn.set_flags(False)
    try:
        engine = engine_of(module)
        engine.backward(engine(x)[0].square().mean())
        engine.step()
        same(x)[0].square().mean().backward()
    finally:
        torch.backends.mkldnn.set_flags(True)
    norms = torch.stack([p.grad.norm() for p in same.parameters()])
    assert engine.get_global_grad_norm() == pytest.approx(float(norms.norm()), rel=1e-5)
