# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back: every bit, the structure, the cursor, and the training."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.checkpoint.states import (
    MESH,
    assert_same,
    batch,
    contents,
    everything,
    loss,
    made,
    parameters,
)
from zfunc.checkpoint import latest, list_steps, restore, save
from zfunc.core.sharding import NamedSharding, P, Sharded
from zfunc.core.tree import pytree
from zfunc.data import Cursor
from zfunc.testing import simulate

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
]


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytree
class Scores:
    accuracy: torch.Tensor
    parts: object


def with_params(state, params):
    return state.replace(params=params, grads=params, moments=None)


def placed(x):
    return Sharded(x, NamedSharding(zf.make_mesh(MESH), P()), tuple(x.shape))


def test_state_comes_back_bitwise(tmp_path):
    state = made(step=42)
    path = save(tmp_path, state)
    assert path == tmp_path / "step-00000042"
    assert_same(restore(path, made(seed=1)).state, state)
    assert_same(restore(tmp_path, state).state, state)


def test_resume_is_bitwise(tmp_path):
    step = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=2))
    state = made()
    for i in range(3):
        state = step(state, batch(i))
    save(tmp_path, state)
    resumed = restore(tmp_path, made(seed=5)).state
    for i in range(3, 6):
        state, resumed = step(state, batch(i)), step(resumed, batch(i))
        assert_same(resumed, state)


def test_donated_training_can_save_every_step(tmp_path):
    step = zf.donate(zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=1)))
    state = made()
    for i in range(3):
        state = step(state, batch(i))
        save(tmp_path, state)
        kept = restore(tmp_path, state).state
        assert_same(kept, state)
    assert list_steps(tmp_path) == (1, 2, 3)


def test_a_consumed_state_is_refused(tmp_path):
    step = zf.donate(zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=1)))
    old = made()
    step(old, batch(0))
    with pytest.raises(zf.DonatedBufferError, match="was donated"):
        save(tmp_path, old)
    assert everything(tmp_path) == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_bit_pattern(tmp_path, dtype):
    count = 64 * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    values = raw.view(dtype)
    tree = {"v": placed(values), "s": placed(values[3]), "none": placed(values[:0])}
    state = with_params(made(), tree)
    save(tmp_path, state)
    assert_same(restore(tmp_path, state).state, state)


def test_special_values_keep_their_bits(tmp_path):
    bits = [0x7FC00001, 0x7F800001, -0x80000000, 0x7F800000, 1, -0x3FFFFF]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    state = with_params(made(), {"v": placed(values)})
    save(tmp_path, state)
    got = restore(tmp_path, state).state.params["v"].buffer
    assert got.view(torch.int32).tolist() == bits


def test_strided_buffers_are_stored_row_major(tmp_path):
    state = with_params(made(), {"v": placed(torch.arange(12.0).view(3, 4).T)})
    save(tmp_path, state)
    got = restore(tmp_path, state).state.params["v"].buffer
    assert got.tolist() == torch.arange(12.0).view(3, 4).T.tolist()


def test_a_dtype_without_a_name_is_refused(tmp_path):
    state = with_params(made(), {"v": placed(torch.zeros(2, dtype=torch.complex128))})
    with pytest.raises(zf.CheckpointError, match="params/v has dtype complex128"):
        save(tmp_path, state)
    assert everything(tmp_path) == {}


