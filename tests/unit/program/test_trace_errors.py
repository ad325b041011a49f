# SPDX-License-Identifier: Apache-2.0
"""Losses that cannot be traced: the error names the line, and what to write instead."""

import inspect
import logging
import math
import traceback

import numpy as np
import pytest
import torch

import zfunc as zf

# Each loss has one line that is at fault, which ends in this comment.
MARK = "# here"


def branch(p, b):
    if p["w"].sum() > 0:  # here
        return (p["w"] * b).sum()
    return p["w"].sum()


def item(p, b):
    scale = b.sum().item()  # here
    return p["w"].sum() * scale


def number(p, b):
    return p["w"].sum() * float(b.sum())  # here


def mask(p, b):
    return p["w"][b > 0].sum()  # here


def nonzero(p, b):
    where = b.nonzero()  # here
    return p["w"][where].sum()


def count(p, b):
    x = p["w"].sum()
    for _ in range(int(b.sum())):  # here
        x = 2 * x
    return x


def numpy_of_batch(p, b):
    return p["w"].sum() * float(b.numpy().mean())  # here


def numpy_of_params(p, b):
    return p["w"].sum() * float(p["w"].detach().numpy().mean())  # here


def asarray(p, b):
    return p["w"].sum() * float(np.asarray(b).mean())  # here


def to_list(p, b):
    return p["w"].sum() * b.tolist()[0]  # here


def assertion(p, b):
    assert (b > 0).all()  # here
    return p["w"].sum()


def masked_select(p, b):
    return p["w"].masked_select(b > 0).sum()  # here


def unique(p, b):
    return p["w"].sum() * torch.unique(b).numel()  # here


def equal(p, b):
    return p["w"].sum() * (2 if torch.equal(b, b + 1) else 3)  # here


def repeats(p, b):
    return p["w"].repeat_interleave(b.long()).sum()  # here


def builtin_max(p, b):
    return p["w"].sum() * max(b[0], b[1])  # here


def bound(p, b):
    return p["w"][: b.sum().long()].sum()  # here


def formatted(p, b):
    print(f"{b.sum():.2f}")  # here
    return p["w"].sum()


def math_function(p, b):
    return p["w"].sum() * math.sqrt(b.sum())  # here


def tensor_of_tensors(p, b):
    return p["w"].sum() * torch.tensor([b[0], b[1]]).sum()  # here


class Doubtful(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g if g.sum() > 0 else 2 * g  # backward


def in_a_backward(p, b):
    return (Doubtful.apply(p["w"]) * b).sum()


LOSSES = (
    branch,
    item,
    number,
    mask,
    nonzero,
    count,
    numpy_of_batch,
    numpy_of_params,
    asarray,
    to_list,
    assertion,
    masked_select,
    unique,
    equal,
    repeats,
    builtin_max,
    bound,
    formatted,
    math_function,
    tensor_of_tensors,
)
REMEDIES = {
    branch: "torch.where(condition, a, b) instead of `if`",
    item: "keep numbers as 0-d tensors instead of .item()",
    number: "or float()",
    mask: "select with a mask instead of x[mask]",
    asarray: "compute with torch instead of numpy",
    tensor_of_tensors: "torch.stack instead of torch.tensor([...])",
}


def state():
    return zf.shard({"w": torch.ones(4)}, zf.make_mesh({}))


def trace(loss, microbatches=1, remat=False):
    loss_fn = zf.remat(loss) if remat else loss
    transforms = [zf.accumulate(microbatches)] if microbatches > 1 else []
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1), *transforms)
    return zf.jit(step, donate=False)(state(), torch.ones(4 * microbatches))


def line_of(function, mark=MARK):
    lines, first = inspect.getsourcelines(function)
    return next(first + i for i, line in enumerate(lines) if line.endswith(f"{mark}\n"))


