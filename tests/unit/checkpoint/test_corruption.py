# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is damaged or hostile is refused, and the error names the file."""

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import zfunc as zf
from tests.unit.checkpoint.states import (
    contents,
    edit_manifest,
    made,
    saved_by_ranks,
    state_on,
    with_its_hash,
)
from zfunc.checkpoint import latest, list_steps, restore, save
from zfunc.core.sharding import P

FILES = ("rank-00000.safetensors", "rank-00001.safetensors")
MANIFEST = "manifest.json"
NUM_BIT_FLIPS = 200


def full_tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((6, 4), (5,))]


def like():
    placements = [P("data"), P("data")]
    zeros = [torch.zeros_like(x) for x in full_tensors()]
    return state_on((("data", 1),), 0, zeros, placements, kind="local")


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of two ranks, whose files have the same size."""
    placements = [P("data"), P("data")]
    axes = (("data", 2),)
    path = saved_by_ranks(tmp_path / "root", axes, full_tensors(), placements)
    expected = state_on((("data", 1),), 0, full_tensors(), placements, kind="local")
    assert contents(restore(path, like()).state) == contents(expected)
    return path


def refused(directory, match, **options):
    """The error of restoring, which must not change ``like``."""
    given = like()
    before = contents(given)
    with pytest.raises(zf.CheckpointError, match=match) as error:
        restore(directory, given, **options)
    assert contents(given) == before
    return str(error.value)


def swap(one, two):
    spare = one.with_name("spare")
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


# --- data files --------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("eighths", range(8))
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file(directory, name, eighths, verify):
    path = directory / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * eighths // 8])
    match = rf"{name}: {len(whole) * eighths // 8} bytes, expected {len(whole)}"
    refused(directory, match, verify=verify)


def test_a_file_that_grew(directory):
    with open(directory / FILES[1], "ab") as file:
        file.write(b"\0")
    refused(directory, rf"{FILES[1]}: \d+ bytes, expected \d+", verify=False)


def test_every_bit_flip_in_a_data_file(directory):
    rng = random.Random(0)
    for _ in range(NUM_BIT_FLIPS):
        path = directory / rng.choice(FILES)
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        refused(directory, rf"{path.name}: its (sha256 differs|safetensors header)")
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file(directory, name):
    (directory / name).unlink()
    refused(directory, rf"{name}.*missing|missing '{name}'")


@pytest.mark.parametrize("verify", [True, False])
def test_files_of_two_ranks_swapped(directory, tmp_path, verify):
    swap(*(directory / name for name in FILES))
    refused(directory, rf"{FILES[0]}: \d+ bytes, expected", verify=verify)
    # Ranks 1 and 2 hold as much as each other.
    full, placements = full_tensors(), [P("data"), P("data")]
    path = saved_by_ranks(tmp_path / "three", (("data", 3),), full, placements)
    swap(path / FILES[1], path / "rank-00002.safetensors")
    refused(path, rf"{FILES[1]}: .*header is not that of rank 1", verify=verify)


def test_data_of_two_ranks_swapped_under_their_headers(tmp_path):
    full, placements = full_tensors(), [P("data"), P("data")]
    path = saved_by_ranks(tmp_path / "three", (("data", 3),), full, placements)
    one, two = path / FILES[1], path / "rank-00002.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    data = 8 + int.from_bytes(first[:8], "little")
    one.write_bytes(first[:data] + second[data:])
    two.write_bytes(second[:data] + first[data:])
    refused(path, rf"{FILES[1]}: its sha256 differs")


def test_a_file_of_another_step(tmp_path):
    one, two = (save(tmp_path, made(step=step)) for step in (1, 2))
    (two / FILES[0]).write_bytes((one / FILES[0]).read_bytes())
    with pytest.raises(
        zf.CheckpointError, match="header is not that of rank 0 at step 2"
    ):
        restore(two, made(), verify=False)


@pytest.mark.parametrize(
    "name", ["rank-00002.safetensors", "notes.txt", ".hidden", "dir"]
)
def test_an_extra_file(directory, name):
    if name == "dir":
        (directory / name).mkdir()
    else:
        (directory / name).write_bytes(b"x")
    refused(directory, rf"'{name}' not in the manifest")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_symbolic_link(directory, name):
    elsewhere = directory.parent.parent / "elsewhere"
    (directory / name).rename(elsewhere)
    (directory / name).symlink_to(elsewhere)
    refused(directory, rf"{name}: a symbolic link")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kind", ["directory", "pipe"])
def test_not_a_regular_file(directory, name, kind):
    (directory / name).unlink()
    if kind == "pipe":
        os.mkfifo(directory / name)
    else:
        (directory / name).mkdir()
    refused(directory, rf"{name}: not a regular file")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**31, 100_000_000, 0])
@pytest.mark.parametrize("verify", [True, False])
def test_a_header_of_any_claimed_length_is_not_read(directory, length, verify):
    path = directory / FILES[0]
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(directory, rf"{FILES[0]}: its safetensors header", verify=verify)


@pytest.mark.parametrize("garbage", [b"\xff" * 40, b"{" * 40, b"[" * 40], ids=str)
def test_a_header_that_is_not_json(directory, garbage):
    path = directory / FILES[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + garbage + whole[48:])
    refused(directory, rf"{FILES[1]}: its safetensors header", verify=False)


def test_a_shape_that_only_the_file_has(directory):
    path = directory / FILES[0]
    path.write_bytes(path.read_bytes().replace(b'"shape":[3,4]', b'"shape":[4,3]'))
    refused(directory, rf"{FILES[0]}: its safetensors header", verify=False)


def test_damage_in_the_newest_step_does_not_restore_an_older_one(tmp_path):
    save(tmp_path, made(step=1))
    path = save(tmp_path, made(step=2)) / FILES[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(zf.CheckpointError, match=r"step-00000002/rank.*another step"):
        restore(tmp_path, made())
    assert list_steps(tmp_path) == (1, 2)
    assert int(restore(tmp_path / "step-00000001", made()).state.step) == 1


# --- the manifest --------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b"{}",
        b'{"schema_version": 1}\n{}',
        b'{"schema_version": 1, "step": 3, "step": 4}',
        b'{"schema_version": 1, "step": NaN}',
        b'{"schema_version": 1, "step": 3}\xff',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema_version": 1e400}',
        b'{"schema_version": "1"}',
        b"\x80\x04\x95K\x05.",
    ],
    ids=lambda text: str(text[:24]),
)
def test_a_manifest_that_is_not_one(directory, text):
    (directory / MANIFEST).write_bytes(text)
    refused(directory, rf"{MANIFEST}: not a manifest")
    assert latest(directory.parent) is None


def test_any_value_in_any_place_is_refused_or_harmless(directory):
    """No other exception, and never other tensors."""
    path = directory / MANIFEST
    tree, given = json.loads(path.read_text()), like()
    expected = contents(restore(directory, given).state)
    values = [None, True, -1, 2**62, 2**200, 1e308, "", "x", [], {}, [[]]]
    num_refused = 0

    def places(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield node, key
            if isinstance(node[key], dict | list):
                yield from places(node[key])

    for node, key in list(places(tree)):
        before = node[key]
        for value in values:
            node[key] = value
            path.write_text(with_its_hash(tree))
            message = message_of_restoring(directory, given, expected)
            assert not message or str(directory) in message
            num_refused += bool(message)
        node[key] = before
    assert num_refused > 700


def message_of_restoring(directory, given, expected):
    """The error, "" if there is none and the tensors are right."""
    try:
        got = restore(directory, given, verify=False)
    except zf.CheckpointError as error:
        return str(error)
    assert contents(got.state) == expected
    return ""


def test_an_integer_of_many_digits(directory):
    path = directory / MANIFEST
    text = path.read_text().replace('"cursor": null', f'"cursor": {"9" * 5000}')
    path.write_text(text)
    refused(directory, MANIFEST)
    assert latest(directory.parent) is None


@pytest.mark.parametrize("version", [0, 2, -1, 10**30])
def test_another_schema_version(directory, version):
    edit_manifest(directory, lambda m: m.update(schema_version=version))
    message = rf"{MANIFEST}: schema version {version}, expected 1"
    refused(directory, message)
    # A newer checkpoint than this zfunc reads is not one to pass over in silence.
    with pytest.raises(zf.CheckpointError, match=message):
        latest(directory.parent)


def test_every_truncation_of_the_manifest(directory):
    path = directory / MANIFEST
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 2, 7), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(directory, rf"{MANIFEST}: (not a manifest|its last byte is missing)")


def test_every_bit_flip_in_the_manifest(directory):
    """Only a flip of white space can pass; nothing that is read may differ."""
    rng = random.Random(1)
    path = directory / MANIFEST
    whole = path.read_bytes()
    for _ in range(NUM_BIT_FLIPS):
        bit = rng.randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if _json(flipped) == _json(whole):
            assert contents(restore(directory, like()).state)
        else:
            refused(directory, re.escape(str(directory)))


def _json(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("field", ["cursor", "meta", "key", "zfunc_version"])
def test_a_changed_field_that_is_still_valid(tmp_path, field):
    path = save(tmp_path, made(), cursor=[5], meta={"a": 1}) / MANIFEST
    tree = json.loads(path.read_text())
    tree[field] = {"cursor": [7], "meta": {"a": 3}, "key": 3, "zfunc_version": "9"}[
        field
    ]
    path.write_text(json.dumps(tree) + "\n")
    with pytest.raises(zf.CheckpointError, match="its manifest_sha256 is not that"):
        restore(tmp_path / "step-00000000", made())


@pytest.mark.parametrize(
    "name",
    [
        "../rank-00001.safetensors",
        "/etc/hostname",
        "a/../rank-00001.safetensors",
        "rank-00001.safetensors/",
        "..",
        ".",
        "",
        "rank-00001.safetensors\0",
        "rank-00000.safetensors",
        "RANK-00001.safetensors",
    ],
)
def test_a_name_in_the_manifest_that_is_not_plain(directory, name, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(
        "os.open", lambda p, *a, **k: opened.append(p) or real(p, *a, **k)
    )
    edit_manifest(directory, lambda m: m["files"][1].update(name=name))
    text = refused(directory, rf"{MANIFEST}: not a manifest")
    assert f"the name of file 1 is {name!r}, expected '{FILES[1]}'" in text
    assert [os.path.basename(p) for p in opened] == [MANIFEST]


def leaf(manifest, path="params/0"):
    return next(entry for entry in manifest["leaves"] if entry["path"] == path)


def big_metric(manifest):
    shape = [2**40]
    leaf(manifest, "metrics/loss").update(global_shape=shape, local_shape=shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(extra=1), "extra: Extra inputs"),
        (lambda m: m.pop("leaves"), "leaves: Field required"),
        (lambda m: m.update(step=-3), "step: Input should be greater"),
        (lambda m: m.update(step="3"), "step: Input should be a valid int"),
        (lambda m: m.update(step=3.0), "step: Input should be a valid int"),
        (lambda m: m.update(step=2**63), "step: Input should be less"),
        (lambda m: m.update(key=2**63), "key: Input should be less"),
        (lambda m: m.update(mesh=[["data", 0]]), "mesh"),
        (lambda m: m.update(mesh=[["data", 2], ["data", 1]]), "names an axis twice"),
        (lambda m: m.update(mesh=[["data", 3]]), "local shape of params/0"),
        (lambda m: m.update(mesh=[["data", 2], ["x", 2]]), "files: 2 for 4 ranks"),
        (lambda m: m.update(files=[]), "lists no files"),
        (lambda m: m["files"].pop(), "files: 1 for 2 ranks"),
        (lambda m: m["files"].reverse(), "the name of file 0"),
        (lambda m: m["files"][0].update(size_bytes=-1), "files.0.size_bytes"),
        (lambda m: m["files"][0].update(size_bytes=2**62), "its leaves take"),
        (lambda m: m["files"][0].update(sha256="A" * 64), "files.0.sha256"),
        (lambda m: m["files"][0].update(sha256="0" * 64), f"{FILES[0]}: its sha256"),
        (lambda m: leaf(m).update(dtype="object"), "dtype 'object' cannot be stored"),
        (lambda m: leaf(m).update(dtype="float64"), "expected float32"),
        (lambda m: leaf(m).update(spec=["x"]), "the spec of params/0"),
        (lambda m: leaf(m).update(spec=["data", "data"]), "the spec of params/0"),
        (lambda m: leaf(m).update(spec=[None] * 3), "longer than its shape"),
        (lambda m: leaf(m).update(global_shape=[7, 4]), "local shape of params/0"),
        (lambda m: leaf(m).update(global_shape=[-6, 4]), "global_shape.0"),
        (lambda m: leaf(m).update(global_shape=[2**70, 4]), "global_shape.0"),
        (
            lambda m: leaf(m).update(
                global_shape=[2**60, 2**60], local_shape=[2**59, 2**60]
            ),
            "params/0: expected float32",
        ),
        (lambda m: leaf(m).update(path="params/1"), "a path appears twice"),
        (lambda m: leaf(m).update(path="params/2"), "only in the checkpoint: params/2"),
        (lambda m: m["leaves"].pop(0), "missing in the checkpoint: step"),
        (big_metric, "leaves: metrics/loss of"),
        (lambda m: m.update(aux={"kind": "leaf", "path": "no"}), "'no' is not among"),
        (lambda m: m["aux"].update(kind="object"), "aux.kind"),
        (lambda m: m["aux"].update(keys=["a"]), "dict of 0 with 1 keys"),
        (lambda m: m.update(step=4), "header is not that of rank 0 at step 4"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_that_contradicts_itself(directory, change, message, verify):
    edit_manifest(directory, change)
    if not verify and "sha256" in message and "files.0" not in message:
        return  # nothing to compare it with
    text = refused(directory, re.escape(str(directory)), verify=verify)
    assert message in text


def test_a_manifest_too_long_is_not_read(directory):
    with open(directory / MANIFEST, "r+b") as file:
        file.truncate(2**40)  # sparse
    refused(directory, rf"{MANIFEST}: {2**40} bytes, a manifest has at most")


# --- memory --------------------------------------------------------------------------


def peak_bytes(reset=False):
    """The largest memory of this process since it was reset, as the kernel counts."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def sparse(path, size_bytes=2**40):
    with open(path, "r+b") as file:
        file.truncate(size_bytes)