@given(
    shapes=st.lists(
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES[:4])),
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_any_tree_comes_back(tmp_path_factory, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    leaves = [
        placed(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in shapes
    ]
    root = tmp_path_factory.mktemp("any")
    state = with_params(
        made(seed=seed), {"list": leaves, "é ü/.": (None, placed(torch.ones(1)))}
    )
    save(root, state)
    assert_same(restore(root, state).state, state)


def test_bytes_are_a_function_of_the_state(tmp_path):
    cursor, meta = Cursor(1, 2, 3), {"run": [1, None], "loss": 0.1}
    one = save(tmp_path / "a", made(), cursor=cursor, meta=meta)
    two = save(tmp_path / "b" / "c", made(), cursor=cursor, meta=meta)
    assert everything(one) == everything(two)
    assert sorted(everything(one)) == ["manifest.json", "rank-00000.safetensors"]


def test_nothing_given_changes(tmp_path):
    state, like = made(), made(seed=3)
    before = contents(state), contents(like)
    save(tmp_path, state)
    got = restore(tmp_path, like).state
    got.params["scale"].buffer.add_(1)
    assert (contents(state), contents(like)) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_and_to_a_gpu(tmp_path):
    gpu = zf.make_mesh(MESH, device="cuda")
    state = made(mesh=gpu, step=4)
    path = save(tmp_path / "gpu", state)
    back = restore(path, made(seed=1, mesh=gpu)).state
    assert_same(back, state)
    assert back.params["cube"].buffer.device == state.params["cube"].buffer.device
    # The device is not in the bytes.
    cpu = zf.make_mesh(MESH, device="cpu")
    assert everything(save(tmp_path / "cpu", made(mesh=cpu, step=4))) == everything(
        path
    )
    assert contents(restore(path, made(mesh=cpu)).state) == contents(state)


def test_data_file_is_readable_by_safetensors(tmp_path):
    from safetensors.torch import load_file

    path = save(tmp_path, made())
    tensors = load_file(path / "rank-00000.safetensors")
    expected = made().params["layers"][0]["w"].buffer
    assert torch.equal(tensors["params/layers/0/w"], expected)
    starts = [tensor.data_ptr() % tensor.itemsize for tensor in tensors.values()]
    assert set(starts) == {0}


def test_manifest_says_what_is_there(tmp_path):
    path = save(tmp_path, made(step=7), cursor=Cursor(0, 96, 1), meta={"run": "a"})
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["step"] == 7
    assert manifest["key"] == 11
    assert manifest["mesh"] == [["data", 1]]
    assert manifest["cursor"] == {"epoch": 0, "position": 96, "seed": 1}
    assert manifest["meta"] == {"run": "a"}
    leaves = {leaf["path"]: leaf for leaf in manifest["leaves"]}
    assert leaves["params/layers/0/w"] == {
        "path": "params/layers/0/w",
        "dtype": "float32",
        "global_shape": [7, 5],
        "local_shape": [7, 5],
        "spec": ["data"],
    }
    assert leaves["step"]["spec"] is None
    (file,) = manifest["files"]
    assert file["size_bytes"] == (path / file["name"]).stat().st_size


# --- cursor and meta -------------------------------------------------------------


@dataclass
class Place:
    shard: int
    offsets: tuple[int, ...]


@pytest.mark.parametrize(
    ("cursor", "expected"),
    [
        (None, None),
        (Cursor(1, 2, 2**70), {"epoch": 1, "position": 2, "seed": 2**70}),
        (Place(3, (4, -5)), {"shard": 3, "offsets": [4, -5]}),
        ([Cursor(), {"a": 1}], [{"epoch": 0, "position": 0, "seed": 0}, {"a": 1}]),
    ],
)
def test_cursor_comes_back_as_json(tmp_path, cursor, expected):
    save(tmp_path, made(), cursor=cursor)
    assert restore(tmp_path, made()).cursor == expected


def test_loader_cursor_round_trips(tmp_path):
    cursor = Cursor(2, 96, 7)
    save(tmp_path, made(), cursor=cursor)
    assert Cursor(**restore(tmp_path, made()).cursor) == cursor


@pytest.mark.parametrize(
    ("cursor", "where"),
    [
        (1.5, "cursor is a float"),
        (True, "cursor is a bool"),
        ({"a": [0, torch.tensor(1)]}, r"cursor.a\[1\] is a Tensor"),
        (Cursor(0, "1", 0), "cursor.position is a str"),
        ({1: 2}, "cursor is a dict"),
    ],
)
def test_a_cursor_of_other_things_is_refused(tmp_path, cursor, where):
    with pytest.raises(zf.CheckpointError, match=where):
        save(tmp_path, made(), cursor=cursor)
    assert everything(tmp_path) == {}


def test_meta_comes_back(tmp_path):
    meta = {"text": "é\n\u2028", "n": [1, 2.5, 1e-300, True, None, {"k": 2**60}]}
    save(tmp_path, made(), meta=meta)
    assert restore(tmp_path, made()).meta == meta


@pytest.mark.parametrize(
    "meta",
    [{"x": torch.ones(1)}, {"x": (1, 2)}, {1: 2}, {"x": float("nan")}, {"x": "\ud800"}],
    ids=["tensor", "tuple", "int key", "nan", "surrogate"],
)
def test_meta_that_is_not_json_is_refused(tmp_path, meta):
    with pytest.raises(zf.CheckpointError, match="save: meta"):
        save(tmp_path, made(), meta=meta)
    assert everything(tmp_path) == {}


# --- metrics ---------------------------------------------------------------------


def with_aux(state, aux):
    metrics = state.metrics
    return state.replace(
        metrics=dataclasses.replace(metrics, loss=metrics.loss + 2, aux=aux)
    )


@pytest.mark.parametrize(
    "aux",
    [
        {},
        {"out": torch.tensor(1.5)},
        {"a": [torch.tensor(1), (torch.tensor(True), None)], 3: {}},
        [torch.tensor(2.0, dtype=torch.float64)],
        torch.tensor(4.0),
        (),
        None,
    ],
    ids=["empty", "dict", "nested", "list", "leaf", "tuple", "none"],
)
def test_metrics_come_back_into_a_fresh_state(tmp_path, aux):
    state = with_aux(made(), aux)
    save(tmp_path, state)
    assert_same(restore(tmp_path, made()).state, state)


@pytest.mark.parametrize(
    "aux",
    [
        Pair(torch.tensor(1.0), torch.tensor(2)),
        Scores(torch.tensor(1.0), [Pair(torch.tensor(1.0), torch.tensor(2))]),
    ],
    ids=["NamedTuple", "pytree"],
)
def test_named_metrics_need_like_to_keep_their_class(tmp_path, aux):
    state = with_aux(made(), aux)
    save(tmp_path, state)
    assert_same(restore(tmp_path, state).state, state)
    plain = restore(tmp_path, made()).state.metrics.aux
    assert sorted(plain) == sorted(
        aux._fields if isinstance(aux, Pair) else ["accuracy", "parts"]
    )


# --- the step exists already -----------------------------------------------------


def test_saving_the_same_again_is_the_same(tmp_path):
    path = save(tmp_path, made())
    before = everything(tmp_path)
    times = [file.stat().st_mtime_ns for file in path.iterdir()]
    assert save(tmp_path, made()) == path
    assert everything(tmp_path) == before
    assert [file.stat().st_mtime_ns for file in path.iterdir()] == times


@pytest.mark.parametrize("change", ["values", "meta", "cursor", "dtype"])
def test_another_state_of_the_same_step_is_refused(tmp_path, change):
    save(tmp_path, made())
    before = everything(tmp_path)
    options = {"meta": {"meta": {"a": 1}}, "cursor": {"cursor": Cursor()}}
    state = made(seed=1) if change == "values" else made()
    if change == "dtype":
        state = zf.shard(parameters(), zf.make_mesh(MESH), dtype=torch.float64)
    with pytest.raises(zf.CheckpointError, match=r"step-00000000: .*other contents"):
        save(tmp_path, state, **options.get(change, {}))
    assert everything(tmp_path) == before


def test_a_damaged_step_is_not_taken_for_the_same(tmp_path):
    path = save(tmp_path, made())
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(zf.CheckpointError, match=r"rank-00000.safetensors: its sha256"):
        save(tmp_path, made())
    (path / "manifest.json").unlink()
    with pytest.raises(zf.CheckpointError, match="not a complete checkpoint"):
        save(tmp_path, made())


# --- states and roots that cannot be ---------------------------------------------


def test_a_simulated_state_is_refused(tmp_path):
    step = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=1))
    state = simulate(step, {"data": 2}).shard(parameters())
    with pytest.raises(zf.CheckpointError, match=r"state is simulated.*unshard"):
        save(tmp_path / "root", state)
    with pytest.raises(zf.CheckpointError, match="like is simulated"):
        restore(tmp_path, state)
    assert everything(tmp_path) == {}


