# SPDX-License-Identifier: Apache-2.0
"""``jit(donate=True)``: the program owns what it is given, nobody else loses a bit."""

import gc
import mmap
import weakref

import numpy as np
import pytest
import torch

import zfunc as zf
from tests.unit.core.common import (
    alone,
    assert_bitwise,
    example_batch,
    example_params,
    randn,
)
from tests.unit.transforms.test_donation import OPTIMIZERS, USES, loss
from zfunc.core.errors import DonatedBufferError, PlacementError
from zfunc.core.sharding import Sharded
from zfunc.core.tree import leaves_with_path, tree_leaves
from zfunc.optim.base import stateless
from zfunc.program import jit as jit_module
from zfunc.program.donated import held
from zfunc.program.passes.batch_updates import batch_updates

IN_PLACE = (batch_updates(),)
ADAM = zf.optim.chain(zf.optim.clip_by_global_norm(0.1), zf.optim.adamw(0.1))


def jit(step, *, donate=True, passes=IN_PLACE):
    """With the pass that makes programs write over what they are given."""
    return jit_module.jit(step, donate=donate, passes=passes)


def fresh(tx=ADAM, params=None):
    return zf.shard(params or example_params(), alone(), tx=tx)


def copied(state):
    return zf.tree_map(torch.clone, state)


def train(step, state, steps=3):
    for _ in range(steps):
        state = step(state, example_batch())
    return copied(state)


# --- the same bits ------------------------------------------------------------


