# SPDX-License-Identifier: Apache-2.0
"""What travels: dtypes, buckets, and collectives as nodes of a traced program."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

import zfunc as zf
from tests.unit.core.common import traffic, whole_numbers
from zfunc.core import collectives, wire
from zfunc.testing import spmd

ABSTRACT = zf.AbstractMesh({"data": 2})
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


# --- dtypes on the wire -------------------------------------------------------


def vjp_of(make, shape, x, y):
    """Result and pullback of an operator, on all ranks."""

    def run(mesh, x, y):
        def apply(x):
            return collectives.apply(make(mesh), [x])[0]

        out, pull = torch.func.vjp(apply, x)
        return out, pull(y)[0]

    return spmd(run, shape)(x, y)


def test_a_gather_sends_its_wire_dtype_and_reduces_in_the_other():
    x = torch.tensor([[1.001], [2.0]])
    y = torch.tensor([[256.0, 1.0], [1.0, 1.0]], dtype=BF16)
    out, back = vjp_of(
        lambda m: wire.AllGather(m, "data", BF16, F32), {"data": 2}, x, y
    )
    assert out.dtype == BF16
    assert torch.equal(out[0], torch.tensor([1.001, 2.0]).to(BF16))
    assert back.dtype == F32
    assert back.tolist() == [[257.0], [2.0]]  # not rounded to bfloat16


def test_a_reduction_sends_its_wire_dtype_and_returns_what_it_should():
    x = torch.tensor([[1.001, 3.0], [2.0, 256.0]])
    y = torch.ones(2, 1)
    out, back = vjp_of(
        lambda m: wire.PSumScatter(m, "data", BF16, None, (F32,)), {"data": 2}, x, y
    )
    assert out.dtype == back.dtype == F32
    assert out.tolist() == [[3.0], [260.0]]  # 259 in bfloat16, rounded to even
    assert torch.equal(back, torch.ones(2, 2))


@pytest.mark.parametrize("n", [1, 2])
def test_rounding_does_not_depend_on_the_number_of_ranks(n):
    x = torch.full((n, 1), 1.001)
    out = spmd(
        lambda m, x: collectives.apply(wire.AllGather(m, "data", BF16), [x])[0],
        {"data": n},
    )(x)
    assert torch.equal(out[0, 0], torch.tensor(1.001).to(BF16))


# --- buckets ------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([F32, BF16, torch.float64])),
        max_size=12,
    )
)
def test_buckets_keep_order_dtype_and_size(leaves):
    xs = [torch.full((n,), i, dtype=d) for i, (n, d) in enumerate(leaves)]
    seen = []

    def record(bucket):
        seen.append(bucket)
        return [x + 1 for x in bucket]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire, "BUCKET_BYTES", 128)
        patch.setattr(wire, "ALONE_BYTES", 64)
        ys = wire._by_bucket(record, xs)
    assert len(ys) == len(xs)
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(y, x + 1)
    for bucket in seen:
        assert len({x.dtype for x in bucket}) == 1
        assert len(bucket) == 1 or all(x.nbytes < 64 for x in bucket)
        assert len(bucket) == 1 or sum(x.nbytes for x in bucket) <= 128


def gathered(leaves):
    op = wire.AllGather(ABSTRACT, "data")
    return collectives.apply(op, leaves)


def test_small_tensors_share_messages_and_large_ones_go_alone(monkeypatch):
    leaves = [torch.ones(4)] * 8 + [torch.ones(64)] * 2  # 16 and 256 bytes each
    monkeypatch.setattr(wire, "BUCKET_BYTES", 64)
    monkeypatch.setattr(wire, "ALONE_BYTES", 128)
    messages = traffic(gathered, leaves)
    assert sorted(m.sent for m in messages) == [64, 64, 256, 256]
    monkeypatch.setattr(wire, "BUCKET_BYTES", 1)
    assert len(traffic(gathered, leaves)) == 10
    monkeypatch.setattr(wire, "BUCKET_BYTES", 2**20)
    monkeypatch.setattr(wire, "ALONE_BYTES", 2**20)
    assert [m.sent for m in traffic(gathered, leaves)] == [640]


def test_one_message_per_dtype():
    leaves = [torch.ones(2), torch.ones(2, dtype=BF16), torch.ones(3)]
    messages = traffic(gathered, leaves)
    assert len(messages) == 2
    assert {(m.dtype, m.sent) for m in messages} == {(BF16, 4), (F32, 20)}


@pytest.mark.parametrize("kind", [wire.AllGather, wire.PSumScatter, wire.PSum])
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.integers(1, 3))
def test_a_bucket_is_its_tensors_one_by_one(kind, rows, n):
    """The packing of a message, with the transport replaced by its definition."""
    mesh = zf.AbstractMesh({"data": n})
    ranks = [
        [whole_numbers(r * n, 2, seed=10 * i + j) for i, r in enumerate(rows)]
        for j in range(n)
    ]
    flats = [wire._flatten(xs, n if kind is wire.PSumScatter else 0)[0] for xs in ranks]
    total = sum(flats)

    class Me(kind):
        rank = 0

        def run(self, x):
            if kind is wire.AllGather:
                return torch.cat(flats)
            return total if kind is wire.PSum else total[self.rank]

    for rank in range(n):
        Me.rank = rank
        got = Me(mesh, "data").run_bucket(ranks[rank])
        for i, y in enumerate(got):
            stacked = torch.stack([xs[i] for xs in ranks])
            want = spmd(
                lambda m, x: collectives.apply(kind(m, "data"), [x])[0], {"data": n}
            )(stacked)[rank]
            assert torch.equal(y, want)


# --- as nodes of a program ----------------------------------------------------

PROGRAMS = {
    "all_gather": (lambda x, m: zf.all_gather(x, "data", m), "all_gather_into_tensor"),
    "psum": (lambda x, m: zf.psum(x, "data", m), "all_reduce"),
    "pmean": (lambda x, m: zf.pmean(x, "data", m), "all_reduce"),
    "psum_scatter": (
        lambda x, m: zf.psum_scatter(x, "data", m),
        "reduce_scatter_tensor",
    ),
    "ppermute": (
        lambda x, m: zf.ppermute(x, "data", m, [(0, 1), (1, 0)]),
        "all_to_all_single",
    ),
    "all_to_all": (
        lambda x, m: zf.all_to_all(x, "data", m, split_dim=0, concat_dim=0),
        "all_to_all_single",
    ),
}
BACK = {
    "all_gather_into_tensor": "reduce_scatter_tensor",
    "reduce_scatter_tensor": "all_gather_into_tensor",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all_single",
}


def nodes(graph):
    return [
        node.target.name().split("::")[1]
        for node in graph.graph.nodes
        if getattr(node.target, "namespace", "") == "_c10d_functional"
        and "wait_tensor" not in str(node.target)
    ]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_collective_is_one_node(name):
    fn, node = PROGRAMS[name]
    program = functools.partial(fn, m=ABSTRACT)
    traced = make_fx(program, tracing_mode="fake")(torch.ones(8, 2))
    assert nodes(traced) == [node]


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_gradient_is_the_transposed_node(name):
    fn, node = PROGRAMS[name]

    def loss(x):
        return (fn(x, m=ABSTRACT) ** 2).sum()

    traced = make_fx(zf.value_and_grad(loss), tracing_mode="fake")(torch.ones(8, 2))
    assert nodes(traced) == [node, BACK[node]]


def test_every_collective_is_waited_for():
    def loss(x):
        return (zf.psum_scatter(x, "data", ABSTRACT) ** 2).sum()

    graph = make_fx(zf.value_and_grad(loss), tracing_mode="fake")(torch.ones(8)).graph
    for node in graph.nodes:
        is_collective = getattr(node.target, "namespace", "") == "_c10d_functional"
        if is_collective and "wait_tensor" not in str(node.target):
            assert all("wait_tensor" in str(user.target) for user in node.users)


def test_a_mesh_of_one_rank_sends_nothing():
    mesh = zf.AbstractMesh({"data": 1})

    def program(x):
        y = zf.all_gather(x, "data", mesh)
        return zf.psum_scatter(zf.psum(y, "data", mesh), "data", mesh)

    assert nodes(make_fx(program, tracing_mode="fake")(torch.ones(4))) == []