def test_simulated_training_is_saved_through_unshard(tmp_path):
    step = zf.train_step(loss, zf.optim.adamw(1e-2), zf.partition(zero=1))
    sim = simulate(step, {"data": 2})
    state = sim(sim.shard(parameters()), torch.stack([batch(0), batch(1)]))
    full = zf.shard(sim.unshard(state).params, zf.make_mesh(MESH))
    save(tmp_path, full)
    assert_same(restore(tmp_path, full).state, full)


def test_states_without_a_mesh_are_refused(tmp_path):
    fake = zf.abstract({"w": torch.ones(4)})
    abstract = zf.shard(fake, zf.AbstractMesh({"data": 4}))
    for state, match in [
        ({"w": torch.ones(1)}, "is a dict: give the TrainState"),
        (zf.unshard(made()), "no placed leaf"),
        (abstract, "AbstractMesh"),
    ]:
        with pytest.raises(zf.CheckpointError, match=match):
            save(tmp_path, state)
        with pytest.raises(zf.CheckpointError, match=match):
            restore(tmp_path, state)


def test_a_state_on_two_meshes_is_refused(tmp_path):
    other = zf.shard(torch.ones(2), zf.make_mesh({}))
    with pytest.raises(zf.CheckpointError, match="several meshes"):
        save(tmp_path, made().replace(grads=other.params))


