# SPDX-License-Identifier: Apache-2.0
"""The newest checkpoint that is whole is taken, and what was passed over is said."""

import os

import pytest
import torch

import zfunc as zf
from tests.unit.checkpoint.states import assert_same, edit_manifest, everything, made
from zfunc.checkpoint import (
    Damage,
    DamagedError,
    list_steps,
    restore,
    restore_newest,
    save,
)

FILE, MANIFEST = "rank-00000.safetensors", "manifest.json"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def extra(path):
    path.with_name("extra").write_bytes(b"")


def link(path):
    path.rename(path.with_name("there"))
    path.symlink_to(path.with_name("there"))


DAMAGES = {
    "flip": flip,
    "header": lambda path: flip(path, 20),
    "cut": cut,
    "missing": os.unlink,
    "extra": extra,
    "link": link,
}


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, made(step=step), cursor=[step], meta={"of": step})
    return tmp_path


def test_the_newest_if_all_are_whole(root):
    newest = restore_newest(root, made())
    assert newest.path == root / "step-00000003"
    assert newest.damaged == ()
    assert_same(newest.restored.state, made(step=3))
    assert newest.restored.cursor == [3]


@pytest.mark.parametrize("name", [FILE, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_by_name(root, damage, name):
    path = root / "step-00000003"
    DAMAGES[damage](path / name)
    before = everything(root)
    with pytest.raises(DamagedError) as alone:
        restore(path, made())
    newest = restore_newest(root, made())
    assert newest.path == root / "step-00000002"
    assert newest.damaged == (Damage(path, str(alone.value)),)
    assert str(path) in newest.damaged[0].why
    assert newest.restored.meta == {"of": 2}
    assert everything(root) == before


def test_two_damaged_and_a_half_removed_one(root):
    flip(root / "step-00000003" / FILE)
    cut(root / "step-00000002" / MANIFEST)
    (root / "step-00000009").mkdir()
    newest = restore_newest(root, made())
    assert newest.path.name == "step-00000001"
    steps = [damage.path.name for damage in newest.damaged]
    assert steps == ["step-00000009", "step-00000003", "step-00000002"]


def test_all_damaged(root):
    for step in (1, 2, 3):
        flip(root / f"step-0000000{step}" / FILE)
    with pytest.raises(zf.CheckpointError) as raised:
        restore_newest(root, made())
    text = str(raised.value)
    assert text.startswith(f"{root}: no checkpoint is whole:\n")
    assert text.count("its sha256 differs") == 3


def test_without_a_checkpoint(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(zf.CheckpointError, match="there is no checkpoint"):
            restore_newest(root, made())


def test_what_is_not_damage_is_not_passed_over(root):
    other = zf.shard({"w": torch.ones(3)}, zf.make_mesh({"data": 1}))
    with pytest.raises(zf.CheckpointError, match="does not fit `like`"):
        restore_newest(root, other)
    edit_manifest(root / "step-00000003", lambda m: m.update(schema_version=2))
    with pytest.raises(zf.CheckpointError, match="schema version 2"):
        restore_newest(root, made())


def test_an_unreadable_file_is_damage(root, monkeypatch):
    real = os.open

    def fail(path, *args, **options):
        if str(path) == str(root / "step-00000003" / FILE):
            raise OSError(5, "Input/output error")
        return real(path, *args, **options)

    monkeypatch.setattr("os.open", fail)
    newest = restore_newest(root, made())
    assert "cannot be read: Input/output error" in newest.damaged[0].why
    assert newest.path.name == "step-00000002"


def test_going_on_from_the_older_one_after_moving_the_damaged(root):
    path = root / "step-00000003"
    flip(path / FILE)
    with pytest.raises(zf.CheckpointError, match="its sha256 differs"):
        save(root, made(step=3), cursor=[3], meta={"of": 3})
    path.rename(root / "damaged-step-00000003")
    save(root, made(step=3), cursor=[3], meta={"of": 3})
    assert list_steps(root) == (1, 2, 3)


# --- a loss scale in the state ----------------------------------------------------


def scaled(state, scale=None):
    rule = zf.DynamicLossScale() if scale is None else zf.StaticLossScale(scale)
    return state.replace(loss_scale=rule.init(state.step))


def test_a_loss_scale_comes_back(tmp_path):
    state = scaled(made(), 0.375)
    save(tmp_path, state)
    assert_same(restore(tmp_path, scaled(made(seed=1))).state, state)


def test_a_loss_scale_on_one_side_only(tmp_path):
    save(tmp_path / "with", scaled(made()))
    save(tmp_path / "without", made())
    match = r"(?s)loss_scale/scale.*like.replace\(loss_scale=step.loss_scale_of\(like\)"
    for folder, like in (("with", made()), ("without", scaled(made()))):
        with pytest.raises(zf.CheckpointError, match=match):
            restore(tmp_path / folder, like)
