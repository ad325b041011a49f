# SPDX-License-Identifier: Apache-2.0
"""AdamW over lists: the bits of the optimizer by Triton, by C++ and by torch."""

import contextlib
import functools
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.checks import same
from tests.kernels.updates import (
    KINDS,
    cloned,
    donate_is_not_mapped,
    donated_is_pure,
    equal,
    no_derivative,
    refuses,
    traces_and_maps,
    updates,
)
from zfunc import optim
from zfunc.core.sharding import global_norm
from zfunc.kernels import adamw as module
from zfunc.kernels import adamw_cpu

WEIGHTS = {"weight1": 1 - 0.9**3, "weight2": torch.tensor(1 - 0.999**3).double()}
SINGLE, HALF = torch.float32, torch.bfloat16
# A parameter, its gradient and its moments; and the copies.
COMPILED = [
    (SINGLE, SINGLE, SINGLE, None),
    (SINGLE, HALF, SINGLE, HALF),
    (SINGLE, torch.float16, SINGLE, torch.float16),
    (HALF, HALF, SINGLE, None),
    (torch.float64, torch.float64, torch.float64, HALF),
]


def adamw(*lists, **options):
    return module.adamw(*lists, **WEIGHTS | options)


@contextlib.contextmanager
def compiled_for_few():
    """C++ for lists of any size, and no torch in its place."""
    with (
        mock.patch.object(adamw_cpu, "WORTH_NUMEL", 1),
        mock.patch.object(module, "adamw_reference", side_effect=AssertionError),
    ):
        yield


needs_compiler = pytest.mark.skipif(
    adamw_cpu.compiler() is None, reason="there is no C++ compiler"
)
WRITTEN = "params", "mu", "nu"


@settings(max_examples=20)
@given(
    updates(["mu", "nu"]),
    st.sampled_from([0.0, 0.9, torch.tensor(0.85, dtype=torch.float64)]),
    st.sampled_from([0.0, 1e-8]),
    st.booleans(),
)
def test_triton_and_torch_donated_and_not(case, b1, eps, coupled):
    rows, options = case
    options |= {"b1": b1, "eps": eps, "coupled": coupled}
    result = donated_is_pure(adamw, rows, WRITTEN, **options)
    if options["finite"] is not None and not options["finite"]:
        equal(result[:3], [rows[name] for name in WRITTEN])
    if copy := options["copy_dtype"]:
        for x, y in zip(result.copies, result.params, strict=True):
            assert torch.equal(x, y.to(copy))


def lists_of(kind, shapes=((1100,), (3, 5), (0,), (), (7,))):
    def of(dtype):
        return [torch.randn(shape).to(dtype) for shape in shapes]

    p, g, m = (of(dtype) for dtype in kind[:3])
    return {"params": p, "grads": g, "mu": m, "nu": [x.square() for x in of(kind[2])]}


@needs_compiler
@pytest.mark.parametrize("kind", COMPILED)
def test_cpp_is_torch(kind):
    """All the options, on one thread and two, on whole tensors and on slices."""
    rows = lists_of(kind)
    rows["params"][1] = rows["params"][1].mT.contiguous().mT
    rows["mu"][0] = torch.cat([rows["mu"][0][:1], rows["mu"][0]])[1:]
    for coupled, b1, factor, eps in itertools.product(
        [False, True], [0.9, torch.tensor(0.8)], [None, torch.tensor(0.3)], [0.0, 1e-8]
    ):
        options = {
            "learning_rate": torch.tensor(0.013),
            "coupled": coupled,
            "b1": b1,
            "coefficient": factor,
            "eps": eps,
            "copy_dtype": kind[3],
            "weight_decay": [0.1, 0.0, 0.0, 0.2, 0.0],
        }
        expected = adamw(*rows.values(), **options, kernel="reference")
        with compiled_for_few(), mock.patch("torch.get_num_threads", return_value=2):
            equal(adamw(*rows.values(), **options), expected)
        with compiled_for_few():
            equal(adamw(*rows.values(), **options), expected)
            own = cloned(rows)
            done = adamw(*own.values(), **options, donate=True)
        equal(done, expected)
        for name in WRITTEN:
            assert all(map(torch.equal, own[name], getattr(done, name)))


