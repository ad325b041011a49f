# SPDX-License-Identifier: Apache-2.0
"""bfloat16 storage without float32 copies: Kahan's sums and stochastic rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.optim import leafwise
from tests.unit.optim import test_transformations as owed
from zfunc.core.errors import StructureError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import NamedSharding, P, place, replicate
from zfunc.core.tree import tree_leaves, tree_map
from zfunc.optim import (
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    ema,
    identity,
    kahan,
    sgd,
    stochastic_rounding,
)
from zfunc.testing import simulate, split_batch, spmd

BF16 = torch.bfloat16
U = 2.0**-8  # unit roundoff of bfloat16: half its step, relative
SMALL = 2.0**-21  # more than the few roundings in float32 of a step, relative
BOTH = {"kahan": kahan, "stochastic": stochastic_rounding}
TXS = {
    f"{name} {i}": wrap(tx)
    for name, wrap in BOTH.items()
    for i, tx in enumerate((adamw(0.1), sgd(0.1, momentum=0.9)))
}
both = pytest.mark.parametrize("wrap", BOTH.values(), ids=BOTH)


def normal(*shape, seed=0):
    return leafwise.randn(*shape, seed=seed).float()


def neighbours(total):
    """The two numbers of bfloat16 around each float32, equal where it is one."""
    down = (total.view(torch.int32) & -65536).view(torch.float32)  # towards zero
    step = (down.view(torch.int32) + 65536).view(torch.float32)
    up = torch.where(down == total, down, step)
    return torch.minimum(down, up), torch.maximum(down, up)


# --- training: where plain storage stalls -------------------------------------------


def trained(loss, params, tx, steps, dtype):
    """Parameters by the whole library, from a state that is stored in ``dtype``."""
    step = zf.train_step(loss, tx, zf.precision("fp32"))
    state = zf.shard(params, zf.make_mesh({}), tx=tx, dtype=dtype)
    for _ in range(steps):
        state = step(state, torch.zeros(1))
    return zf.unshard(state).params.double()


A, GAMMA, STEPS = 1.25, 2.0**-7, 500


def quadratic(params, batch):
    return 0.5 * (params - A).square().sum()


def quadratic_bound(start):
    r"""How far kahan's p may be from the exact q at the end.

    z = p + c is moved by the update of the gradient at p, and c loses e. With the
    gradient g rounded to bfloat16, :math:`|c| \le C = U |p|` and
    :math:`|e| \le U C` (c is rounded):
    :math:`|z' - q'| \le (1 - \gamma) |z - q| + \gamma (C + U |p - a|) + U C`, and
    :math:`|p - q| \le |z - q| + C`. Float32 adds a little to each.
    """
    q, far = start.double(), 0.0
    for _ in range(STEPS):
        most = U * (q.abs().max().item() + far) / (1 - U)
        slope = (q - A).abs().max().item() + far + most
        far = (1 - GAMMA) * far + GAMMA * (most + U * slope) + U * most + SMALL
        q = q - GAMMA * (q - A)
    return q, far + most


def test_a_quadratic_trains_with_kahan_and_stalls_without():
    start = 1 + torch.arange(16) / 128  # in [1, 1.125), and exact in bfloat16
    q, bound = quadratic_bound(start)
    exact = trained(quadratic, start, sgd(GAMMA), STEPS, None)
    assert (exact - q).abs().max() < 1e-4
    plain = trained(quadratic, start, sgd(GAMMA), 2, BF16)
    assert torch.equal(plain, start.double())  # so further steps do nothing either
    got = trained(quadratic, start, kahan(sgd(GAMMA)), STEPS, BF16)
    assert (got - q).abs().max() <= bound
    assert (plain - q).abs().min() > 5 * bound


def test_a_quadratic_trains_with_stochastic_rounding_in_the_mean():
    r"""Roundings have variance at most a quarter of the squared step of 2^-7.

    So with :math:`V' = (1 - \gamma)^2 V + s^2 / 4` the variance stays below
    :math:`s^2 / 8 \gamma (1 - \gamma / 2)`, and elements are independent. The gradient
    is rounded to bfloat16 to nearest, which may shift all by :math:`U |p - a|`.
    """
    n, steps = 4096, 300
    start = torch.ones(n)
    tx = stochastic_rounding(sgd(GAMMA), key=3)
    got = trained(quadratic, start, tx, steps, BF16)
    q = A + (1 - A) * (1 - GAMMA) ** steps
    deviation = (2.0**-14 / (8 * GAMMA * (1 - GAMMA / 2))) ** 0.5
    assert (got - q).pow(2).mean().sqrt() < 1.1 * deviation
    assert (got.mean() - q).abs() < U * (A - 1) + 4 * deviation / n**0.5
    assert torch.equal(trained(quadratic, start, sgd(GAMMA), 2, BF16), start.double())


RATE, MLP_STEPS = 2.0**-9, 600
X, Y = normal(16, 3, seed=1), normal(16, seed=2)


def mlp(params, batch):
    """Three inputs, four hidden units, one output, and an L2 penalty."""
    w, b, v = params[:12].reshape(3, 4), params[12:16], params[16:20]
    x, y = X.to(params.dtype), Y.to(params.dtype)
    error = (x @ w + b).tanh() @ v - y
    return 0.5 * error.square().mean() + 0.05 * params.square().sum()


def mlp_bound(start):
    r"""The same bound where the gradient is not linear, along the exact trajectory.

    Between two points gradient descent stretches distances by
    :math:`\max(|1 - \eta \lambda_{min}|, |1 - \eta \lambda_{max}|)` for the eigenvalues
    of the Hessian, and a displacement C of where the gradient is taken moves it by
    at most :math:`\lambda C`. The Hessian is that of q, and 10% more for the points
    around it.
    """
    q, far, hessian = start.double(), 0.0, torch.func.hessian(mlp)
    gradient = torch.func.grad(mlp)
    for step in range(MLP_STEPS):
        if step % 20 == 0:
            values = torch.linalg.eigvalsh(hessian(q, None))
            largest = 1.1 * values.abs().max().item()
            stretch = 1 - RATE * (values.min().item() - 0.1 * largest)
        g = gradient(q, None)
        most = U * (q.norm().item() + far) / (1 - U)
        slope = g.norm().item() + largest * (far + most)
        far = stretch * far + RATE * (largest * most + U * slope) + U * most + SMALL
        q = q - RATE * g
    return q, far + most


def test_an_mlp_trains_with_kahan_and_stalls_without():
    start = (0.5 + 0.5 * normal(20, seed=3).abs()).to(BF16).float()
    q, bound = mlp_bound(start)
    moved = (q - start).norm()
    runs = {
        "exact": trained(mlp, start, sgd(RATE), MLP_STEPS, None),
        "plain": trained(mlp, start, sgd(RATE), MLP_STEPS, BF16),
        "kahan": trained(mlp, start, kahan(sgd(RATE)), MLP_STEPS, BF16),
    }
    far = {name: (p - q).norm() for name, p in runs.items()}
    assert far["exact"] < 1e-4
    assert far["kahan"] <= bound < 0.5 * moved
    assert far["plain"] > bound
    losses = {name: mlp(p, None).item() for name, p in runs.items()}
    assert losses["kahan"] - losses["exact"] < 0.1 * (losses["plain"] - losses["exact"])


# --- kahan --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_parameters_and_compensation_are_the_sum_of_all_updates(dtype):
    unit = torch.finfo(dtype).eps / 2
    tx, p = kahan(identity()), normal(100).to(dtype)
    moments, total = tx.init(p), p.double()
    for step in range(200):
        u = 1e-3 * normal(100, seed=step)
        updates, moments = tx.update(u, moments, p)
        p, total = apply_updates(p, updates), total + u.double()
    kept = p.double() + moments.compensation.double()
    largest = p.double().abs().clamp_min(torch.finfo(dtype).tiny).add(0.2)
    assert ((kept - total).abs() <= 200 * (unit**2 + SMALL * 2**-3) * largest).all()
    assert (moments.compensation.double().abs() <= 1.01 * unit * largest).all()
    assert moments.compensation.dtype == dtype


def test_where_nothing_is_rounded_off_the_updates_are_those_of_the_optimizer():
    params = {"w": torch.arange(8).to(BF16)}
    tx, moments = kahan(sgd(1.0)), kahan(sgd(1.0)).init(params)
    u = {"w": torch.full((8,), 2.0)}
    updates, moments = tx.update(u, moments, params)
    assert torch.equal(updates["w"], -u["w"])
    assert not moments.compensation["w"].any()


def test_float64_is_compensated_too():
    tx, p = kahan(identity()), torch.ones(1, dtype=torch.float64)
    moments = tx.init(p)
    for _ in range(4):
        updates, moments = tx.update(torch.full_like(p, 2.0**-54), moments, p)
        p = apply_updates(p, updates)
    assert p.item() == 1 + 2.0**-52


# --- stochastic rounding ----------------------------------------------------------


def rounded(p, u, key=0, tx=None):
    tx = stochastic_rounding(identity() if tx is None else tx, key=key)
    updates, _ = tx.update(u, tx.init(p), p)
    return apply_updates(p, updates)


def check_neighbours(p, u):
    new = rounded(p, u)
    total = p.float() + u
    low, high = neighbours(total)
    wide = new.float()
    right = (wide == low) | (wide == high) | ~total.isfinite()
    assert right.all(), (p[~right], u[~right], new[~right])


def test_the_new_parameter_is_one_of_the_two_neighbours():
    """Exactly, whatever the sizes of the two: also where they nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    exponents = torch.randint(-140, 120, (n,), generator=generator)
    p = torch.ldexp(1 + torch.rand(n, generator=generator), exponents).to(BF16)
    sizes = torch.ldexp(
        torch.randn(n, generator=generator), torch.randint(-30, 10, (n,))
    )
    check_neighbours(p, p.float() * sizes)
    close = -p.float() * (1 + torch.ldexp(torch.rand(n), torch.randint(-24, 0, (n,))))
    check_neighbours(p, close)
    check_neighbours(-p, -close)


