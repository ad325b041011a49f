# SPDX-License-Identifier: Apache-2.0
"""``remat``: the same gradients in less memory, whatever the block is given."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import zfunc as zf
from tests.unit.core.common import (
    F64,
    STAGES,
    alone,
    assert_bitwise,
    assert_same_gradient,
    example_batch,
    example_params,
    on_mesh,
    one_rank,
    randn,
    reference,
    traffic,
)
from zfunc.core.errors import RematError
from zfunc.testing import simulate
from zfunc.testing.memory import peak_live_bytes

X = randn(6, 5, seed=3)
W = randn(5, 4)


def plain(block):
    return block


def both(program, *args):
    """Gradients without and with rematerialization."""
    results = []
    for how in (plain, zf.remat):
        f = zf.value_and_grad(functools.partial(program, how))
        results.append(f(*args))
    return results


def assert_transparent(program, *args, exact=True):
    want, got = both(program, *args)
    if exact:
        assert_bitwise(got, want)
        return
    for a, b in zip(zf.tree_leaves(got), zf.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- blocks and arguments of every kind ---------------------------------------


def written_inside(w, x):
    return (x @ w).mul_(2.0).add_(1.0)


def without_grad(w, x):
    with torch.no_grad():
        norm = w.norm()
    return x @ w / norm


PROGRAMS = {
    "one block": lambda r, w: r(lambda w, x: torch.tanh(x @ w))(w, X).sum(),
    "keywords and constants": lambda r, w: r(
        lambda w, x, n, *, k=None, mode="a", q=2: torch.tanh(x @ w) * n * q
    )(w, X, 3, k=None, mode="b").sum(),
    "a tree": lambda r, w: r(lambda t: torch.tanh(t["x"][0] @ t["w"]))(
        {"w": w, "x": [X, None], "n": None}
    ).sum(),
    "integers and booleans": lambda r, w: r(lambda w, i, m: torch.where(m, w[i], 0.0))(
        w, torch.tensor([0, 2, 2]), torch.tensor([[True], [False], [True]])
    ).sum(),
    "an integer output": lambda r, w: (lambda y, i: (y * i).sum())(
        *r(lambda w: ((X @ w).sin(), (X @ w).argmax(1, keepdim=True)))(w)
    ),
    "a boolean output": lambda r, w: (lambda y, m: torch.where(m, y, 0.0).sum())(
        *r(lambda w: ((X @ w).sin(), X @ w > 0))(w)
    ),
    "an output that is an input": lambda r, w: (lambda y, v: (y * v.sum(0)).sum())(
        *r(lambda w: ((X @ w).sin(), w))(w)
    ),
    "an input twice among the outputs": lambda r, w: (lambda a, b: (a * b).sum())(
        *r(lambda w: (w, w))(w)
    ),
    "an output twice": lambda r, w: (lambda a, b: (a * b).sum())(
        *r(lambda w: (lambda y: (y, y))(torch.sin(w)))(w)
    ),
    "a view of an input": lambda r, w: (lambda a, b: a.sum() * b.sum())(
        *r(lambda w: (w[1:], w.T))(w)
    ),
    "an output that is not used": lambda r, w: r(lambda w: (w.sin(), w.cos()))(w)[
        0
    ].sum(),
    "an argument that is not used": lambda r, w: r(lambda w, v: w.sin())(
        w, w * 2
    ).sum(),
    "one tensor as two arguments": lambda r, w: r(lambda a, b: a.sin() * b)(w, w).sum(),
    "a detached part": lambda r, w: r(lambda w: w.sin() * w.cos().detach())(w).sum(),
    "writing to a temporary": lambda r, w: r(written_inside)(w, X).sum(),
    "no_grad inside": lambda r, w: r(without_grad)(w, X).sin().sum(),
    "nothing as output": lambda r, w: (r(lambda w: None)(w), w.sin().sum())[1],
    "an empty tensor": lambda r, w: r(lambda w, e: w.sin().sum() + e.sum())(w, w[:0]),
    "a scalar": lambda r, w: r(lambda w, s: w.sin() * s)(w, w.sum()).sum(),
    "bfloat16": lambda r, w: r(lambda w: (w.bfloat16() * 2).sin())(w).float().sum(),
    "a nested block": lambda r, w: r(lambda w: r(lambda w: w.sin())(w) * w)(w).sum(),
    "three deep": lambda r, w: r(lambda w: r(lambda w: r(torch.sin)(w) * w)(w) * w)(
        w
    ).sum(),
    "blocks in a row": lambda r, w: functools.reduce(
        lambda h, _: r(lambda w, h: torch.tanh(h @ w.T @ w))(w, h), range(3), X[:, :4]
    ).sum(),
    "vmap around": lambda r, w: vmap(r(lambda x, w: torch.tanh(x @ w)), (0, None))(
        X, w
    ).sum(),
    "grad around": lambda r, w: (
        grad(lambda x: r(lambda w, x: (x @ w).sin().sum())(w, x))(X).square().sum()
    ),
    "grad inside": lambda r, w: r(
        lambda w, x: grad(lambda y: (y @ w).sin().sum())(x) @ w
    )(w, X).sum(),
    "vmap inside": lambda r, w: r(lambda w, x: vmap(lambda y: torch.tanh(y @ w))(x))(
        w, X
    ).sum(),
    "jvp inside": lambda r, w: r(
        lambda w, x: jvp(lambda y: (y @ w).sin(), (x,), (x,))[1]
    )(w, X).sum(),
    "value_and_grad inside": lambda r, w: r(
        lambda w: zf.value_and_grad(lambda v: v.sin().sum())(w)[1]
    )(w).sum(),
    "a complex output": lambda r, w: r(lambda w: torch.fft.fft(X @ w))(w).abs().sum(),
    "a complex argument": lambda r, w: r(torch.abs)(torch.fft.fft(X @ w)).sum(),
    "complex inside": lambda r, w: r(
        lambda w: torch.view_as_real(torch.fft.fft(w)).square()
    )(w).sum(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_transparent(name):
    # Cotangents of one tensor may be added in another order.
    assert_transparent(PROGRAMS[name], W, exact=name == "one block")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_transparent_at_every_stage(name, zero, ranks):
    """On a mesh, against one rank and no rematerialization."""

    def loss(how, params, batch):
        return PROGRAMS[name](how, params["w"]) * batch["x"].mean()

    batch = {"x": randn(4, 3, seed=5)}
    params = {"w": W}
    got = on_mesh(
        functools.partial(loss, zf.remat), params, batch, zero=zero, ranks=ranks
    )
    want = reference(functools.partial(loss, plain), params, batch)
    # bfloat16 cotangents are summed over ranks after a rounding.
    assert_same_gradient(got, want, rtol=0.02 if name == "bfloat16" else 1e-9)


def test_a_module_as_a_block():
    module = torch.nn.Linear(5, 4, dtype=F64)

    def program(how, params):
        block = how(lambda p, x: functional_call(module, p, (x,)))
        return block(params, X).sin().sum()

    params = {k: p.detach() for k, p in module.named_parameters()}
    assert_transparent(program, params)


def test_a_frozen_module_in_the_block():
    """Nothing differentiates the module's own parameters here."""
    module = torch.nn.Linear(4, 4, dtype=F64)
    assert_transparent(lambda r, w: r(lambda w, x: module(x @ w))(w, X).sum(), W)


