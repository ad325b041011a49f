# SPDX-License-Identifier: Apache-2.0
"""The loader's laws: a permutation per epoch, no trace of the world size, and a
cursor that is the whole state."""

import dataclasses
import itertools
import json
from collections import Counter

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zfunc.data import Cursor, Loader, TokenDataset, permute


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Token i is i: a window tells where it came from."""

    num_tokens: int

    @property
    def vocab_size(self) -> int:
        return self.num_tokens

    def __len__(self) -> int:
        return self.num_tokens

    def window(self, start: int, length: int) -> Tensor:
        assert start >= 0
        assert start + length <= self.num_tokens
        return torch.arange(start, start + length)


def ramp(num_tokens: int) -> TokenDataset:
    return Ramp(num_tokens)


@st.composite
def loaders(draw: st.DrawFn) -> Loader:
    """Rank 0's loader: 1 to 60 windows, any batch that fits, any world that divides."""
    seq_len = draw(st.integers(1, 4))
    num_windows = draw(st.integers(1, 60))
    global_batch = draw(st.integers(1, num_windows))
    worlds = [w for w in range(1, global_batch + 1) if global_batch % w == 0]
    tail = draw(st.integers(0, seq_len))
    return Loader(
        ramp(num_windows * (seq_len + 1) + tail),
        seq_len=seq_len,
        global_batch=global_batch,
        world=draw(st.sampled_from(worlds)),
    )


@st.composite
def cursors(draw: st.DrawFn, loader: Loader) -> Cursor:
    return Cursor(
        draw(st.integers(0, 5)),
        draw(st.integers(0, loader.num_windows - 1)),
        draw(st.integers(0, 2**64)),
    )


def every_rank(loader: Loader) -> list[Loader]:
    return [dataclasses.replace(loader, rank=r) for r in range(loader.world)]


def global_tokens(loader: Loader, cursor: Cursor) -> Tensor:
    parts = [rank.next(cursor)[0]["tokens"] for rank in every_rank(loader)]
    return torch.cat(parts)


def windows_of(loader: Loader, tokens: Tensor) -> list[int]:
    """Which window each row is, checking that a row is a whole window."""
    length = loader.seq_len + 1
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(length))
    assert (tokens[:, 0] % length == 0).all()
    return (tokens[:, 0] // length).tolist()


# --- the permutation ---------------------------------------------------------------


@given(n=st.integers(1, 600), seed=st.integers(), epoch=st.integers(0, 2**70))
def test_permute_is_a_permutation(n: int, seed: int, epoch: int):
    assert sorted(permute(i, n, seed, epoch) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**62), data=st.data())
def test_permute_is_injective_on_huge_ranges(n: int, data: st.DataObject):
    some = data.draw(st.sets(st.integers(0, n - 1), max_size=20))
    images = {permute(i, n, seed=1) for i in some}
    assert len(images) == len(some)
    assert all(0 <= image < n for image in images)


def test_permutations_are_uniform():
    # Every order of 4 windows, over seeds and over epochs: 24 cells of 100 expected,
    # chi-squared with 23 degrees of freedom is below 50 with probability 0.999.
    for key in ("seed", "epoch"):
        keys = [{"seed": 5} | {key: value} for value in range(2400)]
        orders = Counter(tuple(permute(i, 4, **k) for i in range(4)) for k in keys)
        assert len(orders) == 24
        assert sum((count - 100) ** 2 / 100 for count in orders.values()) < 50


def test_permutation_has_no_trend():
    # The correlation of i with its image has standard deviation 1/sqrt(n).
    n = 10_000
    images = torch.tensor(
        [permute(i, n, seed=0) for i in range(n)], dtype=torch.float64
    )
    for lag in (0, 1, 2):
        pair = torch.stack([images, torch.arange(n).double().roll(lag)])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.04
        assert (
            lag == 0
            or abs(torch.corrcoef(torch.stack([images, images.roll(lag)]))[0, 1]) < 0.04
        )


def test_permutation_is_part_of_the_format():
    assert [permute(i, 10, seed=0) for i in range(10)] == [7, 2, 5, 9, 4, 3, 6, 8, 1, 0]
    assert [permute(i, 4, seed=0) for i in range(4)] == [1, 3, 0, 2]
    huge = [permute(i, 2**40 + 5, seed=7, epoch=3) for i in range(2)]
    assert huge == [882714813322, 634128377119]


# --- the laws ------------------------------------------------------------------------