def claims_terabytes(path):
    """A safetensors header of 2**40 bytes, in a file that has them."""
    path.write_bytes((2**40).to_bytes(8, "little") + b'{"a":')
    sparse(path)


def terabytes_of_params(directory):
    def change(manifest):
        leaf(manifest).update(global_shape=[2**42, 4], local_shape=[2**41, 4])

    edit_manifest(directory, change)


def many_ranks(directory):
    edit_manifest(directory, lambda m: m.update(mesh=[["data", 2**31 - 1]]))


HOSTILE = {
    "sparse manifest": lambda d: sparse(d / MANIFEST),
    "sparse data": lambda d: sparse(d / FILES[0]),
    "header of terabytes": lambda d: claims_terabytes(d / FILES[0]),
    "leaf of terabytes": terabytes_of_params,
    "many ranks": many_ranks,
    "nested lists": lambda d: (d / MANIFEST).write_bytes(b"[" * 2**22),
    "nested dicts": lambda d: (d / MANIFEST).write_bytes(b'{"a":' * 2**20),
    "nested cursor": lambda d: (d / MANIFEST).write_bytes(
        b'{"schema_version": 1, "cursor": ' + b"[" * 2**21 + b"]" * 2**21 + b"}\n"
    ),
    "long list": lambda d: (d / MANIFEST).write_bytes(
        b'{"schema_version": 1, "cursor": [' + b"0," * 2**20 + b"0]}\n"
    ),
    "long sealed list": lambda d: edit_manifest(
        d, lambda m: m.update(cursor=[0] * 2**20, extra=1)
    ),
    "long path": lambda d: edit_manifest(d, lambda m: leaf(m).update(path="x" * 2**22)),
}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc")
@pytest.mark.parametrize("kind", HOSTILE)
def test_memory_is_bounded_by_what_is_read(directory, kind):
    """Nothing that a file claims is believed: some copies of 4 MiB are the most."""
    HOSTILE[kind](directory)
    start = peak_bytes(reset=True)
    refused(directory, re.escape(str(directory)))
    assert peak_bytes() - start < 200 * 2**20


def test_a_deep_structure_of_metrics(directory):
    def deepen(manifest):
        node = manifest["aux"]
        for _ in range(400):
            node = {"kind": "list", "path": None, "keys": [], "children": [node]}
        manifest["aux"] = node

    edit_manifest(directory, deepen)
    refused(directory, rf"{MANIFEST}: not a manifest")


def test_nothing_is_executed(directory, tmp_path):
    """A pickle that writes a file, in the place of every file."""
    canary = tmp_path / "canary"
    pickled = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    for name in (*FILES, MANIFEST):
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(pickled + whole[len(pickled) :])
        refused(directory, name, verify=False)
        (directory / name).write_bytes(whole)
    assert not canary.exists()


def test_the_library_has_no_pickle():
    names = [n for n in sys.modules if n.startswith("zfunc.checkpoint")]
    for name in names:
        source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load", "torch.save", "_object("):
            assert word not in source


def test_the_manifest_is_json_for_anyone(directory):
    tree = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    assert tree["files"][1]["name"] == FILES[1]