def test_callables_keep_their_names():
    def attention(w):
        return w.sin()

    assert zf.remat(attention).__name__ == "attention"
    bound = functools.partial(lambda a, b: a * b, torch.tensor(2.0))
    assert zf.remat(bound)(torch.tensor(3.0)) == 6


# --- derivatives of it --------------------------------------------------------


def block(how, x):
    return how(lambda w, x: torch.tanh(x @ w).square().sum())(W, x)


@pytest.mark.parametrize(
    "derivative",
    [
        grad,
        jacrev,
        lambda f: jacrev(jacrev(f)),
        lambda f: lambda x: vjp(grad(f), x)[1](x)[0],
        lambda f: grad(lambda x: grad(f)(x).square().sum()),
        lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
        lambda f: grad(lambda x: vmap(f)(torch.stack([x, 2 * x])).sum()),
    ],
)
def test_higher_derivatives(derivative):
    x = X[0]
    want = derivative(functools.partial(block, plain))(x)
    got = derivative(functools.partial(block, zf.remat))(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_three_times():
    x = torch.tensor(0.3, dtype=F64)
    f = zf.remat(lambda x: torch.sin(x * x))
    got = grad(grad(grad(f)))(x)
    want = grad(grad(grad(lambda x: torch.sin(x * x))))(x)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_forward_mode_says_that_there_is_none():
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(functools.partial(block, zf.remat), (X[0],), (X[0],))
    with pytest.raises(NotImplementedError, match="jvp"):
        hessian(functools.partial(block, zf.remat))(X[0])


def test_a_pullback_that_is_called_late_and_twice():
    inner = zf.remat(lambda w, x: torch.tanh(x @ w))
    nested = zf.remat(lambda w, x: inner(w, x).square().sum())
    _, pull = vjp(lambda w: nested(w, X), W)
    first, second = pull(torch.ones((), dtype=F64)), pull(torch.ones((), dtype=F64))
    want = grad(lambda w: torch.tanh(X @ w).square().sum())(W)
    assert_bitwise(first, second)
    assert torch.equal(first[0], want)


def test_plain_autograd_works_too():
    w, v = W.clone().requires_grad_(), W.clone().requires_grad_()
    zf.remat(lambda w, x: torch.tanh(x @ w))(w, X).sum().backward()
    torch.tanh(X @ v).sum().backward()
    assert torch.equal(w.grad, v.grad)


# --- randomness ---------------------------------------------------------------


def test_dropout_is_replayed_and_the_generator_goes_on():
    def program(how, w):
        h = how(lambda w: F.dropout(torch.tanh(X @ w), 0.5))(w)
        return how(lambda w, h: F.dropout(h @ w.T, 0.5))(w, h).sum() + torch.rand(())

    results = []
    for how in (plain, zf.remat):
        torch.manual_seed(0)
        results.append(zf.value_and_grad(functools.partial(program, how))(W))
        results.append(torch.rand(3))
    assert_bitwise(results[2], results[0])
    assert torch.equal(results[3], results[1])


# --- memory -------------------------------------------------------------------

LAYERS, WIDTH, ROWS = 16, 16, 512
ACTIVATION = 4 * ROWS * WIDTH


def deep(how, params, x):
    def layer(w, x):
        return torch.tanh(x @ w).sin().exp().sigmoid() + x

    for w in params:
        x = how(layer)(w, x)
    return x.square().mean()


def peak_of(program, *args):
    return peak_live_bytes(zf.value_and_grad(program), *args)[1]


def layers_of(width=WIDTH):
    return [randn(width, width, seed=i, dtype=torch.float32) for i in range(LAYERS)]


def test_memory_is_one_activation_per_block():
    x = randn(ROWS, WIDTH, dtype=torch.float32)
    usual = peak_of(functools.partial(deep, plain), layers_of(), x)
    ours = peak_of(functools.partial(deep, zf.remat), layers_of(), x)
    assert usual > 4 * LAYERS * ACTIVATION
    assert ours < (LAYERS + 12) * ACTIVATION


def test_memory_of_blocks_of_blocks():
    x = randn(ROWS, WIDTH, dtype=torch.float32)

    def grouped(params, x):
        for i in range(0, LAYERS, 4):
            group = zf.remat(lambda ws, x: deep_body(ws, x))
            x = group(params[i : i + 4], x)
        return x.square().mean()

    def deep_body(ws, x):
        for w in ws:
            x = zf.remat(lambda w, x: torch.tanh(x @ w).sin().exp().sigmoid() + x)(w, x)
        return x

    assert peak_of(grouped, layers_of(), x) < (4 + 4 + 12) * ACTIVATION


def test_memory_of_weights_at_stage_3():
    """A stack of blocks needs its shards and a few blocks, not all of the weights."""
    width, ranks = 64, 8
    block_bytes = 4 * width * width
    psi = LAYERS * block_bytes
    mesh = zf.AbstractMesh({"data": ranks})

    def peak(how):
        step = zf.train_step(
            lambda p, x: deep(how, p, x), zf.optim.sgd(0.1), zf.partition(zero=3)
        )
        params, x = zf.abstract((layers_of(width), torch.ones(2, width)))
        state = zf.shard(params, mesh)
        with torch._guards.detect_fake_mode(params):
            return peak_live_bytes(step, state, x)[1]

    assert peak(plain) > psi
    assert peak(zf.remat) < 4 * psi / ranks + 5 * block_bytes


def test_a_block_gathers_its_parameters_in_one_message_each_time():
    mesh = zf.AbstractMesh({"data": 4})

    def loss(params, x):
        affine = zf.remat(lambda p, x: torch.tanh(x @ p["w"] + p["b"]))
        return affine(params, x).sum()

    def program(params, x):
        step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=3))
        step(zf.shard(params, mesh), x)

    params = {"b": torch.ones(4), "w": torch.ones(4, 4)}
    names = [m.name for m in traffic(program, params, torch.ones(2, 4))]
    assert names.count("all_gather_into_tensor") == 2  # forward and recompute
    assert names.count("reduce_scatter_tensor") == 1


