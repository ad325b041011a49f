# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of real ranks: gloo processes that share a directory.

A scene runs on every rank; what it returns is asserted here.
"""

import errno
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import zfunc as zf
from tests.distributed.pool import answer_after_a_death
from tests.unit.checkpoint.states import (
    batch,
    contents,
    loss,
    made,
    message_of,
)
from zfunc.checkpoint import latest, list_steps, restore, save
from zfunc.checkpoint.agree import Peers, agree
from zfunc.core.tree import tree_structure
from zfunc.data import Cursor

pytestmark = pytest.mark.distributed


# --- inside the ranks ----------------------------------------------------------------


def job():
    return zf.make_mesh({"data": dist.get_world_size()})


def train(state, first, last, mesh, zero):
    step = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=zero))
    rank = int(mesh.rank)
    for i in range(first, last):
        state = step(state, batch(10 * i + rank))
    return state


def write_full(path, state, mesh):
    """The full tensors of a state, by rank 0."""
    full = contents(zf.unshard(state))
    if mesh.rank == 0:
        raw = {
            k: torch.frombuffer(bytearray(v[2] + b"\0"), dtype=torch.uint8)
            for k, v in full.items()
        }
        save_file(raw, path)


def scene_save(folder):
    """Three steps, a checkpoint, three more; then the same from the checkpoint."""
    mesh = job()
    state = train(made(mesh=mesh), 0, 3, mesh, zero=3)
    path = save(folder / "root", state, cursor=Cursor(0, 24, 5), meta={"run": "x"})
    write_full(folder / "full", state, mesh)
    got = restore(path, made(seed=1, mesh=mesh))
    same = contents(got.state) == contents(state)
    going_on = contents(train(state, 3, 6, mesh, zero=3))
    resumed = contents(train(got.state, 3, 6, mesh, zero=1))  # another stage
    return {
        "path": str(path),
        "cursor": got.cursor,
        "meta": got.meta,
        "same": same,
        "structure": tree_structure(got.state) == tree_structure(state),
        "resumed": resumed == going_on,
        "again": str(
            save(folder / "root", state, cursor=Cursor(0, 24, 5), meta={"run": "x"})
        ),
    }


def scene_full_disk(folder):
    """Rank 1 cannot write: both raise, nothing is left."""
    mesh = job()
    root, real = folder / "disk", os.fsync
    save(root, made(mesh=mesh, step=1))

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(
            "rank-00001.safetensors"
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync
    message = message_of(save, root, made(mesh=mesh, step=2))
    os.fsync = real
    dist.barrier()
    names = sorted(path.name for path in root.iterdir())
    restored = int(restore(root, made(mesh=mesh)).state.step)
    save(root, made(mesh=mesh, step=2))
    return {
        "message": message,
        "names": names,
        "step": restored,
        "then": list_steps(root),
    }


def scene_disagreement(folder):
    """Ranks that pass other things, or hold other values of one leaf."""
    mesh = job()
    root, rank = folder / "disagree", int(mesh.rank)
    options = {"cursor": [rank]}, {"meta": {"rank": rank}}
    messages = [message_of(save, root, made(mesh=mesh), **o) for o in options]
    messages.append(message_of(save, root, made(mesh=mesh, step=rank)))
    messages.append(
        message_of(save, root, made(mesh=mesh), cursor="x" if rank else None)
    )
    state = made(mesh=mesh)
    if rank == 1:
        state.params["scale"].buffer.view(torch.int32).bitwise_xor_(1)
    messages.append(message_of(save, root, state))
    dist.barrier()
    return {"messages": messages, "left": sorted(os.listdir(root))}


def scene_damage(folder):
    """Damage that one rank finds is an error of all."""
    mesh = job()
    path = save(folder / "damage", made(mesh=mesh))
    messages = []
    for rank in range(mesh.size):
        file = path / f"rank-0000{rank}.safetensors"
        whole = file.read_bytes()
        dist.barrier()
        if mesh.rank == 0:
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        dist.barrier()
        messages.append(message_of(restore, path, made(mesh=mesh)))
        dist.barrier()
        if mesh.rank == 0:
            file.write_bytes(whole)
        dist.barrier()
    like = zf.shard({"w": torch.ones(3)}, mesh)
    messages.append(message_of(restore, path, like))
    messages.append(message_of(restore, folder / "nowhere", like))
    return {"messages": messages}


def scene_restore(folder):
    """What two ranks saved, on this mesh."""
    mesh = job()
    got = restore(folder / "root", made(seed=7, mesh=mesh))
    write_full(folder / f"full on {mesh.size}", got.state, mesh)
    return {"cursor": got.cursor, "step": int(got.state.step)}


def scene_replicated(folder):
    """Full copies on every rank (stage 0): stored once, and from any spec to any."""
    mesh = job()
    root = folder / "replicated"
    state = train(made(mesh=mesh, spec=zf.P()), 0, 1, mesh, zero=0)
    path = save(root, state)
    got = restore(path, made(seed=3, mesh=mesh))
    full = contents(zf.unshard(got.state)) == contents(zf.unshard(state))
    sizes = [
        (path / f"rank-0000{r}.safetensors").stat().st_size for r in range(mesh.size)
    ]
    return {"full": full, "sizes": sizes}


def scene_two_axes(folder):
    """Pieces along two axes; a copy that differs between ranks 1 and 3 only."""
    mesh = zf.make_mesh({"data": 2, "tensor": 2})
    params = {"w": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}
    params |= {"t": torch.arange(7.0), "r": torch.ones(3)}
    P = zf.P
    one = zf.shard(
        params, mesh, spec={"w": P("data", "tensor"), "t": P("tensor"), "r": P()}
    )
    two = zf.shard(
        params, mesh, spec={"w": P("tensor"), "t": P("data"), "r": P("data")}
    )
    like = two.replace(params=zf.tree_map(torch.zeros_like, two.params))
    save(folder / "axes", one)
    got = restore(folder / "axes", like).state
    order = agree(Peers(mesh), "test", lambda: (None, dist.get_rank())).reports
    if mesh.rank == 3:
        one.params["t"].buffer[0] += 1
    message = message_of(save, folder / "diverged", one)
    return {"same": contents(got) == contents(two), "order": order, "message": message}


def scene_death(folder):
    """Rank 1 dies while it writes: rank 0 is told, and cleans up."""
    mesh = job()
    root, real = folder / "death", os.fsync
    save(root, made(mesh=mesh, step=1))

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(
            "rank-00001.safetensors"
        ):
            os._exit(9)
        real(descriptor)

    os.fsync = fsync
    start_s = time.monotonic()
    message = message_of(save, root, made(mesh=mesh, step=2))
    return {
        "message": message,
        "seconds": time.monotonic() - start_s,
        "names": sorted(os.listdir(root)),
    }


# --- what is asserted ------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """The folder with what two ranks saved, and what the scene returned."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, ranks(2).run(scene_save, folder)


