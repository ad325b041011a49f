# SPDX-License-Identifier: Apache-2.0
"""Saves in the background of real ranks: beside the steps, and failing together."""

import errno
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

import zfunc as zf
from tests.distributed.pool import answer_after_a_death
from tests.unit.checkpoint.states import batch, contents, loss, made, message_of
from zfunc.checkpoint import Keep, list_steps, restore, restore_newest, save, save_async
from zfunc.checkpoint.agree import GROUP_NAME, own_group

pytestmark = pytest.mark.distributed

STEPS = 6


# --- inside the ranks ----------------------------------------------------------------


def job():
    return zf.make_mesh({"data": dist.get_world_size()})


def stepper(kind):
    plain = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=3))
    return zf.donate(plain) if kind == "donate" else zf.jit(plain, backend="aten")


def slow_disk(late_s):
    """A disk that takes its time, another one on each rank; the real one comes back."""
    real = os.fsync
    os.fsync = lambda d: (time.sleep(late_s * dist.get_rank()), real(d))[1]
    return real


def full_disk(name):
    """A disk without room for one file."""
    real = os.fsync

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync
    return real


def scene_beside(folder, kind):
    """Steps go on while rank 1 is late with its file; saved are the values of then."""
    mesh, step, kept, losses = job(), stepper(kind), {}, []
    rank = int(mesh.rank)
    state, real = made(mesh=mesh), slow_disk(0.03)
    pending, blocked_s, under_way = None, [], 0
    try:
        for i in range(STEPS):
            state = step(state, batch(10 * i + rank))
            kept[i + 1] = contents(state)
            start_s = time.perf_counter()
            if i % 2 == 0:
                pending = save_async(folder / kind, state, keep=Keep(last=2))
            blocked_s.append(time.perf_counter() - start_s)
            losses.append(float(state.metrics.loss))
            under_way += not pending.is_done
        pending.wait()
    finally:
        os.fsync = real
    dist.barrier()
    like = made(seed=1, mesh=mesh)
    found = list_steps(folder / kind)
    same = [
        contents(restore(folder / kind / f"step-0000000{s}", like).state) == kept[s]
        for s in found
    ]
    groups = [g.group_desc for g in dist.distributed_c10d._world.pg_map]
    return {
        "steps": found,
        "same": same,
        "losses": losses,
        "under way": under_way,
        "groups": groups.count(GROUP_NAME),
    }


def scene_plain(kind):
    """The same steps without saves."""
    mesh, step, losses = job(), stepper(kind), []
    state = made(mesh=mesh)
    for i in range(STEPS):
        state = step(state, batch(10 * i + int(mesh.rank)))
        losses.append(float(state.metrics.loss))
    return losses


def scene_order(folder):
    """Rank 1 writes only when it has taken its step: then no group may be shared."""
    mesh, step = job(), stepper("donate")
    state = step(made(mesh=mesh), batch(0))
    stepped, real = threading.Event(), os.fsync

    def fsync(descriptor):
        if mesh.rank == 1 and not stepped.wait(20):
            raise AssertionError("the step did not go on")
        real(descriptor)

    os.fsync = fsync
    try:
        pending = save_async(folder / "order", state)
        for i in range(1, 4):
            state = step(state, batch(i))
        was_done = pending.is_done
        stepped.set()
        pending.wait()
    finally:
        os.fsync = real
    return {"was done": was_done, "steps": list_steps(folder / "order")}


def scene_failures(folder):
    """One rank's failure is that of all, and the training goes on."""
    mesh, messages = job(), []
    root, rank = folder / "failures", int(mesh.rank)
    save(root, made(mesh=mesh, step=1))
    real = full_disk("rank-00001.safetensors")
    pending = save_async(root, made(mesh=mesh, step=2))
    messages.append(message_of(pending.wait))
    os.fsync = real
    pending = save_async(root, made(mesh=mesh, step=2), cursor=[rank])
    messages.append(message_of(pending.wait))
    pending = save_async(root, made(mesh=mesh, step=2), cursor="x" if rank else None)
    messages.append(message_of(pending.wait))
    pending = save_async(root, made(mesh=mesh, step=2), keep=Keep(1 + rank))
    messages.append(message_of(pending.wait))
    state = made(mesh=mesh, step=2)
    if rank == 1:
        state.params["scale"].buffer.view(torch.int32).bitwise_xor_(1)
    messages.append(message_of(save_async(root, state).wait))
    dist.barrier()
    left = sorted(os.listdir(root))
    save_async(root, made(mesh=mesh, step=2), keep=Keep(1)).wait()
    return {"messages": messages, "left": left, "then": list_steps(root)}


