# SPDX-License-Identifier: Apache-2.0
"""Every collective is a linear map whose transpose, jvp and vmap rules are its own.

Numbers are small integers in float64, so that identities hold to the last bit.
"""

import functools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import one_rank, whole_numbers
from zfunc.core import collectives, wire
from zfunc.core.errors import MeshError
from zfunc.core.mesh import Mesh
from zfunc.testing import spmd

MESHES = st.one_of(
    st.integers(1, 4).map(lambda n: {"data": n}),
    st.sampled_from([{"data": 2, "tensor": 2}, {"tensor": 3, "data": 2}]),
)


class Case(NamedTuple):
    """A collective on a mesh: ``op(mesh, x)`` for an x of the local shape."""

    name: str
    shape: dict[str, int]
    local: tuple[int, ...]
    dim: int
    seed: int

    @property
    def n(self):
        return self.shape["data"]

    @property
    def size(self):
        return math.prod(self.shape.values())

    def op(self, mesh, x):
        return OPS[self.name](self, mesh, x)

    def x(self, seed=0):
        return whole_numbers(self.size, *self.local, seed=self.seed + seed)

    def run(self, *xs):
        return spmd(self.op, self.shape)(*xs)

    def every_rank(self, fn):
        return spmd(fn, self.shape)


def _ring(case):
    return [(r, (r + 1) % case.n) for r in range(case.n)]


def _chain(case):
    return [(r, r + 1) for r in range(case.n - 1)]


def _slice(case, mesh, x):
    return collectives.apply(wire.AxisSlice(mesh, "data"), [x])[0]


def _place(case, mesh, x):
    return collectives.apply(wire.AxisPlace(mesh, "data"), [x])[0]


OPS = {
    "all_gather": lambda c, m, x: zf.all_gather(x, "data", m, dim=c.dim),
    "psum": lambda c, m, x: zf.psum(x, "data", m),
    "pmean": lambda c, m, x: zf.pmean(x, "data", m) * c.n,
    "psum_scatter": lambda c, m, x: zf.psum_scatter(x, "data", m, dim=c.dim),
    "ring": lambda c, m, x: zf.ppermute(x, "data", m, _ring(c)),
    "chain": lambda c, m, x: zf.ppermute(x, "data", m, _chain(c)),
    "all_to_all": lambda c, m, x: zf.all_to_all(
        x, "data", m, split_dim=c.dim, concat_dim=0
    ),
    "slice": _slice,
    "place": _place,
}


@st.composite
def cases(draw):
    name = draw(st.sampled_from(sorted(OPS)))
    shape = draw(MESHES)
    local = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = draw(st.integers(0, len(local) - 1))
    for d in {0, dim}:  # ops that split need a dim that divides
        local[d] *= shape["data"]
    return Case(name, shape, tuple(local), dim, draw(st.integers(0, 99)))


def rank_rows(case, x):
    """Stacked values with the data axis first and all others second."""
    position = list(case.shape).index("data")
    rows = x.unflatten(0, list(case.shape.values())).movedim(position, 0)
    return rows.unsqueeze(1) if len(case.shape) == 1 else rows


def expected(case, x):
    """What each collective is, by its definition, for one column of ranks."""
    n, dim = case.n, case.dim
    if case.name == "all_gather":
        return [torch.cat(list(x), dim)] * n
    if case.name in ("psum", "pmean"):
        return [x.sum(0)] * n
    if case.name == "psum_scatter":
        return list(x.sum(0).chunk(n, dim))
    if case.name in ("ring", "chain"):
        pairs = _ring(case) if case.name == "ring" else _chain(case)
        source = {target: s for s, target in pairs}
        return [x[source[r]] if r in source else 0 * x[0] for r in range(n)]
    if case.name == "all_to_all":
        return [torch.cat([row.chunk(n, dim)[r] for row in x], 0) for r in range(n)]
    if case.name == "slice":
        return [x[r].chunk(n)[r] for r in range(n)]
    blocks = [[x[r] if i == r else 0 * x[r] for i in range(n)] for r in range(n)]
    return [torch.cat(row) for row in blocks]


@given(cases())
def test_forward_is_the_definition(case):
    x = case.x()
    columns = rank_rows(case, x)
    got = rank_rows(case, case.run(x))
    for i in range(columns.shape[1]):
        want = torch.stack(expected(case, columns[:, i]))
        assert torch.equal(got[:, i], want)


@given(cases())
def test_the_pullback_is_the_transpose(case):
    x = case.x()
    y = whole_numbers(*case.run(x).shape, seed=case.seed + 1)

    def pulled(mesh, x, y):
        return torch.func.vjp(functools.partial(case.op, mesh), x)[1](y)[0]

    back = case.every_rank(pulled)(x, y)
    assert back.shape == x.shape
    assert (case.run(x) * y).sum() == (x * back).sum()


