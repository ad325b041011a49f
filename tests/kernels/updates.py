# SPDX-License-Identifier: Apache-2.0
"""Lists of parameters, gradients and moments, and what every update has to do."""

import pytest
import torch
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.checks import same

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# Of a parameter, its gradient and its moments.
KINDS = [
    (SINGLE, SINGLE, SINGLE),
    (SINGLE, HALF, SINGLE),
    (SINGLE, torch.float16, SINGLE),
    (HALF, HALF, SINGLE),
    (torch.float16, SINGLE, SINGLE),
    (DOUBLE, DOUBLE, DOUBLE),
]
SHAPES = [(), (0,), (1,), (127,), (1024,), (1025,), (2047,), (3, 5, 7), (40, 61)]


@st.composite
def updates(draw, moments):
    """A dict of lists: params, grads and the named moments; options; and decays."""
    rows = {name: [] for name in ("params", "grads", *moments)}
    for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)):
        kind = draw(st.sampled_from(KINDS))
        for name, dtype in zip(rows, (*kind, *kind[2:] * 3), strict=False):
            x = torch.randn(shape)
            if name == "nu":  # no mean without a mean square
                x = torch.where(rows["mu"][-1] == 0, 0.0, x.abs() + 0.01)
            elif draw(st.booleans()):  # zeros, where signs and ratios have cases
                x = torch.where(torch.rand(shape) < 0.3, 0.0, x)
            x = x.to(dtype)
            strided = len(shape) > 1 and draw(st.booleans())
            rows[name].append(x.mT.contiguous().mT if strided else x)
    count = len(rows["params"])
    decay = draw(st.sampled_from([0.0, 0.1, [0.3, 0.0, 0.01, 0.5][:count]]))
    tensors = draw(st.booleans())
    rate = torch.tensor(0.013, dtype=DOUBLE) if tensors else 0.013
    factor = draw(st.sampled_from([None, 0.37, torch.tensor(0.37)]))
    finite = draw(st.sampled_from([None, True, False]))
    options = {
        "learning_rate": rate,
        "weight_decay": decay,
        "coefficient": factor,
        "finite": None if finite is None else torch.tensor(finite),
        "copy_dtype": draw(st.sampled_from([None, HALF, torch.float16])),
    }
    return rows, options


def cloned(rows):
    """The same lists of tensors that nobody else has, with the same strides."""
    return {
        name: [torch.empty_like(x).copy_(x) for x in some]
        for name, some in rows.items()
    }


def equal(got, expected):
    """All lists equal bit for bit, in dtypes too."""
    for some, others in zip(got, expected, strict=True):
        assert [x.dtype for x in some] == [x.dtype for x in others]
        same(some, others)


def donated_is_pure(fn, rows, written, **options):
    """Triton twice, Triton in place, torch in place: the bits of torch."""
    expected = fn(*rows.values(), **options, kernel="reference")
    before = cloned(rows)
    first = fn(*rows.values(), **options, kernel="triton")
    equal(first, expected)
    equal(fn(*rows.values(), **options, kernel="triton"), expected)
    equal(rows.values(), before.values())
    for kernel in ("triton", "reference"):
        own = cloned(rows)
        done = fn(*own.values(), **options, donate=True, kernel=kernel)
        equal(done, expected)
        for name, some in own.items():
            if name in written:
                assert all(
                    x is y for x, y in zip(getattr(done, name), some, strict=True)
                )
            else:
                same(some, rows[name])
    return expected