@pytest.mark.parametrize("passes", [(), IN_PLACE], ids=["no pass", "in place"])
@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("up_front", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_with_every_optimizer(name, up_front, donate, passes):
    tx = OPTIMIZERS[name]
    step, given = zf.train_step(loss, tx), tx if up_front else None
    got = train(jit(step, donate=donate, passes=passes), fresh(given))
    assert_bitwise(got, train(step, fresh(given)))


def test_parameters_and_moments_stay_where_they_are(program):
    state = program(fresh(), example_batch())
    places = [x.data_ptr() for x in tree_leaves((state.params, state.moments))]
    state = program(state, example_batch())
    now = tree_leaves((state.params, state.moments))
    moved = [x for x, p in zip(now, places, strict=True) if x.data_ptr() != p]
    assert all(x.dim() == 0 for x in moved)  # the counts, which stay readable
    assert len(moved) <= 2


def test_an_undonated_state_is_untouched():
    state = train(zf.train_step(loss, ADAM), fresh())
    before = copied(state)
    jit(zf.train_step(loss, ADAM), donate=False)(state, example_batch())
    assert_bitwise(state, before)


# --- what is left of a donated state ------------------------------------------


@pytest.fixture(scope="module")
def program():
    return jit(zf.train_step(loss, ADAM))


@pytest.fixture
def dead(program):
    state = program(fresh(), example_batch())
    program(state, example_batch())
    return state


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_buffer_raises(dead, use):
    with pytest.raises(DonatedBufferError, match=r"state.params\['w'\] was donated"):
        USES[use](dead.params["w"].buffer)


def test_every_leaf_names_itself(dead):
    for field in ("params", "grads", "moments"):
        tree = getattr(dead, field)
        for path, leaf in leaves_with_path(tree, lambda x: isinstance(x, Sharded)):
            if isinstance(leaf, Sharded):
                with pytest.raises(DonatedBufferError) as caught:
                    leaf.buffer.sum()
                assert f"state.{field}[{path!r}] was" in str(caught.value)


def test_a_second_step_on_it_raises(program, dead):
    for step in (program, jit(zf.train_step(loss, ADAM)), zf.train_step(loss, ADAM)):
        with pytest.raises(DonatedBufferError, match="was donated"):
            step(dead, example_batch())


def test_step_key_metrics_and_counts_stay_readable(dead):
    assert int(dead.step) == 1
    assert int(dead.key) == 0
    assert dead.metrics.loss.isfinite()
    assert int(dead.moments[1][0].count) == 1


def test_the_old_gradients_are_freed_before_the_program_starts(program):
    state = program(fresh(), example_batch())
    seen = [weakref.ref(leaf) for leaf in tree_leaves(state.grads)]
    alive = []
    executable = next(iter(program._cache.values()))

    def run(tensors):
        alive.extend(ref() is not None for ref in seen)
        return executable.run(tensors)

    spied = jit(zf.train_step(loss, ADAM))
    spied._cache[next(iter(program._cache))] = executable._replace(run=run)
    spied(state, example_batch())
    assert alive == [False] * len(seen)


# --- nobody else loses a bit --------------------------------------------------

w = "w"
KEPT = {
    "the tensor": lambda s: s.params[w].buffer,
    "a node": lambda s: zf.tree_map(lambda x: x, s.params),
    "a view": lambda s: s.params[w].buffer[1:],
    "a transpose": lambda s: s.params[w].buffer.t(),
    "detached": lambda s: s.params[w].buffer.detach(),
    "data": lambda s: s.params[w].buffer.data,
    "numpy": lambda s: s.params[w].buffer.numpy(),
    "numpy slice": lambda s: s.params[w].buffer.numpy()[1:],
    "memoryview": lambda s: memoryview(s.params[w].buffer.numpy()),
    "dlpack": lambda s: np.from_dlpack(s.params[w].buffer),
    "from_dlpack": lambda s: torch.from_dlpack(s.params[w].buffer),
    "storage": lambda s: s.params[w].buffer.untyped_storage(),
    "moments": lambda s: tree_leaves(s.moments),
    "whole state": lambda s: zf.tree_map(lambda x: x, s),
    "unshard": lambda s: zf.unshard(s),
    "as DTensor holds it": lambda s: s.params[w].buffer.view_as(s.params[w].buffer),
}


def values(kept):
    """The kept thing's numbers, in new memory."""
    if isinstance(kept, torch.UntypedStorage):
        return torch.tensor(kept.tolist())
    if isinstance(kept, (np.ndarray, memoryview)):
        return torch.tensor(np.asarray(kept).copy())
    return zf.tree_map(
        lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, kept
    )


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("started", [True, False])
def test_what_was_taken_before_keeps_its_values(program, name, started):
    step = zf.train_step(loss, ADAM)
    state = program(fresh(), example_batch()) if started else fresh()
    want = copied(step(copied(state), example_batch()))
    kept = KEPT[name](state)
    before = values(kept)
    got = program(state, example_batch())
    after = values(kept)
    assert_bitwise(tree_leaves(after), tree_leaves(before))
    assert_bitwise(got, want)


def test_a_tensor_saved_for_a_backward_keeps_its_values(program):
    state = fresh()
    x = torch.ones(5, 4, dtype=torch.float64, requires_grad=True)
    product = (x * state.params["w"].buffer).sum()
    want = state.params["w"].buffer.clone()
    program(state, example_batch())
    product.backward()
    assert torch.equal(x.grad, want)


def _seen_by_another_process(x):
    """An array over the same shared memory, which no count of torch's knows of."""
    size_bytes = x.untyped_storage().nbytes()
    handle = x.untyped_storage()._share_fd_cpu_()[0]
    memory = mmap.mmap(handle, size_bytes)
    return np.frombuffer(memory, np.float64).reshape(x.shape)


@pytest.mark.parametrize("how", ["from_numpy", "shared", "inference"])
def test_memory_that_torch_does_not_count_keeps_its_values(how):
    params = example_params()
    state = fresh(params=params)
    node = state.params["w"]
    if how == "from_numpy":
        array = params["w"].numpy().copy()
        mine = torch.from_numpy(array)
    elif how == "shared":
        mine = params["w"].clone().share_memory_()
        array = _seen_by_another_process(mine)
    else:
        with torch.inference_mode():
            mine = params["w"].clone()
        array = params["w"].numpy().copy()
    before = array.copy()
    state.params["w"] = Sharded(mine, node.sharding, node.global_shape)
    del mine
    got = jit(zf.train_step(loss, ADAM))(state, example_batch())
    assert np.array_equal(array, before)
    assert_bitwise(got, zf.train_step(loss, ADAM)(fresh(), example_batch()))


@pytest.mark.parametrize("how", ["one tensor", "one node", "one storage"])
def test_two_leaves_that_share_memory(how):
    """They would be updated twice."""

    def tied():
        leaf = zf.shard(randn(3), alone()).params
        other = {
            "one tensor": lambda: Sharded(leaf.buffer, leaf.sharding, (3,)),
            "one node": lambda: leaf,
            "one storage": lambda: Sharded(leaf.buffer[:], leaf.sharding, (3,)),
        }[how]()
        state = zf.shard({"a": randn(3), "b": randn(3)}, alone())
        return state.replace(params={"a": leaf, "b": other})

    step = zf.train_step(lambda p, b: (p["a"] * p["b"].exp()).sum(), zf.optim.sgd(0.1))
    assert_bitwise(jit(step)(tied(), ()).params, step(tied(), ()).params)


def test_a_batch_and_a_constant_that_are_the_parameters():
    def run(make):
        state = fresh(zf.optim.sgd(0.1), {"w": randn(4)})
        constant = state.params["w"].buffer
        step = make(
            zf.train_step(
                lambda p, b: ((p["w"] - b) * constant).sum(), zf.optim.sgd(0.1)
            )
        )
        state = step(state, state.params["w"].buffer)
        return copied(step(state, state.params["w"].buffer.clone())), constant

    (got, kept), (want, original) = run(jit), run(lambda step: step)
    assert_bitwise(got, want)
    assert torch.equal(kept, original)


def test_memory_that_nobody_else_holds():
    tensors = [torch.ones(3), torch.ones(0), torch.ones(())]
    assert held(tensors, num_holders=1) == []
    seen = tensors[0][1:]
    assert held(tensors, num_holders=1) == [0]
    del seen
    gc.collect()
    assert held(tensors, num_holders=1) == []


# --- steps that raise ---------------------------------------------------------


def lookup(params, batch):
    return params["table"][batch].square().sum() * params["scale"].sum()


def table():
    return {"table": randn(4, 3), "scale": randn(3), "unused": randn(2)}


def test_a_step_that_raises_before_it_writes_gives_the_state_back():
    tx = OPTIMIZERS["last gradient"]
    step = jit(zf.train_step(lookup, tx))
    state = step(fresh(tx, table()), torch.tensor([1, 2]))
    want = copied(state)
    buffers = tree_leaves((state.params, state.moments))
    with pytest.raises(IndexError):
        step(state, torch.tensor([1, 9]))
    assert_bitwise(
        (state.params, state.moments, state.step),
        (want.params, want.moments, want.step),
    )
    now = tree_leaves((state.params, state.moments))
    assert all(a is b for a, b in zip(now, buffers, strict=True))
    assert not any(leaf.any() for leaf in tree_leaves(state.grads))
    again = step(state, torch.tensor([1, 2]))
    zeros = want.replace(grads=zf.tree_map(torch.zeros_like, want.grads))
    assert_bitwise(again, zf.train_step(lookup, tx)(zeros, torch.tensor([1, 2])))


@pytest.mark.parametrize("grads", [None, {"other": 1}, "tensors"])
def test_a_state_with_other_gradients(grads):
    state = fresh()
    if grads == "tensors":
        grads = [zf.shard(randn(2), alone()).params, torch.ones(2)]
    state = state.replace(grads=grads)
    want = copied(zf.train_step(loss, ADAM)(state.replace(grads=None), example_batch()))
    assert_bitwise(jit(zf.train_step(loss, ADAM))(state, example_batch()), want)
    if isinstance(grads, list):
        assert grads[1].sum() == 2
        with pytest.raises(DonatedBufferError, match=r"state.grads\['0'\]"):
            grads[0].buffer.sum()


def test_a_state_of_plain_tensors_cannot_be_taken_over():
    state = zf.unshard(fresh())
    with pytest.raises(PlacementError, match="a step cannot take over"):
        jit(zf.train_step(loss, ADAM))(state, example_batch())
    assert_bitwise(state.params, example_params())
    got = jit(zf.train_step(loss, ADAM), donate=False)(state, example_batch())
    assert_bitwise(got, zf.train_step(loss, ADAM)(state, example_batch()))


# --- which program runs -------------------------------------------------------


def test_programs_of_several_shapes_take_turns(program):
    step = zf.train_step(loss, ADAM)
    half = {key: x[:3] for key, x in example_batch().items()}
    got = want = fresh()
    got = copied(want)
    for batch in (example_batch(), half, half, example_batch(), half):
        got, want = program(got, batch), step(want, batch)
        assert_bitwise(got, want)


def test_a_leaf_that_was_swapped_is_noticed(program):
    state = program(fresh(), example_batch())
    node = state.params["w"]
    state.params["w"] = Sharded(
        node.buffer.t().contiguous().t(), node.sharding, node.global_shape
    )
    want = copied(zf.train_step(loss, ADAM)(copied(state), example_batch()))
    programs = len(program._cache)
    assert_bitwise(program(state, example_batch()), want)
    assert len(program._cache) == programs + 1


def test_equal_numbers_of_other_types_are_other_programs():
    step = zf.train_step(lambda p, b: (p["w"] * b["n"]).sum(), zf.optim.sgd(0.1))
    jitted = jit(step, donate=False)
    state = fresh(zf.optim.sgd(0.1), {"w": randn(3)})
    for n in (1, True, 1.0, 1, True):
        assert_bitwise(jitted(state, {"n": n}), step(state, {"n": n}))
    assert len(jitted._cache) == 3


@pytest.mark.parametrize("twin", ["again", "copied"])
def test_a_value_is_not_written_over_while_a_view_of_its_twin_is_read(twin):
    """Passes move a view to another, equal input; its fake value stays as it was."""

    def update(g):
        a = g.cumsum(0)
        same = g.cumsum(0) if twin == "again" else a.to(torch.float32, copy=True)
        view = same.view(2, -1)
        b = a * 3 + view.flip(0).reshape(-1).cumsum(0)
        return -1e-6 * (b.cumsum(0) + b + view.cumsum(1).reshape(-1))

    tx = stateless("odd", lambda grads, params: zf.tree_map(update, grads))
    step = zf.train_step(lambda p, x: ((p * x) ** 2).sum(), tx)
    params, x = torch.linspace(0, 1, 8192), torch.linspace(-1, 1, 8192)
    want, got = (zf.shard(params.clone(), zf.make_mesh({})) for _ in range(2))
    want, got = step(want, x), zf.jit(step)(got, x)
    assert torch.equal(got.params.buffer, want.params.buffer)
