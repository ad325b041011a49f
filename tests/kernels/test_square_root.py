# SPDX-License-Identifier: Apache-2.0
"""The square root is the nearest number to the exact one."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zfunc.kernels.square_root import square_root


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_the_processor_has_it(dtype):
    x = torch.cat([torch.rand(20000) * s for s in (4.0, 1e-9, 1e30)]).to(dtype)
    edges = [0.0, 1e-45, 1e-38, 3e38, math.inf]
    x = torch.cat([x, torch.arange(300).square(), torch.tensor(edges)]).to(dtype)
    assert torch.equal(square_root(x), torch.from_numpy(np.sqrt(x.numpy())))


@given(st.floats(1e-200, 1e200))
def test_no_neighbour_is_nearer(x):
    root = square_root(torch.tensor(x, dtype=torch.float64)).item()
    for other in (math.nextafter(root, 0.0), math.nextafter(root, math.inf)):
        middle = (Fraction(root) + Fraction(other)) / 2
        assert (middle**2 > Fraction(x)) == (other > root)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_number(dtype):
    x = torch.tensor([-1.0, math.nan, -math.inf, -0.0], dtype=dtype)
    got = square_root(x)
    assert got[:3].isnan().all()
    assert torch.signbit(got[3])


def test_another_device():
    assert square_root(torch.ones(2, device="meta")).shape == (2,)