@pytest.mark.parametrize("how", [{}, {"microbatches": 2}, {"remat": True}], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_line_and_the_remedy(loss, how):
    with pytest.raises(zf.TraceError) as caught:
        trace(loss, **how)
    message = str(caught.value)
    assert message.startswith(f"{__file__}:{line_of(loss)} needs the value of a tensor")
    assert MARK in message
    assert REMEDIES.get(loss, "torch.where") in message
    numpy = loss in (numpy_of_batch, numpy_of_params, asarray)
    assert ("Without zf.jit the step runs as it is" in message) != numpy
    assert caught.value.__cause__ is not None


def test_a_backward_that_looks_at_values():
    with pytest.raises(zf.TraceError) as caught:
        trace(in_a_backward)
    line = line_of(Doubtful.backward, "# backward")
    assert str(caught.value).startswith(f"{__file__}:{line} ")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_lower_says_the_same(loss):
    step = zf.train_step(loss, zf.optim.sgd(0.1))
    with pytest.raises(zf.TraceError, match=r"torch\.where"):
        zf.jit(step).lower(state(), torch.ones(4))


def test_code_that_was_typed_in_is_the_users_too():
    names = {}
    exec(
        compile(
            "def loss(p, b):\n    return float(b[0]) * p['w'].sum()", "<stdin>", "exec"
        ),
        names,
    )
    with pytest.raises(zf.TraceError, match=r"^<stdin>:2 needs"):
        trace(names["loss"])


# --- errors that are the user's own --------------------------------------------------


def wrong_shape(p, b):
    return (p["w"] @ torch.ones(7)).sum()  # here


def wrong_broadcast(p, b):
    return (p["w"] + torch.ones(3)).sum()  # here


def wrong_key(p, b):
    return p["v"].sum()  # here


def wrong_type(p, b):
    return p["w"].sum() + None  # here


def raising(p, b):
    raise RuntimeError("mine")  # here


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (wrong_shape, RuntimeError),
        (wrong_broadcast, RuntimeError),
        (wrong_key, KeyError),
        (wrong_type, TypeError),
        (raising, RuntimeError),
    ],
)
def test_other_errors_stay_what_they_are(loss, error, caplog):
    with pytest.raises(error) as caught:
        trace(loss)
    assert type(caught.value) is error
    assert caught.value.__cause__ is None
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert (__file__, line_of(loss)) in [(f.filename, f.lineno) for f in frames]
    loud = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not loud, "torch logs the error that is raised"


def test_the_logger_of_torch_is_left_as_it_was():
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = list(logger.filters)
    with pytest.raises(RuntimeError):
        trace(wrong_shape)
    assert logger.filters == before


def test_a_step_that_failed_can_be_called_again():
    step = zf.train_step(
        lambda p, b: (p["w"] * b).sum() if b.dim() == 1 else p["v"], zf.optim.sgd(0.1)
    )
    jitted = zf.jit(step)
    mine = state()
    with pytest.raises(KeyError):
        jitted(mine, torch.ones(4, 4))
    assert jitted(mine, torch.ones(4)).metrics.loss == 4.0


def test_a_state_and_a_batch_that_were_abstracted_one_by_one():
    step = zf.train_step(lambda p, b: (p["w"] * b).sum(), zf.optim.sgd(0.1))
    program = zf.jit(step).lower(zf.abstract(state()), zf.abstract(torch.ones(4)))
    assert program.inputs[-1] == "batch"


# --- writes --------------------------------------------------------------------------


def in_a_view(p, b):
    h = torch.zeros(3)
    h[1:] = (p["w"] * b)[:-1]
    return (h * h).sum()


def of_a_constant(p, b):
    k = torch.full((3,), 0.0)
    k[0] = 1.0
    return (p["w"] * k * b).sum()


def of_a_whole_tensor(p, b):
    a, c = torch.zeros(3), torch.zeros(3)
    a += b
    return (p["w"] * a + 3 * p["w"] * c).sum()


def of_an_activation(p, b):
    h = (p["w"] * b).view(1, 3)
    h += 1
    h *= 2
    return (h * h).sum()


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize(
    "loss", [in_a_view, of_a_constant, of_a_whole_tensor, of_an_activation]
)
def test_writes_are_refused(loss, microbatches):
    """A program knows the order of its edges only: such a write would be lost."""

    def mean(p, b):
        return loss(p, b.sum(0))

    step = zf.train_step(mean, zf.optim.sgd(0.1), zf.accumulate(microbatches))
    state = zf.shard({"w": torch.ones(3)}, zf.make_mesh({}))
    step(state, torch.ones(2, 3))
    with pytest.raises(zf.TraceError, match=r"writes over a tensor(?s:.*) x = x \+ y"):
        zf.jit(step)(state, torch.ones(2, 3))


# --- arguments -----------------------------------------------------------------------


def test_leaves_that_no_program_can_be_chosen_by():
    step = zf.train_step(lambda p, b: (p["w"] * 1).sum(), zf.optim.sgd(0.1))
    state = zf.shard({"w": torch.ones(3)}, zf.make_mesh({}))
    for batch, message in (
        ({"x": np.ones(3)}, "batch/x is a ndarray: .* type torch.as_tensor"),
        ({"x": math.nan}, "batch/x is a float: .* values that equal themselves"),
        (zf.abstract(torch.ones(3)), r"batch is abstract, .* \.lower\(state, batch\)"),
    ):
        with pytest.raises(TypeError, match=message):
            zf.jit(step)(state, batch)