@needs_compiler
@pytest.mark.parametrize("finite", [True, False])
def test_cpp_where_not_all_is_finite(finite):
    rows = lists_of(COMPILED[1])
    rows["grads"][0][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    options = {"learning_rate": 0.1, "copy_dtype": HALF}
    options["finite"] = torch.tensor(finite)
    expected = adamw(*rows.values(), **options, kernel="reference")
    with mock.patch.object(adamw_cpu, "WORTH_NUMEL", 1):
        done = adamw(*rows.values(), **options)
    for some, others in zip(done, expected, strict=True):
        for x, y in zip(some, others, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_cpp_narrows_to_nearest_even(half):
    """All numbers of 16 bits, and those in the middle between two of them."""
    x = torch.arange(-32768, 32768).to(torch.int16).view(half).float()
    x = x[x.isfinite()].sort().values
    middles = ((x[1:].double() + x[:-1].double()) / 2).float()
    x = torch.cat([x, middles, torch.tensor([3e38, -3e38, 1e-45])])
    zeros = torch.zeros_like(x)
    with compiled_for_few():
        done = adamw(
            [x], [zeros.to(half)], [zeros], [zeros], learning_rate=0.0, copy_dtype=half
        )
    assert torch.equal(done.params[0], x)
    assert torch.equal(done.copies[0], x.to(half))
    with compiled_for_few():
        own = x.to(half)[: len(x) // 2].clone()
        rest = [[y[: len(own)]] for y in (zeros.to(half), zeros, zeros)]
        assert torch.equal(adamw([own], *rest, learning_rate=0.0).params[0], own)


def rounded_root(x):
    """torch's square root, which on a CPU is not always the nearest number."""
    return torch.from_numpy(np.sqrt(x.numpy(), out=np.empty_like(x.numpy())))


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupled", [False, True])
def test_the_bits_of_the_optimizer(kernel, kind, coupled):
    """A clip, schedules and a mask included."""
    params = [torch.randn(s).to(kind[0]) for s in (1100, (3, 5))]
    rate, keep = optim.warmup_linear(0.1, 2, 9), lambda step: 0.8 + 0.01 * step
    if coupled:
        last = optim.adam(rate, keep, weight_decay=0.1)
    else:
        last = optim.adamw(rate, keep, mask=lambda path, x: x.dim() == 1)
    tx = optim.chain(optim.clip_by_global_norm(1.0), last)
    mine, moments = params, tx.init(params)
    mu = nu = [torch.zeros_like(p).to(kind[2]) for p in params]
    for step in range(3):
        grads = [torch.randn_like(p).to(kind[1]) for p in params]
        with mock.patch.object(torch.Tensor, "sqrt", rounded_root):
            steps, moments = tx.update(grads, moments, params)
            norm = global_norm(grads)
        params = optim.apply_updates(params, steps)
        b1, count = keep(torch.tensor(step)).double(), torch.tensor(step + 1).double()
        mine, mu, nu, _ = module.adamw(
            mine,
            grads,
            mu,
            nu,
            learning_rate=rate(torch.tensor(step)),
            weight1=1 - torch.pow(b1, count),
            weight2=1 - torch.pow(0.999, count),
            b1=b1,
            coupled=coupled,
            weight_decay=0.1 if coupled else [0.01, 0.0],
            coefficient=(1.0 / (norm + 1e-6)).clamp(max=1.0),
            kernel=kernel,
        )
        means = moments[1][1 if coupled else 0]
        same((*mine, *mu, *nu), (*params, *means.mu, *means.nu))


def test_the_formula():
    """Against float64: eleven operations of float32 on terms that do not cancel, each
    within 2^-24 of itself.
    """
    rows = lists_of(COMPILED[0])
    signs = [m.sign() for m in rows["mu"]]
    for name, sign in (("grads", 1), ("params", -1)):
        rows[name] = [
            sign * s * x.abs() for s, x in zip(signs, rows[name], strict=True)
        ]
    done = adamw(*rows.values(), learning_rate=0.1, weight_decay=0.0, kernel="triton")
    for i, new in enumerate(done.params):
        p, g, m, n = (some[i].double() for some in rows.values())
        m, n = 0.9 * m + (1 - 0.9) * g, 0.999 * n + (1 - 0.999) * g * g
        w1, w2 = WEIGHTS["weight1"], WEIGHTS["weight2"]
        exact = p - 0.1 * (m / w1) / ((n / w2).sqrt() + 1e-8)
        assert ((new - exact).abs() <= 20 * 2.0**-24 * exact.abs()).all()


def test_copies_are_donated():
    rows = lists_of(COMPILED[1])
    for kernel in ("triton", "reference", "auto"):
        expected = adamw(*rows.values(), learning_rate=0.1, copy_dtype=HALF)
        copies = [torch.full_like(x, 7.0) for x in expected.copies]
        pure = adamw(*rows.values(), learning_rate=0.1, copies=copies, kernel=kernel)
        equal(pure, expected)
        assert all((x == 7).all() for x in copies)
        done = adamw(
            *cloned(rows).values(), learning_rate=0.1, copies=copies, donate=True,
            kernel=kernel,
        )  # fmt: skip
        equal(done, expected)
        assert all(x is y for x, y in zip(done.copies, copies, strict=True))


@pytest.mark.parametrize("copies", [[], [torch.ones(3).half()]])
def test_the_operator_in_place_returns_what_is_new(copies):
    x = [[torch.ones(3)] for _ in range(4)]
    with mock.patch.object(module, "_donated_now", wraps=module.donated_op) as op:
        adamw(*x, learning_rate=0.1, copies=copies, donate=True, kernel="triton")
        adamw(*x, learning_rate=0.1, copy_dtype=HALF, donate=True, kernel="triton")
    for call, new in zip(op.call_args_list, ([], [HALF]), strict=True):
        assert [y.dtype for y in module.donated_op(*call.args)] == new


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_no_decay_of_what_is_infinite(coupled, kernel):
    lists = [[torch.tensor([x])] for x in (math.inf, 1.0, 0.0, 0.0)]
    options = {"coupled": coupled, "weight_decay": 0.0, "learning_rate": 0.1}
    new = adamw(*lists, **options, kernel=kernel)
    assert new.params[0].item() == math.inf
    assert new.mu[0].isfinite()


def test_nothing():
    for kernel in ("triton", "reference", "auto"):
        empty = [], [], [], []
        assert adamw(*empty, learning_rate=0.1, kernel=kernel) == empty
        none = [[torch.ones(0, 3)] for _ in range(4)]
        new = adamw(*none, learning_rate=0.1, kernel=kernel)
        assert [x.shape for (x,) in new[:3]] == [(0, 3)] * 3


ROWS = {name: [torch.randn(4, 3)] for name in ("params", "grads", "mu")}
ROWS["nu"] = [torch.rand(4, 3)]


def step(*lists, **options):
    return adamw(*lists, learning_rate=0.1, **{"kernel": "triton"} | options)[0]


def first(*lists, **options):
    return step(*lists, **options)[0]


def test_tracing_and_mapping():
    traces_and_maps(first, ROWS)
    donate_is_not_mapped(first, ROWS)


@needs_compiler
def test_tracing_and_mapping_of_cpp():
    with compiled_for_few():
        traces_and_maps(lambda *lists: first(*lists, kernel="auto"), ROWS)


def test_the_operators_have_one_list_of_arguments():
    """So that a program can write over what it needs no more."""
    pure, donated = (op._schema.arguments for op in (module.pure_op, module.donated_op))
    assert [x.name for x in pure] == [x.name for x in donated]
    over = [x.name for x in donated if x.alias_info is not None]
    assert over == ["params", "mu", "nu", "copies"]


@pytest.mark.parametrize("copies", [[], [torch.ones(4, 3).half()]])
def test_fakes(copies):
    options = {"copies": copies, "copy_dtype": torch.float16}

    def run(*tensors, donate):
        lists = [[x.clone()] for x in tensors]
        out = adamw(
            *lists, learning_rate=0.1, kernel="triton", donate=donate, **options
        )
        return [x for some in out for x in some]

    tensors = [some[0] for some in ROWS.values()]
    for donate in (False, True):
        fn = functools.partial(run, donate=donate)
        expected = fn(*tensors)
        same(make_fx(fn)(*tensors)(*tensors), expected)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(x) for x in tensors]
            graph = make_fx(fn, _allow_non_fake_inputs=True)(*fakes)
        same(graph(*tensors), expected)


def test_a_derivative_is_an_error():
    no_derivative(first, ROWS)


def test_the_reference_has_derivatives():
    """Also where C++ would compute, were it not for them."""
    with mock.patch.object(adamw_cpu, "WORTH_NUMEL", 1):
        tensors = [some[0].double().requires_grad_() for some in ROWS.values()]
        assert torch.autograd.gradcheck(
            lambda *xs: [
                x for (x,) in adamw(*([x] for x in xs), learning_rate=0.1)[:3]
            ],
            tensors,
        )


@pytest.mark.parametrize("found", [None, "/bin/false", "no/such/compiler"])
def test_without_a_compiler(found, caplog):
    adamw_cpu.library.cache_clear()
    rows = lists_of(COMPILED[1])
    expected = adamw(*rows.values(), learning_rate=0.1, kernel="reference")
    with (
        mock.patch("shutil.which", return_value=found),
        mock.patch.object(adamw_cpu, "WORTH_NUMEL", 1),
        caplog.at_level("INFO", "zfunc.kernels"),
    ):
        own = cloned(rows)
        equal(adamw(*own.values(), learning_rate=0.1, donate=True), expected)
    adamw_cpu.library.cache_clear()
    assert "torch computes" in caplog.text or "computes by torch" in caplog.text
    assert (found or "no C++ compiler") in caplog.text


def test_bad_input():
    def of_one_dtype(*lists, **options):
        return adamw(*lists, **options)

    of_one_dtype.__name__ = "adamw"
    refuses(of_one_dtype, ["mu", "nu"])
    x, half = [torch.ones(3)], [torch.ones(3).half()]
    for error, options, message in (
        (ValueError, {"weight1": 0}, "weight1 is 0, expected 1 - b1\\*\\*t"),
        (ValueError, {"weight2": 0.0}, "weight2 is 0, expected 1 - b2"),
        (TypeError, {"weight2": "1"}, "weight2 is str"),
        (ValueError, {"b1": 1.0}, r"b1 is 1.0, expected a number in \[0, 1\)"),
        (ValueError, {"b2": -0.5}, r"b2 is -0.5, expected a number in \[0, 1\)"),
        (TypeError, {"b2": torch.ones(())}, "b2 is Tensor, expected a number"),
        (ValueError, {"eps": -1e-8}, "eps is -1e-08"),
        (TypeError, {"coupled": 1}, "coupled is int, expected True or False"),
        (TypeError, {"copies": x[0]}, "copies is Tensor, expected a list of 1 tensors"),
        (TypeError, {"copies": [*x, *x]}, "copies is list of 2, expected a list of 1"),
        (TypeError, {"copies": [None]}, r"copies\[0\] is None, expected"),
        (TypeError, {"copies": [1]}, r"copies\[0\] is int, expected a floating"),
        (ValueError, {"copies": [torch.ones(2)]}, r"copies\[0\] has shape \(2,\)"),
        (TypeError, {"copies": half, "copy_dtype": HALF},
         r"copies\[0\] is torch.float16, expected torch.bfloat16 as copy_dtype"),
    ):  # fmt: skip
        with pytest.raises(error, match=f"adamw: {message}"):
            adamw(x, x, x, x, learning_rate=0.1, **options)
