# SPDX-License-Identifier: Apache-2.0
"""Every family on two gloo ranks: the losses of transformers and torch's AdamW."""

import pytest
import torch

from tests.distributed import hf_families as families

pytestmark = pytest.mark.distributed
STEPS = 10


@pytest.mark.parametrize("family", families.FAMILIES)
def test_ten_steps_at_stage_3_are_those_of_transformers(ranks, family):
    want = families.plain_losses(family, 2, STEPS)
    for got in ranks(2).run(families.zfunc_losses, family, STEPS):
        assert got == pytest.approx(want, abs=1e-5)
    assert want[-1] < want[0]


def test_factors_beside_the_pieces_of_a_directory(ranks, tmp_path):
    families.model_of("llama").save_pretrained(tmp_path, max_shard_size="4KB")
    want, merged = families.adapted_losses(tmp_path, 4)
    assert want[-1] < want[0]
    for losses, params in ranks(2).run(families.adapted_losses, tmp_path, 4, 2):
        assert losses == pytest.approx(want, abs=1e-5)
        for name, value in merged.items():
            torch.testing.assert_close(params[name], value, rtol=1e-4, atol=1e-5)
