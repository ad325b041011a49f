# SPDX-License-Identifier: Apache-2.0
"""Datasets return the bytes and ids that are in the files, or say what is wrong."""

import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zfunc.data import (
    ByteDataset,
    Cursor,
    Loader,
    MemmapTokens,
    TokenRange,
    memmap,
    standard_library_files,
    train_validation_split,
    unigram_entropy,
    write_tokens,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {
        "b.py": b"bb",
        "a/z.md": b"z\xff",
        "a.txt": b"dot",
        "a/sub/c.py": b"c",
        "image.png": b"no",
        ".hidden/x.py": b"no",
        ".x.py": b"no",
        "empty.txt": b"",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    return tmp_path


def content(dataset: ByteDataset) -> bytes:
    return bytes(dataset.window(0, len(dataset)).tolist())


# --- bytes -------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_relative_paths(folder: Path):
    # "." sorts before "/", so a.txt comes before a/.
    assert content(ByteDataset(folder)) == b"dot" + b"c" + b"z\xff" + b"bb"
    assert content(ByteDataset(str(folder), patterns=["*.py"])) == b"cbb"


def test_given_files_are_read_in_the_order_given(folder: Path):
    files = [folder / "b.py", folder / "a.txt", folder / "b.py"]
    assert content(ByteDataset(files)) == b"bbdotbb"
    assert content(ByteDataset(iter(map(str, files)))) == b"bbdotbb"
    assert content(ByteDataset(folder / "image.png")) == b"no"


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 4, 7, 8])
def test_max_bytes_keeps_the_front(folder: Path, max_bytes: int):
    dataset = ByteDataset(folder, max_bytes=max_bytes)
    assert content(dataset) == b"dotcz\xffbb"[:max_bytes]


def test_byte_windows(folder: Path):
    dataset = ByteDataset(folder)
    window = dataset.window(5, 2)
    assert window.dtype == torch.int64
    assert window.tolist() == [255, ord("b")]
    for start, length in ((-1, 2), (0, 0), (7, 2)):
        with pytest.raises(ValueError, match="is not inside the 8 tokens"):
            dataset.window(start, length)


def test_standard_library_is_sorted_sources_without_tests():
    files = standard_library_files()
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert all(path.suffix == ".py" for path in files)
    root = Path(os.__file__).parent
    relative = [path.relative_to(root).as_posix() for path in files]
    assert relative == sorted(relative)
    folders = {part for name in relative for part in name.split("/")[:-1]}
    assert "unittest" in folders
    assert folders.isdisjoint({"test", "idle_test", "site-packages", "__pycache__"})
    assert len(ByteDataset(files[:20])) == sum(p.stat().st_size for p in files[:20])


def test_a_folder_without_its_library_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"got no \*.py file, expected the"):
        standard_library_files()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda f: ByteDataset(f / "no"), FileNotFoundError, "no: cannot be read"),
        (lambda f: ByteDataset([f / "no"]), FileNotFoundError, "no: cannot be read"),
        (lambda f: ByteDataset([f / "a"]), ValueError, "a: cannot be read .Is a dir"),
        (lambda f: ByteDataset(f / "empty.txt"), ValueError, "empty.txt: got 0 bytes"),
        (lambda f: ByteDataset([]), ValueError, "the 0 given files: got 0 bytes"),
        (
            lambda f: ByteDataset(f, patterns=["*.c", "*.h"]),
            ValueError,
            r"got no file that matches \*\.c, \*\.h, expected at least one; give",
        ),
        (lambda f: ByteDataset(f, max_bytes=0), ValueError, "max_bytes=0, expected"),
    ],
)
def test_byte_dataset_errors(folder: Path, make, kind, message: str):
    with pytest.raises(kind, match="ByteDataset: .*" + message):
        make(folder)


