# SPDX-License-Identifier: Apache-2.0
"""Every family on two gloo ranks: losses are those of transformers and torch's AdamW."""

import pytest

from tests.distributed import hf_families as families

pytestmark = pytest.mark.distributed
STEPS = 10


@pytest.mark.parametrize("family", families.FAMILIES)
def test_ten_steps_at_stage_3_are_those_of_transformers(ranks, family):
    want = families.plain_losses(family, 2, STEPS)
    for got in ranks(2).run(families.zfunc_losses, family, STEPS):
        assert got == pytest.approx(want, abs=1e-5)
    assert want[-1] < want[0]
