# SPDX-License-Identifier: Apache-2.0
"""Every law fails when the library is wrong: ``pytest -s`` prints the table."""

import pytest

from tests.laws.mutants import LAWS, MUTANTS, hunt, hunt_mutant, row


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.patch.__name__)
def test_a_law_kills_the_mutant(mutant):
    kill = hunt_mutant(mutant)
    print(row(mutant, kill))
    assert kill is not None
    # What killed it is no counterexample to the law itself.
    LAWS[mutant.law].check(*kill.example)


@pytest.mark.parametrize("name", LAWS)
def test_the_hunt_finds_nothing_without_a_mutant(name):
    assert hunt(LAWS[name], max_examples=10) is None


def test_every_law_has_a_mutant():
    assert {mutant.law for mutant in MUTANTS} == set(LAWS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
