# SPDX-License-Identifier: Apache-2.0
"""``value_and_grad``: torch's gradients, at the memory of plain autograd."""

import gc
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import zfunc as zf
from tests.unit.core.common import F64, alone, assert_bitwise, one_rank, randn
from zfunc.core.autodiff import nested_in_grad
from zfunc.core.errors import LossError
from zfunc.testing.memory import peak_live_bytes
from zfunc.testing.strategies import param_trees

LAYERS, WIDTH, ROWS = 16, 32, 256


def loss(params, x):
    for w in params:
        x = torch.tanh(x @ w)
    return x.square().mean()


def square_loss(params):
    leaves = zf.tree_leaves(params)
    return sum(((i + 1) * x.sin()).sum() ** 2 for i, x in enumerate(leaves))


class Wrong(torch.autograd.Function):
    """The identity, with a backward that is wrong on purpose."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return 100 * cotangent


# --- values -------------------------------------------------------------------


@given(param_trees())
def test_gradients_are_those_of_torch(params):
    value, grads = zf.value_and_grad(square_loss)(params)
    leaves, spec = zf.core.tree.tree_flatten(params)
    tracked = [x.clone().requires_grad_() for x in leaves]
    want = square_loss(zf.core.tree.tree_unflatten(spec, tracked))
    want_grads = torch.autograd.grad(want, tracked)
    assert torch.equal(value, want)
    assert_bitwise(grads, zf.core.tree.tree_unflatten(spec, list(want_grads)))


def test_equal_to_torch_func_grad():
    params = {str(i): randn(4, 4, seed=i) for i in range(3)}
    x = randn(5, 4, seed=9)

    def f(p):
        return loss(p.values(), x)

    got = zf.value_and_grad(f)(params)
    want_grads, want = torch.func.grad_and_value(f)(params)
    assert torch.equal(got[0], want)
    for k in params:
        torch.testing.assert_close(got[1][k], want_grads[k], rtol=1e-12, atol=1e-15)


def test_a_backward_that_is_wrong_on_purpose_is_honoured():
    value, grad = zf.value_and_grad(lambda w: Wrong.apply(w).sum())(torch.ones(2))
    assert value == 2
    assert grad.tolist() == [100.0, 100.0]


def test_it_is_honoured_in_a_traced_program_too():
    traced = make_fx(zf.value_and_grad(lambda w: Wrong.apply(w).sum()))(torch.ones(2))
    assert traced(torch.zeros(2))[1].tolist() == [100.0, 100.0]


def test_leaves_that_are_not_used_get_zeros():
    params = {"used": torch.ones(2), "unused": torch.ones(3, dtype=torch.bfloat16)}
    _, grads = zf.value_and_grad(lambda p: p["used"].sum())(params)
    assert grads["unused"].dtype == torch.bfloat16
    assert grads["unused"].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "f",
    [
        lambda p: torch.tensor(1.0),
        lambda p: p.detach().sum(),
        lambda p: (p > 0).sum().float(),
    ],
)
def test_a_value_that_does_not_depend_on_the_parameters(f):
    assert zf.value_and_grad(f)(torch.ones(2))[1].tolist() == [0.0, 0.0]


def test_the_parameter_itself():
    value, grad = zf.value_and_grad(lambda p: p)(torch.tensor(3.0))
    assert (value, grad) == (3.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_gradients_have_the_dtype_of_the_parameters(dtype):
    params = {"w": torch.ones(2, dtype=dtype), "v": torch.ones(2, dtype=F64)}
    value, grads = zf.value_and_grad(lambda p: (p["w"] * p["v"]).sum())(params)
    assert value.dtype == F64
    assert grads["w"].dtype == dtype
    assert grads["v"].dtype == F64


def test_leaves_that_share_memory_are_two_leaves():
    w = randn(3)
    _, grads = zf.value_and_grad(lambda p: (p["a"] * p["b"]).sum())({"a": w, "b": w})
    assert_bitwise(grads, {"a": w, "b": w})


def test_leaves_that_are_not_contiguous():
    w = randn(3, 4).T
    _, grad = zf.value_and_grad(lambda p: (p**2).sum())(w)
    assert torch.equal(grad, 2 * w)


def test_scalars_empty_leaves_and_none():
    params = {"s": torch.tensor(2.0), "e": torch.ones(0, 3), "n": None}
    _, grads = zf.value_and_grad(lambda p: p["s"] ** 2 + p["e"].sum())(params)
    assert grads["s"] == 4
    assert grads["e"].shape == (0, 3)
    assert grads["n"] is None


def test_placed_parameters_have_placed_gradients():
    placed = zf.shard({"w": torch.ones(3)}, one_rank()).params
    _, grads = zf.value_and_grad(lambda p: zf.core.sharding.replicate(p)["w"].sum())(
        placed
    )
    assert grads["w"].sharding == placed["w"].sharding


# --- aux ----------------------------------------------------------------------


def test_aux_comes_out_beside_the_value():
    def f(p):
        return p.sum(), {"double": 2 * p, "none": None, "list": [p[0]]}

    (value, aux), grad = zf.value_and_grad(f, has_aux=True)(torch.ones(2))
    assert value == 2
    assert aux["double"].tolist() == [2.0, 2.0]
    assert aux["none"] is None
    assert grad.tolist() == [1.0, 1.0]
    assert aux["double"].grad_fn is None


def test_aux_may_hold_other_things_than_tensors():
    extra = {"count": 1, "rate": 2.5, "name": "text", "flag": True, "none": None}
    f = zf.value_and_grad(lambda p: (p.sum(), extra), has_aux=True)
    assert f(torch.ones(2))[0][1] == extra


def test_has_aux_needs_a_pair():
    with pytest.raises(LossError):
        zf.value_and_grad(lambda p: p.sum(), has_aux=True)(torch.ones(2))


# --- nesting ------------------------------------------------------------------


def cubic(p):
    return (p["w"] ** 3).sum() * p["v"].sum()


PARAMS: dict = {"w": torch.tensor([1.0, 2.0]), "v": torch.tensor([3.0])}


def test_gradient_of_a_gradient():
    def inner(p):
        return zf.value_and_grad(cubic)(p)[1]["w"].sum()

    got = zf.value_and_grad(inner)(PARAMS)[1]
    want = torch.func.grad(lambda p: torch.func.grad(cubic)(p)["w"].sum())(PARAMS)
    assert_bitwise(got, want)


@pytest.mark.parametrize(
    "outer",
    [
        torch.func.jacrev,
        torch.func.jacfwd,
        lambda f: lambda w: torch.func.jvp(f, (w,), (torch.ones(2),))[1],
        lambda f: lambda w: torch.func.vjp(f, w)[1](torch.ones(2))[0],
    ],
)
def test_inside_of_other_transforms(outer):
    def ours(w):
        return zf.value_and_grad(lambda w: (w**3).sum())(w)[1]

    def torchs(w):
        return torch.func.grad(lambda w: (w**3).sum())(w)

    w = torch.tensor([1.0, 2.0])
    assert torch.equal(outer(ours)(w), outer(torchs)(w))


def test_under_vmap_and_around_it():
    ws = randn(3, 4)

    def f(w):
        return (w**3).sum()

    got = torch.func.vmap(zf.value_and_grad(f))(ws)[1]
    assert torch.equal(got, 3 * ws**2)
    _, got = zf.value_and_grad(lambda ws: torch.func.vmap(f)(ws).sum())(ws)
    torch.testing.assert_close(got, 3 * ws**2, rtol=1e-14, atol=0)


def test_nested_in_grad_sees_what_differentiates():
    seen = []

    def f(w):
        seen.append(nested_in_grad())
        return w.sum()

    f(torch.ones(1))
    torch.func.vmap(f)(torch.ones(1, 1))
    torch.func.grad(f)(torch.ones(1))
    torch.func.jvp(f, (torch.ones(1),), (torch.ones(1),))
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_around_it_do_not_matter(mode):
    with mode():
        value, grad = zf.value_and_grad(lambda p: (p**2).sum())(torch.ones(2))
    assert value == 2
    assert grad.tolist() == [2.0, 2.0]


# --- memory -------------------------------------------------------------------


class Frozen(torch.nn.Module):
    shape: ClassVar = (4, 4)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(*self.shape))


def params_of():
    return [randn(WIDTH, WIDTH, seed=i, dtype=torch.float32) for i in range(LAYERS)]


def autograd(params, x):
    tracked = [p.detach().requires_grad_() for p in params]
    value = loss(tracked, x)
    return value.detach(), torch.autograd.grad(value, tracked)


def test_peak_memory_is_that_of_plain_autograd():
    x = randn(ROWS, WIDTH, dtype=torch.float32)
    want, plain = peak_live_bytes(autograd, params_of(), x)
    got, ours = peak_live_bytes(zf.value_and_grad(loss), params_of(), x)
    _, torchs = peak_live_bytes(
        torch.func.grad(lambda p, x: loss(p, x)), params_of(), x
    )
    assert_bitwise(list(got[1]), list(want[1]))
    assert ours <= 1.05 * plain
    assert torchs > 1.3 * plain  # what this is for


def test_activations_die_without_the_garbage_collector():
    x, params = randn(ROWS, WIDTH, dtype=torch.float32), params_of()
    gc.collect()
    gc.disable()
    try:
        of_others = {id(o) for o in gc.get_objects() if type(o) is torch.Tensor}
        out, _ = peak_live_bytes(zf.value_and_grad(loss), params, x)
        inner, alive = peak_live_bytes(lambda: 0)
        del inner
        refs = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        new = [t for t in refs if id(t) not in of_others]
        activations = [t for t in new if t.shape == (ROWS, WIDTH)]
    finally:
        gc.enable()
    assert not activations
    assert alive == 0
    assert len(out[1]) == LAYERS


@pytest.mark.parametrize(
    "captured",
    ["module", "parameters", "argument"],
)
def test_results_carry_no_plain_autograd_graph(captured):
    """Also where something that plain autograd tracks is in the closure."""
    module = Frozen()
    w = randn(4, 4, seed=1)
    w = w.requires_grad_() if captured == "parameters" else w
    x = module.weight if captured == "argument" else randn(4, 4, seed=2)

    def f(w, x):
        y = x @ module.weight if captured == "module" else x
        return (y @ w).sum(), {"y": y.sum()}

    (value, aux), grad = zf.value_and_grad(f, has_aux=True)(w, x)
    assert not value.requires_grad
    assert not grad.requires_grad
    assert not aux["y"].requires_grad


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3])
def test_steps_with_a_frozen_module_do_not_pile_up(zero):
    """A captured nn.Module tracks gradients by default: LoRA, teachers, encoders."""
    module = Frozen()
    mesh = alone() if zero is None else one_rank()
    where = () if zero is None else (zf.partition(zero=zero),)
    step = zf.train_step(
        lambda w, x: (x @ module.weight @ w).square().mean(), zf.optim.adam(0.1), *where
    )
    state = zf.shard(randn(4, 4), mesh, spec=None if zero else zf.P())
    for seed in range(2):
        state = step(state, randn(6, 4, seed=seed))
    tracked = [
        path for path, x in zf.core.tree.leaves_with_path(state) if x.requires_grad
    ]
    assert not tracked
    assert module.weight.grad is None


# --- misuse, shapes -----------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [torch.ones(2), torch.ones(1), torch.tensor(1), 1.0, None, torch.tensor(1j)],
)
def test_a_value_that_is_no_scalar(value):
    with pytest.raises(LossError, match="must return a floating 0-d tensor"):
        zf.value_and_grad(lambda p: value)(torch.ones(2))


def test_nothing_to_differentiate():
    with pytest.raises(TypeError, match="params has no leaves"):
        zf.value_and_grad(lambda p: torch.ones(()))({"a": None})


def test_eval_shape_computes_nothing():
    def program(w):
        return {"out": w @ torch.ones(3, 2), "none": None}

    out = zf.eval_shape(program, torch.ones(10**6, 3))
    assert out["out"].shape == (10**6, 2)
    assert isinstance(out["out"], torch._subclasses.FakeTensor)
    assert zf.eval_shape(program, zf.abstract(torch.ones(4, 3)))["out"].shape == (4, 2)


def test_abstract_keeps_shape_dtype_and_placement():
    state = zf.shard({"w": torch.ones(3, 2, dtype=torch.bfloat16)}, one_rank())
    fake = zf.abstract(state)
    assert zf.core.tree.tree_structure(fake) == zf.core.tree.tree_structure(state)
    assert fake.params["w"].buffer.dtype == torch.bfloat16
    assert isinstance(fake.step, torch._subclasses.FakeTensor)


@given(st.integers(1, 3))
def test_extra_arguments_are_not_differentiated(n):
    got = zf.value_and_grad(lambda p, k, m: (p * k["x"]).sum() * m)(
        torch.ones(2), {"x": torch.full((2,), 3.0)}, n
    )
    assert got[1].tolist() == [3.0 * n] * 2
