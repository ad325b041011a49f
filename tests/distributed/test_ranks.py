# SPDX-License-Identifier: Apache-2.0
"""The laws on real gloo ranks: what the simulator proves must hold on the wire."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

import zfunc as zf
from tests.distributed.pool import Pool, RankError
from zfunc.core.tree import tree_structure
from zfunc.testing.memory import peak_live_bytes

pytestmark = pytest.mark.distributed
F64 = torch.float64
SAMPLES = 24


def params_of(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(shape, dtype=F64, generator=generator)

    blocks = [{"w": tensor(5, 5), "b": tensor(5)} for _ in range(2)]
    return {"blocks": blocks, "scale": tensor(), "none": tensor(0, 3), "odd": tensor(7)}


def loss_fn(params, batch, key):
    x = batch["x"]
    for block in params["blocks"]:
        x = zf.remat(lambda p, x: torch.tanh(x @ p["w"] + p["b"]) + x)(block, x)
    x = zf.random.dropout(key, x, 0.25) * params["scale"]
    per_sample = (x**2).sum(1) + params["odd"].square().sum() + params["none"].sum()
    return zf.Mean((per_sample * batch["weight"]).sum(), batch["weight"].sum())


def batch_of(step):
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, 5, dtype=F64, generator=generator)
    weight = torch.randint(0, 4, (SAMPLES,), generator=generator).to(F64)
    return {"x": x, "weight": weight}


def optimizer(kind, clip):
    tx = zf.optim.sgd(1e-2, momentum=0.9) if kind == "sgd" else zf.optim.adamw(1e-2)
    return zf.optim.chain(zf.optim.clip_by_global_norm(0.1), tx) if clip else tx


def run(mesh, world, rank, zero, microbatches, kind, clip, donated=False, steps=3):
    transforms = (zf.partition(zero=zero), zf.accumulate(microbatches))
    tx = optimizer(kind, clip)
    step = zf.train_step(loss_fn, tx, *(transforms if mesh.axes else ()))
    step = zf.donate(step) if donated else step
    spec = zf.P() if zero == 0 else None
    state = zf.shard(params_of(), mesh, tx=tx, spec=spec)
    structure = tree_structure(state)
    size = SAMPLES // world
    for i in range(steps):
        mine = zf.tree_map(lambda x: x[rank * size : (rank + 1) * size], batch_of(i))
        state = step(state, mine)
        if tree_structure(state) != structure:
            raise AssertionError("the step changed the placement of the state")
    full = zf.unshard(state)
    return full.params, full.grads, full.metrics, full.moments


def on_rank(axes, *recipe):
    mesh = zf.make_mesh(axes)
    world, rank = mesh.axis_size("data"), int(mesh.axis_index("data"))
    return zf.tree_leaves(run(mesh, world, rank, *recipe))


def unsharded(*recipe):
    return zf.tree_leaves(run(zf.make_mesh({}), 1, 0, *recipe))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("kind", "clip"), [("sgd", True), ("adamw", False)])
def test_sharded_equals_unsharded(ranks, world, zero, kind, clip):
    recipe = (zero, 1 + world % 3, kind, clip)
    expected = unsharded(zero, 1, kind, clip)
    for leaves in ranks(world).run(on_rank, {"data": world}, *recipe):
        for a, b in zip(leaves, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_stages_agree_bitwise_on_the_wire(ranks):
    results = [
        ranks(3).run(on_rank, {"data": 3}, zero, 1, "sgd", zero > 0)[0]
        for zero in (1, 2, 3)
    ]
    whole = ranks(3).run(on_rank, {"data": 3}, 0, 1, "sgd", False)[0]
    unclipped = ranks(3).run(on_rank, {"data": 3}, 1, 1, "sgd", False)[0]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    # The norm of whole leaves adds up in another order: gradients, not metrics.
    num_params = len(zf.tree_leaves(params_of()))
    assert all(map(torch.equal, whole[: 2 * num_params], unclipped[: 2 * num_params]))


@pytest.mark.parametrize("zero", [0, 3])
def test_donation_is_bitwise_identity(ranks, zero):
    pure = ranks(2).run(on_rank, {"data": 2}, zero, 2, "adamw", True)
    donated = ranks(2).run(on_rank, {"data": 2}, zero, 2, "adamw", True, True)
    for a, b in zip(pure, donated, strict=True):
        assert all(map(torch.equal, a, b))


def test_an_axis_beside_data_is_replication(ranks):
    axes = {"data": 2, "tensor": 2}
    recipe = (3, 2, "adamw", True)
    expected = ranks(2).run(on_rank, {"data": 2}, *recipe)[0]
    for leaves in ranks(4).run(on_rank, axes, *recipe):
        assert all(map(torch.equal, leaves, expected))


def collectives(axes, rank_values):
    """Every collective on real ranks, next to torch.distributed's own."""
    mesh, rank = zf.make_mesh(axes), dist.get_rank()
    world = mesh.size
    x = rank_values[rank]
    summed = x.clone()
    dist.all_reduce(summed)
    gathered = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(gathered, x)
    received = [torch.empty_like(c) for c in x.chunk(world)]
    dist.all_to_all(received, [c.contiguous() for c in x.chunk(world)])
    pairs = [
        (zf.psum(x, "data", mesh), summed),
        (zf.pmean(x, "data", mesh), summed / world),
        (zf.all_gather(x, "data", mesh), torch.cat(gathered)),
        (zf.all_gather(x, "data", mesh, dim=1), torch.cat(gathered, 1)),
        (zf.psum_scatter(x, "data", mesh), summed.chunk(world)[rank]),
        (
            zf.all_to_all(x, "data", mesh, split_dim=0, concat_dim=0),
            torch.cat(received),
        ),
        (
            zf.ppermute(x, "data", mesh, [(0, 1)]),
            rank_values[0] if rank == 1 else torch.zeros_like(x),
        ),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
    big = torch.full((5, 1001), rank + 1.0)
    total = zf.psum({"a": big, "b": x[0, 0]}, "data", mesh)
    assert torch.equal(total["a"], torch.full_like(big, world * (world + 1) / 2))
    assert total["b"].shape == ()
    ours = [p[0] for p in pairs]
    return [*ours, total["a"]]


@pytest.mark.parametrize("world", [2, 3])
def test_collectives_equal_torch_and_the_simulator(ranks, world):
    values = [
        torch.randn(6, 4, generator=torch.Generator().manual_seed(r))
        for r in range(world)
    ]
    real = ranks(world).run(collectives, {"data": world}, values)

    def program(mesh, x):
        return [
            zf.psum(x, "data", mesh),
            zf.pmean(x, "data", mesh),
            zf.all_gather(x, "data", mesh),
            zf.all_gather(x, "data", mesh, dim=1),
            zf.psum_scatter(x, "data", mesh),
            zf.all_to_all(x, "data", mesh, split_dim=0, concat_dim=0),
            zf.ppermute(x, "data", mesh, [(0, 1)]),
        ]

    simulated = zf.testing.spmd(program, {"data": world})(torch.stack(values))
    for rank in range(world):
        for ours, row in zip(real[rank], simulated, strict=False):
            assert torch.equal(ours, row[rank]), "the simulator adds up in rank order"


def dtensor_round_trip(axes):
    mesh = zf.make_mesh(axes)
    params = params_of()
    state = zf.shard(params, mesh)
    dtensors = zf.to_dtensor(state.params)
    full = zf.tree_map(lambda d: d.full_tensor(), dtensors)
    assert all(map(torch.equal, zf.tree_leaves(full), zf.tree_leaves(params)))
    back = zf.from_dtensor(dtensors, mesh)
    assert all(map(torch.equal, zf.tree_leaves(back), zf.tree_leaves(state.params)))
    assert tree_structure(back) == tree_structure(state.params)


def test_dtensors_are_the_same_leaves(ranks):
    ranks(3).run(dtensor_round_trip, {"data": 3})
    ranks(4).run(dtensor_round_trip, {"data": 2, "tensor": 2})


def unequal_seeds():
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    zf.shard({"a": torch.ones(3), "b": torch.ones(2) + dist.get_rank()}, mesh)


def test_ranks_that_start_from_different_parameters_are_told(ranks):
    with pytest.raises(RankError, match=r"params\['b'\] differs between the 2 ranks"):
        ranks(2).run(unequal_seeds)


def unequal_on_one_rank_of_two_axes(what):
    mesh = zf.make_mesh({"data": 2, "tensor": 2})
    odd = dist.get_rank() == 3
    params = {"a": torch.ones(3)}
    if odd and what == "values":
        params = {"a": torch.zeros(3)}
    if odd and what == "leaves":
        params["more"] = torch.ones(5)
    try:
        zf.shard(params, mesh)
    except zf.PlacementError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [("values", r"params['a'] differs"), ("leaves", "has other leaves")],
)
def test_all_ranks_are_told_and_none_waits(ranks, what, words):
    answers = ranks(4).run(unequal_on_one_rank_of_two_axes, what)
    assert all(words in answer for answer in answers), answers


