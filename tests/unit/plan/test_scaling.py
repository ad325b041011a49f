# SPDX-License-Identifier: Apache-2.0
"""Two depths say what every depth needs: equal to the trace of the whole model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zfunc.plan import Request
from zfunc.plan.errors import PlanError
from zfunc.plan.models import load
from zfunc.plan.planner import _at_depth, _trace, plan
from zfunc.plan.scaling import Block, inserted, scaled

TINY = Request(model="tiny", ranks=8, seq_len=32, layers=5)
SETTINGS = [
    (0, TINY),
    (3, TINY),
    (0, replace(TINY, reduce="bf16")),
    (2, replace(TINY, precision="fp32", remat=True)),
    (3, replace(TINY, microbatches=4)),
    (3, replace(TINY, microbatches=2, remat=True)),
]


def traced(request, zero, depth, late=False):
    return _trace(load(request.model), request, zero, late, depth)


def check(request, zero, late=False):
    short, long, whole = (traced(request, zero, depth, late) for depth in (2, 3, 4))
    assert _at_depth(short, long, 2, 4) == whole


@pytest.mark.parametrize(("zero", "request_"), SETTINGS)
def test_scaled_is_the_whole_trace(request_, zero):
    check(request_, zero)


def test_late_reductions_scale_too():
    check(TINY, 1, late=True)


def test_a_plan_is_that_of_the_whole_trace():
    stage = plan(TINY, 3)
    assert stage.traced == (2, 3, 4)
    whole = traced(TINY, 3, 5)
    assert stage.tokens == tuple(whole.tokens)
    assert stage.states == whole.states
    assert stage.num_params == whole.num_params


def test_a_shallow_model_is_traced_whole():
    assert plan(replace(TINY, layers=3), 0).traced == (3,)


UNEVEN = """
import torch

def build(num_layers=16, seq_len=8):
    params = [torch.empty(4 + i, 4 + i, device="meta") for i in range(num_layers)]

    def loss_fn(params, ids):
        return sum((p @ p).square().mean() for p in params) * ids.float().mean()

    return params, loss_fn
"""


def test_layers_that_differ_are_traced_whole_and_it_says_so(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "uneven_layers.py").write_text(UNEVEN)
    monkeypatch.syspath_prepend(tmp_path)
    stage = plan(Request(model="uneven_layers:build", ranks=4), 3)
    assert stage.traced == (16,)
    assert stage.num_params == sum((4 + i) ** 2 for i in range(16))
    assert "does not repeat layer by layer: traced whole" in caplog.text


# --- sequences -----------------------------------------------------------------------


PARTS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6)


@given(PARTS, st.data())
def test_what_was_inserted_is_found(parts, data):
    """Some parts are there twice: as many tokens are found, in no more blocks."""
    twice = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    short = "".join(parts)
    long = "".join(p * (1 + t) for p, t in zip(parts, twice, strict=True))
    blocks = inserted(short, long, [False] * len(long))
    assert sum(b.stop - b.start for b in blocks) == len(long) - len(short)
    assert len(blocks) <= sum(twice)
    kept = [
        c for i, c in enumerate(long) if not any(b.start <= i < b.stop for b in blocks)
    ]
    assert "".join(kept) == short


def test_what_is_fixed_is_in_no_block():
    assert inserted("ab", "aab", [True, False, False]) == [Block(1, 2)]
    with pytest.raises(PlanError, match="do not differ by repeated parts"):
        inserted("ab", "aab", [True, True, True])


@pytest.mark.parametrize("pair", [("ab", "ba"), ("abc", "ab"), ("ab", "acd")])
def test_what_is_no_insertion_is_refused(pair):
    with pytest.raises(PlanError, match="do not differ by repeated parts"):
        inserted(*pair, [False] * len(pair[1]))


@pytest.mark.parametrize(("depths", "depth"), [((2, 4), 8), ((2, 3), 2)])
def test_depths_that_cannot_be_scaled(depths, depth):
    with pytest.raises(ValueError, match="cannot scale from depths"):
        scaled([], [], depths, depth)