def test_what_bfloat16_has_is_not_moved_and_not_finite_stays():
    p = torch.tensor([1.0, 0.0, -0.0, 3.0, 1.0, 1.0], dtype=BF16)
    u = torch.tensor([0.5, 0.0, 0.0, -3.0, float("inf"), float("nan")])
    for key in range(20):
        new = rounded(p, u, key)
        assert new[:5].tolist() == [1.5, 0.0, 0.0, 0.0, float("inf")]
        assert new[5].isnan()


def test_a_nan_of_any_bits_stays_one_and_an_infinite_parameter_infinite():
    """The bits of some NaN are one less than those of 0 or of -0."""
    last = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).view(torch.float32)
    for key in range(20):
        assert rounded(torch.ones(2, dtype=BF16), last, key).isnan().all()
        p = torch.tensor([float("inf"), float("-inf")], dtype=BF16)
        assert torch.equal(rounded(p, torch.ones(2), key), p)


def test_the_mean_over_keys_is_the_sum():
    p, keys = normal(64).to(BF16), 2000
    u = 0.01 * normal(64, seed=1) * p.float().abs()
    total = (p.float() + u).double()
    low, high = (x.double() for x in neighbours(total.float()))
    mean = sum(rounded(p, u, key).double() for key in range(keys)) / keys
    error = ((total - low) * (high - total) / keys).sqrt()
    assert ((mean - total).abs() <= 4 * error).all()
    nearest = (total.float().to(BF16).double() - total).abs()
    assert (nearest > 4 * error).float().mean() > 0.5  # which would be seen