def wrong_mesh():
    zf.make_mesh({"data": 5})


def test_a_mesh_of_another_size_is_refused(ranks):
    with pytest.raises(RankError, match=r"has 5 ranks but this job has 2"):
        ranks(2).run(wrong_mesh)


# L14: layers x (d -> 4d -> d), the sizes of the bound below.
LAYERS, WIDTH, BATCH = 12, 256, 1024


def memory_of_a_step(batch, clip):
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    generator = torch.Generator().manual_seed(0)
    params = [
        {
            "up": torch.randn(WIDTH, 4 * WIDTH, generator=generator) * 0.05,
            "down": torch.randn(4 * WIDTH, WIDTH, generator=generator) * 0.05,
        }
        for _ in range(LAYERS)
    ]

    def block(p, x):
        return x + torch.tanh(x @ p["up"]) @ p["down"]

    def stack(wrap):
        def loss(params, x):
            for p in params:
                x = wrap(block)(p, x)
            return (x**2).mean()

        return loss

    peaks = {}
    cases = {
        "zero 3, remat": (3, zf.remat),
        "zero 3, no remat": (3, lambda f: f),
        "zero 1, remat": (1, zf.remat),
    }
    for name, (zero, wrap) in cases.items():
        tx = optimizer("adamw", clip)
        step = zf.donate(zf.train_step(stack(wrap), tx, zf.partition(zero=zero)))
        x = torch.randn(batch, WIDTH)
        box = [step(zf.shard(params, mesh, tx=tx), x)]
        peaks[name] = peak_live_bytes(step, box.pop(), x, donated=True)[1]
    return peaks, sum(x.numel() for x in zf.tree_leaves(params))


