# SPDX-License-Identifier: Apache-2.0
"""Several messages under way at once, many times over: the heap stays whole.

With torch's functional all-gather, whose result is made in C++, two of three such runs
end in "malloc(): unaligned tcache chunk detected" or never (torch 2.13, 2 ranks on 2
cores, 2026-11-21).
"""

import random

import pytest
import torch

import zfunc as zf
from zfunc.program.backends import aten

pytestmark = pytest.mark.distributed

SIZES = (384 * 96, 384 * 192, 2, 384, 64, 64)


def gather_often(num_messages):
    """The sum of all that arrives, each message waited for when four more are sent."""
    mesh, draw = zf.make_mesh({"data": 2}), random.Random(0)
    group, weights = mesh.group("data"), torch.randn(64, 64)
    wait, total, under_way = torch.ops._c10d_functional.wait_tensor, 0, []
    for _ in range(num_messages):
        sent = torch.full((draw.choice(SIZES),), float(mesh.rank) + 1)
        under_way.append(aten._all_gather(sent, 2, group))
        del sent
        torch.mm(weights, weights)
        while len(under_way) > 4:
            total += int(wait(under_way.pop(0)).sum())
    return total + sum(int(wait(x).sum()) for x in under_way)


def test_gathers_that_overtake_each_other(ranks):
    draw = random.Random(0)
    want = 3 * sum(draw.choice(SIZES) for _ in range(12_000))
    assert ranks(2).run(gather_often, 12_000) == [want, want]
