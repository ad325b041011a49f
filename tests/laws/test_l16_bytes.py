# SPDX-License-Identifier: Apache-2.0
r"""L16: the bytes in the program are those of the table of ZeRO's stages.

For :math:`\Psi` bytes of parameters on n ranks a rank sends, in units of
:math:`\Psi (n - 1) / n`: 2 at stages 0, 1 and 2, 2 at stage 3 as traced, and 3 once the
passes gather again for the backward; metrics are counted to the byte.
"""

import pytest
import torch

import zfunc as zf
from tests.unit.program.programs import Setting, abstract_program, normal
from zfunc.core.tree import tree_leaves
from zfunc.program.passes import DEFAULT, regather

SCALAR_BYTES = 4
# These models are small enough to be kept, which is one more row of the table.
LARGE = tuple(p for p in DEFAULT if p.__name__ != "keep_small")
PASSES = {"traced": (), "regather": (regather,), "default": LARGE, "small": DEFAULT}


def product(params, x):
    """Every parameter's gradient needs another: all are used in the backward."""
    for pair in params:
        x = x @ (pair["a"] * pair["b"])
    return x.sum()


def linear(params, x):
    """The backward needs every ``w`` but the first, and no ``b``."""
    for layer in params:
        x = x @ layer["w"] + layer["b"]
    return x.square().mean()


def rematerialized(params, x):
    """Every block gathers all it has in the backward too, the first one's as well."""
    block = zf.remat(lambda layer, x: torch.tanh(x @ layer["w"] + layer["b"]))
    for layer in params:
        x = block(layer, x)
    return x.square().mean()


def squares(names, num_ranks, dtype=torch.float32):
    width = 2 * num_ranks
    return [
        {name: normal(width, width, seed=i).to(dtype) for name in names}
        for i in range(3)
    ]


def affine(num_ranks):
    width = 2 * num_ranks
    return [{"w": normal(width, width), "b": normal(width)} for _ in range(3)]


def size_bytes(tree):
    return sum(x.nbytes for x in tree_leaves(tree))


def share(total_bytes, num_ranks):
    """What a rank sends of it in one pass around; in whole bytes."""
    return -(-total_bytes * (num_ranks - 1) // num_ranks)


def metrics_bytes(setting, num_ranks, passes="default"):
    """The loss, its weight; the norm of gradients that are in pieces.

    Clipping needs the norm that the metrics have: traced twice, simplified to one.
    """
    norms = 0 if setting.zero == 0 else 1 + (setting.clip and passes == "traced")
    return share(2 * (2 + norms) * SCALAR_BYTES, num_ranks)


def sent_bytes(loss, params, setting, num_ranks, passes):
    batch = normal(2 * setting.microbatches, 2 * num_ranks)
    batch = batch.to(tree_leaves(params)[0].dtype)
    program = abstract_program(
        loss, params, batch, setting, num_ranks, passes=PASSES[passes]
    )
    return program.comm_analysis().total_bytes


def times(setting, passes):
    """How often all parameters cross the wire."""
    m = setting.microbatches
    if setting.zero < 2:
        return 2
    if setting.zero == 2:
        return 1 + m
    return 2 * m if passes in ("traced", "small") else 3 * m


@pytest.mark.parametrize(
    ("num_ranks", "microbatches", "clip"), [(2, 1, False), (4, 1, True), (3, 2, False)]
)
@pytest.mark.parametrize("passes", ["traced", "default", "small"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_table(zero, passes, num_ranks, microbatches, clip):
    setting = Setting(zero, microbatches, clip=clip)
    params = squares("ab", num_ranks)
    expected = times(setting, passes) * share(size_bytes(params), num_ranks)
    found = sent_bytes(product, params, setting, num_ranks, passes)
    assert found == expected + metrics_bytes(setting, num_ranks, passes)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_table_holds_in_bytes_of_the_dtype(zero):
    setting, params = Setting(zero), squares("ab", 2, torch.bfloat16)
    expected = times(setting, "default") * share(size_bytes(params), 2)
    found = sent_bytes(product, params, setting, 2, "default")
    assert found == expected + metrics_bytes(setting, 2)


@pytest.mark.parametrize("passes", ["regather", "default"])
def test_only_what_the_backward_uses_is_gathered_again(passes):
    params, setting = affine(4), Setting(zero=3)
    again = size_bytes([layer["w"] for layer in params[1:]])
    expected = 2 * share(size_bytes(params), 4) + share(again, 4)
    found = sent_bytes(linear, params, setting, 4, passes)
    assert found == expected + metrics_bytes(setting, 4)


@pytest.mark.parametrize("passes", ["traced", "regather", "default"])
def test_remat_gathers_whole_blocks_again(passes):
    params, setting = affine(4), Setting(zero=3)
    expected = 3 * share(size_bytes(params), 4)
    found = sent_bytes(rematerialized, params, setting, 4, passes)
    assert found == expected + metrics_bytes(setting, 4)