@given(cases())
def test_the_tangent_goes_through_the_same_operator(case):
    x, t = case.x(), case.x(seed=1)

    def pushed(mesh, x, t):
        return torch.func.jvp(functools.partial(case.op, mesh), (x,), (t,))

    value, tangent = case.every_rank(pushed)(x, t)
    assert torch.equal(value, case.run(x))
    assert torch.equal(tangent, case.run(t))


@pytest.mark.parametrize("mode", ["reverse over reverse", "forward over reverse"])
@settings(max_examples=40)
@given(cases())
def test_second_derivatives(mode, case):
    """The Hessian of the sum over ranks of the sum of (A x)^3, times v."""
    x, v = case.x(), case.x(seed=1)

    def cubes(mesh, x):
        return (case.op(mesh, x) ** 3).sum()

    def product(mesh, x, v):
        gradient = torch.func.grad(functools.partial(cubes, mesh))
        if mode == "forward over reverse":
            return torch.func.jvp(gradient, (x,), (v,))[1]
        return torch.func.vjp(gradient, x)[1](v)[0]

    def want(mesh, x, v):
        y, pull = torch.func.vjp(functools.partial(case.op, mesh), x)
        return pull(6 * y * case.op(mesh, v))[0]

    assert torch.equal(case.every_rank(product)(x, v), case.every_rank(want)(x, v))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@settings(max_examples=40)
@given(cases())
def test_an_inner_vmap_is_a_loop(in_dim, case):
    batch = torch.stack([case.x(seed=i) for i in range(3)], 1)  # [ranks, 3, ...]

    def batched(mesh, xs):
        moved = xs.movedim(0, in_dim)
        return torch.func.vmap(functools.partial(case.op, mesh), in_dims=in_dim)(moved)

    want = torch.stack([case.run(batch[:, i]) for i in range(3)], 1)
    assert torch.equal(case.every_rank(batched)(batch), want)


@settings(max_examples=40)
@given(cases())
def test_per_sample_gradients(case):
    """grad inside vmap inside the mesh: the usual recipe for per-sample gradients."""
    batch = torch.stack([case.x(seed=i) for i in range(3)], 1)

    def squares(mesh, x):
        return (case.op(mesh, x) ** 2).sum()

    def batched(mesh, xs):
        return torch.func.vmap(torch.func.grad(functools.partial(squares, mesh)))(xs)

    def one(mesh, x):
        return torch.func.grad(functools.partial(squares, mesh))(x)

    want = torch.stack([case.every_rank(one)(batch[:, i]) for i in range(3)], 1)
    assert torch.equal(case.every_rank(batched)(batch), want)


@given(cases())
def test_a_tree_is_its_leaves(case):
    x, other = case.x(), case.x(seed=1)

    def both(mesh, tree):
        return {k: case.op(mesh, v) for k, v in tree.items()}

    def together(mesh, tree):
        if case.name in ("slice", "place"):
            return both(mesh, tree)
        return case.op(mesh, tree)

    if case.name == "pmean":
        return  # `* n` is the test's, for tensors
    tree = {"a": x, "b": other}
    got, want = case.every_rank(together)(tree), case.every_rank(both)(tree)
    assert torch.equal(got["a"], want["a"])
    assert torch.equal(got["b"], want["b"])


# --- dims, dtypes, trees ------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", ["all_gather", "psum_scatter"])
def test_a_negative_dim_counts_from_the_end(name, n):
    x = whole_numbers(n, 2 * n, 4 * n)
    op = getattr(zf, name)
    got = spmd(lambda m, x: op(x, "data", m, dim=-1), {"data": n})(x)
    want = spmd(lambda m, x: op(x, "data", m, dim=1), {"data": n})(x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("split", "concat"), [(-1, 0), (0, -1), (-2, -1), (-1, -1)])
def test_negative_dims_of_all_to_all_count_from_the_end(split, concat, n):
    x = whole_numbers(n, 4, 4)

    def run(s, c):
        return spmd(
            lambda m, x: zf.all_to_all(x, "data", m, split_dim=s, concat_dim=c),
            {"data": n},
        )(x)

    assert torch.equal(run(split, concat), run(split % 2, concat % 2))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_all_to_all_twice_is_the_identity(n):
    x = whole_numbers(n, 2 * n, 3 * n)

    def there_and_back(mesh, x):
        y = zf.all_to_all(x, "data", mesh, split_dim=1, concat_dim=0)
        return zf.all_to_all(y, "data", mesh, split_dim=0, concat_dim=1)

    assert torch.equal(spmd(there_and_back, {"data": n})(x), x)


