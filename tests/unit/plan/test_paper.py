# SPDX-License-Identifier: Apache-2.0
"""The ZeRO paper's model states and wire volumes, from traced programs."""

import functools
import importlib

import pytest

from zfunc.plan import Request, paper_rows, plan
from zfunc.plan.paper import paper_bytes

# Figure 1 of the paper: 7.5 billion parameters, 64 ranks, GB by stage.
FIGURE = (120, 31.4, 16.6, 1.88)
PSI_ON_THE_WIRE = (2, 2, 2, 3)


def in_the_paper(model, ranks, zero):
    """A stage as in the paper: see ``paper_rows``, which also checks a third depth."""
    reduce = "fp32" if zero == 3 else "bf16"
    request = Request(model=model, ranks=ranks, reduce=reduce)
    return plan(request, zero, late=zero == 1, check=False)


def check_wire(stage):
    small = stage.wire_elements - PSI_ON_THE_WIRE[stage.zero] * stage.num_params
    # Besides parameters only scalars travel: the loss, the norm.
    assert 0 <= small < 20, (stage.zero, small)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_figure_of_the_paper(zero):
    stage = in_the_paper("7.5b", 64, zero)
    # This model has 7.52e9 parameters, the figure's 7.5e9.
    states_gb = 7.5 * stage.states.total / stage.num_params
    assert states_gb == pytest.approx(FIGURE[zero], rel=0.01)
    check_wire(stage)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["128b", "1t"])
def test_larger_models_on_1024_ranks(model, zero):
    stage = in_the_paper(model, 1024, zero)
    want = float(paper_bytes(zero, stage.num_params, 1024))
    assert stage.states.total == pytest.approx(want, rel=0.01)
    check_wire(stage)


def test_the_table_that_is_printed(monkeypatch):
    """A row for each stage, and 14 bytes at stage 3 with 16-bit reductions."""
    module = importlib.import_module("zfunc.plan.paper")
    once = functools.partial(plan, check=False)
    monkeypatch.setattr(module, "plan", once)
    rows = list(paper_rows(Request(model="tiny", ranks=64, seq_len=8, layers=2)))
    assert [(r.stage.zero, r.reduce, r.late) for r in rows] == [
        (0, "bf16", False),
        (1, "bf16", True),
        (2, "bf16", False),
        (3, "bf16", False),
        (3, "fp32", False),
    ]
    for row in rows:
        check_wire(row.stage)
        want = float(row.paper_bytes)
        if (row.stage.zero, row.reduce) == (3, "bf16"):
            want *= 14 / 16  # without 16-bit pieces of the weights
        assert row.stage.states.total == pytest.approx(want, rel=0.01)