def test_steps_leaves_elements_and_keys_have_bits_of_their_own():
    """Of equal parameters and updates, a quarter of the way up: Bernoulli of 1/4."""
    n, tx = 4096, stochastic_rounding(identity())
    p = {k: torch.ones(n, dtype=BF16) for k in ("a", "b")}
    u = {k: torch.full((n,), 0.25 / 128) for k in p}
    first, moments = tx.update(u, tx.init(p), p)
    second, _ = tx.update(u, moments, p)
    other, _ = (t := stochastic_rounding(identity(), key=1)).update(u, t.init(p), p)
    draws = [first["a"], first["b"], second["a"], second["b"], other["a"]]
    ups = torch.stack([x > 0 for x in draws]).double()
    ups = torch.cat([ups, ups[:1].roll(1, dims=1)])  # of an element and the next one
    covariance = torch.cov(ups)
    assert (ups.mean(1) - 0.25).abs().max() < 4 * (0.1875 / n) ** 0.5
    assert (covariance - 0.1875 * torch.eye(6)).abs().max() < 5 * 0.1875 / n**0.5


SHAPES = {"m": (7, 5), "v": (5,), "s": (), "cube": (3, 4, 2), "empty": (0, 3)}
SPECS = {
    "m": P(None, "data"),
    "v": P("data"),
    "s": P(),
    "cube": P("data"),
    "empty": P(),
}