def test_scalars_and_empty_leaves():
    tree = {"scalar": torch.tensor([1.0, 2.0]), "none": torch.ones(2, 0, 3)}
    total = spmd(lambda m, t: zf.psum(t, "data", m), {"data": 2})(tree)
    assert torch.equal(total["scalar"], torch.tensor([3.0, 3.0]))
    assert total["none"].shape == (2, 0, 3)
    gathered = spmd(lambda m, t: zf.all_gather(t, "data", m), {"data": 2})
    assert gathered(tree["none"]).shape == (2, 0, 3)
    assert zf.psum({"a": None, "b": []}, "data", one_rank()) == {"a": None, "b": []}


def test_integers_add_up_exactly():
    x = torch.tensor([2**60, 1, 2**60])
    total = spmd(lambda m, x: zf.psum(x, "data", m), {"data": 3})(x)
    assert total.tolist() == [2**61 + 1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sums_are_rounded_once(dtype):
    x = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=dtype)  # 256 + 1 is 256 in bfloat16
    total = spmd(lambda m, x: zf.psum(x, "data", m), {"data": 4})(x)
    assert total.dtype == dtype
    assert total.tolist() == [float(torch.tensor(259.0).to(dtype))] * 4


def test_leaves_of_several_dtypes_keep_theirs():
    tree = {
        "f64": torch.ones(2, 4, dtype=torch.float64),
        "bf16": torch.ones(2, 4, dtype=torch.bfloat16),
        "f32": torch.ones(2, 4),
        "int": torch.ones(2, 4, dtype=torch.int64),
    }
    total = spmd(lambda m, t: zf.psum(t, "data", m), {"data": 2})(tree)
    assert {k: x.dtype for k, x in total.items()} == {
        k: x.dtype for k, x in tree.items()
    }
    assert all((x == 2).all() for x in total.values())


@pytest.mark.parametrize("mode", ["grad", "jvp"])
def test_integer_leaves_beside_differentiated_ones(mode):
    def run(x):
        tree = zf.psum({"x": x, "n": torch.arange(2)}, "data", one_rank())
        return (tree["x"] * tree["n"]).sum()

    x = torch.tensor([3.0, 5.0])
    if mode == "grad":
        assert torch.func.grad(run)(x).tolist() == [0.0, 1.0]
    else:
        assert torch.func.jvp(run, (x,), (torch.ones(2),))[1] == 1.0


def test_a_leaf_without_a_tangent_beside_one_with():
    def run(mesh, x):
        tree = zf.psum({"x": x, "c": torch.ones(2)}, "data", mesh)
        return tree["x"] * tree["c"]

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pushed = spmd(
        lambda m, x: torch.func.jvp(functools.partial(run, m), (x,), (x,))[1],
        {"data": 2},
    )
    assert pushed(x).tolist() == [[8.0, 12.0]] * 2


def test_the_transpose_of_a_slice_does_not_spread_infinities():
    """Nothing travels, so what is not finite in one rank stays on that rank."""

    def pulled(mesh, x, y):
        op = wire.AxisSlice(mesh, "data")
        return torch.func.vjp(lambda x: collectives.apply(op, [x])[0], x)[1](y)[0]

    inf = float("inf")
    back = spmd(pulled, {"data": 2})(torch.ones(2, 4), torch.tensor([[inf, 1]] * 2))
    assert back.tolist() == [[inf, 1, 0, 0], [0, 0, inf, 1]]


# --- misuse -------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda m: zf.psum_scatter(torch.ones(3), "data", m),
        lambda m: zf.psum_scatter(torch.ones(()), "data", m),
        lambda m: zf.psum_scatter(torch.ones(4, 3), "data", m, dim=1),
        lambda m: zf.all_to_all(torch.ones(3), "data", m, split_dim=0, concat_dim=0),
    ],
)
def test_a_dim_that_does_not_divide(use):
    with pytest.raises(MeshError, match="into 2 equal chunks"):
        use(zf.AbstractMesh({"data": 2}))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 1), (0, 0)], "a rank appears twice"),
        ([(0, 1), (1, 1)], "a rank appears twice"),
        ([(0, 2)], r"ranks are 0..1"),
        ([(-1, 0)], r"ranks are 0..1"),
    ],
)
def test_pairs_that_are_no_permutation(pairs, message):
    with pytest.raises(MeshError, match=message):
        zf.ppermute(torch.ones(1), "data", zf.AbstractMesh({"data": 2}), pairs)


@pytest.mark.parametrize("n", [1, 2])
def test_gathering_a_scalar_is_refused(n):
    gather = spmd(lambda m, x: zf.all_gather(x, "data", m), {"data": n})
    with pytest.raises(MeshError, match="0-d"):
        gather(torch.ones(n))


def test_ranks_that_do_not_exist():
    with pytest.raises(MeshError, match="is abstract: it has no ranks to talk to"):
        zf.psum(torch.ones(1), "data", zf.AbstractMesh({"data": 2}))
    outside = Mesh((("data", 2),), "simulated")
    with pytest.raises(MeshError, match="outside of the simulation"):
        zf.psum(torch.ones(1), "data", outside)
