# SPDX-License-Identifier: Apache-2.0
"""A program is traced again where it has to be, and says why, in one line."""

import logging

import pytest
import torch

import zfunc as zf
from zfunc.testing import differences, simulate


def loss(params, batch):
    x = torch.tanh(batch["x"].to(params["w"].dtype) @ params["w"])
    return x.square().mean() + params["b"].square().sum()


def state_of(dtype=torch.float32, tx=None):
    params = {"w": torch.ones(3, 2, dtype=dtype), "b": torch.ones(2, dtype=dtype)}
    return zf.shard(params, zf.make_mesh({"data": 1}), tx=tx)


def batch_of(n=4, dtype=torch.float32):
    return {"x": torch.ones(n, 3, dtype=dtype)}


@pytest.fixture
def lines(caplog):
    """What zf.jit has logged so far."""
    caplog.set_level(logging.WARNING, logger="zfunc.jit")

    def logged():
        return [r.getMessage() for r in caplog.records if r.name == "zfunc.jit"]

    return logged


@pytest.fixture(params=[True, False], ids=["donate", "keep"])
def jitted(request):
    return zf.jit(zf.train_step(loss, zf.optim.sgd(0.1)), donate=request.param)


def test_equal_shapes_are_traced_once(jitted, lines):
    state = state_of()
    for _ in range(3):
        state = jitted(state, batch_of())
    jitted(state_of(), batch_of())
    assert lines() == []


def test_a_new_batch_shape(jitted, lines):
    state = jitted(state_of(), batch_of())
    state = jitted(state, batch_of(6))
    assert lines() == ["zf.jit traces again: batch/x has shape (6, 3), it had (4, 3)"]
    state = jitted(state, batch_of())
    state = jitted(state, batch_of(6))
    assert len(lines()) == 1, "both programs are there"


def test_a_new_dtype(jitted, lines):
    jitted(state_of(), batch_of())
    jitted(state_of(), batch_of(dtype=torch.float64))
    jitted(state_of(torch.bfloat16), batch_of())
    assert lines() == [
        "zf.jit traces again: batch/x has dtype torch.float64, it had torch.float32",
        "zf.jit traces again: params/b has dtype torch.bfloat16, it had torch.float32",
    ]


def test_new_strides(jitted, lines):
    jitted(state_of(), batch_of())
    jitted(state_of(), {"x": torch.ones(3, 4).t()})
    assert lines() == ["zf.jit traces again: batch/x has strides (1, 4), it had (3, 1)"]


def test_a_new_structure(jitted, lines):
    jitted(state_of(), batch_of())
    jitted(state_of(), {**batch_of(), "y": torch.ones(1)})
    assert lines() == [
        "zf.jit traces again: the structure or the placement of the state or of the "
        "batch is new"
    ]


def test_a_number_in_the_batch_is_part_of_the_program(lines):
    step = zf.train_step(lambda p, b: b["scale"] * loss(p, b), zf.optim.sgd(0.1))
    jitted = zf.jit(step, donate=False)
    for scale in (2.0, 2.0, 3.0):
        batch = {**batch_of(), "scale": scale}
        assert not differences(jitted(state_of(), batch), step(state_of(), batch))
    assert lines() == ["zf.jit traces again: batch/scale is 3.0, it was 2.0"]


def test_a_new_placement(lines):
    """The stage may change from step to step; between stages 0 and 1 the state does."""
    mesh = zf.make_mesh({"data": 1})
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    jitted = zf.jit(zf.train_step(loss, zf.optim.sgd(0.1)), donate=False)
    jitted(zf.shard(params, mesh, spec=zf.P("data")), batch_of())
    jitted(zf.shard(params, mesh, spec=zf.P()), batch_of())
    assert len(lines()) == 1
    assert "placement" in lines()[0]


def test_a_step_of_another_stage_goes_on_from_the_state(lines):
    stages = [
        zf.jit(zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=zero)))
        for zero in (1, 2, 3)
    ]
    state = state_of()
    for step in (*stages, *stages):
        state = step(state, batch_of())
    assert lines() == []
    want = state_of()
    for _ in range(6):
        want = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=2))(
            want, batch_of()
        )
    assert not differences(state, want)


def test_moments_that_the_first_step_makes_do_not_count(lines):
    """The first state has no gradients, metrics or moments: the program is one."""
    jitted = zf.jit(zf.train_step(loss, zf.optim.adam(0.1)))
    state = jitted(state_of(), batch_of())
    jitted(state, batch_of())
    jitted(state_of(tx=zf.optim.adam(0.1)), batch_of())
    assert lines() == []


@pytest.mark.parametrize("warm", [False, True])
def test_a_simulated_mesh_is_refused(warm):
    """A program is for one rank; silently it would be traced for no rank at all."""
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=3))
    jitted = zf.jit(step, donate=False)
    if warm:
        jitted(state_of(), batch_of())
    state = simulate(step, {"data": 2}).shard(
        {"w": torch.ones(3, 2), "b": torch.ones(2)}
    )
    with pytest.raises(zf.TraceError, match=r"testing\.lockstep"):
        simulate(jitted, {"data": 2})(state, {"x": torch.ones(2, 4, 3)})


def test_another_autocast_or_default_dtype(jitted, lines):
    """They are no arguments, but what a loss computes depends on them."""
    plain = jitted(state_of(), batch_of()).metrics.loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = jitted(state_of(), batch_of()).metrics.loss
    assert jitted(state_of(), batch_of()).metrics.loss == plain != cast
    assert lines() == [
        "zf.jit traces again: torch's default dtype and autocast are (torch.float32, "
        "('cpu', torch.bfloat16))"
    ]


def test_a_backend_and_passes_are_checked_before_any_step():
    step = zf.train_step(loss, zf.optim.sgd(0.1))
    with pytest.raises(ValueError, match="there is no backend 'foo'; there are aten"):
        zf.jit(step, backend="foo")
    with pytest.raises(TypeError, match=r"got 'sink': type zfunc.program.passes.sink"):
        zf.jit(step, passes=["sink"])
