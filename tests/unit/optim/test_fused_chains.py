# SPDX-License-Identifier: Apache-2.0
"""The fused step of a chain: parts that occur twice, and moments of something else."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import zfunc as zf
from zfunc.core.errors import StructureError
from zfunc.core.update import pure_update
from zfunc.optim import (
    adamw,
    add_decayed_weights,
    chain,
    clip_by_global_norm,
    lamb,
    lion,
    sgd,
)

CLIP = clip_by_global_norm(0.5)


@pytest.mark.parametrize(
    "firsts",
    [(CLIP, CLIP), (CLIP, add_decayed_weights(0.3), CLIP)],
    ids=["twice", "around"],
)
def test_one_clip_in_two_places(firsts):
    params, found = torch.ones(3, 5), []
    grads = torch.arange(15.0).view(3, 5)
    for kernels in ("reference", "triton"):
        tx = chain(*firsts, sgd(0.1, kernels=kernels))
        found.append(pure_update(tx, grads, tx.init(params), params)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["none", "short", "long", "list", "of a clip"])
def test_moments_of_something_else(kernels, kind):
    tx, params = chain(CLIP, adamw(0.1, kernels=kernels)), torch.ones(3)
    clip, last = tx.init(params)
    moments = {
        "none": None,
        "short": (last,),
        "long": (clip, clip, last),
        "list": [clip, last],
        "of a clip": (params, last),
    }[kind]
    with pytest.raises(StructureError, match=r"(chain|clip\w+): moments"):
        pure_update(tx, params, moments, params)


def test_a_rate_that_is_an_integer():
    params, found = torch.ones(3), []
    for kernels in ("reference", "triton"):
        tx = adamw(lambda step: (step + 1) // 2, kernels=kernels)
        state = params, tx.init(params)
        for _ in range(2):
            state = pure_update(tx, params, state[1], state[0])
        found.append(state[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: adamw(value),
        lambda value: adamw(0.1, value),
        lambda value: sgd(0.1, value),
        lambda value: lion(value),
        lambda value: lamb(value),
    ],
)
def test_a_schedule_that_makes_its_tensor_on_the_cpu(make):
    """As the chain, whose elementwise calls take it."""
    with FakeTensorMode():
        params, tx = torch.empty(3, 4, device="cuda"), make(lambda _: torch.tensor(0.9))
        assert tx.fused.applies(params)
        new, _ = pure_update(tx, params, tx.init(params), params)
    assert new.device.type == "cuda"


@pytest.mark.parametrize("make", [adamw, lamb, lion, sgd])
@pytest.mark.parametrize("gap", [1, 2])
def test_the_strides_of_the_chain(make, gap):
    """Parameters whose last dim is not the fastest keep that, and so do moments."""
    params, found = torch.randn(5, 3 * gap, dtype=torch.float64)[:, ::gap].T, []
    for kernels in ("reference", "triton"):
        tx = make(0.1, kernels=kernels)
        state = params, tx.init(params)
        for _ in range(2):
            state = pure_update(tx, params.contiguous(), state[1], state[0])
        found.append(zf.tree_leaves(state))
    for x, y in zip(*found, strict=True):
        assert x.stride() == y.stride()
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.float64, torch.float32)],
    ids=["wider", "narrower"],
)
def test_gradients_that_no_kernel_takes(dtypes):
    """The chain computes: "auto" refuses nothing that it does not."""
    params, grads = (torch.full((1 << 20,), 0.5, dtype=x) for x in dtypes)
    found = []
    for kernels in ("reference", "auto"):
        tx = chain(CLIP, adamw(0.1, kernels=kernels))
        found.append(pure_update(tx, grads, tx.init(params), params)[0])
    assert torch.equal(*found)
    assert tx.fused.applies(params, params)
