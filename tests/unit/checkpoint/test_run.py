# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of ``zfunc train``: kept by a rule, passed over, repeated by a replay."""

import errno
import json
import os
import re
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

import zfunc as zf
from tests.unit.checkpoint.states import edit_manifest
from zfunc.checkpoint import list_steps
from zfunc.checkpoint.files import sha256_of
from zfunc.cli.app import app
from zfunc.cli.hashes import format_hashes, hashed_leaves, hashes_of, named, read_hashes
from zfunc.launch import Outcome, RankFailure

SMALL = (
    *("--d-model=16", "--layers=1", "--heads=2", "--seq-len=16", "--batch-size=4"),
    *("--steps=8", "--save-every=2", "--lr=0.01", "--sample-tokens=0"),
    *("--backend=eager", "--verify-steps=0", "--hash-every=3"),
)
FILE = "rank-00000.safetensors"


def zfunc(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As the only rank of a job."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 100)
    return path


def train(text, out, *words):
    done = zfunc("train", "--data", text, "--out", out, *SMALL, *words)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        train(text, out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


# --- which ones stay ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ((), (2, 4, 6, 8)),
        (("--keep-last=2",), (6, 8)),
        (("--keep-every=4",), (4, 8)),
        (("--keep-last=3", "--keep-every=2"), (2, 4, 6, 8)),
    ],
)
def test_checkpoints_stay_by_the_rule(finished, text, tmp_path, words, steps):
    if not words:
        assert list_steps(finished / "checkpoints") == steps
        return
    train(text, tmp_path / "run", *words)
    assert list_steps(tmp_path / "run" / "checkpoints") == steps
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["save_every"] == 2


@pytest.mark.parametrize("name", ["keep-last", "keep-every", "hash-every"])
def test_rules_that_cannot_be(tmp_path, name):
    done = zfunc("train", "--out", tmp_path / "run", f"--{name}=0")
    assert done.exit_code == 2
    assert f"--{name} 0: must be at least 1" in done.stderr


def test_a_rule_may_change_when_a_run_goes_on(run):
    shutil.rmtree(step(run, 8))
    done = zfunc("train", "--resume", "--out", run, "--keep-last=1")
    assert done.exit_code == 0, done.output
    assert list_steps(run / "checkpoints") == (8,)


@pytest.mark.parametrize("failing", [4, 8])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    text, tmp_path, monkeypatch, failing
):
    """Also in the background, also the last: with the path, and why."""
    real = os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f".tmp-step-0000000{failing}" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    out = tmp_path / "run"
    done = zfunc("train", "--data", text, "--out", out, *SMALL)
    assert done.exit_code == 1
    assert re.search(
        rf"step-0000000{failing}/.*cannot write \d+ bytes: No space", done.stderr
    )
    assert list_steps(out / "checkpoints") == tuple(range(2, failing, 2))


# --- a damaged newest one --------------------------------------------------------


def test_resume_passes_a_damaged_one_over_and_says_so(run, finished):
    path = step(run, 8) / FILE
    path.write_bytes(path.read_bytes()[:-1])
    done = zfunc("train", "--resume", "--out", run)
    assert done.exit_code == 0, done.output
    output = done.output
    assert f"passed over: {path}: " in output
    assert "(it is damaged-step-00000008 now)" in output
    assert "going on after step 6 of 8" in output
    assert list_steps(run / "checkpoints") == (2, 4, 6, 8)
    assert (run / "checkpoints" / "damaged-step-00000008").is_dir()
    shas = [json.loads((r / "summary.json").read_text()) for r in (run, finished)]
    assert shas[0]["params_sha256"] == shas[1]["params_sha256"]
    # And once more: the name is taken, another one is found.
    path.write_bytes(path.read_bytes()[:-1])
    output = zfunc("train", "--resume", "--out", run).output
    assert "damaged-step-00000008-2 now" in output


