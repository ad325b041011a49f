# SPDX-License-Identifier: Apache-2.0
"""``ranks(n)``: the pool of n real gloo ranks, started once for the whole session."""

import functools

import pytest

from tests.distributed.pool import Pool

# What a user would start: a test runs them in processes of their own.
collect_ignore = ["scripts"]


@pytest.fixture(scope="session")
def ranks():
    pools = []

    @functools.cache
    def start(world):
        pools.append(Pool(world))
        return pools[-1]

    yield start
    for pool in pools:
        pool.close()
