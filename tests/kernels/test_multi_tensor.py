# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors in one launch: every element once, whatever the sizes."""

import contextlib
import math
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from zfunc.kernels import multi_tensor as module
from zfunc.kernels.multi_tensor import (
    bits,
    by_dtypes,
    chunk_of,
    chunked,
    column,
    entry,
    filled,
    launch,
    listed,
    narrowed,
    number,
    table,
)

SIZES = st.lists(
    st.sampled_from([0, 1, 2, 127, 1023, 1024, 1025, 4097]), min_size=1, max_size=8
)


@triton.jit(do_not_specialize=["count", "blocks"])
def scale(
    table_ptr,
    count,
    blocks,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, first, length = chunk_of(table_ptr, count, blocks, BLOCK)
    x_ptr = column(table_ptr, count, tensor, 0, first, TYPE, ALIGNED)
    y_ptr = column(table_ptr, count, tensor, 1, first, TYPE, ALIGNED)
    by = number(entry(table_ptr, count, tensor, 4), TYPE)
    plus = listed(table_ptr, count, 5, 1, TYPE)
    at = length * 0
    while at < length:
        inside = at + tl.arange(0, BLOCK) < length
        x = tl.load(x_ptr + at + tl.arange(0, BLOCK), inside)
        y = tl.load(y_ptr + at + tl.arange(0, BLOCK), inside)
        tl.store(y_ptr + at + tl.arange(0, BLOCK), y + x * by + plus, inside)
        at += BLOCK


@settings(max_examples=40)
@given(SIZES, st.sampled_from([0, 1, 4]), st.sampled_from([1, 2, 1056]))
def test_every_element_once(sizes, offset, programs):
    """Empty tensors anywhere, addresses of all alignments, chunks of many blocks."""
    xs = [torch.randn(n + offset)[offset:] for n in sizes]
    ys = [torch.zeros(n + offset)[offset:] for n in sizes]
    by = [0.1 * i for i in range(len(sizes))]
    with mock.patch.object(module, "_PROGRAMS", programs):
        tab = table([xs, ys], [[bits(b) for b in by]], [bits(7.0), bits(0.5)])
    assert tab.chunks <= programs + len(sizes)
    aligned = all(x.data_ptr() % 16 == 0 for x in (*xs, *ys))
    assert tab.aligned == aligned
    launch(scale, tab, TYPE=tl.float32, BLOCK=1024)
    for x, y, b in zip(xs, ys, by, strict=True):
        assert torch.equal(y, x * torch.tensor(b) + 0.5)


def test_many_tensors():
    xs = [torch.full((n % 3,), float(n)) for n in range(100)]
    ys = [torch.zeros_like(x) for x in xs]
    tab = table([xs, ys], [[bits(1.0)] * 100], [0, bits(0.0)])
    launch(scale, tab, TYPE=tl.float32, BLOCK=1024)
    assert all(map(torch.equal, xs, ys))


@given(st.lists(st.integers(0, 2**40), max_size=20))
def test_chunks(numels):
    blocks, starts = chunked(numels)
    assert 1 <= blocks <= 64
    for numel, low, high in zip(numels, starts, starts[1:], strict=False):
        assert (high - low - 1) * blocks * 1024 < max(numel, 1)
        assert (high - low) * blocks * 1024 >= numel
    assert starts[-1] <= max(1056, sum(numels) / 65536 + 1) + len(numels)


@triton.jit(do_not_specialize=["count", "blocks"])
def where(table_ptr, count, blocks, out_ptr, ALIGNED: tl.constexpr):
    tensor, first, length = chunk_of(table_ptr, count, blocks, 1024)
    tl.store(out_ptr, tensor)
    tl.store(out_ptr + 1, first)
    tl.store(out_ptr + 2, length)


def test_places_beyond_32_bits():
    x = torch.zeros(1)
    tab = table([[x]])
    # As if this program were the last of 100001 that share a tensor.
    data = torch.tensor([-100000, 100000 * 65536 + 5, x.data_ptr()])
    out = torch.zeros(3, dtype=torch.int64)
    launch(where, tab._replace(data=data, blocks=64), out)
    assert out.tolist() == [0, 100000 * 65536, 5]


def test_groups_of_equal_dtypes():
    a, b = torch.ones(2), torch.ones(2).double()
    assert by_dtypes([[a, b, a, b], [a, a, a, b]]) == [[0, 2], [1], [3]]
    assert by_dtypes([[a[:0]], [a]]) == []
    with pytest.raises(ValueError, match="zip"):
        by_dtypes([[a], [a, a]])


def test_nothing_is_launched_for_nothing():
    tab = table([[torch.ones(0)]])
    assert tab.chunks == 0
    launch(None, tab)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=130))
@settings(max_examples=10)
def test_a_table_from_arguments(values):
    data = filled(values, torch.device("cpu"))
    assert data[: len(values)].tolist() == values


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=64))
@settings(max_examples=10)
def test_a_table_from_arguments_is_one_kernel(values):
    """Triton compiles a program for each pattern of multiples of 16 in a tuple."""
    with mock.patch.object(module, "_fill_kernel") as kernel:
        filled([*values, 16, 0], torch.device("cpu"))
    for call in kernel.__getitem__.return_value.call_args_list:
        for half in (*call.args[2], *call.args[3]):
            assert half % 16
            assert 2**32 < half < 2**63


@pytest.mark.parametrize("capturing", [True, False])
def test_host_memory_is_not_part_of_a_graph(capturing):
    pinned, made = torch.zeros(2, dtype=torch.int64), []
    module._load_filling.cache_clear()
    with (
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=capturing),
        mock.patch("torch.cuda.device", return_value=contextlib.nullcontext()),
        mock.patch.object(module, "filled", lambda x, device: made.append(x) or x),
        mock.patch("torch.tensor", return_value=pinned),
        mock.patch.object(torch.Tensor, "to", lambda *args, **options: options),
    ):
        got = module._on_device([1, 2], torch.device("cuda"))
    assert got == ([1, 2] if capturing else {"non_blocking": True})
    assert made == ([[1, 2]] if capturing else [[0]])  # loaded before any capture


@given(st.floats(allow_nan=False))
def test_bits(value):
    as_float = torch.tensor([bits(value)]).view(torch.float64)
    assert as_float.item() == value
    assert math.copysign(1, as_float.item()) == math.copysign(1, value)


@triton.jit
def narrow(x_ptr, y_ptr, TYPE: tl.constexpr):
    at = tl.arange(0, 4096)
    tl.store(y_ptr + at, narrowed(tl.load(x_ptr + at), TYPE, True))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_rounding_to_nearest_even(wide, name):
    """Ties between neighbours, the largest and the smallest, and what is no number."""
    dtype = getattr(torch, name)
    x = torch.randn(4096).to(dtype).to(wide)
    x[:2048] = (x[:2048] + x[:2048] * 2.0 ** (-8 if name == "bfloat16" else -11)) / 1
    x[:5] = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-7])
    y = torch.empty(4096, dtype=dtype)
    narrow[(1,)](
        x, y, {"bfloat16": tl.bfloat16, "float16": tl.float16}.get(name, tl.float32)
    )
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
