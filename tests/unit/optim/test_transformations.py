# SPDX-License-Identifier: Apache-2.0
"""What every transformation owes: purity, dtypes, placement, and running anywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from zfunc.core.mesh import Mesh, make_mesh
from zfunc.core.sharding import NamedSharding, P, is_sharded, place, replicate
from zfunc.core.tree import (
    leaves_with_path,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from zfunc.optim import (
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    clip_by_value,
    decay_matrices,
    identity,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
    warmup_cosine,
)

SCHEDULE = warmup_cosine(0.1, 1, 5)
TXS = {
    "identity": identity(),
    "decay": add_decayed_weights(0.1),
    "decay_matrices": add_decayed_weights(0.1, decay_matrices),
    "clip_by_global_norm": clip_by_global_norm(0.7),
    "clip_by_value": clip_by_value(0.2),
    "trace": trace(0.9),
    "trace_nesterov": trace(0.9, nesterov=True),
    "trace_dampened": trace(0.9, dampening=0.5),
    "scale_by_adam": scale_by_adam(),
    "scale_by_learning_rate": scale_by_learning_rate(SCHEDULE),
    "sgd": sgd(0.1, momentum=0.9, weight_decay=0.1),
    "adam": adam(0.1, weight_decay=0.1),
    "adamw": adamw(SCHEDULE, mask=decay_matrices),
    "clipped_adamw": chain(clip_by_global_norm(0.7), adamw(SCHEDULE)),
}
every_tx = pytest.mark.parametrize("tx", TXS.values(), ids=TXS.keys())


def tree(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {"layers": [{"b": randn(3), "w": randn(5, 3)}], "scale": randn()}


def run(tx, params, grads):
    moments = tx.init(params)
    for g in grads:
        updates, moments = tx.update(g, moments, params)
        params = apply_updates(params, updates)
    return params, moments


def placed(full, mesh):
    def one(x):
        return place(x, NamedSharding(mesh, P("data") if x.dim() else P()))

    return tree_map(one, full)


def assert_equal(a, b):
    assert tree_structure(a) == tree_structure(b)
    for (path, x), y in zip(leaves_with_path(a), tree_leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        assert torch.equal(x, y), path


# --- pure functions ------------------------------------------------------------


@every_tx
def test_update_leaves_its_inputs_alone(tx):
    params, grads = tree(0), tree(1)
    _, moments = run(tx, params, [tree(2)])
    given_ = (params, grads, moments)
    before = tree_map(torch.clone, given_)
    versions = [x._version for x in tree_leaves(given_)]
    first = tx.update(grads, moments, params)
    second = tx.update(grads, moments, params)
    assert_equal(given_, before)
    assert [x._version for x in tree_leaves(given_)] == versions
    assert_equal(first, second)


@every_tx
def test_moments_keep_structure_and_dtypes(tx):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        params = tree(0, dtype)
        moments = tx.init(params)
        _, after = tx.update(tree(1, dtype), moments, params)
        assert tree_structure(after) == tree_structure(moments)
        for x, y in zip(tree_leaves(after), tree_leaves(moments), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
        leaves, spec = tree_flatten(after)
        assert_equal(tree_unflatten(spec, leaves), after)


@every_tx
def test_no_transformation_looks_at_values(tx):
    # On fake tensors reading a value raises; init also has to work without storage.
    with FakeTensorMode():
        params = tree_map(lambda x: torch.empty(x.shape), tree(0))
        result = run(tx, params, [params, params])
        assert tree_structure(result[0]) == tree_structure(params)
    meta = tree_map(lambda x: x.to("meta"), tree(0))
    assert tree_structure(tx.init(meta)) == tree_structure(tx.init(tree(0)))


@every_tx
def test_a_traced_update_has_no_step_baked_in(tx):
    params, moments = tree(0), tx.init(tree(0))
    leaves, spec = tree_flatten((tree(1), moments, params))

    def flat(*xs):
        return tree_flatten(tx.update(*tree_unflatten(spec, xs)))[0]

    program = make_fx(flat)(*leaves)
    for seed in (2, 3):
        _, moments = run(tx, params, [tree(4)] * seed)
        now = (tree(seed), moments, params)
        assert_equal(program(*tree_leaves(now)), tree_leaves(tx.update(*now)))


@every_tx
def test_update_under_vmap_is_update_of_each(tx):
    rows = [tree(seed) for seed in range(6)]
    stacked = tree_map(lambda *xs: torch.stack(xs), *rows[:3])
    grads = tree_map(lambda *xs: torch.stack(xs), *rows[3:])
    spec = tree_structure(rows[0])

    def flat(*xs):
        ps, gs = xs[: len(xs) // 2], xs[len(xs) // 2 :]
        g = tree_unflatten(spec, gs)
        return tuple(tree_leaves(run(tx, tree_unflatten(spec, ps), [g, g])))

    together = torch.vmap(flat)(*tree_leaves(stacked), *tree_leaves(grads))
    for i in range(3):
        alone = tree_leaves(run(tx, rows[i], [rows[i + 3]] * 2))
        for x, y in zip(together, alone, strict=True):
            # Bitwise but for the norm, a sum whose order is not that of each alone.
            torch.testing.assert_close(x[i], y, rtol=1e-14, atol=1e-15)


def test_an_empty_tree_has_moments_too():
    for tx in TXS.values():
        params, moments = run(tx, {}, [{}, {}])
        assert params == {}
        assert all(x.device.type == "cpu" for x in tree_leaves(moments))


# --- dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_narrow_parameters_are_float32(dtype):
    moments = chain(trace(0.9), scale_by_adam()).init(tree(0, dtype))
    dtypes = {x.dtype for x in tree_leaves(moments) if x.dtype != torch.int64}
    assert dtypes == {torch.float32}
    assert [m.count.dtype for m in moments] == [torch.int64] * 2


@every_tx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_get_the_update_of_wide_ones(tx, dtype):
    params, grads = tree(0, dtype), tree(1, dtype)
    wide_params, wide_grads = tree_map(lambda x: x.float(), (params, grads))
    updates, moments = tx.update(grads, tx.init(params), params)
    expected, wide_moments = tx.update(wide_grads, tx.init(wide_params), wide_params)
    assert_equal(tree_map(lambda u: u.float(), updates), expected)
    assert_equal(moments, wide_moments)
    rounded = tree_map(lambda p, u: (p + u).to(dtype), wide_params, expected)
    assert_equal(apply_updates(params, updates), rounded)


def test_small_updates_are_not_rounded_before_they_are_added():
    p = torch.tensor([256.0], dtype=torch.bfloat16)
    assert apply_updates(p, torch.tensor([1.001])).item() == 258
    assert (p + torch.tensor([1.001]).to(p.dtype)).item() == 256


# --- the algebra ---------------------------------------------------------------


def test_identity_is_the_unit_of_chain_and_chain_is_associative():
    params, grads = tree(0), [tree(1), tree(2)]
    a, b, c = clip_by_value(0.5), trace(0.9), scale_by_learning_rate(0.1)
    expected, _ = run(chain(a, b, c), params, grads)
    for tx in (
        chain(identity(), a, b, c),
        chain(a, b, c, identity()),
        chain(chain(a, b), c),
        chain(a, chain(b, c)),
    ):
        assert_equal(run(tx, params, grads)[0], expected)
    assert chain().init(params) == ()
    assert_equal(chain().update(grads[0], (), params)[0], grads[0])


def test_chain_applies_its_parts_from_left_to_right():
    u = torch.tensor([3.0])
    for parts, expected in (
        ((clip_by_value(1.0), scale_by_learning_rate(2.0)), -2.0),
        ((scale_by_learning_rate(2.0), clip_by_value(1.0)), -1.0),
    ):
        tx = chain(*parts)
        assert tx.update(u, tx.init(u), u)[0].item() == expected


def test_moments_are_the_tuple_of_the_parts():
    moments = adamw(0.1).init(tree(0))
    assert [type(m).__name__ for m in moments] == [
        "ScaleByAdamMoments",
        "tuple",
        "ScaleByLearningRateMoments",
    ]
    assert moments[1] == ()
    mu, nu = moments[0].mu, moments[0].nu
    shared = {x.data_ptr() for x in tree_leaves(mu)} & {
        x.data_ptr() for x in tree_leaves(nu)
    }
    assert not shared


# --- masks ---------------------------------------------------------------------


@given(st.sets(st.sampled_from(["layers/0/b", "layers/0/w", "scale"])))
def test_a_mask_picks_leaves_by_path(decayed):
    params, grads = tree(0), tree(1)
    tx = add_decayed_weights(0.5, lambda path, leaf: path in decayed)
    updates, _ = tx.update(grads, tx.init(params), params)
    rows = zip(
        leaves_with_path(params), tree_leaves(grads), tree_leaves(updates), strict=True
    )
    for (path, p), g, u in rows:
        assert torch.equal(u, g + 0.5 * p if path in decayed else g), path


def test_a_mask_sees_placed_leaves_and_their_global_shapes():
    seen = []

    def mask(path, leaf):
        seen.append((path, is_sharded(leaf), leaf.global_shape))
        return decay_matrices(path, leaf)

    params = placed(tree(0), make_mesh({"data": 1}))
    tx = adamw(0.1, mask=mask)
    moments = tx.init(params)
    assert seen == [
        ("layers/0/b", True, (3,)),
        ("layers/0/w", True, (5, 3)),
        ("scale", True, ()),
    ]
    zeros = tree_map(torch.zeros_like, params)
    updates, _ = tx.update(zeros, moments, params)
    assert not updates["layers"][0]["b"].buffer.any()
    assert updates["layers"][0]["w"].buffer.all()


# --- placement -----------------------------------------------------------------


@every_tx
def test_moments_are_placed_like_the_parameters(tx):
    mesh = make_mesh({"data": 1})
    full = tree(0)
    moments = tx.init(placed(full, mesh))
    assert_equal(replicate(moments), tx.init(full))
    places = {path: leaf.sharding for path, leaf in _placed(placed(full, mesh))}
    for path, leaf in _placed(moments):
        assert leaf.sharding == places[_parameter(path, places)]
    wide = [x for x in tree_leaves(moments) if x.dtype != torch.int64]
    assert len(list(_placed(moments))) == len(wide)


def _placed(tree_):
    pairs = leaves_with_path(tree_, is_sharded)
    return [(path, leaf) for path, leaf in pairs if is_sharded(leaf)]


def _parameter(path, places):
    return next(p for p in places if path.endswith(p))


@every_tx
def test_placed_updates_are_those_of_plain_trees(tx):
    mesh = make_mesh({"data": 1})
    params, grads = tree(0), [tree(1), tree(2)]
    sharded = run(tx, placed(params, mesh), [placed(g, mesh) for g in grads])
    assert_equal(replicate(sharded), run(tx, params, grads))


@every_tx
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_ranks_together_make_the_unsharded_update(tx, size):
    # dims of 5 and 3 do not divide: some ranks hold padding, and it stays zero.
    params, grads = tree(0), [tree(1), tree(2)]
    spec = None

    def on_rank(rank):
        nonlocal spec
        mesh = Mesh((("data", size),), "simulated", rank=rank)
        result = run(tx, placed(params, mesh), [placed(g, mesh) for g in grads])
        leaves, spec = tree_flatten(replicate(result))
        return tuple(leaves), tuple(tree_leaves(result[0]))

    whole, pieces = torch.vmap(on_rank)(torch.arange(size))
    expected = tree_leaves(run(tx, params, grads))
    for x, y in zip(whole, expected, strict=True):
        for row in x:
            torch.testing.assert_close(row, y, rtol=1e-13, atol=1e-14)
    for piece, p in zip(pieces, tree_leaves(params), strict=True):
        if p.dim():
            assert not piece.flatten(0, 1)[p.shape[0] :].any()