def test_resume_on_the_same_ranks_is_bitwise(saved):
    folder, results = saved
    for result in results:
        assert result["path"] == str(folder / "root" / "step-00000003")
        assert result["again"] == result["path"]
        assert result["same"]
        assert result["structure"]
        assert result["resumed"]
        assert result["cursor"] == {"epoch": 0, "position": 24, "seed": 5}
        assert result["meta"] == {"run": "x"}


def test_one_file_per_rank_and_no_padding_lost(saved):
    path = latest(saved[0] / "root")
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    one, two = (load_file(path / f"rank-0000{r}.safetensors") for r in range(2))
    assert one["params/layers/0/w"].shape == (4, 5) == two["params/layers/0/w"].shape
    assert "step" in one
    assert "step" not in two
    assert "params/scale" not in two


def test_two_ranks_restore_on_three_and_on_one(saved, ranks):
    folder, _ = saved
    for result in ranks(3).run(scene_restore, folder):
        cursor = {"epoch": 0, "position": 24, "seed": 5}
        assert result == {"cursor": cursor, "step": 3}
    expected, three = load_file(folder / "full"), load_file(folder / "full on 3")
    one = contents(zf.unshard(restore(folder / "root", made(seed=9)).state))
    assert set(expected) == set(three) == set(one)
    for path, raw in expected.items():
        assert torch.equal(raw, three[path]), path
        assert bytes(raw.tolist())[:-1] == one[path][2], path


def test_one_rank_without_space_stops_all_and_leaves_the_old(ranks, tmp_path):
    results = ranks(2).run(scene_full_disk, tmp_path)
    path = tmp_path / "disk" / ".tmp-step-00000002" / "rank-00001.safetensors"
    size_bytes = (tmp_path / "disk" / "step-00000002" / path.name).stat().st_size
    for result in results:
        expected = (
            f"rank 1: {path}: cannot write {size_bytes} bytes: No space left on device;"
        )
        assert result["message"].startswith(expected)
        assert re.search(r"; \d+ bytes were free when it began\.", result["message"])
        assert result["names"] == ["step-00000001"]
        assert result["step"] == 1
        assert result["then"] == (1, 2)


def test_ranks_that_disagree_save_nothing(ranks, tmp_path):
    one, two = ranks(2).run(scene_disagreement, tmp_path)
    assert one == two
    cursor, meta, step, invalid, diverged = one["messages"]
    assert "ranks 0 and 1 disagree about cursor. Every" in cursor
    assert "ranks 0 and 1 disagree about meta. Every" in meta
    assert "ranks 0 and 1 disagree about step. Every" in step
    assert invalid.startswith("rank 1: save: cursor is a str")
    assert "copies of one value differ between ranks" in diverged
    assert "\n  params/scale: rank 1 differs from rank 0\nThe ranks" in diverged
    assert one["left"] == []


def test_damage_found_by_one_rank_stops_all(ranks, tmp_path):
    one, two = ranks(2).run(scene_damage, tmp_path)
    assert one == two
    first, second, model, nowhere = one["messages"]
    assert first.startswith("rank 0: ")
    assert "rank-00000.safetensors: its sha256 differs" in first
    assert second.startswith("rank 1: ")
    assert "rank-00001.safetensors: its sha256 differs" in second
    assert "only in the checkpoint: params/cube" in model
    assert not model.startswith("rank")
    assert nowhere.startswith(f"rank 0: {tmp_path / 'nowhere'}: is not a directory")


def test_full_copies_are_stored_once(ranks, tmp_path):
    for result in ranks(2).run(scene_replicated, tmp_path):
        assert result["full"]
        assert result["sizes"][0] > 3000
        assert result["sizes"][1] < 200


def test_two_axes(ranks, tmp_path):
    for result in ranks(4).run(scene_two_axes, tmp_path):
        assert result["same"]
        assert result["order"] == [0, 1, 2, 3]
        assert "\n  params/t: rank 3 differs from rank 1\n" in result["message"]
    sizes = [
        path.stat().st_size for path in sorted(latest(tmp_path / "axes").glob("rank*"))
    ]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]


def test_a_rank_that_dies_is_noticed(tmp_path):
    result = answer_after_a_death(scene_death, tmp_path)
    assert "a rank of the mesh {'data': 2} does not answer" in result["message"]
    assert result["seconds"] < 30
    assert result["names"] == ["step-00000001"]
    assert int(restore(tmp_path / "death", made()).state.step) == 1