@given(data=st.data())
def test_every_epoch_visits_every_window_once(data: st.DataObject):
    loader = data.draw(loaders())
    n, batch = loader.num_windows, loader.global_batch
    cursor = Cursor(seed=data.draw(st.integers(0, 9)))
    visited: list[int] = []
    while len(visited) < 3 * n:
        visited += windows_of(loader, global_tokens(loader, cursor))
        _, cursor = loader.next(cursor)
        assert cursor[:2] == divmod(len(visited), n)
    assert len(visited) % batch == 0
    epochs = [visited[i * n : (i + 1) * n] for i in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


@given(data=st.data())
def test_the_global_batch_does_not_depend_on_the_world(data: st.DataObject):
    loader = data.draw(loaders())
    cursor = data.draw(cursors(loader))
    alone = dataclasses.replace(loader, world=1)
    batch, after = alone.next(cursor)
    assert torch.equal(global_tokens(loader, cursor), batch["tokens"])
    for rank in every_rank(loader):
        part, then = rank.next(cursor)
        assert then == after
        assert part["tokens"].shape == (rank.local_batch, loader.seq_len + 1)
        assert part["tokens"].dtype == torch.int64


@given(data=st.data())
def test_resume_from_json_on_another_world_continues(data: st.DataObject):
    loader = data.draw(loaders())
    start = data.draw(cursors(loader))
    straight = list(itertools.islice(loader.batches(start), 5))
    stop = data.draw(st.integers(0, 4))
    cursor = Cursor(*json.loads(json.dumps(straight[stop][1])))
    resumed = dataclasses.replace(loader, world=1)
    for _, expected in straight[stop + 1 :]:
        whole = global_tokens(loader, cursor)
        batch, cursor = resumed.next(cursor)
        assert torch.equal(batch["tokens"], whole)
        assert cursor == expected


@given(data=st.data())
def test_next_is_pure(data: st.DataObject):
    loader = data.draw(loaders())
    cursor = data.draw(cursors(loader))
    first, after = loader.next(cursor)
    loader.next(after)
    again, after_again = loader.next(cursor)
    assert torch.equal(first["tokens"], again["tokens"])
    assert after == after_again


def test_another_global_batch_reads_the_same_stream():
    dataset, start = ramp(70), Cursor(seed=3)
    streams = []
    for global_batch in (1, 2, 5, 10):
        loader = Loader(dataset, seq_len=6, global_batch=global_batch)
        batches = itertools.islice(loader.batches(start), 20 // global_batch)
        streams.append(torch.cat([batch["tokens"] for batch, _ in batches]))
    assert all(torch.equal(stream, streams[0]) for stream in streams)


def test_seeds_and_epochs_have_orders_of_their_own():
    loader = Loader(ramp(700), seq_len=6, global_batch=100)
    orders = [
        tuple(windows_of(loader, loader.next(Cursor(epoch, 0, seed))[0]["tokens"]))
        for epoch in range(3)
        for seed in range(3)
    ]
    assert len(set(orders)) == 9
    assert tuple(range(100)) not in orders


def test_cursor_is_a_pytree_of_integers():
    cursor = Cursor(1, 2, 3)
    assert optree.tree_leaves(cursor) == [1, 2, 3]
    assert optree.tree_map(lambda x: x, cursor) == cursor
    assert isinstance(optree.tree_map(lambda x: x, cursor), Cursor)


# --- errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": 0}, "seq_len=0, expected at least 1"),
        ({"global_batch": 0}, "global_batch=0, expected at least 1"),
        ({"world": 0}, "world=0, expected at least 1"),
        ({"rank": 2, "world": 2}, "rank=2, expected 0 <= rank < world=2"),
        ({"rank": -1}, "rank=-1, expected 0 <= rank < world=1"),
        (
            {"world": 3},
            "global_batch=4 is not a multiple of world=3; type global_batch=6",
        ),
        (
            {"global_batch": 9},
            r"Ramp\(num_tokens=30\): got 30 tokens, expected at least 36 for one "
            "global batch of 9 windows of 4 tokens; give more text",
        ),
    ],
)
def test_loader_errors(fields: dict, message: str):
    options = {"seq_len": 3, "global_batch": 4} | fields
    with pytest.raises(ValueError, match="Loader: " + message):
        Loader(ramp(30), **options)


@pytest.mark.parametrize("cursor", [Cursor(0, 7), Cursor(0, -1), Cursor(-1, 0)])
def test_cursor_errors(cursor: Cursor):
    loader = Loader(ramp(30), seq_len=3, global_batch=4)
    with pytest.raises(ValueError, match="0 <= position < 7, the number of windows"):
        loader.next(cursor)