# --- the guard ----------------------------------------------------------------


def captured(p, x):
    return zf.remat(lambda x: x @ p["w"])(x)


def captured_derived(p, x):
    h = x @ p["w"]
    return zf.remat(lambda s: h * s)(torch.ones((), dtype=F64))


def captured_by_an_inner_block(p, x):
    def outer(w, x):
        return zf.remat(lambda x: x @ w)(x)

    return zf.remat(outer)(p["w"], x)


def captured_inside_of_vmap(p, x):
    return vmap(lambda row: zf.remat(lambda r: r @ p["w"])(row))(x)


CAPTURES = [captured, captured_derived, captured_by_an_inner_block]


@pytest.mark.parametrize("zero", [None, *STAGES])
@pytest.mark.parametrize("forward", CAPTURES)
def test_a_captured_parameter_is_an_error(forward, zero):
    def loss(params, batch):
        return forward(params, batch["x"]).square().mean()

    where = () if zero is None else (zf.partition(zero=zero),)
    mesh = alone() if zero is None else one_rank()
    state = zf.shard(example_params(), mesh, spec=None if zero else zf.P())
    with pytest.raises(RematError, match="is not an argument"):
        zf.train_step(loss, zf.optim.sgd(0.1), *where)(state, example_batch())


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("forward", CAPTURES)
def test_it_is_the_same_error_in_the_simulator(forward, zero):
    def loss(params, batch):
        return forward(params, batch["x"]).square().mean()

    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=zero))
    sim = simulate(step, {"data": 2})
    state = sim.shard(example_params(), spec=zf.P() if zero == 0 else None)
    batch = zf.tree_map(lambda x: torch.stack([x, x]), example_batch())
    with pytest.raises(RematError, match="is not an argument"):
        sim(state, batch)