def scene_newest(folder):
    """Damage that only one rank reads is passed over by all of them."""
    mesh = job()
    root = folder / "newest"
    for step in (1, 2, 3):
        save(root, made(mesh=mesh, step=step), meta={"of": step})
    for step, rank in ((3, 1), (2, 0)):
        file = root / f"step-0000000{step}" / f"rank-0000{rank}.safetensors"
        if mesh.rank == 0:
            file.write_bytes(file.read_bytes()[:-1])
    dist.barrier()
    newest = restore_newest(root, made(seed=2, mesh=mesh))
    same = contents(newest.restored.state) == contents(made(mesh=mesh, step=1))
    why = [damage.why for damage in newest.damaged]
    return {"step": newest.path.name, "same": same, "why": why}


def scene_majority(folder):
    """Of three copies the odd one is named."""
    mesh = job()
    state = made(mesh=mesh)
    if mesh.rank == 0:
        state.params["scale"].buffer.view(torch.int32).bitwise_xor_(1)
    return message_of(save, folder / "odd", state)


def scene_any_size(folder):
    """A loss scale, a replicated leaf and uneven ones, on another number of ranks."""
    mesh = job()
    like = made(seed=4, mesh=mesh)
    like = like.replace(loss_scale=zf.StaticLossScale(1.0).init(like.step))
    got = restore(folder / "sizes", like).state
    return {
        "full": contents(zf.unshard(got)),
        "scale": float(got.loss_scale.scale),
        "type": type(got.loss_scale).__name__,
    }


def scene_save_scaled(folder):
    mesh = job()
    state = made(mesh=mesh, step=5)
    state = state.replace(loss_scale=zf.StaticLossScale(0.375).init(state.step))
    save_async(folder / "sizes", state).wait()
    return contents(zf.unshard(state))


def scene_death(folder):
    """Rank 1 dies while it writes in the background: rank 0 is told by wait()."""
    mesh = job()
    root, real = folder / "death", os.fsync
    save(root, made(mesh=mesh, step=1))
    own_group(mesh)

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(
            "rank-00001.safetensors"
        ):
            os._exit(9)
        real(descriptor)

    os.fsync = fsync
    pending = save_async(root, made(mesh=mesh, step=2))
    message = message_of(pending.wait)
    return {"message": message, "names": sorted(os.listdir(root))}


# --- what is asserted ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["donate", "jit"])
def test_steps_go_on_beside_a_save(ranks, tmp_path, kind):
    plain = ranks(2).run(scene_plain, kind)
    results = ranks(2).run(scene_beside, tmp_path, kind)
    for result, losses in zip(results, plain, strict=True):
        assert result["losses"] == losses
        assert result["steps"] == (3, 5)
        assert result["same"] == [True, True]
        assert result["groups"] == 1
    assert results[1]["under way"] >= 2


def test_the_messages_of_a_save_are_not_those_of_a_step(ranks, tmp_path):
    for result in ranks(2).run(scene_order, tmp_path):
        assert result == {"was done": False, "steps": (1,)}


def test_a_failure_of_one_rank_is_raised_by_wait_on_all(ranks, tmp_path):
    one, two = ranks(2).run(scene_failures, tmp_path)
    assert one == two
    full, cursor, invalid, keep, diverged = one["messages"]
    path = tmp_path / "failures" / ".tmp-step-00000002" / "rank-00001.safetensors"
    assert full.startswith(f"rank 1: {path}: cannot write ")
    assert "ranks 0 and 1 disagree about cursor. Every" in cursor
    assert invalid.startswith("rank 1: save: cursor is a str")
    assert "ranks 0 and 1 disagree about keep. Every" in keep
    assert "\n  params/scale: rank 1 differs from rank 0\n" in diverged
    assert one["left"] == ["step-00000001"]
    assert one["then"] == (2,)


def test_damage_is_passed_over_by_all_ranks(ranks, tmp_path):
    one, two = ranks(2).run(scene_newest, tmp_path)
    assert one == two
    assert (one["step"], one["same"]) == ("step-00000001", True)
    assert one["why"][0].startswith("rank 1: ")
    assert "step-00000003/rank-00001.safetensors: " in one["why"][0]
    assert "step-00000002/rank-00000.safetensors: " in one["why"][1]


def test_the_odd_copy_is_named(ranks, tmp_path):
    for message in ranks(3).run(scene_majority, tmp_path):
        assert "\n  params/scale: rank 0 differs from ranks 1, 2\n" in message


def test_a_loss_scale_restores_on_any_number_of_ranks(ranks, tmp_path):
    expected = ranks(2).run(scene_save_scaled, tmp_path)[0]
    for size in (3, 2):
        for result in ranks(size).run(scene_any_size, tmp_path):
            assert result == {"full": expected, "scale": 0.375, "type": "LossScale"}
    like = made(seed=4)
    like = like.replace(loss_scale=zf.StaticLossScale(1.0).init(like.step))
    got = restore(tmp_path / "sizes", like).state
    assert contents(zf.unshard(got)) == expected


def test_a_rank_that_dies_in_the_background_is_noticed(tmp_path):
    result = answer_after_a_death(scene_death, tmp_path)
    assert "a rank of the mesh {'data': 2} does not answer" in result["message"]
    assert result["names"] == ["step-00000001"]