def test_unreadable_paths_are_named(folder: Path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    for method in ("open", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(ValueError, match=r"cannot be read \(Permission denied"):
                ByteDataset(folder)


def test_an_unreadable_folder_is_an_error_and_not_skipped(folder: Path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="sub: cannot be read"):
        ByteDataset(folder)


# --- memory-mapped ids ---------------------------------------------------------------

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["tensor", "array", "list"])
def test_written_ids_are_read_back(tmp_path: Path, dtype, kind: str):
    top = int(np.iinfo(dtype).max) - 1
    ids = [0, 1, top, min(top, 258), 7]
    given = {"tensor": torch.tensor, "array": np.array, "list": list}[kind](ids)
    path = tmp_path / "tokens.bin"
    write_tokens(path, given, dtype)
    size = np.dtype(dtype).itemsize
    assert path.read_bytes() == b"".join(i.to_bytes(size, "little") for i in ids)
    dataset = MemmapTokens(path, vocab_size=top + 1, dtype=dtype)
    assert len(dataset) == 5
    assert dataset.window(0, 5).tolist() == ids
    assert dataset.window(3, 2).tolist() == ids[3:]
    assert dataset.window(0, 1).dtype == torch.int64
    with pytest.raises(ValueError, match="is not inside the 5 tokens"):
        dataset.window(4, 2)


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "tokens.bin"
    for ids in ([1, 2, 3], [4]):
        write_tokens(path, ids)
        assert MemmapTokens(path, 10).window(0, len(ids)).tolist() == ids
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch, fails: str):
    path = tmp_path / "tokens.bin"
    write_tokens(path, [1, 2, 3])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_tokens(path, [4])
    assert MemmapTokens(path, 10).window(0, 3).tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_ids_are_on_the_disk_before_they_have_the_name(tmp_path: Path, monkeypatch):
    path, order = tmp_path / "tokens.bin", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append("replace"), replace(a, b))
    )
    write_tokens(path, [1])
    assert order == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize(
    ("ids", "dtype", "kind", "message"),
    [
        ([], "uint16", ValueError, r"ids of shape \(0,\), expected one dimension"),
        ([[1]], "uint16", ValueError, r"ids of shape \(1, 1\), expected one dimension"),
        ([1.5], "uint16", TypeError, "dtype float64, expected integers"),
        ([-1], "uint16", ValueError, r"ids in \[-1, -1\], expected .* \[0, 65535\]"),
        ([-1], "int64", ValueError, r"ids in \[-1, -1\], expected them in \[0"),
        ([65536], "uint16", ValueError, "for uint16; choose a wider dtype="),
        ([1], "float32", ValueError, "token dtype 'float32': expected one of"),
    ],
)
def test_write_errors(tmp_path: Path, ids, dtype, kind, message: str):
    with pytest.raises(kind, match=message):
        write_tokens(tmp_path / "tokens.bin", ids, dtype)
    assert list(tmp_path.iterdir()) == []


def test_write_to_a_missing_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no/t\.bin: the folder .* not exist"):
        write_tokens(tmp_path / "no" / "t.bin", [1])


def test_open_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no\.bin: no such file; write it"):
        MemmapTokens(tmp_path / "no.bin", 10)
    with pytest.raises(ValueError, match=r"cannot be read \(Is a directory"):
        MemmapTokens(tmp_path, 10)
    path = tmp_path / "odd.bin"
    for data in (b"", b"abc"):
        path.write_bytes(data)
        message = f"odd.bin: got {len(data)} bytes, expected a positive multiple of 2"
        with pytest.raises(ValueError, match=message):
            MemmapTokens(path, 10)


@pytest.mark.parametrize(("dtype", "bad"), [("uint16", 10), ("int32", -3)])
def test_ids_outside_the_vocabulary_are_found(tmp_path: Path, dtype, bad: int):
    path = tmp_path / "tokens.bin"
    np.array([1, 2, 9, bad], np.dtype(dtype).newbyteorder("<")).tofile(path)
    dataset = MemmapTokens(path, vocab_size=10, dtype=dtype)
    assert dataset.window(0, 3).tolist() == [1, 2, 9]
    message = f"tokens.bin: token 3 has id {bad}, expected 0 <= id < vocab_size=10"
    with pytest.raises(ValueError, match=message):
        dataset.window(1, 3)