def test_leaves_that_cannot_be_named_are_refused(tmp_path):
    twice = {"a/b": placed(torch.ones(1)), "a": {"b": placed(torch.ones(1))}}
    with pytest.raises(
        zf.CheckpointError, match="two leaves have the path 'params/a/b'"
    ):
        save(tmp_path, made().replace(params=twice))
    with pytest.raises(zf.CheckpointError, match="moments is a float, not a tensor"):
        save(tmp_path, made().replace(moments=0.5))
    assert everything(tmp_path) == {}


def test_a_root_that_is_not_a_directory(tmp_path):
    (tmp_path / "file").write_text("hello")
    for root in (tmp_path / "file", tmp_path / "file" / "root"):
        with pytest.raises(zf.CheckpointError, match="cannot make this directory"):
            save(root, made())
    assert everything(tmp_path) == {"file": b"hello"}


def test_a_root_without_permission_fails_before_data_is_read(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.mkdir", refuse)
    monkeypatch.setattr(
        sys.modules["zfunc.checkpoint.save"], "tensor_bytes", pytest.fail
    )
    with pytest.raises(zf.CheckpointError, match=r"\.tmp-step-00000000: .*Permission"):
        save(tmp_path, made())


# --- finding ---------------------------------------------------------------------


def test_latest_and_list_steps_ignore_what_is_not_a_checkpoint(tmp_path):
    assert latest(tmp_path) is None
    assert list_steps(tmp_path / "nowhere") == ()
    for step in (3, 10, 7):
        save(tmp_path, made(step=step))
    (tmp_path / "step-00000011").mkdir()
    (tmp_path / "step-00000012").write_text("a file")
    (tmp_path / "step-00000013").symlink_to(tmp_path / "step-00000007")
    (tmp_path / ".tmp-step-00000014").mkdir()
    for name in (
        "step-15",
        "step-0000000000016",
        "step-0000001\u0667",
        "xstep-00000018",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(
            (tmp_path / "step-00000003" / "manifest.json").read_bytes()
        )
    torn = tmp_path / "step-00000019"
    torn.mkdir()
    whole = (tmp_path / "step-00000010" / "manifest.json").read_bytes()
    (torn / "manifest.json").write_bytes(whole[:-20])
    misplaced = tmp_path / "step-00000020"
    misplaced.mkdir()
    (misplaced / "manifest.json").write_bytes(whole)
    assert list_steps(tmp_path) == (3, 7, 10)
    assert latest(tmp_path) == tmp_path / "step-00000010"
    assert int(restore(tmp_path, made()).state.step) == 10


def test_a_root_that_cannot_be_read_is_not_an_empty_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(zf.CheckpointError, match="cannot look for checkpoints"):
        latest(tmp_path / "file")


def test_restore_without_a_checkpoint(tmp_path):
    with pytest.raises(zf.CheckpointError, match="has no complete checkpoint"):
        restore(tmp_path, made())
    with pytest.raises(zf.CheckpointError, match="is not a directory"):
        restore(tmp_path / "nowhere", made())
    with pytest.raises(zf.CheckpointError, match=r"manifest\.json: missing"):
        restore(tmp_path / "step-00000001", made())


def test_leftovers_of_a_killed_save_are_removed_by_the_next(tmp_path):
    old = tmp_path / ".tmp-step-00000001"
    old.mkdir()
    (old / "rank-00000.safetensors").write_bytes(b"half")
    save(tmp_path, made(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_directory_may_be_renamed(tmp_path):
    path = save(tmp_path / "root", made(step=5))
    moved = path.rename(tmp_path / "best")
    assert int(restore(moved, made()).state.step) == 5


# --- another model ---------------------------------------------------------------


def test_another_model_is_refused_with_all_paths(tmp_path):
    save(tmp_path, made())
    params = parameters()
    params["layers"][1]["w"] = torch.zeros(5, 4)
    params["head"] = params.pop("cube").double()
    like = zf.shard(params, zf.make_mesh(MESH), tx=zf.optim.adamw(1e-2))
    with pytest.raises(zf.CheckpointError) as error:
        restore(tmp_path, like)
    text = str(error.value)
    for part in (
        "step-00000000: the checkpoint does not fit `like`",
        "missing in the checkpoint: params/head",
        "missing in the checkpoint: moments/0/nu/head",
        "only in the checkpoint: params/cube",
        "params/layers/1/w: expected float32 [5, 4], got float32 [5, 3]",
    ):
        assert part in text


def test_a_dtype_is_never_cast(tmp_path):
    save(tmp_path, made())
    like = zf.shard(
        parameters(), zf.make_mesh(MESH), tx=zf.optim.adamw(1e-2), dtype=torch.bfloat16
    )
    match = r"params/scale: expected bfloat16 \[\], got float32 \[\](.|\n)*dtype="
    with pytest.raises(zf.CheckpointError, match=match):
        restore(tmp_path, like)


def test_moments_on_one_side_only(tmp_path):
    mesh = zf.make_mesh(MESH)
    bare = zf.shard(parameters(), mesh)
    save(tmp_path / "with", made())
    save(tmp_path / "without", bare)
    with pytest.raises(zf.CheckpointError, match=r"(?s)moments/0/.*mesh, tx=tx\)"):
        restore(tmp_path / "with", bare)
    with pytest.raises(zf.CheckpointError, match=r"(?s)moments/0/.*without tx="):
        restore(tmp_path / "without", made())
    assert_same(restore(tmp_path / "without", bare).state, bare)


def test_moments_of_another_optimizer(tmp_path):
    save(tmp_path, made())
    like = made(tx=zf.optim.sgd(0.1, momentum=0.9))
    with pytest.raises(zf.CheckpointError, match="same model and optimizer"):
        restore(tmp_path, like)
