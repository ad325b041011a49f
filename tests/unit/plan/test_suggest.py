# SPDX-License-Identifier: Apache-2.0
"""The cheapest configuration that fits, and what to type for it."""

import importlib
from dataclasses import replace

import pytest

from zfunc.plan import Request, Stage, suggest
from zfunc.plan.states import ModelStates
from zfunc.plan.suggest import command
from zfunc.plan.totals import Peak, Seconds
from zfunc.program.memory import BytesByKind

REQUEST = Request(model="tiny", ranks=4, seq_len=64, layers=3, batch_size=16)
PSI = 1000


def formula(request, zero, check=True):
    """A plan without tracing: states that are divided, activations that are not."""
    ranks = request.ranks
    params = PSI if zero == 0 else PSI // ranks
    weights = 0 if zero == 3 else PSI
    grads = PSI if zero < 2 and request.microbatches > 1 else params
    acts = 800 * request.samples_per_rank // request.microbatches
    kept = acts // 4 if request.remat else acts
    states = ModelStates(params, 2 * params, weights, grads)
    peak = Peak(0, BytesByKind(params=sum(states), activations=kept))
    return Stage(zero, PSI, states, peak, (), 0, 0, Seconds(0, 0, 0), (), ())


@pytest.fixture
def planned(monkeypatch):
    """The configurations that were planned, in order."""
    seen = []

    def plan(request, zero, check=True):
        seen.append((request, zero))
        return formula(request, zero)

    monkeypatch.setattr(importlib.import_module("zfunc.plan.suggest"), "plan", plan)
    return seen


def everything():
    """All configurations of the same ranks and samples."""
    for remat in (False, True):
        for m in (1, 2, 4):
            request = replace(REQUEST, remat=remat, microbatches=m)
            yield from ((request, zero) for zero in range(4))


def cost(request, zero):
    m = request.microbatches
    return request.remat, (2, 2, 1 + m, 3 * m)[zero], m, zero


def test_it_is_the_cheapest_that_fits(planned):
    """Against a search through all of them."""
    for limit in range(500, 9000, 100):
        fitting = [c for c in everything() if formula(*c).peak_bytes <= limit]
        found = suggest(REQUEST, limit)
        if not fitting:
            assert found.request.ranks > REQUEST.ranks or not found.fits
            continue
        assert found.fits
        assert (found.request, found.stage.zero) == min(fitting, key=lambda c: cost(*c))


def test_what_was_planned_is_not_planned_again(planned):
    stages = [formula(REQUEST, zero) for zero in range(4)]
    found = suggest(REQUEST, 2**40, stages)
    assert (found.request, found.stage.zero, found.fits) == (REQUEST, 0, True)
    assert all(request != REQUEST for request, _ in planned)


def test_more_ranks_where_nothing_fits(planned):
    request = replace(REQUEST, batch_size=None)
    least = formula(replace(request, remat=True), 3).peak_bytes
    found = suggest(request, least - 1)
    assert found.fits
    assert found.stage.zero == 3
    assert found.request.ranks > request.ranks
    assert found.request.samples_per_rank == request.samples_per_rank


def test_nothing_fits_in_a_byte(planned):
    found = suggest(REQUEST, 1)
    assert not found.fits
    assert found.stage.zero == 3
    tried = [formula(*c).peak_bytes for c in planned]
    assert found.stage.peak_bytes == min(tried)


def test_the_command_says_all_that_is_not_the_default():
    request = replace(REQUEST, remat=True, microbatches=2, device="cpu")
    assert command(request, 2) == (
        "zfunc plan --model tiny --ranks 4 --seq-len 64 --batch-size 16 "
        "--microbatches 2 --remat --layers 3 --device cpu --zero 2"
    )