def test_captured_inside_of_vmap_is_right_or_an_error():
    def loss(params, batch):
        return captured_inside_of_vmap(params, batch["x"]).square().mean()

    def whole(params, batch):
        return (batch["x"] @ params["w"]).square().mean()

    want = reference(whole, example_params(), example_batch())
    try:
        got = reference(loss, example_params(), example_batch())
    except RematError:
        return
    assert_same_gradient(got, want)


class Layer:
    """Parameters in an attribute, which no closure shows."""

    def __init__(self, w):
        self.w = w

    def grad(self, x):
        return grad(lambda y: torch.tanh(y @ self.w).sum())(x)

    def value_and_grad(self, x):
        return zf.value_and_grad(lambda y: torch.tanh(y @ self.w).sum())(x)[1]

    def jvp(self, x):
        return jvp(lambda y: torch.tanh(y @ self.w), (x,), (x,))[1]

    def vmap(self, x):
        return vmap(lambda y: torch.tanh(y @ self.w))(x)


def assert_right_or_refused(program):
    want = zf.value_and_grad(functools.partial(program, plain))(W)
    try:
        got = zf.value_and_grad(functools.partial(program, zf.remat))(W)
    except RematError:
        return
    assert_bitwise(got, want)


@pytest.mark.parametrize("inner", ["grad", "value_and_grad", "jvp", "vmap"])
@pytest.mark.parametrize("derived", [False, True])
def test_captured_by_an_object_and_used_in_a_transform(inner, derived):
    """A transform inside of the block must not hide what the block captures."""

    def program(how, w):
        block = getattr(Layer(w.sin() if derived else w), inner)
        return how(block)(X).square().sum()

    assert_right_or_refused(program)


