# SPDX-License-Identifier: Apache-2.0
"""Low precision: L1 within a bound that follows from counting roundings.

With the unit roundoff u and k roundings on the way of each term, a sum of n terms
computed in any order is off by at most gamma(n - 1 + k) times the sum of the absolute
values of its terms, gamma(m) = m u / (1 - m u) (Higham, "Accuracy and stability of
numerical algorithms", 2002, lemma 3.1 and section 4.2).
"""

import functools
from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import examples
from zfunc.testing import Recipe, simulate, split_batch

U_BF16, U_F16, U_F32 = 2.0**-8, 2.0**-11, 2.0**-24
TINY_F16 = 2.0**-25  # the most that a number below the normal ones is rounded by


def gamma(m, u):
    return m * u / (1 - m * u)


class Linear(NamedTuple):
    """Least squares: few operations, so that each rounding can be counted."""

    recipe: Recipe
    mesh_shape: dict[str, int]
    params: torch.Tensor
    batch: dict[str, torch.Tensor]


@st.composite
def problems(draw):
    ranks, dim = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    recipe = Recipe(
        zero=draw(st.sampled_from([0, 1, 2, 3])),
        num_microbatches=draw(st.integers(1, 3)),
    )
    samples = draw(st.integers(1, 3)) * ranks * recipe.num_microbatches
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    make = functools.partial(torch.randn, generator=generator)
    batch = {"x": make(samples, dim), "y": make(samples)}
    return Linear(recipe, {"data": ranks}, make(dim), batch)


def loss_fn(params, batch):
    residual = (batch["x"] * params).sum(1) - batch["y"]
    return zf.Mean(0.5 * residual.square().sum(), torch.tensor(float(len(residual))))


def trained(problem, *transforms):
    """Gradient and parameters after one step of gradient descent with rate 0.1."""
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1), *transforms)
    sim = simulate(step, problem.mesh_shape)
    state = sim.shard(problem.params, spec=problem.recipe.spec)
    after = sim.unshard(sim(state, split_batch(problem.batch, problem.mesh_shape)))
    return after.grads.double(), after.params.double()


def exact(problem):
    """In float64: the gradient, and per sample the sizes that the bound needs."""
    w, x, y = (
        t.double() for t in (problem.params, problem.batch["x"], problem.batch["y"])
    )
    residual = (x * w).sum(1) - y
    size = (x * w).abs().sum(1) + y.abs()
    n = len(y)
    return (residual @ x) / n, size, x.abs(), n


def check_compute(problem):
    """bfloat16 arithmetic, float32 storage, wire and optimizer."""
    _check_within(problem, zf.precision("bf16"), U_BF16, 0.0)


def check_float16(problem):
    """float16 arithmetic with a loss scale of 256, the rest as for bfloat16.

    Numbers below 2^-14 are rounded by up to 2^-25 instead of relatively: each of the
    D + 6 roundings of a residual and its products, times the factors that follow it,
    none of which is more than 1 + max|w| or 1 + max|x|, and N of the sum.
    """
    dim, n = len(problem.params), len(problem.batch["y"])
    factors = (1 + problem.params.abs().max()) * (1 + problem.batch["x"].abs().max())
    tiny = TINY_F16 * float((dim + 6 + n) * factors**2)
    policy = zf.precision("fp16", loss_scale=256.0)
    _check_within(problem, policy, U_F16, tiny)


def _check_within(problem, policy, u, tiny):
    r"""The bound of ``n + D + 6`` roundings by ``u``, and ``tiny`` besides.

    Per sample: x, w, y are rounded (1 each), their product (1), the sum of D products
    and y (D): each term of the residual carries at most D + 3 roundings. The gradient
    of sample i by w_j is r_i x_ij: 3 more (x_ij, the cotangent, the product). The sum
    over samples of a microbatch has at most B terms (B roundings) and the casts to
    float32 none. Sums over microbatches and ranks are in float32: at most N + 2.
    """
    gradient, size, x, n = exact(problem)
    dim = len(problem.params)
    relative = gamma(dim + 6 + n, u) + gamma(n + 2, U_F32)
    # (The one rounding counted in excess covers the product of the two.)
    bound = relative * (size @ x) / n + tiny
    got, params = trained(problem, *problem.recipe.transforms(), policy)
    assert ((got - gradient).abs() <= bound).all()
    # p - 0.1 g is two roundings in float32; 0.1 is not a float32 either.
    want = problem.params.double() - 0.1 * gradient
    rest = gamma(4, U_F32) * (problem.params.double().abs() + 0.1 * gradient.abs())
    assert ((params - want).abs() <= 0.1 * bound * (1 + gamma(4, U_F32)) + rest).all()


def check_reduce(problem):
    """bfloat16 on the wire of the reductions only, summed in float32.

    Each rank's gradient is rounded once before it is sent, and the sum once: gamma(2)
    of the sum of absolute values, per message. There is one message per step, or one
    per microbatch at stages 2 and 3, whose float32 sum adds nothing of note.
    """
    where = functools.partial(zf.partition, problem.recipe.zero)
    count = zf.accumulate(problem.recipe.num_microbatches)
    want, _ = trained(problem, where(), count)
    got, _ = trained(problem, where(reduce_dtype=torch.bfloat16), count)
    _, size, x, n = exact(problem)
    bound = (gamma(2, U_BF16) + gamma(n + 8, U_F32)) * (size @ x) / n
    assert ((got - want).abs() <= bound).all()


def check_gather(problem):
    """bfloat16 on the wire of the gathers only: the parameters are rounded once.

    The residual moves by at most u sum_j |x_ij w_j|; the rest is in float32.
    """
    where = zf.partition(max(1, problem.recipe.zero), gather_dtype=torch.bfloat16)
    pieces = problem._replace(recipe=Recipe(zero=1))
    got, _ = trained(pieces, where, zf.accumulate(problem.recipe.num_microbatches))
    gradient, size, x, n = exact(problem)
    dim = len(problem.params)
    bound = (U_BF16 + gamma(dim + n + 10, U_F32)) * (size @ x) / n
    assert ((got - gradient).abs() <= bound).all()


@examples(1)
@given(problems())
def test_bfloat16_arithmetic(problem):
    check_compute(problem)


@examples(0.5)
@given(problems())
def test_float16_arithmetic_with_a_loss_scale(problem):
    check_float16(problem)


@examples(0.5)
@given(problems())
def test_bfloat16_reductions(problem):
    check_reduce(problem)


@examples(0.5)
@given(problems())
def test_bfloat16_gathers(problem):
    check_gather(problem)


def test_the_bound_sees_a_bfloat16_optimizer():
    """It is a float32 bound on the parameters: a bfloat16 update would break it."""
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.zeros(2, 3), "y": torch.zeros(2)}
    params = torch.randn(3, generator=generator)
    problem = Linear(Recipe(zero=1), {"data": 2}, params, batch)
    check_compute(problem)
    rounded = problem.params.bfloat16().double()
    assert ((rounded - params.double()).abs() > gamma(4, U_F32) * params.abs()).all()