def test_a_name_that_cannot_be_given_is_said(run, monkeypatch):
    (step(run, 8) / FILE).unlink()

    def fail(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.rename", fail)
    done = zfunc("train", "--resume", "--out", run)
    assert done.exit_code == 2
    assert "is damaged and cannot be renamed: Permission denied" in done.stderr


# --- hashes ------------------------------------------------------------------------


def test_which_steps_are_hashed(finished):
    hashes = read_hashes(finished / "hashes.jsonl")
    assert list(hashes) == [2, 3, 4, 6, 8]  # each third, and every checkpoint
    assert "params/embed" in hashes[2] or "step" in hashes[2]
    assert hashes[2]["step"] == f"{2:016x}"
    assert hashes[2].keys() == hashes[8].keys()


def test_hashes_read_back_and_a_cut_line_is_left_out(finished, tmp_path):
    rows = read_hashes(finished / "hashes.jsonl")
    path = tmp_path / "hashes.jsonl"
    path.write_text(format_hashes(rows))
    assert path.read_text() == (finished / "hashes.jsonl").read_text()
    path.write_text(format_hashes(rows)[:-30])
    assert list(read_hashes(path)) == [2, 3, 4, 6]
    assert list(read_hashes(path, 3)) == [2, 3]
    assert read_hashes(tmp_path / "none") == {}


def test_resume_goes_on_in_the_hashes(run, finished):
    shutil.rmtree(step(run, 8))
    shutil.rmtree(step(run, 6))
    assert zfunc("train", "--resume", "--out", run).exit_code == 0
    both = [(r / "hashes.jsonl").read_text() for r in (run, finished)]
    assert both[0] == both[1]


def hashed(x):
    mesh = zf.make_mesh({"data": 1})
    state = zf.shard({"w": x}, mesh)
    paths = [path for path, _ in hashed_leaves(state)]
    return named(paths, hashes_of(state, mesh))["params/w"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
def test_every_bit_of_every_element_counts(dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    x = torch.arange(6).to(dtype)
    for i in range(6):
        for bit in range(8 * dtype.itemsize):
            one = 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
            changed = x.clone()
            changed.view(integer)[i] ^= torch.tensor(one, dtype=integer)
            assert hashed(changed) != hashed(x)
    assert hashed(x.flip(0)) != hashed(x)


def test_a_hash_is_the_formula_in_chunks_too(monkeypatch):
    module = sys.modules["zfunc.cli.hashes"]
    x = torch.randn(7, 5)
    bits = x.view(torch.int32).flatten().tolist()
    expected = sum((2 * i + 1) * b for i, b in enumerate(bits)) % 2**64
    for chunk in (1, 4, 35, 2**20):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert hashed(x) == f"{expected:016x}"


def test_another_placement_is_refused():
    mesh = zf.make_mesh({"data": 1})
    state = zf.shard({"w": torch.ones(2, 2)}, mesh, spec=zf.P(None, "data"))
    with pytest.raises(
        ValueError, match=r"params/w is placed by .*expected P\('data'\)"
    ):
        hashes_of(state, mesh)


# --- replay ------------------------------------------------------------------------


def replay(path, steps):
    return zfunc("replay", path, "--steps", steps)


@pytest.mark.parametrize(
    ("first", "steps", "states"), [(2, 6, 5), (4, 3, 2), (6, 1, 1), (2, 1, 2)]
)
def test_a_clean_run_is_equal(finished, first, steps, states):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))
    done = replay(step(finished, first), steps)
    assert done.exit_code == 0, done.output
    last = first + steps
    which = f"step {last}" if steps == 1 else f"steps {first + 1} to {last}"
    assert f"equal: {which} bit for bit; {steps} losses" in done.output
    assert re.search(rf"{states} states of \d\d leaves", done.output)
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*")) == before


def test_a_run_that_was_resumed_on_is_equal_too(run):
    """The stage is that of the steps that are repeated."""
    shutil.rmtree(step(run, 8))
    assert zfunc("train", "--resume", "--out", run, "--zero=1").exit_code == 0
    assert replay(step(run, 2), 6).exit_code == 0


def differing(run, first, steps):
    done = replay(step(run, first), steps)
    assert done.exit_code == 1, done.output
    return done.stderr


def reseal(directory):
    """The checkpoint's own hashes fit again: it was so when it was saved."""
    digest = sha256_of(directory / FILE)
    edit_manifest(directory, lambda m: m["files"][0].update(sha256=digest))


@pytest.mark.parametrize("which", ["params", "moments"])
def test_a_flipped_bit_in_the_checkpoint_is_found(run, which):
    path = step(run, 4) / FILE
    data = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    leaf = next(p for p in header if p.startswith(which) and header[p]["shape"])
    data[size + header[leaf]["data_offsets"][0]] ^= 1  # the last bit of the mantissa
    path.write_bytes(data)
    assert "its sha256 differs" in replay(step(run, 4), 2).stderr
    reseal(step(run, 4))
    error = differing(run, 4, 2)
    assert f"differs at step 4 as it is loaded:\n  {leaf}\n" in error


def test_a_flipped_bit_in_memory_is_found(finished, monkeypatch):
    """One bit of one parameter while step 6 is taken; the hash of step 6 has it."""
    module = sys.modules["zfunc.cli.replay"]
    real = module.compiled_step

    def faulty(config):
        step_fn = real(config)

        def stepped(state, batch):
            state = step_fn(state, batch)
            if int(state.step) == 6:
                leaf = zf.tree_leaves(state.params)[0]
                leaf.view(torch.int32).view(-1)[3] ^= 1
            return state

        return stepped

    monkeypatch.setattr(module, "compiled_step", faulty)
    error = differing(finished, 2, 6)
    found = re.search(r"differs at step 6:\n  (params/\S+)\n", error)
    assert found is not None, error
    assert "  loss" not in error


def test_a_changed_learning_rate_is_found(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "lr": 0.02}))
    error = differing(run, 2, 4)
    assert "differs at step 3:\n" in error
    assert "params/" in error
    assert "... and " in error
    assert "(config.json says --lr 0.02, the checkpoint 0.01)" in error


