# SPDX-License-Identifier: Apache-2.0
"""What the unit tests of core and transforms share: numbers, stages, traffic."""

import contextlib
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zfunc as zf
from zfunc.testing import differences, simulate, split_batch

F64 = torch.float64
STAGES = (0, 1, 2, 3)


def randn(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def whole_numbers(*shape, seed=0):
    """Small integers in float64: sums and products of them have no rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(F64)


def alone():
    """The mesh of this process, without axes."""
    return zf.make_mesh({})


def one_rank():
    """A mesh with an axis "data" of one rank."""
    return zf.make_mesh({"data": 1})


def spec_of(zero):
    return zf.P() if zero == 0 else zf.P("data")


def example_params():
    return {"b": randn(4, seed=1), "v": randn(6, 5, seed=2), "w": randn(5, 4)}


def example_batch():
    index = torch.tensor([0, 3, 3, 5, 1, 2])
    return {"index": index, "x": randn(6, 5, seed=3), "y": randn(6, 4, seed=4)}


def reference(loss_fn, params, batch, *transforms, tx=None):
    """The full state after one step of one rank without partition."""
    step = zf.train_step(loss_fn, tx or zf.optim.sgd(0.1), *transforms)
    return zf.unshard(step(zf.shard(params, alone()), batch))


def on_mesh(loss_fn, params, batch, *transforms, zero, ranks=1, tx=None):
    """The full state after one step at a stage: one real rank, or simulated ones."""
    where = zf.partition(zero=zero)
    step = zf.train_step(loss_fn, tx or zf.optim.sgd(0.1), where, *transforms)
    if ranks == 1:
        state = zf.shard(params, one_rank(), spec=spec_of(zero))
        return zf.unshard(step(state, batch))
    sim = simulate(step, {"data": ranks})
    state = sim.shard(params, spec=spec_of(zero))
    return sim.unshard(sim(state, split_batch(batch, {"data": ranks})))


def assert_same_gradient(got, want, rtol=1e-9, atol=1e-12):
    """Two states agree on the gradient and on the loss."""
    wrong = differences(
        {"grads": got.grads, "loss": got.metrics.loss},
        {"grads": want.grads, "loss": want.metrics.loss},
        rtol=rtol,
        atol=atol,
    )
    assert not wrong, wrong[0]


def assert_bitwise(got, want):
    pairs = list(zip(zf.tree_leaves(got), zf.tree_leaves(want), strict=True))
    assert pairs
    for a, b in pairs:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


class Message(NamedTuple):
    """One collective as a rank issues it."""

    name: str
    dtype: torch.dtype
    sent: int
    received: int


class Traffic(TorchDispatchMode):
    """Records every collective that is issued while it is active."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            x = args[0]
            self.messages.append(Message(name, x.dtype, x.nbytes, out.nbytes))
        return out

    def names(self):
        return [message.name for message in self.messages]


def traffic(fn, *args):
    """The collectives of ``fn(*args)`` on fake copies of the arguments."""
    fakes = zf.abstract(args)
    fake_mode = torch._guards.detect_fake_mode(zf.tree_leaves(fakes))
    recorder = Traffic()
    with fake_mode or contextlib.nullcontext(), recorder:
        fn(*fakes)
    return recorder.messages