@pytest.mark.parametrize("way", ["partial", "default", "list"])
def test_captured_in_other_ways_and_used_in_a_transform(way):
    def hidden(w, x):
        return grad(lambda y: torch.tanh(y @ w).sum())(x)

    def program(how, w):
        box = [Layer(w)]
        blocks = {
            "partial": functools.partial(hidden, w),
            "default": lambda x, w=w: hidden(w, x),
            "list": lambda x: hidden(box[0].w, x),
        }
        return how(blocks[way])(X).square().sum()

    assert_right_or_refused(program)


def test_captured_under_plain_autograd():
    w = W.clone().requires_grad_()
    with pytest.raises(RematError, match="is not an argument"):
        zf.remat(lambda x: x @ w)(X)


def test_constants_may_be_captured():
    assert_transparent(lambda r, w: r(lambda w: torch.tanh(X @ w))(w).sum(), W)


@pytest.mark.parametrize("value", [1.0, "text", {"a": torch.ones(1), "b": 2}])
def test_a_block_returns_tensors(value):
    with pytest.raises(RematError, match="return tensors"):
        zf.remat(lambda x: value)(X)


def test_errors_of_the_block_pass_through():
    def broken(w):
        raise KeyError("mask")

    with pytest.raises(KeyError, match="mask"):
        zf.remat(broken)(W)


# --- with Mean ----------------------------------------------------------------


def weighted(params, batch, dtype):
    weight = (batch["index"] > 1).to(dtype).sum()
    aux = {"mean": zf.Mean(batch["x"].sum(), weight)}
    return zf.Mean((batch["x"] @ params["w"]).square().sum(), weight), aux


def test_a_whole_loss_with_a_count():
    """The weight is made inside of the block, from the batch alone."""
    loss = functools.partial(weighted, dtype=torch.int64)
    want = reference(loss, example_params(), example_batch())
    got = reference(zf.remat(loss), example_params(), example_batch())
    assert_bitwise(got.metrics.aux, want.metrics.aux)
    assert_bitwise(got.grads, want.grads)


def test_a_whole_loss_with_a_floating_weight_is_refused():
    """Every floating output of a block may depend on the parameters."""
    loss = zf.remat(functools.partial(weighted, dtype=F64))
    with pytest.raises(zf.LossError, match="outside of remat"):
        reference(loss, example_params(), example_batch())