def traces_and_maps(fn, rows):
    """make_fx, fake tensors and vmap give what eager calls give.

    ``fn`` takes the lists, all of one tensor, to one tensor.
    """
    tensors = [some[0] for some in rows.values()]

    def one(*xs):
        return fn(*([x] for x in xs))

    expected = one(*tensors)
    assert torch.equal(make_fx(one)(*tensors)(*tensors), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        traced = make_fx(one, _allow_non_fake_inputs=True)(*fakes)
    assert torch.equal(traced(*tensors), expected)
    stacked = [torch.stack([x, x * 0.5]) for x in tensors]
    each = torch.stack([one(*(x[i] for x in stacked)) for i in range(2)])
    assert torch.equal(torch.func.vmap(one)(*stacked), each)
    some = [stacked[0], *tensors[1:]]
    dims = (0, *[None] * (len(tensors) - 1))
    each = torch.stack([one(stacked[0][i], *tensors[1:]) for i in range(2)])
    assert torch.equal(torch.func.vmap(one, dims)(*some), each)


def no_derivative(fn, rows):
    """A derivative of the kernel is an error, not zeros."""
    with pytest.raises(RuntimeError, match='Pass kernel="reference"'):
        torch.func.grad(lambda x: fn([x], *list(rows.values())[1:]).sum())(
            rows["params"][0]
        )


def refuses(fn, moments):
    """The messages of what every update checks."""
    name, x = fn.__name__, torch.ones(3)
    lists = [[x], [x], *[[x] for _ in moments]]

    def call(*args, **options):
        return fn(*args, **{"learning_rate": 0.1} | options)

    cases = [
        (TypeError, "params is Tensor, expected a list", (x, *lists[1:]), {}),
        (ValueError, "grads has 2 tensors, expected 1 as params",
         ([x], [x, x], *lists[2:]), {}),
        (TypeError, r"grads\[0\] is torch.int64",
         ([x], [torch.ones(3, dtype=torch.int64)], *lists[2:]), {}),
        (ValueError, r"grads\[0\] has shape \(2,\), expected \(3,\)",
         ([x], [torch.ones(2)], *lists[2:]), {}),
        (TypeError, r"grads\[0\] is torch.float64, and params\[0\] is updated in "
         "torch.float32", ([x], [x.double()], *lists[2:]), {}),
        (TypeError, "learning_rate is str", lists, {"learning_rate": "1"}),
        (ValueError, "learning_rate is -1", lists, {"learning_rate": -1}),
        (ValueError, "learning_rate is nan", lists, {"learning_rate": float("nan")}),
        (ValueError, r"learning_rate has shape \(3,\), expected \(\)", lists,
         {"learning_rate": x}),
        (TypeError, "coefficient is torch.int64", lists,
         {"coefficient": torch.tensor(1)}),
        (TypeError, "finite is bool, expected a 0-d bool tensor", lists,
         {"finite": True}),
        (TypeError, "finite is torch.float32", lists, {"finite": torch.tensor(1.0)}),
        (ValueError, r"finite has shape \(1,\)", lists,
         {"finite": torch.tensor([True])}),
        (TypeError, "copy_dtype is torch.int8, expected a floating dtype", lists,
         {"copy_dtype": torch.int8}),
        (TypeError, "donate is int, expected True or False", lists, {"donate": 1}),
        (ValueError, "weight_decay is -0.1", lists, {"weight_decay": -0.1}),
        (ValueError, "weight_decay has 2 numbers, expected one, or 1 as params",
         lists, {"weight_decay": [0.1, 0.1]}),
        (TypeError, r"weight_decay\[0\] is Tensor, expected a number", lists,
         {"weight_decay": [x]}),
        (ValueError, "kernel is 'cuda'", lists, {"kernel": "cuda"}),
        (ValueError, "tensors on cpu, meta", lists,
         {"coefficient": torch.ones((), device="meta")}),
    ]  # fmt: skip
    if moments:
        cases += [
            (TypeError, rf"{moments[-1]}\[0\] is torch.bfloat16, and params\[0\] is "
             "updated in torch.float32", (*lists[:-1], [x.bfloat16()]), {}),
            (ValueError, "a tensor is in params or moments twice",
             ([x], [x], *[[x] for _ in moments]), {"donate": True}),
        ]  # fmt: skip
    for error, message, args, options in cases:
        with pytest.raises(error, match=f"{name}(_moments|_apply)?: {message}"):
            call(*args, **options)


def donate_is_not_mapped(fn, rows):
    """What is written over cannot be mapped, and says so."""
    with pytest.raises(RuntimeError, match="donate=True under vmap"):
        torch.func.vmap(
            lambda x: fn([x], *([y[0]] for y in list(rows.values())[1:]), donate=True)[
                0
            ]
        )(torch.stack([rows["params"][0]] * 2))