def test_a_changed_record_is_found(run):
    path = run / "metrics.csv"
    rows = path.read_text().splitlines()
    fields = rows[5].split(",")
    fields[1] = repr(float(fields[1]) + 1e-15)
    path.write_text("\n".join([*rows[:5], ",".join(fields), *rows[6:]]) + "\n")
    error = differing(run, 2, 4)
    assert re.search(r"differs at step 5:\n  loss is \d\.\d+, recorded \d\.\d+", error)


def test_without_hashes_the_losses_are_compared(run):
    (run / "hashes.jsonl").unlink()
    assert "6 losses and gradient norms, 0 states" in replay(step(run, 2), 6).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((4, 5), "--steps 5: the run recorded 4 steps after step 4: type --steps 4"),
        ((8, 1), "the run recorded 0 steps after step 8: give an older checkpoint"),
        ((5, 1), "step-00000005"),
    ],
)
def test_steps_that_were_not_recorded(finished, words, message):
    done = replay(step(finished, words[0]), words[1])
    assert done.exit_code == 2
    assert message in done.stderr


def test_what_is_not_a_checkpoint_of_a_run(finished, tmp_path):
    done = replay(finished, 1)
    assert done.exit_code == 2
    assert "is not a checkpoint: give RUN/checkpoints/step-..." in done.stderr
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({"data": 1}))
    path = zf.checkpoint.save(tmp_path, state)
    done = replay(path, 1)
    assert done.exit_code == 2
    assert "is not of zfunc train" in done.stderr


def test_text_that_has_changed_is_refused(run, text):
    content = text.read_bytes()
    text.write_bytes(content[::-1])
    try:
        done = replay(step(run, 2), 2)
    finally:
        text.write_bytes(content)
    assert done.exit_code == 2
    assert "the text has changed since" in done.stderr


@pytest.mark.parametrize(
    ("code", "message", "shown"),
    [
        (
            1,
            "ReplayDiffersError: differs at step 5:\n  [b]",
            "differs at step 5:\n  [b]",
        ),
        (2, "UsageError: --steps 9: too many", "--steps 9: too many"),
        (1, "ValueError: no", "rank 0 (pid 7) failed: ValueError: no"),
    ],
)
def test_how_the_launcher_ends(finished, monkeypatch, code, message, shown):
    monkeypatch.delenv("RANK")
    failure = RankFailure(0, 7, code, message, "Traceback")
    outcome = Outcome(0, failure, False)
    module = sys.modules["zfunc.cli.replay"]
    monkeypatch.setattr(module, "torchrun", lambda *args: outcome)
    done = replay(step(finished, 2), 1)
    assert done.exit_code == code
    assert done.stderr.endswith(f"error: {shown}\n")
    assert ("Traceback" in done.stderr) == message.startswith("ValueError")


def test_the_launcher_refuses_before_it_starts_ranks(finished, monkeypatch):
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(sys.modules["zfunc.cli.replay"], "torchrun", pytest.fail)
    assert replay(step(finished, 2), 99).exit_code == 2
    assert zfunc("replay", step(finished, 2)).exit_code == 2  # --steps is missing
