# SPDX-License-Identifier: Apache-2.0
"""What ``define`` and ``FirstOrder`` give every operator: a device, no silent zero."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

from zfunc.kernels import library
from zfunc.kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient
from zfunc.kernels.cross_entropy_shards import cross_entropy_statistics
from zfunc.kernels.geglu import geglu
from zfunc.kernels.layer_norm import layer_norm
from zfunc.kernels.rms_norm import rms_norm
from zfunc.kernels.rope import rope
from zfunc.kernels.softmax import softmax
from zfunc.kernels.swiglu import swiglu

X, LABELS = torch.randn(3, 4), torch.tensor([0, 3, -100])
TABLE = torch.randn(3, 2)
FUNCTIONS = [
    lambda x, **options: rms_norm(x, None, **options),
    lambda x, **options: layer_norm(x, None, **options),
    lambda x, **options: rope(x, TABLE, TABLE, **options),
    lambda x, **options: swiglu(x, x, **options),
    lambda x, **options: geglu(x, x, **options),
    softmax,
    lambda x, **options: cross_entropy(x, LABELS, **options),
    lambda x, **options: cross_entropy_and_gradient(x, LABELS, **options)[1],
    lambda x, **options: (
        cross_entropy_statistics(x, LABELS, vocab_start=0, **options).maximum
    ),
]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_kernel_runs_on_the_device_of_its_tensors(fn, monkeypatch):
    # Triton launches on the current device, which need not be that of the tensors.
    entered = []

    @contextlib.contextmanager
    def device_of(x):
        entered.append(x)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    fn(X, kernel="triton")
    assert entered


def test_the_device_is_current_while_the_kernel_is_launched(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device_of(x):
        current.append(x)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch = library._on_its_device(lambda *args: list(current))
    assert launch(None, X, LABELS)[0] is X
    assert launch([X], 2) == current == []  # over lists a launch finds its own device


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_forward_mode_is_an_error_and_no_zero(fn):
    def kernel(x):
        return fn(x, kernel="triton")

    with pytest.raises(RuntimeError, match='Pass kernel="reference"'):
        torch.func.jvp(kernel, (X,), (X,))
    with pytest.raises(RuntimeError, match='Pass kernel="reference"'):
        torch.func.hessian(lambda x: kernel(x).square().sum())(X)
    with forward_ad.dual_level():
        kernel(X)  # not a dual number: nothing to say
        with pytest.raises(RuntimeError, match='Pass kernel="reference"'):
            kernel(forward_ad.make_dual(X, X))


def test_floating_dtypes_that_no_kernel_takes():
    small = X.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"swiglu: gate is torch\.float8"):
        swiglu(small, small)