def test_opening_reads_nothing(tmp_path: Path):
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(2**36)  # 64 GiB of holes
    dataset = MemmapTokens(path, vocab_size=1, dtype="uint32")
    assert len(dataset) == 2**34
    assert dataset.window(2**34 - 2, 2).tolist() == [0, 0]


def test_the_loader_names_the_file_that_is_too_short(tmp_path: Path):
    path = tmp_path / "short.bin"
    write_tokens(path, [1] * 20)
    with pytest.raises(ValueError, match=r"short.bin, 20 tokens\): got 20 tokens"):
        Loader(MemmapTokens(path, 2), seq_len=9, global_batch=3)
    text = tmp_path / "short.txt"
    text.write_text("abc")
    with pytest.raises(ValueError, match=r"short.txt, 3 tokens\): got 3 tokens"):
        Loader(ByteDataset(text), seq_len=9, global_batch=3)


def test_both_datasets_feed_the_same_batches(tmp_path: Path):
    files = standard_library_files()[:3]
    text = ByteDataset(files, max_bytes=5000)
    path = tmp_path / "tokens.bin"
    write_tokens(path, text.window(0, len(text)), "uint8")
    loaders = [
        Loader(dataset, seq_len=15, global_batch=8)
        for dataset in (text, MemmapTokens(path, 256, "uint8"))
    ]
    one, other = (loader.next(Cursor(1, 2, 3)) for loader in loaders)
    assert torch.equal(one[0]["tokens"], other[0]["tokens"])
    assert one[1] == other[1]


# --- splits and statistics -----------------------------------------------------------


@given(num_tokens=st.integers(2, 200), fraction=st.floats(0.01, 0.99))
def test_split_is_a_partition(num_tokens: int, fraction: float):
    dataset = ByteDataset(__file__, max_bytes=num_tokens)
    if not 0 < int(num_tokens * fraction) < num_tokens:
        with pytest.raises(ValueError, match="validation tokens, expected 1 to"):
            train_validation_split(dataset, fraction)
        return
    train, validation = train_validation_split(dataset, fraction)
    assert len(validation) == int(num_tokens * fraction)
    parts = [part.window(0, len(part)) for part in (train, validation)]
    assert torch.equal(torch.cat(parts), dataset.window(0, num_tokens))
    with pytest.raises(ValueError, match=f"not inside the {len(train)} tokens"):
        train.window(len(train) - 1, 2)


def test_ranges_nest_and_are_checked():
    dataset = ByteDataset(__file__, max_bytes=50)
    inner = TokenRange(TokenRange(dataset, 10, 40), 5, 20)
    assert inner.vocab_size == 256
    assert torch.equal(inner.window(3, 4), dataset.window(18, 4))
    for start, stop in ((-1, 5), (5, 5), (0, 51)):
        with pytest.raises(ValueError, match=r"start < stop <= len\(dataset\)=50"):
            TokenRange(dataset, start, stop)


@given(data=st.binary(min_size=1, max_size=300))
def test_entropy_is_the_sum_over_frequencies(tmp_path_factory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "entropy.bin"
    path.write_bytes(data)
    counts = Counter(data).values()
    expected = sum(c / len(data) * math.log(len(data) / c) for c in counts)
    assert unigram_entropy(ByteDataset(path)) == pytest.approx(expected, abs=1e-12)


def test_entropy_over_chunks(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("zfunc.data.datasets._CHUNK_TOKENS", 7)
    path = tmp_path / "uniform.bin"
    path.write_bytes(bytes(range(256)) * 3)
    entropy = unigram_entropy(ByteDataset(path))
    assert entropy == pytest.approx(math.log(256), abs=1e-12)


def test_ids_are_little_endian_everywhere():
    for name in DTYPES:
        order = memmap._little_endian(name).byteorder
        single_byte = name == "uint8"
        assert order == "|" if single_byte else order in ("<", "=")
        assert order != "=" or sys.byteorder == "little"