@pytest.mark.parametrize("batch", [16, BATCH])
def test_live_memory_of_zero_3_with_remat(ranks, batch):
    r"""L14: peak <= 1.1 x (16 Psi / n + activations + two blocks), optimizer included.

    Activations: the input of every block, and within the block that is recomputed its
    two inner activations and their two cotangents, (4d + d) values per sample each.
    """
    world = 4
    for peaks, num_params in ranks(world).run(memory_of_a_step, batch, False):
        state_bytes = 16 * num_params / world
        saved_bytes = 4 * LAYERS * batch * WIDTH
        inner_bytes = 2 * 4 * batch * 5 * WIDTH
        block_bytes = 4 * num_params / LAYERS
        bound = state_bytes + saved_bytes + inner_bytes + 2 * block_bytes
        assert peaks["zero 3, remat"] <= 1.1 * bound
        assert peaks["zero 3, no remat"] > 1.1 * bound
        assert peaks["zero 1, remat"] > 1.1 * bound


def die_on_rank_1():
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    if dist.get_rank() == 1:
        os._exit(9)
    zf.psum(torch.ones(10), "data", mesh)


def test_a_dead_rank_is_an_error_on_the_others_within_seconds():
    pool = Pool(2)
    start = time.monotonic()
    for connection in pool.connections:
        connection.send((die_on_rank_1, ()))
    kind, message = pool.connections[0].recv()
    assert kind == "error"
    assert "Connection" in message or "reset" in message
    assert time.monotonic() - start < 20
    pool.processes[1].join(10)
    assert pool.processes[1].exitcode == 9
    pool.processes[0].terminate()
    pool.processes[0].join(10)
    assert not multiprocessing.active_children() or not pool.processes[0].is_alive()