def problem():
    params = {k: normal(*s, seed=i).to(BF16) for i, (k, s) in enumerate(SHAPES.items())}
    updates = {k: 0.01 * normal(*s, seed=9) for k, s in SHAPES.items()}
    return params, updates


def on_rank(mesh, params, updates):
    tx = stochastic_rounding(sgd(1.0), key=5)

    def put(tree):
        return {k: place(x, NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}

    placed, grads, moments = put(params), put(updates), None
    moments = tx.init(placed)
    for _ in range(3):
        new, moments = tx.update(grads, moments, placed)
        placed = apply_updates(placed, new)
    return placed


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_bits_do_not_depend_on_the_mesh(ranks):
    params, updates = problem()
    tx = stochastic_rounding(sgd(1.0), key=5)
    want, moments = params, tx.init(params)
    for _ in range(3):
        new, moments = tx.update(updates, moments, want)
        want = apply_updates(want, new)
    sent = tree_map(lambda x: x.expand(ranks, *x.shape), (params, updates))
    program = spmd(
        lambda mesh, *trees: replicate(on_rank(mesh, *trees)), {"data": ranks}
    )
    got = program(*sent)
    for k, x in got.items():
        assert all(torch.equal(row, want[k]) for row in x), k
    for rank in range(ranks):  # and where a rank is a number, as on real processes
        mesh = Mesh((("data", ranks),), "process", rank=rank)
        pieces = on_rank(mesh, params, updates)
        for k, piece in pieces.items():
            whole = place(want[k], NamedSharding(mesh, SPECS[k]))
            assert torch.equal(piece.buffer, whole.buffer), k


def linear(params, batch):
    total = sum((batch.sum() * x).sum() for x in tree_leaves(params))
    return zf.Mean(total, torch.tensor(float(len(batch))))


@both
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_training_does_not_depend_on_the_mesh(wrap, zero):
    """With sums that are exact, so that all meshes have the same gradients."""
    batch = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, 2.0])
    ends = []
    for ranks in (1, 2, 3):
        tx = wrap(sgd(2.0**-10, momentum=0.5))
        step = zf.train_step(linear, tx, zf.partition(zero))
        sim = simulate(step, {"data": ranks})
        state = sim.shard(problem()[0], tx=tx)
        for _ in range(4):
            state = sim(state, split_batch(batch, {"data": ranks}))
        ends.append(sim.unshard(state))
    for end in ends[1:]:
        for a, b in zip(
            tree_leaves((end.params, end.moments)),
            tree_leaves((ends[0].params, ends[0].moments)),
            strict=True,
        ):
            assert torch.equal(a, b)


