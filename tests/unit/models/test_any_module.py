# SPDX-License-Identifier: Apache-2.0
"""``from_module``: what modules carry besides weights, and what they may not do."""

import pytest
import torch
from torch.testing import assert_close

import zfunc as zf
from zfunc.models import ModelError, from_module


def summed(call, x):
    return call(x).square().sum()


class Sets(torch.nn.Linear):
    """Sets its buffer anew, where others write to it."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("jitted", [False, True])
def test_a_buffer_that_is_set_anew_is_not_dropped_without_a_word(jitted):
    params, loss_fn = from_module(Sets(), summed)
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1))
    state = zf.shard(params, zf.make_mesh({}))
    with pytest.raises(ModelError, match="writes to its buffer 'calls'"):
        (zf.jit(step) if jitted else step)(state, torch.ones(1, 2))


class Draws(torch.nn.Module):
    """Layers of torch with a rate of dropout that are no ``Dropout``."""

    def __init__(self, rate, attention, recurrent):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.MultiheadAttention(4, 2, dropout=rate * attention)
        self.scan = torch.nn.GRU(4, 4, 2, dropout=rate * recurrent)

    def forward(self, x):
        return self.scan(self.mix(x, x, x)[0])[0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((1, 0), r"mix is a MultiheadAttention .*=0.5"),
        ((0, 1), r"scan is a GRU .*=0.5"),
    ],
)
def test_dropout_inside_other_layers(parts, message):
    net, x = Draws(0.5, *parts), torch.randn(5, 3, 4)
    with pytest.raises(ModelError, match=message):
        from_module(net, summed)
    params, loss_fn = from_module(net, summed, dropout="off")
    assert_close(loss_fn(params, x), summed(Draws(0.0, *parts), x).detach())
    assert max(net.mix.dropout, net.scan.dropout) == 0.5
    from_module(net.eval(), summed)


class Counts(torch.nn.Linear):
    """With whole numbers among its parameters."""

    def __init__(self):
        super().__init__(2, 2)
        whole = torch.tensor([257, 3])  # 257 is no bfloat16
        self.times = torch.nn.Parameter(whole, requires_grad=False)

    def forward(self, x):
        return super().forward(x) * self.times


def test_whole_numbers_keep_their_dtype():
    for mesh in (None, zf.make_mesh({"data": 1})):
        params, loss_fn = from_module(Counts(), summed, mesh=mesh, dtype=torch.bfloat16)
        held = [zf.unshard(x) for x in (params["weight"], loss_fn.frozen["times"])]
        assert [x.dtype for x in held] == [torch.bfloat16, torch.int64]
        assert held[1].tolist() == [257, 3]


def test_modules_without_values_are_refused():
    with pytest.raises(ModelError, match=r"weight is on the meta device.*to_empty"):
        from_module(torch.nn.Linear(2, 2, device="meta"), summed)
    net = Sets()
    net.calls = net.calls.to("meta")
    with pytest.raises(ModelError, match=r"calls is on the meta device"):
        from_module(net, summed)
