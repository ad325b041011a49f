# SPDX-License-Identifier: Apache-2.0
"""Medians, ratios and the difference of losses: what the table is made of."""

import math

import pytest

from zfunc.bench import LossDifference, Measured, loss_difference, ratios
from zfunc.bench.result import LOSS_TOLERANCE


def measured(name, *rounds_s, losses=()):
    return Measured(name, losses, rounds_s, None)


def test_a_slow_step_changes_no_median():
    assert measured("a", (1.0, 1.0, 50.0)).medians_s == (1.0,)


def test_a_slow_round_changes_no_median():
    assert measured("a", (1.0,), (9.0,), (1.1,)).median_s == 1.1


def test_ratios_are_of_the_medians_and_their_range_is_of_the_rounds():
    ours = measured("ours", (1.0,), (2.0,), (4.0,))
    peer = measured("peer", (2.0,), (8.0,), (5.0,))
    (row,) = ratios([ours, peer], {"ours": ("peer",)})
    assert row == ("ours", "peer", 2.0 / 5.0, 0.25, 0.8)


def test_ratios_leave_out_peers_that_did_not_take_part():
    contenders = [measured("ours", (1.0,)), measured("b", (4.0,))]
    found = ratios(contenders, {"ours": ("a", "b"), "b": ()})
    assert [(row.name, row.peer) for row in found] == [("ours", "b")]


def test_the_largest_difference_is_named():
    apart = loss_difference(
        [
            measured("a", losses=(3.0, 2.0, 1.0)),
            measured("b", losses=(3.0, 2.5, 1.0)),
            measured("c", losses=(3.0, 1.0, 0.9)),
        ]
    )
    assert apart == LossDifference(1.5, 2, "c", "b")
    assert not apart.is_small


def test_equal_losses_are_the_same_training():
    a, b = (measured(name, losses=(3.0, 2.0)) for name in "ab")
    assert loss_difference([a, b]).largest == 0
    assert loss_difference([a, b]).is_small
    assert loss_difference([a]).is_small


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_not_the_same_training(bad):
    a, b = measured("a", losses=(1.0, bad)), measured("b", losses=(1.0, 1.0))
    for contenders in ([a, b], [b, a], [a, a]):
        apart = loss_difference(contenders)
        assert (apart.largest, apart.step) == (math.inf, 2)
        assert not apart.is_small


def test_the_tolerance_is_the_one_that_is_promised():
    assert LOSS_TOLERANCE == 1e-5