# --- what both owe --------------------------------------------------------------------


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("check", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(check, tx):
    if check is owed.test_moments_keep_structure_and_dtypes:
        dtypes = (BF16, torch.float32)
        for dtype in dtypes:
            moments = tx.init(owed.tree(0, dtype))
            _, after = tx.update(owed.tree(1, dtype), moments, owed.tree(0, dtype))
            for x, y in zip(tree_leaves(after), tree_leaves(moments), strict=True):
                assert (x.dtype, x.shape) == (y.dtype, y.shape)
        return
    check(tx)


@both
def test_in_bfloat16_jitted_and_donated_steps_are_eager(wrap):
    tx = chain(clip_by_global_norm(1.0), wrap(adamw(0.01)), ema(0.9))
    leafwise.jitted_is_eager(tx, BF16)
    leafwise.donated_is_eager(tx, BF16)
    assert wrap(adamw(0.1)).leafwise
    assert not wrap(chain(clip_by_global_norm(1.0), sgd(0.1))).leafwise


@both
@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_bfloat16_under_vmap_is_each_alone(wrap, seed):
    tx = wrap(sgd(0.01, momentum=0.9))
    ps = normal(3, 4, 2, seed=seed).to(BF16)
    us = normal(3, 4, 2, seed=seed + 1)

    def new(p, u):
        return apply_updates(p, tx.update(u, tx.init(p), p)[0])

    together = torch.vmap(new)(ps, us)
    assert all(
        torch.equal(together[i], new(p, u))
        for i, (p, u) in enumerate(zip(ps, us, strict=True))
    )


@both
def test_zero_gradients_move_nothing(wrap):
    leafwise.zero_gradients_move_nothing(wrap(sgd(0.1, momentum=0.9)))
    p = normal(9).to(BF16)
    tx = wrap(adamw(0.1, weight_decay=0.0, eps=0.0))
    updates, _ = tx.update(torch.zeros(9), tx.init(p), p)
    assert torch.equal(apply_updates(p, updates), p)


@both
def test_moments_of_the_optimizer_stay_in_float32(wrap):
    moments = wrap(adamw(0.1)).init({"w": torch.ones(3, dtype=BF16)})
    assert {x.dtype for x in tree_leaves(moments.inner) if x.dim()} == {torch.float32}


@both
def test_bad_optimizers(wrap):
    with pytest.raises(TypeError, match=rf"{wrap.__name__}: tx is a function, .*adamw"):
        wrap(adamw)
    with pytest.raises(TypeError, match=r"params\['n'\] is torch.int64"):
        wrap(adamw(0.1)).init({"n": torch.arange(3)})


def test_bad_keys_and_dtypes():
    with pytest.raises(ValueError, match=r"stochastic_rounding: key is -1, .*key=0"):
        stochastic_rounding(sgd(0.1), key=-1)
    for key in (0.5, True, torch.tensor(1)):
        with pytest.raises(TypeError, match="stochastic_rounding: key is a"):
            stochastic_rounding(sgd(0.1), key=key)
    tx, p = stochastic_rounding(sgd(0.1)), {"w": torch.ones(2, dtype=torch.float16)}
    with pytest.raises(TypeError, match=r"params\['w'\] is torch.float16, .*kahan\(tx"):
        tx.init(p)
    with pytest.raises(TypeError, match=r"params\['w'\] is torch.float16"):
        tx.update(p, tx.init({"w": torch.ones(2)}), p)


@both
@pytest.mark.parametrize("moments", [(), None, {"w": torch.ones(2)}])
def test_other_moments(wrap, moments):
    tx, p = wrap(sgd(0.1)), {"w": torch.ones(2)}
    with pytest.raises(StructureError, match=r"moments = tx.init\(params\)"):
        tx.update(p, moments, p)
    with pytest.raises(StructureError, match="Pass the gradients of these params"):
        tx.update({"v": torch.ones(2)}, tx.init(p), p)


@both
def test_float32_leaves_beside_bfloat16(wrap):
    p = {"w": torch.ones(2, dtype=BF16), "norm": torch.ones(2)}
    u = {"w": torch.full((2,), 1e-4), "norm": torch.full((2,), 1e-4)}
    tx = wrap(sgd(1.0))
    updates, _ = tx.update(u, tx.init(p), p)
    assert torch.equal(updates["norm"], -u["norm"])
