# SPDX-License-Identifier: Apache-2.0
"""What every update over lists refuses, and what others are told of its writes."""

import pytest
import torch

from zfunc.kernels.adamw import adamw
from zfunc.kernels.sgd import sgd
from zfunc.kernels.update_lists import divisor


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_what_is_written_over_cannot_be_differentiated(kernel):
    """Its value is gone, so a backward that needs it is an error."""
    p, w = torch.ones(3), torch.ones(3, requires_grad=True)
    loss = (w * p).sum()
    with torch.no_grad():
        sgd([p], [torch.ones(3)], learning_rate=0.5, donate=True, kernel=kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_same_memory_twice():
    x, g = torch.ones(4), torch.ones(4)
    options = {"learning_rate": 0.5, "donate": True}
    with pytest.raises(ValueError, match="sgd: a tensor is in params or moments twice"):
        sgd([x, x.view(4)], [g, g], **options)
    weights = {"weight1": 0.1, "weight2": 0.1}
    m, n = torch.zeros(4), torch.zeros(4)
    with pytest.raises(ValueError, match="adamw: a tensor is in params or moments"):
        adamw([x], [g], [m], [n], copies=[m], **weights, **options)
    none = torch.ones(0)
    halves = torch.ones(8)
    sgd([none, none, halves[:4], halves[4:]], [none, none, g, g], **options)
    assert torch.equal(halves, torch.full((8,), 0.5))


def test_no_float8():
    x = [torch.ones(4)]
    with pytest.raises(TypeError, match=r"copy_dtype is torch.float8_e4m3fn, expect"):
        sgd(x, x, learning_rate=0.5, copy_dtype=torch.float8_e4m3fn)
    small = [torch.ones(4).to(torch.float8_e5m2)]
    with pytest.raises(TypeError, match=r"params\[0\] is torch.float8_e5m2, expected"):
        sgd(small, x, learning_rate=0.5)


def test_divisors_are_tensors():
    """torch on CUDA multiplies by the reciprocal of a number."""
    like = torch.ones(2, dtype=torch.float64)
    for made in (divisor(0.3, None, like), divisor(1.0, torch.tensor(0.3), like)):
        assert made.shape == ()
        assert made.dtype == like.dtype
